"""Results as cells and lines of Markdown tables."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
Runs = Sequence[Mapping[str, Any]]

UNKNOWN = "–"


def by(rows: Sequence[Mapping[str, Any]], key: str) -> dict[Any, list[Mapping[str, Any]]]:
    """The rows of each value of `key`, in the order in which they appear."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def column(runs: Runs, name: str) -> list[float]:
    """The values of `name` that were measured, one a run."""
    return [run[name] for run in runs if run.get(name) is not None]


def mean(runs: Runs, name: str) -> float:
    """The mean of `name` over the runs."""
    return statistics.fmean(column(runs, name))


def spread(values: Sequence[float], unit: str, digits: int) -> str:
    """`84.20 ± 0.31 %`: mean and sample standard deviation; of a single value the value alone."""
    if not values:
        return UNKNOWN
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}{unit}"


def with_deviation(row: Mapping[str, Any], key: str, unit: str, digits: int) -> str:
    """`84.20 ± 0.31 %` of a row that holds both."""
    deviation = row[f"{key}_deviation"]
    return f"{row[key]:.{digits}f}{f' ± {deviation:.{digits}f}' if deviation else ''}{unit}"


def pair(runs: Runs, name: str, form: str, unit: str) -> str:
    """`teacher → student`: the means of teacher_<name> and student_<name>."""
    sides = [column(runs, f"{network}_{name}") for network in ("teacher", "student")]
    return " → ".join(form.format(statistics.fmean(side)) if side else UNKNOWN for side in sides) + unit


@dataclass(frozen=True)
class Buffers:
    """What a result says of the buffer's size."""

    task: str
    teacher_accuracy: float  # percent
    ends: Mapping[int, Sequence[float]]  # samples -> the student's accuracy at the end, percent, one a run; ascending


def buffers(result: Result) -> Buffers:
    """What a result of `benchmarks.buffer`, or of `benchmarks.gpu --buffer`, says."""
    runs, accuracy = result["runs"], "accuracy"
    about = result
    if result["kind"] == "gpu_buffer":
        runs, accuracy = [run for run in runs if run["failed"] is None], "student_accuracy"
        about = {"task": runs[0]["pair"], **runs[0]}
    ends = {samples: column(own, accuracy) for samples, own in sorted(by(runs, "samples").items())}
    return Buffers(about["task"], about["teacher_accuracy"], ends)


def provenance(result: Result) -> str:
    """One sentence: the command, when, on which commit, machine and versions."""
    machine, versions = (
        ", ".join(f"{name} {value}" for name, value in result[key].items() if value is not None)
        for key in ("machine", "versions")
    )
    return f"- `{result['command']}`: {result['created']}, commit `{result['commit']}`; {machine}; {versions}."


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
