"""Which architecture a bare state dict belongs to, from its names and shapes, and how sure that is.

Names and shapes that agree in one architecture alone settle it. Where only the names differ, the layers must agree in kind,
shape and order, and the blocks that the names of both sides spell out must not cross: the layers of a pre-activation ResNet
have the order and the shapes of a plain one's, but its blocks begin one BatchNorm earlier. Strides, paddings and epsilons
show nowhere, so an agreement by order is always said to be one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from engine.catalogue import IGNORED_SUFFIXES, Architecture, Shape, architectures, skeleton, without_memory
from engine.errors import SSDKDError
from engine.unwrap import State

NAMES_MATCH = "layer names and shapes match"
ORDER_MATCHES = "shapes match in order; layer names differ"
PARAMETER_TOLERANCE = 0.05  # candidates this close in size are compared; buffers and heads blur the count
MAX_COMPARED = 12
NEAREST_SHOWN = 3


@dataclass(frozen=True)
class Match:
    """An architecture that fits, and the network's name of each of the file's tensors."""

    architecture: Architecture
    classes: int
    channels: int
    evidence: str
    names: dict[str, str]  # name in the file -> name in the network


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer, in the file's order: `shapes` by suffix (weight, bias, running_mean, ...)."""

    path: str
    shapes: tuple[tuple[str, Shape], ...]


def identify(state: State, *, keeps_order: bool, hint: Architecture | None = None) -> Match:
    """The one architecture that `state` belongs to.

    `keeps_order`: whether the file keeps the layers' order, without which differing names cannot be matched. `hint`: the
    architecture that the file itself names; it decides where several fit.
    Raises SSDKDError where several fit or none: lists the nearest and what differs, and asks for --arch.
    """
    shapes = shapes_of(state)
    guesses = guess_heads(shapes)
    candidates = [hint] if hint else []
    candidates += _near_in_size(shapes, guesses)
    matches: list[Match] = []
    for architecture in candidates:
        matches += [match for classes, channels in guesses if (match := compare(shapes, architecture, classes, channels, keeps_order))]
    for evidence in (NAMES_MATCH, ORDER_MATCHES):
        fitting = {match.architecture.name: match for match in matches if match.evidence == evidence}
        if hint and hint.name in fitting:
            return fitting[hint.name]
        if len(fitting) == 1:
            return next(iter(fitting.values()))
        if fitting:
            names = sorted(fitting)
            raise SSDKDError(
                f"Several architectures fit these weights ({evidence}): {', '.join(names)}. They differ in what shapes do not show"
                " (strides, padding, where the blocks begin).",
                f"Say which it is with --arch, for example --arch {names[0]}.",
            )
    raise _no_match(shapes, guesses, candidates, keeps_order)


def compare(shapes: Mapping[str, Shape], architecture: Architecture, classes: int, channels: int, keeps_order: bool = True) -> Match | None:
    """A match by names, else by order, else None."""
    theirs = _skeleton_of(architecture, classes, channels)
    if theirs is None:
        return None
    if theirs == shapes:
        return Match(architecture, classes, channels, NAMES_MATCH, {name: name for name in shapes})
    names = map_in_order(shapes, theirs) if keeps_order else None
    return Match(architecture, classes, channels, ORDER_MATCHES, names) if names else None


def shapes_of(state: State) -> dict[str, Shape]:
    """Names and shapes of what counts: counters and profilers' leftovers are left out."""
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith(IGNORED_SUFFIXES)}


def map_in_order(ours: Mapping[str, Shape], theirs: Mapping[str, Shape], *, check_blocks: bool = True) -> dict[str, str] | None:
    """Names of `ours` -> names of `theirs` where layer after layer agrees in kind and shapes and no blocks cross."""
    our_layers, their_layers = layers_of(ours), layers_of(theirs)
    if [sorted(layer.shapes) for layer in our_layers] != [sorted(layer.shapes) for layer in their_layers]:
        return None
    if check_blocks and blocks_cross([layer.path for layer in our_layers], [layer.path for layer in their_layers]):
        return None
    return {
        _join(our.path, suffix): _join(their.path, suffix)
        for our, their in zip(our_layers, their_layers, strict=True)
        for suffix, _ in our.shapes
    }


def layers_of(shapes: Mapping[str, Shape]) -> list[Layer]:
    """Groups the tensors by the layer that owns them, in order of first appearance."""
    grouped: dict[str, list[tuple[str, Shape]]] = {}
    for name, shape in shapes.items():
        path, _, suffix = name.rpartition(".")
        grouped.setdefault(path, []).append((suffix, shape))
    return [Layer(path, tuple(tensors)) for path, tensors in grouped.items()]


