"""The stages of a run in their order: load, check, distil, save, export, prove, measure, score, report.

Each is a function from named values to one value. Labelled images reach the scores alone: the teacher's at the start,
the student's at the end.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config import DistillationSettings, settings_for
from engine.device import Compute, choose_device
from engine.errors import SSDKDError
from engine.inheritance import inherit
from engine.replay import sample_bytes
from engine.state import State
from engine.students import STUDENTS, build_student, check_network_name
from engine.teacher import Teacher
from exporters.evaluate import LabelledImages, check_labelled, logits_of
from exporters.runtimes import predictor
from ssdkd_cli import console, replacing, runs
from ssdkd_cli.artifacts import artifact, make_files, timed_paths, try_target
from ssdkd_cli.config_file import read_config, write_config
from ssdkd_cli.describe import Scores, count_parameters, describe_run, run_warnings, size_warnings
from ssdkd_cli.environment import profile_warnings
from ssdkd_cli.files import check_file_size, check_space, new_folder, write_text
from ssdkd_cli.gates import Limits, check_limits, with_budget
from ssdkd_cli.labels import (
    agreement_warnings,
    chance_warnings,
    labelled_images,
    network_accuracy,
    read_classes,
    student_warnings,
)
from ssdkd_cli.material import read_teacher
from ssdkd_cli.options import Options, as_typed
from ssdkd_cli.report import Report
from ssdkd_cli.report_page import write_report
from ssdkd_cli.samples import write_samples
from ssdkd_cli.subject import Subject, agreement
from ssdkd_cli.target import Target, resolve_target
from ssdkd_cli.teaching import (
    CALIBRATION_BYTES,
    CALIBRATION_SAMPLES,
    SMALLEST_BATCH,
    keeping_student,
    teach,
)
from ssdkd_cli.timing import TEACHER, busy_warnings, crowded_warnings, measure
from ssdkd_cli.words import count, is_near_chance, percent, shape

SMOKE = "--effort smoke shows that it goes through: its student is not worth using"
SPARE_BYTES = 4_000_000  # report, picture, metrics
CHANNELS, PIXELS = range(1, 5), range(16, 513)  # what the engine was made and tried for


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
    read = (options.teacher, options.student_weights, options.classes, options.eval_data, options.config)
    ablations = read_config(options.config)["distillation"] if options.config else {}
    with new_folder(folder):
        replacing.check_inputs(folder, [path for path in read if isinstance(path, Path)])
        replacing.recover(folder)
        replacing.check_free(folder, options.overwrite)
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
        with keeping_student(folder):
            write_text(folder / runs.CONFIG, write_config(as_typed(options), ablations, dataclasses.asdict(settings)))
            distilled = teach(
                teacher,
                student,
                settings,
                compute,
                folder,
                card,
                inherited=inherited,
                seed=options.seed,
                time_limit_seconds=options.time_limit,
            )
            warnings += console.warn_all(run_warnings(distilled.state))
            save_picture(folder, distilled.state, class_names(teacher))
            subject = Subject(distilled.student, card, distilled.samples, options.embed_preprocessing)
            proofs = make_files(subject, target, folder, compute=compute, seed=options.seed)
            teacher_timing, timings, unknown = measure(
                *timed_paths(proofs),
                distilled.samples.held_out,
                folder,
                batch=target.timed_batch,
                teacher=replace(subject, module=teacher.module, embed_preprocessing=False),
            )
            of_teacher = {TEACHER: teacher_timing} if teacher_timing else {}
            of_files = {path.name: timing for path, timing in timings.items()}
            busy = busy_warnings({**of_teacher, **of_files}, folder)
            warnings += [*unknown, *console.warn_all([*busy, *crowded_warnings(compute.threads)])]
            with console.stage("score", "comparing student and teacher") as done:
                scores = compare(subject, labelled, teacher_accuracy, compute.device)
                profile = target.profile.name if target.is_named else None
                artifacts = tuple(artifact(proof, subject, timings, labelled, profile=profile) for proof in proofs)
                correct = f", accuracy {percent(scores.student_accuracy)}" if labelled else ""
                done(f"agreement {percent(scores.agreement)}{correct}")
            warnings += console.warn_all(learning_warnings(scores, teacher.spec.classes, options.effort))
            report = describe_run(
                teacher,
                distilled,
                scores,
                artifacts,
                teacher_timing,
                compute,
                arch=options.student,
                seed=options.seed,
                student_bytes=(folder / runs.STUDENT).stat().st_size,
                limits=limits,
                target=target,
                warnings=warnings,
                command=command,
                seconds=time.perf_counter() - started,
            )
            write_report(report, folder)
    return Finished(folder, report)


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


def learning_warnings(scores: Scores, classes: int, effort: str) -> list[str]:
    """A sentence on a student that learned too little; of --effort smoke that was said at the start."""
    if effort == "smoke":
        return []
    of_teacher = scores.teacher_accuracy
    if of_teacher is None or is_near_chance(of_teacher, classes):  # labels that tell nothing
        return agreement_warnings(scores.agreement, classes)
    return student_warnings(scores.student_accuracy, classes, of_teacher=of_teacher, is_run=True)


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


def compare(
    subject: Subject, labelled: LabelledImages | None, teacher_accuracy: float | None, device: torch.device
) -> Scores:
    """How often the student agrees with the teacher, and how often it is right where there are labelled images."""
    student, card = copy.deepcopy(subject.module).to(device), subject.card
    logits = logits_of(predictor(student), subject.samples.held_out, mean=card.mean, std=card.std)
    return Scores(
        agreement=agreement(subject, logits.argmax(axis=1)),
        teacher_accuracy=teacher_accuracy,
        student_accuracy=network_accuracy(student, card, labelled) if labelled else None,
        labelled=labelled,
    )
