"""One run of the tool as a user starts it, in a process of its own; what its report says."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def run(words: list[str], *, seed: int, out: Path) -> dict[str, Any]:
    """`ssdkd WORDS --seed SEED --out OUT`; accuracies in percent, latency of one image in milliseconds."""
    code = "import sys; from ssdkd_cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words, "--json", "--seed", str(seed), "--out", str(out)]
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
