"""README's tables: what was measured last of each thing, in a line. docs/ has the rest, with the commands."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import UNKNOWN, Result, by, column, markdown, processor, spread, with_deviation
from benchmarks.names import CALIBRATIONS, OFF, OUR_SAMPLES, OURS, PEERS
from benchmarks.tables_of_accuracy import result_cells, seconds_to, times

RESULTS_HEAD = (
    *("command", "seeds", "teacher accuracy", "student accuracy", "accuracy kept", "parameters", "latency, one image"),
    *("distilling", "in all", "measured"),
)
INT8_HEAD = (
    *("network", "seeds", "float32", *(f"INT8, {name}" for name in CALIBRATIONS)),
    *("agreement with float32, ours", "measured"),
)
RACE_HEAD = (
    *("task, to student", "seconds", "seeds", "ours", OFF, "ours is there in", "best peer", "ours is there in"),
    "measured",
)
GPU_HEAD = ("teacher-student", "seconds", "seeds", "teacher", "ours", "best peer", "accuracy kept", "measured")

Part = tuple[Result, Any]  # a result, and what of it makes a line


def newest(parts: Iterable[Part], of: Callable[[Part], Hashable]) -> list[Part]:
    """The last measured of the parts that are `of` the same thing, in the order in which these appear."""
    found: dict[Hashable, Part] = {}
    for part in parts:
        found[of(part)] = max(part, found.get(of(part), part), key=lambda each: str(each[0]["created"]))
    return list(found.values())


def measured(result: Result) -> str:
    """`2026-11-27, f8ad975, AMD EPYC`: the day, the commit and the processor, or the GPU of a GPU's result."""
    return f"{result['created'][:10]}, `{result['commit']}`, {processor(result)}"


def results_summary(results: Sequence[Result]) -> list[str]:
    """A row a command; the kinds `demo` and `cifar`."""
    parts = ((result, result["runs"]) for result in results)
    last = newest(parts, lambda part: part[0]["command"])
    rows = [(f"`{result['command']}`", *result_cells(runs), measured(result)) for result, runs in last]
    return markdown(RESULTS_HEAD, rows)


def int8_summary(results: Sequence[Result]) -> list[str]:
    """A row a network: its accuracy in float32, and in INT8 by what its ranges come from; the kind `int8`."""
    parts = ((result, (name, rows)) for result in results for name, rows in by(result["rows"], "network").items())
    table = []
    for result, (network, rows) in newest(parts, lambda part: part[1][0]):
        of = by(rows, "calibration")
        ours = of.get(OUR_SAMPLES, [])
        table.append(
            (
                network,
                str(len(ours)),
                spread(column(ours, "float_accuracy")[:1], " %", 2),
                *(spread(column(of.get(name, []), "accuracy"), " %", 2) for name in CALIBRATIONS),
                spread(column(ours, "agreement"), " %", 1),
                measured(result),
            )
        )
    return markdown(INT8_HEAD, table)


def race_summary(results: Sequence[Result]) -> list[str]:
    """A row a task: where ours, ours without SSD-KD and the best of the peers end, and when ours is there; `race`."""
    parts = ((result, by(result["runs"], "method")) for result in results)
    table = []
    for result, runs in newest(parts, lambda part: part[0]["task"]):
        ends = {method: [run["points"][-1][1] for run in own] for method, own in runs.items()}
        means = {method: statistics.fmean(own) for method, own in ends.items()}
        reached = {
            rival: times([seconds_to(run["points"], mean) for run in runs[OURS]], ends[rival], result["seconds"])
            for rival, mean in means.items()
        }
        peer = best_peer(means)
        table.append(
            (
                f"{result['task']}, {result['student']}",
                f"{result['seconds']:g}",
                str(len(runs[OURS])),
                f"**{spread(ends[OURS], ' %', 1)}**",
                spread(ends.get(OFF, []), " %", 1),
                reached.get(OFF, UNKNOWN),
                f"{peer}: {spread(ends[peer], ' %', 1)}" if peer else "not run there",
                reached[peer] if peer else UNKNOWN,
                measured(result),
            )
        )
    return markdown(RACE_HEAD, table)


def gpu_summary(results: Sequence[Result]) -> list[str]:
    """A row a pair of networks: ours and the best of the peers after the same seconds; the kind `gpu`."""
    parts = ((result, (name, rows)) for result in results for name, rows in by(result["summary"], "pair").items())
    table = []
    for result, (networks, rows) in newest(parts, lambda part: part[1][0]):
        of = {row["method"]: row for row in rows}
        if OURS not in of:
            continue  # it failed: docs/ say so
        ours, peer = of[OURS], best_peer({method: row["student_accuracy"] for method, row in of.items()})
        table.append(
            (
                networks,
                f"{ours['seconds']:.0f}",
                str(ours["seeds"]),
                with_deviation(ours, "teacher_accuracy", " %", 2),
                f"**{with_deviation(ours, 'student_accuracy', ' %', 2)}**",
                f"{peer}: {with_deviation(of[peer], 'student_accuracy', ' %', 2)}" if peer else "not run",
                with_deviation(ours, "ratio_percent", " %", 1),
                measured(result),
            )
        )
    return markdown(GPU_HEAD, table)


def best_peer(accuracies: Mapping[str, float]) -> str | None:
    """The peer with the highest accuracy, None where no method is a peer's."""
    peers = [method for method in accuracies if method in PEERS]
    return max(peers, key=lambda method: accuracies[method], default=None)
