"""The network that files are made of, and what a file of it says of the held-out samples."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from exporters.evaluate import logits_of
from exporters.metadata import metadata_for
from exporters.runtimes import Predict, predictor
from exporters.to_onnx import WithPreprocessing, to_onnx
from ssdkd_cli.runs import Samples, StudentCard


@dataclass(frozen=True)
class Subject:
    """The network that files are made of, float32, in eval mode, with what they are made and proven by."""

    module: nn.Module
    card: StudentCard
    samples: Samples
    embed_preprocessing: bool

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """What the network says of each held-out sample, [M, classes]: asked once, for all that is compared."""
        return logits_of(predictor(self.module), self.samples.held_out, mean=self.card.mean, std=self.card.std)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The class that the network predicts of each held-out sample, [M]."""
        return self.logits.argmax(axis=1)

    @property
    def fed(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of what its files take, of images in 0...1: zeros and ones where they normalise themselves."""
        channels = self.card.input_shape[0]
        return ((0.0,) * channels, (1.0,) * channels) if self.embed_preprocessing else (self.card.mean, self.card.std)


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


def graph_names(subject: Subject, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The module's names of layers as the graph has them: an embedded normalisation stands around the network."""
    return tuple(f"module.{name}" for name in layers) if subject.embed_preprocessing else layers


def held_out_logits(subject: Subject, run: Predict) -> NDArray[np.float32]:
    """What a file of the network, called as `run`, says of each held-out sample, [M, classes]."""
    mean, std = subject.fed
    return logits_of(run, subject.samples.held_out, mean=mean, std=std)


def agreement(subject: Subject, predicted: NDArray[np.int64]) -> float:
    """Percent of the held-out samples of which the teacher predicts the same classes [M]."""
    return 100 * float((predicted == subject.samples.held_out_logits.argmax(1)).mean())
