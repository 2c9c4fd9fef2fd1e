"""What each part of the method gives: the demo's task at a third of its budget, one part off at a time.

    python -m benchmarks.ablation [--seeds 3] [--rounds 50] [--out benchmarks/results/ablation.json]

Goes on where it was stopped: runs that the result already holds are not repeated. A row of the table is made of the
float student's accuracy on the demo's 2,000 test images; nothing is chosen by it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, provenance, save, unfinished
from benchmarks.race import DEMO, PLAIN, run_rounds, scorer
from engine.config import EFFORTS
from engine.distill import averaged_student

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "without the diversity part": {"diversity": False},
    "without the difficulty part": {"difficulty": False},
    "without priorities": {"priority": False},
    "without the meta step": {"meta": False},
    "plain fast inversion: all off but the meta step, growing buffer": PLAIN,
    "all off, growing buffer": {**PLAIN, "meta": False},
    "without inherited layers": {"inherit": False},
    "without the spread": {"spread_weight": 0.0},
    "without feature matching": {"feature_weight": 0.0},
    "without altered images": {"alter": False},
    "random noise instead of inversion": {"inversion": False},
}


def run(changed: dict[str, Any], *, rounds: int, seed: int) -> dict[str, Any]:
    """One distillation of the demo; accuracies in percent."""
    teacher = DEMO.teacher()
    score = scorer(teacher, DEMO.labelled())
    last, state = run_rounds(DEMO, rounds=rounds, seed=seed, changed=changed)
    teacher_accuracy, student_accuracy = score(teacher.module), score(averaged_student(state))
    return {
        "seed": seed,
        "teacher_accuracy": teacher_accuracy,
        "student_accuracy": student_accuracy,
        "ratio_percent": 100 * student_accuracy / teacher_accuracy,
        "class_balance": last.class_balance,
        "seconds": last.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=EFFORTS["quick"] // 3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / "ablation.json")
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of variants")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    command = f"python -m benchmarks.ablation --seeds {arguments.seeds} --rounds {arguments.rounds}"
    source = provenance(command)
    earlier = unfinished(arguments.out, source).get("variants", [])
    done = {variant["name"]: variant["runs"] for variant in earlier}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            runs = done.setdefault(name, [])
            if any(known["seed"] == seed for known in runs):
                continue
            runs.append(run(VARIANTS[name], rounds=arguments.rounds, seed=seed))
            print(f"{name}, seed {seed}: {runs[-1]['student_accuracy']:.2f} %", flush=True)
            names = [each for each in VARIANTS if each in done]
            ordered = [{"name": each, "settings": VARIANTS[each], "runs": done[each]} for each in names]
            save(arguments.out, {"kind": "ablation", **source, "rounds": arguments.rounds, "variants": ordered})


if __name__ == "__main__":
    main()
