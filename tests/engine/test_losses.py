import math

import pytest
import torch
from torch import Tensor, nn

from engine.channel_statistics import ChannelStatistics
from engine.losses import batchnorm_loss, batchnorm_prior, image_prior_loss, modulation


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_with(mean: list[float], variance: list[float]) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(len(mean)).eval()
    layer.running_mean, layer.running_var = torch.tensor(mean), torch.tensor(variance)
    return layer


def reference_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(features.dim()) if axis != 1]
    variance, mean = torch.var_mean(features, axes, correction=0)
    return mean, variance


# The BatchNorm prior


def test_prior_lays_layers_end_to_end_and_weighs_each_layer_alike() -> None:
    first, second = layer_with([1.0, 2.0], [4.0, 4.0]), layer_with([3.0, 4.0, 5.0, 6.0], [1.0] * 4)
    prior = batchnorm_prior([first, second])
    assert prior.layers == (first, second)
    assert prior.mean.tolist() == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(prior.variance, torch.tensor([4.0, 4, 1, 1, 1, 1]), rtol=2e-3, atol=0)
    torch.testing.assert_close(prior.weight, torch.tensor([1 / 4] * 2 + [1 / 8] * 4))


def test_prior_floors_the_variance_of_dead_channels() -> None:
    prior = batchnorm_prior([layer_with([0.0, 0.0], [2.0, 0.0])])
    torch.testing.assert_close(prior.variance, torch.tensor([2.001, 0.001]))


def test_loss_is_zero_where_the_statistics_are_the_running_ones() -> None:
    prior = batchnorm_prior([layer_with([1.0, -2.0], [4.0, 4.0]), layer_with([0.0, 0.5, 9.0], [0.25] * 3)])
    running = torch.stack((prior.mean, torch.tensor([4.0, 4.0, 0.25, 0.25, 0.25])))
    assert batchnorm_loss(prior, running).item() == pytest.approx(0, abs=1e-5)


def test_loss_by_hand() -> None:
    prior = batchnorm_prior([layer_with([1.0, 0.0], [4.0, 4.0]), layer_with([0.0], [1.0])])
    # layer 1: means off by 1 and 0 running deviations of 2, deviations by factors of 1 and 3; layer 2: 2 and 1/2
    statistics = torch.tensor([[3.0, 0.0, 2.0], [4.0, 36.0, 0.25]])
    expected = ((1**2 + 0) + (0 + 2**2)) / 4 + (2**2 + 0.5**2) / 2
    assert batchnorm_loss(prior, statistics).item() == pytest.approx(expected, rel=3e-3)


def test_loss_has_no_unit() -> None:
    layer, scaled = layer_with([1.0, -1.0], [4.0, 1.0]), layer_with([10.0, -10.0], [400.0, 100.0])
    statistics = torch.tensor([[2.0, 0.5], [3.0, 2.0]])
    loss = batchnorm_loss(batchnorm_prior([layer]), statistics)
    rescaled = batchnorm_loss(batchnorm_prior([scaled]), statistics * torch.tensor([[10.0], [100.0]]))
    torch.testing.assert_close(loss, rescaled)


@pytest.mark.parametrize("copies", [2, 7])
def test_loss_means_the_same_in_a_deeper_and_in_a_wider_teacher(copies: int) -> None:
    layer = layer_with([1.0, -1.0], [4.0, 1.0])
    statistics = torch.tensor([[2.0, 0.5], [3.0, 2.0]])
    loss = batchnorm_loss(batchnorm_prior([layer]), statistics)
    deeper = batchnorm_loss(batchnorm_prior([layer] * copies), statistics.repeat(1, copies))
    wide = layer_with([1.0, -1.0] * copies, [4.0, 1.0] * copies)
    wider = batchnorm_loss(batchnorm_prior([wide]), statistics.repeat(1, copies))
    torch.testing.assert_close(deeper, loss)
    torch.testing.assert_close(wider, loss)


