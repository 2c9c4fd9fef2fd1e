"""Data inversion: a batch of synthetic images from the teacher's own knowledge, in a few steps of a fast generator.

    L_inv(x) = a_bn L_bn(x) + a_sp L_sp(x) + a_ce CE(T(x), y) - a_adv phi(x) KL(T(x) || S(x)) 1[argmax T = argmax S]

Per round, a copy of the generator and the latent vectors take K steps of Adam on L_inv; the generator itself then takes
one first-order meta step towards that copy, so that the next round starts nearer (fast meta-learned inversion: Fang et
al., AAAI 2022; the step is that of Reptile, Nichol et al. 2018).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.channel_statistics import frozen_batchnorm, recorded_statistics
from engine.config import DistillationSettings
from engine.device import Compute
from engine.generator import Generator
from engine.images import Normalization, normalization, normalize, to_bytes
from engine.leaves import dead_leaves
from engine.losses import BatchNormPrior, batchnorm_loss, batchnorm_prior, flat_statistics, image_prior_loss, modulation
from engine.modes import evaluating, frozen
from engine.recording import Outputs, Recorded, laid_out_as
from engine.source import Source
from engine.spread import spread_loss, spread_of_leaves
from engine.task import Classification

ADAM_BETAS = (0.5, 0.999)  # Radford et al. 2016


@dataclass(frozen=True)
class InversionLosses:
    """The loss of the last inner step, and its terms before their weights; scalars on the device."""

    total: Tensor
    prior: Tensor
    spread: Tensor
    target: Tensor
    adversarial: Tensor


@dataclass(frozen=True)
class Problem:
    """What an inner step reads, in memory that stays where it is."""

    fast_generator: Generator
    latent: Tensor  # [B, L]
    leaves: Tensor | None  # [B, C, H, W], what the generator paints over, if anything
    targets: Tensor  # int64 [B], the class that each image shall show
    class_counts: Tensor  # int64 [K], the buffer's classes now
    adversarial_weight: Tensor  # scalar, of the term with the student
    has_adversary: Tensor  # float32 [B]: 1 for an image with that term, 0 for one that is spared it
    teacher: nn.Module
    student: nn.Module | None
    task: Classification
    prior: BatchNormPrior | None
    spread: Tensor | None  # [R], how far the images shall lie apart at least (engine.spread)
    normalization: Normalization
    settings: DistillationSettings
    compute: Compute


@dataclass(frozen=True)
class Inverter:
    """The generator, and what its fast copy is fitted with in each round."""

    generator: Generator
    problem: Problem
    optimizer: torch.optim.Optimizer  # of the fast copy and the latents; it begins afresh each round
    inner_step: Mapping[bool, Recorded]  # whether the student is asked -> losses and gradients


def new_inverter(
    source: Source, student: nn.Module | None, *, settings: DistillationSettings, compute: Compute
) -> Inverter:
    """A fresh generator of images for `source`, whose network is frozen and in eval mode, and for `student`, if any.

    Both networks are on the device of `compute`.
    """

    def build() -> Generator:
        latent, width = settings.generator_latent, settings.generator_width
        generator = Generator(source.image_shape, latent=latent, width=width, leaves=settings.leaves)
        return generator.to(compute.device).to(memory_format=torch.channels_last)

    generator, fast = build().requires_grad_(False), build()
    device, count = compute.device, settings.inversion_batch
    constants = normalization(source.mean, source.std, device)
    leaves = None
    if settings.leaves:
        leaves = torch.zeros(count, *source.image_shape, device=device).to(memory_format=torch.channels_last)
    prior = batchnorm_prior(source.batchnorm_layers) if source.batchnorm_layers else None
    spread = None
    if prior and settings.spread_weight and settings.inversion:
        spread = spread_of_leaves(source.network, prior, source.image_shape, constants, batch=count, compute=compute)
    problem = Problem(
        fast_generator=fast,
        latent=torch.zeros(count, settings.generator_latent, device=device, requires_grad=True),
        leaves=leaves,
        targets=torch.zeros(count, dtype=torch.int64, device=device),
        class_counts=torch.zeros(source.task.classes, dtype=torch.int64, device=device),
        adversarial_weight=torch.zeros((), device=device),
        has_adversary=torch.ones(count, device=device),
        teacher=source.network,
        student=student,
        task=source.task,
        prior=prior,
        spread=spread,
        normalization=constants,
        settings=settings,
        compute=compute,
    )
    rates: list[dict[str, Any]] = [
        {"params": [*fast.parameters()]},
        {"params": [problem.latent], "lr": settings.latent_rate},
    ]
    recorded = settings.cuda_graphs and compute.has_graphs
    return Inverter(
        generator,
        problem,
        torch.optim.Adam(rates, lr=settings.generator_rate, betas=ADAM_BETAS, fused=True),
        {
            asked: Recorded(partial(losses_and_gradients, problem, asks_student=asked), device, enabled=recorded)
            for asked in (False, True)
        },
    )


def invert(
    inverter: Inverter,
    targets: Tensor,
    *,
    class_counts: Tensor,
    adversarial_weight: float,
    spared: int = 0,
    rng: torch.Generator,
) -> tuple[Tensor, InversionLosses]:
    """One batch of synthetic images.

    Args:
        inverter: updated by the meta step.
        targets: int64 [B], the class that each image shall show; B is the settings' `inversion_batch`.
        class_counts: int64 [K], the buffer's classes now.
        adversarial_weight: of the term with the student; at 0 the student is not asked.
        spared: the first so many images have no such term; their generator is the others' too.
        rng: on the device.

    Returns:
        uint8 [B, H, W, C] and the losses.
    """
    problem = inverter.problem
    fast, latent, settings = problem.fast_generator, problem.latent, problem.settings
    parameters: list[Tensor] = list(fast.parameters())
    inner_step = inverter.inner_step[adversarial_weight > 0]
    with torch.no_grad():
        torch._foreach_copy_(parameters, [*inverter.generator.parameters()])
        latent.normal_(generator=rng)
        if problem.leaves is not None:
            leaves = dead_leaves(len(latent), fast.image_shape, problem.normalization, rng)
            problem.leaves.copy_(leaves.permute(0, 3, 1, 2))
        problem.targets.copy_(targets)
        problem.class_counts.copy_(class_counts)
        problem.adversarial_weight.fill_(adversarial_weight)
        problem.has_adversary.fill_(1)[:spared].zero_()
    restart(inverter.optimizer)
    # Frozen, for a gradient of ours (engine.depthwise) does not know that nobody asks for that of the weights.
    with evaluating(problem.student), frozen(problem.student):
        for _ in range(settings.inversion_steps):
            losses, gradients = inner_step()
            for variable, gradient in zip([*parameters, latent], gradients, strict=True):
                variable.grad = gradient
            inverter.optimizer.step()
    with torch.no_grad():
        if settings.meta:
            torch._foreach_lerp_([*inverter.generator.parameters()], parameters, settings.meta_rate)
        with problem.compute.autocast():
            images = to_bytes(fast(latent, problem.leaves))
    return images, InversionLosses(*(term.clone() for term in losses))


def losses_and_gradients(problem: Problem, *, asks_student: bool) -> Outputs:
    """L_inv, its terms before their weights, and its gradients by the fast generator's parameters and the latents."""
    fast, latent, prior, settings = problem.fast_generator, problem.latent, problem.prior, problem.settings
    task, student = problem.task, problem.student if asks_student else None
    layers, is_spread = prior.layers if prior else (), problem.spread is not None
    freezes = problem.compute.freezes_batchnorm
    with (
        recorded_statistics(layers, between=is_spread, frozen=freezes) as recorded,
        frozen_batchnorm(student if freezes else None),
        problem.compute.autocast(),
    ):
        inputs = normalize(fast(latent, problem.leaves), problem.normalization)
        teacher_logits = problem.teacher(inputs)
        student_logits = teacher_logits if student is None else student(inputs)
    target_loss = task.target_loss(teacher_logits, problem.targets).mean()
    spread, adversarial_loss = torch.zeros(2, device=target_loss.device)
    if prior is None:
        prior_loss = image_prior_loss(inputs)
    else:
        statistics = flat_statistics(prior, recorded)
        prior_loss = batchnorm_loss(prior, statistics[:2])
        if problem.spread is not None:
            spread = spread_loss(prior, statistics[2], problem.spread)
    if student is not None:
        phi = sample_weights(teacher_logits.detach(), task, problem.class_counts, settings)
        agree = task.agreement(teacher_logits, student_logits)
        divergence = task.discrepancy(teacher_logits, student_logits, temperature=1.0)
        adversarial_loss = -(problem.has_adversary * phi * agree * divergence).mean()
    loss = (
        settings.batchnorm_weight * prior_loss
        + settings.spread_weight * spread
        + settings.class_weight * target_loss
        + problem.adversarial_weight * adversarial_loss
    )
    variables = [*fast.parameters(), latent]
    gradients = laid_out_as(variables, torch.autograd.grad(loss, variables))
    terms = loss, prior_loss, spread, target_loss, adversarial_loss
    return Outputs(tuple(term.detach() for term in terms), gradients)


@torch.no_grad()
def restart(optimizer: torch.optim.Optimizer) -> None:
    """Forget all steps so far: every moment and every count is 0 again, in the same memory."""
    kept = [tensor for values in optimizer.state.values() for tensor in values.values()]
    if kept:
        torch._foreach_zero_(kept)


def sample_weights(
    teacher_logits: Tensor, task: Classification, class_counts: Tensor, settings: DistillationSettings
) -> Tensor:
    """phi of a batch, scaled to mean 1, float32 [B]."""
    classes, confidences = task.predict(teacher_logits)
    phi = modulation(
        classes,
        confidences,
        class_counts,
        gamma=settings.gamma,
        diversity=settings.diversity,
        difficulty=settings.difficulty,
    )
    return phi / phi.mean().clamp_min(torch.finfo(phi.dtype).tiny)
