import math

import pytest
import torch
from torch import Tensor, nn

from engine.channel_statistics import ChannelStatistics, frozen_batchnorm, recorded_statistics
from engine.losses import batchnorm_loss, batchnorm_prior, flat_statistics, image_prior_loss, modulation
from engine.zoo import resnet_cifar

SHAPES = [(6, 3), (5, 4, 7), (4, 3, 5, 6), (3, 2, 3, 4, 5)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_with(mean: list[float], variance: list[float]) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(len(mean)).eval()
    layer.running_mean, layer.running_var = torch.tensor(mean), torch.tensor(variance)
    return layer


def hooks_of(layers: list[nn.Module]) -> int:
    return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in layers)


def reference_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(features.dim()) if axis != 1]
    variance, mean = torch.var_mean(features, axes, correction=0)
    return mean, variance


def reference_between(features: Tensor) -> Tensor:
    return features.flatten(2).mean(2).var(0, correction=0) if features.dim() > 2 else features.var(0, correction=0)


def gradient_of_both(features: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of a loss in which every channel's mean and variance has a weight of its own."""
    mean, variance = statistics
    weights = noise(2, len(mean), seed=9).to(mean.dtype)
    (gradient,) = torch.autograd.grad((weights[0] * mean.sin() + weights[1] * variance.square()).sum(), features)
    return gradient


# ChannelStatistics


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_channel_statistics_and_their_gradient_are_those_of_var_mean(shape: tuple[int, ...], last: bool) -> None:
    features = noise(*shape) * 2 + 1
    if last and len(shape) == 4:
        features = features.to(memory_format=torch.channels_last)
    features.requires_grad_()
    statistics, reference = ChannelStatistics.apply(features, False), reference_statistics(features)
    torch.testing.assert_close(statistics, reference)
    torch.testing.assert_close(gradient_of_both(features, statistics), gradient_of_both(features, reference))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_variance_between_images_and_the_gradient_of_all_three(shape: tuple[int, ...], last: bool) -> None:
    features = noise(*shape) * 2 + 1
    if last and len(shape) == 4:
        features = features.to(memory_format=torch.channels_last)
    features.requires_grad_()
    statistics = ChannelStatistics.apply(features, True)
    reference = (*reference_statistics(features), reference_between(features))
    torch.testing.assert_close(statistics, reference)
    weights = noise(3, shape[1], seed=9)
    gradients = [
        torch.autograd.grad((weights[0] * mean + weights[1] * variance + weights[2] * apart).sum(), features)
        for mean, variance, apart in (statistics, reference)
    ]
    torch.testing.assert_close(*gradients)


def test_channel_statistics_have_the_gradient_of_finite_differences() -> None:
    features = noise(3, 2, 2, 2).double().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        mean, variance = ChannelStatistics.apply(x, False)  # float32: the steps are wide enough for it
        return (mean * torch.tensor([1.0, -2.0]) + variance * torch.tensor([0.5, 3.0])).sum()

    (gradient,) = torch.autograd.grad(loss(features), features)
    step = 1e-2
    for index in range(features.numel()):
        shift = torch.zeros(features.numel(), dtype=torch.float64)
        shift[index] = step
        shift = shift.view_as(features)
        slope = (loss(features.detach() + shift) - loss(features.detach() - shift)) / (2 * step)
        assert gradient.flatten()[index].item() == pytest.approx(slope.item(), abs=2e-3)


def test_channel_statistics_of_one_loss_leave_the_other_without_gradient() -> None:
    features = noise(4, 3, 5, 5).requires_grad_()
    mean, _ = ChannelStatistics.apply(features, False)
    (gradient,) = torch.autograd.grad(mean.sum(), features)
    torch.testing.assert_close(gradient, torch.full_like(features, 1 / 100))


def test_channel_statistics_of_bfloat16_features_are_near_those_of_float32() -> None:
    features = (noise(32, 4, 8, 8) * 2 + torch.tensor([0.0, 1.0, -1.0, 3.0]).view(1, -1, 1, 1)).bfloat16()
    features.requires_grad_()
    exact = features.detach().float().requires_grad_()
    statistics, reference = ChannelStatistics.apply(features, False), reference_statistics(exact)
    assert statistics[0].dtype == statistics[1].dtype == torch.float32
    torch.testing.assert_close(statistics, reference, atol=0.02, rtol=0.01)
    gradient, expected = gradient_of_both(features, statistics), gradient_of_both(exact, reference)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.float() - expected).norm() < 0.02 * expected.norm()


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


# Hooks


def network() -> tuple[nn.Sequential, list[nn.Module]]:
    layers = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    return layers, [layers[0], layers[2], layers[3]]


