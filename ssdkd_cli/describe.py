"""What report.json says of the teacher, the student, the distillation and the machine, from what the stages gave."""

import dataclasses
import platform
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import nn

from engine.device import Compute
from engine.distill import class_histogram
from engine.inspection import count_flops
from engine.state import State, recordings
from engine.teacher import Teacher
from exporters.evaluate import LabelledImages
from ssdkd_cli import __version__
from ssdkd_cli.environment import cpu_name, gpu_names
from ssdkd_cli.gates import Limits, decide, recommend
from ssdkd_cli.report import (
    SCHEMA_VERSION,
    Artifact,
    DistillationReport,
    Environment,
    Report,
    StudentReport,
    TeacherReport,
)
from ssdkd_cli.target import Target
from ssdkd_cli.teaching import Distilled
from ssdkd_cli.timing import Timing
from ssdkd_cli.words import count, duration

METHOD = "SSD-KD"
NOT_REPEATABLE = "the time limit hurried the run: the same seed does not give the same student again"
SAMPLES_A_CLASS = 5  # with fewer on average, the counts of classes say nothing
UNBALANCED = 10  # times as many samples in the largest class as in the smallest


@dataclass(frozen=True)
class Scores:
    """Percent. The accuracies are those on the `labelled` images, None where there are none."""

    agreement: float
    teacher_accuracy: float | None
    student_accuracy: float | None
    labelled: LabelledImages | None


def describe_run(
    teacher: Teacher,
    distilled: Distilled,
    scores: Scores,
    artifacts: tuple[Artifact, ...],
    teacher_timing: Timing | None,
    compute: Compute,
    *,
    arch: str,
    seed: int,
    student_bytes: int,
    limits: Limits,
    target: Target,
    warnings: Sequence[str],
    command: str,
    seconds: float,
) -> Report:
    """The whole report. `arch`: the student's, as asked for; `seconds`: of the run so far."""
    passing, gates = decide(limits, artifacts, target, scores.teacher_accuracy)
    return Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        seconds_total=seconds,
        environment=describe_environment(compute),
        teacher=describe_teacher(teacher, scores, teacher_timing),
        student=describe_student(
            distilled.student,
            arch=arch,
            input_shape=teacher.spec.input_shape,
            size_bytes=student_bytes,
            accuracy=scores.student_accuracy,
            agreement=scores.agreement,
            inherited=distilled.state.inherited,
        ),
        distillation=describe_distillation(
            distilled.state, held_out_samples=len(distilled.samples.held_out), seed=seed
        ),
        artifacts=artifacts,
        recommendation=recommend(passing, teacher_timing.latency_ms.p50 if teacher_timing else None, target),
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


def describe_teacher(teacher: Teacher, scores: Scores, timing: Timing | None) -> TeacherReport:
    """`timing`: of the teacher as ONNX."""
    spec, labelled = teacher.spec, scores.labelled
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
        accuracy=scores.teacher_accuracy,
        accuracy_images=len(labelled.labels) if labelled else None,
        latency_ms=timing.latency_ms if timing else None,
        throughput_per_s=timing.throughput_per_s if timing else None,
        accuracy_sha256=labelled.sha256 if labelled else None,
    )


def describe_student(
    module: nn.Module,
    *,
    arch: str,
    input_shape: tuple[int, int, int],
    size_bytes: int,
    accuracy: float | None,
    agreement: float,
    inherited: frozenset[str],
) -> StudentReport:
    """`size_bytes`: of its weights' file; `accuracy` and `agreement` are percent; `inherited`: names of parameters."""
    return StudentReport(
        arch=arch,
        parameters=count_parameters(module),
        flops=count_flops(module.cpu(), input_shape),
        size_bytes=size_bytes,
        accuracy=accuracy,
        agreement=agreement,
        inherited_parameters=count_parameters(module, inherited),
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


def run_warnings(state: State) -> list[str]:
    """What the user must know of a distillation that went through."""
    slow = [
        f"{name} is slower than it could be on this GPU, its steps are launched kernel by kernel: {step.refusal}"
        for name, step in recordings(state).items()
        if step.refusal
    ]
    done, planned = state.round, state.settings.rounds
    all_rounds = duration(state.seconds * planned / done) if done < planned else ""
    cut_short = (
        f"distilling ended at its time limit after {done} of {planned} rounds, which take about {all_rounds} here: a "
        "longer --time-limit makes a better student"
    )
    return [
        *prior_warnings(class_histogram(state)),
        *([cut_short] if all_rounds else []),
        *([NOT_REPEATABLE] if state.hurried else []),
        *slow,
    ]


def size_warnings(student: nn.Module, teacher: Teacher) -> list[str]:
    """A sentence on a student that has more parameters or FLOPs than the teacher."""
    spec = teacher.spec
    flops = (count_flops(network, spec.input_shape) for network in (teacher.module, student))
    export = shlex.join(["ssdkd", "export", spec.path, "--precision", "int8", *spec.flags])
    sizes = {"parameters": (spec.parameters, count_parameters(student)), "FLOPs": tuple(flops)}
    more = [
        f"more {name} than the teacher, {count(of_student)} against {count(of_teacher)}"
        for name, (of_teacher, of_student) in sizes.items()
        if of_student > of_teacher
    ]
    advice = f"take a smaller one, or make the teacher's own file smaller with `{export}`"
    return [f"the student has {', and '.join(more)}: {advice}"] if more else []


def prior_warnings(histogram: Sequence[int]) -> list[str]:
    """Sentences on samples that leave classes out or prefer some; `histogram`: how many there are of each class."""
    if sum(histogram) < SAMPLES_A_CLASS * len(histogram):
        return []
    missing = sum(number == 0 for number in histogram)
    if missing:
        return [
            f"{missing} of {len(histogram)} classes are in none of the synthetic samples: the teacher's prior has "
            "collapsed there, and the student learns little of these classes"
        ]
    if max(histogram) > UNBALANCED * min(histogram):
        return [
            f"the synthetic samples are unbalanced: {max(histogram):,} of the largest class, {min(histogram):,} of the "
            "smallest; expect the student to be weak on rare ones"
        ]
    return []


def count_parameters(module: nn.Module, names: Collection[str] | None = None) -> int:
    """Weights of a network, all or those of these names; buffers are not counted."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if names is None or name in names)
