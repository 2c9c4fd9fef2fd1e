"""What report.json says of a run, from what its stages gave: before its files are made, and with them."""

import dataclasses
import platform
from collections.abc import Sequence
from datetime import UTC, datetime

import torch

from engine.device import Compute
from engine.distill import class_histogram
from engine.inspection import count_flops, count_parameters
from engine.state import State
from engine.teacher import Teacher
from exporters.evaluate import LabelledImages
from ssdkd_cli import __version__
from ssdkd_cli.artifacts import Made
from ssdkd_cli.environment import cpu_name, gpu_names
from ssdkd_cli.gates import Limits, decide, recommend
from ssdkd_cli.report import (
    SCHEMA_VERSION,
    DistillationReport,
    Environment,
    Report,
    StudentReport,
    TeacherReport,
)
from ssdkd_cli.target import Target
from ssdkd_cli.teaching import Distilled

METHOD = "SSD-KD"


def describe_run(
    teacher: TeacherReport, student: StudentReport, distillation: DistillationReport, compute: Compute, *, command: str
) -> Report:
    """The report of a run whose files are still to be made."""
    return Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        seconds_total=distillation.seconds,
        environment=describe_environment(compute),
        teacher=teacher,
        student=student,
        distillation=distillation,
        artifacts=(),
        recommendation=None,
        gates=(),
        warnings=(),
    )


def with_files(
    report: Report, made: Made, target: Target, limits: Limits, *, warnings: Sequence[str], seconds: float
) -> Report:
    """The whole report: of the files, judged by the `limits`, and of the teacher's latency beside theirs.

    `warnings`: all of the run; `seconds`: what it took.
    """
    timing = made.teacher_timing
    passing, gates = decide(limits, made.artifacts, target, report.teacher.accuracy)
    teacher = report.teacher
    if timing:
        teacher = dataclasses.replace(teacher, latency_ms=timing.latency_ms, throughput_per_s=timing.throughput_per_s)
    return dataclasses.replace(
        report,
        seconds_total=seconds,
        teacher=teacher,
        artifacts=made.artifacts,
        recommendation=recommend(passing, timing.latency_ms.p50 if timing else None, target),
        gates=gates,
        warnings=tuple(warnings),
    )


def describe_environment(compute: Compute) -> Environment:
    """Where the run takes place."""
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        ssdkd=__version__,
        device=compute.describe(),
        cpu=cpu_name(),
        gpu=gpu_names()[compute.device.index or 0] if compute.device.type == "cuda" else None,
    )


def describe_teacher(teacher: Teacher, accuracy: float | None, labelled: LabelledImages | None) -> TeacherReport:
    """`accuracy`: percent, on the `labelled` images; None where there are none. Its latency is not known yet."""
    spec = teacher.spec
    return TeacherReport(
        path=spec.path,
        sha256=spec.sha256,
        format=spec.format,
        arch=spec.arch,
        arch_evidence=spec.arch_evidence,
        input_shape=spec.input_shape,
        classes=spec.classes,
        class_names=spec.class_names,
        mean=spec.preprocessing.mean,
        std=spec.preprocessing.std,
        preprocessing_source=spec.preprocessing.source,
        batchnorm_layers=spec.batchnorm_layers,
        parameters=spec.parameters,
        flops=count_flops(teacher.module.cpu(), spec.input_shape),
        size_bytes=spec.size_bytes,
        accuracy=accuracy,
        accuracy_images=len(labelled.labels) if labelled else None,
        latency_ms=None,
        throughput_per_s=None,
        accuracy_sha256=labelled.sha256 if labelled else None,
    )


def describe_student(
    distilled: Distilled,
    *,
    arch: str,
    input_shape: tuple[int, int, int],
    size_bytes: int,
    accuracy: float | None,
    agreement: float,
) -> StudentReport:
    """`arch`: as asked for; `size_bytes`: of its weights' file; `accuracy` and `agreement` are percent."""
    student = distilled.student
    return StudentReport(
        arch=arch,
        parameters=count_parameters(student),
        flops=count_flops(student, input_shape),
        size_bytes=size_bytes,
        accuracy=accuracy,
        agreement=agreement,
        inherited_parameters=count_parameters(student, distilled.state.inherited),
    )


def describe_distillation(state: State, *, held_out_samples: int, seed: int) -> DistillationReport:
    """What was spent, and what the buffer holds at the end."""
    return DistillationReport(
        method=METHOD,
        samples=state.buffer.size,
        held_out_samples=held_out_samples,
        rounds=state.round,
        steps=state.steps,
        seconds=state.seconds,
        images_seen=state.images_seen,
        seed=seed,
        class_histogram=tuple(class_histogram(state)),
        settings=dataclasses.asdict(state.settings),
        matched_stages=len(state.stages.pairs),
    )
