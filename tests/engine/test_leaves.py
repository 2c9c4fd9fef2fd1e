import pytest
import torch
from torch import Tensor

from engine.images import normalization, to_input
from engine.leaves import dead_leaves

MEAN, STD = (0.5, 0.4, 0.6), (0.12, 0.1, 0.12)
CONSTANTS = normalization(MEAN, STD, torch.device("cpu"))


def leaves(number: int = 200, shape: tuple[int, int, int] = (3, 24, 24), seed: int = 0) -> Tensor:
    return dead_leaves(number, shape, normalization(MEAN[: shape[0]], STD[: shape[0]], torch.device("cpu")), rng(seed))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 7, 20), (3, 33, 16), (3, 8, 8), (1, 1, 5), (3, 1, 1)], ids=str)
def test_images_are_bytes_of_the_shape_asked_for(shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    images = leaves(6, shape)
    assert images.shape == (6, height, width, channels)
    assert images.dtype == torch.uint8


def test_the_same_numbers_make_the_same_images() -> None:
    assert torch.equal(leaves(4, seed=3), leaves(4, seed=3))
    assert not torch.equal(leaves(4, seed=3), leaves(4, seed=4))


def test_they_have_about_the_mean_and_the_deviation_that_the_teacher_expects() -> None:
    values = to_input(leaves(), CONSTANTS)
    assert values.mean((0, 2, 3)).abs().max() < 0.25
    assert (values.std((0, 2, 3)) - 1).abs().max() < 0.35


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.0, 1.0), (0.0, 0.0039)])
def test_constants_that_are_none_of_images_give_images(mean: float, std: float) -> None:
    images = dead_leaves(50, (1, 16, 16), normalization((mean,), (std,), torch.device("cpu")), rng(0)).float()
    assert images.std() > 15
    assert ((images == 0) | (images == 255)).float().mean() < 0.4


def test_neighbours_are_alike_more_than_places_far_apart() -> None:
    values = to_input(leaves(), CONSTANTS)
    near, far = ((values[..., step:] - values[..., :-step]).square().mean() for step in (1, 12))
    assert near < 0.5 * far


def test_an_image_is_of_its_own_brightness_and_has_edges() -> None:
    values = to_input(leaves(), CONSTANTS)
    within = values.var((2, 3)).mean()
    between = values.mean((2, 3)).var(0).mean()
    assert 0.1 < between / (between + within) < 0.5  # about a quarter, as of photographs
    steps = values.diff(dim=3).abs().flatten()
    assert steps.quantile(0.99) > 8 * steps.quantile(0.5)
