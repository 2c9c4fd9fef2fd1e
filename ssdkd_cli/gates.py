"""Limits that the user or a named profile set, judged on the files that came out, and the file that is recommended."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.errors import SSDKDError
from exporters import PRECISIONS
from ssdkd_cli.report import Artifact, Gate, Recommendation, origin
from ssdkd_cli.words import SAME, compared, percent, times

if TYPE_CHECKING:
    from ssdkd_cli.target import Target

ROUNDING = 1e-9  # of a difference of two percentages, which is not to fail a limit that it meets


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
    budget_of: str | None = None  # the profile whose budget `max_latency_ms` is; None: it was typed


@dataclass(frozen=True)
class _Rule:
    measure: Callable[[Artifact, float | None], float | None]  # of a file and the teacher's accuracy
    is_most: bool  # the limit is the largest value that passes
    unit: str  # as words behind a value


def _drop(artifact: Artifact, teacher_accuracy: float | None) -> float | None:
    if artifact.accuracy is None or teacher_accuracy is None:
        return None
    return teacher_accuracy - artifact.accuracy


RULES: dict[str, _Rule] = {
    "max_drop": _Rule(_drop, True, "points less than the teacher"),
    "max_latency_ms": _Rule(lambda artifact, _: artifact.latency_ms.p50 if artifact.latency_ms else None, True, "ms"),
    "max_size_mb": _Rule(lambda artifact, _: artifact.size_bytes / 1e6, True, "MB"),
    "min_agreement": _Rule(lambda artifact, _: artifact.teacher_agreement, False, "%"),
}


def with_budget(limits: Limits, target: "Target") -> Limits:
    """The limits that were typed, and the latency budget of a profile that is of this machine where none was."""
    if limits.max_latency_ms is not None or target.latency_budget_ms is None:
        return limits
    return replace(limits, max_latency_ms=target.latency_budget_ms, budget_of=target.profile.name)


def check_limits(limits: Limits, target: "Target", *, has_labels: bool) -> None:
    """Raises SSDKDError for a limit that cannot be judged at the end: better now than after the distillation."""
    if limits.max_drop is not None and not has_labels:
        raise SSDKDError(
            "--max-drop compares accuracies, and there are no labelled images", "add --eval-data DIR, or leave it out"
        )
    computed = {"--max-drop": limits.max_drop, "--min-agreement": limits.min_agreement}
    given = [flag for flag, limit in computed.items() if limit is not None]
    needs_time = limits.max_latency_ms is not None and target.profile.runtime != "onnxruntime"
    needs_run = bool(given) and target.formats == ("trt",)
    why = _why_no_plan(target) if needs_time or needs_run else None
    if needs_time and why:
        raise SSDKDError(
            f"--max-latency-ms cannot be judged here: files for {target.profile.name} cannot be run: {why}",
            f"leave it out and measure on the device; files for this machine are made without {_of_device(target)}",
        )
    if limits.max_latency_ms is not None and not target.is_this_machine:
        raise SSDKDError(
            f"--max-latency-ms cannot be judged here: the profile {target.profile.name} is of another kind of "
            "processor than this machine's",
            "leave it out and measure on the device (ssdkd bench model.onnx); `ssdkd doctor` names the profile that "
            "fits this machine",
        )
    if limits.max_size_mb is not None and target.formats == ("trt",) and target.flavour is None:
        raise SSDKDError(
            "--max-size-mb cannot be judged here: the TensorRT plan is built on the device",
            "add --export onnx: the ONNX file, of which the plan is made, is judged then",
        )
    if needs_run and why:
        raise SSDKDError(
            f"{' and '.join(given)} cannot be judged here: no TensorRT plan can be run: {why}",
            "add --export onnx: the ONNX file, of which the plan is made, is judged then",
        )


def _why_no_plan(target: "Target") -> str | None:
    """Why none of the target's TensorRT plans runs on this machine, None where they do."""
    if "trt" not in target.formats:
        return "no plan is made of them here"
    if target.flavour is None:
        return "the device builds its plan itself"
    from exporters.tensorrt_runtime import why_plans_do_not_run

    return why_plans_do_not_run(target.flavour)


def _of_device(target: "Target") -> str:
    """What has the files made for another device: the profile where it was named, and TensorRT's format."""
    words = [f"--profile {target.profile.name}"] if target.is_named else []
    return " and ".join([*words, *(["--export trt"] if "trt" in target.formats else [])])


def judge(limits: Limits, artifact: Artifact, teacher_accuracy: float | None) -> list[Gate]:
    """Each limit that was set, for one file. What could not be measured has not passed.

    Of a file that cannot run on this machine (`verified` is None) only the size is judged.
    """
    gates = []
    for name, rule in RULES.items():
        limit: float | None = getattr(limits, name)
        if limit is None or (artifact.verified is None and name != "max_size_mb"):
            continue
        value = rule.measure(artifact, teacher_accuracy)
        beyond = math.inf if value is None else value - limit if rule.is_most else limit - value
        passed = beyond <= ROUNDING
        budget_of = limits.budget_of if name == "max_latency_ms" else None
        gates.append(Gate(name, limit, value, passed, artifact.path, budget_of))
    return gates


