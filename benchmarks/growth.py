"""How cost grows: seconds a round and peak memory against buffer size, classes, resolution and teacher size.

    python -m benchmarks.growth [--device cpu] [--out benchmarks/results/growth_cpu.json]

One thing varies at a time around `BASE`, but that above 64 px networks have a stem of stride 4, as the tool's have, and
batches shrink; the student is resnet8 afresh. Teachers have random weights, which cost as much as trained ones. Each
point is a process of its own, so that its peak of memory is its own: the whole process's on a CPU (PyTorch's libraries
included), PyTorch's allocations on a GPU. Run it on an idle machine.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, provenance, save
from engine import replay
from engine.batchnorm import batchnorm_layers
from engine.config import settings_for
from engine.device import choose_device
from engine.distill import distill
from engine.source import Source
from engine.state import State, start
from engine.students import build_network
from engine.task import Classification

STUDENT, CHANNELS = "resnet8", 3
ROUNDS, UNTIMED = 6, 3  # of them the warm-up and the first with the student are not timed
STATISTICS_BATCH = 16


@dataclass(frozen=True)
class Case:
    """What one process distils."""

    samples: int = 5000
    classes: int = 10
    pixels: int = 32
    teacher: str = "resnet20"


BASE = Case()
AXES: dict[str, list[Any]] = {
    "samples": [500, 2500, 5000, 10_000, 20_000],
    "classes": [10, 100, 1000],
    "pixels": [32, 64, 128, 224],
    "teacher": ["resnet8", "resnet20", "resnet56", "wrn16_2", "wrn40_1", "resnet18"],
}


def random_network(name: str, case: Case) -> nn.Module:
    """A network whose BatchNorm layers have seen something."""
    module = build_network(name, classes=case.classes, channels=CHANNELS, pixels=case.pixels).train()
    with torch.no_grad():
        module(torch.randn(STATISTICS_BATCH, CHANNELS, case.pixels, case.pixels))
    return module.eval()


def fill(state: State) -> None:
    """Fill both buffers with random samples: the teacher would take minutes for their views."""
    device = state.compute.device
    for buffer in (state.buffer, state.held_out):
        slots = torch.arange(buffer.capacity, device=device)
        images = torch.randint(256, buffer.images.shape, dtype=torch.uint8, device=device)
        logits = torch.randn(buffer.logits.shape, device=device)
        confidences, classes = logits[:, 0].softmax(1).max(1)
        replay.add(buffer, slots, images, torch.zeros_like(buffer.views), logits, classes, confidences)


def measure(case: Case, device: str) -> dict[str, Any]:
    """Median seconds of a round with a full buffer, seconds for each image that the student sees, peak megabytes."""
    torch.manual_seed(0)
    teacher, image_shape = random_network(case.teacher, case), (CHANNELS, case.pixels, case.pixels)
    compute = choose_device(device)
    settings = settings_for(
        "smoke",
        image_shape=image_shape,
        largest_batch=compute.largest_batch,
        looking_share=0.5,
        rounds=ROUNDS,
        warmup_rounds=UNTIMED - 1,
        samples=case.samples,
    )
    source = Source(
        teacher,
        Classification(case.classes),
        image_shape,
        mean=(0.5,) * CHANNELS,
        std=(0.25,) * CHANNELS,
        batchnorm_layers=tuple(batchnorm_layers(teacher)),
    )
    student = build_network(STUDENT, classes=case.classes, channels=CHANNELS, pixels=case.pixels)
    state = start(source, student, settings=settings, compute=compute, seed=0)
    fill(state)
    clock = [0.0, *(metrics.seconds for metrics in distill(state))]
    seconds = statistics.median(after - before for before, after in list(pairwise(clock))[UNTIMED:])
    if state.compute.device.type == "cuda":
        peak_memory_mb = torch.cuda.max_memory_reserved() / 1e6
    else:
        peak_memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # it counts in KiB
    return {
        **asdict(case),
        "teacher_parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "batch": settings.student_batch,
        "seconds_per_round": seconds,
        "seconds_per_1000_images": 1000 * seconds / (settings.student_steps * settings.student_batch),
        "peak_memory_mb": peak_memory_mb,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help="one point as JSON: measured in this process and printed")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)), arguments.device)))
        return
    out = arguments.out or RESULTS / f"growth_{arguments.device}.json"
    source = provenance(f"python -m benchmarks.growth --device {arguments.device}")
    rows = []
    for axis, values in AXES.items():
        for value in values:
            case = json.dumps(asdict(replace(BASE, **{axis: value})))
            command = [sys.executable, "-m", "benchmarks.growth", "--device", arguments.device, "--case", case]
            measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            rows.append({"axis": axis, **measured})
            print(
                f"{axis} {value}: {measured['seconds_per_round']:.2f} s, {measured['peak_memory_mb']:.0f} MB",
                flush=True,
            )
            save(out, {"kind": "growth", **source, "device": arguments.device, "rows": rows})


if __name__ == "__main__":
    main()
