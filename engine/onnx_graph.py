"""ONNX files as modules with gradients, and those of their weights that still belong to layers."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.errors import SSDKDError, first_line
from engine.graphs import Graph, batchnorm_layer, same_logits
from engine.onnx_operations import OPERATIONS, constant_of_shape
from engine.safe_pickle import damaged
from engine.shapes import Shape
from engine.unwrap import State

LAYER_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)+")  # conv1.weight, but not onnx::Conv_123
QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "QLinearConv",
    "ConvInteger",
    "MatMulInteger",
)
ROLES = {
    "Conv": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
}
FLOATS = (1, 10, 11, 16)  # TensorProto.DataType: float, float16, double, bfloat16


@dataclass(frozen=True)
class Step:
    """One operation: names of values in and out; its attributes as keyword arguments."""

    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    last_uses: tuple[str, ...]  # values that nobody needs afterwards


class OnnxModule(nn.Module):
    """An ONNX graph of one input and one output.

    For hooks BatchNorm layers are layers, and behind each operation stands one that changes nothing.
    """

    def __init__(
        self, steps: Sequence[Step], weights: Mapping[str, Tensor], constants: Mapping[str, Any], ends: tuple[str, str]
    ):
        super().__init__()
        self.input_name, self.output_name = ends
        self.constants = {name: value for name, value in constants.items() if not isinstance(value, Tensor)}
        self.steps: list[Step] = []
        self.layers = nn.ModuleDict()
        for step in steps:
            if step.operation == "BatchNormalization" and weights.keys() >= set(step.inputs[1:]):
                weight, bias, mean, variance = (weights[name] for name in step.inputs[1:])
                epsilon = step.attributes.get("epsilon", 1e-5)
                self.layers[str(len(self.steps))] = batchnorm_layer(weight, bias, mean, variance, epsilon)
                step = Step(step.operation, step.inputs[:1], step.outputs[:1], {}, step.last_uses)
            self.steps.append(step)
        self.outputs = nn.ModuleList(nn.Identity() for _ in self.steps)
        used = {name for step in self.steps for name in step.inputs}
        self.weights = nn.ParameterDict()
        self.weight_keys = {name: str(index) for index, name in enumerate(name for name in weights if name in used)}
        for name, key in self.weight_keys.items():
            self.weights[key] = nn.Parameter(weights[name])
        self.buffer_keys: dict[str, str] = {}
        for name, value in constants.items():
            if isinstance(value, Tensor) and name in used:
                self.buffer_keys[name] = f"constant_{len(self.buffer_keys)}"
                self.register_buffer(self.buffer_keys[name], value)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> what the graph computes."""
        values: dict[str, Any] = {self.input_name: images, "": None, **self.constants}
        values |= {name: self.weights[key] for name, key in self.weight_keys.items()}
        values |= {name: self.get_buffer(key) for name, key in self.buffer_keys.items()}
        for index, step in enumerate(self.steps):
            arguments = [values[name] for name in step.inputs]
            if str(index) in self.layers:
                result = self.layers[str(index)](*arguments)
            elif step.operation == "ConstantOfShape":
                result = constant_of_shape(*arguments, **step.attributes, device=images.device)
            else:
                result = OPERATIONS[step.operation](*arguments, **step.attributes)
            result = self.outputs[index](result)
            results = result if isinstance(result, list) else [result]
            values |= dict(
                zip(step.outputs, results, strict=False)
            )  # optional outputs, as Dropout's mask, are left out
            for name in step.last_uses:
                del values[name]
        out: Tensor = values[self.output_name]
        return out


