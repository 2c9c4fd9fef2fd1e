"""The proof of a file: it has another name until it has been run against the network that it was made of."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from exporters.tensorrt_sidecar import sidecar_path
from exporters.verify import Verification, rejected_path, verify
from ssdkd_cli.loss import FEWEST_SAMPLES, Loss, is_in_doubt, most_lost
from ssdkd_cli.precisions import Graph
from ssdkd_cli.subject import Subject

PROOF_SAMPLES = 256  # held-out samples that float files are proven on; INT8 files are on all


@dataclass(frozen=True)
class Proven:
    """A file that was written and compared with the network; it is called *.rejected where it failed."""

    path: Path
    format: str
    runtime: str  # what is to run it
    graph: Graph
    verification: Verification
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def unproven_place(path: Path) -> Iterator[Path]:
    """Where a file is until it is proven, beside its own place; what is still there at the end is deleted."""
    beside = path.with_name(f".unproven-{path.name}")
    try:
        yield beside
    finally:
        for file in (beside, sidecar_path(beside)):
            file.unlink(missing_ok=True)


def accept(unproven: Path, path: Path) -> Path:
    """Give a proven file its own name, over an earlier one, and drop the reject of that name."""
    for file in (rejected_path(path), sidecar_path(rejected_path(path))):
        file.unlink(missing_ok=True)
    return unproven.replace(path)


def proof_of(subject: Subject, path: Path, precision: str) -> Verification:
    """A file run on held-out samples against the network."""
    samples, card = subject.samples.held_out[: None if precision == "int8" else PROOF_SAMPLES], subject.card
    return verify(subject.module, path, samples, mean=card.mean, std=card.std, precision=precision)


def with_loss(found: Verification, loss: Loss, samples: int) -> Verification:
    """`found`, and a word on what an INT8 file loses against the teacher; where that is too much it is not verified.

    Where it is too much and may be chance, it is a doubt; so it is where the samples are too few to tell.
    """
    allowed = most_lost(samples)
    if loss.points <= allowed:
        if samples >= FEWEST_SAMPLES:
            return found
        said = f"{samples} held-out samples, fewer than {FEWEST_SAMPLES}, are too few to show what it loses"
        return replace(found, reason=f"{said}; {found.reason}", doubt=said)
    in_doubt = is_in_doubt(loss, allowed)
    chance = f", which on {samples} samples may be chance" if in_doubt else ""
    said = f"it loses {loss.points:.2f} points of agreement with the teacher, {allowed:.2f} may be lost{chance}"
    return replace(found, verified=in_doubt, reason=f"{said}; {found.reason}", doubt=said if in_doubt else None)
