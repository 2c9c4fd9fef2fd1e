"""Feature matching: a shortened student also learns what its teacher computes at the end of each stage.

Where a student is its teacher with fewer blocks in some stages (ResNet-8 of ResNet-20, WRN-16-2 of WRN-40-2), the maps
at the end of those stages have the same shape. A target for every position of every map says more of an image than the
logits do (Romero et al. 2015, FitNets; without their regressor, as no shape differs).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.hooks import removing
from engine.modes import evaluating
from engine.probing import network_inside

SMALLEST_VARIANCE = 1e-6
MAP_DIMENSIONS = 4  # [B, C, H, W]


@dataclass(frozen=True)
class Stages:
    """The stages that a student has with fewer blocks than its teacher, and that teacher."""

    teacher: nn.Module
    pairs: tuple[tuple[nn.Module, nn.Module], ...]  # the student's and the teacher's


def shared_stages(student: nn.Module, teacher: nn.Module, image_shape: tuple[int, int, int]) -> Stages | None:
    """The stages of both networks whose maps can be compared, or None where there are none.

    A stage is a module of the same name and kind in both, made of numbered blocks, of which the student has some of the
    teacher's, not all, and that gives one map [B, C, H, W] of the same shape in both. Two grey images are run through
    both networks, which are on one device and stay as they are.

    Args:
        student: a network.
        teacher: a network.
        image_shape: (C, H, W).
    """
    theirs = dict(network_inside(teacher).named_modules())
    shortened = [
        (own, theirs[name])
        for name, own in student.named_modules()
        if name in theirs and type(own) is type(theirs[name]) and _blocks(own) and _blocks(own) < _blocks(theirs[name])
    ]
    if not shortened:
        return None
    images = torch.zeros(2, *image_shape, device=next(student.parameters()).device)
    shapes = _shapes_of_maps(student, [own for own, _ in shortened], images)
    their_shapes = _shapes_of_maps(teacher, [other for _, other in shortened], images)
    pairs = tuple(
        (own, other)
        for own, other in shortened
        if _is_map(own, shapes.get(own, torch.Size())) and shapes[own] == their_shapes.get(other)
    )
    return Stages(teacher, pairs) if pairs else None


@torch.no_grad()
def teacher_maps(stages: Stages, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The teacher's logits [B, K], and its map at the end of each stage, float32 [B, C, H, W]."""
    maps: dict[nn.Module, Tensor] = {}

    def keep(stage: nn.Module, _inputs: object, output: Tensor) -> None:
        maps[stage] = output.to(torch.float32, copy=True)  # what follows may change it in place

    with removing([stage.register_forward_hook(keep) for _, stage in stages.pairs]):
        logits = stages.teacher(inputs)
    return logits, [maps[stage] for _, stage in stages.pairs]


@contextlib.contextmanager
def compared(stages: Stages, targets: list[Tensor]) -> Iterator[list[Tensor]]:
    """Within the context a forward pass of the student fills the list with the error of each stage, float32 [B].

    The error is the mean squared difference of the maps over the mean variance of the teacher's channels: 1 where the
    student knows no more than each channel's mean.
    """
    errors: list[Tensor] = []
    expected = dict(zip((stage for stage, _ in stages.pairs), targets, strict=True))

    def compare(stage: nn.Module, _inputs: object, output: Tensor) -> None:
        target = expected[stage]
        variance = target.var((0, 2, 3)).mean().clamp_min(SMALLEST_VARIANCE)
        errors.append((output.float() - target).square().mean((1, 2, 3)) / variance)

    with removing([stage.register_forward_hook(compare) for stage in expected]):
        yield errors


def _blocks(module: nn.Module) -> set[str]:
    """The names of its children, if they are numbers: a block's own parts have words."""
    names = {name for name, _ in module.named_children()}
    return names if all(name.isdecimal() for name in names) else set()


def _is_map(stage: nn.Module, shape: torch.Size) -> bool:
    """Whether it is [B, C, H, W]; with the channels last it would have as many rows as a convolution has outputs."""
    convolutions = [layer for layer in stage.modules() if isinstance(layer, nn.Conv2d)]
    return len(shape) == MAP_DIMENSIONS and any(layer.out_channels == shape[1] for layer in convolutions)


def _shapes_of_maps(network: nn.Module, stages: list[nn.Module], images: Tensor) -> dict[nn.Module, torch.Size]:
    """The shape of what each stage gives for these images; a stage that runs more than once, or never, has none."""
    shapes: dict[nn.Module, list[torch.Size]] = {stage: [] for stage in stages}

    def note(stage: nn.Module, _inputs: object, output: object) -> None:
        shapes[stage].append(output.shape if isinstance(output, Tensor) else torch.Size())

    handles = [stage.register_forward_hook(note) for stage in stages]
    with removing(handles), evaluating(network), torch.no_grad():
        network(images)
    return {stage: seen[0] for stage, seen in shapes.items() if len(seen) == 1}
