"""The same network, written so that ONNX Runtime computes all of it with its integer convolutions.

A step before INT8. What ONNX Runtime would compute in float32 between two convolutions becomes a convolution with one
weight a channel, which the channel's own scale holds exactly; an image gets the channels that its integer kernel wants.
Rounded anew is only the shift of a BatchNorm (docs/quantization.md).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

IMAGE_RANK = 4  # [N, C, H, W]
CHANNELS_AT_ONCE = 4  # of a pixel, that one instruction multiplies
LARGEST_FACTOR = 30  # of a BatchNorm's median factor: a shift is rounded to a 127th of an input step times its own
LEAST_FACTOR = 1e-12  # a weight of 0 would get a scale of 1, and its shift be rounded to whole input steps


def integer_layout(model: onnx.ModelProto, integer_operators: Collection[str]) -> onnx.ModelProto:
    """A copy of the float32 `model` that computes the same with

    - the shortcut without weights of CIFAR's ResNets (every second pixel, then channels of zeros) as a convolution of
      one pixel with a stride,
    - a BatchNorm between a result of `integer_operators`, which will be integers, and a convolution, as in a Wide
      ResNet, as a depthwise convolution of one pixel,
    - zeros as further channels of an image, up to the four that are multiplied at once.

    A graph with branches or loops stays as it is, since they may read any tensor by its name; so does a BatchNorm with
    a factor beyond LARGEST_FACTOR, as a dead channel has one.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    if model.graph.sparse_initializer or any(
        attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute
    ):
        return copied
    _rewrite(copied, _shortcuts)
    _rewrite(copied, partial(_batchnorms, integer_operators=integer_operators))
    _rewrite(copied, partial(_images_of_few_channels, integer_operators=integer_operators))
    return copied


class _Graph:
    """What is looked up: constants, the shapes that are known, who makes a tensor and how many take it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.constants: Mapping[str, NDArray[Any]] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        self.shapes = {
            value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.input)
        }
        self.producers = {output: node for node in self.nodes for output in node.output}
        self.takers = Counter(name for node in self.nodes for name in node.input)
        self.takers.update(value.name for value in model.graph.output)

    def constant(self, node: NodeProto, index: int) -> NDArray[Any] | None:
        """The constant that is the node's input there, or None."""
        return self.constants.get(node.input[index]) if index < len(node.input) else None


@dataclass(frozen=True)
class _Rewriting:
    """Nodes in the place of another, with their constants; `without` are nodes before it that only it took from."""

    old: NodeProto
    new: list[NodeProto]
    constants: Mapping[str, NDArray[Any]]
    without: list[NodeProto] = field(default_factory=list)


def _rewrite(model: onnx.ModelProto, find: Callable[[_Graph], Iterator[_Rewriting]]) -> None:
    """Replace in `model` what `find` finds, and drop the constants that nobody reads any more."""
    graph = _Graph(model)
    found = list(find(graph))
    if not found:
        return
    places = {rewriting.old.output[0]: rewriting.new for rewriting in found}
    gone = {node.output[0] for rewriting in found for node in rewriting.without}
    constants = {name: array for rewriting in found for name, array in rewriting.constants.items()}
    nodes = [made for node in graph.nodes if node.output[0] not in gone for made in places.get(node.output[0], [node])]
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read and tensor.name not in constants]
    rewritten = helper.make_graph(
        nodes,
        model.graph.name,
        model.graph.input,
        model.graph.output,
        [*kept, *(numpy_helper.from_array(array, name) for name, array in constants.items())],
    )
    model.graph.CopyFrom(rewritten)


def _shortcuts(graph: _Graph) -> Iterator[_Rewriting]:
    for pad in graph.nodes:
        around = _channels_padded(graph, pad)
        if around is None:
            continue
        strides, slices, source = [1, 1], [], pad.input[0]
        while (node := graph.producers.get(source)) is not None and graph.takers[source] == 1:
            stepped = _pixels_skipped(graph, node)
            if stepped is None:
                break
            axis, step = stepped
            strides[axis - 2] *= step
            slices.append(node)
            source = node.input[0]
        shape = graph.shapes.get(source, [])
        if not slices or len(shape) != IMAGE_RANK or not shape[1]:
            continue
        before, after = around
        weight = np.zeros((before + shape[1] + after, shape[1], 1, 1), np.float32)
        weight[np.arange(shape[1]) + before, np.arange(shape[1])] = 1
        name = f"{pad.output[0]}.integer_layout.identity"
        made = helper.make_node("Conv", [source, name], [pad.output[0]], pad.name, kernel_shape=[1, 1], strides=strides)
        yield _Rewriting(pad, [made], {name: weight}, slices)


