"""What can be done with a finished run, or with a single model file: export, evaluate and bench it again."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.device import Compute
from engine.errors import SSDKDError
from exporters import FORMATS
from exporters.evaluate import LabelledImages, accuracy, check_labelled
from exporters.metadata import describe, preprocessing_of
from exporters.precision import PRECISIONS
from exporters.runtimes import OPENERS, open_runtime
from exporters.to_tensorrt import check_builder
from ssdkd_cli import console, runs
from ssdkd_cli.artifacts import artifact, file_name, file_names, make_files, score_file, timed_paths
from ssdkd_cli.environment import profile_warnings
from ssdkd_cli.gates import Limits, decide, recommend, runtime_format
from ssdkd_cli.labels import (
    chance_warnings,
    labelled_images,
    network_accuracy,
    numbered_images,
    read_classes,
    student_warnings,
)
from ssdkd_cli.material import NOISE_SAMPLES, Material, read_teacher, smooth_noise
from ssdkd_cli.plans import PLAN
from ssdkd_cli.report import Artifact, Gate, Percentiles, Report, problem_of, read_report
from ssdkd_cli.report_page import write_report
from ssdkd_cli.target import Target
from ssdkd_cli.timing import (
    BATCHES,
    busy_warnings,
    crowded_warnings,
    measure,
    slower_warnings,
    time_files,
    time_plan_file,
)
from ssdkd_cli.words import percent

TIMED_LATER = (
    "Files were exported again, and timed at another moment than the teacher: how many times faster they are holds as "
    "far as the machine was as busy then."
)


@dataclass(frozen=True)
class Exported:
    """What an export made, the limits that were set for it, and the teacher's accuracy (percent) where it is known."""

    artifacts: tuple[Artifact, ...]
    gates: tuple[Gate, ...]
    teacher_accuracy: float | None


@dataclass(frozen=True)
class Score:
    """The accuracy of one model, percent."""

    path: str
    accuracy: float
    images: int


@dataclass(frozen=True)
class FileTiming:
    """Latency of one image and throughput at `batch` of one file; see `timing.Timing`."""

    path: str
    latency_ms: Percentiles
    latency_batch: int
    throughput_per_s: float
    batch: int
    runtime: str


def _is_own_run(source: Path, folder: Path) -> bool:
    """Whether what is exported is the run in `folder` itself."""
    return source.is_dir() and folder.resolve() == source.resolve()


def beside_what_is_there(target: Target, source: Path, folder: Path) -> Target:
    """A run that has its float32 file keeps it where another precision is added: it need not be written again."""
    has_float32 = _is_own_run(source, folder) and (folder / file_name("fp32", ".onnx")).exists()
    return dataclasses.replace(target, with_float32=not has_float32 or not target.asked)


