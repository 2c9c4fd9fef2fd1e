"""Whose maps a student can be compared with its teacher's: stages that both share, or the last maps of equal size.

Where a student is its teacher with fewer blocks in some stages (ResNet-8 of ResNet-20, WRN-16-2 of WRN-40-2) and began
with the teacher's weights, the maps at the end of the stages have the same shape and the same channels: they are
compared one with one. Any other network has maps of the same height and width, with other channels: these are compared
through a regressor (engine.features), which is better even for a network of the same shape that began afresh
(docs/experiments.md).
"""

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from engine.alteration import ALTERED
from engine.hooks import removing
from engine.modes import evaluating
from engine.probing import is_batchnorm, network_inside, noise
from engine.shapes import Shape

Places = tuple[slice, ...]  # of a batch of maps [B, C, H, W]

ALL: Places = (slice(None),)
COMPARED: Places = (
    ALTERED,
    slice(None),
    slice(None, None, 2),
)  # of every second image, the altered ones, every second row
MAP_DIMENSIONS = 4  # [B, C, H, W]
REGRESSED_WEIGHT = 3.0  # of such a map's error, in that of a shared stage's
GROWTH = 0.1  # of a map's norm: more is no rounding
POSITIONS_A_CHANNEL = 4  # fewer, and a regressor fits whatever it is given


@dataclass(frozen=True)
class Pair:
    """A place in both networks at which maps have the same height and width."""

    own: nn.Module  # the student's
    theirs: nn.Module
    aligned: bool  # whether the channels are the same ones; else the student's are regressed on the teacher's
    standardised: bool  # whether both maps are, before they are compared


@dataclass(frozen=True)
class Stages:
    """A teacher that looks on as its student learns, and the maps that are compared, if any."""

    teacher: nn.Module
    pairs: tuple[Pair, ...]
    places: Places = COMPARED

    @property
    def weight(self) -> float:
        """What `feature_weight` is multiplied by: a regressor leaves less of an error."""
        return 1.0 if all(pair.aligned for pair in self.pairs) else REGRESSED_WEIGHT


@dataclass(frozen=True)
class Seen:
    """What a module took and gave in a forward pass, in which it ran once and gave a map."""

    shape: torch.Size  # [B, C, H, W] of what it gave
    sides: tuple[int, int] | None  # height and width of what it took, if that was a map


def stages_of(
    student: nn.Module,
    teacher: nn.Module,
    image_shape: Shape,
    *,
    batch: int,
    inherited: Collection[str] = (),
    places: Places = COMPARED,
) -> Stages:
    """The maps that can be compared: of shared stages, else the last ones of equal size, if there are any.

    A shared stage is a module of the same name and kind in both, made of numbered blocks, of which the student has none
    that the teacher has not, with weights that began as the teacher's, and gives one map of the same shape in both. Two
    images of noise are run through both networks, which are on one device and stay as they are.

    Args:
        student: a network.
        teacher: a network.
        image_shape: (C, H, W).
        batch: images of a step.
        inherited: names of the student's parameters that began as the teacher's.
        places: what is compared of each map.
    """
    inside = network_inside(teacher)
    shown = noise(image_shape, images=2).to(next(student.parameters()).device)
    with evaluating(student), evaluating(teacher):
        own, theirs = _run(student, shown), _run(inside, shown)
    names = [
        name
        for name in _shared(student, inside, own, theirs)
        if any(_is_in(parameter, name) for parameter in inherited)
    ]
    if not names:
        handed_on, their_handed_on = _handed_on(student, own, shown), _handed_on(inside, theirs, shown)
        return Stages(teacher, tuple(_of_equal_size(handed_on, their_handed_on, batch, places)), places)
    growing = _growing(student, names, shown)
    pairs = (
        Pair(student.get_submodule(name), inside.get_submodule(name), aligned=True, standardised=name in growing)
        for name in names
    )
    return Stages(teacher, tuple(pairs), places)


@torch.no_grad()
def _run(network: nn.Module, shown: Tensor) -> dict[nn.Module, Seen]:
    """What each module does with these images, in the order in which they end; only those that run once, to a map.

    A map [B, C, H, W] has one entry for each image, and as many channels as some convolution gives or takes: what is
    inside an attention, or has its channels last, is none.
    """
    images = len(shown)
    channels = {size for weight in network.parameters() if weight.dim() == MAP_DIMENSIONS for size in weight.shape[:2]}
    seen: dict[nn.Module, list[Seen | None]] = {}

    def is_map(value: object) -> TypeGuard[Tensor]:
        return (
            isinstance(value, Tensor)
            and value.dim() == MAP_DIMENSIONS
            and value.shape[0] == images
            and value.shape[1] in channels
        )

    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        taken = inputs[0] if inputs else None
        sides = (
            (taken.shape[2], taken.shape[3]) if isinstance(taken, Tensor) and taken.dim() == MAP_DIMENSIONS else None
        )
        seen.setdefault(module, []).append(Seen(output.shape, sides) if is_map(output) else None)

    hookable = [module for module in network.modules() if not isinstance(module, torch.jit.ScriptModule)]
    with removing([module.register_forward_hook(note) for module in hookable]):
        network(shown)
    return {module: found[0] for module, found in seen.items() if len(found) == 1 and found[0]}


