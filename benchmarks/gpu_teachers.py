"""Teachers of CIFAR-10 in two minutes of a GPU each: trained once, kept as a file that `ssdkd` reads.

No label smoothing: it takes from a teacher's logits what a student learns from (Mueller et al. 2019, arXiv 1906.02629).
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.device import Compute
from engine.images import Normalization, normalization, random_views, render, to_input
from engine.recording import Outputs, Recorded, laid_out_as
from engine.teacher import Teacher, load_teacher
from engine.zoo import ZOO
from exporters.evaluate import LabelledImages

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images
EVALUATION_BATCH = 1000
STEPS_AHEAD = 8  # of the GPU, at most: the host launches a recorded step in a moment


@dataclass(frozen=True)
class Schedule:
    """SGD with Nesterov momentum: a linear rise of the rate, then a half cosine to 0, over epochs or seconds."""

    epochs: int = 60
    seconds: float = 110.0  # whichever of the two is over first; the rate falls with it
    batch: int = 512
    peak_rate: float = 0.3
    rise: float = 0.15  # share of the training
    momentum: float = 0.9
    decay: float = 5e-4
    shift: int = 4  # pixels, of the random crop

    def rate(self, progress: float) -> float:
        """The learning rate at `progress` in 0...1."""
        if progress < self.rise:
            return self.peak_rate * (progress + 0.01) / (self.rise + 0.01)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * (progress - self.rise) / (1 - self.rise)))


def train(
    network: nn.Module, images: Tensor, labels: Tensor, compute: Compute, *, schedule: Schedule, seed: int
) -> dict[str, Any]:
    """Train `network` in place on its device.

    Args:
        network: float32, channels last, on the device of `compute`.
        images: uint8 [N, H, W, C] there.
        labels: int64 [N] there.
        compute: device and precision.
        schedule: how long and how fast.
        seed: of the order and the augmentations.

    Returns:
        the schedule, the epochs (a fraction), steps and seconds that were spent, whether the step was recorded.
    """
    constants = normalization(MEAN, STD, compute.device)
    rng = torch.Generator(compute.device).manual_seed(seed)
    batch = min(schedule.batch, len(images))
    steps_per_epoch = len(images) // batch
    steps, total = 0, schedule.epochs * steps_per_epoch
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=schedule.peak_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.decay,
        nesterov=True,
        fused=True,
    )
    parameters = list(network.parameters())
    drawn = torch.zeros(batch, dtype=torch.int64, device=compute.device)  # of a step, in memory that stays where it is
    views = torch.empty(len(images), 3, dtype=torch.int64, device=compute.device)  # of an epoch, likewise

    def loss_and_gradients() -> Outputs:
        inputs = to_input(render(images, drawn, views[drawn]), constants)
        with compute.autocast():
            logits = network(inputs)
        loss = F.cross_entropy(logits.float(), labels[drawn])
        return Outputs((loss.detach(),), laid_out_as(parameters, torch.autograd.grad(loss, parameters)))

    step = Recorded(loss_and_gradients, compute.device, enabled=compute.has_graphs)
    network.train()
    was_choosing, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    started = time.perf_counter()
    try:
        while (progress := max(steps / total, (time.perf_counter() - started) / schedule.seconds)) < 1:
            place = steps % steps_per_epoch
            if place == 0:
                order = torch.randperm(len(images), generator=rng, device=compute.device)
                views.copy_(random_views(len(images), 1, schedule.shift, rng)[:, 0])
            drawn.copy_(order[place * batch : (place + 1) * batch])
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(progress)
            (loss,), gradients = step()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            steps += 1
            if steps % STEPS_AHEAD == 0 and not math.isfinite(float(loss)):  # waits: the clock is the device's
                raise FloatingPointError(f"the teacher's loss is not finite after {steps} steps: lower peak_rate")
    finally:
        torch.backends.cudnn.benchmark = was_choosing
    network.eval()
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
    seconds = time.perf_counter() - started
    spent = {"trained_epochs": steps / steps_per_epoch, "steps": steps, "trained_seconds": seconds}
    return {**asdict(schedule), **spent, "recording": step.refusal or step.replays}


def compact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a small file: matrices and kernels as float16, vectors (BatchNorm among them) as they are."""
    return {
        name: (value.half() if value.dim() > 1 and value.is_floating_point() else value).cpu().contiguous()
        for name, value in state.items()
    }


def train_and_save(
    path: Path, arch: str, labelled: LabelledImages, compute: Compute, *, schedule: Schedule, seed: int = 0
) -> None:
    """Train the network of the zoo called `arch` and write it to `path`, whole or not at all."""
    torch.manual_seed(seed)
    network = ZOO[arch](len(labelled.class_names), 3).to(compute.device).to(memory_format=torch.channels_last)
    images, labels = (torch.from_numpy(array).to(compute.device) for array in (labelled.images, labelled.labels))
    training = train(network, images, labels, compute, schedule=schedule, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"state_dict": compact(network.state_dict()), "training": training}, partial)
    partial.replace(path)


def open_teacher(path: Path, arch: str, image_shape: tuple[int, int, int]) -> tuple[Teacher, dict[str, Any]]:
    """The teacher in `path` for images of (C, H, W), as `ssdkd` reads it, and how it was trained."""
    training: dict[str, Any] = torch.load(path, weights_only=True)["training"]
    return load_teacher(path, arch=arch, input_shape=image_shape, mean=MEAN, std=STD), training


@torch.no_grad()
def percent_correct(
    network: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64], device: torch.device
) -> float:
    """Accuracy in percent, in float32, on `device`, of images uint8 [N, H, W, C]; `network` is moved there."""
    network.to(device).eval()
    constants: Normalization = normalization(MEAN, STD, device)
    correct = 0
    for part, truth in zip(
        torch.from_numpy(images).split(EVALUATION_BATCH), torch.from_numpy(labels).split(EVALUATION_BATCH), strict=True
    ):
        logits = network(to_input(part.to(device), constants))
        correct += int((logits.argmax(1) == truth.to(device)).sum())
    return 100.0 * correct / len(labels)
