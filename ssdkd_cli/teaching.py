"""The distillation as a stage of a run: its metrics are written and shown, its student is kept, whatever ends it."""

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from engine.config import DistillationSettings
from engine.device import Compute
from engine.distill import RoundMetrics, averaged_student, distill
from engine.errors import NonFiniteLossError, OutOfMemoryError, SSDKDError
from engine.source import source_of
from engine.state import State, start
from engine.teacher import Teacher
from ssdkd_cli import console, replacing, runs
from ssdkd_cli.material import said_of
from ssdkd_cli.process import is_out_of_memory, uninterrupted
from ssdkd_cli.words import duration, shape

SMALLEST_BATCH = 16
FEWEST_ROUNDS = 8  # that a time limit should leave: a fifth of it is the warm-up
NOTHING_YET = "interrupted in the warm-up: the student had not begun, nothing is kept"
CALIBRATION_SAMPLES = 2048  # of the replay buffer, at most
CALIBRATION_BYTES = 64_000_000  # of them together, at most


@dataclass(frozen=True)
class Distilled:
    """What distilling gave. `student`: float32, CPU, eval."""

    student: nn.Module
    state: State
    samples: runs.Samples


def teach(
    teacher: Teacher,
    student: nn.Module,
    settings: DistillationSettings,
    compute: Compute,
    folder: Path,
    card: runs.StudentCard,
    *,
    inherited: frozenset[str],
    seed: int,
    time_limit_seconds: float | None,
) -> Distilled:
    """Distil and save the student; each round's metrics go to metrics.jsonl and to the view.

    Whatever ends it early, the student so far is saved, once it has learned anything.

    Raises:
        OutOfMemoryError: with the batch size to try.
        NonFiniteLossError: no student is saved; its weights are no numbers any more.
        SSDKDError: the time was up before the student's first step.
    """
    spec = teacher.spec
    largest_batch = max(settings.student_batch, settings.inversion_batch)
    with batch_advice(largest_batch, f"{compute.describe()}, images of {shape(spec.input_shape)}"):
        state = start(source_of(teacher), student, settings=settings, compute=compute, seed=seed, inherited=inherited)
        try:
            run_rounds(state, folder / runs.METRICS, f"{spec.arch} to {card.student}", time_limit_seconds)
            distilled = with_exact_logits(distilled_so_far(state), teacher)
            save_distilled(folder, distilled, card)
        except NonFiniteLossError:
            raise
        except BaseException as error:
            if state.steps:
                with uninterrupted():
                    rescue(folder, distilled_so_far(state), card)
            elif isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(NOTHING_YET) from None
            raise
    return distilled


def run_rounds(state: State, metrics_path: Path, title: str, time_limit_seconds: float | None) -> None:
    """All rounds, shown and written down. Raises SSDKDError where the time was up before the student's first step."""
    writable = True
    with console.rounds(title) as show:
        for metrics in distill(state, time_limit_seconds=time_limit_seconds):
            writable = writable and append_metrics(metrics_path, metrics)
            show(metrics)
        if not state.steps:
            raise SSDKDError(
                f"the time was up in round {state.round} of {state.settings.rounds}, before the student's first step",
                f"a round takes {duration(state.seconds / state.round)} here: give --time-limit "
                f"{math.ceil(FEWEST_ROUNDS * state.seconds / state.round)}s or more",
            )


def append_metrics(path: Path, metrics: RoundMetrics) -> bool:
    """Whether the line could be written. A full disk is no reason to stop: there is time to make room."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(metrics_line(metrics))
    except OSError as error:
        console.warn(
            f"{path} cannot be written ({error.strerror}) and ends here: make room before the student is saved"
        )
        return False
    return True


def metrics_line(metrics: RoundMetrics) -> str:
    """One line of metrics.jsonl; what is not known yet is null."""
    values = dataclasses.asdict(metrics)
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(known) + "\n"


def distilled_so_far(state: State) -> Distilled:
    """The student to keep at this moment, and the samples that later stages work on."""
    held_out, buffer = state.held_out, state.buffer
    number = min(CALIBRATION_SAMPLES, max(SMALLEST_BATCH, CALIBRATION_BYTES // buffer.images[0].nbytes))
    drawn = torch.randperm(buffer.size, generator=torch.Generator().manual_seed(0))[:number].to(buffer.images.device)
    samples = runs.Samples(
        held_out=held_out.images[: held_out.size].cpu().numpy(),
        held_out_logits=held_out.logits[: held_out.size, 0].cpu().numpy(),
        calibration=buffer.images[drawn].cpu().numpy(),
    )
    return Distilled(averaged_student(state), state, samples)


def with_exact_logits(distilled: Distilled, teacher: Teacher) -> Distilled:
    """What the teacher says of the held-out samples in float32: while distilling it may have been asked in less."""
    samples = distilled.samples
    logits = said_of(teacher, samples.held_out)
    return dataclasses.replace(distilled, samples=dataclasses.replace(samples, held_out_logits=logits))


def save_distilled(folder: Path, distilled: Distilled, card: runs.StudentCard) -> None:
    """All that `ssdkd export` needs to make files of this student later."""
    runs.save_student(folder, distilled.student, card)
    runs.save_samples(folder, distilled.samples)


def rescue(folder: Path, distilled: Distilled, card: runs.StudentCard) -> None:
    """Save the student of a run that failed, among the temporary files where its own folder cannot be written."""
    try:
        save_distilled(folder, distilled, card)
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="ssdkd-"))
        save_distilled(elsewhere, distilled, card)
        console.warn(f"{folder} cannot be written ({error.strerror}): {where_it_is(elsewhere)}")


@contextlib.contextmanager
def keeping_student(folder: Path) -> Iterator[None]:
    """Where what is inside fails: says where the student is, or leaves the folder as it was before the run.

    An earlier run in `folder` is deleted only when what is inside has succeeded.
    """
    try:
        with uninterrupted():
            replacing.set_aside(folder)
        yield
    except BaseException:
        with uninterrupted():
            replacing.recover(folder)
        if (folder / replacing.PREVIOUS).exists():  # else no student came
            console.warn(
                f"{where_it_is(folder)}, the metrics are {folder / runs.METRICS}; "
                "the same command with --overwrite runs it again"
            )
            replacing.remove_folder(folder / replacing.PREVIOUS)
        if (folder / replacing.PREVIOUS).exists():
            console.warn(f"the run that was to be replaced is {folder / replacing.PREVIOUS}")
        raise
    replacing.drop_previous(folder)


def where_it_is(folder: Path) -> str:
    """Where the student of a run that did not end is, and what can be done with it."""
    return f"the student so far is {folder / runs.STUDENT}, make files of it with `{runs.export_command(folder)}`"


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