def _shared(
    student: nn.Module, teacher: nn.Module, own: dict[nn.Module, Seen], theirs: dict[nn.Module, Seen]
) -> list[str]:
    """The names of the stages that both have, whatever their weights: those with fewer blocks in the student.

    Behind the first of them all maps are others, so that stages with all of their blocks follow there; not those inside
    another stage, as a block's own parts are, and none that holds other stages.
    """
    others = dict(teacher.named_modules())
    names = {module: name for name, module in student.named_modules()}
    common = [
        names[stage]
        for stage in own  # in the order in which they end
        if (other := others.get(names[stage])) is not None
        and type(stage) is type(other)
        and _blocks(stage)
        and _blocks(stage) <= _blocks(other)
        and other in theirs
        and _has_channels_first(stage, own[stage].shape)
        and own[stage].shape == theirs[other].shape
    ]
    shorter = [name for name in common if _blocks(student.get_submodule(name)) < _blocks(others[name])]
    behind = common[common.index(shorter[0]) :] if shorter else []
    apart = [
        name
        for name in behind
        if name not in shorter and not any(_is_in(name, other) or _is_in(other, name) for other in shorter)
    ]
    return [*shorter, *(name for name in apart if not any(_is_in(name, other) for other in apart))]


def _is_in(part: str, whole: str) -> bool:
    """Whether what has the one name, a module or a parameter, is in the module that has the other."""
    return part.startswith(f"{whole}.")


def _blocks(module: nn.Module) -> set[str]:
    """The names of its children, if they are numbers: a block's own parts have words."""
    names = {name for name, _ in module.named_children()}
    return names if all(name.isdecimal() for name in names) else set()


def _has_channels_first(stage: nn.Module, shape: torch.Size) -> bool:
    """Whether it is [B, C, H, W]; with the channels last it would have as many rows as a convolution has outputs."""
    convolutions = [layer for layer in stage.modules() if isinstance(layer, nn.Conv2d)]
    return any(layer.out_channels == shape[1] for layer in convolutions)


def _growing(student: nn.Module, names: list[str], shown: Tensor) -> set[str]:
    """The stages, by name, whose map is another one when all convolutions have twice their weights.

    BatchNorm layers take the batch's statistics, as while the student learns; nothing is dropped.
    """
    copied = copy.deepcopy(student).eval()
    for layer in copied.modules():
        if is_batchnorm(layer):
            layer.train()
    before = _outputs(copied, names, shown)
    for layer in copied.modules():
        if isinstance(layer, nn.Conv2d):
            for name, parameter in layer.named_parameters():  # of what a parametrization computes the weight from, too
                parameter.data *= 1 if name.endswith("bias") else 2
    after = _outputs(copied, names, shown)
    return {name for name in names if float((after[name] - before[name]).norm() / before[name].norm()) > GROWTH}


@torch.no_grad()
def _outputs(network: nn.Module, names: list[str], shown: Tensor) -> dict[str, Tensor]:
    """What the modules of these names give for these images; a copy, as what follows may change it in place."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: outputs.update({name: output.clone()})

    with removing([network.get_submodule(name).register_forward_hook(hook(name)) for name in names]):
        network(shown)
    return outputs


def _of_equal_size(
    student: dict[nn.Module, torch.Size], teacher: dict[nn.Module, torch.Size], batch: int, places: Places
) -> list[Pair]:
    """For each height and width that both networks' maps have the last map of each; both from `_handed_on`."""

    def positions(shape: torch.Size) -> int:
        return torch.empty(batch, 1, *shape[2:], device="meta")[places].numel()

    last = {
        shape[2:]: module for module, shape in student.items() if POSITIONS_A_CHANNEL * shape[1] <= positions(shape)
    }
    targets = {shape[2:]: module for module, shape in teacher.items()}
    return [Pair(last[size], targets[size], aligned=False, standardised=True) for size in last if size in targets]


def _handed_on(network: nn.Module, ran: dict[nn.Module, Seen], shown: Tensor) -> dict[nn.Module, torch.Size]:
    """The shapes of the maps that a network hands on from module to module, in their order.

    Those of the outermost modules that give a map of at least half the height and width of the one that they take:
    blocks and layers, but no parts of a block, and nothing that holds the whole network. A network that is a graph has
    no blocks, but its operations (`engine.graphs.show_outputs`): the last of a size may be inside one.
    """

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if child in ran and _hands_on(ran[child], shown):
                yield child
            else:
                yield from inside(child)

    outermost = set(inside(network))
    return {module: seen.shape for module, seen in ran.items() if module in outermost}


def _hands_on(seen: Seen, shown: Tensor) -> bool:
    """Whether a map is made of a map, is at least half as high and wide, and has the proportions of the images."""
    (height, width), (images_height, images_width) = seen.shape[2:], shown.shape[2:]
    return (
        seen.sides is not None
        and 2 * height >= seen.sides[0]
        and 2 * width >= seen.sides[1]
        and abs(height * images_width - width * images_height) <= max(images_height, images_width)
    )
