"""The precision of an ONNX graph: float16 tensors, or integers between QuantizeLinear and DequantizeLinear.

A stage between the export and the proof: a float32 model in, a model of another precision out. So a runtime that keeps
to the types of the graph (TensorRT 10 and 11, strongly typed) computes in the precision that was asked for.
"""

import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from engine.errors import SSDKDError, first_line
from exporters.integer_layout import integer_layout
from exporters.metadata import UNIT, describe, ssdkd_version
from exporters.quiet import quiet

CALIBRATION_BATCH = 32
MAC_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Relu and Clip are absorbed into the scale of the convolution before them, Add of two integer branches is one of
# integers. Anything else (Mul, Sigmoid) gains no speed; a BatchNorm that stands alone becomes a Conv where it can
# (exporters.integer_layout): docs/quantization.md.
INTEGER_OPERATORS = (
    *MAC_OPERATORS,
    *("Relu", "Clip", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat"),
)
LEAST_INTEGER_SHARE = 0.5  # of the multiply-accumulates: with fewer in integers a file is no INT8 file
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Scheme:
    """How integers stand for numbers; what a runtime multiplies fast differs, so it is a device profile's choice."""

    activations: str = "uint8"  # "uint8" or "int8"
    symmetric_activations: bool = False  # zero point in the middle, as TensorRT wants it
    per_channel: bool = True  # weights: a scale for each output channel
    reduce_range: bool = False  # weights of 7 bits, where the product of U8 and S8 saturates (x86 without VNNI)
    int32_bias: bool = True  # biases as integers too; TensorRT's parser refuses them

    @property
    def for_onnxruntime(self) -> bool:
        """Whether ONNX Runtime is to compute it, with the scale a channel that `integer_layout` needs to be exact."""
        return self.int32_bias and self.per_channel


def to_fp16(model: onnx.ModelProto, *, half_io: bool = False) -> onnx.ModelProto:
    """A copy that computes in float16 between a float32 input and output; with `half_io` these are float16 too.

    Raises:
        SSDKDError: a weight is beyond what float16 holds, or the graph cannot be converted.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size and np.abs(values).max() > LARGEST_HALF:
            raise SSDKDError(
                f"{tensor.name} holds {np.abs(values).max():.3g}: expected at most {LARGEST_HALF:.0f}, "
                "the largest number of float16",
                "use --precision fp32",
            )
    try:
        with quiet():
            converted = convert_float_to_float16(_copied(model), keep_io_types=not half_io)
            OnnxModel.graph_topological_sort(converted.graph)  # the converter puts its casts at the end
            onnx.checker.check_model(converted, full_check=True)
    except Exception as error:  # the converter and the checker raise what they like
        raise SSDKDError(
            f"the network cannot be converted to float16: {first_line(error)}", "use --precision fp32"
        ) from error
    return _signed(converted, model)


def to_int8(
    model: onnx.ModelProto,
    inputs: NDArray[np.float32],
    scheme: Scheme,
    *,
    image_range: tuple[float, float] | None = None,
    float_layers: Collection[str] = (),
) -> onnx.ModelProto:
    """A copy that computes in 8 bits, with ranges taken from `inputs` [N, C, H, W], as the model takes them.

    Ranges are the smallest and largest value of each tensor; `image_range`, where given, is that of the image as the
    network takes it, behind a normalisation that is embedded. `float_layers`, named as `layer_names` names them, stay
    in float32.

    Raises:
        SSDKDError: inputs that are not finite or all the same, or a graph that cannot be quantized.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    if not len(inputs) or not np.isfinite(inputs).all():
        raise SSDKDError(
            "the calibration images are empty" if not len(inputs) else "the calibration images hold NaN or infinity",
            "an INT8 file is calibrated on the synthetic samples of a run: run `ssdkd compress` again",
        )
    if (inputs == inputs[:1]).all():
        raise SSDKDError(
            "the calibration images are all the same: expected different ones, which show the range of each layer",
            "an INT8 file is calibrated on the synthetic samples of a run: run `ssdkd compress` again",
        )
    names = layer_names(model)
    with tempfile.TemporaryDirectory(prefix="ssdkd-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        laid_out = integer_layout(model, INTEGER_OPERATORS) if scheme.for_onnxruntime else model
        onnx.save(laid_out, source)
        stated: dict[str, Any] = {}
        if image_range is not None:
            lowest, highest = (np.array(limit, np.float32) for limit in image_range)
            read = {name for node in laid_out.graph.node if node.op_type in MAC_OPERATORS for name in node.input}
            stated = {name: [{"rmin": lowest, "rmax": highest}] for name in _images(laid_out) & read}
        try:
            with quiet():
                quantize_static(
                    str(source),
                    str(target),
                    _reader(model.graph.input[0].name, inputs),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(INTEGER_OPERATORS),
                    per_channel=scheme.per_channel,
                    reduce_range=scheme.reduce_range,
                    activation_type=QuantType.QUInt8 if scheme.activations == "uint8" else QuantType.QInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=[node for node, layer in names.items() if layer in float_layers],
                    calibrate_method=CalibrationMethod.MinMax,
                    extra_options={
                        "ActivationSymmetric": scheme.symmetric_activations,
                        "WeightSymmetric": True,
                        "QuantizeBias": scheme.int32_bias,
                        "TensorQuantOverrides": stated,
                    },
                )
                onnx.checker.check_model(onnx.load(target), full_check=True)
        except Exception as error:  # the quantizer and the checker raise what they like
            raise SSDKDError(
                f"the network cannot be quantized to INT8: {first_line(error)}", "use --precision fp16 or fp32"
            ) from error
        quantized = onnx.load(target)
    return _signed(quantized, model)


def layer_names(model: onnx.ModelProto) -> dict[str, str]:
    """Node name -> layer name, of each node that multiplies and accumulates with weights: its weight's name.

    They are the module's own (`layer1.0.conv1`) where the exporter keeps the names of parameters: of a weight that it
    transposes, as some linear layers' of a transformer, it does not.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    return {
        node.name: node.input[1].removesuffix(".weight")
        for node in model.graph.node
        if node.op_type in MAC_OPERATORS and node.input[1] in weights
    }


def integer_share(model: onnx.ModelProto) -> float:
    """The share of the multiply-accumulates, 0 to 1, whose two factors come out of DequantizeLinear.

    Those of `integer_layout`'s own convolutions and of an image's channels of zeros count like any other.
    """
    total, integer, producers = 0.0, 0.0, _producers(model)
    for node, macs in _multiply_accumulates(model):
        total += macs
        if all(producers.get(name) == "DequantizeLinear" for name in node.input[:2]):
            integer += macs
    return integer / total if total else 0.0


def precision_problem(model: onnx.ModelProto, precision: str) -> str | None:
    """The sentence for a graph that does not compute in `precision`, or None.

    fp32 and fp16: the weights of all multiplying layers are of that type. int8: at least half of the
    multiply-accumulates are between integers; how many is said in the report. Inputs and outputs are float32, or all of
    an fp16 graph's are float16.
    """
    values = (*model.graph.input, *model.graph.output)
    outside = {value.name: onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in values}
    if precision != "fp16" or set(outside.values()) != {"FLOAT16"}:
        for name, found in outside.items():
            if found != "FLOAT":
                return f"{precision} was asked for, and {name} is {found}: expected float32 inputs and outputs"
    share = integer_share(model)
    if precision == "int8":
        if share >= LEAST_INTEGER_SHARE:
            return None
        return f"int8 was asked for, and {100 * share:.0f} % of the multiply-accumulates are in integers"
    wanted = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}[precision]
    types = _types(model)
    for node in model.graph.node:
        for name in reversed(node.input[:2] if node.op_type in MAC_OPERATORS else ()):
            if types.get(name, wanted) != wanted:
                is_weight = name == node.input[1]
                what = f"the weights of {name.removesuffix('.weight')} are" if is_weight else f"{name} is"
                return f"{precision} was asked for, and {what} {onnx.TensorProto.DataType.Name(types[name])}"
    return f"{precision} was asked for, and {100 * share:.0f} % of it are in integers" if share else None


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every tensor, also of those that nodes compute."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _multiply_accumulates(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, float]]:
    """Each node that multiplies and accumulates, with how often it does so for one image."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dimension.dim_value or 1 for dimension in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in MAC_OPERATORS or node.output[0] not in shapes:
            continue
        outputs, weight = shapes[node.output[0]], shapes.get(node.input[1], [])
        if node.op_type == "Conv":
            yield node, math.prod(outputs) * math.prod(weight[1:])
        elif node.op_type == "ConvTranspose":
            yield node, math.prod(shapes.get(node.input[0], outputs)) * math.prod(weight[1:])
        else:
            inner = shapes.get(node.input[0], [1])[-1]
            yield node, math.prod(outputs) * inner


def _producers(model: onnx.ModelProto) -> Mapping[str, str]:
    """The operator that makes each tensor."""
    return {output: node.op_type for node in model.graph.node for output in node.output}


def _images(model: onnx.ModelProto) -> set[str]:
    """The tensors that hold the image: the input, behind a normalisation that is embedded, and what is padded of it."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    is_embedded = describe({entry.key: entry.value for entry in model.metadata_props}).input_range == UNIT
    found = {model.graph.input[0].name}
    for operator in ("Sub", "Div") if is_embedded else ():
        found = {node.output[0] for node in model.graph.node if node.op_type == operator and node.input[0] in found}
    for node in model.graph.node:  # in an order in which each comes behind what it takes
        value = constants.get(node.input[2], np.nan) if len(node.input) > 2 and node.input[2] else 0
        if node.op_type == "Pad" and node.input[0] in found and np.all(value == 0):
            found.add(node.output[0])
    return found


def _reader(name: str, inputs: NDArray[np.float32]) -> Any:
    """ONNX Runtime's calibration reader over `inputs`, a batch at a time."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the library wants its own base class
        def __init__(self) -> None:
            self.starts = iter(range(0, len(inputs), CALIBRATION_BATCH))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            start = next(self.starts, None)
            return None if start is None else {name: inputs[start : start + CALIBRATION_BATCH]}

    return Reader()


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _signed(made: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """`made` with the metadata of `source` and none of the library's own."""
    made.ClearField("metadata_props")
    made.metadata_props.extend(source.metadata_props)
    made.producer_name, made.producer_version = "ssdkd", ssdkd_version()
    return made