def test_each_forward_pass_records_the_inputs_of_the_layers() -> None:
    module, layers = network()
    prior = batchnorm_prior(layers)
    images = noise(5, 2, 4, 4)
    with recorded_statistics(layers, between=True) as recorded:
        assert hooks_of(layers) == 3
        module(noise(5, 2, 4, 4, seed=1))
        module(images)
    assert hooks_of(layers) == 0
    inputs = [images, module[:2](images), module[:3](images)]
    assert list(recorded) == layers
    for layer, features in zip(layers, inputs, strict=True):
        torch.testing.assert_close(recorded[layer][:2], reference_statistics(features))
        torch.testing.assert_close(recorded[layer][2], reference_between(features))
    flat = flat_statistics(prior, recorded)
    assert flat.shape == (3, 8)
    torch.testing.assert_close(flat[0], torch.cat([reference_statistics(features)[0] for features in inputs]))
    torch.testing.assert_close(flat[1], torch.cat([reference_statistics(features)[1] for features in inputs]))
    torch.testing.assert_close(flat[2], torch.cat([reference_between(features) for features in inputs]))


def test_after_the_context_nothing_is_recorded() -> None:
    module, layers = network()
    with recorded_statistics(layers) as recorded:
        pass
    module(noise(5, 2, 4, 4))
    assert recorded == {}


def test_hooks_go_away_after_an_exception_and_those_of_others_stay() -> None:
    _, layers = network()
    layers[0].register_forward_pre_hook(lambda layer, inputs: None)

    def fail_inside() -> None:
        with recorded_statistics(layers):
            assert hooks_of(layers) == 4
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail_inside()
    assert hooks_of(layers) == 1


def test_gradients_flow_from_the_recorded_statistics_to_the_images() -> None:
    module, layers = network()
    images = noise(5, 2, 4, 4).requires_grad_()
    with recorded_statistics(layers) as recorded:
        module(images)
    batchnorm_loss(batchnorm_prior(layers), flat_statistics(batchnorm_prior(layers), recorded)).backward()
    assert images.grad is not None
    assert images.grad.abs().min() > 0


@pytest.mark.parametrize("between", [False, True])
def test_frozen_layers_give_what_the_usual_ones_give(between: bool) -> None:
    torch.manual_seed(0)
    module = resnet_cifar(5, 3, depth=8, width=4).train()
    with torch.no_grad():
        for _ in range(3):
            module(noise(16, 3, 8, 8) + 0.5)
    module = module.double().eval()
    layers = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    watched, prior = layers[::2], batchnorm_prior(layers[::2])  # the others are frozen with the rest of the network
    images = noise(4, 3, 8, 8).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    found = []
    for frozen in (False, True):
        with (
            recorded_statistics(watched, between=between, frozen=frozen) as recorded,
            frozen_batchnorm(module if frozen else None),
        ):
            logits = module(images)
        statistics = flat_statistics(prior, recorded)
        loss = statistics.sin().sum() + logits.square().sum()
        found.append((logits, statistics, *torch.autograd.grad(loss, images)))
    for usual, own in zip(*found, strict=True):
        torch.testing.assert_close(own, usual)
    assert found[1][2].stride() == images.stride()
    assert all("forward" not in vars(layer) for layer in layers)


def test_frozen_layers_have_no_gradient_by_their_own_weights_and_others_stay_as_they_are() -> None:
    class Own(nn.BatchNorm2d):
        pass

    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda features: features + 1  # type: ignore[method-assign]
    network = nn.Sequential(nn.BatchNorm2d(3), Own(3), replaced, nn.BatchNorm2d(3, affine=False)).eval()
    training = nn.BatchNorm2d(3)
    images = noise(2, 3, 4, 4).requires_grad_()
    with frozen_batchnorm(network), frozen_batchnorm(training):
        out = training(network(images))
    first, own, _, _ = network
    gradients = torch.autograd.grad(
        out.square().sum(), [images, own.weight, training.weight, first.weight], allow_unused=True
    )
    assert [gradient is not None for gradient in gradients] == [True, True, True, False]
    assert replaced.forward(images).equal(images + 1)


def test_layers_are_thawed_after_an_exception() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3)).eval()
    with pytest.raises(RuntimeError), frozen_batchnorm(network):
        network(noise(2, 4, 4, 4))
    assert "forward" not in vars(network[0])


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


def test_statistics_of_bfloat16_features_are_not_rounded_to_bfloat16() -> None:
    features = (5 + 3 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    mean, variance = ChannelStatistics.apply(features, False)
    expected_variance, expected_mean = torch.var_mean(features.float(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance, expected_variance, rtol=1e-3, atol=1e-3)