def read_onnx(path: Path) -> tuple[State, Graph, dict[str, str]]:
    """The weights that still belong to named layers (none where the exporter folded them), the graph, and its metadata.

    Raises:
        SSDKDError: damaged, without its data file, quantized, not one input of images, or operations that cannot be
            run with gradients.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        _add_external_data(model, path)
        _refuse_unknown(model, path)
        weights, constants = _numbers(model)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        raise damaged(path, error) from error
    except Exception as error:
        if type(error).__name__ != "DecodeError":  # of protobuf, whose Python package is onnx's affair
            raise
        raise damaged(path, error) from error
    name, shape, batch, channels_last = _image_input(model, set(weights) | set(constants), path)
    reference = _runtime(path, name)
    for free_batch in dict.fromkeys((batch, None)):
        steps = _steps(model, constants, weights, free_batch)
        module: nn.Module = OnnxModule(steps, weights, constants, (name, model.graph.output[0].name))
        graph = Graph(module.eval(), reference, shape, batch)
        if channels_last:
            run = partial(_channels_last, reference)
            graph = Graph(ChannelsLast(module).eval(), run, shape, batch)
        # A size in a reshaping may be that of the batch by chance.
        if shape is None or free_batch is None or same_logits(graph.module, graph, shape):
            break
    return _layers_state(steps, weights), graph, {entry.key: entry.value for entry in model.metadata_props}


def data_files(path: Path) -> list[Path]:
    """The files beside an .onnx that hold weights of it; none where they are inside."""
    import onnx

    return [path.parent / name for name in _data_names(onnx.load(str(path), load_external_data=False))]


def _data_names(model: Any) -> list[str]:
    found = (entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location")
    return list(dict.fromkeys(entry.value for entry in found))


def _add_external_data(model: Any, path: Path) -> None:
    """Reads the weights that lie in files beside the .onnx.

    Raises SSDKDError: one is missing, or it is no plain file in the same folder.
    """
    import onnx

    files = _data_names(model)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (onnx.checker.ValidationError, FileNotFoundError) as error:
        missing = [name for name in files if not (path.parent / name).is_file()]
        if missing:
            raise SSDKDError(
                f"{path.name} keeps its weights in {', '.join(missing[:3])}, which must lie beside it: "
                f"expected that file in {path.parent}, found none",
                "copy it there under that name, or export the network again with its weights inside the .onnx",
            ) from error
        raise SSDKDError(
            f"{path.name} keeps its weights in {', '.join(files) or 'another file'}, which cannot be "
            f"read: expected a plain file beside it, found: {first_line(error)}",
            "copy both into one folder, or export the network again with its weights inside the .onnx",
        ) from error


def _channels_last(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return run(images.permute(0, 2, 3, 1))


class ChannelsLast(nn.Module):
    """A network that takes [B, H, W, C], as TensorFlow's do, for [B, C, H, W]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> logits."""
        out: Tensor = self.network(images.permute(0, 2, 3, 1))
        return out


def _refuse_unknown(model: Any, path: Path) -> None:
    used = {
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in model.graph.node
    }
    if used.intersection(QUANTIZED):
        raise SSDKDError(
            f"{path.name} is quantized ({', '.join(sorted(used.intersection(QUANTIZED)))}): expected a float network",
            "give the float network that it was made from; ssdkd quantizes the student, not the teacher",
        )
    unknown = sorted(used - set(OPERATIONS) - {"BatchNormalization", "Constant"})
    if unknown:
        raise SSDKDError(
            f"{path.name} uses ONNX operations that ssdkd cannot run with gradients: {', '.join(unknown[:6])}",
            "give the checkpoint that it was exported from",
        )


