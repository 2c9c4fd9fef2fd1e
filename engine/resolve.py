"""From a checkpoint to a network: the file's own module, an architecture with the file's weights, or a graph."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from engine.checkpoints import Checkpoint
from engine.errors import SSDKDError
from engine.facts import architecture_in, input_shape_in, is_our_student
from engine.graphs import Graph, check_graph, same_logits
from engine.probing import FORWARD_ERRORS, TRIED_PIXELS, noise
from engine.rebuild import Rebuilt, rebuild, rebuild_like, rebuild_stated
from engine.shapes import Shape
from engine.unwrap import State

GRAPH = "graph"


def resolve_network(checkpoint: Checkpoint, path: Path, *, arch: str | None, input_shape: Shape | None) -> Rebuilt:
    """The network of a checkpoint; `path` is the file's, `arch` and `input_shape` are the user's.

    An exported graph is rebuilt as the architecture that its weights fit if that computes the same logits; else the
    graph itself is run.

    Raises:
        SSDKDError: an unknown or ambiguous architecture, weights or a graph that cannot be used.
    """
    weights = checkpoint.weights
    if weights.module is not None:
        return _as_pickled(weights.module, arch)
    notes = _check_numbers(weights.state, path.name)
    shape = input_shape or input_shape_in(weights.metadata, 3) or input_shape_in(weights.metadata, 1)
    if checkpoint.graph is not None:
        found = _from_graph(checkpoint, checkpoint.graph, path.name, arch, shape or checkpoint.graph.input_shape)
    else:
        pixels = min(shape[1:]) if shape else None
        if arch:
            found = rebuild_stated(weights.state, arch, keeps_order=checkpoint.keeps_order, pixels=pixels)
        else:
            named = architecture_in(weights.metadata)
            found = rebuild(
                weights.state,
                keeps_order=checkpoint.keeps_order,
                named_in_file=named,
                pixels=pixels,
                is_our_student=is_our_student(weights.metadata),
                path=path,
            )
    return replace(found, warnings=(*notes, *found.warnings))


def _as_pickled(module: nn.Module, arch: str | None) -> Rebuilt:
    kind = type(module).__name__
    if arch:
        raise SSDKDError(f"the file holds the network itself, a {kind}: --arch {arch} has no use", "leave --arch away")
    return Rebuilt(module, kind, "the file holds the network itself", None, ())


def _from_graph(checkpoint: Checkpoint, graph: Graph, name: str, arch: str | None, shape: Shape | None) -> Rebuilt:
    state = checkpoint.weights.state

    def agrees(module: nn.Module, pixels: int | None) -> bool:
        return same_logits(module, graph, shape or _square(state, pixels))

    found: Rebuilt | None
    if arch:
        try:
            found = rebuild_stated(state, arch, keeps_order=True, pixels=min(shape[1:]) if shape else None)
        except SSDKDError as error:
            raise SSDKDError(
                f"{error.message} (exporters rename layers and fold BatchNorm into convolutions)",
                "leave --arch away to run the graph itself, or give the checkpoint that it was exported from",
            ) from error
        if not agrees(found.module, found.pixels):
            raise SSDKDError(
                f"the weights of {name} fit --arch {arch}, but that network does not compute what the file computes",
                "name another architecture, or leave --arch away to run the graph itself",
            )
    else:
        found = rebuild_like(state, agrees, named_in_file=architecture_in(checkpoint.weights.metadata))
    if found:
        return replace(found, input_shape=shape)
    shape = shape or _first_that_runs(graph, state)
    check_graph(graph, shape, name)
    evidence = "not identified; run as it is, after a check against its own runtime"
    return Rebuilt(graph.module, GRAPH, evidence, shape[1], (), graph.input_shape)


def _square(state: State, pixels: int | None) -> Shape:
    first = next((value for value in state.values() if value.dim() == 4), None)
    side = pixels or TRIED_PIXELS[0]
    return int(first.shape[1]) if first is not None else 3, side, side


def _first_that_runs(graph: Graph, state: State) -> Shape:
    """A size that the graph takes; the smallest that was tried if it takes none, for the error that says so."""
    for pixels in TRIED_PIXELS:
        for channels in dict.fromkeys((_square(state, pixels)[0], 3, 1)):
            try:
                graph.reference(noise((channels, pixels, pixels), graph.batch or 2))
            except FORWARD_ERRORS:
                continue
            return channels, pixels, pixels
    return _square(state, None)


def _check_numbers(state: State, name: str) -> list[str]:
    """Notes on weights that are not float32. Raises SSDKDError for quantized ones."""
    quantized = [
        key
        for key, value in state.items()
        if value.is_quantized
        or "_packed_params" in key
        or (value.dim() >= 2 and value.dtype in (torch.int8, torch.uint8))
    ]
    if quantized:
        raise SSDKDError(
            f"{name} holds quantized weights ({quantized[0]}): expected float ones",
            "give the float network that it was made from; ssdkd makes the student small, not the teacher",
        )
    kinds = sorted(
        {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()} - {"float32"}
    )
    return [f"The weights are {' and '.join(kinds)}; they are converted to float32."] if kinds else []
