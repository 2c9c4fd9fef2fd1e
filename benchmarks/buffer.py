"""What a smaller buffer costs: CIFAR-10's ResNet-20 to resnet8 with 500 to 10,000 samples, each for the same seconds.

    python -m benchmarks.buffer --teacher FILE --test-images FOLDER [--seconds 200] [--seeds 0 1 2]

1 %, 5 %, 10 % and 20 % of the 50,000 images that the teacher was trained on. Goes on where it was stopped. Run it on an
idle machine.
"""

import argparse
from pathlib import Path

from benchmarks.common import RESULTS, provenance, save, unfinished
from benchmarks.cpu import CIFAR_STUDENT
from benchmarks.race import Task, run_own, scorer

SAMPLES = (500, 2500, 5000, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--test-images", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "buffer.json")
    arguments = parser.parse_args()
    task = Task(arguments.teacher, CIFAR_STUDENT, arguments.test_images)
    teacher = task.teacher()
    score = scorer(teacher, task.labelled())
    source = provenance(f"python -m benchmarks.buffer --seconds {arguments.seconds:g}")
    about = {"task": "cifar", "seconds": arguments.seconds, "teacher_accuracy": score(teacher.module)}
    runs = unfinished(arguments.out, source).get("runs", [])
    for seed in arguments.seeds:
        for samples in SAMPLES:
            if any((run["samples"], run["seed"]) == (samples, seed) for run in runs):
                continue
            seconds = arguments.seconds
            points, state = run_own(
                task, score, seconds=seconds, every=seconds, seed=seed, changed={"samples": samples}
            )
            made = {"made": state.buffer.added, "rounds": state.round}  # a buffer larger than `made` never filled
            curve = [[at.seconds, at.accuracy] for at in points]
            runs.append({"samples": samples, "seed": seed, **made, "points": curve})
            print(f"{samples} samples, seed {seed}: {points[-1].accuracy:.2f} %", flush=True)
            save(arguments.out, {"kind": "buffer", **source, **about, "runs": runs})


if __name__ == "__main__":
    main()
