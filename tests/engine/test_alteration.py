import math

import pytest
import torch
from torch import Tensor

from engine.alteration import ZOOM, alter, numbers_for

CPU = torch.device("cpu")
ROTATION, SCALE, GAIN, BRIGHTNESS, SHARE, TINT = range(6)
WHOLE = 9.0  # deviations: nothing is left of the image that is blended in


def pictures(number: int = 4) -> Tensor:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def numbers(of_the_first: dict[int, float], number: int = 4) -> Tensor:
    """Of a batch whose images keep all that is not named."""
    drawn = numbers_for(number, 3, CPU)
    drawn[:, SHARE] = WHOLE
    for place, value in of_the_first.items():
        drawn[0, place] = value
    return drawn


@pytest.mark.parametrize("number", [2, 5, 8])
def test_every_second_image_stays_as_it_is(number: int) -> None:
    images = pictures(number)
    drawn = numbers_for(number, 3, CPU).normal_(generator=torch.Generator().manual_seed(1))
    altered = alter(images, drawn)
    assert altered.shape == images.shape
    assert torch.equal(altered[1::2], images[1::2])
    assert (altered[::2] - images[::2]).flatten(1).abs().amax(1).min() > 0.05
    assert torch.equal(images, pictures(number))  # the batch itself is left alone


def test_numbers_of_nothing_change_nothing() -> None:
    torch.testing.assert_close(alter(pictures(), numbers({})), pictures(), atol=1e-5, rtol=1e-5)


def test_contrast_brightness_and_tint() -> None:
    drawn = numbers({GAIN: 2.0, BRIGHTNESS: -1.0, TINT: 3.0})
    offset = torch.tensor([-0.3 + 0.45, -0.3, -0.3])[:, None, None]  # the tint is of the first channel alone
    deviation, mean = (value[:, None, None] for value in torch.std_mean(pictures(), (0, 2, 3), correction=0))
    expected = mean + (pictures()[0] - mean) * math.exp(0.5) + offset * deviation
    torch.testing.assert_close(alter(pictures(), drawn)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_quarter_turn() -> None:
    turned = alter(pictures(), numbers({ROTATION: math.pi / 2 / 0.2}))[0]
    torch.testing.assert_close(turned, pictures()[0].rot90(1, (1, 2)), atol=1e-4, rtol=1e-4)


def test_zoom_shows_the_middle() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[:, :, 2:6, 2:6] = 1
    seen = alter(images, numbers({SCALE: -math.log(2) / ZOOM}, 2))[0]
    assert seen.min() > 0.5
    torch.testing.assert_close(seen[:, 1:-1, 1:-1], torch.ones(3, 6, 6))


def test_a_wide_image_is_turned_and_not_sheared() -> None:
    images = torch.zeros(2, 3, 9, 17)
    images[:, :, 4, 4:13] = 1  # a line through the middle
    seen = alter(images, numbers({ROTATION: math.pi / 2 / 0.2}, 2))[0]
    expected = torch.zeros(3, 9, 17)
    expected[:, :, 8] = 1
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)


def test_the_same_pictures_change_alike_whatever_the_network_expects() -> None:
    drawn = numbers_for(4, 3, CPU).normal_(generator=torch.Generator().manual_seed(1))
    usual, bytes_of = alter(pictures(), drawn), alter(pictures() * 60 + 120, drawn)
    torch.testing.assert_close((bytes_of - 120) / 60, usual, atol=1e-4, rtol=1e-4)


def test_the_last_of_an_odd_batch_is_blended_with_the_first_plain_one() -> None:
    images, drawn = pictures(5), numbers({}, 5)
    drawn[2, SHARE] = -WHOLE
    torch.testing.assert_close(alter(images, drawn)[4], images[1])


def test_the_blend_is_of_an_image_that_stays_in_any_proportion() -> None:
    images, drawn = pictures(), numbers({SHARE: 0.0})
    torch.testing.assert_close(alter(images, drawn)[0], (images[0] + images[1]) / 2, atol=1e-5, rtol=1e-5)
    many = numbers_for(2000, 1, CPU).normal_(generator=torch.Generator().manual_seed(2))
    many[:, :SHARE], many[:, TINT:] = 0, 0
    halves = torch.stack((torch.ones(1000), torch.zeros(1000)), 1).flatten().view(2000, 1, 1, 1)
    shares = alter(halves, many)[::2].flatten()
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.std() == pytest.approx(12**-0.5, abs=0.03)


def test_the_layout_of_the_images_is_kept() -> None:
    images = pictures().to(memory_format=torch.channels_last)
    assert alter(images, numbers({})).stride() == images.stride()
