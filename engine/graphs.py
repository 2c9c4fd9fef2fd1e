"""Exported graphs as modules: BatchNorm layers are taken out of the operations again, batch and device made free."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

from engine.errors import SSDKDError, first_line
from engine.probing import FORWARD_ERRORS, noise
from engine.shapes import Shape, words

aten = torch.ops.aten
TOLERANCE = 1e-4  # relative to the largest logit

# Operation -> position of epsilon; the first five arguments are input, weight, bias, running mean and running variance.
BATCHNORMS = {
    aten.batch_norm.default: 7,
    aten._native_batch_norm_legit_no_training.default: 6,
    aten.native_batch_norm.default: 7,
    aten._native_batch_norm_legit.default: 7,
}
SHAPE_OPERATIONS = (aten.reshape.default, aten.expand.default)


@dataclass(frozen=True)
class Graph:
    """A network as an exporter wrote it."""

    module: nn.Module  # runs it; with BatchNorm layers where the file still has them
    reference: Callable[[Tensor], Tensor]  # runs it as its own runtime does, [batch, C, H, W] -> logits
    input_shape: Shape | None
    batch: int | None  # where the exporter fixed it


class GraphBatchNorm(_BatchNorm):
    """BatchNorm of any number of dimensions: the graph does not say which of nn.BatchNorm1d, 2d, 3d it was."""

    def _check_input_dim(self, _input: Tensor) -> None:
        pass


def loosen_device(module: fx.GraphModule) -> None:
    """Replaces a device that the exporter wrote down by that of the images, and drops its checks of types; in place.

    A run is on a GPU, or has half precision between the layers: neither is what the exporter saw.
    """
    images = next(node for node in module.graph.nodes if node.op == "placeholder")
    with module.graph.inserting_after(images):
        device = module.graph.call_function(getattr, (images, "device"))
    for node in list(module.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
            continue
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda value: device if isinstance(value, torch.device) else value
        )
    module.graph.eliminate_dead_code()
    module.recompile()


def rename_convolutions(module: fx.GraphModule) -> None:
    """Writes the convolutions of a trace, which says how a GPU shall compute them, as exporters know them; in place."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is aten._convolution.default:
            *shared, transposed, output_padding, groups = node.args[:9]
            if transposed or len(output_padding) != 2:
                node.target, node.args = aten.convolution.default, node.args[:9]
            else:
                node.target, node.args = aten.conv2d.default, (*shared, groups)
    module.recompile()


def restore_batchnorm(module: fx.GraphModule) -> fx.GraphModule:
    """Puts a BatchNorm layer in the place of every BatchNorm operation with stored statistics; in place.

    A hook sees the inputs of a layer, but not those of an operation.
    """
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.target in BATCHNORMS]
    for index, node in enumerate(nodes):
        weight, bias, mean, variance = (_constant(module, argument) for argument in node.args[1:5])
        if mean is None or variance is None:
            continue
        restored = batchnorm_layer(weight, bias, mean, variance, node.args[BATCHNORMS[node.target]])
        name = _added(module, f"batchnorm_{index}", restored)
        with module.graph.inserting_before(node):
            layer = module.graph.call_module(name, (node.args[0],))
        if node.target is aten.batch_norm.default:
            layer.meta = dict(node.meta)
            node.replace_all_uses_with(layer)
        else:  # these give (output, mean, deviation)
            for user in list(node.users):
                if user.args[1] != 0:
                    raise AssertionError("a BatchNorm in eval mode whose statistics are used")
                layer.meta = dict(user.meta)
                user.replace_all_uses_with(layer)
                module.graph.erase_node(user)
        module.graph.erase_node(node)
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # `view` fails on channels_last tensors
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    _forget_unused_tensors(module)
    module.recompile()
    return module


def show_outputs(module: fx.GraphModule) -> None:
    """Puts a layer that changes nothing behind every operation, so that hooks see what it gives; in place."""
    operations = [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.users
    ]
    for index, node in enumerate(operations):
        name = _added(module, f"output_{index}", nn.Identity())
        users = list(node.users)
        with module.graph.inserting_after(node):
            shown = module.graph.call_module(name, (node,))
        for user in users:
            user.replace_input_with(node, shown)
    module.recompile()


