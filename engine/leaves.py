"""Images that no network and no camera made: dead leaves, shapes that cover each other, each with a texture of its own.

Their edges, scales and spectra are those of photographs (Lee, Mumford and Huang 2001), so that networks can learn from
them (Baradad et al., NeurIPS 2021). Here they say how far the images of a batch may lie apart (engine.spread), and a
generator may paint over them (engine.generator).
"""

import torch
from torch import Tensor

from engine.images import Normalization, to_bytes
from engine.shapes import Shape

LEAVES_AN_IMAGE = 10
SMALLEST, LARGEST = 0.06, 0.6  # radius of a leaf, of the shorter side
BRIGHTNESS, TINT, TEXTURE, SLOPE = 0.9, 0.45, 0.35, 0.5  # deviations, in those that the teacher expects of its input
ELLIPSE, BOX = 2.0, 8.0  # exponents of a superellipse
MEANS, STDS = (0.25, 0.75), (0.1, 0.35)  # of the colours: some teachers' constants are none of images


def dead_leaves(number: int, image_shape: Shape, normalization: Normalization, rng: torch.Generator) -> Tensor:
    """Images in colours of about the teacher's own mean and deviation, uint8 [number, H, W, C], on the device of `rng`.

    The numbers above were chosen by eye, and by how near the images' spread is to that of photographs.
    """
    _, height, width = image_shape
    values = _surface(number, image_shape, rng)
    rows = torch.arange(height, device=rng.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=rng.device).view(1, 1, 1, -1)
    for _ in range(LEAVES_AN_IMAGE):
        down = rows - _uniform(number, -0.1, 1.1, rng) * height
        right = columns - _uniform(number, -0.1, 1.1, rng) * width
        angle, stretch = _uniform(number, 0, torch.pi, rng), (0.5 * _normal(number, 1, rng)).exp()
        along = (right * angle.cos() + down * angle.sin()) / stretch
        across = (down * angle.cos() - right * angle.sin()) * stretch
        power = ELLIPSE + (BOX - ELLIPSE) * (_uniform(number, 0, 1, rng) >= 0.5)
        distance = (along.abs() ** power + across.abs() ** power + 1e-9) ** (1 / power)
        radius = min(height, width) * SMALLEST * (LARGEST / SMALLEST) ** _uniform(number, 0, 1, rng)
        inside = ((radius - distance) / _uniform(number, 0.2, 1, rng)).clamp(-30, 30).sigmoid()
        slope = SLOPE * _normal(number, 1, rng) * along / min(height, width)
        values = values.lerp(_surface(number, image_shape, rng) + slope, inside)
    return to_bytes((normalization.mean.clamp(*MEANS) + normalization.std.clamp(*STDS) * values).clamp(0, 1))


def _surface(number: int, image_shape: Shape, rng: torch.Generator) -> Tensor:
    """A brightness and a tint, and a texture of some contrast, [number, C, H, W]."""
    channels, height, width = image_shape
    colour = BRIGHTNESS * _normal(number, 1, rng) + TINT * _normal(number, channels, rng)
    return colour + TEXTURE * _normal(number, 1, rng) * _texture(number, height, width, rng)


def _texture(number: int, height: int, width: int, rng: torch.Generator) -> Tensor:
    """Noise whose amplitude falls with frequency as 1/f^a, a of each image between 0.5 and 2; [number, 1, H, W].

    Mean 0, deviation 1.
    """
    rows, columns = (
        frequencies(side, device=rng.device)
        for frequencies, side in ((torch.fft.fftfreq, height), (torch.fft.rfftfreq, width))
    )
    frequency = (rows[:, None].square() + columns.square()).sqrt()
    frequency = frequency + (frequency == 0)  # the mean, which goes: written as a number it would be sent to the GPU
    noise = torch.randn(number, 1, height, width, generator=rng, device=rng.device)
    shaped = torch.fft.irfft2(torch.fft.rfft2(noise) * frequency ** -_uniform(number, 0.5, 2, rng), s=(height, width))
    shaped = shaped - shaped.mean((2, 3), keepdim=True)
    return shaped / shaped.square().mean((2, 3), keepdim=True).sqrt().clamp_min(1e-6)


def _uniform(number: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(number, 1, 1, 1, generator=rng, device=rng.device)


def _normal(number: int, channels: int, rng: torch.Generator) -> Tensor:
    return torch.randn(number, channels, 1, 1, generator=rng, device=rng.device)
