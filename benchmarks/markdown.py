"""Results as cells and lines of Markdown tables."""

import statistics
from collections.abc import Mapping, Sequence
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


def processor(result: Result) -> str:
    """`AMD EPYC, bfloat16`: what a CPU's result was measured on; or the GPU of a GPU's result."""
    machine = result["machine"]
    if result["kind"].startswith("gpu"):
        return str(machine["gpu"])
    quick = "bf16" in machine.get("instructions", "")  # older results do not say
    return f"{machine['cpu']}{', bfloat16' if quick else ''}"


def went_through(result: Result) -> list[Mapping[str, Any]]:
    """The runs of a GPU's result that did not fail."""
    return [run for run in result["runs"] if run["failed"] is None]


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
