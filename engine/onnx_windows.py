"""ONNX's convolutions and poolings in PyTorch: paddings that differ by side, or depend on the size."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Ints = Sequence[int]


def _padded(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints, pads: Ints, auto_pad: str, fill: float) -> Tensor:
    """ONNX pads are (all begins, all ends); SAME pads depend on the size, the odd pixel at the end or the beginning."""
    spatial = len(kernel)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max(0, (math.ceil(size / stride) - 1) * stride + dilation * (width - 1) + 1 - size)
            for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
        ]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = [*small, *large] if auto_pad == "SAME_UPPER" else [*large, *small]
    pads = list(pads or [0] * 2 * spatial)
    if not any(pads):
        return x
    both = [side for axis in reversed(range(spatial)) for side in (pads[axis], pads[axis + spatial])]
    return F.pad(x, both, value=fill)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Ints = (),
    pads: Ints = (),
    dilations: Ints = (),
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: Ints = (),
) -> Tensor:
    """Conv of one or two dimensions."""
    kernel = list(kernel_shape or weight.shape[2:])
    strides, dilations = list(strides or [1] * len(kernel)), list(dilations or [1] * len(kernel))
    half = len(kernel)
    if auto_pad == "NOTSET" and pads and list(pads[:half]) == list(pads[half:]):
        padding = list(pads[:half])
    else:
        x, padding = _padded(x, kernel, strides, dilations, pads, auto_pad, 0.0), [0] * half
    convolve = F.conv2d if half == 2 else F.conv1d
    return convolve(x, weight, bias, strides, padding, dilations, group)


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    strides: Ints = (),
    pads: Ints = (),
    dilations: Ints = (),
    ceil_mode: int = 0,
    auto_pad: str = "NOTSET",
    storage_order: int = 0,
) -> Tensor:
    """MaxPool of two dimensions."""
    del storage_order  # of the indices, which nobody asks for
    strides, dilations = list(strides or [1, 1]), list(dilations or [1, 1])
    if auto_pad == "NOTSET" and list(pads[:2]) == list(pads[2:]):
        return F.max_pool2d(x, list(kernel_shape), strides, list(pads[:2]) or 0, dilations, bool(ceil_mode))
    x = _padded(x, kernel_shape, strides, dilations, pads, auto_pad, -math.inf)
    return F.max_pool2d(x, list(kernel_shape), strides, 0, dilations, bool(ceil_mode))


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Ints,
    strides: Ints = (),
    pads: Ints = (),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
    dilations: Ints = (),
) -> Tensor:
    """AveragePool of two dimensions; padding that is not counted is made up for by the share of real pixels."""
    strides, kernel, dilations = list(strides or [1, 1]), list(kernel_shape), list(dilations or [1, 1])
    if auto_pad == "NOTSET" and list(pads[:2]) == list(pads[2:]):
        return F.avg_pool2d(x, kernel, strides, list(pads[:2]) or 0, bool(ceil_mode), bool(count_include_pad))
    ones = torch.ones_like(x[:1, :1])
    total = F.avg_pool2d(
        _padded(x, kernel, strides, dilations, pads, auto_pad, 0.0), kernel, strides, 0, bool(ceil_mode)
    )
    if count_include_pad:
        return total
    share = F.avg_pool2d(
        _padded(ones, kernel, strides, dilations, pads, auto_pad, 0.0), kernel, strides, 0, bool(ceil_mode)
    )
    return total / share