def check_place(source: Path, target: Target, folder: Path, *, overwrite: bool, eval_data: Path | None) -> None:
    """Raises SSDKDError for what would stop an export at its end: files that are there, or another run."""
    is_own_run = _is_own_run(source, folder)
    found = [name for name in (runs.STUDENT, runs.REPORT, runs.METRICS) if (folder / name).exists()]
    if found and not is_own_run:
        raise SSDKDError(
            f"{folder} holds another run ({', '.join(found)}): expected the run that is exported, or no run",
            "choose another folder with --out DIR",
        )
    if is_own_run and (folder / runs.REPORT).exists():
        read_report(folder)  # it is to be brought up to date
    for path in (folder / name for name in file_names(target)):
        if path.resolve() == source.resolve():
            raise SSDKDError(
                f"{path} is the teacher itself: its export would replace it", "write beside it with --out DIR"
            )
        if path.exists() and not overwrite:
            raise SSDKDError(f"{path} is there already", "write beside it with --out DIR, or add --overwrite")
    if eval_data:
        check_labelled(eval_data)
    if target.flavour:
        check_builder(target.flavour)


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
    labelled = labelled_images(eval_data, card) if eval_data else None
    teacher_accuracy = _teacher_accuracy(material, labelled, is_needed=limits.max_drop is not None)
    proofs = make_files(subject, target, folder, compute=compute, seed=seed)
    paths, plans = timed_paths(proofs)
    is_own_run = material.run is not None and _is_own_run(material.run, folder)
    beside = _float32_beside(paths, folder) if is_own_run else []
    _, timings, _ = measure([*paths, *beside], plans, subject.samples.held_out, folder, batch=target.timed_batch)
    named = {path.name: timing for path, timing in timings.items()}
    doubts = busy_warnings(named, folder)
    if runtime_format(target) == "onnx":  # else these files are no more than what the device makes its plan of
        doubts += slower_warnings(named, file_name("fp32", ".onnx"))
    console.warn_all([*doubts, *crowded_warnings(compute.threads), *profile_warnings(target.profile.name)])
    profile = target.profile.name if target.is_named else None
    artifacts = tuple(
        artifact(proof, subject, timings, labelled, profile=profile, notes=material.notes) for proof in proofs
    )
    report = read_report(folder) if is_own_run and (folder / runs.REPORT).exists() else None
    if report and not labelled:
        artifacts = _with_known_accuracy(artifacts, report)
    _, gates = decide(limits, artifacts, target, teacher_accuracy)
    if report:
        reported = artifacts
        if labelled and labelled.sha256 != report.teacher.accuracy_sha256:
            console.warn(f"{folder / runs.REPORT} leaves these accuracies out: its own are of other images, or of none")
            reported = _with_known_accuracy(artifacts, report)
        write_report(_with_artifacts(report, folder, reported, gates, target), folder)
    return Exported(artifacts, gates, teacher_accuracy)


def _float32_beside(paths: Sequence[Path], folder: Path) -> list[Path]:
    """The run's own float32 file, which files of another precision are timed beside, if it is there and runs."""
    path = folder / file_name("fp32", ".onnx")
    return [path] if paths and path not in paths and path.exists() and _runs_here(path) else []


def _teacher_accuracy(material: Material, labelled: LabelledImages | None, *, is_needed: bool) -> float | None:
    """Percent: of a teacher measured now, of a run's teacher what the report says of the same images, if it does.

    Raises SSDKDError where it does not and `is_needed`, for --max-drop.
    """
    if labelled is None:
        return None
    if material.run is None:
        card = material.subject.card
        with console.stage("eval data", "scoring the teacher") as done:
            value = network_accuracy(material.subject.module, card, labelled)
            done(f"{len(labelled.labels):,} labelled images: teacher {percent(value)}")
        console.warn_all(chance_warnings(value, card.classes))
        return value
    if not is_needed and not (material.run / runs.REPORT).exists():
        return None
    of_teacher = read_report(material.run).teacher
    if of_teacher.accuracy_sha256 == labelled.sha256:
        return of_teacher.accuracy
    if is_needed:
        known = f"on {of_teacher.accuracy_images:,} images" if of_teacher.accuracy_images else "on none"
        raise SSDKDError(
            f"--max-drop compares with the teacher, whose accuracy the report of {material.run} has {known}; "
            f"these are {len(labelled.labels):,} others",
            "give the images that `ssdkd compress --eval-data` was given",
        )
    return None


def _with_artifacts(
    report: Report, folder: Path, artifacts: Sequence[Artifact], gates: Sequence[Gate], target: Target
) -> Report:
    """The report with these artifacts and what was judged of them, in place of those of the same files.

    Files that are gone or were replaced are left out. A file that was proven stays beside one of its name that was
    rejected now. Recommended is a file that keeps to every limit that any of them was judged by; where none of them is
    for this target's device, what was recommended before.
    """
    changed = {item.path for item in artifacts}
    kept = [item for item in report.artifacts if item.path not in changed and _is_still_there(item, folder)]
    together = sorted((*kept, *artifacts), key=lambda item: PRECISIONS.index(item.precision))
    kept_gates = [gate for gate in report.gates if gate.artifact in {item.path for item in kept}]
    judged = (*kept_gates, *gates)
    failed = {gate.artifact for gate in judged if not gate.passed}
    limits: dict[str, Any] = {gate.name: gate.limit for gate in (*report.gates, *gates)}
    passing, _ = decide(Limits(**limits), together, target, report.teacher.accuracy)
    passing = [item for item in passing if item.path not in failed]
    before, latency = report.recommendation, report.teacher.latency_ms
    recommendation = recommend(passing, latency.p50 if latency else None)
    is_judged = any(item.verified and item.format == runtime_format(target) for item in together)
    if not is_judged and before and before.artifact in {item.path for item in kept}:
        recommendation = before
    warnings = report.warnings if TIMED_LATER in report.warnings else (*report.warnings, TIMED_LATER)
    return dataclasses.replace(
        report, artifacts=tuple(together), recommendation=recommendation, gates=judged, warnings=warnings
    )


