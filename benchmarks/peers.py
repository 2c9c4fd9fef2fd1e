"""Two published data-free distillers, from their own code, on our teacher, student, images and clock.

`benchmarks.cpu` and `benchmarks.gpu` run them beside ours.

The methods are fast-2, fast-5 and fast-10 (Fast-DFKD, Fang et al., AAAI 2022; https://github.com/zju-vipa/Fast-Datafree)
and nayer (Tran et al., CVPR 2024; https://github.com/tmtuan1307/NAYER) on CIFAR-10, of which it has label embeddings.
A checkout is a clone of that repository; no line of it is in ours. It needs `pip install kornia termcolor tqdm`,
NAYER's `xlsxwriter` too.

What is theirs: the generator, the synthesizer, its losses and its meta step; the pool of images on disk and its loader;
the student's loss, SGD, rate and cosine; every number of their CIFAR-10 scripts (of Fast-DFKD's, those of the teacher's
own pairs where it has some, else of WRN-40-2 to WRN-16-1, the nearest to our narrow networks). What the driver decides,
for them where in doubt:

- Their schedules count epochs: a batch of new images, then 400 student steps. On a CPU that would not leave the warm-up
  within minutes. Here a run has as many epochs as let synthesis take half of the time (`share`), no more than the
  script's, with its share of warm-up; each epoch after that has student steps until its part of the remaining time is
  over. The cosine follows the clock, as ours does, and ends at the time limit; what falls due in an epoch (the reset of
  a layer, the adversarial term) does so at the same share of the run. No batch of images is begun that would not be
  done in time.
- NAYER makes ten batches an epoch in its warm-up and two afterwards: here an epoch is one batch, 200 of 400 of them
  warm-up. A generator lives as many batches as theirs, not shortened with the run.
- Batches on a CPU are CPU_BATCHES, on a GPU theirs, which were chosen for one. Fast-2 on the demo's task, 100 seconds
  of one thread, in trials that were not kept: 49.0 % with their 256, 71.4 % with 64 (and 72.4 % with a quarter of the
  time for synthesis).
- bfloat16 where `choose_device` would use it for ours (1.8 times as fast on our CPU), and channels_last; `float32` is
  as their scripts compute. The teacher is frozen, and the one that teaches has no hooks, whose statistics theirs
  computes there and drops. On a CPU the loader has no processes of its own.
- Metrics of the training batches are left out, as is the evaluation after each epoch.

The clock starts with the first synthesis and stands still while the student is evaluated. The last point is the
student at the limit: no best epoch is picked.
"""

import contextlib
import copy
import itertools
import math
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_code import (
    FAST_WEIGHTS,
    METHODS,
    Reduced,
    Script,
    build_synthesizer,
    checkout_modules,
    float_statistics,
    running_on,
)
from benchmarks.race import Point
from engine.device import choose_device
from engine.errors import SSDKDError
from engine.teacher import TeacherSpec

RATE, LOWEST_RATE, MOMENTUM, DECAY, TEMPERATURE = 0.2, 2e-4, 0.9, 1e-4, 20.0  # the student's, in both peers' scripts
SHARE = 0.5
CPU_BATCHES = {"fast_meta": (64, 64), "nayer": (64, 100)}  # of the student, of the generator
NEVER = 10**9  # epochs
CIFAR10 = ((3, 32, 32), 10)  # image and classes


@dataclass(frozen=True)
class PeerRun:
    """The curve of a run, its last point the student at the end, and the settings that it ran with."""

    points: list[Point]
    settings: dict[str, Any]


class Clock:
    """Seconds since it was made, less those spent in `stopped`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = time.perf_counter()

    def seconds(self) -> float:
        """The seconds of the run until now."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time in here does not count; what the GPU still has to do on entry does."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        entered = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - entered


def run_peer(
    method: str,
    checkout: Path,
    *,
    teacher: nn.Module,
    student: nn.Module,
    spec: TeacherSpec,
    evaluate: Callable[[nn.Module], float],
    seconds: float,
    every: float,
    seed: int,
    device: torch.device,
    batch: int | None = None,
    synthesis_batch: int | None = None,
    share: float = SHARE,
    float32: bool = False,
) -> PeerRun:
    """One run of a published distiller; `student` is trained in place, `teacher` is left as it is.

    `evaluate` is given the student in eval mode, on `device`, and returns percent; it is called about `every` seconds
    and at the end, with the clock stopped. `batch` is the student's, `synthesis_batch` the generator's; None: the
    script's, or CPU_BATCHES on a CPU. `share` and `float32`: see the module's docstring.

    Raises:
        SSDKDError: an unknown method, no checkout of it, a package that it needs, a task that it has no words for.
    """
    if method not in METHODS:
        raise SSDKDError(f"unknown method '{method}'", f"use one of {', '.join(METHODS)}")
    if method == "nayer" and (spec.input_shape, spec.classes) != CIFAR10:
        raise SSDKDError("NAYER's label embeddings are of CIFAR-10: this is another task", "leave nayer out")
    compute = choose_device(str(device))
    if float32:
        compute = replace(compute, autocast_dtype=None)
    script = METHODS[method]
    if script.synthesizer == "fast_meta" and spec.arch in FAST_WEIGHTS:
        adversarial, target = FAST_WEIGHTS[spec.arch]
        script = replace(script, adversarial_weight=adversarial, class_weight=target)
    usual = CPU_BATCHES[script.synthesizer] if compute.device.type == "cpu" else (script.batch, script.synthesis_batch)
    script = replace(script, batch=batch or usual[0], synthesis_batch=synthesis_batch or usual[1])
    random.seed(seed)
    torch.manual_seed(seed)
    points: list[Point] = []
    settings: dict[str, Any] = {
        "method": method,
        "share": share,
        "compute": compute.describe(),
        "script": asdict(script),
        "peer_commit": commit_of(checkout),
    }
    with (
        tempfile.TemporaryDirectory() as folder,
        checkout_modules(checkout, script.synthesizer) as (package, generators),
        running_on(compute.device),
    ):
        student.cuda().train()  # to `device`, in channels_last
        # Theirs computes the BatchNorm statistics of student batches too, and drops them: that is spared here.
        hooked, plain = (Reduced(copy.deepcopy(teacher).cuda().eval().requires_grad_(False), compute) for _ in range(2))
        float_statistics(hooked)
        learner = Reduced(student, compute)
        synthesizer = build_synthesizer(
            script, package, generators, hooked, learner, spec=spec, checkout=checkout, folder=folder, compute=compute
        )
        criterion = package.criterions.KLDiv(T=TEMPERATURE)
        clock = Clock(compute.device)
        for made in _run(script, synthesizer, learner, plain, criterion, clock, seconds=seconds, share=share):
            settings["made"] = made
            if every * (len(points) + 1) <= clock.seconds() < seconds:
                points.append(_look(student, evaluate, clock))
        points.append(_look(student, evaluate, clock))
    return PeerRun(points, settings)


