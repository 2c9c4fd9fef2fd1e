"""What a network can do to survive eight bits: biases corrected, weights trained on the grid, the worst layers named.

The integers themselves are made in the exported graph (exporters/precision.py). Here a float module is run as if its
convolutions and linear layers had integer inputs and weights: rounded to the grid, the gradient passed through
(Jacob et al., CVPR 2018). Rounding a weight per output channel commutes with the BatchNorm behind it, so nothing has
to be folded.
"""

import contextlib
import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from engine.errors import NonFiniteLossError
from engine.hooks import removing
from engine.images import Normalization, normalize, to_input
from engine.task import Classification
from engine.teaching import rate_factor
from engine.threads import Threads

STEPS = 300  # of the quantization-aware distillation
RATE = 1e-4  # Adam, falling to 0 as a half cosine: the weights are to move by parts of a grid step
SMALLEST_RANGE = 1e-30  # of weights or inputs that are all zero

Ranges = Mapping[str, tuple[float, float]]  # layer name -> smallest and largest value of its input
Look = Callable[[str, Tensor], Tensor | None]


@dataclass(frozen=True)
class Grid:
    """Which integers there are: weights -levels...levels, a scale a channel; inputs 256 steps, around 0 or not."""

    symmetric_activations: bool
    weight_levels: int = 127  # 64: seven bits
    per_channel: bool = True

    def scale(self, weight: Tensor) -> Tensor:
        """The size of a step of each output channel of a weight [out, ...]: [out]."""
        largest = weight.detach().flatten(1).abs().amax(1)
        largest = largest if self.per_channel else largest.max().expand_as(largest)
        return (largest / self.weight_levels).clamp_min(SMALLEST_RANGE / self.weight_levels)


class RoundedWeight(nn.Module):
    """A weight as integers times a scale for each output channel, with the gradient of the weight itself."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        """[out, ...] to [out, ...]."""
        scale, levels = self.grid.scale(weight), self.grid.weight_levels
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -levels, levels)


def quantized_layers(module: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """The layers that will compute in integers, by name: convolutions and linear layers.

    Without those whose weight is computed from others (spectral or weight norm): it cannot be rounded or trained here.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return {name: layer for name, layer in layers.items() if "weight" in layer._parameters}


def observed_ranges(module: nn.Module, images: Tensor, *, normalization: Normalization, batch: int) -> Ranges:
    """The smallest and largest value that each layer is given, over `images` uint8 [N, H, W, C], `batch` at a time.

    Of a layer that is given the images themselves it is their `image_range`.
    """
    seen: dict[str, tuple[float, float]] = {}
    of_pixels = image_range(normalization)

    def observe(name: str, inputs: Tensor) -> None:
        is_image = inputs is fed
        low, high = of_pixels if is_image else (float(value) for value in inputs.detach().float().aminmax())
        before = seen.get(name, (0.0, 0.0))  # zero is always on the grid
        seen[name] = min(before[0], low), max(before[1], high)

    with hooked(quantized_layers(module), observe), torch.no_grad():
        for part in images.split(batch):
            fed = to_input(part, normalization)
            module(fed)
    return seen


def image_range(constants: Normalization) -> tuple[float, float]:
    """The range whose 256 steps round the 256 values of a pixel the least, zero among them, which padding puts there.

    Steps as wide as those of the pixels put zero between two of them where the mean is 0.5, and round every pixel by
    half a step, two to the same integer.
    """
    values = normalize(torch.arange(256, device=constants.mean.device) / 255, constants)  # [C, 1, 256]
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    ranges = [(low, high + more * (high - low) / 255) for more in torch.linspace(0, 2, 65).tolist()]
    return min(ranges, key=lambda limits: float(F.mse_loss(rounded_inputs(values, *limits, symmetric=False), values)))


@contextlib.contextmanager
def fake_quantized(
    module: nn.Module, ranges: Ranges, grid: Grid, only: Collection[str] | None = None
) -> Iterator[None]:
    """Within the context the layers of `ranges` (of `only`, where given) round their inputs and weights to the grid.

    The weights themselves stay floats, can be trained, and are the module's own again afterwards.
    """
    layers = {name: layer for name, layer in quantized_layers(module).items() if name in ranges}
    if only is not None:
        layers = {name: layer for name, layer in layers.items() if name in only}

    def rounded(name: str, inputs: Tensor) -> Tensor:
        return rounded_inputs(inputs, *ranges[name], symmetric=grid.symmetric_activations)

    try:
        for layer in layers.values():
            parametrize.register_parametrization(layer, "weight", RoundedWeight(grid))
        with hooked(layers, rounded):
            yield
    finally:
        for layer in layers.values():
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


@torch.no_grad()
def put_on_grid(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    images: Tensor,
    ranges: Ranges,
    grid: Grid,
    *,
    normalization: Normalization,
    batch: int,
) -> None:
    """Give each layer its `weights`, and take out of it the mean error that they and the rounding of its inputs make.

    In place, for each output channel; a layer without a bias is given one (Nagel et al., ICCV 2019, section 4.2, with
    the error measured on `images` uint8 [N, H, W, C]). `weights` are those of the layers of `ranges`, by name.
    """
    layers = {name: layer for name, layer in quantized_layers(module).items() if name in ranges}
    errors: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def measure(name: str, inputs: Tensor) -> None:
        layer = layers[name]
        hooks, layer._forward_pre_hooks = layer._forward_pre_hooks, OrderedDict()  # or this would call itself
        try:
            coarse = rounded_inputs(inputs, *ranges[name], symmetric=grid.symmetric_activations)
            error = functional_call(layer, {"weight": weights[name]}, (coarse,)) - layer(inputs)
        finally:
            layer._forward_pre_hooks = hooks
        axes = (0, 2, 3) if isinstance(layer, nn.Conv2d) else tuple(range(error.dim() - 1))
        total = error.float().sum(axes)  # [channels]
        errors[name] = errors.get(name, 0) + total
        counts[name] += error.numel() // len(total)

    with hooked(layers, measure):
        for part in images.split(batch):
            module(to_input(part, normalization))
    for name, error in errors.items():
        layer = layers[name]
        layer.weight.copy_(weights[name])
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(error), requires_grad=layer.weight.requires_grad)
        layer.bias -= error / counts[name]


