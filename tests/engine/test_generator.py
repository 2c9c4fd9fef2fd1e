import pytest
import torch
from torch import nn

from engine.generator import Generator


def build(*image_shape: int, latent: int = 16, width: int = 2) -> Generator:
    channels, height, image_width = image_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Generator((channels, height, image_width), latent=latent, width=width)


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
def test_images_have_the_shape_asked_for_and_values_in_range(image_shape: tuple[int, int, int]) -> None:
    pixels = build(*image_shape)(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    assert pixels.shape == (3, *image_shape)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pixels.std() > 0.1  # not grey


def test_first_images_use_the_whole_range() -> None:
    pixels = build(3, 32, 32)(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    assert pixels.quantile(0.05) < 0.1
    assert pixels.quantile(0.95) > 0.9
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.full((3,), 0.5), atol=0.05, rtol=0)


def test_cropping_takes_the_centre() -> None:
    whole, cropped = build(1, 32, 32), build(1, 30, 29)
    cropped.load_state_dict(whole.state_dict())
    whole.pixel_norm, cropped.pixel_norm = nn.Identity(), nn.Identity()  # it normalises over what is left
    z = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    # One pixel is left after the cut at the top and at the left; the last convolution pads the edge of the crop.
    torch.testing.assert_close(cropped(z)[:, :, 1:-1, 1:-1], whole(z)[:, :, 2:30, 2:29])


def test_different_latents_give_different_images_and_gradients_reach_them() -> None:
    network, z = build(1, 16, 16), torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pixels = network(z)
    assert (pixels[0] - pixels[1]).abs().mean() > 0.05
    (pixels * torch.linspace(-1, 1, 16)).sum().backward()
    assert (z.grad != 0).all()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_nothing_is_carried_from_batch_to_batch() -> None:
    network, z = build(1, 16, 16), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    first = network(z)
    network(torch.randn(8, 16))
    network.eval()
    assert torch.equal(network(z), first)
    assert not list(network.buffers())


def test_width_and_latent_are_as_asked() -> None:
    network = build(3, 32, 32, latent=40, width=6)
    assert network.project.in_features == 40
    assert (network.to_pixels.in_channels, network.to_pixels.out_channels) == (6, 3)


def test_channels_last_in_memory_up_to_the_last_layer() -> None:
    network = build(3, 32, 32, width=4).to(memory_format=torch.channels_last)
    formats = []
    network.to_pixels.register_forward_pre_hook(
        lambda layer, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    network(torch.randn(2, 16))
    assert formats == [True]