def _is_still_there(item: Artifact, folder: Path) -> bool:
    problem = problem_of(item, folder)
    if problem and (folder / item.path).exists():
        console.warn(f"{problem}; the report leaves it out")
    return problem is None


def _with_known_accuracy(artifacts: Sequence[Artifact], report: Report) -> tuple[Artifact, ...]:
    """The artifacts with the accuracy that the report has of the very same bytes, None where it has none."""
    known = {item.sha256: item.accuracy for item in report.artifacts}
    return tuple(dataclasses.replace(item, accuracy=known.get(item.sha256)) for item in artifacts)


def evaluate(
    model: Path,
    data: Path,
    *,
    arch: str | None,
    input_shape: tuple[int, int, int] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    classes: int | Path | None,
    trust_pickle: bool,
) -> list[Score]:
    """The accuracy of a run's student and of its files, or of one file, an exported one or a teacher's.

    What describes the network is for a single file, but for `classes`; `arch` and `trust_pickle` are for a teacher's.

    Raises:
        SSDKDError: no model, data that does not fit it, or an option that does not apply to it.
    """
    stated = {"--arch": arch, "--input": input_shape, "--mean": mean, "--std": std}
    given = " ".join(name for name, value in stated.items() if value is not None)
    if model.is_dir() and given:
        raise SSDKDError(f"{given} describe a single file; {model} is a run, which knows its own", f"leave {given} out")
    number, names = read_classes(classes)
    if model.is_dir():
        return _score_run(model, data, number, names, trust_pickle=trust_pickle)
    if model.suffix.lower() not in OPENERS:
        teacher = read_teacher(
            model,
            arch=arch,
            input_shape=input_shape,
            mean=mean,
            std=std,
            classes=number,
            class_names=names,
            trust_pickle=trust_pickle,
        )
        card = runs.teacher_card(teacher.spec, runs.SAME)
        labelled = labelled_images(data, card)
        value = network_accuracy(teacher.module, card, labelled)
        doubts = chance_warnings(value, card.classes)
    else:
        runtime = open_runtime(model, input_shape=input_shape)
        for flag, is_given in (("--arch", arch is not None), ("--trust-pickle", trust_pickle)):
            if is_given:
                raise SSDKDError(
                    f"{flag} is for a run that needs its teacher's file, or for a checkpoint; {model} runs as it is",
                    f"leave {flag} out",
                )
        check_number(number, model, runtime.classes)
        said = describe(runtime.metadata)
        mean, std = preprocessing_of(said, channels=runtime.input_shape[0], mean=mean, std=std)
        labelled = numbered_images(data, runtime.input_shape, runtime.classes, names or said.class_names)
        value = accuracy(runtime.run, labelled, mean=mean, std=std, batch=runtime.fixed_batch)
        doubts = student_warnings(value, runtime.classes, of_teacher=None)
    console.warn_all(doubts)
    return [Score(str(model), value, len(labelled.labels))]


def check_number(number: int | None, model: Path, classes: int) -> None:
    """Raises SSDKDError where --classes says another number than the model has."""
    if number not in (None, classes):
        raise SSDKDError(
            f"--classes says {number}, but {model} has {classes} outputs", f"give --classes {classes}, or leave it out"
        )


