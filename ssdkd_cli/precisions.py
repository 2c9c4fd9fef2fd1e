"""The precision of a file as a stage between export and proof; INT8 with what keeps it from collapsing.

The steps of INT8, each taken only where the one before lost too much: ranges from synthetic samples; biases corrected;
distillation with every layer on the integers' grid; the layers that lose most left in float32.
"""

import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from engine.config import DistillationSettings
from engine.device import Compute
from engine.images import normalization
from engine.quantization import (
    STEPS,
    Grid,
    correct_biases,
    observed_ranges,
    quantization_aware,
    quantized_layers,
    sensitivities,
)
from engine.task import Classification
from exporters.metadata import metadata_for
from exporters.precision import LEAST_INTEGER_SHARE, Scheme, integer_share, to_fp16, to_int8
from exporters.runtimes import inference_batch, open_runtime, predictor, to_input
from exporters.to_onnx import WithPreprocessing, to_onnx
from ssdkd_cli import console
from ssdkd_cli.runs import Samples, StudentCard

MOST_LOST = 0.5  # points of agreement with the teacher that an INT8 file may lose against the float student
CALIBRATION_IMAGES = 512  # that ranges are taken from: more widen them and gain nothing (docs/quantization.md)
SENSITIVITY_IMAGES = 128
UNCHANGED = (0.0,), (1.0,)


@dataclass(frozen=True)
class Subject:
    """The network that files are made of, float32, CPU, eval, with what they are made and proven by."""

    module: nn.Module
    card: StudentCard
    samples: Samples
    embed_preprocessing: bool


@dataclass(frozen=True)
class Graph:
    """An ONNX model in one precision, and what was done for it.

    `lost`: points of agreement with the teacher against the float network, on held-out samples; 0 for fp32 and fp16.
    """

    precision: str
    model: onnx.ModelProto
    integer_share: float = 0.0  # of the multiply-accumulates, 0 to 1
    lost: float = 0.0
    float_layers: tuple[str, ...] = ()  # of an INT8 graph
    notes: tuple[str, ...] = ()


def float_graph(subject: Subject, module: nn.Module | None = None) -> onnx.ModelProto:
    """The network (or `module` in its place) as ONNX in float32. Raises SSDKDError where it cannot be exported."""
    card = subject.card
    metadata = metadata_for(
        input_shape=card.input_shape,
        classes=card.classes,
        class_names=card.class_names,
        mean=card.mean,
        std=card.std,
        embed_preprocessing=subject.embed_preprocessing,
        teacher_sha256=card.teacher_sha256,
    )
    network = module or subject.module
    if subject.embed_preprocessing:
        network = WithPreprocessing(network, card.mean, card.std).eval()
    return to_onnx(network, input_shape=card.input_shape, metadata=metadata)


def graph_in(
    precision: str,
    subject: Subject,
    exported: onnx.ModelProto,
    scheme: Scheme,
    *,
    qat: str,
    fallback: bool,
    compute: Compute,
    seed: int,
) -> Graph:
    """The float32 model `exported` in `precision`; the last five say how INT8 is made. Raises SSDKDError."""
    if precision == "fp32":
        return Graph(precision, exported)
    if precision == "fp16":
        return Graph(precision, to_fp16(exported))
    return _Int8(subject, exported, scheme, compute, seed).made(qat=qat, fallback=fallback)


def most_lost(samples: int) -> float:
    """Points that may be lost: MOST_LOST, or one sample where so few samples cannot show half a point."""
    return max(MOST_LOST, 100 / samples)