def _numbers(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights as float32 tensors, masks and tables too; lone numbers, sizes and axes as Python's own, on no device."""
    from onnx import numpy_helper

    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = _attribute(node.attribute[0])
    weights: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in found.items():
        array = np.asarray(value)
        if array.ndim and (array.dtype.kind == "f" or str(array.dtype) == "bfloat16"):
            weights[name] = torch.from_numpy(np.array(array, np.float32))
        elif array.ndim < 2 and not (array.ndim and array.dtype.kind == "b"):
            constants[name] = tuple(array.tolist()) if array.ndim else array.astype(object).item()
        else:
            constants[name] = torch.from_numpy(np.array(array))
    return weights, constants


def _attribute(attribute: Any) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return value.decode() if isinstance(value, bytes) else value


def _steps(model: Any, constants: dict[str, Any], weights: dict[str, Tensor], batch: int | None) -> list[Step]:
    """The operations in order; weights and constants of other names are added to both tables."""
    nodes = [node for node in model.graph.node if node.op_type != "Constant"]
    last = {name: index for index, node in enumerate(nodes) for name in node.input}
    kept = {"", model.graph.output[0].name, *constants, *weights}
    steps = []
    for index, node in enumerate(nodes):
        # An Identity of a weight is how exporters write weights that are equal: it is the weight.
        if node.op_type == "Identity" and (node.input[0] in weights or node.input[0] in constants):
            for known in (weights, constants):
                if node.input[0] in known:
                    known[node.output[0]] = known[node.input[0]]
            continue
        attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
        if node.op_type == "ConstantOfShape":
            attributes["value"] = np.asarray(attributes.get("value", 0.0)).reshape(-1)[0].item()
        if node.op_type == "Split":
            attributes.setdefault("num_outputs", len(node.output))  # not written down before opset 18
        inputs = list(node.input)
        sizes = constants.get(inputs[1]) if node.op_type == "Reshape" else None
        if batch is not None and isinstance(sizes, tuple) and sizes[:1] == (batch,) and not attributes.get("allowzero"):
            # A batch size that the exporter wrote down; 0 is that of the input.
            inputs[1] = f"{inputs[1]} of any batch"
            constants[inputs[1]] = (0, *sizes[1:])
        finished = {name for name in node.input if last[name] == index and name not in kept and name not in weights}
        steps.append(
            Step(node.op_type, tuple(inputs), tuple(node.output), attributes, tuple(finished - constants.keys()))
        )
    return steps


def _image_input(model: Any, known: set[str], path: Path) -> tuple[str, Shape | None, int | None, bool]:
    """Name, (C, H, W) where it is fixed, batch size where it is fixed, and whether the channels come last."""
    inputs = [value for value in model.graph.input if value.name not in known]
    sizes: list[int | None] = []
    if len(inputs) == 1 and inputs[0].type.tensor_type.elem_type in FLOATS:
        dimensions = inputs[0].type.tensor_type.shape.dim
        sizes = [size.dim_value if size.HasField("dim_value") and size.dim_value > 0 else None for size in dimensions]
    if len(sizes) != 4:
        raise SSDKDError(
            f"{path.name} takes {', '.join(value.name for value in inputs) or 'no input'}: "
            "expected one float tensor of images [B, C, H, W]",
            "export the network with normalised images as its only input, or give the checkpoint",
        )
    batch, *rest = sizes
    channels_last = rest[2] in (1, 3, 4) and rest[0] not in (1, 3, 4)
    if channels_last:
        rest = [rest[2], rest[0], rest[1]]
    channels, height, width = rest
    shape = (channels, height, width) if channels and height and width else None
    return inputs[0].name, shape, batch, channels_last


def _runtime(path: Path, name: str) -> Any:
    """The graph as ONNX Runtime runs it: images -> first output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would slow PyTorch's down
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no class in common
        raise damaged(path, error) from error
    kind = np.float16 if "float16" in session.get_inputs()[0].type else np.float32

    def run(images: Tensor) -> Tensor:
        try:
            out = session.run(None, {name: np.ascontiguousarray(images.numpy().astype(kind))})[0]
        except Exception as error:  # as above
            raise RuntimeError(f"ONNX Runtime: {error}") from error
        return torch.from_numpy(np.asarray(out, np.float32))

    return run


def _layers_state(steps: Sequence[Step], weights: Mapping[str, Tensor]) -> State:
    """The weights by layer, in order of use; named by their place where the exporter renamed them."""
    used = [
        (f"layer{index}.{role}", name)
        for index, step in enumerate(steps)
        for role, name in zip(ROLES.get(step.operation, ()), step.inputs[1:], strict=False)
        if name in weights
    ]
    if all(LAYER_NAME.fullmatch(name) for _, name in used):
        return {name: weights[name] for name in weights if LAYER_NAME.fullmatch(name)}
    return {place: weights[name] for place, name in used}
