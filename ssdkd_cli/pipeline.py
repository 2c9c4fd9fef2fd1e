"""The stages of a run in their order: prepare, distil, score, make the files, report.

Each is a function from named values to one value. Labelled images reach the scores alone: the teacher's at the start,
the student's when it is distilled, a file's when it is proven.
"""

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.device import Compute, choose_device
from engine.errors import SSDKDError
from engine.state import State
from engine.students import check_network_name
from engine.teacher import Teacher
from exporters.evaluate import LabelledImages, check_labelled
from ssdkd_cli import console, runs
from ssdkd_cli.artifacts import make
from ssdkd_cli.config_file import read_config, write_config
from ssdkd_cli.describe import describe_distillation, describe_run, describe_student, describe_teacher, with_files
from ssdkd_cli.doubts import learning_warnings, run_warnings
from ssdkd_cli.files import new_folder, write_text
from ssdkd_cli.gates import Limits, check_limits, with_budget
from ssdkd_cli.labels import network_accuracy
from ssdkd_cli.options import Options, as_typed
from ssdkd_cli.preparation import Prepared, check_place, prepare
from ssdkd_cli.report import NO_FILES, Report
from ssdkd_cli.report_page import write_report
from ssdkd_cli.samples import write_samples
from ssdkd_cli.subject import Subject, agreement
from ssdkd_cli.target import Target, resolve_target
from ssdkd_cli.teaching import Distilled, keeping_student, teach
from ssdkd_cli.words import percent


@dataclass(frozen=True)
class Finished:
    """A run that went through."""

    folder: Path
    report: Report


def compress(options: Options, *, command: str) -> Finished:
    """A whole run. `command` is what was typed, for the report.

    Raises:
        SSDKDError: what the user can put right; before the distillation where it can be known then.
        KeyboardInterrupt: from the user; the student so far is then in the run's folder.
    """
    started = time.perf_counter()
    target = target_of(options)
    typed = Limits(options.max_drop, options.max_latency_ms, options.max_size_mb, options.min_agreement)
    limits = with_budget(typed, target)
    if options.eval_data:
        check_labelled(options.eval_data)
    if options.student != runs.SAME:
        check_network_name(options.student)
    compute = choose_device(options.device)
    check_limits(limits, target, has_labels=options.eval_data is not None)
    folder = options.out or runs.default_folder(options.teacher, options.student)
    ablations = read_config(options.config)["distillation"] if options.config else {}
    with new_folder(folder):
        check_place(options, folder)
        prepared = prepare(options, ablations, target, compute, folder)
        settings, warnings = prepared.settings, [*prepared.warnings]
        with keeping_student(folder):
            write_text(folder / runs.CONFIG, write_config(as_typed(options), ablations, dataclasses.asdict(settings)))
            distilled = teach(
                prepared.teacher,
                prepared.student,
                settings,
                compute,
                folder,
                prepared.card,
                inherited=prepared.inherited,
                seed=options.seed,
                time_limit_seconds=options.time_limit,
            )
            warnings += console.warn_all(run_warnings(distilled.state))
            save_picture(folder, distilled.state, class_names(prepared.teacher))
            subject = Subject(distilled.student, prepared.card, distilled.samples, options.embed_preprocessing)
            report, doubts = score(prepared, distilled, subject, options, compute, folder, command=command)
            warnings += doubts
            without_files = dataclasses.replace(report, warnings=(*warnings, NO_FILES))
            write_report(without_files, folder)  # whatever becomes of the files: what the student is worth is known
            made = make(
                subject,
                target,
                folder,
                labelled=prepared.labelled,
                compute=compute,
                seed=options.seed,
                teacher=dataclasses.replace(subject, module=prepared.teacher.module, embed_preprocessing=False),
            )
            warnings += made.warnings
            seconds = time.perf_counter() - started
            report = with_files(report, made, target, limits, warnings=warnings, seconds=seconds)
            write_report(report, folder)
    return Finished(folder, report)


def target_of(options: Options) -> Target:
    """The files to make. Raises SSDKDError for what does not exist, does not fit or is not installed."""
    return resolve_target(
        formats=options.export,
        precisions=options.precision,
        profile=options.profile,
        qat=options.qat,
        fallback=not options.no_fallback,
        half_io=options.fp16_io,
    )


def save_picture(folder: Path, state: State, names: Sequence[str]) -> None:
    """samples.png: of each class the newest samples in the replay buffer."""
    newest = state.buffer.born[: state.buffer.size].argsort(descending=True)
    images, classes = (tensor[newest].cpu().numpy() for tensor in (state.buffer.images, state.buffer.classes))
    write_samples(folder / runs.SAMPLES_PICTURE, images, classes, names)


def class_names(teacher: Teacher) -> tuple[str, ...]:
    """The classes' names, or their numbers."""
    return teacher.spec.class_names or tuple(f"class {number}" for number in range(teacher.spec.classes))


def score(
    prepared: Prepared,
    distilled: Distilled,
    subject: Subject,
    options: Options,
    compute: Compute,
    folder: Path,
    *,
    command: str,
) -> tuple[Report, list[str]]:
    """The report of the student, without its files, and what is doubtful of it, which was said."""
    teacher, labelled = prepared.teacher, prepared.labelled
    with console.stage("score", "comparing student and teacher") as done:
        agreed = agreement(subject, subject.predicted)
        correct = student_accuracy(subject, labelled, compute.device) if labelled else None
        done(f"agreement {percent(agreed)}" + (f", accuracy {percent(correct)}" if labelled else ""))
    doubts = []
    if options.effort != "smoke":  # of that it was said at the start
        of_teacher = prepared.teacher_accuracy
        doubts = learning_warnings(correct, agreed, teacher.spec.classes, of_teacher=of_teacher)
    report = describe_run(
        describe_teacher(teacher, prepared.teacher_accuracy, labelled),
        describe_student(
            distilled,
            arch=options.student,
            input_shape=teacher.spec.input_shape,
            size_bytes=(folder / runs.STUDENT).stat().st_size,
            accuracy=correct,
            agreement=agreed,
        ),
        describe_distillation(distilled.state, held_out_samples=len(distilled.samples.held_out), seed=options.seed),
        compute,
        command=command,
    )
    return report, console.warn_all(doubts)


def student_accuracy(subject: Subject, labelled: LabelledImages, device: torch.device) -> float | None:
    """Percent; None, with a word, for logits that are not finite: a run is not lost by them."""
    try:
        return network_accuracy(copy.deepcopy(subject.module).to(device), subject.card, labelled)
    except SSDKDError as error:
        console.warn(f"the student's accuracy is unknown: {error.message}")
        return None
