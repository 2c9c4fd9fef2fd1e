"""Tables of what students are worth: accuracies, and what changes them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.markdown import (
    UNKNOWN,
    Result,
    Runs,
    by,
    column,
    markdown,
    mean,
    pair,
    processor,
    provenance,
    spread,
    went_through,
    with_deviation,
)
from benchmarks.names import OURS

BASELINE = "full"  # the variant that the others are compared with
RESULTS_HEAD = (
    "command",
    "processor",
    "seeds",
    "teacher accuracy",
    "student accuracy",
    "accuracy kept",
    "parameters",
    "latency, one image",
    "distilling",
    "in all",
)
ABLATION_HEAD = ("variant", "seeds", "student accuracy", "accuracy kept", f"against {BASELINE}", "distilling")
INT8_HEAD = (
    *("network", "calibrated on", "seeds", "float accuracy", "INT8 accuracy", "points lost"),
    *("agreement with float", "in integers", "file, of float's"),
)
LEAST_RIVAL = 60.0  # percent: a rival that ends below it is no measure
RACE_HEAD = ("method", "seeds", "ended after", "student accuracy at the end", "ours gets there in")
DEFAULT_SAMPLES = 5000
BUFFER_HEAD = ("samples", "seeds", "student accuracy", "accuracy kept", f"against {DEFAULT_SAMPLES:,}")
SETTINGS_HEAD = ("changed", "seeds", "student accuracy", "against the defaults", "ahead in", "agreement")
GPU_HEAD = (
    *("pair", "method", "samples", "seeds", "teacher accuracy", "student accuracy", "accuracy kept"),
    "teacher to student",
)


def results_table(results: Sequence[Result]) -> list[str]:
    """A row a result, and below it where each was measured; the kinds `demo` and `cifar`."""
    rows = [(f"`{result['command']}`", processor(result), *result_cells(result["runs"])) for result in results]
    return [*markdown(RESULTS_HEAD, rows), "", *map(provenance, results)]


def result_cells(runs: Runs) -> tuple[str, ...]:
    """What runs of the tool came to: seeds, accuracies, sizes, latencies and seconds."""
    return (
        str(len(runs)),
        spread(column(runs, "teacher_accuracy"), " %", 2),
        f"**{spread(column(runs, 'student_accuracy'), ' %', 2)}**",
        spread(column(runs, "ratio_percent"), " %", 1),
        pair(runs, "parameters", "{:,.0f}", ""),
        pair(runs, "latency_ms", "{:.3f}", " ms"),
        spread(column(runs, "distillation_seconds"), " s", 0),
        spread(column(runs, "seconds_total"), " s", 0),
    )


def ablation_table(results: Sequence[Result]) -> list[str]:
    """A table a result, a row a variant; the kind `ablation`."""
    return [line for result in results for line in [*_one_ablation(result), ""]][:-1]


def _one_ablation(result: Result) -> list[str]:
    variants = {variant["name"]: variant["runs"] for variant in result["variants"]}
    baseline = mean(variants[BASELINE], "student_accuracy")
    rows = [
        (
            name,
            str(len(runs)),
            spread(column(runs, "student_accuracy"), " %", 2),
            spread(column(runs, "ratio_percent"), " %", 1),
            UNKNOWN if name == BASELINE else f"{mean(runs, 'student_accuracy') - baseline:+.2f} points",
            spread(column(runs, "seconds"), " s", 0),
        )
        for name, runs in variants.items()
    ]
    return [*markdown(ABLATION_HEAD, rows), "", provenance(result)]


def int8_table(results: Sequence[Result]) -> list[str]:
    """A row a network and calibration: what INT8 loses on real test images, and its agreement with float; `int8`."""
    lines: list[str] = []
    for result in results:
        found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for row in result["rows"]:
            found.setdefault((row["network"], row["calibration"]), []).append(row)
        table = [
            (
                network,
                calibration,
                str(len(rows)),
                spread(column(rows, "float_accuracy")[:1], " %", 2),
                spread(column(rows, "accuracy"), " %", 2),
                spread(column(rows, "drop"), "", 2),
                spread(column(rows, "agreement"), " %", 2),
                spread(column(rows, "integer_share")[:1], " %", 0),
                spread(column(rows, "size_ratio")[:1], "", 3),
            )
            for (network, calibration), rows in sorted(found.items(), key=lambda item: item[0][0])
        ]
        lines += [*markdown(INT8_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def race_table(results: Sequence[Result]) -> list[str]:
    """A table a result, a row a method: where it ends, and how long ours takes to get there; the kind `race`."""
    lines: list[str] = []
    for result in results:
        curves = by(result["runs"], "method")
        table = []
        for method, runs in curves.items():
            ends = [run["points"][-1][1] for run in runs]
            goal = statistics.fmean(ends)
            reached = [seconds_to(run["points"], goal) for run in curves.get(OURS, [])]
            table.append(
                (
                    method,
                    str(len(runs)),
                    spread([run["points"][-1][0] for run in runs], " s", 0),
                    f"**{spread(ends, ' %', 2)}**" if method == OURS else spread(ends, " %", 2),
                    UNKNOWN if method == OURS else times(reached, ends, result["seconds"]),
                )
            )
        student = f"{result['task']}, to {result['student']}, {result['seconds']:g} s each"
        accuracy = f"teacher {result['runs'][0]['teacher_accuracy']:.2f} %; {processor(result)}"
        lines += [f"**{student}** ({accuracy}):", "", *markdown(RACE_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def seconds_to(points: Sequence[Sequence[float]], accuracy: float) -> float | None:
    """The seconds of the point from which on a curve is at `accuracy` or above, None where there is none."""
    below = [index for index, (_, found) in enumerate(points) if found < accuracy]
    first = below[-1] + 1 if below else 0
    return points[first][0] if first < len(points) else None


def times(reached: Sequence[float | None], ends: Sequence[float], budget: float) -> str:
    """`1/3.4 of its time, 35 s`: ours against a rival with `budget` seconds; none is claimed against a poor rival."""
    if statistics.fmean(ends) < LEAST_RIVAL:
        return f"not claimed: it ends below {LEAST_RIVAL:.0f} %"
    known = [seconds for seconds in reached if seconds is not None]
    if not reached:
        return UNKNOWN
    if not known or len(known) < len(reached):
        return f"not reached by {len(reached) - len(known)} of {len(reached)} seeds"
    seconds = statistics.fmean(known)
    return f"1/{budget / seconds:.1f} of its time, {spread(known, ' s', 0)}"


class Buffers(NamedTuple):
    """What a result says of the buffer's size."""

    task: str
    teacher_accuracy: float  # percent
    ends: Mapping[int, Sequence[float]]  # samples -> the student's accuracy at the end, percent, one a run; ascending


