"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381) for small images, in the two forms that are published for CIFAR.

Both have stride 1 in the stem and in the second stage: a 32 px image ends in 4x4 positions.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers import global_average, initialise_convolutions

MOBILENETV2_STAGES = (  # expansion, channels, blocks, stride; the second stage's stride is 2 for ImageNet
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _divisible_by_8(value: float) -> int:
    """The nearest multiple of 8, not more than a tenth below `value`."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def _conv_bn_relu6(channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand with 1x1, filter each channel with 3x3, project with 1x1; added to the input where the shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.conv = nn.Sequential(
            *([_conv_bn_relu6(channels_in, hidden, 1)] if expansion > 1 else []),
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.is_residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels_out, H / stride, W / stride]."""
        out = self.conv(x)
        return cast(Tensor, x + out if self.is_residual else out)


class MobileNetV2(nn.Module):
    """MobileNetV2 under torchvision's layer names; `width` multiplies the number of channels."""

    def __init__(self, classes: int, channels: int, *, width: float = 1.0) -> None:
        super().__init__()
        current = _divisible_by_8(32 * width)
        last = _divisible_by_8(1280 * max(1.0, width))
        layers = [_conv_bn_relu6(channels, current, 3)]
        for expansion, stage_channels, blocks, stride in MOBILENETV2_STAGES:
            for block in range(blocks):
                channels_out = _divisible_by_8(stage_channels * width)
                layers.append(InvertedResidual(current, channels_out, stride if block == 0 else 1, expansion))
                current = channels_out
        self.features = nn.Sequential(*layers, _conv_bn_relu6(current, last, 1))
        # Identity stands where the published network has dropout.
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(last, classes))
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        return cast(Tensor, self.classifier(global_average(self.features(images))))


class ProjectedInvertedResidual(nn.Module):
    """An inverted residual with ReLU that expands even by 1, and projects its shortcut where the widths differ."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.conv1 = nn.Conv2d(channels_in, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = nn.Sequential()
            if channels_in != channels_out:
                projection = nn.Conv2d(channels_in, channels_out, 1, bias=False)
                self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels_out, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return cast(Tensor, out if self.shortcut is None else out + self.shortcut(x))


class ProjectedMobileNetV2(nn.Module):
    """MobileNetV2 with projected shortcuts and ReLU, under the layer names of the usual CIFAR training code."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        current = 32
        for expansion, channels_out, count, stride in MOBILENETV2_STAGES:
            for block in range(count):
                blocks.append(ProjectedInvertedResidual(current, channels_out, stride if block == 0 else 1, expansion))
                current = channels_out
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(current, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        x = self.layers(F.relu(self.bn1(self.conv1(images))))
        x = F.relu(self.bn2(self.conv2(x)))
        return cast(Tensor, self.linear(global_average(x)))
