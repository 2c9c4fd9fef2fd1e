"""The precision of a file as a stage between export and proof; INT8 with what keeps it from collapsing.

The steps of INT8: ranges from synthetic samples; weights rounded together and biases corrected; then, each only where
the one before lost too much, distillation with every layer on the integers' grid, and the layers that lose most left
in float32.
"""

import copy
import math
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from engine.config import DistillationSettings, batch_for
from engine.device import Compute
from engine.errors import NonFiniteLossError, SSDKDError
from engine.images import Normalization, normalization
from engine.quantization import (
    STEPS,
    Grid,
    Ranges,
    float_logits,
    image_range,
    observed_ranges,
    put_on_grid,
    quantization_aware,
    quantized_layers,
    sensitivities,
    with_layers_of,
)
from engine.rounding import rounded_weights
from engine.task import Classification
from exporters.precision import LEAST_INTEGER_SHARE, Scheme, integer_share, layer_names, to_fp16, to_int8
from exporters.runtimes import open_runtime, to_input
from ssdkd_cli.loss import NOTHING, Loss, loss_of
from ssdkd_cli.subject import Subject, float_graph, graph_names, held_out_logits

CALIBRATION_IMAGES = 512  # that ranges are taken from: more widen them and gain nothing (docs/quantization.md)
SENSITIVITY_IMAGES = 128
UNTRAINABLE = "its layers are a graph's operations: they cannot be rounded together, trained or left in float32"
HALF_IO = "its input and output are float16"
SEVEN_BITS, EIGHT_BITS = 64, 127  # the largest integer of a weight


@dataclass(frozen=True)
class Graph:
    """An ONNX model in one precision, and what was done for it; fp32 and fp16 lose nothing that is looked at."""

    precision: str
    model: onnx.ModelProto
    integer_share: float = 0.0  # of the multiply-accumulates, 0 to 1
    loss: Loss = NOTHING
    error: float = 0.0  # of its logits against the float network's, squared, mean over the held-out samples
    float_layers: tuple[str, ...] = ()  # of an INT8 graph
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Integers:
    """How INT8 is made: the device's scheme, and what may be done where it loses too much.

    `qat`: quantization-aware distillation, "auto", "on" or "off". `fallback`: layers may stay in float32.
    """

    scheme: Scheme
    qat: str
    fallback: bool
    compute: Compute
    seed: int

    @property
    def grid(self) -> Grid:
        """The scheme as the engine simulates it."""
        levels = SEVEN_BITS if self.scheme.reduce_range else EIGHT_BITS
        return Grid(self.scheme.symmetric_activations, levels, self.scheme.per_channel)


def half_graph(exported: onnx.ModelProto, *, half_io: bool = False) -> Graph:
    """The float32 model `exported` in float16, with `half_io` outside as well. Raises SSDKDError."""
    notes = (HALF_IO,) if half_io else ()
    return Graph("fp16", to_fp16(exported, half_io=half_io), notes=notes)


def integer_graph(subject: Subject, exported: onnx.ModelProto, integers: Integers) -> Graph:
    """The float32 model `exported` in INT8, after as many steps as it takes; what was done is in its notes.

    The last one may still lose more than may be lost. Raises SSDKDError where the network cannot be quantized, or not
    be trained though that was asked for.
    """
    module = subject.module
    if not quantized_layers(module) and integers.qat == "on":
        raise SSDKDError(f"--qat on: {UNTRAINABLE}", "name its architecture with --arch, or leave --qat out")
    graph = judged(subject, exported, integers, "calibrated on synthetic samples")
    if not quantized_layers(module):
        return graph if graph.loss.is_within else replace(graph, notes=(*graph.notes, UNTRAINABLE))
    changed = rounded_together(subject, integers)
    tried = judged(subject, float_graph(subject, changed), integers, "weights rounded together, biases corrected")
    refusal = ""
    if tried.error >= graph.error:  # not by agreement: a hundred samples cannot tell
        refusal = "no gain"
    elif not tried.loss.is_within and tried.loss.points > graph.loss.points:
        refusal = "more agreement is lost than before, and than may be"
    tried = replace(tried, notes=(f"{tried.notes[0]}; {errors_in_words(tried.error, graph.error)}",))
    module, graph = (module if refusal else changed), better(graph, tried, refusal)
    if integers.qat == "on" or (integers.qat == "auto" and not graph.loss.is_within):
        try:
            changed, done = aware(subject, module, integers), f"{STEPS} steps of quantization-aware distillation"
            tried = judged(subject, float_graph(subject, changed), integers, done)
            helps = tried.loss.points < graph.loss.points or integers.qat == "on"
            module, graph = (changed if helps else module), better(graph, tried, "" if helps else "no gain")
        except NonFiniteLossError as error:
            if integers.qat == "on":
                raise
            graph = replace(graph, notes=(*graph.notes, f"{error.message}; it was left out"))
    if not graph.loss.is_within and integers.fallback:
        graph = with_float_layers(subject, module, graph, integers, known=set(layer_names(exported).values()))
    return graph


def judged(
    subject: Subject, exported: onnx.ModelProto, integers: Integers, done: str, float_layers: tuple[str, ...] = ()
) -> Graph:
    """`exported` in INT8, and what it loses; `done` says what was done for it."""
    model = to_integers(subject, exported, integers.scheme, CALIBRATION_IMAGES, graph_names(subject, float_layers))
    with tempfile.TemporaryDirectory(prefix="ssdkd-") as folder:
        path = Path(folder) / "int8.onnx"
        onnx.save(model, path)
        logits = held_out_logits(subject, open_runtime(path).run)
    loss, apart = loss_of(subject, logits.argmax(axis=1)), (logits - subject.logits).astype(np.float64)
    error = float(np.square(apart).mean())  # in float64: of a training that went astray they are large
    return Graph("int8", model, integer_share(model), loss, error, float_layers, (f"{done}: {loss}",))


