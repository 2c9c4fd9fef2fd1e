"""What a distillation starts from: the teacher's network, and all that the engine must know to ask it."""

from dataclasses import dataclass

from torch import nn

from engine.batchnorm import batchnorm_layers
from engine.shapes import Shape
from engine.task import Classification
from engine.teacher import Teacher


@dataclass(frozen=True)
class Source:
    """A teacher as the engine sees it."""

    network: nn.Module
    task: Classification
    image_shape: Shape  # C, H, W
    mean: tuple[float, ...]  # a value a channel, for pixels in 0...1
    std: tuple[float, ...]
    batchnorm_layers: tuple[nn.Module, ...]  # that serve as a prior; none: smooth, standardised images take its place


def source_of(teacher: Teacher) -> Source:
    """The source that a loaded teacher is."""
    spec = teacher.spec
    return Source(
        teacher.module,
        Classification(spec.classes),
        spec.input_shape,
        spec.preprocessing.mean,
        spec.preprocessing.std,
        tuple(batchnorm_layers(teacher.module)),
    )
