"""What can be done with a finished run, or with a single model file: export, evaluate and bench it again."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import settings_for
from engine.device import Compute
from engine.errors import SSDKDError
from engine.sampling import synthesize
from engine.task import Classification
from engine.teacher import Teacher, batchnorm_layers, load_teacher
from exporters import FORMATS
from exporters.evaluate import LAYOUT_HINT, LabelledImages, accuracy, load_labelled
from exporters.metadata import describe, preprocessing_of
from exporters.precision import PRECISIONS
from exporters.runtimes import inference_batch, open_runtime, predictor, to_input
from exporters.to_tensorrt import check_builder
from ssdkd_cli import console, runs
from ssdkd_cli.artifacts import PLAN, artifact, file_name, file_names, make_files, score_file, timed_paths
from ssdkd_cli.files import check_writable
from ssdkd_cli.gates import Limits, decide, recommend
from ssdkd_cli.precisions import Subject
from ssdkd_cli.report import Artifact, Gate, Percentiles, Report, read_report, write_report
from ssdkd_cli.target import Target
from ssdkd_cli.timing import BATCHES, measure, time_files, time_plan_file

SYNTHETIC_SAMPLES = 512  # of a teacher that is exported as it is, to calibrate on, and as many to prove on
SYNTHETIC_PIXELS = 128 * 224 * 224  # of them together: fewer where they are large
NOISE_SAMPLES = 64
ON_NOISE = "proven on smooth random images: a teacher that was not distilled has no synthetic samples"


@dataclass(frozen=True)
class Material:
    """What an export is made of. `folder`: where the files go unless --out says.

    `run`: the folder of the run that the network was taken from, None for a teacher.
    """

    subject: Subject
    folder: Path
    run: Path | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """What an export made, and the limits that were set for it."""

    artifacts: tuple[Artifact, ...]
    gates: tuple[Gate, ...]


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


def from_run(folder: Path, *, trust_pickle: bool, embed_preprocessing: bool) -> Material:
    """The student of a run. Raises SSDKDError where it cannot be built again."""
    with console.stage("student", f"reading {folder}") as done:
        run = runs.open_run(folder, trust_pickle=trust_pickle)
        done(run.card.student)
    return Material(Subject(run.module, run.card, runs.read_samples(folder), embed_preprocessing), folder, folder, ())


def from_teacher(
    path: Path, *, needs_samples: bool, seed: int, compute: Compute, embed_preprocessing: bool, **stated: Any
) -> Material:
    """A teacher's network as it is; `stated` are the arguments of engine.teacher.load_teacher.

    `needs_samples`: ranges are to be taken, so synthetic samples are made of it; else noise is enough for the proof.
    """
    with console.stage("teacher", f"reading {path}") as done:
        teacher = load_teacher(path, **stated)
        done(teacher.spec.arch)
    for sentence in teacher.spec.warnings:
        console.warn(sentence)
    card = runs.teacher_card(teacher.spec, runs.SAME)
    if needs_samples:
        samples = inverted(teacher, compute=compute, seed=seed)
    else:
        noise = smooth_noise(NOISE_SAMPLES, card.input_shape)
        logits = logits_of(teacher, noise)
        samples = runs.Samples(noise, logits, noise, logits)
    subject = Subject(teacher.module, card, samples, embed_preprocessing)
    return Material(subject, Path("runs") / path.stem, None, () if needs_samples else (ON_NOISE,))


def inverted(teacher: Teacher, *, compute: Compute, seed: int) -> runs.Samples:
    """Synthetic samples of a teacher that is not distilled, half of them to calibrate on and half to prove on."""
    spec = teacher.spec
    settings = settings_for("full", image_shape=spec.input_shape)
    number = 2 * min(
        SYNTHETIC_SAMPLES, max(settings.inversion_batch, SYNTHETIC_PIXELS // math.prod(spec.input_shape[1:]))
    )
    parts: list[torch.Tensor] = []
    prior = 0.0
    with console.counted("samples", f"{number} synthetic samples of the teacher") as (tick, done):
        for progress, made in synthesize(
            teacher.module,
            number,
            task=Classification(spec.classes),
            image_shape=spec.input_shape,
            mean=spec.preprocessing.mean,
            std=spec.preprocessing.std,
            batchnorm_layers=batchnorm_layers(teacher.module),
            settings=settings,
            compute=compute,
            seed=seed,
        ):
            parts.append(made.cpu())
            tick(f"round {progress.round} of {progress.rounds}, prior loss {progress.prior_loss:.2g}")
            prior = progress.prior_loss
        done(f"{number} synthetic samples, prior loss {prior:.2g}")
    teacher.module.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    images: NDArray[np.uint8] = torch.cat(parts).numpy()[:number]
    logits = logits_of(teacher, images)
    half = number // 2
    return runs.Samples(images[half:], logits[half:], images[:half], logits[:half])


def logits_of(teacher: Teacher, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the teacher says of images uint8 [N, H, W, C]: float32 [N, classes]."""
    run, preprocessing = predictor(teacher.module), teacher.spec.preprocessing
    batch = inference_batch(teacher.spec.input_shape)
    parts = [images[first : first + batch] for first in range(0, len(images), batch)]
    return np.concatenate([run(to_input(part, preprocessing.mean, preprocessing.std)) for part in parts])


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


