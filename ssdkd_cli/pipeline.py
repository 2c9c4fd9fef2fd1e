"""The stages of a run in their order: load, check, distil, save, export, prove, measure, score, report.

Each is a function from named values to one value. Labelled images reach the scoring alone.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from engine.config import DistillationSettings, settings_for
from engine.device import Compute, choose_device
from engine.distill import RoundMetrics, State, averaged_student, class_histogram, distill, start
from engine.errors import OutOfMemoryError, SSDKDError
from engine.students import STUDENTS, build_student
from engine.task import Classification
from engine.teacher import Teacher, batchnorm_layers, load_teacher
from exporters.evaluate import LabelledImages, accuracy, load_labelled
from exporters.runtimes import predictor, to_input
from ssdkd_cli import console, runs
from ssdkd_cli.artifacts import artifact, check_formats, export_and_prove, measure, try_export
from ssdkd_cli.boundary import is_out_of_memory
from ssdkd_cli.config_file import read_config, write_config
from ssdkd_cli.describe import (
    count_parameters,
    describe_distillation,
    describe_environment,
    describe_student,
    describe_teacher,
    prior_warnings,
)
from ssdkd_cli.files import check_space, check_writable, write_text
from ssdkd_cli.labels import read_classes
from ssdkd_cli.options import Options, as_typed
from ssdkd_cli.report import (
    SCHEMA_VERSION,
    Report,
    recommend,
    write_report,
)
from ssdkd_cli.samples import write_samples
from ssdkd_cli.words import count, percent, shape

PROOF_SAMPLES = 256  # held-out samples that files are proven on, now and in later exports of the run
SPARE_BYTES = 4_000_000  # report, picture, metrics
SMALLEST_BATCH = 16
CHANNELS, PIXELS = range(1, 5), range(16, 513)  # what the engine was made and tried for
NOT_REPEATABLE = "--time-limit ends the run by the clock: the same seed does not give the same student again"


@dataclass(frozen=True)
class Finished:
    """A run that went through."""

    folder: Path
    report: Report


@dataclass(frozen=True)
class Distilled:
    """What distilling gave. `student`: float32, CPU, eval; `held_out`: uint8 [M, H, W, C], never learned from."""

    student: nn.Module
    state: State
    held_out: NDArray[np.uint8]


def compress(options: Options, *, command: str) -> Finished:
    """A whole run. `command` is what was typed, for the report.

    Raises:
        SSDKDError: what the user can put right; before the distillation where it can be known then.
        KeyboardInterrupt: from the user; the student so far is then in the run's folder.
    """
    started = time.perf_counter()
    check_formats(options.export)
    compute = choose_device(options.device)
    ablations = read_config(options.config)["distillation"] if options.config else {}
    folder = options.out or runs.default_folder(options.teacher, options.student)
    runs.check_free(folder, options.overwrite)
    with new_folder(folder):
        teacher = load(options)
        settings = settings_for(
            options.effort, image_shape=teacher.spec.input_shape, **ablations | typed_settings(options)
        )
        if settings.inversion_batch < SMALLEST_BATCH:  # of each batch a sixteenth is held out, for the proof
            raise SSDKDError(
                f"inversion_batch is {settings.inversion_batch}: expected {SMALLEST_BATCH} or more",
                f"--batch-size {SMALLEST_BATCH}",
            )
        student = build(options, teacher)
        labelled = read_labelled(options.eval_data, teacher)
        check_space(folder, needed_bytes(teacher, student, settings))

    runs.clear(folder)
    card = runs.teacher_card(teacher.spec, options.student)
    write_text(folder / runs.CONFIG, write_config(as_typed(options), ablations, dataclasses.asdict(settings)))
    warnings = [*teacher.spec.warnings, *warn_all([NOT_REPEATABLE] if options.time_limit else [])]
    with interruptible(folder):
        distilled = teach(
            teacher,
            student,
            settings,
            compute,
            folder,
            card,
            seed=options.seed,
            time_limit_seconds=options.time_limit,
        )
        warnings += warn_all(prior_warnings(class_histogram(distilled.state)))
        save_picture(folder, distilled.state, class_names(teacher))
        samples = distilled.held_out[:PROOF_SAMPLES]
        proofs = [
            export_and_prove(
                name, distilled.student, folder, samples, card, embed_preprocessing=options.embed_preprocessing
            )
            for name in options.export
        ]
        teacher_timing, timings = measure(teacher.module, proofs, folder, samples, card)
        with console.stage("score", "comparing student and teacher") as done:
            agreement = agreement_of(distilled)
            teacher_accuracy = score(teacher.module, labelled, teacher)
            student_accuracy = score(distilled.student.to(compute.device), labelled, teacher)
            artifacts = tuple(artifact(proof, folder, timings, labelled) for proof in proofs)
            done(f"agreement {percent(agreement)}" + (f", accuracy {percent(student_accuracy)}" if labelled else ""))

    described = describe_teacher(
        teacher, accuracy=teacher_accuracy, images=len(labelled.labels) if labelled else None, timing=teacher_timing
    )
    report = Report(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        seconds_total=time.perf_counter() - started,
        environment=describe_environment(compute),
        teacher=described,
        student=describe_student(
            distilled.student,
            arch=options.student,
            input_shape=teacher.spec.input_shape,
            size_bytes=(folder / runs.STUDENT).stat().st_size,
            accuracy=student_accuracy,
            agreement=agreement,
        ),
        distillation=describe_distillation(
            distilled.state, held_out_samples=len(distilled.held_out), seed=options.seed
        ),
        artifacts=artifacts,
        recommendation=recommend(artifacts, described),
        gates=(),
        warnings=tuple(warnings),
    )
    write_report(report, folder)
    return Finished(folder, report)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """The folder, tried for writing; what fails inside takes it away again if it is still empty."""
    check_writable(folder)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()
        raise


def typed_settings(options: Options) -> dict[str, Any]:
    """Settings that have an option of their own, where it was given; they win over the [distillation] table."""
    settings: dict[str, Any] = {}
    if options.samples:
        settings["samples"] = options.samples
    if options.batch_size:
        settings |= {"student_batch": options.batch_size, "inversion_batch": options.batch_size}
    return settings


def load(options: Options) -> Teacher:
    """The teacher, as the options describe it; what is doubtful is said."""
    classes, names = read_classes(options.classes)
    with console.stage("teacher", f"reading {options.teacher}") as done:
        teacher = load_teacher(
            options.teacher,
            arch=options.arch,
            input_shape=options.input,
            mean=options.mean,
            std=options.std,
            classes=classes,
            class_names=names,
            trust_pickle=options.trust_pickle,
        )
        spec = teacher.spec
        done(
            f"{spec.arch} ({spec.arch_evidence}), {count(spec.parameters)} parameters, "
            f"{shape(spec.input_shape)}, {spec.classes} classes"
        )
    warn_all(spec.warnings)
    channels, *sides = spec.input_shape
    if channels not in CHANNELS or min(sides) not in PIXELS or max(sides) not in PIXELS:
        raise SSDKDError(
            f"the teacher takes images of {shape(spec.input_shape)}: expected 1 to 4 channels, 16 to 512 pixels a side",
            "correct --input if that is not the teacher's size",
        )
    return teacher


def build(options: Options, teacher: Teacher) -> nn.Module:
    """The student with its first weights; one that is not ours is exported once, so that it cannot fail at the end."""
    with console.stage("student", f"building {options.student}") as done:
        student = build_student(options.student, teacher=teacher, weights=options.student_weights, seed=options.seed)
        if options.student not in STUDENTS:
            try_export(student, options.export, teacher.spec.input_shape)
        parameters = count_parameters(student)
        share = 100 * parameters / teacher.spec.parameters
        done(f"{options.student}, {count(parameters)} parameters, {share:.0f} % of the teacher's")
    return student


def read_labelled(path: Path | None, teacher: Teacher) -> LabelledImages | None:
    """The labelled images of --eval-data, or None where it was not given."""
    if path is None:
        return None
    spec = teacher.spec
    with console.stage("eval data", f"reading {path}") as done:
        labelled = load_labelled(path, input_shape=spec.input_shape, classes=spec.classes, class_names=spec.class_names)
        done(f"{len(labelled.labels):,} labelled images, for the report alone")
    return labelled


def needed_bytes(teacher: Teacher, student: nn.Module, settings: DistillationSettings) -> int:
    """What a run writes at most: the teacher as ONNX for the timing, the student twice, samples, report."""
    samples = min(settings.held_out, PROOF_SAMPLES) * math.prod(teacher.spec.input_shape)
    return 4 * (teacher.spec.parameters + 3 * count_parameters(student)) + samples + SPARE_BYTES


def teach(
    teacher: Teacher,
    student: nn.Module,
    settings: DistillationSettings,
    compute: Compute,
    folder: Path,
    card: runs.StudentCard,
    *,
    seed: int,
    time_limit_seconds: float | None,
) -> Distilled:
    """Distil and save the student; each round's metrics go to metrics.jsonl and to the view.

    Raises:
        OutOfMemoryError: with the batch size to try.
        SSDKDError: the time was up before the student's first step.
        KeyboardInterrupt: after the student so far was written.
    """
    spec = teacher.spec
    title = f"{spec.arch} to {card.student}"
    largest_batch = max(settings.student_batch, settings.inversion_batch)
    with batch_advice(largest_batch, f"{compute.describe()}, images of {shape(spec.input_shape)}"):
        state = start(
            teacher.module,
            student,
            task=Classification(spec.classes),
            image_shape=spec.input_shape,
            mean=spec.preprocessing.mean,
            std=spec.preprocessing.std,
            batchnorm_layers=batchnorm_layers(teacher.module),
            settings=settings,
            compute=compute,
            seed=seed,
        )
        try:
            with (folder / runs.METRICS).open("w", encoding="utf-8") as log, console.rounds(title) as show:
                for metrics in distill(state, time_limit_seconds=time_limit_seconds):
                    log.write(metrics_line(metrics))
                    log.flush()
                    show(metrics)
        except KeyboardInterrupt:
            save_distilled(folder, distilled_so_far(state), card)
            raise
    if not state.steps:
        raise SSDKDError(
            f"the time was up after {state.round} round(s), before the student's first step",
            "give a longer --time-limit",
        )
    distilled = distilled_so_far(state)
    save_distilled(folder, distilled, card)
    return distilled


def distilled_so_far(state: State) -> Distilled:
    """The student to keep at this moment, and the samples that it can be proven on."""
    held_out = state.held_out.images[: state.held_out.size].cpu().numpy()
    return Distilled(averaged_student(state), state, held_out)


def save_distilled(folder: Path, distilled: Distilled, card: runs.StudentCard) -> None:
    """All that `ssdkd export` needs to make files of this student later."""
    runs.save_student(folder, distilled.student, card)
    runs.save_samples(folder, distilled.held_out[:PROOF_SAMPLES])


@contextlib.contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """Says on Ctrl-C where the student so far is."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder / runs.STUDENT).exists():
            console.warn(
                f"the student so far is {folder / runs.STUDENT}, the metrics are {folder / runs.METRICS}; "
                f"make files of it with `ssdkd export {folder}`"
            )
        raise


