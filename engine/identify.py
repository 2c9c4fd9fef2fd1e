"""Which architecture a bare state dict belongs to, from its names and shapes, and how sure that is.

Names and shapes that agree with one architecture alone settle it. Where only the names differ, the layers must agree
in kind, shape and order, and the blocks that the names spell out must not cross: the layers of a pre-activation ResNet
have the order and the shapes of a plain one's, but its blocks begin one BatchNorm earlier. Strides, paddings and
epsilons show nowhere, so an agreement by order is always said to be one.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.catalogue import (
    IGNORED_SUFFIXES,
    WITH_AUXILIARY_HEADS,
    Architecture,
    TensorShape,
    architectures,
    skeleton,
    timms_named_like,
    without_memory,
)
from engine.errors import SSDKDError
from engine.unwrap import State

NAMES_MATCH = "layer names and shapes match"
ORDER_MATCHES = "shapes match in order; layer names differ"
SIZE_TOLERANCE = 0.02  # log(file / candidate); an exact fit has 0, the rest covers what the head's estimate misses
MAX_COMPARED = 16
NEAR = 0.25  # of the file's names must be a network's, for it to be shown
NEAREST_SHOWN = 3
HEAD_NAMES = {"fc", "linear", "classifier", "head", "heads", "output", "logits", "last_linear"}
SHORTCUT_NAMES = {"shortcut", "downsample", "skip", "skip_connection", "residual_conv", "convshortcut", "identity_conv"}
ASK_FOR_ARCH = (
    "say which network it is with --arch NAME (ours, torchvision's or timm's; `ssdkd students` lists ours), "
    "or --arch package.module:function for your own code"
)


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
    """The tensors of one layer, in the file's order: (suffix, shape), for example ("weight", (10, 64))."""

    path: str
    shapes: tuple[tuple[str, TensorShape], ...]


def fitting(state: State, *, keeps_order: bool, hint: Architecture | None = None, file_stem: str = "") -> list[Match]:
    """Every architecture that fits `state`, by name if any does, else by order; one match each.

    `keeps_order`: whether the file has the layers in the network's order, without which other names cannot be matched.
    `hint`: the architecture that the file itself says it is. `file_stem`: where nothing fits, networks of timm that the
    file is called after are tried.
    """
    shapes = shapes_of(state)
    guesses = guess_heads(shapes)

    def among(candidates: Sequence[Architecture]) -> list[Match]:
        return [
            match
            for architecture in candidates
            for classes, channels in guesses
            if (match := compare(shapes, architecture, classes, channels, keeps_order))
        ]

    # Auxiliary heads count classes too, so that size says little about the networks that have them.
    with_heads = [architecture for architecture in architectures() if architecture.name in WITH_AUXILIARY_HEADS]
    matches = among(_candidates(shapes, guesses, hint)) or among(with_heads) or among(timms_named_like(file_stem))
    by_name = [match for match in matches if match.evidence == NAMES_MATCH]
    # Of one name, the first: a hint stands before what we know by that name.
    return list({match.architecture.name: match for match in reversed(by_name or matches)}.values())


def identify(state: State, *, keeps_order: bool, hint: Architecture | None = None, path: Path = Path("FILE")) -> Match:
    """The one architecture that `state` belongs to; where several fit, the one that the file names (`hint`).

    The arguments are those of `fitting`, which takes the stem of the file's `path`.

    Raises:
        SSDKDError: several fit, or none. Lists the nearest and what differs, and asks for --arch.
    """
    matches = fitting(state, keeps_order=keeps_order, hint=hint, file_stem=path.stem)
    if not matches:
        raise _no_match(shapes_of(state), hint, keeps_order)
    named = [match for match in matches if hint and match.architecture.name == hint.name]
    if named or len(matches) == 1:
        return [*named, *matches][0]
    found = sorted((match.architecture for match in matches), key=lambda architecture: architecture.name)
    known = [f"{one.name} (usually {one.pixels} px)" if one.pixels else one.name for one in found]
    command = shlex.join(["ssdkd", "inspect", str(path), "--arch", found[0].name])
    raise SSDKDError(
        f"several architectures fit these weights ({matches[0].evidence}): {', '.join(known)}. "
        "They differ in what a state dict does not show, such as strides and padding",
        f"say which it is with --arch, for example: {command}",
    )


