"""Feature matching: a shortened student also learns what its teacher computes at the end of each stage.

Where a student is its teacher with fewer blocks in some stages (ResNet-8 of ResNet-20, WRN-16-2 of WRN-40-2), the maps
at the end of those stages have the same shape. A target for every position of every map says more of an image than the
logits do (Romero et al. 2015, FitNets; without their regressor, as no shape differs).
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.channel_statistics import mean_and_variance
from engine.hooks import removing
from engine.modes import evaluating
from engine.probing import is_batchnorm, network_inside, noise

SMALLEST_VARIANCE = 1e-6
MAP_DIMENSIONS = 4  # [B, C, H, W]
GROWTH = 0.1  # of a map's norm: more is no rounding


@dataclass(frozen=True)
class Pair:
    """A stage that a student has with fewer blocks than its teacher."""

    own: nn.Module  # the student's
    theirs: nn.Module
    grows: bool  # whether the student's map grows with its weights: no BatchNorm stands at the end


@dataclass(frozen=True)
class Stages:
    """A teacher that looks on as its student learns, and the stages whose maps are compared, if any."""

    teacher: nn.Module
    pairs: tuple[Pair, ...]


def shared_stages(student: nn.Module, teacher: nn.Module, image_shape: tuple[int, int, int]) -> Stages:
    """The stages of both networks whose maps can be compared, if there are any.

    A stage is a module of the same name and kind in both, made of numbered blocks, of which the student has some of the
    teacher's, not all, and that gives one map [B, C, H, W] of the same shape in both. Two images of noise are run
    through both networks, which are on one device and stay as they are.

    Args:
        student: a network.
        teacher: a network.
        image_shape: (C, H, W).
    """
    theirs = dict(network_inside(teacher).named_modules())
    shortened = {
        name: (own, theirs[name])
        for name, own in student.named_modules()
        if name in theirs and type(own) is type(theirs[name]) and _blocks(own) and _blocks(own) < _blocks(theirs[name])
    }
    if not shortened:
        return Stages(teacher, ())
    images = noise(image_shape, images=2).to(next(student.parameters()).device)
    with evaluating(student), evaluating(teacher):
        maps = _maps(student, [own for own, _ in shortened.values()], images)
        their_maps = _maps(teacher, [other for _, other in shortened.values()], images)
    growing = _growing(student, [*shortened], images)
    pairs = tuple(
        Pair(own, other, name in growing)
        for name, (own, other) in shortened.items()
        if own in maps
        and other in their_maps
        and _is_map(own, maps[own])
        and maps[own].shape == their_maps[other].shape
    )
    return Stages(teacher, pairs)


@torch.no_grad()
def teacher_maps(stages: Stages, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The teacher's logits [B, K], and its map at the end of each stage as it is compared, float32 [B, C, H, W]."""
    maps: dict[nn.Module, Tensor] = {}

    def keep(stage: nn.Module, _inputs: object, output: Tensor) -> None:
        maps[stage] = output.to(torch.float32, copy=True)  # what follows may change it in place

    with removing([pair.theirs.register_forward_hook(keep) for pair in stages.pairs]):
        logits = stages.teacher(inputs)
    return logits, [_seen(pair, maps[pair.theirs]) for pair in stages.pairs]


@contextlib.contextmanager
def compared(stages: Stages, targets: list[Tensor]) -> Iterator[list[Tensor]]:
    """Within the context a forward pass of the student fills the list with the error of each stage, float32 [B].

    The error is the mean squared difference of the maps over the mean variance of the teacher's channels: 1 where the
    student knows no more than each channel's mean. Maps that grow with the weights are standardised first, as the
    BatchNorm that follows in such a network does, and the error is 1 less their correlation: as they are, they would
    drive the student to infinity (docs/experiments.md).
    """
    errors: list[Tensor] = []
    expected = {pair.own: (pair, target) for pair, target in zip(stages.pairs, targets, strict=True)}

    def compare(stage: nn.Module, _inputs: object, output: Tensor) -> None:
        pair, target = expected[stage]
        scale = 2.0 if pair.grows else mean_and_variance(target)[1].mean().clamp_min(SMALLEST_VARIANCE)
        own = _seen(pair, output.to(torch.float32, copy=pair.grows))  # its backward pass needs it as it is now
        # Not a mean: its gradient comes in another memory layout, and what follows takes up to six times as long.
        errors.append((own - target).square().sum((1, 2, 3)) / (scale * target[0].numel()))

    with removing([stage.register_forward_hook(compare) for stage in expected]):
        yield errors


def _seen(pair: Pair, maps: Tensor) -> Tensor:
    """Maps [B, C, H, W] as they are compared; a standardised channel has mean 0 and variance 1 over the batch."""
    return F.batch_norm(maps, None, None, training=True) if pair.grows else maps


def _blocks(module: nn.Module) -> set[str]:
    """The names of its children, if they are numbers: a block's own parts have words."""
    names = {name for name, _ in module.named_children()}
    return names if all(name.isdecimal() for name in names) else set()


def _is_map(stage: nn.Module, output: Tensor) -> bool:
    """Whether it is [B, C, H, W]; with the channels last it would have as many rows as a convolution has outputs."""
    convolutions = [layer for layer in stage.modules() if isinstance(layer, nn.Conv2d)]
    return output.dim() == MAP_DIMENSIONS and any(layer.out_channels == output.shape[1] for layer in convolutions)


@torch.no_grad()
def _maps(network: nn.Module, stages: list[nn.Module], images: Tensor) -> dict[nn.Module, Tensor]:
    """What each stage gives for these images; one that runs more than once, or never, or gives no tensor has none."""
    maps: dict[nn.Module, list[object]] = {stage: [] for stage in stages}

    def note(stage: nn.Module, _inputs: object, output: object) -> None:
        maps[stage].append(output.clone() if isinstance(output, Tensor) else output)

    with removing([stage.register_forward_hook(note) for stage in stages]):
        network(images)
    return {stage: seen[0] for stage, seen in maps.items() if len(seen) == 1 and isinstance(seen[0], Tensor)}


def _growing(student: nn.Module, names: list[str], images: Tensor) -> set[str]:
    """The stages, by name, whose map is another one when all convolutions have twice their weights.

    BatchNorm layers take the batch's statistics, as while the student learns; nothing is dropped.
    """
    copied = copy.deepcopy(student).eval()
    for layer in copied.modules():
        if is_batchnorm(layer):
            layer.train()
    stages = {name: copied.get_submodule(name) for name in names}
    before = _maps(copied, [*stages.values()], images)
    for layer in copied.modules():
        if isinstance(layer, nn.Conv2d):
            for name, parameter in layer.named_parameters():  # of what a parametrization computes the weight from, too
                parameter.data *= 1 if name.endswith("bias") else 2
    after = _maps(copied, [*stages.values()], images)
    apart = {stage: (after[stage] - maps).norm() / maps.norm() for stage, maps in before.items()}
    return {name for name, stage in stages.items() if float(apart.get(stage, 0.0)) > GROWTH}