def beside_what_is_there(target: Target, source: Path, folder: Path, *, overwrite: bool) -> Target:
    """A run that has its float32 file keeps it where another precision is added: it need not be written again."""
    is_own_run = source.is_dir() and folder.resolve() == source.resolve()
    has_float32 = is_own_run and (folder / file_name("fp32", ".onnx")).exists() and not overwrite
    return dataclasses.replace(target, with_float32=not has_float32 or not target.asked)


def check_place(source: Path, target: Target, folder: Path, *, overwrite: bool, eval_data: Path | None) -> None:
    """Raises SSDKDError for what would stop an export at its end: files that are there, another run, a disk."""
    is_own_run = source.is_dir() and folder.resolve() == source.resolve()
    found = [name for name in (runs.STUDENT, runs.REPORT, runs.METRICS) if (folder / name).exists()]
    if found and not is_own_run:
        raise SSDKDError(
            f"{folder} holds another run ({', '.join(found)}): expected the run that is exported, or no run",
            "choose another folder with --out DIR",
        )
    for path in (folder / name for name in file_names(target)):
        if path.resolve() == source.resolve():
            raise SSDKDError(
                f"{path} is the teacher itself: its export would replace it", "write beside it with --out DIR"
            )
        if path.exists() and not overwrite:
            raise SSDKDError(f"{path} is there already", "write beside it with --out DIR, or add --overwrite")
    if eval_data and not eval_data.exists():
        raise SSDKDError(f"{eval_data}: nothing there", LAYOUT_HINT)
    if target.flavour:
        check_builder(target.flavour)
    check_writable(folder)


def export(
    material: Material,
    target: Target,
    folder: Path,
    *,
    limits: Limits,
    eval_data: Path | None,
    compute: Compute,
    seed: int,
) -> Exported:
    """Write, prove and time the files; where `folder` is the run that they are of, its report is brought up to date.

    Raises:
        SSDKDError: a network that cannot be exported, or a limit that has nothing to be compared with.
    """
    subject, card = material.subject, material.subject.card
    labelled = None
    if eval_data:
        labelled = load_labelled(
            eval_data, input_shape=card.input_shape, classes=card.classes, class_names=card.class_names
        )
    teacher_accuracy = _teacher_accuracy(material, labelled) if limits.max_drop is not None else None
    proofs = make_files(subject, target, folder, compute=compute, seed=seed)
    _, timings = measure(*timed_paths(proofs), subject.samples.held_out, folder, batch=target.timed_batch)
    profile = target.profile.name if target.is_named else None
    artifacts = tuple(
        artifact(proof, subject, timings, labelled, profile=profile, notes=material.notes) for proof in proofs
    )
    _, gates = decide(limits, artifacts, target, teacher_accuracy)
    if material.run is not None and folder.resolve() == material.run.resolve() and (folder / runs.REPORT).exists():
        report = read_report(folder)
        write_report(_with_artifacts(report, folder, artifacts, gates, target), folder)
    return Exported(artifacts, gates)