def to_integers(
    subject: Subject, exported: onnx.ModelProto, scheme: Scheme, images: int, float_layers: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """`exported` in INT8, with ranges from so many calibration samples; `float_layers` as the graph names them."""
    card, calibration = subject.card, to_input(subject.samples.calibration[:images], *subject.fed)
    pixels = image_range(normalization(card.mean, card.std, torch.device("cpu")))
    return to_int8(exported, calibration, scheme, image_range=pixels, float_layers=float_layers)


def errors_in_words(after: float, before: float) -> str:
    """Squared errors of logits as 'rms error of the logits 0.076, before 0.12'."""
    return f"rms error of the logits {math.sqrt(after):.2g}, before {math.sqrt(before):.2g}"


def better(graph: Graph, tried: Graph, refusal: str) -> Graph:
    """`tried`, or `graph` where there is a reason against it; the notes tell of both, and whether `tried` was kept."""
    if refusal:
        return replace(graph, notes=(*graph.notes, f"{tried.notes[0]}, {refusal}: it was left out"))
    return replace(tried, notes=(*graph.notes, f"{tried.notes[0]}: kept"))


def rounded_together(subject: Subject, integers: Integers) -> nn.Module:
    """A copy of the network whose weights are rounded together, and whose biases make up for what remains."""
    copied, constants, batch = on_device(subject.module, subject, integers)
    images, grid = calibration_images(subject, integers.compute, CALIBRATION_IMAGES), integers.grid
    ranges = observed_ranges(copied, images, normalization=constants, batch=batch)
    weights = rounded_weights(copied, images, ranges, grid, normalization=constants, batch=batch)
    put_on_grid(copied, weights, images, ranges, grid, normalization=constants, batch=batch)
    return on_cpu(copied)


def aware(subject: Subject, module: nn.Module, integers: Integers) -> nn.Module:
    """A copy that was distilled on the grid from the float network. Raises NonFiniteLossError."""
    copied, constants, batch = on_device(module, subject, integers)
    device, images = integers.compute.device, calibration_images(subject, integers.compute)
    original, _, _ = on_device(subject.module, subject, integers)
    steps = quantization_aware(
        copied,
        images,
        float_logits(original, images, normalization=constants, batch=batch),
        observed_ranges(copied, images[:CALIBRATION_IMAGES], normalization=constants, batch=batch),
        integers.grid,
        task=Classification(subject.card.classes),
        normalization=constants,
        temperature=DistillationSettings.temperature,
        batch=batch,
        rng=torch.Generator(device).manual_seed(integers.seed),
        threads=integers.compute.threads,
        steps=STEPS,
    )
    for _ in steps:
        pass
    return on_cpu(copied)


def with_float_layers(
    subject: Subject, module: nn.Module, graph: Graph, integers: Integers, *, known: Collection[str]
) -> Graph:
    """As few of the most sensitive layers left in float32 as bring the loss down, doubling their number.

    They get the float network's own weights and biases: those of `module` are rounded. `known`: the layers' names in
    the graph, where the exporter did not rename their weight.
    """
    copied, constants, batch = on_device(module, subject, integers)
    own, _, _ = on_device(subject.module, subject, integers)
    few = calibration_images(subject, integers.compute, CALIBRATION_IMAGES)
    ranges: Ranges = observed_ranges(copied, few, normalization=constants, batch=batch)
    named = {name: limits for name, limits in ranges.items() if graph_names(subject, (name,))[0] in known}
    if unnamed := len(ranges) - len(named):
        said = f"{unnamed} of {len(ranges)} layers have other names in the graph and cannot be left in float32"
        graph = replace(graph, notes=(*graph.notes, said))
    few, grid = few[:SENSITIVITY_IMAGES], integers.grid
    worst = list(sensitivities(own, copied, few, named, grid, normalization=constants, batch=batch))
    number = 1
    while number <= len(worst):
        layers = tuple(worst[:number])
        said = f"{number} layer{'s' * (number > 1)} left in float32 ({', '.join(layers)})"
        exported = float_graph(subject, with_layers_of(module, subject.module, layers))
        other = judged(subject, exported, integers, said, layers)
        if other.integer_share < LEAST_INTEGER_SHARE:
            break
        if other.loss.is_within:
            return replace(other, notes=(*graph.notes, *other.notes))
        number *= 2
    return replace(graph, notes=(*graph.notes, "leaving the worst layers in float32 did not bring it back"))


def on_device(module: nn.Module, subject: Subject, integers: Integers) -> tuple[nn.Module, Normalization, int]:
    """A copy of `module` where the run computes, the constants of its input there, and how many images at once."""
    device, card = integers.compute.device, subject.card
    copied: nn.Module = copy.deepcopy(module).float().eval()
    copied = copied.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied, normalization(card.mean, card.std, device), batch_for(card.input_shape)


def calibration_images(subject: Subject, compute: Compute, number: int | None = None) -> torch.Tensor:
    """The first so many calibration samples, uint8 [N, H, W, C], on the device."""
    images: NDArray[np.uint8] = subject.samples.calibration[:number]
    return torch.from_numpy(images).to(compute.device)


def on_cpu(module: nn.Module) -> nn.Module:
    """The module itself, back on the CPU, frozen."""
    moved: nn.Module = module.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return moved.requires_grad_(False)
