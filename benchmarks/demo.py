"""The demo as a user runs it, once a seed: accuracy kept, latency, seconds from start to end.

    python -m benchmarks.demo [--seeds 3] [--out benchmarks/results/demo.json]

Goes on where it was stopped: seeds that the result already holds are not repeated. Run it on an idle machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, load, provenance, save


def run(seed: int, folder: Path) -> dict[str, Any]:
    """One `ssdkd demo` in a process of its own; what its report says."""
    code = "import sys; from ssdkd_cli.main import main; main()"
    command = [sys.executable, "-c", code, "demo", "--json", "--seed", str(seed), "--out", str(folder / f"seed{seed}")]
    started = time.perf_counter()
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    teacher, student, artifact = report["teacher"], report["student"], report["artifacts"][0]
    return {
        "seed": seed,
        "teacher_accuracy": teacher["accuracy"],
        "student_accuracy": student["accuracy"],
        "ratio_percent": 100 * student["accuracy"] / teacher["accuracy"],
        "agreement": student["agreement"],
        "seconds_total": time.perf_counter() - started,
        "distillation_seconds": report["distillation"]["seconds"],
        "teacher_parameters": teacher["parameters"],
        "student_parameters": student["parameters"],
        "teacher_latency_ms": teacher["latency_ms"]["p50"],
        "student_latency_ms": artifact["latency_ms"]["p50"],
        "verified": artifact["verified"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.json")
    arguments = parser.parse_args()
    runs = load(arguments.out).get("runs", [])
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            if any(earlier["seed"] == seed for earlier in runs):
                continue
            runs.append(run(seed, Path(folder)))
            save(arguments.out, {"kind": "demo", **provenance("ssdkd demo"), "runs": runs})


if __name__ == "__main__":
    main()
