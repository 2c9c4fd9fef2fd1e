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
    RoundedWeight,
    fake_quantized,
    image_range,
    observed_ranges,
    put_on_grid,
    quantization_aware,
    quantized_layers,
    rounded_inputs,
    sensitivities,
    with_layers_of,
)
from engine.rounding import rounded_weights
from engine.task import Classification
from engine.threads import Threads

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


def nearest(module: nn.Module, grid: Grid) -> dict[str, Tensor]:
    """Each weight on the grid point that is next to it."""
    return {name: RoundedWeight(grid)(layer.weight.detach()) for name, layer in quantized_layers(module).items()}


def hooks_of(module: nn.Module) -> int:
    return sum(len(child._forward_pre_hooks) for child in module.modules())


def test_the_layers_are_convolutions_and_linear_ones(network: Network) -> None:
    assert list(quantized_layers(network)) == ["first", "depthwise", "head"]


def test_ranges_are_those_of_the_layers_inputs_and_hold_zero(network: Network, images: Tensor) -> None:
    ranges = observed_ranges(network, images, normalization=CONSTANTS, batch=32)
    hidden = network.norm(network.first(to_input(images, CONSTANTS))).relu()
    logits = network.head.register_forward_hook(lambda _, inputs, __: means.append(inputs[0]))
    means: list[Tensor] = []
    network(to_input(images, CONSTANTS))
    logits.remove()
    assert ranges["depthwise"] == pytest.approx((0.0, float(hidden.max())))
    assert ranges["head"] == pytest.approx((min(0.0, float(means[0].min())), max(0.0, float(means[0].max()))))
    assert ranges["first"] == image_range(CONSTANTS)  # of all images that there can be
    assert hooks_of(network) == 0


def rounded_pixels(mean: float, std: float, limits: tuple[float, float]) -> Tensor:
    values = (torch.arange(256) / 255 - mean) / std
    return rounded_inputs(values, *limits, symmetric=False)


def test_pixels_around_a_mean_of_a_half_are_no_half_steps() -> None:
    exact = (torch.arange(256) / 255 - 0.5) / 0.25

    def error(limits: tuple[float, float]) -> float:  # in steps of the pixels, squared
        return float(((rounded_pixels(0.5, 0.25, limits) - exact) * 255 * 0.25).square().mean())

    limits = image_range(CONSTANTS)
    assert error((-2.0, 2.0)) == pytest.approx(0.25, abs=0.01)  # zero lies between two pixels
    assert error(limits) < 0.1
    assert limits[0] == -2.0
    assert 2.0 < limits[1] <= 2.0 * (1 + 4 / 255)
    assert len(rounded_pixels(0.5, 0.25, limits).unique()) >= 254


def test_pixels_that_fit_the_integers_are_not_rounded() -> None:
    assert image_range(normalization((0.0,), (1.0,), torch.device("cpu"))) == (0.0, 1.0)
    assert torch.allclose(rounded_pixels(0.0, 1.0, (0.0, 1.0)), torch.arange(256) / 255)


def test_the_range_of_images_holds_all_channels_and_zero() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    low, high = image_range(normalization(mean, std, torch.device("cpu")))
    assert low == pytest.approx(-0.485 / 0.229)
    assert (1 - 0.406) / 0.225 <= high < (1 - 0.406) / 0.225 * 1.02
    dark = normalization((-0.5,), (1.0,), torch.device("cpu"))
    assert image_range(dark)[0] == 0.0


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
    weights = nearest(corrected, coarse)
    put_on_grid(corrected, weights, images, ranges, coarse, normalization=CONSTANTS, batch=32)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in quantized_layers(corrected).items())
    assert corrected.first.bias is not None
    assert corrected.first.bias.shape == (6,)
    assert mean_error(corrected) < before / 2
    assert hooks_of(corrected) == 0


