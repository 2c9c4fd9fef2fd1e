from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine import rounding
from engine.images import normalization, to_input
from engine.quantization import Grid, RoundedWeight, fake_quantized, observed_ranges, quantized_layers
from engine.rounding import rounded_weights

CONSTANTS = normalization((0.5,), (0.25,), torch.device("cpu"))
COARSE = Grid(False, 7)

Layer = nn.Conv2d | nn.Linear


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth ones, uint8 [64, 8, 8, 1]: their pixels rise and fall together, as those of photographs do."""
    generator = torch.Generator().manual_seed(1)
    down, right = torch.rand(2, 64, 1, 1, generator=generator)
    ramp, noise = torch.linspace(0, 120, 8), torch.rand(64, 8, 8, generator=generator)
    return (down * ramp[:, None] + right * ramp + 10 * noise).to(torch.uint8)[..., None]


def nearest(layer: Layer, grid: Grid) -> Tensor:
    return RoundedWeight(grid)(layer.weight.detach())


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
        lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=(2, 1), bias=False),
        lambda: nn.Conv2d(4, 8, (3, 1), groups=4, bias=False),
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding="valid", bias=False),
    ],
)
def test_windows_are_what_a_convolution_multiplies(layer: Callable[[], nn.Conv2d]) -> None:
    convolution, inputs = layer(), torch.randn(2, 4, 9, 9)
    groups = convolution.groups
    windows = rounding._windows(convolution, inputs)  # [G, K, P]
    products = convolution.weight.flatten(1).unflatten(0, (groups, -1)) @ windows  # [G, O / G, P]
    outputs = convolution(inputs)
    assert torch.allclose(products.flatten(0, 1), outputs.transpose(0, 1).flatten(1), atol=1e-5)


def test_of_a_large_image_some_windows_are_enough() -> None:
    windows = rounding._windows(nn.Conv2d(1, 1, 3, padding=1), torch.randn(5, 1, 64, 40))
    assert windows.shape == (1, 9, 5 * 13 * 14)  # every fifth row of 64, every third column of 40


def test_a_window_larger_than_the_image_is_padded() -> None:
    windows = rounding._windows(nn.Conv2d(1, 1, 5, padding="same"), torch.ones(2, 1, 4, 3))
    assert windows.shape == (1, 25, 4)  # two rows fit with a pixel above and below, one column with one at each side
    assert windows.sum(1).tolist() == [[12.0] * 4]


def test_the_inputs_of_a_linear_layer_are_its_windows() -> None:
    inputs = torch.randn(3, 5, 7)
    assert torch.equal(rounding._windows(nn.Linear(7, 2), inputs)[0].T, inputs.flatten(0, 1))


def test_what_a_weight_is_off_by_is_made_up_for_by_the_next() -> None:
    moments = torch.tensor([[[4.0, 0, 0], [0, 1, 1], [0, 1, 1]]])  # two inputs that are the same
    weights = torch.tensor([[[5.0, 0.4, 0.4]]])
    rounded = rounding._rounded_part(weights, moments, torch.ones(1, 1), levels=5)
    assert rounded.tolist() == [[[5.0, 0.0, 1.0]]]  # 0.8 together: nearest would be 0 and 0


def test_inputs_that_have_nothing_in_common_leave_it_at_the_nearest() -> None:
    weights = torch.randn(2, 3, 5)
    scale = weights.abs().amax(2) / 7
    moments = torch.diag_embed(torch.rand(2, 5) + 0.1)
    rounded = rounding._rounded_part(weights, moments, scale, levels=7)
    assert torch.allclose(rounded, (weights / scale[..., None]).round() * scale[..., None])


def test_a_dead_input_harms_no_other() -> None:
    weights = torch.tensor([[[7.0, 2.4, 1.4]]])
    alive = torch.tensor([[[2.0, 1, 0], [1, 2, 0], [0, 0, 0]]])
    assert rounding._rounded_part(weights, alive, torch.ones(1, 1), levels=7).tolist() == [[[7.0, 2.0, 1.0]]]
    dead = torch.zeros(1, 3, 3)
    assert rounding._rounded_part(weights, dead, torch.ones(1, 1), levels=7).tolist() == [[[7.0, 2.0, 1.0]]]


def test_moments_that_overflow_leave_it_at_the_nearest() -> None:
    weights = torch.tensor([[[7.0, 2.4, 1.4]]])
    endless = torch.full((1, 3, 3), torch.inf)
    assert rounding._rounded_part(weights, endless, torch.ones(1, 1), levels=7).tolist() == [[[7.0, 2.0, 1.0]]]


def test_tiny_weights_are_rounded_like_any(images: Tensor) -> None:
    module, tiny = network(), network()
    tiny.load_state_dict(module.state_dict())
    first = quantized_layers(tiny)["0"]
    first.weight.mul_(1e-9)

    def rounded(given: nn.Module) -> Tensor:
        ranges = observed_ranges(given, images, normalization=CONSTANTS, batch=32)
        return rounded_weights(given, images, ranges, COARSE, normalization=CONSTANTS, batch=32)["0"]

    assert torch.allclose(1e9 * rounded(tiny), rounded(module), atol=1e-5)


def network() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False)]
    layers += [nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 5)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


@pytest.mark.parametrize("together", [rounding.PART_INPUTS, 5])
def test_weights_are_on_the_grid_that_a_quantizer_will_find_again(
    images: Tensor, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "PART_INPUTS", together)  # 5: each layer in parts
    module = network()
    before = {name: layer.weight.clone() for name, layer in quantized_layers(module).items()}
    ranges = observed_ranges(module, images, normalization=CONSTANTS, batch=32)
    weights = rounded_weights(module, images, ranges, COARSE, normalization=CONSTANTS, batch=32)
    assert weights.keys() == before.keys() == ranges.keys()
    for name, layer in quantized_layers(module).items():
        rounded = weights[name]
        assert torch.equal(layer.weight, before[name])
        assert rounded.shape == layer.weight.shape
        assert not torch.equal(rounded, before[name])
        assert torch.allclose(COARSE.scale(rounded), COARSE.scale(layer.weight))
        layer.weight.copy_(rounded)
        assert torch.allclose(nearest(layer, COARSE), rounded, atol=1e-6)
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_the_layers_say_more_nearly_what_they_said(images: Tensor) -> None:
    module = network()
    ranges = observed_ranges(module, images, normalization=CONSTANTS, batch=32)
    weights = rounded_weights(module, images, ranges, COARSE, normalization=CONSTANTS, batch=32)
    fresh, errors = to_input(images.flip(1), CONSTANTS), []
    inputs = [fresh, *(module[:end](fresh) for end in (2, 4, 7))]
    for (name, layer), given in zip(quantized_layers(module).items(), inputs, strict=True):
        exact = layer(given)

        def off(weight: Tensor, layer: Layer = layer, given: Tensor = given, exact: Tensor = exact) -> float:
            return float((torch.func.functional_call(layer, {"weight": weight}, (given,)) - exact).square().mean())

        errors.append(off(weights[name]) / off(nearest(layer, COARSE)))
    assert max(errors) < 0.9
    assert min(errors) < 0.3


def test_the_network_on_the_grid_is_nearer_to_itself(images: Tensor) -> None:
    module, inputs = network(), to_input(images, CONSTANTS)
    ranges = observed_ranges(module, images, normalization=CONSTANTS, batch=32)
    exact = module(inputs)

    def off() -> float:
        with fake_quantized(module, ranges, COARSE):
            return float((module(inputs) - exact).square().mean())

    before = off()
    for name, weight in rounded_weights(module, images, ranges, COARSE, normalization=CONSTANTS, batch=32).items():
        quantized_layers(module)[name].weight.copy_(weight)
    assert off() < before / 2


def test_all_batches_count(images: Tensor) -> None:
    """The first batch has rows alone, the second columns alone: a sum of both says otherwise than either."""
    rows, columns = images[:32].float().mean(2, keepdim=True), images[32:].float().mean(1, keepdim=True)
    uneven = torch.cat([rows.expand(32, 8, 8, 1), columns.expand(32, 8, 8, 1)]).to(torch.uint8)
    module = network()
    ranges = observed_ranges(module, uneven, normalization=CONSTANTS, batch=64)

    def rounded(given: Tensor, batch: int) -> Tensor:
        return rounded_weights(module, given, ranges, COARSE, normalization=CONSTANTS, batch=batch)["0"]

    assert torch.allclose(rounded(uneven, 64), rounded(uneven, 32), atol=1e-6)
    assert torch.allclose(rounded(uneven, 64), rounded(uneven.flip(0), 32), atol=1e-6)
    assert not torch.allclose(rounded(uneven, 64), rounded(uneven[32:], 32), atol=1e-6)
    assert not torch.allclose(rounded(uneven, 64), rounded(uneven[:32], 32), atol=1e-6)


def brute_force(weights: Tensor, moments: Tensor, levels: int) -> list[float]:
    """One output channel with a scale of 1: after each weight the best of the others anew, by least squares."""
    damped = moments + rounding.DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
    order = moments.diagonal().argsort(descending=True).tolist()
    rest, whole = weights.clone(), torch.zeros_like(weights)
    ends = weights.abs() > levels - 1e-3
    while order:
        index, *order = order
        value = float(rest[index].round().clamp(-levels, levels))
        whole[index] = weights[index] if ends[index] else value
        if order:  # minimise the error of the outputs over the weights that are left, the moved ones being known
            error = rest[index] - whole[index]
            rest[order] += torch.linalg.solve(damped[order][:, order], damped[order][:, index] * error)
    return whole.tolist()


@pytest.mark.parametrize("block", [rounding.BLOCK_INPUTS, 1, 3])
def test_it_is_the_least_squares_of_what_is_left(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "BLOCK_INPUTS", block)
    inputs = torch.randn(8, 8) @ torch.randn(8, 40)
    moments, weights = inputs @ inputs.T, 3 * torch.randn(4, 8)
    weights[:, 0], weights[:, 5] = 7.0, torch.tensor([6.9, -6.9, 6.8, -6.8])  # the latter may be pushed past the end
    rounded = rounding._rounded_part(weights.clamp(-6.9, 7.0)[None], moments[None], torch.ones(1, 4), levels=7)[0]
    assert rounded.abs().max() == 7.0
    for found, row in zip(rounded, weights.clamp(-6.9, 7.0), strict=True):
        assert found.tolist() == pytest.approx(brute_force(row, moments, 7), abs=1e-4)


def test_a_weight_is_not_pushed_past_the_end() -> None:
    moments = torch.tensor([[[9.0, 8.0, 0.0], [8.0, 8.0, 0.0], [0.0, 0.0, 1.0]]])
    rounded = rounding._rounded_part(torch.tensor([[[0.49, 2.9, 3.0]]]), moments, torch.ones(1, 1), levels=3)
    assert rounded.tolist() == [[[0.0, 3.0, 3.0]]]  # 2.9 and 0.4 of the first: 3 is the end


def test_inputs_count_as_they_are_rounded() -> None:
    """Of a layer whose inputs are clipped to nothing there is nothing to make up for."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False)).requires_grad_(False)
    smooth = torch.arange(64, dtype=torch.uint8).view(1, 8, 8, 1).repeat(8, 1, 1, 1) * 2

    def rounded(limits: tuple[float, float]) -> Tensor:
        return rounded_weights(module, smooth, {"0": limits}, COARSE, normalization=CONSTANTS, batch=8)["0"]

    assert torch.allclose(rounded((0.0, 0.0)), nearest(quantized_layers(module)["0"], COARSE), atol=1e-6)
    assert not torch.allclose(rounded((-2.0, 2.0)), nearest(quantized_layers(module)["0"], COARSE), atol=1e-6)


def test_the_strongest_input_is_the_first_to_be_rounded() -> None:
    moments = torch.tensor([[[1.0, 2.0, 0.0], [2.0, 16.0, 0.0], [0.0, 0.0, 1.0]]])
    rounded = rounding._rounded_part(torch.tensor([[[0.4, 0.4, 7.0]]]), moments, torch.ones(1, 1), levels=7)
    assert rounded.tolist() == [[[1.0, 0.0, 7.0]]]  # the weak one first: 0 and 0, and the strong one's error stays
