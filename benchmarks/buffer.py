"""What a smaller buffer costs: the same rounds with 500 to 10,000 samples, which are refreshed or only added to.

    python -m benchmarks.buffer demo [--rounds 174] [--seeds 0 1 2] [--threads 1]
    python -m benchmarks.buffer cifar --teacher FILE --test-images FOLDER

FILE is a ResNet-20 of CIFAR-10, whose student is resnet8. 174 rounds make as many samples as the largest buffer holds.
The budget is counted in rounds, so that a busy machine changes nothing; two of these commands, of other seeds or
samples, can share one result. Goes on where it was stopped.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, provenance, save, unfinished
from benchmarks.cpu import CIFAR_STUDENT
from benchmarks.race import DEMO, Task, run_rounds, scorer
from engine.distill import averaged_student

SAMPLES = (500, 2500, 5000, 10_000)


def run(task: Task, *, samples: int, rounds: int, seed: int) -> dict[str, Any]:
    """One distillation; accuracy in percent. A buffer of more samples than were `made` never filled."""
    last, state = run_rounds(task, rounds=rounds, seed=seed, changed={"samples": samples})
    return {
        "samples": samples,
        "seed": seed,
        "made": state.buffer.added,
        "seconds": last.seconds,
        "agreement": last.agreement,
        "accuracy": scorer(task.teacher(), task.labelled())(averaged_student(state)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["demo", "cifar"])
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--test-images", type=Path)
    parser.add_argument("--samples", type=int, nargs="*", default=SAMPLES)
    parser.add_argument("--rounds", type=int, default=174)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="results/buffer_TASK.json by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = DEMO
    if arguments.task == "cifar":
        if not arguments.teacher or not arguments.test_images:
            parser.error("cifar needs --teacher FILE and --test-images FOLDER")
        task = Task(arguments.teacher, CIFAR_STUDENT, arguments.test_images)
    out = arguments.out or RESULTS / f"buffer_{arguments.task}.json"
    source = provenance(f"python -m benchmarks.buffer {arguments.task} --rounds {arguments.rounds}")
    teacher = task.teacher()
    about = {"task": arguments.task, "teacher_accuracy": scorer(teacher, task.labelled())(teacher.module)}
    for seed in arguments.seeds:
        for samples in arguments.samples:
            runs = unfinished(out, source).get("runs", [])
            if any((done["samples"], done["seed"]) == (samples, seed) for done in runs):
                continue
            found = run(task, samples=samples, rounds=arguments.rounds, seed=seed)
            print(f"{samples} samples, seed {seed}: {found['accuracy']:.2f} %", flush=True)
            runs = unfinished(out, source).get("runs", [])  # of another command, too
            save(out, {"kind": "buffer", **source, **about, "runs": [*runs, found]})


if __name__ == "__main__":
    main()
