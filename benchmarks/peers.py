"""The authors' own Fast-DFKD and NAYER on our teacher, student, data and clock.

    python -m benchmarks.peers METHOD CHECKOUT TEACHER STUDENT TEST_IMAGES [--seconds 300] [--batch 64] ...

METHOD is fast-2, fast-5, fast-10 or nayer; CHECKOUT a clone of zju-vipa/Fast-Datafree or tmtuan1307/NAYER, whose
synthesizer, generator, hooks, image pool and loss are imported and used as they are. They import kornia, termcolor and
xlsxwriter, which `pip install` brings. Nothing of theirs is in this file: it drives them as their scripts for CIFAR-10
do, with the same rates, weights and temperature (`SCRIPTS`), but for what follows.

- Device: `.cuda()` means "to the device of this run".
- Time limit: their runs are 220 and 120 epochs long, hours on a CPU. Here an epoch is one call of their synthesizer and
  then as many steps of the student as fit into `student_share` times the seconds that it took (theirs: 400 steps). The
  epoch number that the synthesizer sees, its warm-up, its resets and the cosine of the student's rate follow the clock,
  so that the schedule ends with the budget. The warm-up takes the share of the time that it takes in their schedule.
- Batches of 64 (theirs: 256, and 512 and 400), as ours: at 256 they do not get through a warm-up on two cores.
- One image channel: their pool writes RGB files, so that grey networks stand behind a mean over the channels.
- Students step in the precision that ours do (bfloat16 where the processor has it); their inversion stays in float32.
  No worker processes: on two cores they cost more than they bring.
- The last student counts. Theirs is the best epoch on the labelled test set.
"""

import argparse
import contextlib
import importlib
import importlib.util
import math
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision.transforms as transforms
from torch import Tensor, nn

from benchmarks.common import provenance, save
from benchmarks.race import Point, Task, scorer
from engine.device import choose_device
from engine.errors import SSDKDError
from engine.students import build_student
from engine.teacher import TeacherSpec

LATENT = 256  # of Fast-DFKD's generator
GENERATOR_WIDTH = 64
RATE, LOWEST_RATE, MOMENTUM, DECAY, TEMPERATURE = 0.2, 2e-4, 0.9, 1e-4, 20.0  # of the student, in both repositories
STATISTICS_MOMENTUM = 0.9
EMBEDDING_FILE = "label_embedding/cifar10_le.pickle"
EMBEDDING_WIDTH = 1000  # of NAYER's noisy layer


@dataclass(frozen=True)
class Script:
    """What an authors' script for CIFAR-10 sets; the same for all of its pairs but `adversarial` and `target`."""

    steps: int  # of the inversion
    generator_rate: float
    latent_rate: float
    adversarial: float
    target: float
    prior: float
    epochs: int
    warmup_epochs: int
    warmup_share: float  # of the time


SCRIPTS = {
    "fast-2": Script(2, 5e-3, 0.015, 1.1, 0.4, 10.0, 220, 20, 0.05),
    "fast-5": Script(5, 3e-3, 0.01, 1.1, 0.4, 10.0, 220, 20, 0.05),
    "fast-10": Script(10, 2e-3, 0.01, 1.1, 0.4, 10.0, 220, 20, 0.05),
    "nayer": Script(30, 4e-3, 0.0, 1.33, 0.5, 10.0, 120, 20, 0.15),
}


@dataclass(frozen=True)
class PeerRun:
    """The curve of a rival and all that it was run with."""

    points: list[Point]
    settings: dict[str, Any]


class Stopwatch:
    """Seconds since it was made, without those in `paused`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds on the clock."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still within the context."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began


class Grey(nn.Module):
    """A network of one channel behind a mean over three."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, K]."""
        logits: Tensor = self.network(images.mean(1, keepdim=True))
        return logits