def test_the_last_batch_counts_by_its_images(network: Network, images: Tensor) -> None:
    uneven = torch.cat([images[:64], torch.full_like(images[64:], 255)])  # batches of 64 and 32, which differ
    ranges = observed_ranges(network, uneven, normalization=CONSTANTS, batch=96)
    biases, weights = [], nearest(network, Grid(False, 7))
    for batch in (64, 96):
        corrected = copy.deepcopy(network)
        put_on_grid(corrected, weights, uneven, ranges, Grid(False, 7), normalization=CONSTANTS, batch=batch)
        biases.append(torch.cat([layer.bias for layer in quantized_layers(corrected).values()]))
    assert torch.allclose(*biases, atol=1e-5)


def train(
    module: nn.Module,
    images: Tensor,
    logits: Tensor,
    *,
    seed: int = 0,
    steps: int = 60,
    threads: Threads | None = None,
) -> list[float]:
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
            threads=threads or Threads(1),
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


def test_threads_are_chosen_once_a_step(network: Network, images: Tensor) -> None:
    threads, looks = Threads(1), []
    threads.choose = lambda: looks.append(None)  # type: ignore[method-assign]
    train(network, images, torch.zeros(len(images), 3), steps=4, threads=threads)
    assert len(looks) == 4


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
    moved = sensitivities(network, network, images, ranges, ASYMMETRIC, normalization=CONSTANTS, batch=32)
    assert next(iter(moved)) == "depthwise"
    assert list(moved.values()) == sorted(moved.values(), reverse=True)
    assert set(moved) == {"first", "depthwise", "head"}


def test_the_layers_that_are_asked_about_are_those_on_the_grid(network: Network, images: Tensor) -> None:
    ranges = observed_ranges(network, images, normalization=CONSTANTS, batch=32)
    before, on_grid = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    on_grid.head.weight.neg_()  # as far off as can be
    moved = sensitivities(network, on_grid, images, ranges, ASYMMETRIC, normalization=CONSTANTS, batch=32)
    with fake_quantized(network, ranges, ASYMMETRIC, only=("first",)):
        first = network(to_input(images, CONSTANTS))
    assert next(iter(moved)) == "head"
    assert moved["first"] == pytest.approx(float((first - network(to_input(images, CONSTANTS))).square().mean()))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Unusual(nn.Module):
    """Beside a convolution, layers that are called with a keyword, no batch, no rows, and two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.keyword, self.single = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.vector, self.empty = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images) + self.keyword(input=images)
        features = features + self.single(images[0])
        means = features.mean((2, 3))
        logits: Tensor = self.head(means) + self.vector(means[0]) + self.empty(means[:0]).sum()
        return logits


def test_layers_that_are_called_otherwise_are_left_alone(images: Tensor) -> None:
    module = Unusual().eval().requires_grad_(False)
    ranges = observed_ranges(module, images, normalization=CONSTANTS, batch=32)
    assert list(ranges) == ["first", "head"]
    weights = rounded_weights(module, images, ranges, ASYMMETRIC, normalization=CONSTANTS, batch=32)
    assert list(weights) == ["first", "head"]
    before = module.vector.weight.clone()
    put_on_grid(module, weights, images, ranges, ASYMMETRIC, normalization=CONSTANTS, batch=32)
    assert torch.equal(module.first.weight, weights["first"])
    assert torch.equal(module.vector.weight, before)


def test_layers_are_taken_from_another_network(network: Network) -> None:
    other = copy.deepcopy(network)
    other.first.weight.zero_()
    other.first.bias = nn.Parameter(torch.ones(6), requires_grad=False)
    other.depthwise.weight.zero_()
    mixed = with_layers_of(other, network, ("first",))
    assert torch.equal(mixed.get_submodule("first").weight, network.first.weight)
    assert mixed.get_submodule("first").bias is None
    assert not mixed.get_submodule("depthwise").weight.any()
    assert not other.first.weight.any()


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