def compare(
    shapes: Mapping[str, TensorShape], architecture: Architecture, classes: int, channels: int, keeps_order: bool = True
) -> Match | None:
    """A match by names, else by order, else None."""
    theirs = _skeleton_of(architecture, classes, channels)
    if theirs == shapes:
        return Match(architecture, classes, channels, NAMES_MATCH, {name: name for name in shapes})
    names = map_in_order(shapes, theirs) if keeps_order else None
    return Match(architecture, classes, channels, ORDER_MATCHES, names) if names else None


def shapes_of(state: State) -> dict[str, TensorShape]:
    """Names and shapes of what counts: counters of batches and profilers' leftovers are left out."""
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith(IGNORED_SUFFIXES)}


def map_in_order(
    ours: Mapping[str, TensorShape], theirs: Mapping[str, TensorShape], *, check_blocks: bool = True
) -> dict[str, str] | None:
    """Names of `ours` -> names of `theirs` where layer after layer agrees in kind and shapes, and no blocks cross."""
    our_layers, their_layers = shortcuts_last(layers_of(ours)), shortcuts_last(layers_of(theirs))
    if [sorted(layer.shapes) for layer in our_layers] != [sorted(layer.shapes) for layer in their_layers]:
        return None
    if check_blocks and blocks_cross([layer.path for layer in our_layers], [layer.path for layer in their_layers]):
        return None
    return {
        f"{our.path}.{suffix}".lstrip("."): f"{their.path}.{suffix}".lstrip(".")
        for our, their in zip(our_layers, their_layers, strict=True)
        for suffix, _ in our.shapes
    }


def layers_of(shapes: Mapping[str, TensorShape]) -> list[Layer]:
    """Groups the tensors by the layer that owns them, in order of first appearance."""
    grouped: dict[str, list[tuple[str, TensorShape]]] = {}
    for name, shape in shapes.items():
        path, _, suffix = name.rpartition(".")
        grouped.setdefault(path, []).append((suffix, shape))
    return [Layer(path, tuple(tensors)) for path, tensors in grouped.items()]


def shortcuts_last(layers: Sequence[Layer]) -> list[Layer]:
    """With the layers of a block's shortcut behind the others: some code creates them first, some last."""
    place = {layer.path: index for index, layer in enumerate(layers)}
    ends: dict[str, int] = {}
    for layer in layers:
        parts = layer.path.split(".")
        for depth in range(1, len(parts)):
            ends[".".join(parts[:depth])] = place[layer.path]

    def position(layer: Layer) -> tuple[int, int, int]:
        parts = layer.path.split(".")
        depth = next((depth for depth, part in enumerate(parts) if part.lower() in SHORTCUT_NAMES), 0)
        index = place[layer.path]
        return (ends[".".join(parts[:depth])], 1, index) if depth else (index, 0, index)

    return sorted(layers, key=position)


def blocks_cross(our_paths: Sequence[str], their_paths: Sequence[str]) -> bool:
    """Whether a block of ours overlaps a block of theirs while neither holds the other.

    A block is a run of layers whose names begin alike. Flat names (`conv1`, `bn1`) spell out no blocks.
    """
    theirs = _blocks(their_paths)
    return any(a < c < b < d or c < a < d < b for a, b in _blocks(our_paths) for c, d in theirs)


