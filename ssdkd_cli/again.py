"""A finished run, or a teacher as it is, exported: its files made anew, its report brought up to date."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.device import Compute
from engine.errors import SSDKDError
from exporters import PRECISIONS
from exporters.evaluate import LabelledImages, check_labelled
from exporters.to_tensorrt import check_builder
from ssdkd_cli import console, runs
from ssdkd_cli.artifacts import file_name, file_names, make
from ssdkd_cli.doubts import chance_warnings, slower_warnings
from ssdkd_cli.environment import cpu_name, profile_warnings
from ssdkd_cli.gates import Limits, decide, recommend, runtime_format
from ssdkd_cli.labels import labelled_images, network_accuracy
from ssdkd_cli.material import Material
from ssdkd_cli.measuring import runs_here
from ssdkd_cli.report import NO_FILES, Artifact, Gate, Report, problem_of, read_report
from ssdkd_cli.report_page import write_report
from ssdkd_cli.target import Target, is_for_another_device
from ssdkd_cli.timing import Timing
from ssdkd_cli.words import percent

TIMED_ELSEWHERE = (
    "Files were exported again on another machine than the run's: latencies are of that one, and those that were "
    "measured on the run's own, the teacher's too, are left out: "
)
TIMED_LATER = (
    "Files were exported again, and timed at another moment than the teacher: how many times faster they are holds as "
    "far as the machine was as busy then."
)
TIMED = ("latency_ms", "throughput_per_s", "batch", "runtime")  # what the report has of a timing


@dataclass(frozen=True)
class Exported:
    """What an export made, the limits that were set for it, and the teacher's accuracy (percent) where it is known."""

    artifacts: tuple[Artifact, ...]
    gates: tuple[Gate, ...]
    teacher_accuracy: float | None


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
    is_own_run = material.run is not None and _is_own_run(material.run, folder)
    report = read_report(folder) if is_own_run and (folder / runs.REPORT).exists() else None
    beside = _beside(target, folder) if is_own_run else []
    made = make(
        subject, target, folder, labelled=labelled, compute=compute, seed=seed, beside=beside, notes=material.notes
    )
    if target.cpu_timings_count:  # what is slow here may be fast on another device
        console.warn_all(slower_warnings(made.timings, file_name("fp32", ".onnx")))
    console.warn_all(profile_warnings(target.profile.name))
    artifacts = made.artifacts
    if report and not labelled:
        artifacts = _with_known_accuracy(artifacts, report)
    _, gates = decide(limits, artifacts, target, teacher_accuracy)
    if report:
        reported = artifacts
        if labelled and labelled.sha256 != report.teacher.accuracy_sha256:
            console.warn(f"{folder / runs.REPORT} leaves these accuracies out: its own are of other images, or of none")
            reported = _with_known_accuracy(artifacts, report)
        report = _timed_anew(report, made.timings)
        write_report(_with_artifacts(report, folder, reported, gates, target), folder)
    return Exported(artifacts, gates, teacher_accuracy)


def _beside(target: Target, folder: Path) -> list[Path]:
    """The run's other ONNX files that run here: new ones are timed in turn with them."""
    made = file_names(target)
    others = (path for path in sorted(folder.glob(f"{runs.MODEL}*.onnx")) if path.name not in made)
    return [path for path in others if runs_here(path)]


def _timed_anew(report: Report, timings: Mapping[str, Timing]) -> Report:
    """The report with the timings of now, by a file's name; those of another machine are left out of it, and named."""
    here, its_own = cpu_name(), report.environment.cpu
    is_elsewhere = here != its_own
    artifacts = []
    for item in report.artifacts:
        timing = timings.get(item.path)
        if timing:
            values = vars(timing)
            artifacts.append(dataclasses.replace(item, **{name: values[name] for name in TIMED}))
        elif is_elsewhere:
            artifacts.append(dataclasses.replace(item, latency_ms=None, throughput_per_s=None))
        else:
            artifacts.append(item)
    teacher = report.teacher
    said: tuple[str, ...] = ()
    if is_elsewhere:
        teacher = dataclasses.replace(teacher, latency_ms=None, throughput_per_s=None)
        said = (f"{TIMED_ELSEWHERE}{here}, not {its_own}",)
    elif teacher.latency_ms:
        said = (TIMED_LATER,)
    warnings = [text for text in report.warnings if text != NO_FILES and text not in said]
    return dataclasses.replace(report, teacher=teacher, artifacts=tuple(artifacts), warnings=(*warnings, *said))


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
        console.warn_all(chance_warnings(value, card.classes, is_run=False))
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
    for this target's device, or some are for another that was named before, what was recommended before.
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
    recommendation = recommend(passing, latency.p50 if latency else None, target)
    is_judged = any(item.verified and item.format == runtime_format(target) for item in together)
    is_for_another = not target.is_named and any(is_for_another_device(item.profile) for item in kept)
    if (is_for_another or not is_judged) and before and before.artifact in {item.path for item in kept}:
        recommendation = before
    return dataclasses.replace(report, artifacts=tuple(together), recommendation=recommendation, gates=judged)


def _is_still_there(item: Artifact, folder: Path) -> bool:
    problem = problem_of(item, folder)
    if problem and (folder / item.path).exists():
        console.warn(f"{problem}; the report leaves it out")
    return problem is None


def _with_known_accuracy(artifacts: Sequence[Artifact], report: Report) -> tuple[Artifact, ...]:
    """The artifacts with the accuracy that the report has of the very same bytes, None where it has none."""
    known = {item.sha256: item.accuracy for item in report.artifacts}
    return tuple(dataclasses.replace(item, accuracy=known.get(item.sha256)) for item in artifacts)
