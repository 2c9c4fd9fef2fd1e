"""Depthwise convolutions that are differentiated in bfloat16 on a CPU, where two gradients have no fast kernel.

The gradient by the input of a depthwise convolution with a stride takes 20 to 100 times as long as of one without, that
by kernels above 3x3 twice as long as in float32 (docs/experiments.md): a third of a MobileNetV2's step. Both are
computed in another way here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.layers import among_zeros, layout_of

CONVOLUTIONS = {F.conv2d, torch.ops.aten.conv2d.default}  # of a module, and of an exported graph
LARGEST_QUICK_KERNEL = 3

Pair = tuple[int, int]


class QuickDepthwise(TorchFunctionMode):
    """A context, under autocast to bfloat16 on a CPU, in which no depthwise convolution has a slow gradient."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in CONVOLUTIONS:
            func = _conv2d
        return func(*args, **(kwargs or {}))


class DepthwiseConvolution(torch.autograd.Function):
    """F.conv2d with one kernel a channel, without a bias, and with gradients of its own."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, kernels: Tensor, stride: Pair, padding: Pair) -> Tensor:
        """[B, C, H, W] and [C, 1, K, L] to [B, C, (H + 2 P - K) // stride + 1, ...]."""
        ctx.save_for_backward(images, kernels)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, kernels, None, stride, padding, 1, len(kernels))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """By the images as of the convolution without the stride; by large kernels in float32."""
        images, kernels = ctx.saved_tensors
        by_images = by_kernels = None
        if ctx.needs_input_grad[0]:
            everywhere = _without_stride(upstream, images, kernels, ctx.stride, ctx.padding)
            by_images, _ = _gradients(everywhere, images, kernels, (1, 1), ctx.padding, of=(True, False))
        if ctx.needs_input_grad[1]:
            if max(kernels.shape[2:]) > LARGEST_QUICK_KERNEL:
                upstream, images, kernels = upstream.float(), images.float(), kernels.float()
            _, by_kernels = _gradients(upstream, images, kernels, ctx.stride, ctx.padding, of=(False, True))
        return by_images, by_kernels, None, None


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv2d, in bfloat16 where one of its gradients would be slow."""
    is_depthwise = input.dim() == weight.dim() == 4 and 1 < groups == len(weight) == input.shape[1]
    is_learned = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    if not (is_depthwise and is_learned) or isinstance(padding, str) or _pair(dilation) != (1, 1):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if max(_pair(stride)) == 1 and max(weight.shape[2:]) <= LARGEST_QUICK_KERNEL:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    images, kernels = (tensor.to(torch.bfloat16) for tensor in (input, weight))
    out: Tensor = DepthwiseConvolution.apply(images, kernels, _pair(stride), _pair(padding))
    return out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1)


def _without_stride(upstream: Tensor, images: Tensor, kernels: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """The gradient of a convolution's output as that of the same convolution without its stride."""
    if stride == (1, 1):
        return upstream
    size = (n + 2 * p - k + 1 for n, p, k in zip(images.shape[2:], padding, kernels.shape[2:], strict=True))
    return among_zeros(upstream, (*upstream.shape[:2], *size), stride, layout_of(upstream))


def _gradients(
    upstream: Tensor, images: Tensor, kernels: Tensor, stride: Pair, padding: Pair, *, of: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's gradients of a depthwise convolution, by the images and by the kernels."""
    by_images, by_kernels, _ = torch.ops.aten.convolution_backward(
        upstream, images, kernels, None, stride, padding, (1, 1), False, (0, 0), len(kernels), (*of, False)
    )
    return by_images, by_kernels


def _pair(value: int | Iterable[int]) -> Pair:
    if isinstance(value, int):
        return value, value
    values = tuple(value)
    return (values[0], values[-1])
