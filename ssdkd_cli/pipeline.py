"""The stages of a run in their order: load, check, distil, save, export, prove, measure, score, report.

Each is a function from named values to one value. Labelled images reach the scores alone: the teacher's at the start,
the student's at the end.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config import DistillationSettings, settings_for
from engine.device import Compute, choose_device
from engine.errors import SSDKDError
from engine.inheritance import inherit
from engine.inspection import count_parameters
from engine.replay import sample_bytes
from engine.state import State
from engine.students import STUDENTS, build_student, check_network_name
from engine.teacher import Teacher
from exporters.evaluate import LabelledImages, check_labelled
from ssdkd_cli import console, replacing, runs
from ssdkd_cli.artifacts import make, try_target
from ssdkd_cli.config_file import read_config, write_config
from ssdkd_cli.describe import describe_distillation, describe_run, describe_student, describe_teacher, with_files
from ssdkd_cli.doubts import chance_warnings, learning_warnings, run_warnings, size_warnings
from ssdkd_cli.environment import profile_warnings
from ssdkd_cli.files import check_file_size, check_space, new_folder, write_text
from ssdkd_cli.gates import Limits, check_limits, with_budget
from ssdkd_cli.labels import labelled_images, network_accuracy, read_classes
from ssdkd_cli.material import read_teacher
from ssdkd_cli.options import Options, as_typed
from ssdkd_cli.report import NO_FILES, Report
from ssdkd_cli.report_page import write_report
from ssdkd_cli.samples import write_samples
from ssdkd_cli.subject import Subject, agreement
from ssdkd_cli.target import Target, resolve_target
from ssdkd_cli.teaching import (
    CALIBRATION_BYTES,
    CALIBRATION_SAMPLES,
    SMALLEST_BATCH,
    Distilled,
    keeping_student,
    teach,
)
from ssdkd_cli.words import count, percent, shape

SMOKE = "--effort smoke shows that it goes through: its student is not worth using"
SPARE_BYTES = 4_000_000  # report, picture, metrics
CHANNELS, PIXELS = range(1, 5), range(16, 513)  # what the engine was made and tried for


@dataclass(frozen=True)
class Finished:
    """A run that went through."""

    folder: Path
    report: Report


@dataclass(frozen=True)
class Prepared:
    """All that a distillation begins with.

    `teacher_accuracy`: percent, on the `labelled` images; None without any. `warnings`: those that were said.
    """

    teacher: Teacher
    student: nn.Module
    inherited: frozenset[str]
    settings: DistillationSettings
    card: runs.StudentCard
    labelled: LabelledImages | None
    teacher_accuracy: float | None
    warnings: tuple[str, ...]


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


def check_place(options: Options, folder: Path) -> None:
    """Raises SSDKDError where a run in `folder` would replace another one, or what it reads."""
    read = (options.teacher, options.student_weights, options.classes, options.eval_data, options.config)
    replacing.check_inputs(folder, [path for path in read if isinstance(path, Path)])
    replacing.recover(folder)
    replacing.check_free(folder, options.overwrite)


def prepare(options: Options, ablations: Mapping[str, Any], target: Target, compute: Compute, folder: Path) -> Prepared:
    """Teacher, student and labelled images, read and tried: what can fail before the distillation fails here."""
    teacher = load(options)
    settings = settings_of(options, ablations, teacher, compute)
    student, inherited = build(options, teacher, settings, target)
    doubts = [*size_warnings(student, teacher), *profile_warnings(target.profile.name)]
    doubts += [SMOKE] if options.effort == "smoke" else []
    warnings = [*teacher.spec.warnings, *console.warn_all(doubts)]
    check_memory(teacher, settings, compute)
    check_space(folder, needed_bytes(teacher, student, settings))
    check_file_size(4 * max(teacher.spec.parameters, count_parameters(student)))
    card = runs.teacher_card(teacher.spec, options.student)
    labelled, teacher_accuracy = read_labelled(options.eval_data, teacher, card, compute.device)
    warnings += [labelled.doubt] if labelled and labelled.doubt else []  # which was said
    warnings += console.warn_all(chance_warnings(teacher_accuracy, teacher.spec.classes, is_run=False))
    return Prepared(teacher, student, inherited, settings, card, labelled, teacher_accuracy, tuple(warnings))


def settings_of(
    options: Options, ablations: Mapping[str, Any], teacher: Teacher, compute: Compute
) -> DistillationSettings:
    """The settings of the effort; those of the [distillation] table win over it, and options of their own over both."""
    typed: dict[str, Any] = {}
    if options.samples:
        typed["samples"] = options.samples
    if options.batch_size:
        typed |= {"student_batch": options.batch_size, "inversion_batch": options.batch_size}
    settings = settings_for(
        options.effort,
        image_shape=teacher.spec.input_shape,
        largest_batch=compute.largest_batch,
        **{**ablations, **typed},
    )
    if settings.inversion_batch < SMALLEST_BATCH:  # of each batch an eighth is held out, for the proof
        raise SSDKDError(
            f"inversion_batch is {settings.inversion_batch}: expected {SMALLEST_BATCH} or more",
            f"--batch-size {SMALLEST_BATCH}",
        )
    return settings


def load(options: Options) -> Teacher:
    """The teacher, as the options describe it; what is doubtful is said."""
    check_input_shape(options.input)
    classes, names = read_classes(options.classes)
    teacher = read_teacher(
        options.teacher,
        arch=options.arch,
        input_shape=options.input,
        mean=options.mean,
        std=options.std,
        classes=classes,
        class_names=names,
        classes_file=options.classes if isinstance(options.classes, Path) else None,
        trust_pickle=options.trust_pickle,
    )
    check_input_shape(teacher.spec.input_shape)
    return teacher


def check_input_shape(input_shape: tuple[int, int, int] | None) -> None:
    """Raises SSDKDError for a size that the engine was not made for; None is not known yet."""
    channels, *sides = input_shape or (CHANNELS[0], PIXELS[0])
    if channels not in CHANNELS or min(sides) not in PIXELS or max(sides) not in PIXELS:
        raise SSDKDError(
            f"the teacher takes images of {shape((channels, *sides))}: "
            "expected 1 to 4 channels, 16 to 512 pixels a side",
            "correct --input if that is not the teacher's size",
        )


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


def build(
    options: Options, teacher: Teacher, settings: DistillationSettings, target: Target
) -> tuple[nn.Module, frozenset[str]]:
    """The student with its first weights, and the names of those that are the teacher's.

    What is not ours, or goes beyond float32 ONNX, is exported once, so that it cannot fail at the end.
    """
    with console.stage("student", f"building {options.student}") as done:
        student = build_student(options.student, teacher=teacher, weights=options.student_weights, seed=options.seed)
        if options.student not in STUDENTS or target.flavour or set(target.asked) - {"fp32"}:
            try_target(student, target, teacher.spec.input_shape)
        parameters = count_parameters(student)
        share = 100 * parameters / teacher.spec.parameters
        said = f"{options.student}, {count(parameters)} parameters, {share:.0f} % of the teacher's"
        inherited: frozenset[str] = frozenset()
        if settings.inherit and not options.student_weights:
            inherited = inherit(student, teacher.module)
        if inherited:
            said += (
                f"; {percent(100 * count_parameters(student, inherited) / parameters)} of them begin as the teacher's"
            )
        done(said)
    return student, inherited


def read_labelled(
    path: Path | None, teacher: Teacher, card: runs.StudentCard, device: torch.device
) -> tuple[LabelledImages | None, float | None]:
    """The labelled images of --eval-data and the teacher's accuracy, percent; None where there are none."""
    if path is None:
        return None, None
    with console.stage("eval data", f"reading {path}") as done:
        labelled = labelled_images(path, card)
        correct = network_accuracy(copy.deepcopy(teacher.module).to(device), card, labelled)
        done(f"{len(labelled.labels):,} labelled images, for the report alone: teacher {percent(correct)}")
    return labelled, correct


def needed_bytes(teacher: Teacher, student: nn.Module, settings: DistillationSettings) -> int:
    """What a run writes at most: the teacher as ONNX for the timing, the student in each precision, samples, report."""
    image_bytes = math.prod(teacher.spec.input_shape)
    samples = settings.held_out * image_bytes + min(CALIBRATION_SAMPLES * image_bytes, CALIBRATION_BYTES)
    return 4 * (teacher.spec.parameters + 5 * count_parameters(student)) + samples + SPARE_BYTES


def check_memory(teacher: Teacher, settings: DistillationSettings, compute: Compute) -> None:
    """Raises SSDKDError where the replay buffer alone is larger than the memory of the device."""
    buffered_bytes = settings.samples * sample_bytes(teacher.spec.input_shape, settings.views, teacher.spec.classes)
    if buffered_bytes > (memory_bytes := compute.memory_bytes):
        raise SSDKDError(
            f"{settings.samples:,} samples need {buffered_bytes / 1e9:,.1f} GB of memory: expected "
            f"{memory_bytes / 1e9:,.1f} GB at most, which is all there is",
            "use fewer --samples"
            + (", or fewer `views` in the [distillation] table" if settings.views > DistillationSettings.views else ""),
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