def by_buffer(result: Result) -> Buffers:
    """Of a result of `benchmarks.buffer`, or of `benchmarks.gpu --buffer`, whose runs all are of one pair."""
    if result["kind"] == "buffer":
        runs, accuracy, task, teacher = result["runs"], "accuracy", result["task"], result["teacher_accuracy"]
    else:
        runs, accuracy = went_through(result), "student_accuracy"
        task, teacher = runs[0]["pair"], runs[0]["teacher_accuracy"]
    ends = {samples: column(own, accuracy) for samples, own in sorted(by(runs, "samples").items())}
    return Buffers(task, teacher, ends)


def buffer_table(results: Sequence[Result]) -> list[str]:
    """A row a buffer size, and what it loses against the default; the kinds `buffer` and `gpu_buffer`."""
    lines: list[str] = []
    for result in results:
        task, teacher, ends = by_buffer(result)
        base = statistics.fmean(ends[DEFAULT_SAMPLES]) if DEFAULT_SAMPLES in ends else None
        table = [
            (
                f"{samples:,}",
                str(len(own)),
                spread(own, " %", 2),
                f"{100 * statistics.fmean(own) / teacher:.1f} %",
                UNKNOWN
                if base is None or samples == DEFAULT_SAMPLES
                else f"{statistics.fmean(own) - base:+.2f} points",
            )
            for samples, own in ends.items()
        ]
        title = f"**{task}** (teacher {teacher:.2f} %; {processor(result)}):"
        lines += [title, "", *markdown(BUFFER_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def settings_table(results: Sequence[Result]) -> list[str]:
    """A table a result, a row a changed setting, compared with the defaults seed by seed; the kind `settings`."""
    lines: list[str] = []
    for result in results:
        runs = [{**run, "name": _named(run["changed"])} for run in result["runs"]]
        base = {run["seed"]: run["accuracy"] for run in runs if not run["changed"]}
        table = []
        for name, found in by(runs, "name").items():
            gains = [run["accuracy"] - base[run["seed"]] for run in found if run["seed"] in base]
            is_base = not found[0]["changed"]
            table.append(
                (
                    name,
                    str(len(found)),
                    spread(column(found, "accuracy"), " %", 2),
                    UNKNOWN if is_base or not gains else spread(gains, " points", 2),
                    UNKNOWN if is_base or not gains else f"{sum(gain > 0 for gain in gains)} of {len(gains)}",
                    spread(column(found, "agreement"), " %", 1),
                )
            )
        title = f"**{result['task']}**, {runs[0]['rounds']} rounds with the defaults:"
        lines += [title, "", *markdown(SETTINGS_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def _named(changed: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "nothing"


def gpu_table(results: Sequence[Result]) -> list[str]:
    """A row a pair, method and buffer; the kind `gpu`."""
    lines: list[str] = []
    for result in results:
        table = [
            (
                row["pair"],
                row["method"],
                f"{row['samples']:,}" if row["method"].startswith("ssdkd") else "–",  # a peer keeps all that it made
                str(row["seeds"]),
                *(
                    with_deviation(row, key, unit, digits)
                    for key, unit, digits in (
                        ("teacher_accuracy", " %", 2),
                        ("student_accuracy", " %", 2),
                        ("ratio_percent", " %", 1),
                        ("seconds", " s", 0),
                    )
                ),
            )
            for row in result["summary"]
        ]
        lines += [*markdown(GPU_HEAD, table), "", provenance(result), ""]
    return lines[:-1]
