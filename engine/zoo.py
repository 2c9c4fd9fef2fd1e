"""The CIFAR families of networks, for teachers as people publish them and for students.

The layer names are those of the widely used checkpoints, so that a published file fits by name. All networks take
images [B, C, H, W] from 16 px up and end in a global average pool. ZOO maps each name to a builder; nothing is built on
import.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers import Part, every, global_average, initialise_convolutions
from engine.mobilenets import MobileNetV2, ProjectedMobileNetV2


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


def _stem_pool(stem_stride: int) -> nn.Module:
    return nn.MaxPool2d(3, 2, padding=1) if stem_stride == 4 else nn.Identity()


# ResNet (He et al. 2016, arXiv 1512.03385): CIFAR's three-stage networks, and ResNet-18/34 with a 3x3 stem


class ZeroPaddedShortcut(nn.Module):
    """Option A of the paper: every `stride`-th pixel, and zero channels on both sides; no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.padding = (0, 0, 0, 0, new_channels // 2, new_channels - new_channels // 2)
        self.places = every((stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + new_channels, H / stride, W / stride]."""
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        # A trace holds no function of Python.
        pixels = x[self.places] if is_traced else Part.apply(x, self.places)
        return F.pad(pixels, self.padding)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; `projection` is the paper's option B (1x1 convolution), else option A."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = (
                nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))
                if projection
                else ZeroPaddedShortcut(channels_out - channels_in, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels_out, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Three or four stages of residual blocks, one entry of `blocks` and `widths` each; `stem_stride` is 1 or 4."""

    def __init__(
        self,
        classes: int,
        channels: int,
        *,
        blocks: Sequence[int],
        widths: Sequence[int],
        projection: bool,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        stages = [
            nn.Sequential(
                *(
                    ResidualBlock(
                        widths[max(0, stage - 1)] if block == 0 else widths[stage],
                        widths[stage],
                        2 if block == 0 and stage > 0 else 1,
                        projection,
                    )
                    for block in range(count)
                )
            )
            for stage, count in enumerate(blocks)
        ]
        self.conv1 = _conv3x3(channels, widths[0], min(stem_stride, 2))
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stem_pool = _stem_pool(stem_stride)
        self.layer1, self.layer2, self.layer3 = stages[:3]
        self.layer4 = stages[3] if len(stages) == 4 else nn.Identity()
        self.linear = nn.Linear(widths[-1], classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        x = self.stem_pool(F.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, self.linear(global_average(x)))


def resnet_cifar(
    classes: int, channels: int, *, depth: int, width: int = 16, projection: bool = False, stem_stride: int = 1
) -> nn.Module:
    """ResNet-`depth` for CIFAR (depth = 6n + 2) with widths of 1, 2 and 4 times `width`."""
    blocks = (depth - 2) // 6
    return ResNet(
        classes,
        channels,
        blocks=(blocks,) * 3,
        widths=(width, 2 * width, 4 * width),
        projection=projection,
        stem_stride=stem_stride,
    )


def resnet_small_stem(classes: int, channels: int, *, blocks: Sequence[int], width: int = 64) -> nn.Module:
    """ResNet-18 or -34 (`blocks`: of each of the four stages) with a 3x3 stem of stride 1 and no pooling behind it."""
    widths = (width, 2 * width, 4 * width, 8 * width)
    return ResNet(classes, channels, blocks=blocks, widths=widths, projection=True)


# Wide ResNet (Zagoruyko and Komodakis 2016, arXiv 1605.07146)


class PreactivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; a shortcut that changes the width starts behind them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = _conv3x3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = _conv3x3(channels_out, channels_out)
        self.convShortcut = (
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if channels_in != channels_out else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels_out, H / stride, W / stride]."""
        activated = F.relu(self.bn1(x))
        out = F.relu(self.bn2(self.conv1(activated)))
        return cast(Tensor, self.conv2(out) + (x if self.convShortcut is None else self.convShortcut(activated)))


class WideStage(nn.Module):
    """The blocks of one resolution, under the name `layer`, as the published files have it."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            PreactivationBlock(channels_in, channels_out, stride),
            *(PreactivationBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, channels_out, H / stride, W / stride]."""
        return cast(Tensor, self.layer(x))


class WideResNet(nn.Module):
    """WRN-`depth`-`widen` (depth = 6n + 4); `stem_stride` is 1 or 4."""

    def __init__(self, classes: int, channels: int, *, depth: int, widen: int, stem_stride: int = 1) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = _conv3x3(channels, 16, min(stem_stride, 2))
        self.stem_pool = _stem_pool(stem_stride)
        self.block1 = WideStage(16, 16 * widen, blocks, stride=1)
        self.block2 = WideStage(16 * widen, 32 * widen, blocks, stride=2)
        self.block3 = WideStage(32 * widen, 64 * widen, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        x = self.stem_pool(self.conv1(images))
        x = self.block3(self.block2(self.block1(x)))
        return cast(Tensor, self.fc(global_average(F.relu(self.bn1(x)))))


# VGG with BatchNorm (Simonyan and Zisserman 2015, arXiv 1409.1556)

VGG_CONVOLUTIONS = {  # of each of the five stages, whose widths are 64, 128, 256, 512 and 512
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def _vgg_stages(channels: int, depth: int, width: int) -> Iterable[list[nn.Module]]:
    for convolutions, factor in zip(VGG_CONVOLUTIONS[depth], (1, 2, 4, 8, 8), strict=True):
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += [
                nn.Conv2d(channels, factor * width, 3, padding=1),
                nn.BatchNorm2d(factor * width),
                nn.ReLU(),
            ]
            channels = factor * width
        yield layers


class HalvingPool(nn.Module):
    """2x2 max pooling that leaves a map of one pixel as it is, so that inputs below 32 px pass five of them."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return F.max_pool2d(x, 2) if min(x.shape[2:]) > 1 else x


class VGG(nn.Module):
    """VGG-`depth` as most people have it for CIFAR: `features`, five poolings; `hidden`: width of two more layers."""

    def __init__(self, classes: int, channels: int, *, depth: int, width: int = 64, hidden: int = 0) -> None:
        super().__init__()
        stages = _vgg_stages(channels, depth, width)
        self.features = nn.Sequential(*(layer for stage in stages for layer in [*stage, HalvingPool()]))
        self.classifier: nn.Module = nn.Linear(8 * width, classes)
        if hidden:
            # Identity stands where the published networks have dropout: the layers' numbers are part of their names.
            self.classifier = nn.Sequential(
                *(nn.Linear(8 * width, hidden), nn.ReLU(), nn.Identity()),
                *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Identity()),
                nn.Linear(hidden, classes),
            )
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        return cast(Tensor, self.classifier(global_average(self.features(images))))


class BlockVGG(nn.Module):
    """VGG-`depth` as the distillation papers have it: `block0` to `block4`, and no pooling before the last at 32 px."""

    def __init__(self, classes: int, channels: int, *, depth: int, width: int = 64) -> None:
        super().__init__()
        # The last ReLU of each stage stands in forward(): the published blocks end in their BatchNorm.
        stages = [nn.Sequential(*layers[:-1]) for layers in _vgg_stages(channels, depth, width)]
        self.block0, self.block1, self.block2, self.block3, self.block4 = stages
        self.classifier = nn.Linear(8 * width, classes)
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        x = F.max_pool2d(F.relu(self.block0(images)), 2)
        x = F.max_pool2d(F.relu(self.block1(x)), 2)
        x = F.max_pool2d(F.relu(self.block2(x)), 2)
        x = F.relu(self.block3(x))
        x = F.max_pool2d(x, 2) if images.shape[2] >= 64 else x
        return cast(Tensor, self.classifier(global_average(F.relu(self.block4(x)))))


Builder = Callable[[int, int], nn.Module]

ZOO: dict[str, Builder] = {  # name -> build(classes, channels)
    **{f"resnet{depth}": partial(resnet_cifar, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{
        f"resnet{depth}_b": partial(resnet_cifar, depth=depth, projection=True)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "resnet18_cifar": partial(resnet_small_stem, blocks=(2, 2, 2, 2)),
    "resnet34_cifar": partial(resnet_small_stem, blocks=(3, 4, 6, 3)),
    **{
        f"wrn{depth}_{widen}": partial(WideResNet, depth=depth, widen=widen)
        for depth in (10, 16, 22, 28, 34, 40)
        for widen in (1, 2, 4, 8, 10)
    },
    **{f"vgg{depth}": partial(VGG, depth=depth) for depth in VGG_CONVOLUTIONS},
    **{f"vgg{depth}_hidden": partial(VGG, depth=depth, hidden=512) for depth in VGG_CONVOLUTIONS},
    **{f"vgg{depth}_blocks": partial(BlockVGG, depth=depth) for depth in VGG_CONVOLUTIONS},
    "mobilenetv2_cifar": MobileNetV2,
    "mobilenetv2_cifar_projected": ProjectedMobileNetV2,
    **{
        f"mobilenetv2_cifar_x{str(width).replace('.', '_')}": partial(MobileNetV2, width=width)
        for width in (0.5, 0.75, 1.4)
    },
}
