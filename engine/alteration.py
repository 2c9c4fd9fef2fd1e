"""Images changed beyond what a shift and a flip do, for steps in which the teacher looks at what the student is shown.

What it says of an image is right whatever was done to that, so that a few synthetic images can stand for many: a
student that is matched to a function learns the more, the more of its domain it is shown (Beyer et al. 2022, "Knowledge
distillation: A good teacher is patient and consistent").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Deviations: radians; of the logarithms of size and contrast; of brightness and tint, in those of a channel.
ROTATION, ZOOM, GAIN, BRIGHTNESS, TINT = 0.2, 0.2, 0.25, 0.3, 0.15
COMMON = 5  # numbers of an image but for its tint
ALTERED, PLAIN = slice(0, None, 2), slice(1, None, 2)  # of a batch


def numbers_for(batch: int, channels: int, device: torch.device) -> Tensor:
    """Memory for what `alter` takes of a batch: to be filled with standard normal numbers, [ceil(B / 2), 5 + C]."""
    return torch.zeros(-(-batch // 2), COMMON + channels, device=device)


def alter(inputs: Tensor, numbers: Tensor) -> Tensor:
    """A batch of which every second image, from the first on, is another one.

    It is turned, zoomed, and changed in contrast, brightness and tint; then it is blended with the next image, which
    stays as it is, in any proportion (mixup: Zhang et al. 2018).

    Args:
        inputs: of a network, float32 [B, C, H, W], B of 2 or more.
        numbers: `numbers_for`.

    Returns:
        float32 [B, C, H, W], in the memory layout of `inputs`.
    """
    rotation, zoom, gain, brightness, share = numbers[:, :COMMON].unbind(1)
    places = _places(ROTATION * rotation, (ZOOM * zoom).exp(), *inputs.shape[2:])
    seen = F.grid_sample(inputs[ALTERED], places, padding_mode="reflection", align_corners=False)
    deviation, mean = _deviation_and_mean(inputs)
    offset = (BRIGHTNESS * brightness[:, None] + TINT * numbers[:, COMMON:])[:, :, None, None] * deviation
    seen = mean + (seen - mean) * (GAIN * gain).exp()[:, None, None, None] + offset
    plain = inputs[PLAIN]
    partners = torch.cat((plain, plain[:1]))[: len(seen)]
    altered = inputs.clone()
    altered[ALTERED] = torch.lerp(partners, seen, torch.special.ndtr(share)[:, None, None, None])  # uniform in 0...1
    return altered


def _places(angle: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
    """Where `F.grid_sample` finds the pixels of turned and zoomed images, [B, H, W, 2]; both [B].

    As of `F.affine_grid`, which takes three times as long on a CPU.
    """
    down, right = ((2 * torch.arange(side, device=angle.device) + 1) / side - 1 for side in (height, width))
    down = down[:, None]
    along, across = (part[:, None, None] for part in (scale * angle.cos(), scale * angle.sin()))
    return torch.stack(
        (along * right - across * (height / width) * down, along * down + across * (width / height) * right), -1
    )


def _deviation_and_mean(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel of [B, C, H, W], each [1, C, 1, 1]. Over rows of pixels: a sum over few channels is slow."""
    channels, width = inputs.shape[1], inputs.shape[3]
    rows = inputs.permute(0, 2, 3, 1).flatten(0, 1).flatten(1)  # [B H, W C]
    mean = rows.mean(0).view(width, channels).mean(0)
    variance = (rows - mean.repeat(width)).square().mean(0).view(width, channels).mean(0)
    return variance.sqrt().view(1, -1, 1, 1), mean.view(1, -1, 1, 1)