@torch.no_grad()
def float_logits(module: nn.Module, images: Tensor, *, normalization: Normalization, batch: int) -> Tensor:
    """What `module` says of `images` uint8 [N, H, W, C], `batch` at a time: float32 [N, K]."""
    return torch.cat([module(to_input(part, normalization)).float() for part in images.split(batch)])


def quantization_aware(
    module: nn.Module,
    images: Tensor,
    target_logits: Tensor,
    ranges: Ranges,
    grid: Grid,
    *,
    task: Classification,
    normalization: Normalization,
    temperature: float,
    batch: int,
    rng: torch.Generator,
    threads: Threads,
    steps: int = STEPS,
) -> Iterator[float]:
    """Train `module` in place to say on the grid what the float network says: distillation, with every layer rounded.

    The targets are the float network's logits, not the teacher's: the file is to compute what the student computes.

    Args:
        module: on the device of `rng`, in eval mode: BatchNorm keeps its statistics. All is float32: bfloat16 would
            round once more.
        images: uint8 [N, H, W, C], synthetic samples on the same device.
        target_logits: float32 [N, K], the logits of each before anything was rounded, from `float_logits`.
        ranges: from `observed_ranges`; they stay.
        grid: the integers.
        task, normalization, temperature: as in the distillation.
        batch: images a step.
        rng: draws the images.
        threads: that compute.
        steps: how many.

    Yields:
        the loss of each step.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite.
    """
    module.eval().requires_grad_(True)
    with fake_quantized(module, ranges, grid):
        optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
        for step in range(steps):
            threads.choose()
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate_factor(step / steps)
            drawn = torch.randint(len(images), (batch,), generator=rng, device=rng.device)
            logits = module(to_input(images[drawn], normalization))
            loss = task.discrepancy(target_logits[drawn], logits, temperature).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"the loss of the quantization-aware distillation is not finite in step {step + 1}",
                    "leave it out with --qat off",
                )
            yield value
    module.requires_grad_(False)


@torch.no_grad()
def sensitivities(
    module: nn.Module,
    on_grid: nn.Module,
    images: Tensor,
    ranges: Ranges,
    grid: Grid,
    *,
    normalization: Normalization,
    batch: int,
) -> dict[str, float]:
    """How far each layer of `on_grid`, with its input rounded, moves the logits of the float `module`, the worst first.

    In the place of the module's own layer, the others being left alone: mean squared error over `images`.
    """
    exact, moved = float_logits(module, images, normalization=normalization, batch=batch), {}
    for name in ranges:
        layers = module.get_submodule(name), on_grid.get_submodule(name)
        with _parameters_of(*layers), fake_quantized(module, ranges, grid, only=(name,)):
            rounded = float_logits(module, images, normalization=normalization, batch=batch)
        moved[name] = float(F.mse_loss(rounded, exact))
    return dict(sorted(moved.items(), key=lambda item: item[1], reverse=True))


def with_layers_of(module: nn.Module, other: nn.Module, names: Collection[str]) -> nn.Module:
    """A copy of `module` in which these layers have the weights and biases of `other`, of the same architecture."""
    copied = copy.deepcopy(module)
    for name in names:
        layer, taken = copied.get_submodule(name), other.get_submodule(name)
        layer.weight, layer.bias = taken.weight, taken.bias
    return copied


@contextlib.contextmanager
def _parameters_of(layer: nn.Module, other: nn.Module) -> Iterator[None]:
    """Within the context `layer` has the weight and the bias of `other`."""
    own = layer.weight, layer.bias
    layer.weight, layer.bias = other.weight, other.bias
    try:
        yield
    finally:
        layer.weight, layer.bias = own


def rounded_inputs(inputs: Tensor, low: float, high: float, *, symmetric: bool) -> Tensor:
    """Values on 256 steps between `low` and `high` (around 0: between minus and plus the larger one)."""
    if symmetric:
        scale = max(-low, high, SMALLEST_RANGE) / 127
        return torch.fake_quantize_per_tensor_affine(inputs.float(), scale, 0, -127, 127)
    scale = max(high - low, SMALLEST_RANGE) / 255
    return torch.fake_quantize_per_tensor_affine(inputs.float(), scale, round(-low / scale), 0, 255)


@contextlib.contextmanager
def hooked(layers: Mapping[str, nn.Module], look: Look) -> Iterator[None]:
    """Within the context `look(name, input)` is called before each layer; what it returns takes the input's place.

    Not where a layer is called otherwise than with one batch: such a call is left alone.
    """

    def called(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        ranks = (4,) if isinstance(layer, nn.Conv2d) else range(2, 9)
        return look(name, inputs[0]) if len(inputs) == 1 and inputs[0].dim() in ranks and inputs[0].numel() else None

    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: called(name, layer, inputs))
        for name, layer in layers.items()
    ]
    with removing(handles):
        yield
