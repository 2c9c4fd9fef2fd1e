from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.images import normalization, normalize, random_views, render, to_bytes, to_input

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=generator(7), dtype=torch.uint8)


def drawn_views(images: Tensor, indices: Tensor, shift: int, rng: torch.Generator) -> Tensor:
    return render(images, indices, random_views(len(indices), 1, shift, rng)[:, 0])


def every_view(image: Tensor, shift: int) -> dict[tuple[int, int, bool], Tensor]:
    """All views of one image [H, W, C], by padding, cropping and flipping: (rows, columns, flipped) -> [H, W, C]."""
    height, width, _ = image.shape
    padded = F.pad(image.permute(2, 0, 1)[None].float(), (shift,) * 4, mode="replicate")[0].byte().permute(1, 2, 0)
    views = {}
    for down in range(-shift, shift + 1):
        for right in range(-shift, shift + 1):
            crop = padded[down + shift : down + shift + height, right + shift : right + shift + width]
            views[down, right, False], views[down, right, True] = crop, crop.flip(1)
    return views


@pytest.mark.parametrize("shape", [(9, 9, 1), (8, 13, 3), (13, 8, 4)])
def test_each_view_is_a_shifted_crop_of_the_image_asked_for_with_or_without_a_flip(shape: tuple[int, ...]) -> None:
    shift, images = 2, random_bytes(5, *shape)
    indices = torch.randint(5, (800,), generator=generator(1))
    views = drawn_views(images, indices, shift, generator(2))
    assert views.shape == (800, *shape)
    assert views.dtype == torch.uint8
    possible = [every_view(image, shift) for image in images]
    drawn = Counter()
    for view, index in zip(views, indices.tolist(), strict=True):
        matches = [which for which, candidate in possible[index].items() if torch.equal(candidate, view)]
        assert len(matches) == 1
        drawn[matches[0]] += 1
    assert len(drawn) == 2 * (2 * shift + 1) ** 2  # every shift, flipped and not
    assert 320 < sum(count for (_, _, flipped), count in drawn.items() if flipped) < 480


def test_views_without_a_shift_are_the_images_or_their_mirror() -> None:
    images = random_bytes(6, 5, 7, 3)
    views = drawn_views(images, torch.arange(6), 0, generator())
    flipped = [torch.equal(view, image.flip(1)) for view, image in zip(views, images, strict=True)]
    assert all(flip or torch.equal(view, image) for flip, view, image in zip(flipped, views, images, strict=True))
    assert 0 < sum(flipped) < 6


def test_a_view_of_zeros_is_the_image_itself() -> None:
    images = random_bytes(6, 5, 7, 3)
    assert torch.equal(render(images, torch.arange(6), torch.zeros(6, 3, dtype=torch.int64)), images)


def test_a_view_says_where_it_looks() -> None:
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4, 1)
    seen = render(image, torch.zeros(2, dtype=torch.int64), torch.tensor([[1, -1, 0], [0, 2, 1]]))[..., 0]
    assert seen[0].tolist() == [[4, 4, 5, 6], [8, 8, 9, 10], [8, 8, 9, 10]]
    assert seen[1].tolist() == [[3, 3, 3, 2], [7, 7, 7, 6], [11, 11, 11, 10]]


def test_views_depend_on_the_generator_alone() -> None:
    images, indices = random_bytes(4, 8, 8, 1), torch.arange(64) % 4
    torch.manual_seed(0)
    first = drawn_views(images, indices, 2, generator(3))
    torch.manual_seed(1)
    assert torch.equal(first, drawn_views(images, indices, 2, generator(3)))
    assert not torch.equal(first, drawn_views(images, indices, 2, generator(4)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_bytes_survive_the_way_to_pixels_and_back(channels: int) -> None:
    images = random_bytes(16, 6, 9, channels)
    pixels = to_input(images, normalization((0.0,) * channels, (1.0,) * channels, CPU))
    assert pixels.shape == (16, channels, 6, 9)
    assert torch.equal(to_bytes(pixels), images)


def test_bytes_are_rounded_clamped_and_laid_out_with_channels_last() -> None:
    pixels = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 1.5, 128 / 255]).view(1, 2, 2, 2)
    stored = to_bytes(pixels)
    assert stored.dtype == torch.uint8
    assert stored.is_contiguous()
    assert stored[0].permute(2, 0, 1).flatten().tolist() == [0, 0, 0, 1, 255, 255, 255, 128]


def test_to_bytes_leaves_its_argument_alone() -> None:
    pixels = torch.full((1, 1, 2, 2), 0.3)
    to_bytes(pixels)
    assert torch.equal(pixels, torch.full((1, 1, 2, 2), 0.3))


def test_input_is_normalised_per_channel() -> None:
    images = torch.tensor([[0, 51, 255]], dtype=torch.uint8).expand(4, 5, 1, 3)
    inputs = to_input(images, normalization((0.0, 0.5, 0.25), (1.0, 0.25, 0.5), CPU))
    assert inputs.dtype == torch.float32
    for channel, expected in enumerate((0.0, -1.2, 1.5)):
        torch.testing.assert_close(inputs[:, channel], torch.full((4, 5, 1), expected))


def test_input_is_channels_last_in_memory() -> None:
    inputs = to_input(random_bytes(4, 6, 5, 3), normalization((0.5,) * 3, (0.2,) * 3, CPU))
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert not inputs.is_contiguous()


def test_pixels_and_their_bytes_are_normalised_alike() -> None:
    constants = normalization((0.4, 0.6), (0.3, 0.2), CPU)
    images = random_bytes(3, 4, 4, 2)
    torch.testing.assert_close(to_input(images, constants), normalize(images.permute(0, 3, 1, 2) / 255, constants))
