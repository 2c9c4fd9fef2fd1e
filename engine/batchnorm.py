"""BatchNorm layers as a memory of the training images: which of them can be used, and whether they fit the network."""

import torch
from torch import Tensor, nn

from engine.channel_statistics import recorded_statistics
from engine.losses import batchnorm_loss, batchnorm_prior, flat_statistics
from engine.probing import NEVER_RUNS, is_batchnorm, noise
from engine.shapes import Shape


def batchnorm_layers(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that can serve as a prior, in order of registration."""
    return [layer for layer in module.modules() if has_running_statistics(layer) and is_trained(layer)]


def has_running_statistics(layer: nn.Module) -> bool:
    """Whether it is a BatchNorm layer (of whatever library) that runs and normalises by stored statistics."""
    if not is_batchnorm(layer) or hasattr(layer, NEVER_RUNS):
        return False
    return all(isinstance(getattr(layer, name, None), Tensor) for name in ("running_mean", "running_var"))


def is_trained(layer: nn.Module) -> bool:
    """Whether the running statistics of a BatchNorm layer are possible ones, and no longer those of a new layer."""
    mean, variance = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    new = bool((mean == 0).all() and (variance == 1).all())
    return not new and bool(mean.isfinite().all() and variance.isfinite().all()) and has_possible_variances(layer)


def has_possible_variances(layer: nn.Module) -> bool:
    """Whether no running variance is negative, and not all are 0; a single 0 is that of a dead channel."""
    variance = layer.get_buffer("running_var")
    return not bool((variance < 0).any() or (variance == 0).all())


def statistics_misfit(module: nn.Module, shape: Shape) -> float:
    """L_bn of noise [8, C, H, W]: around 1 in a network that is wired as the one that was trained, and huge where an
    activation is missing or layers are swapped. Strides and paddings do not show.
    """
    prior = batchnorm_prior(batchnorm_layers(module))
    with torch.no_grad(), recorded_statistics(prior.layers) as recorded:
        module(noise(shape, images=8))
    return float(batchnorm_loss(prior, flat_statistics(prior, recorded)))