def blocks_cross(our_paths: Sequence[str], their_paths: Sequence[str]) -> bool:
    """Whether some block of ours holds a part, but not the whole, of some block of theirs, and the other way round too.

    A block is a run of layers whose names begin alike. Flat names (`conv1`, `bn1`) spell out no blocks and cross nothing.
    """
    theirs = _blocks(their_paths)
    return any(a < c < b < d or c < a < d < b for a, b in _blocks(our_paths) for c, d in theirs)


def guess_heads(shapes: Mapping[str, Shape]) -> list[tuple[int, int]]:
    """Likely (classes, channels), the likeliest first, read off the last and the first layers that have a matrix."""
    matrices = [(name, shape) for name, shape in shapes.items() if len(shape) >= 2]
    if not matrices:
        return []
    named = [shape[0] for name, shape in matrices if _is_head(name)]
    classes = [matrices[-1][1][0], *reversed(named)]
    kernels = [shape for _, shape in matrices if len(shape) == 4]
    thin = sorted({shape[1] for shape in kernels if shape[1] <= 4}, key=lambda channels: (channels != 3, channels))
    channels = [*([kernels[0][1]] if kernels and kernels[0][1] <= 4 else []), *thin] or [3]
    return [(a, b) for a in dict.fromkeys(classes) for b in dict.fromkeys(channels)]


def differences(ours: Mapping[str, Shape], theirs: Mapping[str, Shape], limit: int = 3) -> str:
    """What a file has and lacks against a network, in one line."""
    missing = [name for name in theirs if name not in ours]
    unexpected = [name for name in ours if name not in theirs]
    other = [f"{name} is {ours[name]}, not {theirs[name]}" for name in theirs if name in ours and ours[name] != theirs[name]]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:limit])}{', ...' if len(names) > limit else ''})"
        for names, what in ((missing, "missing from the file"), (unexpected, "only in the file"), (other, "of another shape"))
        if names
    ]
    return "; ".join(parts) or "nothing"


def _is_head(name: str) -> bool:
    last_names = {"fc", "linear", "classifier", "head", "heads", "output", "logits", "last_linear"}
    return any(part in last_names for part in name.split(".")[:2])


def _skeleton_of(architecture: Architecture, classes: int, channels: int) -> dict[str, Shape] | None:
    module = _unbuilt(architecture, classes, channels)
    return skeleton(module) if module is not None else None


def _unbuilt(architecture: Architecture, classes: int, channels: int) -> nn.Module | None:
    with without_memory():
        return architecture.build(classes, channels)


def _near_in_size(shapes: Mapping[str, Shape], guesses: Sequence[tuple[int, int]]) -> list[Architecture]:
    """The candidates whose parameter count is near that of the file, the nearest first."""
    count = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(("running_mean", "running_var")))
    if not guesses:
        return []
    widths = [math.prod(shape[1:]) for shape in shapes.values() if len(shape) >= 2 and shape[0] == guesses[0][0]]
    width = widths[-1] if widths else 0

    def distance(architecture: Architecture) -> float:
        # The same network with the file's number of classes would have this many parameters more.
        head = (guesses[0][0] - architecture.classes) * (width + 1)
        return min(abs(math.log(max(1, parameters + head) / count)) for parameters in architecture.parameters)

    ranked = sorted(architectures(), key=distance)
    near = [architecture for architecture in ranked if distance(architecture) < PARAMETER_TOLERANCE]
    return near[:MAX_COMPARED] or ranked[:NEAREST_SHOWN]


def _no_match(shapes: Mapping[str, Shape], guesses: Sequence[tuple[int, int]], candidates: Sequence[Architecture], keeps_order: bool) -> SSDKDError:
    layers = len(layers_of(shapes))
    lines = []
    for architecture in candidates[:NEAREST_SHOWN]:
        theirs = _skeleton_of(architecture, *guesses[0])
        if theirs is not None:
            lines.append(f"\n  {architecture.name}: {differences(shapes, theirs)}")
    order = "" if keeps_order else " This format does not keep the layers' order, so differing names cannot be matched."
    nearest = f" The nearest: {''.join(lines)}" if lines else ""
    return SSDKDError(
        f"The architecture is not known: expected one of ssdkd's or torchvision's, found {layers} layers that fit none.{order}{nearest}",
        "Say which network it is: --arch NAME (torchvision, timm, `ssdkd students`) or --arch package.module:function for your own code.",
    )


def _blocks(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Runs [first, last) of at least two layers whose names share a prefix, over all prefixes."""
    runs = set()
    depths = [path.split(".") for path in paths]
    for depth in range(1, max((len(parts) for parts in depths), default=0)):
        start = 0
        for index in range(1, len(depths) + 1):
            prefix = depths[start][:depth]
            if index == len(depths) or depths[index][:depth] != prefix:
                if index - start >= 2 and len(depths[start]) > depth:
                    runs.add((start, index))
                start = index
    return sorted(runs)


def _join(path: str, suffix: str) -> str:
    return f"{path}.{suffix}" if path else suffix
