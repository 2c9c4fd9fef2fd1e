"""What networks share: their initialisation, how weights are loaded, the pooling at the end, a slice's gradient."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def initialise_convolutions(module: nn.Module) -> nn.Module:
    """Draw every convolution of `module` as He et al. (2015, arXiv 1502.01852) do, in place; returns `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def with_versions(module: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights, of the layers as they are in `module`: some networks ask for their version, which files forget."""
    versioned = OrderedDict(weights)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    return versioned


def global_average(features: Tensor) -> Tensor:
    """Mean over the positions: [B, C, H, W] -> [B, C]."""
    return features.mean((2, 3))


def layout_of(features: Tensor) -> torch.memory_format:
    """The memory format of a feature map [B, C, H, W]; channels_last where it is both."""
    last = features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def every(stride: tuple[int, int]) -> tuple[slice, ...]:
    """Where every stride-th pixel of a feature map [B, C, H, W] stands."""
    return slice(None), slice(None), slice(None, None, stride[0]), slice(None, None, stride[1])


def among_zeros(
    features: Tensor, shape: Sequence[int], places: tuple[slice, ...], layout: torch.memory_format
) -> Tensor:
    """A feature map of this `shape` [B, C, H, W] that has `features` at these places, and zeros elsewhere."""
    spread = torch.empty(*shape, dtype=features.dtype, device=features.device, memory_format=layout).zero_()
    spread[places] = features
    return spread


class Part(torch.autograd.Function):
    """Some pixels of a feature map; its gradient keeps the memory layout, as layers before it run best."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, places: tuple[slice, ...]) -> Tensor:
        """[B, C, H, W] -> features[places]."""
        ctx.places, ctx.shape, ctx.layout = places, features.shape, layout_of(features)
        return features[places]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """Zero where nothing was taken."""
        return among_zeros(upstream, ctx.shape, ctx.places, ctx.layout), None