def test_loss_and_gradient_stay_finite_for_dead_and_constant_channels() -> None:
    prior = batchnorm_prior([layer_with([0.0, 1.0], [0.0, 1.0])])
    features = torch.zeros(4, 2, 3, 3, requires_grad=True)
    loss = batchnorm_loss(prior, torch.stack(ChannelStatistics.apply(features, False)))
    loss.backward()
    assert math.isfinite(loss.item())
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_descending_the_loss_brings_the_statistics_of_the_layers_to_the_running_ones() -> None:
    layer = layer_with([1.0, -2.0], [4.0, 4.0])
    prior = batchnorm_prior([layer])
    features = noise(16, 2, 4, 4).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.1)
    for _ in range(150):
        loss = batchnorm_loss(prior, torch.stack(ChannelStatistics.apply(features, False)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean, variance = reference_statistics(features.detach())
    torch.testing.assert_close(mean, torch.tensor([1.0, -2.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(variance, torch.tensor([4.0, 4.0]), atol=0.05, rtol=0)


# The prior without BatchNorm


def test_image_prior_of_a_checkerboard_by_hand() -> None:
    board = torch.ones(8, 8)
    board[::2, ::2] = board[1::2, 1::2] = -1  # mean 0, deviation 1, every neighbour 2 away
    images = board.expand(2, 3, 8, 8)
    assert image_prior_loss(images).item() == pytest.approx(4, abs=1e-5)


def test_image_prior_of_flat_images_is_their_lack_of_contrast_and_their_offset() -> None:
    images = torch.full((4, 1, 8, 8), 3.0)
    assert image_prior_loss(images).item() == pytest.approx(3**2 + 1, rel=2e-3)


def test_image_prior_favours_smooth_images() -> None:
    ramp = torch.linspace(-1.7, 1.7, 16).expand(4, 1, 16, 16)
    shuffled = ramp[..., torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert image_prior_loss(ramp) < 0.1 * image_prior_loss(shuffled)


# The modulating function

CLASSES = torch.tensor([0, 1, 2])
CONFIDENCES = torch.tensor([0.9, 0.5, 0.2])
COUNTS = torch.tensor([6, 3, 1])


@pytest.mark.parametrize(
    ("gamma", "diversity", "difficulty", "expected"),
    [
        (1.0, True, True, [0.4 * 0.1, 0.7 * 0.5, 0.9 * 0.8]),
        (2.0, True, True, [0.4 * 0.01, 0.7 * 0.25, 0.9 * 0.64]),
        (0.0, True, True, [0.4, 0.7, 0.9]),
        (2.0, True, False, [0.4, 0.7, 0.9]),
        (2.0, False, True, [0.01, 0.25, 0.64]),
        (0.5, False, True, [math.sqrt(0.1), math.sqrt(0.5), math.sqrt(0.8)]),
        (2.0, False, False, [1.0, 1.0, 1.0]),
    ],
)
def test_modulation_by_hand(gamma: float, diversity: bool, difficulty: bool, expected: list[float]) -> None:
    value = modulation(CLASSES, CONFIDENCES, COUNTS, gamma=gamma, diversity=diversity, difficulty=difficulty)
    torch.testing.assert_close(value, torch.tensor(expected))


def test_modulation_with_an_empty_buffer_knows_difficulty_alone() -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    value = modulation(CLASSES, CONFIDENCES, counts, gamma=1.0, diversity=True, difficulty=True)
    torch.testing.assert_close(value, 1 - CONFIDENCES)


def test_modulation_is_nothing_where_a_class_has_the_whole_buffer_and_never_negative() -> None:
    counts, sure = torch.tensor([8, 0, 0]), torch.tensor([1.0, 1.0, 1.0])
    value = modulation(CLASSES, CONFIDENCES, counts, gamma=1.0, diversity=True, difficulty=True)
    torch.testing.assert_close(value, torch.tensor([0.0, 0.5, 0.8]))
    value = modulation(CLASSES, sure, COUNTS, gamma=1.0, diversity=True, difficulty=True)
    assert (value > 0).all()
    assert (value < 1e-5).all()


def test_the_teachers_own_statistics_cost_nothing_however_far_apart_the_channels_are() -> None:
    layer = nn.BatchNorm2d(4)
    layer.running_mean = torch.tensor([0.0, 5.0, -3.0, 0.1])
    layer.running_var = torch.tensor([1e-8, 1e-3, 1.0, 100.0])
    prior = batchnorm_prior([layer])
    statistics = torch.stack((layer.running_mean, layer.running_var))
    assert batchnorm_loss(prior, statistics).item() == pytest.approx(0, abs=1e-10)
