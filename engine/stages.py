"""Which maps of a student are compared with which of its teacher's: the last ones of equal height and width.

Networks of one family and of different ones have such maps, at the ends of stages or of blocks. Their channels are
compared through a regressor (engine.features), also those that the student began with: it learns more that way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from engine.alteration import ALTERED
from engine.hooks import removing
from engine.modes import evaluating
from engine.probing import network_inside, noise
from engine.shapes import Shape

Places = tuple[slice, ...]  # of a batch of maps [B, C, H, W]

SECOND = slice(None, None, 2)
EIGHTH: Places = (ALTERED, slice(None), SECOND, SECOND)  # of every second image every second row and column
QUARTER: Places = (ALTERED, slice(None), SECOND)
ALL: Places = (slice(None),)
PLACES = (EIGHTH, QUARTER, ALL)  # the fewest first
MAP_DIMENSIONS = 4  # [B, C, H, W]
POSITIONS_A_CHANNEL = 12  # of a regressor, if there are as many
FEWEST_A_CHANNEL = 4  # fewer, and it fits whatever it is given


@dataclass(frozen=True)
class Pair:
    """A place in both networks at which maps have the same height and width, and what is compared of these."""

    own: nn.Module  # the student's
    theirs: nn.Module
    places: Places


@dataclass(frozen=True)
class Stages:
    """A teacher that looks on as its student learns, and the maps that are compared, if any."""

    teacher: nn.Module
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Seen:
    """What a module took and gave in a forward pass, in which it ran once and gave a map."""

    shape: torch.Size  # [B, C, H, W] of what it gave
    sides: tuple[int, int] | None  # height and width of what it took, if that was a map


def stages_of(student: nn.Module, teacher: nn.Module, image_shape: Shape, *, batch: int) -> Stages:
    """The last maps of each height and width that both networks have, if there are any.

    Two images of noise are run through both networks, which are on one device and stay as they are.

    Args:
        student: a network.
        teacher: a network.
        image_shape: (C, H, W).
        batch: images of a step.
    """
    inside = network_inside(teacher)
    shown = noise(image_shape, images=2).to(next(student.parameters()).device)
    with evaluating(student), evaluating(teacher):
        own, theirs = (_handed_on(network, _run(network, shown), shown) for network in (student, inside))
    return Stages(teacher, tuple(_of_equal_size(own, theirs, batch)))


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


def _of_equal_size(
    student: dict[nn.Module, torch.Size], teacher: dict[nn.Module, torch.Size], batch: int
) -> list[Pair]:
    """For each height and width that both networks' maps have the last map of each; both from `_handed_on`.

    As little of a map is compared as a regressor needs. Where all of it is too little, an earlier one of fewer channels
    takes its place, or none.
    """

    def per_channel(shape: torch.Size, places: Places) -> float:
        return torch.empty(batch, 1, *shape[2:], device="meta")[places].numel() / shape[1]

    last: dict[torch.Size, tuple[nn.Module, Places]] = {}
    for module, shape in student.items():
        if per_channel(shape, ALL) >= FEWEST_A_CHANNEL:
            enough = (places for places in PLACES if per_channel(shape, places) >= POSITIONS_A_CHANNEL)
            last[shape[2:]] = module, next(enough, ALL)
    targets = {shape[2:]: module for module, shape in teacher.items()}
    return [Pair(own, targets[size], places) for size, (own, places) in last.items() if size in targets]


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
