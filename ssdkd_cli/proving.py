"""The proof of a file: it has another name until it has been run against the network that it was made of."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import SSDKDError
from exporters.evaluate import LabelledImages, accuracy
from exporters.metadata import describe, preprocessing_of
from exporters.runtimes import Runtime, open_runtime
from exporters.tensorrt_sidecar import sidecar_path
from exporters.verify import Verification, rejected_path, verify
from ssdkd_cli.loss import FEWEST_SAMPLES, Loss, loss_of
from ssdkd_cli.precisions import Graph
from ssdkd_cli.subject import Subject, agreement

UNPROVEN = ".unproven-"  # before the name of a file that is still to be proven


@dataclass(frozen=True)
class Proof:
    """What came of running a file; the agreement with the teacher and the accuracy (percent) of one that passed."""

    verification: Verification
    teacher_agreement: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Proven:
    """A file that was written and compared with the network; it is called *.rejected where it failed."""

    path: Path
    format: str
    runtime: str  # what is to run it
    graph: Graph
    proof: Proof
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def unproven_place(path: Path) -> Iterator[Path]:
    """Where a file is until it is proven, beside its own place; what is still there at the end is deleted."""
    beside = path.with_name(f"{UNPROVEN}{path.name}")
    try:
        yield beside
    finally:
        for file in (beside, sidecar_path(beside)):
            file.unlink(missing_ok=True)


def settle(unproven: Path, path: Path, *, failed: bool) -> Path:
    """Where the file is now, with its sidecar: in its own place, over an earlier one, or set aside where it `failed`.

    A file that takes its own place ends the reject of that name.
    """
    rejected = rejected_path(path)
    if not failed:
        for file in (rejected, sidecar_path(rejected)):
            file.unlink(missing_ok=True)
    kept = rejected if failed else path
    if sidecar_path(unproven).exists():
        sidecar_path(unproven).replace(sidecar_path(kept))
    return unproven.replace(kept)


def prove(unproven: Path, subject: Subject, precision: str, labelled: LabelledImages | None) -> Proof:
    """A file run on every held-out sample against the network, and on the labelled images where there are any.

    One that loses too much agreement with the teacher has failed, and so has one without finite logits anywhere.
    """
    card, held_out = subject.card, subject.samples.held_out
    constants = {"mean": card.mean, "std": card.std}
    found = verify(subject.module, unproven, held_out, **constants, precision=precision, reference=subject.logits)
    found = replace(found, reason=found.reason.replace(UNPROVEN, ""))
    if not found.verified or found.logits is None:
        return Proof(found)
    predicted = found.logits.argmax(axis=1)
    if precision == "int8":
        found = with_loss(found, loss_of(subject, predicted))
    if not found.verified:
        return Proof(found)
    try:
        correct = score_file(open_runtime(unproven), labelled) if labelled else None
    except SSDKDError as error:
        return Proof(replace(found, verified=False, reason=f"on labelled images {error.message}; {found.reason}"))
    return Proof(found, agreement(subject, predicted), correct)


def score_file(runtime: Runtime, labelled: LabelledImages) -> float:
    """The accuracy of a file, percent, on labelled images of its size; preprocessing as it says.

    Raises SSDKDError for logits that are not finite.
    """
    mean, std = preprocessing_of(describe(runtime.metadata), channels=runtime.input_shape[0])
    return accuracy(runtime.run, labelled, mean=mean, std=std, batch=runtime.fixed_batch)


def with_loss(found: Verification, loss: Loss) -> Verification:
    """`found`, and a word on what an INT8 file loses against the teacher; where that is too much it is not verified.

    Where it is too much and may be chance, it is a doubt; so it is where the samples are too few to tell.
    """
    if loss.is_within:
        if loss.samples >= FEWEST_SAMPLES:
            return found
        said = f"{loss.samples} held-out samples, fewer than {FEWEST_SAMPLES}, are too few to show what it loses"
        return replace(found, reason=f"{said}; {found.reason}", doubt=said)
    in_doubt = loss.is_in_doubt
    chance = f", which on {loss.samples} samples may be chance" if in_doubt else ""
    said = f"it loses {loss.points:.2f} points of agreement with the teacher, {loss.allowed:.2f} may be lost{chance}"
    return replace(found, verified=in_doubt, reason=f"{said}; {found.reason}", doubt=said if in_doubt else None)
