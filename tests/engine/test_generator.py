import pytest
import torch
from torch import Tensor

from engine.generator import Generator


def build(*image_shape: int, latent: int = 16, width: int = 2, leaves: bool = False) -> Generator:
    channels, height, image_width = image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Generator((channels, height, image_width), latent=latent, width=width, leaves=leaves)


def latents(number: int) -> Tensor:
    return torch.randn(number, 16, generator=torch.Generator().manual_seed(0))


def some_leaves(number: int, *image_shape: int) -> Tensor:
    return 255 * torch.rand(number, *image_shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "image_shape",
    [
        *((channels, 16, 16) for channels in (1, 2, 3, 4)),
        (1, 17, 17),
        (1, 28, 28),
        (3, 32, 32),
        (2, 33, 47),
        (1, 16, 200),
        (4, 200, 16),
        (3, 64, 64),
        (3, 224, 224),
        (1, 512, 512),
        (1, 511, 16),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("leaves", [False, True])
def test_images_have_the_shape_asked_for_and_values_in_range(image_shape: tuple[int, int, int], leaves: bool) -> None:
    pixels = build(*image_shape, leaves=leaves)(latents(3), some_leaves(3, *image_shape) if leaves else None)
    assert pixels.shape == (3, *image_shape)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pixels.std() > 0.1  # not grey


def test_first_images_use_the_whole_range() -> None:
    pixels = build(3, 32, 32)(latents(64))
    assert pixels.quantile(0.05) < 0.1
    assert pixels.quantile(0.95) > 0.9
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.full((3,), 0.5), atol=0.05, rtol=0)


def test_cropping_takes_the_centre() -> None:
    whole, cropped = build(1, 32, 32), build(1, 30, 29)
    cropped.load_state_dict(whole.state_dict())
    z, painted = latents(2), []
    for network in (whole, cropped):
        network.paint.register_forward_pre_hook(lambda layer, inputs: painted.append(inputs[0]))
        network(z)
    assert torch.equal(painted[1], painted[0][:, :, 1:31, 1:30])  # a pixel is cut at the top and at the left


def test_different_latents_give_different_images_and_gradients_reach_them() -> None:
    network, z = build(1, 16, 16), latents(4).requires_grad_()
    pixels = network(z)
    assert (pixels[0] - pixels[1]).abs().mean() > 0.05
    (pixels * torch.linspace(-1, 1, 16)).sum().backward()
    assert (z.grad != 0).all()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_different_leaves_give_different_images_that_resemble_them() -> None:
    network, z = build(3, 32, 32, leaves=True), latents(1).expand(8, -1)
    painted_over = some_leaves(8, 3, 32, 32)
    pixels = network(z, painted_over)
    assert (pixels[0] - pixels[1]).abs().mean() > 0.1
    assert torch.corrcoef(torch.stack((pixels.flatten(), painted_over.flatten())))[0, 1] > 0.5
    pixels.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_both_last_convolutions_see_the_leaves() -> None:
    network, painted_over, seen = build(3, 16, 16, leaves=True), some_leaves(4, 3, 16, 16), []
    for layer in (network.paint, network.to_pixels):
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0][:, -3:]))
    network(latents(4), painted_over)
    expected = (painted_over - painted_over.mean((0, 2, 3), keepdim=True)) / painted_over.std((0, 2, 3), keepdim=True)
    for inputs in seen:
        torch.testing.assert_close(inputs, expected, atol=1e-2, rtol=0)
    assert len(seen) == 2


@pytest.mark.parametrize("leaves", [False, True])
def test_leaves_and_a_generator_that_has_none_do_not_go_together(leaves: bool) -> None:
    with pytest.raises(ValueError, match="built with them"):
        build(3, 16, 16, leaves=leaves)(latents(4), None if leaves else some_leaves(4, 3, 16, 16))


@pytest.mark.parametrize("scale", [1 / 255, 10.0])
def test_leaves_have_any_scale(scale: float) -> None:
    network, z, painted_over = build(3, 16, 16, leaves=True), latents(4), some_leaves(4, 3, 16, 16)
    torch.testing.assert_close(network(z, scale * painted_over + 3), network(z, painted_over), atol=1e-3, rtol=0)


@pytest.mark.parametrize("leaves", [False, True])
def test_nothing_is_carried_from_batch_to_batch(leaves: bool) -> None:
    network, z = build(1, 16, 16, leaves=leaves), latents(4)
    painted_over, others = (some_leaves(number, 1, 16, 16) if leaves else None for number in (4, 8))
    first = network(z, painted_over)
    network(torch.randn(8, 16), others)
    network.eval()
    assert torch.equal(network(z, painted_over), first)
    assert not list(network.buffers())


def test_width_and_latent_are_as_asked() -> None:
    network = build(3, 32, 32, latent=40, width=6)
    assert network.project.in_features == 40
    assert (network.to_pixels.in_channels, network.to_pixels.out_channels) == (6, 3)
    assert build(3, 32, 32, width=6, leaves=True).to_pixels.in_channels == 6 + 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("leaves", [False, True])
def test_channels_last_in_memory_up_to_the_last_layer(leaves: bool, channels: int) -> None:
    network = build(channels, 32, 32, width=4, leaves=leaves).to(memory_format=torch.channels_last)
    formats = []
    for layer in (network.paint, network.to_pixels):
        layer.register_forward_pre_hook(
            lambda layer, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    network(latents(2), some_leaves(2, channels, 32, 32) if leaves else None)
    assert formats == [True, True]
