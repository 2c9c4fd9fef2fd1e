"""What every result says about where it comes from."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Of a processor, what decides how fast bfloat16 and integers are there; names as the kernel writes them.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "bf16")


def provenance(command: str) -> dict[str, Any]:
    """Command, commit, time, machine and versions of a result."""
    import torch

    model = _cpuinfo("model name")
    known = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return {
        "command": command,
        "commit": _commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": model or platform.processor(),
            "instructions": " ".join(name for name in INSTRUCTIONS if name in known),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "spins": os.environ.get("GOMP_SPINCOUNT"),  # of a thread that waits (engine.processors)
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def unfinished(path: Path, source: dict[str, Any]) -> dict[str, Any]:
    """The result that an interrupted run of this very command, code and machine left, or an empty one.

    `source` is this run's `provenance`. Stops where the file holds something else: seeds of two commits or machines in
    one result would be published under one name.
    """
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key in source if key != "created" and found.get(key) != source[key]]
    if other:
        sys.exit(
            f"{path} holds another measurement (other {', '.join(other)}): delete it, or write elsewhere with --out"
        )
    return found


def _commit() -> str:
    """Of the code that runs. Where that is a copy without its history, SSDKD_COMMIT says; else it is empty there."""
    if "SSDKD_COMMIT" in os.environ:
        return os.environ["SSDKD_COMMIT"]
    question = ["git", "rev-parse", "--short", "HEAD"]
    try:
        answer = subprocess.run(question, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:
        return ""
    return answer.stdout.strip()


def _cpuinfo(key: str) -> str:
    """What the kernel says of the first processor under that key, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")
