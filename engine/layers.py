"""What all networks of ours share: the initialisation, the pooling before the last layer, a stride's gradient."""

from collections.abc import Sequence

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


def global_average(features: Tensor) -> Tensor:
    """Mean over the positions: [B, C, H, W] -> [B, C]."""
    return features.mean((2, 3))


def layout_of(features: Tensor) -> torch.memory_format:
    """The memory format of a feature map [B, C, H, W]; channels_last where it is both."""
    last = features.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def among_zeros(features: Tensor, shape: Sequence[int], stride: tuple[int, int], layout: torch.memory_format) -> Tensor:
    """A feature map of this `shape` [B, C, H, W] that has `features` at every stride-th pixel, and zeros between."""
    spread = torch.empty(*shape, dtype=features.dtype, device=features.device, memory_format=layout).zero_()
    spread[:, :, :: stride[0], :: stride[1]] = features
    return spread
