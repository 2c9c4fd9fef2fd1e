"""Types, ranges and names of the graphs; that their logits are the student's is asked in test_verify."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from engine.errors import SSDKDError
from exporters.metadata import UNIT, describe
from exporters.precision import Scheme, integer_share, layer_names, precision_problem, to_fp16, to_int8
from exporters.runtimes import open_runtime, to_input

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
TENSORRT = Scheme("int8", symmetric_activations=True, int32_bias=False)


@pytest.fixture(scope="module")
def model(exported: Path) -> ModelProto:
    return onnx.load(exported)


@pytest.fixture(scope="module")
def inputs(samples: NDArray[np.uint8]) -> NDArray[np.float32]:
    return to_input(samples, MEAN, STD)


@pytest.fixture(scope="module")
def quantized(model: ModelProto, inputs: NDArray[np.float32]) -> ModelProto:
    return to_int8(model, inputs, Scheme())


def operators(model: ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def types_of(model: ModelProto, ending: str) -> set[int]:
    return {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith(ending)}


def logits(model: ModelProto, folder: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return open_runtime(path).run(inputs)


def test_float16_is_inside_and_float32_outside(model: ModelProto) -> None:
    half = to_fp16(model)
    weights = {tensor.data_type for tensor in half.graph.initializer if len(tensor.dims) == 4}
    assert weights == {TensorProto.FLOAT16}
    assert {value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)} == {
        TensorProto.FLOAT
    }
    assert precision_problem(half, "fp16") is None
    assert half.ByteSize() < 0.8 * model.ByteSize()
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT  # the model itself is left alone


def test_float16_may_be_outside_too(model: ModelProto, inputs: NDArray[np.float32], tmp_path: Path) -> None:
    half = to_fp16(model, half_io=True)
    assert {value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)} == {
        TensorProto.FLOAT16
    }
    assert precision_problem(half, "fp16") is None
    assert "FLOAT16: expected float32 inputs" in str(precision_problem(half, "fp32"))
    assert "Cast" not in {node.op_type for node in half.graph.node}
    found, exact = (logits(graph, tmp_path, inputs) for graph in (half, model))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def test_a_weight_beyond_float16_is_refused_by_name(model: ModelProto) -> None:
    large = onnx.ModelProto()
    large.CopyFrom(model)
    weight = next(tensor for tensor in large.graph.initializer if tensor.name == "head.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(1e6), "head.weight"))
    with pytest.raises(SSDKDError, match=r"head\.weight holds 1e\+06: expected at most 65504"):
        to_fp16(large)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_metadata_is_kept_and_the_library_leaves_no_trace(
    model: ModelProto, inputs: NDArray[np.float32], precision: str
) -> None:
    made = to_fp16(model) if precision == "fp16" else to_int8(model, inputs, Scheme())
    before, after = ({entry.key: entry.value for entry in each.metadata_props} for each in (model, made))
    assert after == before
    assert describe(after).mean == MEAN
    assert made.producer_name == "ssdkd"


def test_all_multiplications_are_of_integers(quantized: ModelProto) -> None:
    assert integer_share(quantized) == 1.0
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(quantized)
    assert types_of(quantized, ".weight_quantized") == {TensorProto.INT8}
    assert precision_problem(quantized, "int8") is None


def test_weights_have_a_scale_a_channel(quantized: ModelProto) -> None:
    scales = {
        tensor.name: tensor.dims for tensor in quantized.graph.initializer if tensor.name.endswith("weight_scale")
    }
    assert list(scales["features.0.weight_scale"]) == [8]
    assert list(scales["head.weight_scale"]) == [5]


def test_tensorrt_s_scheme_has_zero_points_of_zero_and_float_biases(
    model: ModelProto, inputs: NDArray[np.float32]
) -> None:
    symmetric = to_int8(model, inputs, TENSORRT)
    zero_points = [t for t in symmetric.graph.initializer if t.name.endswith("zero_point")]
    assert {tensor.data_type for tensor in zero_points} == {TensorProto.INT8}
    assert not any(numpy_helper.to_array(tensor).any() for tensor in zero_points)
    assert TensorProto.INT32 not in {tensor.data_type for tensor in symmetric.graph.initializer}


def test_seven_bits_where_the_product_would_saturate(model: ModelProto, inputs: NDArray[np.float32]) -> None:
    largest = {}
    for reduced in (False, True):
        made = to_int8(model, inputs, Scheme(reduce_range=reduced))
        weights = [t for t in made.graph.initializer if t.name.endswith(".weight_quantized")]
        largest[reduced] = max(int(np.abs(numpy_helper.to_array(tensor).astype(int)).max()) for tensor in weights)
    assert largest == {False: 127, True: 64}


def test_integers_stay_near_the_float_network(
    model: ModelProto, quantized: ModelProto, inputs: NDArray[np.float32], tmp_path: Path
) -> None:
    exact, rounded = logits(model, tmp_path, inputs), logits(quantized, tmp_path, inputs)
    assert 0 < np.abs(rounded - exact).max() < 0.1 * exact.std(axis=0).mean() + 0.05


def scales_of_quantizers(model: ModelProto) -> list[float]:
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [float(values[node.input[1]]) for node in model.graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("scheme", [Scheme(), TENSORRT])
def test_the_image_has_the_range_that_is_stated(model: ModelProto, inputs: NDArray[np.float32], scheme: Scheme) -> None:
    stated = scales_of_quantizers(to_int8(model, inputs, scheme, image_range=(-5.0, 5.2)))
    assert stated[0] == pytest.approx(5.2 / 127 if scheme.symmetric_activations else 10.2 / 255)
    assert stated[1:] == scales_of_quantizers(to_int8(model, inputs, scheme))[1:]


def in_front(model: ModelProto, *operators: str, takes: str = "normalised") -> ModelProto:
    """The model behind (images - 0.25) / 0.5, as a network that normalises by itself."""
    made, name = ModelProto(), model.graph.input[0].name
    made.CopyFrom(model)
    for node in made.graph.node:
        node.input[:] = [takes if given == name else given for given in node.input]
    outputs = [*(f"{takes}_{index}" for index in range(len(operators) - 1)), takes]
    for index, (operator, output) in enumerate(zip(operators, outputs, strict=True)):
        constant = numpy_helper.from_array(np.float32({"Sub": 0.25, "Div": 0.5}[operator]), f"constant_{output}")
        made.graph.initializer.append(constant)
        made.graph.node.insert(index, helper.make_node(operator, [name, constant.name], [output]))
        name = output
    return made


@pytest.mark.parametrize("operators", [("Sub", "Div"), ("Sub",)])
def test_a_network_that_normalises_by_itself_keeps_the_range_that_was_seen(
    model: ModelProto, inputs: NDArray[np.float32], operators: tuple[str, ...]
) -> None:
    made = in_front(model, *operators)
    assert scales_of_quantizers(to_int8(made, inputs, Scheme(), image_range=(-5.0, 5.2))) == scales_of_quantizers(
        to_int8(made, inputs, Scheme())
    )


def test_the_embedded_normalisation_is_passed_and_no_other(model: ModelProto, inputs: NDArray[np.float32]) -> None:
    once = embedding(in_front(model, "Sub", "Div"))
    assert scales_of_quantizers(to_int8(once, inputs, Scheme(), image_range=(-5.0, 5.2)))[0] == pytest.approx(
        10.2 / 255
    )
    twice = embedding(in_front(in_front(model, "Sub", "Div"), "Sub", "Div", takes="embedded"))
    assert scales_of_quantizers(to_int8(twice, inputs, Scheme(), image_range=(-5.0, 5.2))) == scales_of_quantizers(
        to_int8(twice, inputs, Scheme())
    )


def embedding(model: ModelProto) -> ModelProto:
    """The same model, with metadata that say that it normalises."""
    (entry,) = [entry for entry in model.metadata_props if entry.key == "ssdkd.input_range"]
    entry.value = UNIT
    return model


def test_an_image_that_others_take_as_well_has_its_range(model: ModelProto, inputs: NDArray[np.float32]) -> None:
    made = ModelProto()
    made.CopyFrom(model)
    made.graph.node.append(helper.make_node("ReduceMean", [made.graph.input[0].name], ["brightness"]))
    stated = to_int8(made, inputs, Scheme(), image_range=(-5.0, 5.2))
    assert scales_of_quantizers(stated)[0] == pytest.approx(10.2 / 255)


def test_ranges_come_from_the_images(model: ModelProto, inputs: NDArray[np.float32]) -> None:
    scale = {}
    for factor in (1, 4):
        made = to_int8(model, factor * inputs, TENSORRT)
        scale[factor] = next(
            float(numpy_helper.to_array(t)) for t in made.graph.initializer if t.name == "images_scale"
        )
    assert scale[1] == pytest.approx(np.abs(inputs).max() / 127, rel=1e-3)
    assert scale[4] == pytest.approx(4 * scale[1], rel=1e-3)


def test_layers_are_named_as_in_the_module_and_can_stay_float(
    model: ModelProto, quantized: ModelProto, inputs: NDArray[np.float32]
) -> None:
    assert set(layer_names(model).values()) == {"features.0", "features.3", "head"}
    mixed = to_int8(model, inputs, Scheme(), float_layers=("features.3",))
    kept = {tensor.name for tensor in mixed.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    assert "features.3.weight" in kept
    assert "features.0.weight" not in kept
    macs = {"features.0": 8 * 8 * 8 * 36, "features.3": 8 * 3 * 3 * 72, "head": 5 * 8}  # an image has 4 channels
    assert integer_share(mixed) == pytest.approx(1 - macs["features.3"] / sum(macs.values()))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda images: np.where(images == images.max(), np.nan, images), "hold NaN or infinity"),
        (lambda images: images[:0], "are empty"),
        (lambda images: np.repeat(images[:1], 4, axis=0), "are all the same"),
    ],
)
def test_calibration_images_that_show_no_range(
    broken: object, message: str, model: ModelProto, inputs: NDArray[np.float32]
) -> None:
    with pytest.raises(SSDKDError, match=f"the calibration images {message}"):
        to_int8(model, broken(inputs), Scheme())  # type: ignore[operator]


def test_a_graph_of_another_precision_than_asked_is_named(model: ModelProto, quantized: ModelProto) -> None:
    half = to_fp16(model)
    assert precision_problem(model, "fp32") is None
    assert precision_problem(model, "fp16") == "fp16 was asked for, and the weights of features.0 are FLOAT"
    assert precision_problem(half, "fp32") == "fp32 was asked for, and the weights of features.0 are FLOAT16"
    assert precision_problem(model, "int8") == "int8 was asked for, and 0 % of the multiply-accumulates are in integers"
    assert precision_problem(quantized, "fp32") == "fp32 was asked for, and 100 % of it are in integers"


def test_an_interface_of_another_type_is_named(model: ModelProto) -> None:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    problem = precision_problem(changed, "fp16")
    assert problem == "fp16 was asked for, and logits is FLOAT16: expected float32 inputs and outputs"


def test_nothing_is_printed(model: ModelProto, inputs: NDArray[np.float32], capfd: pytest.CaptureFixture[str]) -> None:
    to_int8(model, inputs, Scheme())
    to_fp16(model)
    assert capfd.readouterr() == ("", "")


def test_float32_behind_stored_float16_is_not_float16(model: ModelProto) -> None:
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    weight = next(tensor for tensor in stored.graph.initializer if tensor.name == "head.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), "head.weight.half"))
    cast = onnx.helper.make_node("Cast", ["head.weight.half"], ["head.weight"], "cast", to=TensorProto.FLOAT)
    stored.graph.node.insert(0, cast)
    assert precision_problem(stored, "fp16") is not None