def guess_heads(shapes: Mapping[str, TensorShape]) -> list[tuple[int, int]]:
    """Likely (classes, channels), the likeliest first, read off the last and the first layers that have a matrix."""
    matrices = [(name, shape) for name, shape in shapes.items() if len(shape) >= 2]
    if not matrices:
        return []
    named = [shape[0] for name, shape in matrices if HEAD_NAMES.intersection(name.split(".")[:2])]
    classes = [*reversed(named), matrices[-1][1][0]]
    kernels = [shape for _, shape in matrices if len(shape) == 4]
    thin = sorted({shape[1] for shape in kernels if shape[1] <= 4}, key=lambda channels: (channels != 3, channels))
    first = [shape[1] for shape in kernels[:1] if shape[1] <= 4]
    return [(a, b) for a in dict.fromkeys(classes) for b in dict.fromkeys([*first, *thin] or [3])]


def differences(ours: Mapping[str, TensorShape], theirs: Mapping[str, TensorShape], shown: int = 2) -> str:
    """What a file has and lacks against a network, in one line."""
    parts = {
        "missing from the file": [name for name in theirs if name not in ours],
        "only in the file": [name for name in ours if name not in theirs],
        "of another shape": [
            f"{name} {list(ours[name])} instead of {list(theirs[name])}"
            for name in theirs
            if name in ours and ours[name] != theirs[name]
        ],
    }
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:shown])}{', ...' if len(names) > shown else ''})"
        for what, names in parts.items()
        if names
    )


def _skeleton_of(architecture: Architecture, classes: int, channels: int) -> dict[str, TensorShape]:
    with without_memory():
        return skeleton(architecture.build(classes, channels))


def _candidates(
    shapes: Mapping[str, TensorShape], guesses: Sequence[tuple[int, int]], hint: Architecture | None
) -> list[Architecture]:
    near = [architecture for distance, architecture in _by_size(shapes, guesses) if distance < SIZE_TOLERANCE]
    return [*([hint] if hint else []), *near[:MAX_COMPARED]]


def _by_size(shapes: Mapping[str, TensorShape], guesses: Sequence[tuple[int, int]]) -> list[tuple[float, Architecture]]:
    """The known architectures and how far each is from the file's number of parameters, the nearest first."""
    if not guesses:
        return []
    count = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(("_mean", "_var")))
    classes = guesses[0][0]
    head_inputs = [math.prod(shape[1:]) for shape in shapes.values() if len(shape) >= 2 and shape[0] == classes]

    def distance(architecture: Architecture) -> float:
        # With the file's number of classes the same network would have this many parameters more.
        head = (classes - architecture.classes) * (head_inputs[-1] + 1)
        return min(abs(math.log(max(1, size + head) / count)) for size in architecture.parameters)

    return sorted(
        ((distance(architecture), architecture) for architecture in architectures()), key=lambda item: item[0]
    )


def _no_match(shapes: Mapping[str, TensorShape], hint: Architecture | None, keeps_order: bool) -> SSDKDError:
    guesses = guess_heads(shapes)
    nearest = [*([hint] if hint else []), *(architecture for _, architecture in _by_size(shapes, guesses))]
    compared = {near.name: _skeleton_of(near, *guesses[0]) for near in nearest[:NEAREST_SHOWN] if guesses}
    lines = [
        f"\n  {name}: {differences(shapes, theirs)}"
        for name, theirs in compared.items()
        if len(theirs.keys() & shapes.keys()) >= NEAR * len(shapes)
    ]
    near = ". The nearest:" if lines else ", nor is any near; a network of timm's must be named"
    order = "" if keeps_order else "; this format does not keep the layers' order, so other names cannot be matched"
    return SSDKDError(
        "the architecture is not known: expected one of ours or of torchvision's, found "
        f"{len(layers_of(shapes))} layers that fit none{order}{near}{''.join(lines)}",
        ASK_FOR_ARCH,
    )


def _blocks(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Runs [first, last) of two layers or more whose names begin alike, over all depths of naming."""
    parts = [path.split(".") for path in paths]
    runs = set()
    for depth in range(1, max(map(len, parts), default=0)):
        start = 0
        for end in range(1, len(parts) + 1):
            if end == len(parts) or parts[end][:depth] != parts[start][:depth]:
                if end - start >= 2:
                    runs.add((start, end))
                start = end
    return sorted(runs)