def loosen_batch(module: fx.GraphModule, batch: int) -> None:
    """Replaces a batch size that the exporter wrote into reshaping operations by that of their input; in place."""
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in SHAPE_OPERATIONS:
            source, sizes = node.args[:2]
            is_batch = isinstance(sizes, list | tuple) and sizes[:1] in ([batch], (batch,))
            if is_batch and source.meta["val"].shape[:1] == (batch,):
                with module.graph.inserting_before(node):
                    size = module.graph.call_function(aten.sym_size.int, (source, 0))
                node.args = (source, [size, *sizes[1:]])
    module.recompile()


def same_logits(module: nn.Module, graph: Graph, shape: Shape) -> bool:
    """Whether `module` computes what the graph computes on noise of `shape`; a module that cannot run does not."""
    images = noise(shape, graph.batch or 2)
    expected = graph.reference(images)
    try:
        with torch.no_grad():
            found = module.eval()(images)
    except FORWARD_ERRORS:
        return False
    both = isinstance(found, Tensor) and isinstance(expected, Tensor)
    return both and found.shape == expected.shape and relative_error(found, expected) < TOLERANCE


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected; NaN agrees with NaN."""
    found, expected = found.detach().nan_to_num(), expected.detach().nan_to_num()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def check_graph(graph: Graph, shape: Shape, name: str) -> None:
    """Makes sure that the module computes what the graph's own runtime does, in other batches than the exporter's too.

    Raises:
        SSDKDError: it does not.
    """
    batch = graph.batch or 2
    images = noise(shape, 2 * batch)
    try:
        parts = [graph.reference(part) for part in torch.split(images, batch)]
    except FORWARD_ERRORS as error:
        raise SSDKDError(
            f"{name} does not run on images of {words(shape)}: {first_line(error)}",
            "give the size that it was exported for with --input CxHxW",
        ) from error
    if not isinstance(parts[0], Tensor):
        raise SSDKDError(
            f"{name} gives a {type(parts[0]).__name__}: expected one tensor, the logits",
            "export a network that returns its logits alone, or give the checkpoint that it was exported from",
        )
    expected = torch.cat(parts)
    if not same_logits(graph.module, graph, shape) or not _has_gradient(graph.module, images[:batch]):
        raise SSDKDError(
            f"{name} cannot be run with gradients: its operations are not all plain ones on float numbers",
            "give the checkpoint that it was exported from",
        )
    try:
        with torch.no_grad():
            found = graph.module(images)
        is_free = found.shape == expected.shape and relative_error(found, expected) < TOLERANCE
    except FORWARD_ERRORS:
        is_free = False
    if not is_free:
        raise SSDKDError(
            f"{name} was exported for batches of {batch} image(s) alone: expected a graph whose batch size is free",
            "export it again with a dynamic batch dimension, or give the checkpoint that it was exported from",
        )


def _has_gradient(module: nn.Module, images: Tensor) -> bool:
    images = images.clone().requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(module(images).sum(), images, allow_unused=True)
    except FORWARD_ERRORS:
        return False
    return gradient is not None


def batchnorm_layer(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, epsilon: Any
) -> GraphBatchNorm:
    """A BatchNorm layer in eval mode with these weights and statistics, each [C]."""
    layer = GraphBatchNorm(len(mean), eps=float(epsilon), affine=weight is not None or bias is not None)
    layer.running_mean, layer.running_var = mean.detach().clone(), variance.detach().clone()
    if weight is not None:
        layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer.eval()


def _added(module: nn.Module, name: str, layer: nn.Module) -> str:
    """Adds a layer under that name, or a longer one where the network has something of that name; returns it."""
    while hasattr(module, name):
        name += "_"
    module.add_module(name, layer)
    return name


def _constant(module: fx.GraphModule, argument: object) -> Tensor | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    path, _, name = str(argument.target).rpartition(".")
    value = getattr(module.get_submodule(path), name)
    return value if isinstance(value, Tensor) else None


def _forget_unused_tensors(module: fx.GraphModule) -> None:
    """The operations' own copies of the statistics would be saved and counted as parameters twice."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name in [*dict(module.named_parameters()), *dict(module.named_buffers())]:
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        if name not in used and not isinstance(owner, GraphBatchNorm):
            delattr(owner, attribute)
