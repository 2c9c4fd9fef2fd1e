"""What BatchNorm layers see: the statistics of their input per channel, recorded in a forward pass, with a gradient."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.hooks import removing

Statistics = dict[nn.Module, tuple[Tensor, ...]]  # layer -> what is known of its input, [C] each
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class ChannelStatistics(torch.autograd.Function):
    """Mean and biased variance of a feature map per channel, and how much of it lies between images, with a gradient.

    PyTorch's fused BatchNorm kernel computes the first two in one pass, an order of magnitude faster on a CPU than
    `var_mean` over three axes (docs/experiments.md); it has no derivative of its own, so it is written here. All
    three have one gradient, which is one pass too.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, between: bool) -> tuple[Tensor, ...]:
        """[B, C, ...] to mean and variance and, with `between`, the biased variance of the images' own means; [C]."""
        statistics, mean, *apart = _statistics(features, between)
        ctx.save_for_backward(features, mean, *apart)
        return statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """d mean / dx = 1 / n;  d variance / dx = 2 (x - mean) / n;  d between / dx = 2 (image's mean - mean) / n."""
        return _gradient(*ctx.saved_tensors, gradients=gradients), None


class WatchedBatchNorm(torch.autograd.Function):
    """A BatchNorm layer in eval mode and, where asked for, the statistics of its input, with one gradient by the input.

    PyTorch's own derivative of that layer comes in another memory layout than `channels_last` on a GPU, and all that
    follows pays for it (docs/experiments.md).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, layer: BatchNorm, scale: Tensor, watched: bool, between: bool) -> Any:
        """[B, C, ...] to the layer's output and, where `watched`, what ChannelStatistics gives.

        `scale` [C] is the layer's weight over its running standard deviation.
        """
        statistics, *kept = _statistics(features, between) if watched else ((),)
        ctx.save_for_backward(scale, features, *kept)
        return F.batch_norm(
            features, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
        ), *statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """d output / dx = scale, and the gradient of the statistics."""
        scale, features, *kept = ctx.saved_tensors
        scale = scale.to(features.dtype).view(-1, *(1,) * (features.dim() - 2))
        if kept:
            gradient = _gradient(features, *kept, gradients=gradients).addcmul_(upstream, scale)
        else:
            gradient = torch.mul(upstream, scale, out=torch.empty_like(features))
        return gradient, None, None, None, None


def mean_and_variance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a feature map [B, C, ...] per channel, without a gradient; [C], float32 or wider."""
    # Float32 running statistics, unused (momentum 0): without them those of bfloat16 features come out in bfloat16.
    dtype = torch.promote_types(features.dtype, torch.float32)
    running_mean, running_variance = torch.zeros(2, features.shape[1], dtype=dtype, device=features.device)
    mean, variance = torch.batch_norm_update_stats(features, running_mean, running_variance, 0.0)
    return mean, variance


def _statistics(features: Tensor, between: bool) -> tuple[Any, ...]:
    """The statistics of ChannelStatistics; behind them what `_gradient` needs."""
    mean, variance = mean_and_variance(features)
    if not between:
        return (mean.float(), variance.float()), mean
    places = tuple(range(2, features.dim()))
    apart = (features.mean(places, dtype=mean.dtype) if places else features.to(mean.dtype)) - mean  # [B, C]
    return (mean.float(), variance.float(), apart.square().mean(0).float()), mean, apart


def _gradient(features: Tensor, mean: Tensor, *apart: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """The gradient of the statistics by the features, in their memory layout."""
    mean_gradient, variance_gradient, *between_gradient = gradients
    count = features.numel() // features.shape[1]
    places = (1,) * (features.dim() - 2)
    slope = 2 / count * variance_gradient
    offset = (mean_gradient / count - slope * mean).expand(1, -1)
    if apart:
        offset = offset + 2 / count * between_gradient[0] * apart[0]
    offset, slope = (values.to(features.dtype).view(*values.shape, *places) for values in (offset, slope))
    return torch.addcmul(offset, features, slope, out=torch.empty_like(features))


@contextlib.contextmanager
def recorded_statistics(
    layers: Sequence[nn.Module], *, between: bool = False, frozen: bool = False
) -> Iterator[Statistics]:
    """Within the context each forward pass fills the dict with mean and variance of every layer's input per channel.

    With `between` the biased variance of the images' own means is the third. `frozen`: layers in eval mode have a
    gradient by their input alone, one with that of the statistics.
    """
    recorded: Statistics = {}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        recorded[layer] = ChannelStatistics.apply(inputs[0], between)

    def run(layer: BatchNorm, scale: Tensor, input: Tensor) -> Tensor:
        normalized, *statistics = WatchedBatchNorm.apply(input, layer, scale, True, between)
        recorded[layer] = tuple(statistics)
        return normalized

    plain = _plain(layers) if frozen else []
    others = set(layers).difference(plain)
    with _in_place_of(plain, run), removing([layer.register_forward_pre_hook(record) for layer in others]):
        yield recorded


@contextlib.contextmanager
def frozen_batchnorm(network: nn.Module | None) -> Iterator[None]:
    """Within the context the BatchNorm layers of a network in eval mode have a gradient by their input alone."""

    def run(layer: BatchNorm, scale: Tensor, input: Tensor) -> Tensor:
        (normalized,) = WatchedBatchNorm.apply(input, layer, scale, False, False)
        return normalized

    with _in_place_of(_plain(network.modules()) if network else [], run):
        yield


@contextlib.contextmanager
def _in_place_of(layers: Sequence[BatchNorm], run: Callable[[BatchNorm, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Within the context `run(layer, scale, input)` is the forward pass of these layers."""
    for layer, scale in zip(layers, _scales(layers), strict=True):
        layer.forward = partial(run, layer, scale)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _plain(layers: Iterable[nn.Module]) -> list[BatchNorm]:
    """Those that are PyTorch's own BatchNorm layers in eval mode, with weights, whose forward nobody has replaced."""
    return [
        layer
        for layer in dict.fromkeys(layers)
        if type(layer) in get_args(BatchNorm)
        and isinstance(layer, BatchNorm)
        and not layer.training
        and "forward" not in vars(layer)
        and layer.affine
        and layer.running_mean is not None
    ]


@torch.no_grad()
def _scales(layers: Sequence[BatchNorm]) -> Sequence[Tensor]:
    """The weight of each of these layers over its running standard deviation, [C]; of all in three kernels."""
    if not layers:
        return ()
    variances = [layer.get_buffer("running_var") for layer in layers]
    scales = torch._foreach_add(variances, [layer.eps for layer in layers])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, [layer.weight for layer in layers])
    return scales
