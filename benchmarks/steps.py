"""What the method costs a step: the student's step in the engine against a bare step of the same networks.

    python -m benchmarks.steps [--pairs demo resnet20-resnet8 wrn40_2-wrn16_2] [--batches 64 256] [--device cpu]
    python -m benchmarks.steps --profile      (and where the engine's step spends its time)

The engine's step is `engine.distill.teach`: draw by priority, render a view, forward, weighted losses, backward, SGD,
new priorities, weight average. There is NO forward pass of the teacher in it: its kept logits of the view are used. The
teacher looks at the views of a sample when that enters the buffer (`teacher_forwards_per_draw` says how often that is
for each image that the student sees, `ratio_to_bare_with_those` counts them in). In the first part of a run it does ask
the teacher, for its logits of images of which half are altered, and for its maps: that step is timed, too, where the
pair has maps to compare. So there are two bare
steps, on one batch that lies on the device: with the teacher's forward pass, as distillation usually has it, and
without. Both do forward, the loss of the logits, backward, the same SGD, and nothing else. On a GPU the engine's step
is a CUDA graph, the bare ones are not; it is timed without its graph, too. All run in the same precision, in short
turns one after another in one process; ratios are of medians.

Weights (but the demo's teacher's) and samples are random: they cost as much time as others. Writes
results/steps_cpu.json or steps_gpu.json.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, provenance, save
from benchmarks.growth import fill
from engine.config import USUAL_BATCH, settings_for
from engine.device import Compute, choose_device
from engine.distill import teach
from engine.inheritance import inherit
from engine.source import Source
from engine.state import State, start
from engine.students import STUDENTS, build_network
from engine.task import Classification
from engine.teacher import load_teacher
from engine.teaching import new_optimizer, rate_factor
from engine.zoo import ZOO
from ssdkd_cli.compress import DEMO_DEFAULTS, DEMO_TEACHER

PAIRS = ("demo", "resnet20-resnet8", "wrn40_2-wrn16_2")
TURN_STEPS = {"cpu": 5, "cuda": 20}  # steps a turn: short against the machine's drift, long against its waits
WARM_UP_TURNS = 2
LATE = 0.99  # progress of the run: the rate is nearly 0, so that random samples cannot drive the weights to infinity
SHOWN_OPERATIONS = 25
CLASSES = 10


@dataclass(frozen=True)
class Pair:
    """Two networks, both float32 on the CPU, and the run that they belong to; images are (C, H, W)."""

    teacher: nn.Module
    student: nn.Module
    image_shape: tuple[int, int, int]
    samples: int


def build_pair(name: str) -> Pair:
    """The demo's own, or `TEACHER-STUDENT`, of engine.zoo and engine.students, for CIFAR's images."""
    if name == "demo":
        demo = load_teacher(DEMO_TEACHER, input_shape=(1, 28, 28))
        student = STUDENTS[str(DEMO_DEFAULTS["student"])].build(demo.spec.classes, 1, 28)
        return Pair(demo.module, student, (1, 28, 28), int(str(DEMO_DEFAULTS["samples"])))
    teacher_name, student_name = name.split("-")
    student = build_network(student_name, classes=CLASSES, channels=3, pixels=32)
    return Pair(ZOO[teacher_name](CLASSES, 3), student, (3, 32, 32), 5000)


def filled_state(pair: Pair, batch: int, turn_steps: int, compute: Compute, **changed: Any) -> State:
    """The state of a run on a copy of the student, its buffer full of random samples; `teach` does `turn_steps`.

    `changed` are further settings.
    """
    settings = settings_for(
        "full",
        image_shape=pair.image_shape,
        samples=pair.samples,
        student_batch=batch,
        student_steps=turn_steps,
        **changed,
    )
    channels = pair.image_shape[0]
    student, teacher = copy.deepcopy(pair.student), copy.deepcopy(pair.teacher)
    source = Source(
        teacher,
        Classification(CLASSES),
        pair.image_shape,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        batchnorm_layers=(),
    )
    inherited = inherit(student, teacher)
    state = start(source, student, settings=settings, compute=compute, seed=0, inherited=inherited)
    fill(state)
    return state


def bare_turn(pair: Pair, state: State, batch: int, turn_steps: int, *, asks_teacher: bool) -> Callable[[], object]:
    """A function that does `turn_steps` bare steps on one resident batch, with the state's task and settings."""
    compute, settings = state.compute, state.settings
    student, teacher = (
        copy.deepcopy(network).to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for network in (pair.student, pair.teacher)
    )
    student.train()
    teacher.eval().requires_grad_(False)
    optimizer = new_optimizer(student, frozenset(), settings)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate_factor(LATE)
    inputs = torch.randn(batch, *pair.image_shape, generator=state.rng, device=compute.device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    known = torch.randn(batch, CLASSES, generator=state.rng, device=compute.device)

    def turn() -> None:
        for _ in range(turn_steps):
            with compute.autocast():
                if asks_teacher:
                    with torch.no_grad():
                        teacher_logits = teacher(inputs)
                else:
                    teacher_logits = known
                student_logits = student(inputs)
            loss = state.task.discrepancy(teacher_logits, student_logits, settings.temperature).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return turn


def timed(turn: Callable[[], object], device: torch.device) -> float:
    """Seconds of one turn, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    turn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def in_turns(turns: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each turn, once in each of `rounds` rounds; the first rounds warm up and do not count."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    for number in range(WARM_UP_TURNS + rounds):
        for name in order:
            seconds = timed(turns[name], device)
            if number >= WARM_UP_TURNS:
                taken[name].append(seconds)
        order = order[1:] + order[:1]
    return taken


def measure(name: str, batch: int, *, turns: int, turn_steps: int, compute: Compute, profile: bool) -> dict[str, Any]:
    """A row: median milliseconds of each step, their quartiles, and the engine's against the bare ones."""
    torch.manual_seed(0)
    pair = build_pair(name)
    state = filled_state(pair, batch, turn_steps, compute)
    steps: dict[str, Callable[[], object]] = {
        "engine": lambda: teach(state, LATE),
        "bare": bare_turn(pair, state, batch, turn_steps, asks_teacher=True),
        "bare_without_teacher": bare_turn(pair, state, batch, turn_steps, asks_teacher=False),
    }
    taught_maps = filled_state(pair, batch, turn_steps, compute, looking_share=1.0)
    if taught_maps.stages.pairs:
        steps["engine_with_maps"] = lambda: teach(taught_maps, LATE)
    if compute.device.type == "cuda":
        plain = filled_state(pair, batch, turn_steps, compute, cuda_graphs=False)
        steps["engine_without_graphs"] = lambda: teach(plain, LATE)
    taken = in_turns(steps, turns, compute.device)
    step_ms = {step: [1000 * seconds / turn_steps for seconds in values] for step, values in taken.items()}
    medians = {step: statistics.median(values) for step, values in step_ms.items()}
    if profile:
        print(breakdown(steps["engine"], compute.device))
    largest_batch = min(compute.largest_batch, max(batch, USUAL_BATCH))
    usual = settings_for("full", image_shape=pair.image_shape, largest_batch=largest_batch)
    forwards = state.buffer.logits.shape[1] * usual.inversion_batch / (usual.student_steps * batch)
    teacher_ms = medians["bare"] - medians["bare_without_teacher"]
    with_maps = (
        {"ratio_with_maps_to_bare": medians["engine_with_maps"] / medians["bare"]} if taught_maps.stages.pairs else {}
    )
    return {
        "pair": name,
        "batch": batch,
        "precision": str(compute.autocast_dtype or torch.float32).removeprefix("torch."),
        **{f"{step}_ms": median for step, median in medians.items()},
        **{f"{step}_quartiles_ms": statistics.quantiles(values, n=4)[::2] for step, values in step_ms.items()},
        "ratio_to_bare": medians["engine"] / medians["bare"],
        "ratio_to_bare_without_teacher": medians["engine"] / medians["bare_without_teacher"],
        "teacher_forwards_per_draw": forwards,
        "ratio_to_bare_with_those": (medians["engine"] + forwards * teacher_ms) / medians["bare"],
        **with_maps,
        "recording": state.gradients[False].refusal or state.gradients[False].replays,
        "recording_with_maps": taught_maps.gradients[True].refusal or taught_maps.gradients[True].replays,
        "turns": turns,
        "steps_per_turn": turn_steps,
    }


def breakdown(turn: Callable[[], object], device: torch.device) -> str:
    """The operations of a turn that take the most time themselves, as torch.profiler's table."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        timed(turn, device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=key, row_limit=SHOWN_OPERATIONS, max_name_column_width=50)
    return table


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="demo, or TEACHER-STUDENT")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=15, help="of each step")
    parser.add_argument("--turn-steps", type=int, help=f"by default {TURN_STEPS}")
    parser.add_argument("--profile", action="store_true", help="print where the engine's step spends its time")
    parser.add_argument("--out", type=Path, help="results/steps_cpu.json or steps_gpu.json by default")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    compute = choose_device(arguments.device)
    kind = compute.device.type
    out = arguments.out or RESULTS / f"steps_{'gpu' if kind == 'cuda' else 'cpu'}.json"
    turn_steps = arguments.turn_steps or TURN_STEPS[kind]
    batches = " ".join(map(str, arguments.batches))
    chosen = f"--pairs {' '.join(arguments.pairs)} --batches {batches} --turns {arguments.turns}"
    source, rows = provenance(f"python -m benchmarks.steps --device {arguments.device} {chosen}"), []
    for name in arguments.pairs:
        for batch in arguments.batches:
            rows.append(
                measure(
                    name,
                    batch,
                    turns=arguments.turns,
                    turn_steps=turn_steps,
                    compute=compute,
                    profile=arguments.profile,
                )
            )
            row = rows[-1]
            print(
                f"{name}, batch {batch}: {row['engine_ms']:.2f} ms, {row['ratio_to_bare']:.3f} of a bare step,"
                f" {row['ratio_to_bare_without_teacher']:.3f} of one without the teacher",
                flush=True,
            )
            save(out, {"kind": "steps", **source, "rows": rows})


if __name__ == "__main__":
    main()
