"""What a run begins with, read and tried: what can fail before the distillation fails here."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.config import DistillationSettings, settings_for
from engine.device import Compute
from engine.errors import SSDKDError
from engine.inheritance import inherit
from engine.inspection import count_parameters
from engine.replay import sample_bytes
from engine.students import STUDENTS, build_student
from engine.teacher import Teacher
from exporters.evaluate import LabelledImages
from ssdkd_cli import console, replacing, runs
from ssdkd_cli.artifacts import try_target
from ssdkd_cli.doubts import chance_warnings, size_warnings
from ssdkd_cli.environment import profile_warnings
from ssdkd_cli.files import check_file_size, check_space
from ssdkd_cli.labels import labelled_images, network_accuracy
from ssdkd_cli.material import read_teacher
from ssdkd_cli.options import Options
from ssdkd_cli.stated import Stated
from ssdkd_cli.target import Target
from ssdkd_cli.teaching import CALIBRATION_BYTES, CALIBRATION_SAMPLES, SMALLEST_BATCH
from ssdkd_cli.words import count, percent, shape

SMOKE = "--effort smoke shows that it goes through: its student is not worth using"
SPARE_BYTES = 4_000_000  # report, picture, metrics
CHANNELS, PIXELS = range(1, 5), range(16, 513)  # what the engine was made and tried for


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


def check_place(options: Options, folder: Path) -> None:
    """Raises SSDKDError where a run in `folder` would replace another one, or what it reads."""
    read = (options.teacher, options.student_weights, options.classes, options.eval_data, options.config)
    replacing.check_inputs(folder, [path for path in read if isinstance(path, Path)])
    replacing.recover(folder)
    replacing.check_free(folder, options.overwrite)


def prepare(options: Options, ablations: Mapping[str, Any], target: Target, compute: Compute, folder: Path) -> Prepared:
    """Teacher, student and labelled images, and whether there is room for what they will need.

    Raises SSDKDError for everything that can be known to be wrong before the distillation.
    """
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


def load(options: Options) -> Teacher:
    """The teacher, as the options describe it; what is doubtful is said."""
    check_input_shape(options.input)
    teacher = read_teacher(
        options.teacher,
        Stated(options.arch, options.input, options.mean, options.std, options.classes, options.trust_pickle),
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


def needed_bytes(teacher: Teacher, student: nn.Module, settings: DistillationSettings) -> int:
    """What a run writes at most: the teacher as ONNX for the timing, the student in each precision, samples, report."""
    image_bytes = math.prod(teacher.spec.input_shape)
    samples = settings.held_out * image_bytes + min(CALIBRATION_SAMPLES * image_bytes, CALIBRATION_BYTES)
    return 4 * (teacher.spec.parameters + 5 * count_parameters(student)) + samples + SPARE_BYTES
