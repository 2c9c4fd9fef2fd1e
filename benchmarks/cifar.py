"""A real teacher on two cores for a fixed time: CIFAR-10's ResNet-20 to a student, and the curve of the run.

    python -m benchmarks.cifar TEACHER TEST_FOLDER [--student resnet8] [--time-limit 20m] [--seed 0] [--out FILE]

TEACHER is a ResNet-20 of CIFAR-10, TEST_FOLDER its test images, a folder a class. Writes
benchmarks/results/cifar_STUDENT.json. Run it on an idle machine.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, provenance, save
from benchmarks.tool import run

EVERY = 5  # rounds between two points of the curve
CURVE_KEYS = ("round", "seconds", "agreement", "prior_loss", "distillation_loss", "feature_loss")


def curve(metrics: Path) -> list[dict[str, Any]]:
    """Some numbers of every fifth round of a run's metrics.jsonl."""
    rounds = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [{key: each[key] for key in CURVE_KEYS} for each in rounds if each["round"] % EVERY == 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("test_folder", type=Path)
    parser.add_argument("--student", default="resnet8")
    parser.add_argument("--time-limit", default="20m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options = ["--student", arguments.student, "--time-limit", arguments.time_limit, "--eval-data"]
    shown = ["ssdkd", "compress", arguments.teacher.name, *options, "/".join(arguments.test_folder.parts[-2:])]
    source = provenance(" ".join(shown))
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder) / "run"
        words = ["compress", str(arguments.teacher), *options, str(arguments.test_folder)]
        runs = [run(words, seed=arguments.seed, out=run_folder)]
        points = curve(run_folder / "metrics.jsonl")
    out = arguments.out or RESULTS / f"cifar_{arguments.student.replace('/', '_')}.json"
    save(out, {"kind": "cifar", **source, "runs": runs, "curve": points})


if __name__ == "__main__":
    main()
