"""What can be done with a finished run, or with a single model file: export, evaluate and bench it again."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.device import Compute
from engine.errors import SSDKDError
from exporters import FORMATS
from exporters.evaluate import LAYOUT_HINT, LabelledImages, accuracy, load_labelled
from exporters.metadata import describe, preprocessing_of
from exporters.precision import PRECISIONS
from exporters.runtimes import open_runtime, predictor
from exporters.to_tensorrt import check_builder
from ssdkd_cli import console, runs
from ssdkd_cli.artifacts import PLAN, artifact, file_name, file_names, make_files, score_file, timed_paths
from ssdkd_cli.gates import Limits, decide, recommend
from ssdkd_cli.material import NOISE_SAMPLES, Material, smooth_noise
from ssdkd_cli.report import Artifact, Gate, Percentiles, Report, problem_of, read_report, write_report
from ssdkd_cli.target import Target
from ssdkd_cli.timing import BATCHES, measure, time_files, time_plan_file


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
    if eval_data and not eval_data.exists():
        raise SSDKDError(f"{eval_data}: nothing there", LAYOUT_HINT)
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
    is_own_run = material.run is not None and _is_own_run(material.run, folder)
    report = read_report(folder) if is_own_run and (folder / runs.REPORT).exists() else None
    if report:
        artifacts = tuple(_still_known(item, report) for item in artifacts)
    _, gates = decide(limits, artifacts, target, teacher_accuracy)
    if report:
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

    Files that are gone or were replaced are left out. A file that was proven stays beside one of its name that was
    rejected now.
    """
    changed = {item.path for item in artifacts}
    kept = [item for item in report.artifacts if item.path not in changed and _is_still_there(item, folder)]
    together = sorted((*kept, *artifacts), key=lambda item: PRECISIONS.index(item.precision))
    kept_gates = [gate for gate in report.gates if gate.artifact in {item.path for item in kept}]
    judged = (*kept_gates, *gates)
    passing, _ = decide(Limits(), together, target, report.teacher.accuracy)
    failed = {gate.artifact for gate in judged if not gate.passed}
    latency = report.teacher.latency_ms
    recommendation = recommend([item for item in passing if item.path not in failed], latency.p50 if latency else None)
    return dataclasses.replace(report, artifacts=tuple(together), recommendation=recommendation, gates=judged)


def _is_still_there(item: Artifact, folder: Path) -> bool:
    problem = problem_of(item, folder)
    if problem and (folder / item.path).exists():
        console.warn(f"{problem}; the report leaves it out")
    return problem is None


def _still_known(item: Artifact, report: Report) -> Artifact:
    """The artifact with the accuracy that the report has of the very same bytes, where it was not measured again."""
    known = [before.accuracy for before in report.artifacts if before.sha256 == item.sha256]
    return dataclasses.replace(item, accuracy=known[0]) if known and item.accuracy is None else item


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
