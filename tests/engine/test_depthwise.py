import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.depthwise import QuickDepthwise
from engine.device import Compute

CHANNELS = 6
QUICK = "DepthwiseConvolutionBackward"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(layer: nn.Conv2d, images: Tensor, *, quick: bool) -> tuple[Tensor, ...]:
    """Output and gradients by images and parameters: in float32, or in bfloat16 within the context."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    if quick:
        with Compute(torch.device("cpu"), torch.bfloat16).autocast():
            out = layer(images)
    else:
        out = layer(images)
    weights = noise(*out.shape, seed=2)
    return (out.float().detach(), *torch.autograd.grad((weights * out).sum(), [images, *layer.parameters()]))


@pytest.mark.parametrize(("last", "bias"), [(False, True), (True, False)], ids=["contiguous, bias", "channels_last"])
@pytest.mark.parametrize("padding", [0, 1, (2, 0)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (2, 3)], ids=str)
@pytest.mark.parametrize("kernel", [3, 5, (3, 5), (1, 3), (3, 2), 1], ids=str)
def test_gradients_are_those_of_the_convolution(
    kernel: int | tuple[int, int], stride: int | tuple[int, int], padding: int | tuple[int, ...], last: bool, bias: bool
) -> None:
    layer = nn.Conv2d(CHANNELS, CHANNELS, kernel, stride, groups=CHANNELS, bias=bias)
    layer.padding = padding  # type: ignore[assignment]
    images = noise(4, CHANNELS, 9, 12, seed=1)
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    with torch.no_grad():  # what bfloat16 can say exactly: only sums are rounded
        images = images.bfloat16().float()
        for parameter in layer.parameters():
            parameter.copy_(parameter.bfloat16())
    for exact, quick in zip(gradients(layer, images, quick=False), gradients(layer, images, quick=True), strict=True):
        assert quick.dtype == torch.float32
        assert quick.shape == exact.shape
        torch.testing.assert_close(quick, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("arguments", "quick"),
    [
        ({"stride": 2}, True),
        ({"kernel_size": 5}, True),
        ({"kernel_size": 5, "padding": "same"}, False),
        ({"stride": 2, "dilation": 2}, False),
        ({}, False),
        ({"stride": 2, "groups": 1}, False),
        ({"stride": 2, "groups": CHANNELS // 2}, False),
        ({"stride": 2, "out_channels": 2 * CHANNELS}, False),
    ],
    ids=str,
)
def test_only_slow_convolutions_are_computed_in_another_way(arguments: dict[str, object], quick: bool) -> None:
    usual = {"in_channels": CHANNELS, "out_channels": CHANNELS, "kernel_size": 3, "groups": CHANNELS, "bias": False}
    layer = nn.Conv2d(**{**usual, **arguments})  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16), QuickDepthwise():
        out = layer(noise(2, CHANNELS, 9, 9))
    assert out.dtype == torch.bfloat16
    assert (out.grad_fn.name() == QUICK) is quick


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, groups=CHANNELS).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), QuickDepthwise():
        assert not layer(noise(2, CHANNELS, 9, 9)).requires_grad
        with torch.no_grad():
            assert not layer(noise(2, CHANNELS, 9, 9).requires_grad_()).requires_grad


def test_an_image_without_a_batch_and_a_wrong_one_are_pytorchs_own_business() -> None:
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, groups=CHANNELS)
    with torch.autocast("cpu", torch.bfloat16), QuickDepthwise():
        assert layer(noise(CHANNELS, 9, 9)).shape == (CHANNELS, 4, 4)
        with pytest.raises(RuntimeError, match="to have 6 channels"):
            layer(noise(2, CHANNELS + 1, 9, 9))


def test_a_frozen_convolution_has_a_gradient_by_its_images_alone() -> None:
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, groups=CHANNELS, bias=False).requires_grad_(False)
    images = noise(2, CHANNELS, 9, 9).requires_grad_()
    with Compute(torch.device("cpu"), torch.bfloat16).autocast():
        out = layer(images)
    assert out.grad_fn is not None
    assert out.grad_fn.name() == QUICK
    out.float().sum().backward()
    assert layer.weight.grad is None
    expected = F.conv_transpose2d(torch.ones(2, CHANNELS, 4, 4), layer.weight, stride=2, groups=CHANNELS)
    torch.testing.assert_close(images.grad, expected, rtol=0.02, atol=0.02)


def test_float32_has_its_own_gradients() -> None:
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, groups=CHANNELS)
    with Compute(torch.device("cpu"), None).autocast():
        out = layer(noise(2, CHANNELS, 9, 9))
    assert out.dtype == torch.float32
    assert out.grad_fn.name() == "ConvolutionBackward0"


def test_the_convolution_of_an_exported_graph_is_seen() -> None:
    kernels = noise(CHANNELS, 1, 3, 3, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), QuickDepthwise():
        arguments = None, [2, 2], [1, 1], [1, 1], CHANNELS
        out = torch.ops.aten.conv2d.default(noise(2, CHANNELS, 8, 8), kernels, *arguments)
    assert out.shape == (2, CHANNELS, 4, 4)
    assert out.grad_fn.name() == QUICK
