"""The student's step on a batch drawn from the buffer: its loss and gradients, its optimiser, its weight average."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.alteration import alter, numbers_for
from engine.config import DistillationSettings
from engine.device import Compute
from engine.features import compared, teacher_maps
from engine.images import Normalization, render, to_input
from engine.recording import Outputs, laid_out_as
from engine.replay import ReplayBuffer
from engine.stages import Stages
from engine.task import Classification

LONGEST_MEMORY = 0.1  # of the steps so far, of the weight average


@dataclass(frozen=True)
class Batch:
    """What is drawn for one step, in memory that stays where it is."""

    slots: Tensor  # int64 [B], of the buffer
    views: Tensor  # int64 [B], which of a sample's augmentations
    weights: Tensor  # float32 [B], importance weights
    numbers: Tensor  # float32 [ceil(B / 2), N], how every second image is altered (engine.alteration)
    feature_weight: Tensor  # scalar, of each map that is compared


def empty_batch(number: int, channels: int, device: torch.device) -> Batch:
    """A batch of `number` samples, still to be drawn."""
    slots, views = torch.zeros(2, number, dtype=torch.int64, device=device)
    numbers = numbers_for(number, channels, device)
    return Batch(slots, views, torch.ones(number, device=device), numbers, torch.zeros((), device=device))


def learning_parameters(student: nn.Module) -> list[nn.Parameter]:
    """The student's parameters that have a gradient."""
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def new_optimizer(
    student: nn.Module, inherited: frozenset[str], settings: DistillationSettings
) -> torch.optim.Optimizer:
    """SGD over two groups, new parameters and inherited ones; `initial_lr` of each is the peak of its rate."""
    old = [parameter for name, parameter in student.named_parameters() if name in inherited]
    new = [parameter for name, parameter in student.named_parameters() if name not in inherited]
    rates = ((new, settings.student_rate), (old, settings.inherited_rate))
    return torch.optim.SGD(
        [{"params": parameters, "initial_lr": rate} for parameters, rate in rates if parameters],
        lr=settings.student_rate,
        momentum=settings.student_momentum,
        weight_decay=settings.student_decay,
        nesterov=settings.student_momentum > 0,
        fused=True,
    )


def loss_and_gradients(
    student: nn.Module,
    batch: Batch,
    buffer: ReplayBuffer,
    *,
    task: Classification,
    normalization: Normalization,
    stages: Stages | None,
    alters: bool,
    temperature: float,
    compute: Compute,
) -> Outputs:
    """The weighted losses of the logits and of the stages' maps, and the gradients of their sum.

    With `stages` the teacher looks at the views now, of which every second is altered if `alters`, and maps are
    compared. Without, its kept logits are used. Where no map is compared the second loss is 0. Behind the two
    losses stand each sample's divergence [B] and the teacher's logits [B, K]. There is a gradient for each of
    `learning_parameters`; that of a parameter without a part in the losses is zero.
    """
    slots, weights = batch.slots, batch.weights
    inputs = to_input(render(buffer.images, slots, buffer.views[slots, batch.views]), normalization)
    if stages is not None and alters:
        inputs = alter(inputs, batch.numbers)
    weights = weights / weights.mean()
    with compute.autocast():
        if stages is None:
            teacher_logits, errors = buffer.logits[slots, batch.views], []
            student_logits = student(inputs)
        else:
            teacher_logits, maps = teacher_maps(stages, inputs)
            with compared(stages, maps, weights) as errors:
                student_logits = student(inputs)
    divergences = task.discrepancy(teacher_logits, student_logits, temperature)
    loss = (weights * divergences).mean()
    feature_loss = torch.stack(errors).sum() if errors else torch.zeros_like(loss)
    parameters = learning_parameters(student)
    total = loss + batch.feature_weight * feature_loss
    gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
    losses = (loss.detach(), feature_loss.detach(), divergences.detach(), teacher_logits.float())
    return Outputs(losses, laid_out_as(parameters, gradients))


def rate_factor(progress: float) -> float:
    """The learning rate's share of its peak: a half cosine to 0; `progress`, of the run, is in 0...1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def rise(steps: int, length: int) -> float:
    """The share of its peak that the rate has risen to after so many steps, 1 from `length` on.

    A student that inherits nothing is thrown off by the whole rate, and does not recover (docs/experiments.md).
    """
    return min(1.0, (steps + 1) / length)


def averaged_tensors(network: nn.Module) -> list[Tensor]:
    """What a weight average averages: the floating-point parameters and buffers, BatchNorm statistics among them.

    Each once, where layers share one.
    """
    named = (*network.named_parameters(), *network.named_buffers())
    return [tensor.detach() for _, tensor in named if tensor.is_floating_point()]


@torch.no_grad()
def update_average(average: list[Tensor], student: list[Tensor], decay: float, steps: int) -> None:
    """Move the average towards the student, both `averaged_tensors`.

    Its memory grows with the steps so far, to 1 / (1 - decay). One as long as a short run would mix students of which
    each has BatchNorm statistics that do not fit the others' weights.
    """
    torch._foreach_lerp_(average, student, max(1 - decay, 1 / (1 + LONGEST_MEMORY * steps)))
