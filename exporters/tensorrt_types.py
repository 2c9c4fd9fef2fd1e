"""In which types a plan computes: read from its strongly typed network, from its bytes, and from the engine itself."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

TYPES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "int8": "int8"}  # theirs -> ours
LOOKED_THROUGH = ("DEQUANTIZE", "CAST", "SHUFFLE", "IDENTITY")  # between a layer and its weights, or Q/DQ and a layer
FEWEST_WEIGHTS = 64  # of a tensor that is searched for in the plan: fewer bytes could be there by chance
NOT_FOUND = "not found"

# What the engine inspector says of a tensor: "Half", "Row major linear FP16 format (kLINEAR)", "... Int8 format".
SAID = {"bf16": r"bf16|bfloat", "fp16": r"fp16|half", "fp8": r"fp8", "int8": r"int8", "fp32": r"fp32|float"}


@dataclass(frozen=True)
class NetworkTypes:
    """Bytes of the weights by type; weights of convolutions and matrix products by the type they are computed in."""

    weight_bytes: dict[str, int]
    computed_weights: dict[str, int]
    layers: dict[str, str]  # convolutions and matrix products by name, and the type of each


def network_types(trt: Any, network: Any) -> NetworkTypes:
    """Read the types of a strongly typed network, in which a layer computes in the type of its input.

    A layer counts as int8 where both its input and its weights come from DEQUANTIZE layers of 8-bit integers: TensorRT
    makes one integer layer of these.
    """
    weight_bytes, computed, layers = Counter[str](), Counter[str](), dict[str, str]()
    sources: dict[str, Any] = {}  # a tensor's name -> the layer that makes it
    for layer in map(network.get_layer, range(network.num_layers)):
        sources |= {layer.get_output(index).name: layer for index in range(layer.num_outputs)}
        for values in _values(trt, layer):
            weight_bytes[_type(values.dtype)] += values.nbytes
        size, from_int8 = _weights(trt, layer, sources)
        if size:
            inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
            is_int8 = from_int8 and all(_comes_from_int8(tensor, sources) for tensor in inputs[:2])
            kind = "int8" if is_int8 else _type(inputs[0].dtype)
            computed[kind] += size
            layers[layer.name] = kind
    return NetworkTypes({kind: size for kind, size in weight_bytes.items() if size}, dict(computed), layers)


def weights_in_plan(plan: bytes, model: bytes) -> dict[str, dict[str, int]]:
    """Count the weights of an ONNX file by their type there and the type in which the plan holds them.

    TensorRT for RTX was seen to store them as they are, with the channels last, so they can be searched for. Nobody
    promises that: where they are not found (padded, transformed, folded), nothing is said of their type.
    """
    graph = onnx.load_model_from_string(model).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, Counter[str]] = {}
    for name, values in stored.items():
        kind = TYPES.get(values.dtype.name)
        if kind is None or values.ndim < 2 or values.size < FEWEST_WEIGHTS:
            continue
        forms = _forms(kind, values, scales.get(name), stored)
        held = (form for form, array in forms.items() if any(part in plan for part in _layouts(array)))
        found.setdefault(kind, Counter())[next(held, NOT_FOUND)] += values.size
    return {kind: dict(counts) for kind, counts in found.items()}


def metadata_of(model: bytes) -> dict[str, str]:
    """Return the metadata of an ONNX file."""
    return {entry.key: entry.value for entry in onnx.load_model_from_string(model).metadata_props}


def engine_types(information: str) -> dict[str, int] | None:
    """Count the tensors that the layers of an engine read and write, by type, in what its inspector says as JSON.

    None: it does not say, as for an engine that was built with names alone.
    """
    try:
        layers = [layer for layer in json.loads(information)["Layers"] if isinstance(layer, dict)]
    except (ValueError, KeyError, TypeError):
        return None
    counts = Counter[str]()
    for layer in layers:
        for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ())):
            said = str(tensor.get("DataType") or tensor.get("Format/Datatype") or tensor.get("Format") or "").lower()
            kind = next((kind for kind, pattern in SAID.items() if re.search(pattern, said)), None)
            if kind is not None:
                counts[kind] += 1
    return dict(counts) or None


def _type(dtype: Any) -> str:
    """Our word for a type of numpy's or TensorRT's; theirs where we have none."""
    return TYPES.get(dtype.name.lower(), dtype.name.lower())


def _values(trt: Any, layer: Any) -> Iterator[Any]:
    """Yield the arrays that a layer holds itself."""
    if layer.type == trt.LayerType.CONSTANT:
        layer.__class__ = trt.IConstantLayer  # the layers of a network come as their base class
        yield layer.weights
    elif layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION):
        is_convolution = layer.type == trt.LayerType.CONVOLUTION
        layer.__class__ = trt.IConvolutionLayer if is_convolution else trt.IDeconvolutionLayer
        yield from (layer.kernel, layer.bias)
    elif layer.type == trt.LayerType.SCALE:
        layer.__class__ = trt.IScaleLayer
        yield from (layer.shift, layer.scale, layer.power)


def _weights(trt: Any, layer: Any, sources: dict[str, Any]) -> tuple[int, bool]:
    """Return how many weights a convolution or matrix product has, 0 for others, and whether they are integers."""
    kinds = trt.LayerType
    if layer.type not in (kinds.CONVOLUTION, kinds.DECONVOLUTION, kinds.MATRIX_MULTIPLY):
        return 0, False
    if layer.type != kinds.MATRIX_MULTIPLY and layer.kernel.size:
        return int(layer.kernel.size), False
    for index in range(layer.num_inputs):
        source = _behind(layer.get_input(index), sources)
        if source is not None and source.type == kinds.CONSTANT:
            return math.prod(source.get_output(0).shape), _type(source.get_output(0).dtype) == "int8"
    return 0, False  # a product of two activations


def _behind(tensor: Any, sources: dict[str, Any]) -> Any:
    """Return the layer that makes the values of a tensor, seen through layers that change their type or shape alone."""
    source = sources.get(tensor.name)
    while source is not None and source.type.name in LOOKED_THROUGH:
        source = sources.get(source.get_input(0).name)
    return source


def _comes_from_int8(tensor: Any, sources: dict[str, Any]) -> bool:
    source = sources.get(tensor.name)
    while source is not None and source.type.name in LOOKED_THROUGH:
        if source.type.name == "DEQUANTIZE":
            return _type(source.get_input(0).dtype) == "int8"
        source = sources.get(source.get_input(0).name)
    return False


def _forms(
    kind: str, values: NDArray[Any], scaled_by: onnx.NodeProto | None, stored: dict[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Return weights in each type in which a plan could hold them: first their own, then float32 and float16."""
    if kind != "int8":
        floats = values.astype(np.float32)
    elif scaled_by is None or scaled_by.input[1] not in stored:
        return {kind: values}
    else:
        axis = next((attribute.i for attribute in scaled_by.attribute if attribute.name == "axis"), 1) % values.ndim
        scale = stored[scaled_by.input[1]].astype(np.float32)
        broad = [-1 if scale.ndim and dimension == axis else 1 for dimension in range(values.ndim)]
        floats = values.astype(np.float32) * scale.reshape(broad)
    with np.errstate(over="ignore"):  # beyond what float16 holds: then it is not stored so
        return {kind: values, "fp32": floats, "fp16": floats.astype(np.float16)}


def _layouts(values: NDArray[Any]) -> Iterator[bytes]:
    """Yield the bytes of weights [K, C, R, S] as they are, and with C, or C and K, as the last dimensions."""
    yield values.tobytes()
    if values.ndim == 4:
        yield values.transpose(0, 2, 3, 1).tobytes()
        yield values.transpose(2, 3, 1, 0).tobytes()
    elif values.ndim == 2:
        yield values.T.tobytes()