@contextlib.contextmanager
def batch_advice(batch: int, where: str) -> Iterator[None]:
    """Turns running out of memory into an OutOfMemoryError with the batch size to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"try --batch-size {batch // 2}" if batch >= 2 * SMALLEST_BATCH else "choose a smaller --student"
        raise OutOfMemoryError(f"out of memory with a batch of {batch} ({where})", smaller) from error


def metrics_line(metrics: RoundMetrics) -> str:
    """One line of metrics.jsonl; what is not known yet is null."""
    values = dataclasses.asdict(metrics)
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(known) + "\n"


def warn_all(sentences: Sequence[str]) -> list[str]:
    """Say each of them, and hand them back for the report."""
    for sentence in sentences:
        console.warn(sentence)
    return list(sentences)


def save_picture(folder: Path, state: State, names: Sequence[str]) -> None:
    """samples.png: of each class the newest samples in the replay buffer."""
    newest = state.buffer.born[: state.buffer.size].argsort(descending=True)
    images, classes = (tensor[newest].cpu().numpy() for tensor in (state.buffer.images, state.buffer.classes))
    write_samples(folder / runs.SAMPLES_PICTURE, images, classes, names)


def class_names(teacher: Teacher) -> tuple[str, ...]:
    """The classes' names, or their numbers."""
    return teacher.spec.class_names or tuple(f"class {number}" for number in range(teacher.spec.classes))


def agreement_of(distilled: Distilled) -> float:
    """How often student and teacher predict the same class on the held-out synthetic samples, percent."""
    state = distilled.state
    mean, std = (tuple(values.flatten().tolist()) for values in state.normalization)
    agreed = 0
    teacher, student = predictor(state.teacher), predictor(state.average)
    for first in range(0, len(distilled.held_out), PROOF_SAMPLES):
        images = to_input(distilled.held_out[first : first + PROOF_SAMPLES], mean, std)
        agreed += int((teacher(images).argmax(1) == student(images).argmax(1)).sum())
    return 100 * agreed / len(distilled.held_out)


def score(module: nn.Module, labelled: LabelledImages | None, teacher: Teacher) -> float | None:
    """The accuracy of a network, percent, or None where there are no labelled images."""
    if labelled is None:
        return None
    preprocessing = teacher.spec.preprocessing
    return accuracy(predictor(module), labelled, mean=preprocessing.mean, std=preprocessing.std)
