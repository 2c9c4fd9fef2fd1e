"""The runs of benchmarks.gpu on disk: a file each, and all of a kind in one: gpu.json, gpu_buffer.json."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import save

FOLDERS = {"gpu": "runs", "gpu_buffer": "buffers"}  # of the runs of each kind of result
SAME = ("seconds_limit", "rounds_limit", "tiny", "commit")  # what runs of one result share, beside GPU and torch


def name_of(pair: str, method: str, samples: int, seed: int) -> str:
    """The file name of a run, without its suffix."""
    return f"{pair}-{method}-{samples}-seed{seed}"


def path_of(out: Path, kind: str, name: str) -> Path:
    """Where the run called `name` is written."""
    return out / FOLDERS[kind] / f"{name}.json"


def finished(out: Path, kind: str, wanted: dict[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The runs of a kind called `names` that `out` holds. Stops where one was measured otherwise than `wanted`.

    `wanted` holds SAME, and `machine` and `versions` of this run's provenance.
    """
    found = {}
    for name in names:
        path = path_of(out, kind, name)
        if not path.exists():
            continue
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if run["failed"] is not None:
            continue  # it may have lacked a package: it is tried again
        other = [key for key in SAME if run.get(key) != wanted[key]]
        other += ["gpu"] if run["machine"]["gpu"] != wanted["machine"]["gpu"] else []
        other += ["torch"] if run["versions"]["torch"] != wanted["versions"]["torch"] else []
        if other:
            sys.exit(f"{path} is of another measurement (other {', '.join(other)}): delete it, or give another --out")
        found[name] = run
    return found


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each pair, method and number of samples: mean and standard deviation over its seeds, in percent."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for run in runs:
        if run["failed"] is None:
            groups.setdefault((run["pair"], run["method"], run["samples"]), []).append(run)
    rows = []
    for (pair, method, samples), group in groups.items():
        row: dict[str, Any] = {"pair": pair, "method": method, "samples": samples, "seeds": len(group)}
        for key in ("teacher_accuracy", "student_accuracy", "ratio_percent", "seconds"):
            values = [run[key] for run in group]
            row |= {key: mean(values), f"{key}_deviation": stdev(values) if len(values) > 1 else None}
        rows.append(row)
    return rows


def merge(out: Path, kind: str, source: dict[str, Any]) -> None:
    """Write the result of a kind: every run of it in `out`, each with where it was measured, and their summary."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / FOLDERS[kind]).glob("*.json"))]
    save(out / f"{kind}.json", {"kind": kind, **source, "summary": summary(runs), "runs": runs})