@contextlib.contextmanager
def peer_code(checkout: Path, device: torch.device) -> Iterator[ModuleType]:
    """The package `datafree` of a checkout, with `.cuda()` bound to `device`; afterwards nothing of it is left.

    Raises SSDKDError where the folder is no checkout, or a library that it imports is missing.
    """
    if not (checkout / "datafree" / "synthesis").is_dir():
        raise SSDKDError(f"{checkout}: expected a clone of Fast-Datafree or NAYER", "git clone it, and give its folder")

    def to_device(tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor.to(device)

    def plain_loader(*positional: Any, **named: Any) -> Any:
        return loader(*positional, **{**named, "num_workers": 0, "pin_memory": False})

    loader = torch.utils.data.DataLoader
    patches = (
        mock.patch.object(torch.Tensor, "cuda", to_device),
        mock.patch.object(nn.Module, "cuda", to_device),
        mock.patch.object(torch.utils.data, "DataLoader", plain_loader),
    )
    sys.path.insert(0, str(checkout))
    try:
        with contextlib.ExitStack() as stack, Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            try:
                code = importlib.import_module("datafree")
            except ImportError as error:
                hint = "pip install kornia termcolor xlsxwriter"
                raise SSDKDError(f"{checkout} cannot be imported: {error}", hint) from error
            for patch in patches:
                stack.enter_context(patch)
            yield code
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name.split(".")[0] == "datafree"]:
            del sys.modules[name]


