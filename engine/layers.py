"""What all networks of ours share: the initialisation and the pooling before the last layer."""

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
