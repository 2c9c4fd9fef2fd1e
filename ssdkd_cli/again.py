"""What can be done with a finished run, or with a single model file: export, evaluate and bench it again."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from engine.errors import SSDKDError
from engine.teacher import load_teacher
from exporters import FORMATS
from exporters.evaluate import accuracy, load_labelled
from exporters.metadata import describe, preprocessing_of
from exporters.runtimes import open_runtime, predictor
from ssdkd_cli import console, runs
from ssdkd_cli.artifacts import artifact, check_formats, export_and_prove, score_file, time_files
from ssdkd_cli.files import check_writable
from ssdkd_cli.report import Artifact, Percentiles, Report, read_report, recommend, write_report

NOISE_SAMPLES = 64
ON_NOISE = "proven on smooth random images: a teacher that was not distilled has no synthetic samples"


@dataclass(frozen=True)
class Material:
    """What an export is made of. `samples`: uint8 [N, H, W, C]; `folder`: where the files go unless --out says.

    `run`: the folder of the run that the network was taken from, None for a teacher.
    """

    module: nn.Module
    card: runs.StudentCard
    samples: NDArray[np.uint8]
    folder: Path
    run: Path | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """The accuracy of one model, percent."""

    path: str
    accuracy: float
    images: int


@dataclass(frozen=True)
class FileTiming:
    """Latency of one image and throughput at `batch` of one file; see `artifacts.Timing`."""

    path: str
    latency_ms: Percentiles
    latency_batch: int
    throughput_per_s: float
    batch: int
    runtime: str


def from_run(folder: Path, *, trust_pickle: bool) -> Material:
    """The student of a run. Raises SSDKDError where it cannot be built again."""
    with console.stage("student", f"reading {folder}") as done:
        run = runs.open_run(folder, trust_pickle=trust_pickle)
        done(run.card.student)
    return Material(run.module, run.card, runs.read_samples(folder), folder, folder, ())


def from_teacher(path: Path, **stated: Any) -> Material:
    """A teacher's network as it is; `stated` are the arguments of engine.teacher.load_teacher."""
    with console.stage("teacher", f"reading {path}") as done:
        teacher = load_teacher(path, **stated)
        done(teacher.spec.arch)
    for sentence in teacher.spec.warnings:
        console.warn(sentence)
    card = runs.teacher_card(teacher.spec, runs.SAME)
    samples = smooth_noise(NOISE_SAMPLES, card.input_shape)
    return Material(teacher.module, card, samples, Path("runs") / path.stem, None, (ON_NOISE,))


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


def export(
    material: Material, formats: Sequence[str], folder: Path, *, overwrite: bool, embed_preprocessing: bool
) -> list[Artifact]:
    """Write, prove and time the files; where `folder` is the run that they are of, its report is brought up to date.

    Raises:
        SSDKDError: unknown format, a file that is there already, a folder that is another run, or a network that
            cannot be exported.
    """
    check_formats(formats)
    report = _report_of(material, folder)
    for name in formats:
        path = folder / f"{runs.MODEL}{FORMATS[name].suffix}"
        if material.run is None and path.resolve() == Path(material.card.teacher_path):
            raise SSDKDError(
                f"{path} is the teacher itself: its export would replace it", "write beside it with --out DIR"
            )
        if path.exists() and not overwrite:
            raise SSDKDError(f"{path} is there already", "write beside it with --out DIR, or add --overwrite")
    check_writable(folder)
    proofs = [
        export_and_prove(
            name, material.module, folder, material.samples, material.card, embed_preprocessing=embed_preprocessing
        )
        for name in formats
    ]
    paths = [proof.path for proof in proofs if proof.verification.verified]
    runtimes = [open_runtime(path) for path in paths]
    timings = dict(zip(paths, time_files(runtimes, material.samples), strict=True)) if paths else {}
    artifacts = [artifact(proof, folder, timings, None, material.notes) for proof in proofs]
    if report:
        write_report(_with_artifacts(report, artifacts), folder)
    return artifacts