def _score_run(
    model: Path, data: Path, number: int | None, names: tuple[str, ...] | None, *, trust_pickle: bool
) -> list[Score]:
    run = runs.open_run(model, trust_pickle=trust_pickle)
    warn_of_replaced_files(model)
    card = run.card
    check_number(number, model, card.classes)
    labelled = numbered_images(data, card.input_shape, card.classes, names or card.class_names)
    images = len(labelled.labels)
    with console.stage("score", f"running {images:,} images"):
        value = network_accuracy(run.module, card, labelled)
        scores = [Score(str(model / runs.STUDENT), value, images)]
        for path in files_of(model):
            try:
                scores.append(Score(str(path), score_file(open_runtime(path), labelled), images))
            except SSDKDError as error:
                again = f"write it anew: ssdkd export {model} --overwrite, or take it out of the run's folder"
                raise SSDKDError(f"{path}: {error.message}", again) from error
    console.warn_all(student_warnings(value, card.classes, of_teacher=_known_accuracy(model, labelled)))
    return scores


def _known_accuracy(run: Path, labelled: LabelledImages) -> float | None:
    """The teacher's accuracy (percent) where the run's report has it of these very images."""
    with contextlib.suppress(SSDKDError):
        teacher = read_report(run).teacher
        return teacher.accuracy if teacher.accuracy_sha256 == labelled.sha256 else None
    return None


def warn_of_replaced_files(folder: Path) -> None:
    """Says which files of a run are others than its report describes; one that cannot be read describes nothing."""
    with contextlib.suppress(SSDKDError):
        present = [item for item in read_report(folder).artifacts if (folder / item.path).exists()]
        console.warn_all([problem for item in present if (problem := problem_of(item, folder))])


def bench(model: Path, *, input_shape: tuple[int, int, int] | None) -> list[FileTiming]:
    """Latency and throughput of a run's files, in turn, or of one file; TensorRT plans on the GPU, the rest on the CPU.

    Raises:
        SSDKDError: no model file there, or one that cannot be run.
    """
    paths = files_of(model) if model.is_dir() else [model]
    if not paths and not (model / runs.STUDENT).exists():
        raise SSDKDError(
            f"{model} is no run: it holds no {runs.STUDENT}, and no model file that can be run here",
            "give a model file, for example ssdkd bench model.onnx, or the folder that `ssdkd compress` wrote",
        )
    if not paths:
        raise SSDKDError(
            f"{model} holds no exported file that can be run here", f"export it first: {runs.export_command(model)}"
        )
    if model.is_dir():
        warn_of_replaced_files(model)
    plans = [path for path in paths if path.suffix == PLAN]
    others = [path for path in paths if path.suffix != PLAN]
    with console.stage("speed", f"timing {', '.join(path.name for path in paths)}"):
        runtimes = [open_runtime(path, input_shape=input_shape) for path in others]
        timings = time_files(runtimes, smooth_noise(NOISE_SAMPLES, runtimes[0].input_shape)) if runtimes else []
        timings += [time_plan_file(path, BATCHES[0]) for path in plans]
    if timings[0].latency_batch > 1:
        console.warn(f"the latency is of {timings[0].latency_batch} images at once: no other batch can be run")
    timed = dict(zip((*others, *plans), timings, strict=True))
    named = {path.name: timing for path, timing in timed.items()}
    on_cpu = {path.name: timed[path] for path in others}
    console.warn_all([*busy_warnings(named, model), *slower_warnings(on_cpu, file_name("fp32", ".onnx"))])
    return [FileTiming(str(path), **vars(timing)) for path, timing in timed.items()]


def files_of(folder: Path) -> list[Path]:
    """The exported files of a run that were not rejected and can be run here; those that cannot are named."""
    suffixes = {format.suffix for format in FORMATS.values()}
    found = sorted(path for path in folder.glob(f"{runs.MODEL}*") if path.suffix in suffixes)
    return [path for path in found if path.suffix != PLAN or _runs_here(path)]


def _runs_here(path: Path) -> bool:
    try:
        open_runtime(path)
    except SSDKDError as error:
        console.warn(f"{path.name} is left out: {error.message}")
        return False
    return True
