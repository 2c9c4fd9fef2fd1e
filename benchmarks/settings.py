"""Other settings than the defaults: one changed at a time, the same seeds for all.

    python -m benchmarks.settings demo --images FILE [--seeds 0 1 2] [--threads 1]
    python -m benchmarks.settings cifar --images FOLDER --teacher FILE

The labelled images are what `ssdkd eval --data` takes; no figure that is published may be made of them, since a default
that was chosen on test images proves nothing there. Other numbers of inner steps or of student steps have other numbers
of rounds, so that they cost about as much. Two of these commands, of other seeds, can share one result. Goes on where
it was stopped.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, provenance, save, unfinished
from benchmarks.cpu import CIFAR_STUDENT
from benchmarks.race import DEMO, PLAIN, Task, run_rounds, scorer
from engine.config import DistillationSettings
from engine.distill import averaged_student

Changed = Mapping[str, Any]

VARIANTS: tuple[Changed, ...] = (
    {},
    PLAIN,
    {"difficulty": False},
    {"priority": False},
    {"gamma": 0.5},
    {"gamma": 2.0},
    {"beta": 0.0},
    {"beta": 0.7},
    {"temperature": 2.0},
    {"temperature": 8.0},
    {"average_decay": 0.9},
    {"average_decay": 0.997},
    {"student_rate": 0.2, "inherited_rate": 0.1},
    {"student_rate": 0.05, "inherited_rate": 0.025},
    {"shift": 2},
    {"shift": 8},
    {"views": 2},
    {"feature_weight": 0.0},
    {"feature_weight": 10.0},
    {"feature_weight": 100.0},
    {"looking_share": 0.25},
    {"looking_share": 1.0},
    {"alter": False},
    {"adversarial_weight": 0.0},
    {"adversarial_weight": 3.0},
    {"class_weight": 2.0},
    {"spread_weight": 0.0},
    {"spread_weight": 30.0},
    {"leaves": True},
    {"generator_width": 8},
    {"generator_width": 32},
)
SHARES = ({"student_steps": 20}, {"student_steps": 80}, {"inversion_steps": 5}, {"inversion_steps": 20})
# Shares of the images and of the student's steps in what a round of 20 steps costs, the teacher looking on in half of
# these: one thread of a slow EPYC.
COST_OF_A_ROUND = {"demo": (0.68, 0.32), "cifar": (0.5, 0.5)}
ALONE = 0.78  # of those steps' cost: that of as many without the teacher, its looks at eight views counted in


def cost_of(changed: Changed, task: str) -> float:
    """What a round costs with these settings; 1 for 20 steps of the student, the teacher looking on in half of them.

    `ALONE` was measured before images were altered, both before maps were compared through regressors.
    """
    images, steps = COST_OF_A_ROUND[task]
    settings = replace(DistillationSettings(), **changed)
    looking = settings.looking_share if settings.alter or settings.feature_weight else 0.0
    steps *= ALONE + (1 - ALONE) * looking / 0.5
    return images * settings.inversion_steps / 10 + steps * settings.student_steps / 20


def of_equal_cost(changed: Changed, *, rounds: int, task: str) -> int:
    """How many rounds cost as much as `rounds` with the defaults."""
    return round(rounds * cost_of({}, task) / cost_of(changed, task))


def run(task: Task, *, rounds: int, seed: int, changed: Changed) -> dict[str, Any]:
    """One distillation; percents, and the seconds of the distillation."""
    last, state = run_rounds(task, rounds=rounds, seed=seed, changed=changed)
    accuracy = scorer(task.teacher(), task.labelled())(averaged_student(state))
    found = {"accuracy": accuracy, "agreement": last.agreement, "seconds": last.seconds}
    return {"changed": dict(changed), "rounds": rounds, "seed": seed, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(COST_OF_A_ROUND))
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", help="names of settings: no variant that changes others")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="results/settings_TASK.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = replace(DEMO, test_images=arguments.images)
    if arguments.task == "cifar":
        if not arguments.teacher:
            parser.error("cifar needs --teacher FILE")
        task = Task(arguments.teacher, CIFAR_STUDENT, arguments.images)
    out = arguments.out or RESULTS / f"settings_{arguments.task}.json"
    source = provenance(f"python -m benchmarks.settings {arguments.task} --rounds {arguments.rounds}")
    asked = [each for each in (*VARIANTS, *SHARES) if arguments.only is None or each.keys() <= {*arguments.only}]
    for seed in arguments.seeds:
        for changed in asked:
            runs = unfinished(out, source).get("runs", [])
            if any((done["changed"], done["seed"]) == (changed, seed) for done in runs):
                continue
            rounds = of_equal_cost(changed, rounds=arguments.rounds, task=arguments.task)
            found = run(task, rounds=rounds, seed=seed, changed=changed)
            print(f"{changed}, seed {seed}: {found['accuracy']:.2f} %, {found['seconds']:.0f} s", flush=True)
            runs = unfinished(out, source).get("runs", [])  # of another command, too
            save(out, {"kind": "settings", **source, "task": arguments.task, "runs": [*runs, found]})


if __name__ == "__main__":
    main()
