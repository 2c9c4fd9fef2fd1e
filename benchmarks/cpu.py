"""Data-free distillers side by side on a CPU, each for the same seconds: ours, ours with SSD-KD off, and the peers'.

    python -m benchmarks.cpu demo --fast-dfkd CHECKOUT
    python -m benchmarks.cpu cifar --fast-dfkd CHECKOUT --nayer CHECKOUT --teacher FILE --test-images FOLDER

CHECKOUT is a clone of zju-vipa/Fast-Datafree or tmtuan1307/NAYER (benchmarks/peers.py runs them), FILE a ResNet-20 of
CIFAR-10, whose student is resnet8. Methods take turns within a seed. Goes on where it was stopped: runs that the result
already holds are not repeated. Run it on an idle machine.

The clock of each method stands still while its student is scored; the last point is the student at the end, the best
one is not picked. `ssdkd` runs with the tool's own defaults, so its student begins with the teacher's layers that fit.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, provenance, save, unfinished
from benchmarks.peers import run_peer
from benchmarks.race import DEMO, OWN, Task, run_own, scorer
from engine.students import build_student

POINTS = 12  # of a curve
CIFAR_STUDENT = "resnet8"
PEERS = {"fast-2": "fast_dfkd", "fast-5": "fast_dfkd", "fast-10": "fast_dfkd", "nayer": "nayer"}  # method: whose code


def run(task: Task, method: str, *, checkout: Path | None, seconds: float, seed: int) -> dict[str, Any]:
    """One run; the points of its curve as [seconds, percent]."""
    teacher = task.teacher()
    score = scorer(teacher, task.labelled())
    every = seconds / POINTS
    if checkout is None:
        points, state = run_own(task, score, seconds=seconds, every=every, seed=seed, changed=OWN[method])
        settings = {**asdict(state.settings), "rounds_done": state.round, "student_steps_done": state.steps}
    else:
        found = run_peer(
            method,
            checkout,
            spec=teacher.spec,
            teacher=teacher.module,
            student=build_student(task.student, teacher=teacher, seed=seed),
            evaluate=score,
            seconds=seconds,
            every=every,
            seed=seed,
            device=torch.device("cpu"),
        )
        points, settings = found.points, found.settings
    return {
        "method": method,
        "seed": seed,
        "teacher_accuracy": score(teacher.module),
        "settings": settings,
        "points": [[point.seconds, point.accuracy] for point in points],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["demo", "cifar"])
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--test-images", type=Path)
    parser.add_argument("--fast-dfkd", type=Path)
    parser.add_argument("--nayer", type=Path)
    parser.add_argument("--methods", nargs="*", choices=[*OWN, *PEERS], help="default: ours, and whose code is given")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu_TASK.json")
    arguments = parser.parse_args()
    if arguments.task == "cifar" and not (arguments.teacher and arguments.test_images):
        parser.error("cifar needs --teacher and --test-images")
    checkouts = {method: getattr(arguments, option) for method, option in PEERS.items()}
    methods = arguments.methods or [*OWN, *(method for method, checkout in checkouts.items() if checkout)]
    for method in methods:
        if method in PEERS and not checkouts[method]:
            parser.error(f"{method} needs a clone of its authors' code: --{PEERS[method].replace('_', '-')} CHECKOUT")
    if arguments.task == "demo" and "nayer" in methods:
        parser.error("nayer has label embeddings of CIFAR-10, and none of the demo's classes: leave --nayer out")
    task = DEMO if arguments.task == "demo" else Task(arguments.teacher, CIFAR_STUDENT, arguments.test_images)
    out = arguments.out or RESULTS / f"cpu_{arguments.task}.json"
    source = provenance(f"python -m benchmarks.cpu {arguments.task} --seconds {arguments.seconds:g}")
    runs = unfinished(out, source).get("runs", [])
    for seed in arguments.seeds:
        for method in methods:
            if any((r["method"], r["seed"]) == (method, seed) for r in runs):
                continue
            runs.append(run(task, method, checkout=checkouts.get(method), seconds=arguments.seconds, seed=seed))
            print(f"{method}, seed {seed}: {runs[-1]['points'][-1][1]:.2f} %", flush=True)
            about = {"task": arguments.task, "student": task.student, "seconds": arguments.seconds}
            save(out, {"kind": "race", **source, **about, "runs": runs})


if __name__ == "__main__":
    main()
