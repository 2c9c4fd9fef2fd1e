"""Draw docs/figures/*.svg from benchmarks/results/*.json: accuracy against time, the buffer's size, how cost grows.

    python -m benchmarks.figures

Needs matplotlib (`pip install -e ".[dev]"`). Lines are means over the seeds, and thin lines are the seeds.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.markdown import Result, by, processor, went_through
from benchmarks.names import OFF, OURS
from benchmarks.tables import ROOT, read_results
from benchmarks.tables_of_accuracy import by_buffer
from benchmarks.tables_of_cost import GROWTH_NAMES

Curve = Sequence[Sequence[float]]  # (seconds, percent) of its points

GRID = 200  # points of a mean curve
FOLDER = ROOT / "docs" / "figures"
COLOURS = {
    **{OURS: "#d1495b", OFF: "#edae49", "logits alone": "#a05c7b", "ssdkd afresh": "#b58db6"},
    **{"fast-2": "#8cb9bd", "fast-5": "#30638e", "fast-10": "#003d5b", "nayer": "#5b8e7d"},
}


def race(result: Result, figure: Figure) -> None:
    """A curve a method: accuracy against the seconds of its clock."""
    axes = figure.subplots()
    runs = by(result["runs"], "method").items()
    against_seconds(axes, {method: [run["points"] for run in own] for method, own in runs})
    axes.set_title(f"{result['task']}, to {result['student']}; {processor(result)}")


def gpu(result: Result, figure: Figure) -> None:
    """A race a pair of networks, one beside the other."""
    pairs = by(went_through(result), "pair")
    for axes, (name, runs) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs.items(), strict=True):
        curves: dict[str, list[Curve]] = {}
        for run in runs:
            method = str(run["method"])
            if method.startswith("ssdkd"):  # a peer keeps all that it made
                method += f", {run['samples']:,} samples"
            curves.setdefault(method, []).append([(at["seconds"], at["accuracy"]) for at in run["curve"]])
        against_seconds(axes, curves)
        axes.set_title(name)


def against_seconds(axes: Axes, curves: Mapping[str, Sequence[Curve]]) -> None:
    """The curves of each method, thin, and their mean."""
    for method, own in curves.items():
        colour = COLOURS.get(method.split(",")[0])
        for curve in own:
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(*mean_curve(own), color=colour, linewidth=2, label=method)
    axes.set(xlabel="seconds", ylabel="student accuracy, %")
    finish(axes)
    axes.legend(frameon=False)


def mean_curve(curves: Sequence[Curve]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds, from the latest first point to the latest end, and the mean of the curves there, each to its own end."""
    first, last = max(curve[0][0] for curve in curves), max(curve[-1][0] for curve in curves)
    seconds = np.linspace(first, last, GRID)
    columns = (np.array(curve).T for curve in curves)
    return seconds, np.mean([np.interp(seconds, *column) for column in columns], axis=0)


def buffer(result: Result, figure: Figure) -> None:
    """Accuracy at the end against the number of samples in the buffer."""
    axes, (task, _, ends) = figure.subplots(), by_buffer(result)
    for samples, own in ends.items():
        axes.plot([samples] * len(own), own, "o", color=COLOURS[OURS], markersize=4)
    axes.plot(list(ends), [statistics.fmean(own) for own in ends.values()], color=COLOURS[OURS])
    axes.set(xlabel="samples in the buffer", ylabel="student accuracy, %", title=f"{task}: the buffer's size")
    finish(axes)


def growth(result: Result, figure: Figure) -> None:
    """Seconds and memory, a pair of axes for each thing that varies."""
    rows = by(result["rows"], "axis")
    for index, (varied, points) in enumerate(rows.items()):
        key = "teacher_parameters" if varied == "teacher" else varied
        ordered = sorted(points, key=lambda row: row[key])
        values = [row[key] for row in ordered]
        seconds, memory = (
            figure.add_subplot(2, len(rows), index + 1),
            figure.add_subplot(2, len(rows), len(rows) + index + 1),
        )
        seconds.plot(values, [row["seconds_per_1000_images"] for row in ordered], "o-", color=COLOURS[OURS])
        memory.plot(values, [row["peak_memory_mb"] for row in ordered], "o-", color=COLOURS["fast-5"])
        name = "teacher's parameters" if varied == "teacher" else GROWTH_NAMES[varied]
        for axes, label in ((seconds, "s for 1,000 images"), (memory, "peak memory, MB")):
            axes.set(xlabel=name, ylabel=label if index == 0 else None, xscale="log")
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
            if varied != "teacher":
                axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=7)
                axes.minorticks_off()
            finish(axes)


def finish(axes: Axes) -> None:
    """The look that all of them share."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)


DRAWN: dict[str, tuple[Callable[[Result, Figure], None], tuple[float, float]]] = {  # kind: how, and inches
    "race": (race, (6.4, 4.2)),
    "buffer": (buffer, (6.4, 3.4)),
    "growth": (growth, (12.0, 5.2)),
    "gpu": (gpu, (12.0, 4.2)),
    "gpu_buffer": (buffer, (6.4, 3.4)),
}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw what there is, `KIND_NAME.svg`; the same results give the same bytes."""
    mpl.rcParams.update({"svg.hashsalt": "ssdkd", "svg.fonttype": "none", "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for result in results:
        if result["kind"] not in DRAWN or (result["kind"] in ("gpu", "gpu_buffer") and not went_through(result)):
            continue
        how, inches = DRAWN[result["kind"]]
        figure = Figure(figsize=inches, layout="constrained")
        how(result, figure)
        path = folder / f"{result['kind']}_{name_of(result)}.svg"
        figure.savefig(path, metadata={"Date": None})
        drawn.append(path)
    return drawn


def name_of(result: Result) -> str:
    """What tells a figure from others of its kind: its task, its machine, or pairs, methods and buffers."""
    if result["kind"] == "gpu":
        return "_".join(str(value) for key in ("pair", "method", "samples") for value in by(went_through(result), key))
    if result["kind"] == "gpu_buffer":
        return by_buffer(result).task
    if result["kind"] == "race":
        brand = re.split(r"[^a-z0-9]", result["machine"]["cpu"].lower())[0]
        return f"{result['task']}_{brand}{'_bfloat16' if processor(result).endswith('bfloat16') else ''}"
    return str(result.get("task") or result["device"])


if __name__ == "__main__":
    for path in draw(list(read_results(ROOT / "benchmarks" / "results")), FOLDER):
        print(path)
