"""Equations of the method as functions of tensors: BatchNorm prior, what stands in for it, modulating function.

docs/method.md lists each beside its function.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.channel_statistics import ChannelStatistics, Statistics

VARIANCE_FLOOR = 1e-3  # relative to a layer's mean running variance: keeps dead channels from dominating


@dataclass(frozen=True)
class BatchNormPrior:
    """The running statistics of a teacher's BatchNorm layers, laid end to end; R is their number of channels."""

    layers: tuple[nn.Module, ...]
    mean: Tensor  # [R]
    variance: Tensor  # [R], with the floor
    floor: Tensor  # [R], added to both variances that are compared
    weight: Tensor  # [R]: every layer counts the same, every channel of a layer too; sums to 1


def batchnorm_prior(layers: Sequence[nn.Module]) -> BatchNormPrior:
    """The prior of these layers (each with `running_mean` and `running_var`); they must not be empty."""
    means = [torch.as_tensor(layer.running_mean).float() for layer in layers]
    variances = [torch.as_tensor(layer.running_var).float() for layer in layers]
    floors = [torch.full_like(variance, VARIANCE_FLOOR * float(variance.mean())) for variance in variances]
    floor = torch.cat(floors)
    weights = [torch.full_like(mean, 1 / (len(layers) * len(mean))) for mean in means]
    return BatchNormPrior(tuple(layers), torch.cat(means), torch.cat(variances) + floor, floor, torch.cat(weights))


def flat_statistics(prior: BatchNormPrior, recorded: Statistics) -> Tensor:
    """The recorded means and variances as one tensor, [2, R], or [3, R] with those between images."""
    return torch.stack([torch.cat(kind) for kind in zip(*(recorded[layer] for layer in prior.layers), strict=True)])


def batchnorm_loss(prior: BatchNormPrior, statistics: Tensor) -> Tensor:
    """L_bn: squared distance of the means, in running standard deviations, plus that of the standard deviations.

    Averaged over the channels of a layer, then over the layers, so that it means the same in a deep and in a shallow
    teacher. `statistics` is [2, R]; the result is a scalar.
    """
    mean, variance = statistics
    mean_term = (mean - prior.mean).square() / prior.variance
    deviation_term = (((variance.clamp_min(0) + prior.floor) / prior.variance).sqrt() - 1).square()
    return (prior.weight * (mean_term + deviation_term)).sum()


def image_prior_loss(inputs: Tensor) -> Tensor:
    """The prior of a teacher without BatchNorm: smooth images whose channels are standardised, scalar.

    Total variation (Mahendran and Vedaldi 2015), and mean 0 and deviation 1 per channel: what normalisation by the
    training set's own constants gives.
    """
    variation = (inputs.diff(dim=2).square().mean() + inputs.diff(dim=3).square().mean()) / 2
    mean, variance = ChannelStatistics.apply(inputs, False)
    return variation + mean.square().mean() + (variance.clamp_min(1e-6).sqrt() - 1).square().mean()


def modulation(
    classes: Tensor, confidences: Tensor, class_counts: Tensor, *, gamma: float, diversity: bool, difficulty: bool
) -> Tensor:
    """phi(x) = (1 - share of x's class in the buffer) (1 - confidence)^gamma, float32 [B].

    Args:
        classes: int64 [B], the class that the teacher predicts.
        confidences: float32 [B], its confidence in it.
        class_counts: int64 [K], the classes of the buffer now.
        gamma: exponent of the difficulty-aware part.
        diversity, difficulty: whether each part counts; one that is off is 1.
    """
    value = torch.ones_like(confidences)
    if diversity:
        value = value * (1 - class_counts[classes] / class_counts.sum().clamp_min(1))
    if difficulty:
        value = value * (1 - confidences).clamp_min(1e-6) ** gamma
    return value
