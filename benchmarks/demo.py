"""The demo as a user runs it, once a seed: accuracy kept, latency, seconds from start to end.

    python -m benchmarks.demo [--seeds 3] [--out benchmarks/results/demo.json]

Goes on where it was stopped: seeds that the result already holds are not repeated. Run it on an idle machine.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, provenance, save, unfinished
from benchmarks.tool import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.json")
    arguments = parser.parse_args()
    source = provenance("ssdkd demo")
    runs = unfinished(arguments.out, source).get("runs", [])
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            if any(earlier["seed"] == seed for earlier in runs):
                continue
            runs.append(run(["demo"], seed=seed, out=Path(folder) / f"seed{seed}"))
            save(arguments.out, {"kind": "demo", **source, "runs": runs})


if __name__ == "__main__":
    main()
