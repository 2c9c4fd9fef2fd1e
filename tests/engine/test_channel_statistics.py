import pytest
import torch
from torch import Tensor, nn

from engine.channel_statistics import ChannelStatistics, frozen_batchnorm, recorded_statistics
from engine.losses import batchnorm_loss, batchnorm_prior, flat_statistics
from engine.zoo import resnet_cifar

SHAPES = [(6, 3), (5, 4, 7), (4, 3, 5, 6), (3, 2, 3, 4, 5)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def test_statistics_of_bfloat16_features_are_not_rounded_to_bfloat16() -> None:
    features = (5 + 3 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    mean, variance = ChannelStatistics.apply(features, False)
    expected_variance, expected_mean = torch.var_mean(features.float(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance, expected_variance, rtol=1e-3, atol=1e-3)


# In a forward pass


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