def run_peer(
    method: str,
    checkout: Path,
    *,
    spec: TeacherSpec,
    teacher: nn.Module,
    student: nn.Module,
    evaluate: Callable[[nn.Module], float],
    seconds: float,
    every: float,
    seed: int,
    device: str = "cpu",
    batch: int = 64,
    student_share: float = 1.0,
) -> PeerRun:
    """The curve of a rival: `student` is trained from `teacher` for so many seconds and scored about every `every`.

    `evaluate` takes the student in eval mode and returns percent; the clock stands still during it. The last point is
    the student at the end.
    """
    script, compute = SCRIPTS[method], choose_device(device)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # of theirs, as their scripts do
    networks = [Grey(network) if spec.input_shape[0] == 1 else network for network in (teacher, student)]
    shown_teacher, shown_student = (channels_last(network, compute.device).eval() for network in networks)
    points: list[Point] = []
    with peer_code(checkout, compute.device) as code, tempfile.TemporaryDirectory() as folder:
        clock = Stopwatch()
        synthesizer = new_synthesizer(
            code, method, checkout, spec, shown_teacher, shown_student, batch, Path(folder), compute.device
        )
        loss_function = code.criterions.KLDiv(T=TEMPERATURE)
        optimizer = torch.optim.SGD(student.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
        synthesized = steps = 0
        while clock.seconds < seconds:
            began = clock.seconds
            follow_the_clock(synthesizer, script, began / seconds)
            synthesizer.synthesize()
            synthesized += 1
            until = min(seconds, clock.seconds + student_share * (clock.seconds - began))
            shown_student.train()
            while began / seconds >= script.warmup_share and clock.seconds < until:
                optimizer.param_groups[0]["lr"] = rate(script, clock.seconds / seconds)
                images = synthesizer.sample().to(compute.device)
                with compute.autocast():
                    with torch.no_grad():
                        teacher_logits = shown_teacher(images)
                    student_logits = shown_student(images)
                loss = loss_function(student_logits.float(), teacher_logits.float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
            if clock.seconds >= min(seconds, every * (len(points) + 1)):
                with clock.paused():
                    shown_student.eval()
                    points.append(Point(clock.seconds, evaluate(student)))
    used = {"batch": batch, "student_share": student_share, "syntheses": synthesized, "student_steps": steps}
    return PeerRun(points, {**asdict(script), **used, "code": commit(checkout)})


def new_synthesizer(
    code: ModuleType,
    method: str,
    checkout: Path,
    spec: TeacherSpec,
    teacher: nn.Module,
    student: nn.Module,
    batch: int,
    folder: Path,
    device: torch.device,
) -> Any:
    """The authors' synthesizer with its generator and image pool, which writes into `folder`."""
    script, pixels = SCRIPTS[method], spec.input_shape[1]
    mean, std = (list(values) * (3 // len(values)) for values in (spec.preprocessing.mean, spec.preprocessing.std))
    generators = generator_module(checkout)
    common = {
        "num_classes": spec.classes,
        "img_size": (3, pixels, pixels),
        "save_dir": str(folder),
        "device": device,
        "transform": transforms.Compose(
            [
                transforms.RandomCrop(pixels, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        ),
        "normalizer": code.utils.Normalizer(mean, std),
        "synthesis_batch_size": batch,
        "sample_batch_size": batch,
        "lr_g": script.generator_rate,
        "warmup": script.warmup_epochs,
        "adv": script.adversarial,
        "bn": script.prior,
        "oh": script.target,
        "bn_mmt": STATISTICS_MOMENTUM,
    }
    if method == "nayer":
        with (checkout / EMBEDDING_FILE).open("rb") as file:
            embedding = pickle.load(file).to(device).float()
        generator = generators.NLGenerator(
            ngf=GENERATOR_WIDTH,
            img_size=pixels,
            nc=3,
            nl=spec.classes,
            label_emb=embedding,
            le_emb_size=EMBEDDING_WIDTH,
            sbz=batch,
        )
        loops = {"g_life": 10, "g_loops": 2, "gwp_loops": 10}
        return code.synthesis.NAYER(
            teacher, student, channels_last(generator, device), g_steps=script.steps, **loops, **common
        )
    generator = generators.Generator(nz=LATENT, ngf=GENERATOR_WIDTH, img_size=pixels, nc=3)
    meta = {"is_maml": 1, "reset_l0": 1, "reset_bn": 0}
    return code.synthesis.FastMetaSynthesizer(
        teacher,
        student,
        channels_last(generator, device),
        nz=LATENT,
        iterations=script.steps,
        lr_z=script.latent_rate,
        **meta,
        **common,
    )


def channels_last(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on `device` in the memory format in which convolutions are fastest; it changes no result."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def generator_module(checkout: Path) -> ModuleType:
    """Their generators, by the file: the package around it wants a torchvision of long ago."""
    place = importlib.util.spec_from_file_location("datafree.generator", checkout / "datafree/models/generator.py")
    if place is None or place.loader is None:
        raise SSDKDError(f"{checkout} holds no datafree/models/generator.py", "git clone it again")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def follow_the_clock(synthesizer: Any, script: Script, progress: float) -> None:
    """Set the epoch that the synthesizer believes in; an epoch where it resets something is never passed over."""
    learning = max(0.0, progress - script.warmup_share) / (1 - script.warmup_share)
    warming = min(1.0, progress / script.warmup_share)
    epoch = int(script.warmup_epochs * warming + (script.epochs - script.warmup_epochs) * learning)
    reset = 120 + script.warmup_epochs - 1  # the first layer of Fast-DFKD's generator begins afresh once
    before = getattr(synthesizer, "ep", 0)
    synthesizer.ep = reset if hasattr(synthesizer, "reset_l0") and before < reset < epoch else max(before, epoch)


def rate(script: Script, progress: float) -> float:
    """The student's learning rate: a half cosine over what follows the warm-up."""
    learning = (progress - script.warmup_share) / (1 - script.warmup_share)
    return LOWEST_RATE + (RATE - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * min(1.0, learning)))


def commit(checkout: Path) -> str:
    """The commit of a clone, or nothing where it is none."""
    found = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=SCRIPTS)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("student")
    parser.add_argument("test_images", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--student-share", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    task = Task(arguments.teacher, arguments.student, arguments.test_images)
    teacher = task.teacher()
    found = run_peer(
        arguments.method,
        arguments.checkout,
        spec=teacher.spec,
        teacher=teacher.module,
        student=build_student(task.student, teacher=teacher, seed=arguments.seed),
        evaluate=scorer(teacher, task.labelled()),
        **{name: getattr(arguments, name) for name in ("seconds", "every", "seed", "device", "batch", "student_share")},
    )
    for point in found.points:
        print(f"{point.seconds:.0f} s: {point.accuracy:.2f} %")
    print(found.settings)
    if arguments.out:
        points = [[point.seconds, point.accuracy] for point in found.points]
        source = provenance(f"python -m benchmarks.peers {arguments.method}")
        save(arguments.out, {"kind": "peer", **source, "settings": found.settings, "points": points})


if __name__ == "__main__":
    main()
