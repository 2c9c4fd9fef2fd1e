"""Synthetic images as they are stored, viewed and fed: uint8 [N, H, W, C] in, normalised float [B, C, H, W] out.

Bytes with the channels last make a draw, its shift and its flip one gather, and the result is already in the
memory format in which convolutions are fastest.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Normalization(NamedTuple):
    """What the teacher expects of its input: (pixels in 0...1 - mean) / std, per channel."""

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]


def normalization(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Normalization:
    """`Normalization` with its two [C, 1, 1] tensors on `device`."""
    return Normalization(*(torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std)))


def normalize(pixels: Tensor, constants: Normalization) -> Tensor:
    """Pixels in 0...1 [B, C, H, W] to network input [B, C, H, W]."""
    return (pixels - constants.mean) / constants.std


def to_input(images: Tensor, constants: Normalization) -> Tensor:
    """Stored bytes [B, H, W, C] to network input, float32 [B, C, H, W], channels last in memory."""
    return normalize(images.permute(0, 3, 1, 2).float() / 255, constants)


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in 0...1 [B, C, H, W] to stored bytes [B, H, W, C]."""
    return (pixels * 255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def random_views(images: int, views: int, shift: int, rng: torch.Generator) -> Tensor:
    """Augmentations as numbers: a shift of up to `shift` pixels along each axis, and a flip in every second case.

    Returns:
        int64 [images, views, 3]: rows and columns that the view is shifted by, and 1 where it is mirrored.
    """
    drawn = torch.randint(-shift, shift + 1, (images, views, 3), generator=rng, device=rng.device)
    drawn[..., 2] = torch.randint(2, (images, views), generator=rng, device=rng.device)
    return drawn


def render(images: Tensor, indices: Tensor, views: Tensor) -> Tensor:
    """One view of each chosen image; where a shift leaves the image, its edge repeats.

    Args:
        images: uint8 [N, H, W, C].
        indices: int64 [B], which images.
        views: int64 [B, 3], from `random_views`.

    Returns:
        uint8 [B, H, W, C].
    """
    _, height, width, _ = images.shape
    down, right, mirrored = views[:, :, None].unbind(1)  # [B, 1] each
    rows = (torch.arange(height, device=images.device) + down).clamp_(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=images.device) + right).clamp_(0, width - 1)  # [B, W]
    columns = torch.where(mirrored.bool(), columns.flip(1), columns)
    return images[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