def _look(student: nn.Module, evaluate: Callable[[nn.Module], float], clock: Clock) -> Point:
    with clock.stopped():
        student.eval()
        point = Point(clock.seconds(), evaluate(student))
        student.train()
    return point


def _run(
    script: Script,
    synthesizer: Any,
    student: nn.Module,
    teacher: nn.Module,
    criterion: nn.Module,
    clock: Clock,
    *,
    seconds: float,
    share: float,
) -> Iterator[dict[str, Any]]:
    """Their main loop, shrunk to `seconds`; what it has done so far after each synthesis and each student step."""
    optimizer = torch.optim.SGD(student.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
    device = next(student.parameters()).device
    epochs, warmup, learning_from = script.epochs, script.warmup, 0.0
    steps = images = 0
    fastest = math.inf  # seconds for a batch of images
    for epoch in itertools.count():
        if seconds - clock.seconds() > fastest or not images:
            began = clock.seconds()
            _synthesize(script, synthesizer, epoch=epoch, epochs=epochs, warmup=warmup)
            fastest = min(fastest, clock.seconds() - began)
            images += script.synthesis_batch
        if epoch < 2:  # the first has to warm the machine up; no student step before the second is planned
            epochs, warmup = shrunk(script, share * seconds / fastest)
        made = {"epochs": epochs, "warmup": warmup, "seconds_a_batch": fastest, "images": images}
        yield {**made, "student_steps": steps}
        if epoch < warmup:
            learning_from = clock.seconds()
            continue
        until = learning_from + (seconds - learning_from) * min(1.0, (epoch + 1 - warmup) / (epochs - warmup))
        while True:
            views = synthesizer.sample().to(device, non_blocking=True)  # [B, C, H, W]
            optimizer.param_groups[0]["lr"] = rate((clock.seconds() - learning_from) / (seconds - learning_from))
            _teach(student, teacher, views, criterion, optimizer)
            steps += 1
            yield {**made, "student_steps": steps}
            if clock.seconds() >= until:
                break
        if clock.seconds() >= seconds:
            return


def rate(progress: float) -> float:
    """The student's learning rate: their cosine, over what follows the warm-up; `progress` is in 0...1."""
    return LOWEST_RATE + (RATE - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def shrunk(script: Script, epochs: float) -> tuple[int, int]:
    """Epochs and, among them, epochs of warm-up of a run of about so many, with as large a share of warm-up as theirs.

    No more than the script's; one of warm-up and one of learning at least.
    """
    whole = max(2, min(script.epochs, int(epochs)))
    return whole, max(1, whole * script.warmup // script.epochs)


def _synthesize(script: Script, synthesizer: Any, *, epoch: int, epochs: int, warmup: int) -> None:
    """One call of theirs. It counts its calls from `ep_start` on, so what is due in this one is told to it anew."""
    synthesizer.ep_start = warmup
    if script.reset:  # at the same share of the time after the warm-up
        learning, reset_after = script.epochs - script.warmup, script.reset - script.warmup
        due = epoch == warmup + round(reset_after / learning * (epochs - warmup)) - 1
        synthesizer.reset_l0 = int(due)
        if due:
            synthesizer.ep_start = synthesizer.ep + 1 - reset_after
    if script.life:
        due = epoch % script.warmup_life == 0 if epoch < warmup else (epoch - warmup) % script.life == 0
        synthesizer.g_life = 1 if due else NEVER
    synthesizer.synthesize()


def _teach(
    student: nn.Module, teacher: nn.Module, views: Tensor, criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    with torch.no_grad():
        targets = teacher(views)
    loss = criterion(student(views), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def commit_of(checkout: Path) -> str:
    """The commit of a clone; nothing where it is none, though it may lie in another one."""
    asked = ["git", "-C", str(checkout), "rev-parse", "--show-prefix", "--verify", "HEAD"]
    inside, _, commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.partition("\n")
    return "" if inside else commit.strip()
