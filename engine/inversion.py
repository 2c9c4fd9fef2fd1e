"""Data inversion: a batch of synthetic images from the teacher's own knowledge, in a few steps of a fast generator.

    L_inv(x) = a_bn L_bn(x) + a_ce CE(T(x), y) - a_adv phi(x) KL(T(x) || S(x)) 1[argmax T(x) = argmax S(x)]

Per round, a copy of the generator and the latent vectors take K steps of Adam on L_inv; the generator itself then takes
one first-order meta step towards that copy, so that the next round starts nearer (fast meta-learned inversion: Fang et
al., AAAI 2022; the step is that of Reptile, Nichol et al. 2018).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import DistillationSettings
from engine.device import Compute
from engine.generator import Generator
from engine.images import Normalization, normalize, to_bytes
from engine.losses import (
    BatchNormPrior,
    batchnorm_loss,
    flat_statistics,
    image_prior_loss,
    modulation,
    recorded_statistics,
)
from engine.task import Classification

ADAM_BETAS = (0.5, 0.999)  # Radford et al. 2016


@dataclass
class Inverter:
    """The generator and its fast copy."""

    generator: Generator
    fast_generator: Generator


@dataclass(frozen=True)
class InversionLosses:
    """The terms of the last inner step, scalars on the device, before their weights."""

    total: Tensor
    prior: Tensor
    target: Tensor
    adversarial: Tensor


def new_inverter(image_shape: tuple[int, int, int], settings: DistillationSettings, compute: Compute) -> Inverter:
    """A fresh generator for images of (C, H, W) on the device of `compute`."""

    def build() -> Generator:
        generator = Generator(image_shape, latent=settings.generator_latent, width=settings.generator_width)
        return generator.to(compute.device).to(memory_format=torch.channels_last)

    return Inverter(build().requires_grad_(False), build())


def invert(
    inverter: Inverter,
    teacher: nn.Module,
    student: nn.Module,
    targets: Tensor,
    *,
    task: Classification,
    prior: BatchNormPrior | None,
    class_counts: Tensor,
    adversarial_weight: float,
    normalization: Normalization,
    settings: DistillationSettings,
    compute: Compute,
    rng: torch.Generator,
) -> tuple[Tensor, InversionLosses]:
    """One batch of synthetic images.

    Args:
        inverter: updated by the meta step.
        teacher: frozen, in eval mode.
        student: any mode; in eval mode while this runs.
        targets: int64 [B], the class that each image shall show.
        task: what a prediction is.
        prior: the teacher's BatchNorm statistics, or None where it has none.
        class_counts: int64 [K], the buffer's classes now.
        adversarial_weight: of the term with the student; at 0 the student is not asked.
        normalization: of the teacher's input.
        settings: the other weights, and rates.
        compute: device and precision.
        rng: on that device.

    Returns:
        uint8 [B, H, W, C] and the losses.
    """
    fast, count = inverter.fast_generator, len(targets)
    parameters: list[Tensor] = list(fast.parameters())
    with torch.no_grad():
        torch._foreach_copy_(parameters, [*inverter.generator.parameters()])
    latent = torch.randn(count, settings.generator_latent, generator=rng, device=compute.device).requires_grad_()
    variables = [*parameters, latent]
    rates: list[dict[str, Any]] = [{"params": parameters}, {"params": [latent], "lr": settings.latent_rate}]
    optimizer = torch.optim.Adam(rates, lr=settings.generator_rate, betas=ADAM_BETAS)
    with evaluating(student), recorded_statistics(prior.layers if prior else ()) as recorded:
        for _ in range(settings.inversion_steps):
            with compute.autocast():
                inputs = normalize(fast(latent), normalization)
                teacher_logits = teacher(inputs)
                student_logits = student(inputs) if adversarial_weight else teacher_logits
            if prior is None:
                prior_loss = image_prior_loss(inputs)
            else:
                prior_loss = batchnorm_loss(prior, flat_statistics(prior, recorded))
            target_loss = task.target_loss(teacher_logits, targets).mean()
            adversarial_loss = target_loss.new_zeros(())
            if adversarial_weight:
                phi = sample_weights(teacher_logits.detach(), task, class_counts, settings)
                agree = task.agreement(teacher_logits, student_logits)
                divergence = task.discrepancy(teacher_logits, student_logits, temperature=1.0)
                adversarial_loss = -(phi * agree * divergence).mean()
            loss = (
                settings.batchnorm_weight * prior_loss
                + settings.class_weight * target_loss
                + adversarial_weight * adversarial_loss
            )
            gradients = torch.autograd.grad(loss, variables)
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.grad = gradient
            optimizer.step()
    with torch.no_grad():
        if settings.meta:
            torch._foreach_lerp_([*inverter.generator.parameters()], parameters, settings.meta_rate)
        with compute.autocast():
            images = to_bytes(fast(latent))
    return images, InversionLosses(*(term.detach() for term in (loss, prior_loss, target_loss, adversarial_loss)))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the context the module is in eval mode; then in the mode that it was in."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


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
    return phi / phi.mean().clamp_min(1e-12)