class _Int8:
    """One network on its way to INT8: what all steps need, worked out once."""

    def __init__(
        self, subject: Subject, exported: onnx.ModelProto, scheme: Scheme, compute: Compute, seed: int
    ) -> None:
        self.subject, self.exported, self.scheme, self.compute, self.seed = subject, exported, scheme, compute, seed
        self.grid = Grid(scheme.symmetric_activations, 63 if scheme.reduce_range else 127)
        card = subject.card
        self.fed = UNCHANGED if subject.embed_preprocessing else (card.mean, card.std)
        self.normalization = normalization(card.mean, card.std, compute.device)
        self.calibration = to_input(subject.samples.calibration[:CALIBRATION_IMAGES], *self.fed)
        self.teacher = subject.samples.held_out_logits.argmax(1)
        self.float_agreement = self.agreement(predictor(subject.module), (card.mean, card.std))
        self.allowed = most_lost(len(subject.samples.held_out))

    def made(self, *, qat: str, fallback: bool) -> Graph:
        """The INT8 graph after as many steps as it takes."""
        module, graph = self.subject.module, self.judged(self.exported, "calibrated on synthetic samples")
        trainable = bool(quantized_layers(module))
        if graph.lost > self.allowed and trainable:
            corrected = self.corrected(module)
            other = self.judged(float_graph(self.subject, corrected), "biases corrected")
            if other.lost < graph.lost:
                module, graph = corrected, replace(other, notes=(*graph.notes, *other.notes))
        if trainable and (qat == "on" or (qat == "auto" and graph.lost > self.allowed)):
            trained = self.trained(module)
            said = f"{STEPS} steps of quantization-aware distillation"
            other = self.judged(float_graph(self.subject, trained), said)
            if other.lost < graph.lost or qat == "on":
                module, graph = trained, replace(other, notes=(*graph.notes, *other.notes))
            else:
                graph = replace(graph, notes=(*graph.notes, *other.notes, "which was no gain and was left out"))
        if graph.lost > self.allowed and fallback and trainable:
            graph = self.with_float_layers(module, graph)
        if not trainable and graph.lost > self.allowed:
            graph = replace(graph, notes=(*graph.notes, "its layers are a graph's operations: they cannot be trained"))
        return graph

    def judged(self, exported: onnx.ModelProto, done: str, float_layers: tuple[str, ...] = ()) -> Graph:
        """`exported` in INT8, and what it loses; `done` says what was done for it."""
        # An embedded normalisation wraps the network: its layers' names begin with `module.`.
        names = (*float_layers, *(f"module.{name}" for name in float_layers))
        model = to_int8(exported, self.calibration, self.scheme, float_layers=names)
        with tempfile.TemporaryDirectory(prefix="ssdkd-") as folder:
            path = Path(folder) / "int8.onnx"
            onnx.save(model, path)
            lost = self.float_agreement - self.agreement(open_runtime(path).run, self.fed)
        note = f"{done}: {abs(lost):.2f} points of agreement {'lost' if lost >= 0 else 'gained'}"
        return Graph("int8", model, integer_share(model), lost, float_layers, (note,))

    def agreement(self, run: "object", fed: tuple[tuple[float, ...], tuple[float, ...]]) -> float:
        """Percent of the held-out samples on which `run` predicts the teacher's class."""
        images, predicted = self.subject.samples.held_out, []
        batch = inference_batch(self.subject.card.input_shape)
        for first in range(0, len(images), batch):
            predicted.append(run(to_input(images[first : first + batch], *fed)).argmax(1))  # type: ignore[operator]
        return 100 * float((np.concatenate(predicted) == self.teacher).mean())

    def on_device(self, module: nn.Module) -> nn.Module:
        """A copy where the run computes."""
        copied = copy.deepcopy(module).float().eval()
        return copied.to(self.compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def images(self, number: int | None = None) -> torch.Tensor:
        """The first so many calibration samples, on the device."""
        return torch.from_numpy(self.subject.samples.calibration[:number]).to(self.compute.device)

    def corrected(self, module: nn.Module) -> nn.Module:
        """A copy whose biases make up for the rounding."""
        copied, images = self.on_device(module), self.images(CALIBRATION_IMAGES)
        ranges = observed_ranges(copied, images, self.normalization)
        correct_biases(copied, images, ranges, self.grid, normalization=self.normalization)
        return _on_cpu(copied)

    def trained(self, module: nn.Module) -> nn.Module:
        """A copy that was distilled on the grid."""
        copied, samples = self.on_device(module), self.subject.samples
        ranges = observed_ranges(copied, self.images(CALIBRATION_IMAGES), self.normalization)
        steps = quantization_aware(
            copied,
            self.images(),
            torch.from_numpy(samples.calibration_logits).to(self.compute.device),
            ranges,
            self.grid,
            task=Classification(self.subject.card.classes),
            normalization=self.normalization,
            temperature=DistillationSettings.temperature,
            compute=self.compute,
            rng=torch.Generator(self.compute.device).manual_seed(self.seed),
        )
        losses: list[float] = []
        with console.stage("int8", f"{STEPS} steps of quantization-aware distillation") as done:
            losses += steps
            few = max(1, len(losses) // 10)
            done(f"quantization-aware distillation, loss {np.mean(losses[:few]):.3g} to {np.mean(losses[-few:]):.3g}")
        return _on_cpu(copied)

    def with_float_layers(self, module: nn.Module, graph: Graph) -> Graph:
        """As few of the most sensitive layers left in float32 as bring the loss down, doubling their number."""
        copied = self.on_device(module)
        ranges = observed_ranges(copied, self.images(CALIBRATION_IMAGES), self.normalization)
        moved = sensitivities(
            copied, self.images(SENSITIVITY_IMAGES), ranges, self.grid, normalization=self.normalization
        )
        worst, exported, number = tuple(moved), float_graph(self.subject, module), 1
        while number <= len(worst):
            layers = worst[:number]
            words = f"{number} layer{'s' * (number > 1)} left in float32 ({', '.join(layers)})"
            other = self.judged(exported, words, layers)
            if other.integer_share < LEAST_INTEGER_SHARE:
                break
            if other.lost <= self.allowed:
                return replace(other, notes=(*graph.notes, *other.notes))
            number *= 2
        return replace(graph, notes=(*graph.notes, "leaving the worst layers in float32 did not bring it back"))


def _on_cpu(module: nn.Module) -> nn.Module:
    moved: nn.Module = module.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    return moved.requires_grad_(False)
