"""What an export is made of: the student of a run, or a teacher as it is with synthetic samples of it."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import settings_for
from engine.device import Compute
from engine.errors import SSDKDError
from engine.sampling import synthesize
from engine.source import source_of
from engine.teacher import Teacher, load_teacher
from exporters.evaluate import logits_of
from exporters.runtimes import predictor
from ssdkd_cli import console, runs
from ssdkd_cli.loss import FEWEST_SAMPLES
from ssdkd_cli.stated import Stated
from ssdkd_cli.subject import Subject
from ssdkd_cli.words import count, network, shape

NOISE_SAMPLES = 64
ON_NOISE = "proven on smooth random images: a teacher that was not distilled has no synthetic samples"
SYNTHETIC_SAMPLES = 512  # of a teacher that is exported as it is, to calibrate on, and as many to prove on
SYNTHETIC_PIXELS = 128 * 224 * 224  # of them together: fewer where they are large


@dataclass(frozen=True)
class Material:
    """What an export is made of. `run`: the folder of the run that the network was taken from, None for a teacher."""

    subject: Subject
    run: Path | None
    notes: tuple[str, ...]


def from_run(
    folder: Path, *, trust_pickle: bool, embed_preprocessing: bool, class_names: tuple[str, ...] | None = None
) -> Material:
    """The student of a run; `class_names`, if any, take the place of its own.

    Raises SSDKDError where it cannot be built again.
    """
    with console.stage("student", f"reading {folder}") as done:
        run = runs.open_run(folder, trust_pickle=trust_pickle)
        done(run.card.student)
    notes = () if (folder / runs.REPORT).exists() else (runs.how_far(folder),)
    console.warn_all(notes)
    samples = runs.read_samples(folder)
    channels, height, width = run.card.input_shape
    logits = samples.held_out_logits.shape[1]
    for images in (samples.held_out, samples.calibration):
        if images.shape[1:] != (height, width, channels) or logits != run.card.classes:
            raise SSDKDError(
                f"{folder / runs.SAMPLES} is of another network: expected images [N, {height}, {width}, {channels}] "
                f"and {run.card.classes} logits, found {list(images.shape)} and {logits}",
                "copy the whole folder of the run, or run `ssdkd compress` again",
            )
    card = dataclasses.replace(run.card, class_names=class_names or run.card.class_names)
    return Material(Subject(run.module, card, samples, embed_preprocessing), folder, notes)


def read_teacher(path: Path, stated: Stated) -> Teacher:
    """A teacher; what is doubtful is said. Raises SSDKDError as engine.teacher.load_teacher does."""
    arguments = stated.arguments()
    with console.stage("teacher", f"reading {path}") as done:
        teacher = load_teacher(path, **arguments)
        spec = teacher.spec
        done(
            f"{network(spec.arch)} ({spec.arch_evidence}), {count(spec.parameters)} parameters, "
            f"{shape(spec.input_shape)}, {spec.classes} classes"
        )
    console.warn_all(spec.warnings)
    return teacher


def from_teacher(
    path: Path, stated: Stated, *, needs_samples: bool, seed: int, compute: Compute, embed_preprocessing: bool
) -> Material:
    """A teacher's network as it is.

    `needs_samples`: ranges are to be taken, so synthetic samples are made of it; else noise is enough for the proof.
    """
    teacher = read_teacher(path, stated)
    card = runs.teacher_card(teacher.spec, runs.SAME)
    if needs_samples:
        samples = inverted(teacher, compute=compute, seed=seed)
    else:
        noise = smooth_noise(NOISE_SAMPLES, card.input_shape)
        samples = runs.Samples(noise, said_of(teacher, noise), noise)
    subject = Subject(teacher.module, card, samples, embed_preprocessing)
    return Material(subject, None, () if needs_samples else (ON_NOISE,))


def inverted(teacher: Teacher, *, compute: Compute, seed: int) -> runs.Samples:
    """Synthetic samples of a teacher that is not distilled, half of them to calibrate on and half to prove on."""
    spec = teacher.spec
    settings = settings_for("full", image_shape=spec.input_shape)  # the usual batch on a GPU too: others were not tried
    number = 2 * min(SYNTHETIC_SAMPLES, max(FEWEST_SAMPLES, SYNTHETIC_PIXELS // math.prod(spec.input_shape[1:])))
    parts: list[torch.Tensor] = []
    prior = 0.0
    with console.counted("samples", f"{number} synthetic samples of the teacher") as (tick, done):
        for progress, made in synthesize(source_of(teacher), number, settings=settings, compute=compute, seed=seed):
            parts.append(made.cpu())
            tick(f"round {progress.round} of {progress.rounds}, prior loss {progress.prior_loss:.2g}")
            prior = progress.prior_loss
        done(f"{number} synthetic samples, prior loss {prior:.2g}")
    teacher.module.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    images: NDArray[np.uint8] = torch.cat(parts).numpy()[:number]
    calibration, held_out = np.split(images, 2)
    return runs.Samples(held_out, said_of(teacher, held_out), calibration)


def said_of(teacher: Teacher, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the teacher says of images uint8 [N, H, W, C]: float32 [N, classes]."""
    preprocessing = teacher.spec.preprocessing
    return logits_of(predictor(teacher.module), images, mean=preprocessing.mean, std=preprocessing.std)


def smooth_noise(number: int, input_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Random images with structure at every scale, uint8 [number, H, W, C]; always the same ones."""
    rng = np.random.default_rng(0)
    return np.stack([_smooth_image(rng, input_shape) for _ in range(number)])


def _smooth_image(rng: np.random.Generator, input_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    channels, height, width = input_shape
    total = np.zeros((height, width, channels))
    cells = 1
    while cells <= min(height, width):
        coarse = rng.standard_normal((cells, cells, channels))
        rows, columns = (np.arange(side) * cells // side for side in (height, width))
        total += coarse[rows[:, None], columns[None, :]]
        cells *= 2
    total -= total.min()
    return np.asarray(255 * total / total.max(), dtype=np.uint8)
