import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import quantization
from engine.errors import NonFiniteLossError
from engine.images import normalization, to_input
from engine.quantization import (
    Grid,
    correct_biases,
    fake_quantized,
    observed_ranges,
    quantization_aware,
    quantized_layers,
    sensitivities,
)
from engine.task import Classification

CONSTANTS = normalization((0.5,), (0.25,), torch.device("cpu"))
ASYMMETRIC, SYMMETRIC = Grid(False), Grid(True)


class Network(nn.Module):
    """A convolution with BatchNorm, a depthwise one without a bias, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.depthwise(self.norm(self.first(images)).relu())
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


@pytest.fixture
def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Network().train()
        with torch.no_grad():
            module(torch.randn(64, 1, 8, 8))
            module.first.weight[0] *= 30  # one channel of another size: a scale for all would round the rest away
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(256, (96, 8, 8, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def hooks_of(module: nn.Module) -> int:
    return sum(len(child._forward_pre_hooks) for child in module.modules())


def test_the_layers_are_convolutions_and_linear_ones(network: Network) -> None:
    assert list(quantized_layers(network)) == ["first", "depthwise", "head"]


def test_ranges_are_those_of_the_layers_inputs_and_hold_zero(network: Network, images: Tensor) -> None:
    ranges = observed_ranges(network, images, normalization=CONSTANTS, batch=32)
    inputs = to_input(images, CONSTANTS)
    hidden = network.norm(network.first(inputs)).relu()
    assert ranges["first"] == (float(inputs.min()), float(inputs.max()))
    assert ranges["depthwise"] == pytest.approx((0.0, float(hidden.max())))
    assert hooks_of(network) == 0
    bright = observed_ranges(network, torch.full_like(images, 255), normalization=CONSTANTS, batch=32)
    assert bright["first"] == (0.0, 2.0)  # (1 - 0.5) / 0.25, and zero, which padding puts there


@pytest.mark.parametrize("levels", [127, 64])
def test_weights_are_whole_multiples_of_a_scale_a_channel(network: Network, images: Tensor, levels: int) -> None:
    before = network.first.weight.clone()
    with fake_quantized(
        network, observed_ranges(network, images, normalization=CONSTANTS, batch=32), Grid(False, levels)
    ):
        rounded = network.first.weight
        scale = before.flatten(1).abs().amax(1)[:, None, None, None] / levels
        steps = rounded / scale
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert steps.abs().max() <= levels + 1e-3
        assert not torch.equal(rounded, before)
        assert ((rounded - before).abs() <= scale / 2 * 1.001).all()


@pytest.mark.parametrize("grid", [ASYMMETRIC, SYMMETRIC])
def test_inputs_take_few_values_and_zero_stays_zero(network: Network, images: Tensor, grid: Grid) -> None:
    seen: list[Tensor] = []
    ranges = observed_ranges(network, images, normalization=CONSTANTS, batch=32)
    handle = network.depthwise.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with fake_quantized(network, ranges, grid, only=("depthwise",)):
        network(to_input(images, CONSTANTS))
    handle.remove()
    values = seen[0].unique()
    assert len(values) <= (128 if grid.symmetric_activations else 256)
    assert 0.0 in values
    assert values.max() == pytest.approx(ranges["depthwise"][1], rel=1e-5)


def test_the_module_is_left_as_it_was(network: Network, images: Tensor) -> None:
    before, ranges = (
        copy.deepcopy(network.state_dict()),
        observed_ranges(network, images, normalization=CONSTANTS, batch=32),
    )
    inputs = to_input(images, CONSTANTS)
    exact = network(inputs)

    def use_and_fail() -> None:
        with fake_quantized(network, ranges, ASYMMETRIC):
            assert not torch.equal(network(inputs), exact)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use_and_fail()
    assert hooks_of(network) == 0
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network(inputs), exact)


def test_corrected_biases_take_the_mean_error_out(network: Network, images: Tensor) -> None:
    ranges, inputs = observed_ranges(network, images, normalization=CONSTANTS, batch=32), to_input(images, CONSTANTS)
    coarse = Grid(False, 7)  # so coarse that there is something to correct
    exact = network(inputs)

    def mean_error(module: nn.Module) -> float:
        with fake_quantized(module, ranges, coarse):
            return float((module(inputs) - exact).mean(0).abs().max())

    before = mean_error(network)
    corrected = copy.deepcopy(network)
    correct_biases(corrected, images, ranges, coarse, normalization=CONSTANTS, batch=32)
    assert corrected.first.bias is not None
    assert corrected.first.bias.shape == (6,)
    assert mean_error(corrected) < before / 2
    assert hooks_of(corrected) == 0


def test_the_last_batch_counts_by_its_images(network: Network, images: Tensor) -> None:
    uneven = torch.cat([images[:64], torch.full_like(images[64:], 255)])  # batches of 64 and 32, which differ
    ranges = observed_ranges(network, uneven, normalization=CONSTANTS, batch=96)
    biases = []
    for batch in (64, 96):
        corrected = copy.deepcopy(network)
        correct_biases(corrected, uneven, ranges, Grid(False, 7), normalization=CONSTANTS, batch=batch)
        biases.append(torch.cat([layer.bias for layer in quantized_layers(corrected).values()]))
    assert torch.allclose(*biases, atol=1e-5)


def train(module: nn.Module, images: Tensor, logits: Tensor, *, seed: int = 0, steps: int = 60) -> list[float]:
    return list(
        quantization_aware(
            module,
            images,
            logits,
            observed_ranges(module, images, normalization=CONSTANTS, batch=32),
            Grid(False, 7),
            task=Classification(3),
            normalization=CONSTANTS,
            temperature=4.0,
            batch=64,
            rng=torch.Generator().manual_seed(seed),
            steps=steps,
        )
    )


def test_training_on_the_grid_lowers_the_loss_there(
    network: Network, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "RATE", 3e-3)
    logits, statistics = network(to_input(images, CONSTANTS)), network.norm.running_mean.clone()
    losses = train(network, images, logits)
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
    assert torch.equal(network.norm.running_mean, statistics)  # BatchNorm keeps what the teacher remembers
    assert "weight" in dict(network.first.named_parameters())  # no parametrization is left
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_same_seed_trains_the_same_weights(network: Network, images: Tensor) -> None:
    logits = network(to_input(images, CONSTANTS))
    trained = [copy.deepcopy(network) for _ in range(3)]
    for module, seed in zip(trained, (0, 0, 1), strict=True):
        train(module, images, logits, seed=seed, steps=5)
    assert torch.equal(trained[0].first.weight, trained[1].first.weight)
    assert not torch.equal(trained[0].first.weight, trained[2].first.weight)


def test_a_loss_that_is_not_finite_stops_the_training(network: Network, images: Tensor) -> None:
    with pytest.raises(NonFiniteLossError, match="not finite in step 1"):
        train(network, images, torch.full((len(images), 3), math.nan))
    assert "weight" in dict(network.first.named_parameters())


def test_the_layer_that_loses_most_comes_first(network: Network, images: Tensor) -> None:
    ranges = dict(observed_ranges(network, images, normalization=CONSTANTS, batch=32))
    ranges["depthwise"] = (0.0, 1000 * ranges["depthwise"][1])  # all that it is given falls on a few steps
    moved = sensitivities(network, images, ranges, ASYMMETRIC, normalization=CONSTANTS, batch=32)
    assert next(iter(moved)) == "depthwise"
    assert list(moved.values()) == sorted(moved.values(), reverse=True)
    assert set(moved) == {"first", "depthwise", "head"}


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm, nn.utils.weight_norm]
)
def test_a_weight_that_is_computed_from_others_stays_as_it_is(network: Network, images: Tensor, norm: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last one is deprecated
        norm(network.first)
    network.eval()
    ranges = observed_ranges(network, images, normalization=CONSTANTS, batch=32)
    before = network(to_input(images, CONSTANTS))
    assert list(ranges) == ["depthwise", "head"]
    with fake_quantized(network, ranges, ASYMMETRIC):
        rounded = network(to_input(images, CONSTANTS))
    assert not torch.equal(rounded, before)
    assert torch.equal(network(to_input(images, CONSTANTS)), before)
