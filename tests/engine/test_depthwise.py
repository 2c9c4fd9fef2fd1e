from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.depthwise import QuickDepthwise
from engine.device import Compute
from engine.layers import layout_of

CHANNELS = 6
QUICK = "DepthwiseConvolutionBackward"
BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def depthwise(kernel: int | tuple[int, ...] = 3, stride: int | tuple[int, ...] = 2, **arguments: Any) -> nn.Conv2d:
    """A convolution whose weights bfloat16 can say exactly: only sums are rounded."""
    usual = {"in_channels": CHANNELS, "out_channels": CHANNELS, "groups": CHANNELS, "bias": False}
    layer = nn.Conv2d(kernel_size=kernel, stride=stride, **{**usual, **arguments})  # type: ignore[arg-type]
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=7 + number).bfloat16())
    return layer


class Differentiated(TorchDispatchMode):
    """Notes how convolutions are differentiated: the type, the stride, the layout, and by what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.dtype, list[int], bool, list[bool]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            upstream, stride, by = args[0], args[4], args[10]
            last = upstream.is_contiguous(memory_format=torch.channels_last)
            self.calls.append((upstream.dtype, list(stride), last, list(by)[:2]))
        return func(*args, **(kwargs or {}))


def gradients(layer: nn.Conv2d, images: Tensor, *, quick: bool) -> tuple[Tensor, ...]:
    """Output and gradients by images and parameters: in float32, or in bfloat16 within the context."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    if quick:
        with BFLOAT16.autocast():
            out = layer(images)
    else:
        out = layer(images)
    weights = noise(*out.shape, seed=2).contiguous(memory_format=layout_of(out))
    return (out.float().detach(), *torch.autograd.grad((weights * out).sum(), [images, *layer.parameters()]))


@pytest.mark.parametrize(("last", "bias"), [(False, True), (True, False)], ids=["contiguous, bias", "channels_last"])
@pytest.mark.parametrize("padding", [0, 1, (2, 0), "valid"], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (2, 3)], ids=str)
@pytest.mark.parametrize("kernel", [3, 5, (3, 5), (1, 3), (3, 2), 1], ids=str)
def test_gradients_are_those_of_the_convolution(
    kernel: int | tuple[int, int], stride: int | tuple[int, int], padding: Any, last: bool, bias: bool
) -> None:
    layer = depthwise(kernel, stride, padding=padding, bias=bias)
    images = noise(4, CHANNELS, 9, 12, seed=1).bfloat16().float()
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    for exact, quick in zip(gradients(layer, images, quick=False), gradients(layer, images, quick=True), strict=True):
        assert quick.dtype == torch.float32
        assert quick.shape == exact.shape
        torch.testing.assert_close(quick, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def test_the_slow_kernels_are_not_asked() -> None:
    images = noise(2, CHANNELS, 9, 9, seed=1).contiguous(memory_format=torch.channels_last)
    with Differentiated() as small:
        gradients(depthwise(3, 2), images, quick=True)
    with Differentiated() as large:
        gradients(depthwise(5, 1), images, quick=True)
    half, full = torch.bfloat16, torch.float32
    assert small.calls == [(half, [1, 1], True, [True, False]), (half, [2, 2], True, [False, True])]
    assert large.calls == [(half, [1, 1], True, [True, False]), (full, [1, 1], True, [False, True])]


@pytest.mark.parametrize("learns", ["images", "kernels"])
def test_what_is_frozen_has_no_gradient(learns: str) -> None:
    layer = depthwise().requires_grad_(learns == "kernels")
    images = noise(2, CHANNELS, 9, 9).requires_grad_(learns == "images")
    with BFLOAT16.autocast():
        out = layer(images)
    with Differentiated() as asked:
        out.float().sum().backward()
    assert [by for *_, by in asked.calls] == [[learns == "images", learns == "kernels"]]
    if learns == "images":
        expected = F.conv_transpose2d(torch.ones(2, CHANNELS, 4, 4), layer.weight, stride=2, groups=CHANNELS)
        torch.testing.assert_close(images.grad, expected, rtol=0.02, atol=0.02)


def test_an_output_with_a_gradient_is_the_one_without() -> None:
    layer, images = depthwise(bias=True), noise(2, CHANNELS, 9, 9)
    with BFLOAT16.autocast():
        learned = layer(images)
        with torch.no_grad():
            assert torch.equal(learned, layer(images))
    assert learned.grad_fn.name() == QUICK


@pytest.mark.parametrize(
    ("arguments", "quick"),
    [
        ({}, True),
        ({"kernel": 5, "stride": 1}, True),
        ({"kernel": 5, "stride": 1, "padding": "same"}, False),
        ({"dilation": 2}, False),
        ({"stride": 1}, False),
        ({"groups": 1}, False),
        ({"groups": CHANNELS // 2}, False),
        ({"out_channels": 2 * CHANNELS}, False),
    ],
    ids=str,
)
def test_other_convolutions_are_pytorchs_own(arguments: dict[str, Any], quick: bool) -> None:
    layer = depthwise(**arguments)
    with BFLOAT16.autocast():
        out = layer(noise(2, CHANNELS, 9, 9))
    assert out.dtype == torch.bfloat16
    assert (out.grad_fn.name() == QUICK) is quick


def test_who_switches_autocast_off_has_it_off() -> None:
    layer, images = depthwise(), noise(2, CHANNELS, 9, 9)
    with BFLOAT16.autocast():
        with torch.autocast("cpu", enabled=False):
            assert layer(images).dtype == torch.float32
        assert depthwise().double()(images.double()).dtype == torch.float64
        assert layer.to("meta")(images.to("meta")).dtype != torch.float64
    with QuickDepthwise():
        assert depthwise()(images).dtype == torch.float32


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    with BFLOAT16.autocast():
        assert not depthwise().requires_grad_(False)(noise(2, CHANNELS, 9, 9)).requires_grad
        with torch.no_grad():
            assert not depthwise()(noise(2, CHANNELS, 9, 9)).requires_grad


def test_an_image_without_a_batch_and_a_wrong_one_are_pytorchs_own_business() -> None:
    with BFLOAT16.autocast():
        assert depthwise()(noise(CHANNELS, 9, 9)).shape == (CHANNELS, 4, 4)
        with pytest.raises(RuntimeError, match="to have 6 channels"):
            depthwise()(noise(2, CHANNELS + 1, 9, 9))


def test_float32_has_its_own_gradients() -> None:
    with Compute(torch.device("cpu"), None).autocast():
        out = depthwise()(noise(2, CHANNELS, 9, 9))
    assert out.dtype == torch.float32
    assert out.grad_fn.name() == "ConvolutionBackward0"


def test_the_convolution_of_an_exported_graph_is_seen() -> None:
    kernels = noise(CHANNELS, 1, 3, 3, seed=1).requires_grad_()
    with BFLOAT16.autocast():
        arguments = None, [2, 2], [1, 1], [1, 1], CHANNELS
        out = torch.ops.aten.conv2d.default(noise(2, CHANNELS, 8, 8), kernels, *arguments)
    assert out.shape == (2, CHANNELS, 4, 4)
    assert out.grad_fn.name() == QUICK