def _report_of(material: Material, folder: Path) -> Report | None:
    """The report that an export into `folder` changes: that of the run itself, if it has one.

    Raises:
        SSDKDError: the folder is another run, or its report cannot be read.
    """
    if material.run is not None and folder.resolve() == material.run.resolve():
        return read_report(folder) if (folder / runs.REPORT).exists() else None
    found = [name for name in (runs.STUDENT, runs.REPORT, runs.METRICS) if (folder / name).exists()]
    if found:
        raise SSDKDError(
            f"{folder} holds another run ({', '.join(found)}): expected the run that is exported, or no run",
            "choose another folder with --out DIR",
        )
    return None


def _with_artifacts(report: Report, artifacts: Sequence[Artifact]) -> Report:
    """The report with these artifacts, in place of those of the same files."""
    changed = {item.path.removesuffix(".rejected") for item in artifacts}
    kept = [item for item in report.artifacts if item.path.removesuffix(".rejected") not in changed]
    together = (*kept, *artifacts)
    return dataclasses.replace(report, artifacts=together, recommendation=recommend(together, report.teacher))


def evaluate(
    model: Path,
    data: Path,
    *,
    input_shape: tuple[int, int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    trust_pickle: bool,
) -> list[Score]:
    """The accuracy of a run's student and of its files, or of one file, which `input_shape`, `mean` and `std` describe.

    Raises:
        SSDKDError: no model, data that does not fit it, or an option that does not apply to it.
    """
    if not model.is_dir():
        runtime = open_runtime(model, input_shape=input_shape)
        if trust_pickle:
            raise SSDKDError(
                f"--trust-pickle is for a run that needs its teacher's file; {model} is a file that runs no code",
                "leave --trust-pickle out",
            )
        said = describe(runtime.metadata)
        mean, std = preprocessing_of(said, channels=runtime.input_shape[0], mean=mean, std=std)
        labelled = load_labelled(
            data, input_shape=runtime.input_shape, classes=runtime.classes, class_names=said.class_names
        )
        value = accuracy(runtime.run, labelled, mean=mean, std=std, batch=runtime.fixed_batch)
        return [Score(str(model), value, len(labelled.labels))]
    stated = {"--input": input_shape, "--mean": mean, "--std": std}
    given = " ".join(name for name, value in stated.items() if value is not None)
    if given:
        raise SSDKDError(f"{given} describe a single file; {model} is a run, which knows its own", f"leave {given} out")
    run = runs.open_run(model, trust_pickle=trust_pickle)
    card = run.card
    labelled = load_labelled(data, input_shape=card.input_shape, classes=card.classes, class_names=card.class_names)
    images = len(labelled.labels)
    with console.stage("score", f"running {images:,} images"):
        value = accuracy(predictor(run.module), labelled, mean=card.mean, std=card.std)
        scores = [Score(str(model / runs.STUDENT), value, images)]
        scores += [Score(str(path), score_file(open_runtime(path), labelled), images) for path in files_of(model)]
    return scores


def bench(model: Path, *, input_shape: tuple[int, int, int] | None) -> list[FileTiming]:
    """Latency and throughput of a run's files, in turn, or of one file.

    Raises:
        SSDKDError: no model file there, or one that cannot be run.
    """
    paths = files_of(model) if model.is_dir() else [model]
    if not paths:
        raise SSDKDError(f"{model} holds no exported file", f"export it first: ssdkd export {model} --export onnx")
    with console.stage("speed", f"timing {', '.join(path.name for path in paths)}"):
        runtimes = [open_runtime(path, input_shape=input_shape) for path in paths]
        timings = time_files(runtimes, smooth_noise(NOISE_SAMPLES, runtimes[0].input_shape))
    if timings[0].latency_batch > 1:
        console.warn(f"the latency is of {timings[0].latency_batch} images at once: no other batch can be run")
    return [FileTiming(str(path), **vars(timing)) for path, timing in zip(paths, timings, strict=True)]


def files_of(folder: Path) -> list[Path]:
    """The exported files of a run that were not rejected."""
    suffixes = {format.suffix for format in FORMATS.values()}
    return sorted(path for path in folder.glob(f"{runs.MODEL}*") if path.suffix in suffixes)