def _channels_padded(graph: _Graph, node: NodeProto) -> tuple[int, int] | None:
    """How many channels of zeros a Pad puts before and behind those of [N, C, H, W], if it does nothing else."""
    if node.op_type != "Pad" or any(attribute.s != b"constant" for attribute in node.attribute):
        return None
    pads, value = graph.constant(node, 1), graph.constant(node, 2)
    if pads is None or pads.size != 2 * IMAGE_RANK or (len(node.input) > 3 and node.input[3]):
        return None
    if len(node.input) > 2 and node.input[2] and (value is None or value.any()):
        return None
    before, after = int(pads[1]), int(pads[1 + IMAGE_RANK])
    others = np.delete(pads, [1, 1 + IMAGE_RANK])
    return (before, after) if not others.any() and min(before, after) >= 0 else None


def _pixels_skipped(graph: _Graph, node: NodeProto) -> tuple[int, int] | None:
    """The axis, 2 or 3, and the step of a Slice that takes every so many-th row or column from the first on."""
    if node.op_type != "Slice" or len(node.input) != 5:
        return None
    values = [graph.constant(node, index) for index in range(1, 5)]
    if any(value is None or value.size != 1 for value in values):
        return None
    start, end, axis, step = (int(value.item()) for value in values if value is not None)
    shape = graph.shapes.get(node.input[0], [])
    if len(shape) != IMAGE_RANK or axis % IMAGE_RANK not in (2, 3) or start or step < 1:
        return None
    size = shape[axis]
    return (axis % IMAGE_RANK, step) if size and end >= size else None


def _batchnorms(graph: _Graph, *, integer_operators: Collection[str]) -> Iterator[_Rewriting]:
    for node in graph.nodes:
        if node.op_type != "BatchNormalization" or len(graph.shapes.get(node.input[0], [])) != IMAGE_RANK:
            continue
        before = graph.producers.get(node.input[0])
        if before is None or before.op_type not in integer_operators or not _convolved(graph, node):
            continue
        parameters = [graph.constant(node, index) for index in range(1, 5)]
        if any(value is None for value in parameters):
            continue
        gamma, beta, mean, variance = (value.astype(np.float64) for value in parameters if value is not None)
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if attributes.get("training_mode", 0) or len(node.output) > 1:
            continue
        factor = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
        factor = np.where(np.abs(factor) < LEAST_FACTOR, LEAST_FACTOR, factor)
        if np.abs(factor).max() > LARGEST_FACTOR * np.median(np.abs(factor)):
            continue
        weight, bias = factor.reshape(-1, 1, 1, 1).astype(np.float32), (beta - mean * factor).astype(np.float32)
        names = [f"{node.output[0]}.integer_layout.{what}" for what in ("factor", "shift")]
        made = helper.make_node(
            "Conv", [node.input[0], *names], [node.output[0]], node.name, kernel_shape=[1, 1], group=len(factor)
        )
        yield _Rewriting(node, [made], dict(zip(names, (weight, bias), strict=True)))


def _convolved(graph: _Graph, node: NodeProto) -> bool:
    """Whether a convolution takes what the node gives, or its Relu."""
    takers = [taker for taker in graph.nodes if node.output[0] in taker.input]
    return any(taker.op_type == "Conv" or (taker.op_type == "Relu" and _convolved(graph, taker)) for taker in takers)


def _images_of_few_channels(graph: _Graph, *, integer_operators: Collection[str]) -> Iterator[_Rewriting]:
    for node in graph.nodes:
        before = graph.producers.get(node.input[0]) if node.input else None
        if before is not None and before.op_type in integer_operators:  # no image, nor one that is normalised
            continue
        weight = graph.constant(node, 1) if node.op_type == "Conv" else None
        grouped = any(attribute.name == "group" and attribute.i != 1 for attribute in node.attribute)
        if weight is None or grouped or weight.ndim != IMAGE_RANK or graph.takers[node.input[1]] != 1:
            continue
        missing = CHANNELS_AT_ONCE - weight.shape[1]
        if missing <= 0:
            continue
        image, pads = (f"{node.output[0]}.integer_layout.{what}" for what in ("image", "pads"))
        constants = {
            pads: np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64),
            node.input[1]: np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0))),
        }
        made = NodeProto.FromString(node.SerializeToString())
        made.input[0] = image
        yield _Rewriting(node, [helper.make_node("Pad", [node.input[0], pads], [image], image), made], constants)