def decide(
    limits: Limits, artifacts: Sequence[Artifact], target: "Target", teacher_accuracy: float | None
) -> tuple[list[Artifact], tuple[Gate, ...]]:
    """The verified files for the target's runtime that pass every limit, and the limits as judged.

    The fastest file comes first, those in doubt behind the others; for a device of another kind than this machine those
    that were asked for come first, and no time counts. Judged are the files whose precision and format were asked for;
    where no precision was, the first that passes, or the first of all if none does. The latency is judged of files for
    that runtime alone: the ONNX file that a plan is made of is timed on the CPU.
    """
    native = runtime_format(target)
    untimed = replace(limits, max_latency_ms=None)
    limits = limits if target.is_this_machine else untimed

    def rank(item: Artifact) -> tuple[float, ...]:
        if target.is_this_machine:
            return item.doubt is not None, item.latency_ms.p50 if item.latency_ms else math.inf
        wanted = item.precision in target.asked, item.precision == target.profile.precision
        return item.doubt is not None, *(not yes for yes in wanted), PRECISIONS.index(item.precision)

    verified = sorted((item for item in artifacts if item.verified and item.format == native), key=rank)
    passing = [item for item in verified if all(gate.passed for gate in judge(limits, item, teacher_accuracy))]
    asked = [item for item in artifacts if item.precision in target.asked and item.format in target.formats]
    gates = (
        gate
        for item in asked or (passing or verified)[:1]
        for gate in judge(limits if item.format == native else untimed, item, teacher_accuracy)
    )
    return passing, tuple(gates)


def has_failed(artifacts: Sequence[Artifact], gates: Sequence[Gate]) -> bool:
    """Whether a file was rejected or a limit does not hold."""
    return any(item.verified is False for item in artifacts) or not all(gate.passed for gate in gates)


def runtime_format(target: "Target") -> str:
    """What the target's device runs: `onnx`, or a plan, `trt`."""
    return "onnx" if target.profile.runtime == "onnxruntime" else "trt"


def recommend(passing: Sequence[Artifact], teacher_latency_ms: float | None, target: "Target") -> Recommendation | None:
    """The first of the files that pass every limit, as `decide` orders them, with what was measured of it.

    `teacher_latency_ms` is the teacher's through ONNX Runtime: plans, on another clock, are not compared with it.
    """
    if not passing:
        return None
    best, *others = passing
    reasons = [_rank_in_words(best, passing, target)]
    if best.doubt:
        reasons.append(best.doubt)
    if best.accuracy is not None:
        reasons.append(f"it has {percent(best.accuracy)} accuracy")
    if best.teacher_agreement is not None:
        reasons.append(f"it predicts the teacher's class on {percent(best.teacher_agreement)} of held-out samples")
    if not target.is_this_machine:
        reasons += [f"{item.path} is in doubt: {item.doubt}" for item in others if item.doubt and not best.doubt]
        reasons.append(f"how fast it is on {target.profile.name}, `ssdkd bench {best.path}` says there")
    elif not best.latency_ms:
        reasons.append("no latency was measured here")
    else:
        if teacher_latency_ms and best.format == "onnx":
            reasons.append(f"on this machine {beside_teacher(teacher_latency_ms, best.latency_ms.p50)}")
        reasons += [_beside_best(item, item.latency_ms.p50 / best.latency_ms.p50) for item in others if item.latency_ms]
    return Recommendation(best.path, "; ".join(reasons))


def _rank_in_words(best: Artifact, passing: Sequence[Artifact], target: "Target") -> str:
    """What the recommended file is among those that pass."""
    equals = [item for item in passing if bool(item.doubt) == bool(best.doubt)]
    if len(passing) == 1:
        return "the only file that is verified and passes"
    if len(equals) == 1:
        return "the only file that passes without doubt"
    sure = " without doubt" if len(equals) < len(passing) else ""
    if target.is_this_machine:
        return f"the fastest of {len(equals)} files that pass{sure}"
    whose = f", which {target.profile.name} runs fastest" if best.precision == target.profile.precision else ""
    return f"of {len(equals)} files that pass{sure} the one in {best.precision}{whose}"


def _beside_best(artifact: Artifact, ratio: float) -> str:
    """What another file takes, `ratio` times the recommended one's time, and why it is not taken where it is faster."""
    if ratio > 1 / SAME:
        return f"{artifact.path} takes {'about' if ratio < SAME else times(ratio, 1)} as long"
    return f"{artifact.path} is {times(1, ratio)} faster, but {artifact.doubt}"


def beside_teacher(teacher_ms: float, file_ms: float) -> str:
    """'3.1 times faster than the teacher', 'about as fast as the teacher'."""
    if 1 / SAME < teacher_ms / file_ms < SAME:
        return "about as fast as the teacher"
    return f"{compared(teacher_ms, file_ms, ('faster', 'slower'))} than the teacher"


def gate_line(gate: Gate) -> str:
    """'--max-size-mb 0.5: model.onnx has 0.317 MB'."""
    found = "could not be measured" if gate.value is None else f"has {gate.value:.4g} {RULES[gate.name].unit}"
    return f"--{gate.name.replace('_', '-')} {gate.limit:g}{origin(gate)}: {gate.artifact} {found}"
