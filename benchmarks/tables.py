"""Write the tables of README.md and docs/ from benchmarks/results/*.json.

    python -m benchmarks.tables

A result is one JSON file that a script in this folder wrote: what was run, on which commit, machine and versions, and
one entry a seed. Every number in the tables comes from there; between the markers nothing is typed by hand.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.markdown import UNKNOWN, Result, by, column, markdown, mean, pair, provenance, spread, with_deviation

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "full"  # the variant that the others are compared with
RESULTS_HEAD = (
    "command",
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
    *("network", "ranges from", "seeds", "float accuracy", "INT8 accuracy", "points lost", "agreement with float"),
    *("in integers", "file, of float's"),
)
CALIBRATIONS = ("our samples", "real images", "noise")
INT8_SUMMARY_HEAD = ("network", "float32", *(f"INT8, {name}" for name in CALIBRATIONS), "agreement with float32, ours")
INT8_SPEED_HEAD = (
    *("network", "parameters", "FP32, 1 image, ms", "INT8", "FP32, 32 images, ms", "INT8"),
    *("times faster, 1", "times faster, 32"),
)
OURS, LEAST_RIVAL = "ssdkd", 60.0  # percent: a rival that ends below it is no measure
RACE_HEAD = ("method", "seeds", "ended after", "student accuracy at the end", "ours gets there in")
STEPS_HEAD = (
    *("pair", "batch", "precision", "the engine's step, ms", "not as a CUDA graph", "bare step, ms"),
    "without teacher, ms",
    *("throughput, of the bare step's", "the teacher's looks counted in", "of the one without teacher"),
)
STEP_RATIOS = ("bare", "bare_with_those", "bare_without_teacher")
DEFAULT_SAMPLES = 5000
BUFFER_HEAD = ("samples", "seeds", "student accuracy", "accuracy kept", f"against {DEFAULT_SAMPLES:,}")
GROWTH_NAMES = {"samples": "buffer, samples", "classes": "classes", "pixels": "pixels a side", "teacher": "teacher"}
GROWTH_HEAD = (
    "what varies",
    "value",
    "batch",
    "s a round",
    "s for 1,000 images that the student sees",
    "peak memory, MB",
)
GPU_HEAD = (
    *("pair", "method", "samples", "seeds", "teacher accuracy", "student accuracy", "accuracy kept"),
    "teacher to student",
)


@dataclass(frozen=True)
class Page:
    """A file, the marker in it, and what is written between `<!-- marker -->` and `<!-- /marker -->`."""

    path: str
    marker: str
    kinds: tuple[str, ...]  # of the results that it shows, in this order
    table: Callable[[Sequence[Result]], list[str]]


def results_table(results: Sequence[Result]) -> list[str]:
    """A row a result, and below it where each was measured; the kinds `demo` and `cifar`."""
    rows = [
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
        )
        for result, runs in ((result, result["runs"]) for result in results)
    ]
    return [*markdown(RESULTS_HEAD, rows), "", *map(provenance, results)]


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


def int8_summary(results: Sequence[Result]) -> list[str]:
    """A row a network: its accuracy in float32, and in INT8 by what its ranges come from; `int8`."""
    lines: list[str] = []
    for result in results:
        networks = dict.fromkeys(row["network"] for row in result["rows"])
        table = []
        for network in networks:
            of = {name: [row for row in result["rows"] if (row["network"], row["calibration"]) == (network, name)]
                  for name in CALIBRATIONS}  # fmt: skip
            ours = of[CALIBRATIONS[0]]
            scores = (spread(column(of[name], "accuracy"), " %", 2) for name in CALIBRATIONS)
            table.append(
                (
                    network,
                    spread(column(ours, "float_accuracy")[:1], " %", 2),
                    *scores,
                    spread(column(ours, "agreement"), " %", 1),
                )
            )
        seeds = len({row["seed"] for row in result["rows"]})
        lines += [*markdown(INT8_SUMMARY_HEAD, table), "", f"{provenance(result)} {seeds} seeds.", ""]
    return lines[:-1]


def int8_speed_table(results: Sequence[Result]) -> list[str]:
    """A row a network, how many times faster INT8 is; the kind `int8_speed`."""
    lines: list[str] = []
    for result in results:
        table = [
            (
                row["network"],
                f"{row['parameters']:,}",
                *(f"{row[f'{precision}_ms_{batch}']:.3f}" for batch in (1, 32) for precision in ("fp32", "int8")),
                *(f"{row[f'times_faster_{batch}']:.2f}" for batch in (1, 32)),
            )
            for row in result["rows"]
        ]
        lines += [*markdown(INT8_SPEED_HEAD, table), "", f"{provenance(result)} {result['rows'][0]['runtime']}.", ""]
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
        accuracy = f"teacher {result['runs'][0]['teacher_accuracy']:.2f} %"
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


def steps_table(results: Sequence[Result]) -> list[str]:
    """A row a pair and batch: the engine's step against the bare ones, as shares of their throughput; `steps`."""
    lines: list[str] = []
    for result in results:
        table = [
            (
                row["pair"],
                str(row["batch"]),
                row["precision"],
                *(
                    f"{row[f'{step}_ms']:.2f}" if f"{step}_ms" in row else UNKNOWN
                    for step in ("engine", "engine_without_graphs", "bare", "bare_without_teacher")
                ),
                *(f"{100 / row[f'ratio_to_{step}']:.0f} %" for step in STEP_RATIOS),
            )
            for row in result["rows"]
        ]
        lines += [*markdown(STEPS_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def buffer_table(results: Sequence[Result]) -> list[str]:
    """A row a buffer size, and what it loses against the default; the kind `buffer`."""
    lines: list[str] = []
    for result in results:
        ends = {samples: [run["accuracy"] for run in runs] for samples, runs in by(result["runs"], "samples").items()}
        base = statistics.fmean(ends[DEFAULT_SAMPLES]) if DEFAULT_SAMPLES in ends else None
        table = [
            (
                f"{samples:,}",
                str(len(found)),
                spread(found, " %", 2),
                f"{100 * statistics.fmean(found) / result['teacher_accuracy']:.1f} %",
                UNKNOWN
                if base is None or samples == DEFAULT_SAMPLES
                else f"{statistics.fmean(found) - base:+.2f} points",
            )
            for samples, found in sorted(ends.items())
        ]
        lines += [*markdown(BUFFER_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def growth_table(results: Sequence[Result]) -> list[str]:
    """A row a case of what varies; the kind `growth`."""
    lines: list[str] = []
    for result in results:
        table = [
            (
                GROWTH_NAMES[row["axis"]],
                f"{row['teacher']} ({row['teacher_parameters']:,})"
                if row["axis"] == "teacher"
                else f"{row[row['axis']]:,}",
                str(row["batch"]),
                f"{row['seconds_per_round']:.2f}",
                f"{row['seconds_per_1000_images']:.2f}",
                f"{row['peak_memory_mb']:,.0f}",
            )
            for row in result["rows"]
        ]
        lines += [*markdown(GROWTH_HEAD, table), "", provenance(result), ""]
    return lines[:-1]


def gpu_table(results: Sequence[Result]) -> list[str]:
    """A row a pair, method and buffer; the kind `gpu`."""
    lines: list[str] = []
    for result in results:
        table = [
            (
                row["pair"],
                row["method"],
                f"{row['samples']:,}",
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


PAGES = (
    Page("README.md", "results", ("demo", "cifar"), results_table),
    Page("README.md", "int8", ("int8",), int8_summary),
    Page("README.md", "race", ("race",), race_table),
    Page("docs/method.md", "ablation", ("ablation",), ablation_table),
    Page("docs/quantization.md", "int8", ("int8",), int8_table),
    Page("docs/quantization.md", "int8-speed", ("int8_speed",), int8_speed_table),
    Page("docs/benchmarks.md", "race", ("race",), race_table),
    Page("docs/benchmarks.md", "steps", ("steps",), steps_table),
    Page("docs/benchmarks.md", "buffer", ("buffer",), buffer_table),
    Page("docs/benchmarks.md", "growth", ("growth",), growth_table),
    Page("docs/benchmarks.md", "gpu", ("gpu",), gpu_table),
)


def read_results(folder: Path) -> Iterator[Result]:
    """Every result in `folder`, by file name."""
    for path in sorted(folder.glob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def filled(text: str, page: Page, results: Sequence[Result]) -> str:
    """`text` with the page's table between its markers; with no results there is nothing between them."""
    begin, end = f"<!-- {page.marker} -->", f"<!-- /{page.marker} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        sys.exit(f"{page.path}: expected {begin} and then {end} once each; put them where the table shall stand")
    shown = [result for kind in page.kinds for result in results if result["kind"] == kind]
    lines = [begin, *(["", *page.table(shown), ""] if shown else []), end]
    return text[: text.index(begin)] + "\n".join(lines) + text[text.index(end) + len(end) :]


def write_tables(root: Path) -> None:
    """Fill every page under `root` from root/benchmarks/results."""
    results = list(read_results(root / "benchmarks" / "results"))
    for page in PAGES:
        path = root / page.path
        path.write_text(filled(path.read_text(encoding="utf-8"), page, results), encoding="utf-8")


if __name__ == "__main__":
    write_tables(ROOT)