def _teacher_accuracy(material: Material, labelled: LabelledImages | None) -> float | None:
    """Percent, what --max-drop compares with: of a teacher measured now, of a run's teacher what the report says.

    Raises SSDKDError where a run's report does not say it of as many images.
    """
    if labelled is None:
        return None
    if material.run is None:
        card = material.subject.card
        return accuracy(predictor(material.subject.module), labelled, mean=card.mean, std=card.std)
    of_teacher, images = read_report(material.run).teacher, len(labelled.labels)
    if of_teacher.accuracy is None or of_teacher.accuracy_images != images:
        known = f"on {of_teacher.accuracy_images:,} images" if of_teacher.accuracy_images else "on none"
        raise SSDKDError(
            f"--max-drop compares with the teacher, whose accuracy the report of {material.run} has {known}; "
            f"these are {images:,}",
            "give the images that `ssdkd compress --eval-data` was given",
        )
    return of_teacher.accuracy


def _with_artifacts(
    report: Report, folder: Path, artifacts: Sequence[Artifact], gates: Sequence[Gate], target: Target
) -> Report:
    """The report with these artifacts and what was judged of them, in place of those of the same files.

    What is known of a file that came out as the very same bytes stays known; files that are gone are left out.
    """
    changed = {_own_name(item.path) for item in artifacts}
    before = {item.sha256: item for item in report.artifacts}
    artifacts = [
        dataclasses.replace(item, accuracy=before[item.sha256].accuracy)
        if item.accuracy is None and item.sha256 in before
        else item
        for item in artifacts
    ]
    kept = [item for item in report.artifacts if _own_name(item.path) not in changed and (folder / item.path).exists()]
    together = sorted((*kept, *artifacts), key=lambda item: PRECISIONS.index(item.precision))
    kept_gates = [gate for gate in report.gates if gate.artifact in {item.path for item in kept}]
    judged = (*kept_gates, *gates)
    passing, _ = decide(Limits(), together, target, report.teacher.accuracy)
    failed = {gate.artifact for gate in judged if not gate.passed}
    latency = report.teacher.latency_ms
    recommendation = recommend([item for item in passing if item.path not in failed], latency.p50 if latency else None)
    return dataclasses.replace(report, artifacts=tuple(together), recommendation=recommendation, gates=judged)


def _own_name(path: str) -> str:
    return path.removesuffix(".rejected")


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
    """Latency and throughput of a run's files, in turn, or of one file; TensorRT plans on the GPU, the rest on the CPU.

    Raises:
        SSDKDError: no model file there, or one that cannot be run.
    """
    paths = files_of(model) if model.is_dir() else [model]
    if not paths:
        raise SSDKDError(
            f"{model} holds no exported file that can be run here",
            f"export it first: ssdkd export {model} --export onnx",
        )
    plans = [path for path in paths if path.suffix == PLAN]
    others = [path for path in paths if path.suffix != PLAN]
    with console.stage("speed", f"timing {', '.join(path.name for path in paths)}"):
        runtimes = [open_runtime(path, input_shape=input_shape) for path in others]
        timings = time_files(runtimes, smooth_noise(NOISE_SAMPLES, runtimes[0].input_shape)) if runtimes else []
        timings += [time_plan_file(path, BATCHES[0]) for path in plans]
    if timings[0].latency_batch > 1:
        console.warn(f"the latency is of {timings[0].latency_batch} images at once: no other batch can be run")
    return [FileTiming(str(path), **vars(timing)) for path, timing in zip((*others, *plans), timings, strict=True)]


def files_of(folder: Path) -> list[Path]:
    """The exported files of a run that were not rejected and can be run here; those that cannot are named."""
    suffixes = {format.suffix for format in FORMATS.values()}
    found = sorted(path for path in folder.glob(f"{runs.MODEL}*") if path.suffix in suffixes)
    return [path for path in found if path.suffix != PLAN or _runs_here(path)]


def _runs_here(plan: Path) -> bool:
    try:
        open_runtime(plan)
    except SSDKDError as error:
        console.warn(f"{plan.name} is left out: {error.message}")
        return False
    return True
