"""Limits that the user set, judged on the files that came out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import SSDKDError
from ssdkd_cli.report import Artifact, Gate, Recommendation
from ssdkd_cli.words import times


@dataclass(frozen=True)
class Limits:
    """What a file must keep to; None is no limit.

    `max_drop`: points of accuracy below the teacher. `max_latency_ms`: median of one image. `max_size_mb`: megabytes of
    10^6 bytes. `min_agreement`: percent of held-out samples on which the file predicts the teacher's class.
    """

    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    min_agreement: float | None = None


@dataclass(frozen=True)
class _Rule:
    measure: Callable[[Artifact, float | None], float | None]  # of a file and the teacher's accuracy
    is_most: bool  # the limit is the largest value that passes


def _drop(artifact: Artifact, teacher_accuracy: float | None) -> float | None:
    if artifact.accuracy is None or teacher_accuracy is None:
        return None
    return teacher_accuracy - artifact.accuracy


RULES: dict[str, _Rule] = {
    "max_drop": _Rule(_drop, True),
    "max_latency_ms": _Rule(lambda artifact, _: artifact.latency_ms.p50 if artifact.latency_ms else None, True),
    "max_size_mb": _Rule(lambda artifact, _: artifact.size_bytes / 1e6, True),
    "min_agreement": _Rule(lambda artifact, _: artifact.teacher_agreement, False),
}


def check_limits(limits: Limits, *, has_labels: bool, runs_here: bool) -> None:
    """Raises SSDKDError for a limit that cannot be judged at the end: better now than after the distillation."""
    if limits.max_drop is not None and not has_labels:
        raise SSDKDError(
            "--max-drop compares accuracies, and there are no labelled images", "add --eval-data DIR, or leave it out"
        )
    if limits.max_latency_ms is not None and not runs_here:
        raise SSDKDError(
            "--max-latency-ms was given for files that cannot be run on this machine",
            "leave it out and measure on the device, or ask for --export onnx",
        )


def judge(limits: Limits, artifact: Artifact, teacher_accuracy: float | None) -> list[Gate]:
    """Each limit that was set, for one file. What could not be measured has not passed."""
    gates = []
    for name, rule in RULES.items():
        limit: float | None = getattr(limits, name)
        if limit is None:
            continue
        value = rule.measure(artifact, teacher_accuracy)
        passed = value is not None and (value <= limit if rule.is_most else value >= limit)
        gates.append(Gate(name, limit, value, passed, artifact.path))
    return gates


def decide(
    limits: Limits, artifacts: Sequence[Artifact], asked: Sequence[str], teacher_accuracy: float | None
) -> tuple[list[Artifact], tuple[Gate, ...]]:
    """The verified files that pass every limit, the fastest first, and the limits as judged.

    Judged are the files whose precision was `asked` for; where none was, the fastest file that passes, or the fastest
    one if none does.
    """
    verified = sorted((item for item in artifacts if item.verified), key=_slowness)
    passing = [item for item in verified if all(gate.passed for gate in judge(limits, item, teacher_accuracy))]
    judged = [item for item in artifacts if item.precision in asked] or (passing or verified)[:1]
    return passing, tuple(gate for item in judged for gate in judge(limits, item, teacher_accuracy))


def recommend(passing: Sequence[Artifact], teacher_latency_ms: float | None) -> Recommendation | None:
    """The first of the files that pass every limit, fastest first, with what was measured on this machine."""
    if not passing:
        return None
    best, *others = passing
    why = (
        "the only file that is verified and passes every limit"
        if not others
        else f"the fastest of {len(passing)} files"
    )
    if not best.latency_ms:
        return Recommendation(best.path, f"{why}; no latency was measured here")
    if teacher_latency_ms:
        why += f": {times(teacher_latency_ms, best.latency_ms.p50)} the teacher's speed on this machine"
    slower = [
        f"{item.path} takes {times(item.latency_ms.p50, best.latency_ms.p50)} as long"
        for item in others
        if item.latency_ms
    ]
    return Recommendation(best.path, "; ".join((why, *slower)))


def _slowness(artifact: Artifact) -> float:
    return artifact.latency_ms.p50 if artifact.latency_ms else float("inf")
