import json

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from exporters.tensorrt_types import engine_types, metadata_of, weights_in_plan

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_normal((8, 4, 3, 3)).astype(np.float32)
INTEGERS = RNG.integers(-127, 128, (8, 4, 3, 3), dtype=np.int8)
SCALES = RNG.uniform(0.01, 0.02, 8).astype(np.float32)


def model(values: NDArray[np.generic]) -> bytes:
    """An ONNX file with these weights, dequantized by SCALES where they are integers."""
    tensors = [numpy_helper.from_array(values, "w"), numpy_helper.from_array(np.ones(500, np.float32), "bias")]
    nodes = []
    if values.dtype == np.int8:
        tensors.append(numpy_helper.from_array(SCALES, "s"))
        nodes.append(helper.make_node("DequantizeLinear", ["w", "s"], ["z"], axis=0))
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    made = helper.make_model(helper.make_graph(nodes, "g", [], [output], initializer=tensors))
    made.metadata_props.add(key="ssdkd.classes", value="10")
    return made.SerializeToString()


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 1, 0)])
@pytest.mark.parametrize(
    ("weights", "held", "expected"),
    [
        (KERNEL, KERNEL, {"fp32": {"fp32": 288}}),
        (KERNEL, KERNEL.astype(np.float16), {"fp32": {"fp16": 288}}),
        (KERNEL.astype(np.float16), KERNEL.astype(np.float16), {"fp16": {"fp16": 288}}),
        (KERNEL.astype(np.float16), KERNEL.astype(np.float16).astype(np.float32), {"fp16": {"fp32": 288}}),
        (KERNEL.astype(np.float16), KERNEL, {"fp16": {"not found": 288}}),
        (INTEGERS, INTEGERS, {"int8": {"int8": 288}}),
        (INTEGERS, INTEGERS * SCALES.reshape(-1, 1, 1, 1), {"int8": {"fp32": 288}}),
        (INTEGERS, (INTEGERS * SCALES.reshape(-1, 1, 1, 1)).astype(np.float16), {"int8": {"fp16": 288}}),
    ],
)
def test_weights_are_found_in_any_layout_and_type(
    weights: NDArray[np.generic],
    held: NDArray[np.generic],
    expected: dict[str, dict[str, int]],
    axes: tuple[int, ...],
) -> None:
    plan = b"header of 17 byte" + held.transpose(axes).tobytes() + b"the end"
    assert weights_in_plan(plan, model(weights)) == expected


def test_weights_beyond_float16_are_no_error() -> None:
    assert weights_in_plan(b"", model(KERNEL * np.float32(1e30))) == {"fp32": {"not found": 288}}


def test_metadata_is_that_of_the_onnx_file() -> None:
    assert metadata_of(model(KERNEL)) == {"ssdkd.classes": "10"}


def test_types_of_an_engine_of_tensorrt_10() -> None:
    layers = [
        {
            "Name": "stem",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "a", "Format/Datatype": "Row major linear FP32 format (kLINEAR)"}],
            "Outputs": [{"Name": "b", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
        },
        {
            "Name": "gemm_myl0_1",
            "Inputs": [{"Format/Datatype": "Half"}, {"Format/Datatype": "Thirty-two wide vectorized Int8 format"}],
            "Outputs": [{"Format/Datatype": "Float"}, {"Format/Datatype": "N/A due to dynamic shapes"}],
        },
    ]
    assert engine_types(json.dumps({"Layers": layers, "Bindings": ["a"]})) == {"fp32": 2, "fp16": 2, "int8": 1}


def test_types_of_an_engine_of_tensorrt_11() -> None:
    tensor = {"Format": "Row major linear FP32 format (kLINEAR)", "DataType": "BFloat16"}
    layers = [{"Inputs": [{"DataType": "Half", "Format": "linear"}], "Outputs": [{"DataType": "Int8"}, tensor]}]
    assert engine_types(json.dumps({"Layers": layers, "I/O Tensors": []})) == {"fp16": 1, "int8": 1, "bf16": 1}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "{}", '{"Layers": ["stem", "head"]}', '{"Layers": [{}]}'])
def test_engine_that_does_not_tell(text: str) -> None:
    assert engine_types(text) is None
