"""README's tables: the newest measurement of each thing in a line. docs/ has all of them, with their commands."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import itemgetter

from benchmarks.markdown import UNKNOWN, Result, by, column, markdown, pair, spread, with_deviation
from benchmarks.peer_code import METHODS as PEERS
from benchmarks.tables_of_accuracy import OURS, seconds_to, times

OFF = "SSD-KD off"
CALIBRATIONS = ("our samples", "real images", "noise")
RESULTS_HEAD = (
    *("command", "seeds", "teacher accuracy", "student accuracy", "accuracy kept", "parameters", "latency, one image"),
    *("distilling", "in all", "measured"),
)
INT8_HEAD = (
    *("network", "float32", *(f"INT8, {name}" for name in CALIBRATIONS), "agreement with float32, ours", "measured"),
)
RACE_HEAD = ("task, to student", "seconds", "ours", "ours, SSD-KD off", "best peer", "ours is there in", "measured")
GPU_HEAD = ("teacher-student", "seconds", "teacher", "ours", "best peer", "accuracy kept", "measured")


def newest(results: Iterable[Result], of: Callable[[Result], Hashable]) -> list[Result]:
    """The last measured of the results that are `of` the same thing, in the order in which these appear."""
    found: dict[Hashable, Result] = {}
    for result in results:
        found[of(result)] = max(result, found.get(of(result), result), key=itemgetter("created"))
    return list(found.values())


def origin(result: Result) -> str:
    """`2026-11-27, f8ad975, AMD EPYC`: the day, the commit, and the processor or GPU."""
    machine = result["machine"]
    return f"{result['created'][:10]}, `{result['commit']}`, {machine['gpu'] or machine['cpu']}"


def results_summary(results: Sequence[Result]) -> list[str]:
    """A row a command; the kinds `demo` and `cifar`."""
    rows = []
    for result in newest(results, itemgetter("command")):
        runs = result["runs"]
        rows.append(
            (
                f"`{result['command']}`",
                str(len(runs)),
                spread(column(runs, "teacher_accuracy"), " %", 2),
                f"**{spread(column(runs, 'student_accuracy'), ' %', 2)}**",
                spread(column(runs, "ratio_percent"), " %", 1),
                pair(runs, "parameters", "{:,.0f}", ""),
                pair(runs, "latency_ms", "{:.3f}", " ms"),
                spread(column(runs, "distillation_seconds"), " s", 0),
                spread(column(runs, "seconds_total"), " s", 0),
                origin(result),
            )
        )
    return markdown(RESULTS_HEAD, rows)


def int8_summary(results: Sequence[Result]) -> list[str]:
    """A row a network: its accuracy in float32, and in INT8 by what its ranges come from; the kind `int8`."""
    table = []
    for result in newest(results, itemgetter("kind")):
        for network, rows in by(result["rows"], "network").items():
            of = by(rows, "calibration")
            ours = of[CALIBRATIONS[0]]
            table.append(
                (
                    network,
                    spread(column(ours, "float_accuracy")[:1], " %", 2),
                    *(spread(column(of.get(name, []), "accuracy"), " %", 2) for name in CALIBRATIONS),
                    spread(column(ours, "agreement"), " %", 1),
                    origin(result),
                )
            )
    return markdown(INT8_HEAD, table)


def race_summary(results: Sequence[Result]) -> list[str]:
    """A row a task: where ours, ours without SSD-KD and the best of the peers end; the kind `race`."""
    table = []
    for result in newest(results, itemgetter("task")):
        ends = {method: [run["points"][-1][1] for run in runs] for method, runs in by(result["runs"], "method").items()}
        peer = _best(ends)
        ours = by(result["runs"], "method")[OURS]
        reached = [seconds_to(run["points"], statistics.fmean(ends[peer])) for run in ours] if peer else []
        table.append(
            (
                f"{result['task']}, {result['student']}",
                f"{result['seconds']:g}",
                f"**{spread(ends[OURS], ' %', 1)}**",
                spread(ends.get(OFF, []), " %", 1),
                f"{peer}: {spread(ends[peer], ' %', 1)}" if peer else UNKNOWN,
                times(reached, ends[peer], result["seconds"]) if peer else UNKNOWN,
                origin(result),
            )
        )
    return markdown(RACE_HEAD, table)


def gpu_summary(results: Sequence[Result]) -> list[str]:
    """A row a pair of networks: ours and the best of the peers after the same seconds; the kind `gpu`."""
    table = []
    for result in newest(results, lambda result: tuple(by(result["summary"], "pair"))):
        for networks, rows in by(result["summary"], "pair").items():
            of = {row["method"]: row for row in rows}
            peer = _best({method: [row["student_accuracy"]] for method, row in of.items()})
            ours = of[OURS]
            table.append(
                (
                    networks,
                    f"{ours['seconds']:.0f}",
                    with_deviation(ours, "teacher_accuracy", " %", 2),
                    f"**{with_deviation(ours, 'student_accuracy', ' %', 2)}**",
                    f"{peer}: {with_deviation(of[peer], 'student_accuracy', ' %', 2)}" if peer else UNKNOWN,
                    with_deviation(ours, "ratio_percent", " %", 1),
                    origin(result),
                )
            )
    return markdown(GPU_HEAD, table)


def _best(ends: Mapping[str, Sequence[float]]) -> str | None:
    """The peer whose accuracy at the end is highest on the mean, None where there is none."""
    peers = [method for method in ends if method in PEERS]
    return max(peers, key=lambda method: statistics.fmean(ends[method]), default=None)
