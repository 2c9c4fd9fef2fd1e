"""Depthwise convolutions that are differentiated in bfloat16 on a CPU, where two gradients have no fast kernel.

The gradient by the input of a depthwise convolution with a stride takes 20 to 110 times as long as of one without, that
by a kernel above 3x3 up to five times as long as in float32 (docs/experiments.md): a third of a MobileNetV2's step.
Both are computed in another way here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.layers import among_zeros, every, layout_of

CONVOLUTIONS = {F.conv2d, torch.ops.aten.conv2d.default}  # of a module, and of an exported graph
TYPES = {torch.float32, torch.bfloat16}  # that autocast takes for bfloat16
LARGEST_QUICK_KERNEL = 3

Pair = tuple[int, int]


class QuickDepthwise(TorchFunctionMode):
    """A context in which depthwise convolutions have quick gradients where autocast takes them for bfloat16 on a CPU.

    Those of the usual kind: one kernel a channel, without a dilation or a padding that says "same". Calls from
    TorchScript are not seen; functions of torch.func do not go through.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in CONVOLUTIONS:
            func = _conv2d
        return func(*args, **(kwargs or {}))


class DepthwiseConvolution(torch.autograd.Function):
    """F.conv2d with one kernel a channel, and with gradients of its own."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, kernels: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
        """[B, C, H, W] and [C, 1, K, L] to [B, C, (H + 2 P - K) // stride + 1, ...]."""
        ctx.save_for_backward(images, kernels)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, kernels, bias, stride, padding, 1, len(kernels))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """By the images as of the convolution without the stride; by large kernels in float32."""
        images, kernels = ctx.saved_tensors
        by_images = by_kernels = by_bias = None
        if ctx.needs_input_grad[0]:
            everywhere = _without_stride(upstream, images, kernels, ctx.stride, ctx.padding)
            by_images, _ = _gradients(everywhere, images, kernels, (1, 1), ctx.padding, of=(True, False))
        if ctx.needs_input_grad[1]:
            tensors = upstream, images, kernels
            if max(kernels.shape[2:]) > LARGEST_QUICK_KERNEL:
                tensors = upstream.float(), images.float(), kernels.float()
            _, by_kernels = _gradients(*tensors, ctx.stride, ctx.padding, of=(False, True))
        if ctx.needs_input_grad[2]:
            by_bias = upstream.sum((0, 2, 3))
        return by_images, by_kernels, by_bias, None, None


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Iterable[int] = 1,
    padding: str | int | Iterable[int] = 0,
    dilation: int | Iterable[int] = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv2d, with quick gradients where one of its own would be slow."""
    is_slow = (
        _is_depthwise(input, weight, groups)
        and _is_learned_in_bfloat16(input, weight)
        and (max(_pair(stride)) > 1 or max(weight.shape[2:]) > LARGEST_QUICK_KERNEL)
    )
    if not is_slow or padding == "same" or max(_pair(dilation)) > 1:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    images, kernels, offset = (None if t is None else t.to(torch.bfloat16) for t in (input, weight, bias))
    places = (0, 0) if isinstance(padding, str) else _pair(padding)  # "valid"
    out: Tensor = DepthwiseConvolution.apply(images, kernels, offset, _pair(stride), places)
    return out


def _is_depthwise(images: Tensor, kernels: Tensor, groups: int) -> bool:
    """Whether it is a batch of images, and a kernel for each of their channels."""
    return images.dim() == kernels.dim() == 4 and 1 < groups == len(kernels) == images.shape[1]


def _is_learned_in_bfloat16(images: Tensor, kernels: Tensor) -> bool:
    """Whether a gradient is wanted of what autocast computes in bfloat16 on a CPU; a network may have it off."""
    return (
        torch.is_grad_enabled()
        and (images.requires_grad or kernels.requires_grad)
        and images.device.type == kernels.device.type == "cpu"
        and {images.dtype, kernels.dtype} <= TYPES
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _without_stride(upstream: Tensor, images: Tensor, kernels: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The gradient of a convolution's output as that of the same convolution without its stride."""
    if stride == (1, 1):
        return upstream
    size = (n + 2 * p - k + 1 for n, p, k in zip(images.shape[2:], padding, kernels.shape[2:], strict=True))
    return among_zeros(upstream, (*upstream.shape[:2], *size), every(stride), layout_of(images))


def _gradients(
    upstream: Tensor, images: Tensor, kernels: Tensor, stride: Pair, padding: Pair, *, of: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's gradients of a depthwise convolution, by the images and by the kernels."""
    by_images, by_kernels, _ = torch.ops.aten.convolution_backward(
        upstream, images, kernels, None, stride, padding, (1, 1), False, (0, 0), len(kernels), (*of, False)
    )
    return by_images, by_kernels


def _pair(value: int | Iterable[int]) -> Pair:
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    return int(values[0]), int(values[-1])
