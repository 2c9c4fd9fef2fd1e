"""Write the tables of README.md and docs/ from benchmarks/results/*.json.

    python -m benchmarks.tables

A result is one JSON file that a script in this folder wrote: what was run, on which commit, machine and versions, and
one entry a seed. Every number in the tables comes from there; between the markers nothing is typed by hand.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.markdown import Result
from benchmarks.tables_of_accuracy import (
    ablation_table,
    buffer_table,
    gpu_table,
    int8_table,
    race_table,
    results_table,
    settings_table,
)
from benchmarks.tables_of_cost import growth_table, int8_speed_table, latency_table, steps_table
from benchmarks.tables_of_readme import gpu_summary, int8_summary, race_summary, results_summary

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Page:
    """A file, the marker in it, and what is written between `<!-- marker -->` and `<!-- /marker -->`."""

    path: str
    marker: str
    kinds: tuple[str, ...]  # of the results that it shows, in this order
    table: Callable[[Sequence[Result]], list[str]]


PAGES = (
    Page("README.md", "results", ("demo", "cifar"), results_summary),
    Page("README.md", "int8", ("int8",), int8_summary),
    Page("README.md", "race", ("race",), race_summary),
    Page("README.md", "gpu", ("gpu",), gpu_summary),
    Page("docs/benchmarks.md", "results", ("demo", "cifar"), results_table),
    Page("docs/method.md", "ablation", ("ablation",), ablation_table),
    Page("docs/quantization.md", "int8", ("int8",), int8_table),
    Page("docs/quantization.md", "int8-speed", ("int8_speed",), int8_speed_table),
    Page("docs/benchmarks.md", "race", ("race",), race_table),
    Page("docs/benchmarks.md", "steps", ("steps",), steps_table),
    Page("docs/benchmarks.md", "buffer", ("buffer", "gpu_buffer"), buffer_table),
    Page("docs/benchmarks.md", "settings", ("settings",), settings_table),
    Page("docs/benchmarks.md", "growth", ("growth",), growth_table),
    Page("docs/benchmarks.md", "gpu", ("gpu",), gpu_table),
    Page("docs/benchmarks.md", "gpu-latency", ("gpu_latency",), latency_table),
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
