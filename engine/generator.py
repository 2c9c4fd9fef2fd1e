"""The fast generator: latent vectors to images, small enough that inverting a batch takes a few steps.

A DCGAN-like decoder (upsample, 3x3 convolution, BatchNorm, LeakyReLU), as the fast meta-learned inversion uses it
(Fang et al., AAAI 2022). It may paint over dead leaves (engine.leaves), others for each image: then edges, textures and
colours differ from image to image as no decoder of latent vectors alone makes them differ.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

COARSEST_PIXELS = 8  # the first feature map has at most this many pixels a side
CONTRAST = 2.0  # initial deviation before the sigmoid: at 1, pixels stay grey for many rounds (docs/experiments.md)
WIDEST = 8  # times `width`: the cap on channels of the coarse maps


class Generator(nn.Module):
    """z [B, latent], and dead leaves to paint over if it has any, to pixels in 0...1 [B, C, H, W]."""

    def __init__(self, image_shape: tuple[int, int, int], *, latent: int, width: int, leaves: bool = False) -> None:
        """`image_shape` is (C, H, W); `width` the channels at full resolution."""
        super().__init__()
        self.image_shape = channels, height, across = image_shape
        doublings = max(1, math.ceil(math.log2(max(height, across) / COARSEST_PIXELS)))
        widths = [width * min(2**level, WIDEST) for level in reversed(range(doublings))]
        widths = [widths[0], *widths]
        self.coarse_shape = (widths[0], math.ceil(height / 2**doublings), math.ceil(across / 2**doublings))
        *hidden, last = pairwise(widths)
        more = channels if leaves else 0
        self.project = nn.Linear(latent, math.prod(self.coarse_shape))
        self.project_norm = _batchnorm(widths[0])
        self.blocks = nn.Sequential(*(nn.Sequential(_doubled(), *_block(*both)) for both in hidden), _doubled())
        self.leaf_norm = _batchnorm(channels) if leaves else None
        self.paint = nn.Sequential(*_block(last[0] + more, last[1]))
        self.to_pixels = nn.Conv2d(width + more, channels, 3, padding=1)
        self.pixel_norm = _batchnorm(channels)
        nn.init.constant_(self.pixel_norm.weight, CONTRAST)
        if leaves:
            with torch.no_grad():  # begin with the leaves as they are, and what is painted over them
                self.to_pixels.weight[:, width:, 1, 1] += torch.eye(channels)

    def forward(self, z: Tensor, leaves: Tensor | None = None) -> Tensor:
        """Pixels in 0...1; a size that is no multiple of the coarse map is cropped from the centre.

        Args:
            z: [B, latent].
            leaves: [B, C, H, W], of any scale; None for a generator without.

        Raises:
            ValueError: leaves for a generator without, or none for one that paints over them.
        """
        if (leaves is None) != (self.leaf_norm is None):
            raise ValueError("a generator takes leaves if it was built with them, else none")
        features = self.project_norm(self.project(z).view(-1, *self.coarse_shape))
        features = self.blocks(features.contiguous(memory_format=torch.channels_last))
        _, height, width = self.image_shape
        top, left = (features.shape[2] - height) // 2, (features.shape[3] - width) // 2
        features = features[:, :, top : top + height, left : left + width]
        if self.leaf_norm is not None and leaves is not None:
            leaves = self.leaf_norm(leaves).to(features.dtype)
        features = self.paint(_beside(features, leaves))
        return self.pixel_norm(self.to_pixels(_beside(features, leaves))).float().sigmoid()


def _doubled() -> nn.Module:
    return nn.Upsample(scale_factor=2, mode="nearest")


def _block(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1, bias=False), _batchnorm(after), nn.LeakyReLU(0.2, inplace=True)


def _beside(features: Tensor, leaves: Tensor | None) -> Tensor:
    if leaves is None:
        return features
    return torch.cat((features, leaves), 1).contiguous(memory_format=torch.channels_last)  # one channel says no layout


def _batchnorm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm that always uses the batch: a generator is fitted to one batch at a time and has no test mode."""
    return nn.BatchNorm2d(channels, track_running_stats=False)
