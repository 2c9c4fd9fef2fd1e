"""Synthetic images of a teacher alone, with no student to teach: to calibrate what is made of the teacher itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.config import DistillationSettings
from engine.device import Compute
from engine.errors import NonFiniteLossError
from engine.inversion import invert, new_inverter
from engine.source import Source

LEARNING_ROUNDS = 24  # of the generator, before its images count: they are textures at first (docs/experiments.md)
CLASS_WEIGHT = 5.0  # the teacher is to be sure of them, as it is of photographs: no student wants harder ones


@dataclass(frozen=True)
class Progress:
    """How far the sampling is after a round; `prior_loss` as in the distillation."""

    round: int  # from 1
    rounds: int
    prior_loss: float


def rounds_for(number: int, settings: DistillationSettings) -> int:
    """How many rounds `synthesize` takes for so many images."""
    return LEARNING_ROUNDS + -(-number // settings.inversion_batch)


def synthesize(
    source: Source, number: int, *, settings: DistillationSettings, compute: Compute, seed: int
) -> Iterator[tuple[Progress, Tensor]]:
    """Rounds of inversion without the adversarial term; each yields its images, uint8 [B, H, W, C], in random order.

    The images of the first rounds are none, [0, H, W, C]: the generator learns. Classes are as even as `number` lets
    them be.

    Raises:
        NonFiniteLossError: the loss of a round is NaN or infinite.
    """
    torch.manual_seed(seed)  # the generator's initial weights
    teacher, task = source.network, source.task
    teacher.to(compute.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    settings = replace(settings, class_weight=CLASS_WEIGHT)
    rng = torch.Generator(compute.device).manual_seed(seed)
    inverter = new_inverter(source, None, settings=settings, compute=compute)
    counts = torch.zeros(task.classes, dtype=torch.int64, device=compute.device)
    rounds = rounds_for(number, settings)
    for index in range(rounds):
        compute.threads.choose()
        targets = task.balanced_targets(counts, settings.inversion_batch, rng)
        images, losses = invert(inverter, targets, class_counts=counts, adversarial_weight=0.0, rng=rng)
        if not losses.total.isfinite():
            raise NonFiniteLossError(
                f"the images' loss is not finite in round {index + 1}: {float(losses.total):.3g}",
                "check --mean and --std, and look at the teacher with `ssdkd inspect`",
            )
        if index < LEARNING_ROUNDS:
            images = images[:0]
        else:
            counts += torch.bincount(targets, minlength=task.classes)
        yield Progress(index + 1, rounds, float(losses.prior)), images
