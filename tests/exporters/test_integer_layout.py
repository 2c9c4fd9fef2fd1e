"""The graph before INT8: other operators, the same logits. How much faster it is, benchmarks.int8_speed measures."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

import exporters.precision
from engine.students import build_network
from exporters.integer_layout import integer_layout
from exporters.precision import INTEGER_OPERATORS, Scheme, to_int8
from exporters.runtimes import open_runtime
from exporters.to_onnx import to_onnx

PIXELS = 16
TENSORRT = Scheme("int8", symmetric_activations=True, int32_bias=False)


def exported(name: str, channels: int = 3) -> ModelProto:
    """A student that has seen some batches, so that no two channels of its BatchNorm layers are alike."""
    torch.manual_seed(0)
    module = build_network(name, classes=5, channels=channels, pixels=PIXELS).train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for _ in range(3):
            module(torch.randn(8, channels, PIXELS, PIXELS))
    return to_onnx(module.eval(), input_shape=(channels, PIXELS, PIXELS), metadata={})


@pytest.fixture(scope="module")
def resnet() -> ModelProto:
    return exported("resnet8")


@pytest.fixture(scope="module")
def wide() -> ModelProto:
    return exported("wrn10_1", channels=1)


def images(channels: int = 3, number: int = 16) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((number, channels, PIXELS, PIXELS), dtype=np.float32)


def logits(model: ModelProto, folder: Path, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    onnx.save(model, folder / "model.onnx")
    return open_runtime(folder / "model.onnx").run(inputs)


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def laid_out(model: ModelProto) -> ModelProto:
    made = integer_layout(model, INTEGER_OPERATORS)
    onnx.checker.check_model(made, full_check=True)
    return made


def test_a_shortcut_without_weights_becomes_a_convolution(resnet: ModelProto, tmp_path: Path) -> None:
    before = resnet.SerializeToString()
    made = laid_out(resnet)
    assert operators(resnet).count("Slice") == 4  # rows and columns of two shortcuts
    assert "Slice" not in operators(made)
    assert operators(made).count("Pad") == 1  # of the image
    assert operators(made).count("Conv") == operators(resnet).count("Conv") + 2
    np.testing.assert_allclose(logits(made, tmp_path, images()), logits(resnet, tmp_path, images()), atol=1e-5)
    assert resnet.SerializeToString() == before


def test_a_batchnorm_before_a_convolution_becomes_one(wide: ModelProto, tmp_path: Path) -> None:
    made = laid_out(wide)
    assert operators(wide).count("BatchNormalization") == 4
    assert operators(made).count("BatchNormalization") == 1  # the last: a mean follows it, no convolution
    assert operators(made).count("Conv") == operators(wide).count("Conv") + 3
    groups = [attribute.i for node in made.graph.node for attribute in node.attribute if attribute.name == "group"]
    assert sorted(group for group in groups if group > 1) == [16, 16, 32]  # the channels before each
    found, expected = (logits(model, tmp_path, images(1)) for model in (made, wide))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_has_four_channels(channels: int, resnet: ModelProto, wide: ModelProto) -> None:
    model = {1: wide, 3: resnet}[channels]
    made = laid_out(model)
    assert [dimension.dim_value for dimension in made.graph.input[0].type.tensor_type.shape.dim][1] == channels
    first = next(node for node in made.graph.node if node.op_type == "Conv")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}[first.input[1]]
    np.testing.assert_array_equal(weights[first.input[1]][:, :channels], kept)
    assert weights[first.input[1]].shape[1] == 4
    assert not weights[first.input[1]][:, channels:].any()


def as_integers(
    model: ModelProto, inputs: NDArray[np.float32], scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> ModelProto:
    """Without the step that is tested here."""
    with monkeypatch.context() as patch:
        patch.setattr(exporters.precision, "integer_layout", lambda model, integer_operators: model)
        return to_int8(model, inputs, scheme)


def test_integers_of_a_resnet_are_the_same_ones(
    resnet: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = Scheme(reduce_range=True)  # weights of 8 bits saturate on x86 without VNNI, each kernel in its own way
    plain = as_integers(resnet, images(), scheme, monkeypatch)
    made = to_int8(resnet, images(), scheme)
    assert "Slice" in operators(plain)
    assert "Slice" not in operators(made)
    np.testing.assert_array_equal(logits(made, tmp_path, images()), logits(plain, tmp_path, images()))


@pytest.mark.parametrize("reduce_range", [False, True])
def test_integers_of_a_batchnorm_are_as_near(
    wide: ModelProto, tmp_path: Path, reduce_range: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = images(1, number=64)
    exact = logits(wide, tmp_path, inputs)
    scheme = Scheme(reduce_range=reduce_range)
    plain = as_integers(wide, inputs, scheme, monkeypatch)
    made = to_int8(wide, inputs, scheme)
    factors = [tensor for tensor in made.graph.initializer if tensor.name.endswith(".factor_quantized")]
    largest = 64 if reduce_range else 127
    assert [int(np.abs(numpy_helper.to_array(tensor).astype(int)).min()) for tensor in factors] == [largest] * 3
    errors = [np.abs(logits(model, tmp_path, inputs) - exact).mean() for model in (made, plain)]
    assert errors[0] < 1.15 * errors[1]


def test_tensorrt_s_file_keeps_its_operators(resnet: ModelProto) -> None:
    assert operators(to_int8(resnet, images(), TENSORRT)).count("Slice") == 4
    assert "Slice" in operators(to_int8(resnet, images(), Scheme(per_channel=False)))  # one scale: not exact


def graph(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]], channels: int = 4) -> ModelProto:
    """Nodes from `images` [N, C, 8, 8] to `logits`."""
    ends = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", channels, 8, 8]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "C", "H", "W"]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "test", ends[:1], ends[1:], initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])


def shortcut(
    *,
    start: int = 0,
    end: int = 2**31,
    axis: int = -1,
    step: int = 2,
    value: float = 0.0,
    pads: tuple[int, ...] = (0, 2, 0, 0, 0, 2, 0, 0),
    mode: str = "constant",
) -> ModelProto:
    nodes = [
        helper.make_node("Slice", ["images", "start", "end", "axis", "step"], ["sliced"]),
        helper.make_node("Pad", ["sliced", "pads", "value"], ["logits"], mode=mode),
    ]
    numbers = {"start": [start], "end": [end], "axis": [axis], "step": [step], "pads": pads}
    constants: dict[str, NDArray[Any]] = {name: np.array(number, np.int64) for name, number in numbers.items()}
    return graph(nodes, constants | {"value": np.array(value, np.float32)})


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_shortcut_of_columns_alone(step: int, tmp_path: Path) -> None:
    model = shortcut(step=step)
    made = laid_out(model)
    assert operators(made) == ["Conv"]
    inputs = np.random.default_rng(0).standard_normal((2, 4, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(reference(made, inputs), reference(model, inputs))


@pytest.mark.parametrize(
    "other",
    [
        {"start": 1},
        {"step": -1},
        {"value": 1.0},
        {"pads": (0, 2, 1, 0, 0, 2, 0, 0)},
        {"pads": (0, -1, 0, 0, 0, 2, 0, 0)},
        {"pads": (0, 2, 0, 0, 0, 2, 1, -1)},
        {"pads": (1, 2, 0, 0, -1, 2, 0, 0)},
        {"end": 4},
        {"axis": 1},
        {"mode": "edge"},
    ],
)
def test_other_slices_and_pads_stay(other: dict[str, Any]) -> None:
    model = shortcut(**other)
    assert operators(integer_layout(model, INTEGER_OPERATORS)) == ["Slice", "Pad"]


def test_a_slice_that_others_read_stays() -> None:
    model = shortcut()
    model.graph.node.append(helper.make_node("Relu", ["sliced"], ["other"]))
    assert operators(laid_out(model)) == ["Slice", "Pad", "Relu"]


def batchnorm(before: str = "Relu", gamma: tuple[float, ...] = (0.5,) * 4, epsilon: float = 1e-5) -> ModelProto:
    """A BatchNorm of what `before` gives, and a convolution of it."""
    nodes = [
        helper.make_node(before, ["images"], ["seen"]),
        helper.make_node(
            "BatchNormalization", ["seen", "gamma", "beta", "mean", "variance"], ["normal"], epsilon=epsilon
        ),
        helper.make_node("Conv", ["normal", "weight"], ["logits"]),
    ]
    numbers = {name: np.full(4, 0.5, np.float32) for name in ("beta", "mean", "variance")}
    numbers["gamma"] = np.array(gamma, np.float32)
    return graph(nodes, numbers | {"weight": np.ones((4, 4, 1, 1), np.float32)})


@pytest.mark.parametrize(("before", "expected"), [("Relu", "Conv"), ("Sigmoid", "BatchNormalization")])
def test_a_batchnorm_of_what_is_no_integer_stays(before: str, expected: str) -> None:
    assert operators(laid_out(batchnorm(before)))[1] == expected


def reference(model: ModelProto, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    (found,) = onnx.reference.ReferenceEvaluator(model).run(None, {"images": inputs})
    return np.asarray(found)


@pytest.mark.parametrize("gamma", [(0.5, -0.5, 0.1, 0.0), (0.0,) * 4])
def test_a_batchnorm_of_any_factor_gives_the_same(gamma: tuple[float, ...]) -> None:
    model = batchnorm(gamma=gamma, epsilon=0.1)
    made = laid_out(model)
    assert operators(made) == ["Relu", "Conv", "Conv"]
    inputs = np.random.default_rng(0).standard_normal((2, 4, 8, 8), dtype=np.float32)
    np.testing.assert_allclose(reference(made, inputs), reference(model, inputs), atol=1e-6)


def test_a_factor_of_nothing_keeps_its_shift_in_integers() -> None:
    """A scale of 1, which the quantizer gives to a weight of 0, would round the shift to whole steps of the input."""
    model = batchnorm(gamma=(0.5, 0.5, 0.0, 0.0))
    inputs = 100 * np.random.default_rng(0).random((32, 4, 8, 8), dtype=np.float32)
    made = to_int8(model, inputs, Scheme())
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    name = "normal.integer_layout.shift_quantized"
    np.testing.assert_allclose((values[name] * values[f"{name}_scale"])[2:], 0.5, rtol=0.01)


def test_a_batchnorm_with_a_dead_channel_stays() -> None:
    assert operators(laid_out(batchnorm(gamma=(0.1, 0.1, 0.1, 4.0))))[1] == "BatchNormalization"


def test_a_batchnorm_that_is_still_learning_stays() -> None:
    model = batchnorm()
    model.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    model.graph.node[1].output.extend(["new_mean", "new_variance"])
    assert operators(integer_layout(model, INTEGER_OPERATORS))[1] == "BatchNormalization"


def test_a_weight_of_two_convolutions_stays() -> None:
    nodes = [helper.make_node("Conv", ["images", "weight"], [name]) for name in ("one", "two")]
    nodes.append(helper.make_node("Add", ["one", "two"], ["logits"]))
    model = graph(nodes, {"weight": np.ones((6, 3, 1, 1), np.float32)}, channels=3)
    assert operators(laid_out(model)) == ["Conv", "Conv", "Add"]


def test_few_channels_further_inside_stay() -> None:
    nodes = [
        helper.make_node("Conv", ["images", "narrow"], ["seen"]),
        helper.make_node("Conv", ["seen", "wide"], ["logits"]),
    ]
    weights = {"narrow": np.ones((2, 4, 1, 1), np.float32), "wide": np.ones((6, 2, 1, 1), np.float32)}
    assert operators(laid_out(graph(nodes, weights))) == ["Conv", "Conv"]


@pytest.mark.parametrize(("channels", "group"), [(4, 1), (3, 3)])
def test_images_of_four_channels_and_groups_stay(channels: int, group: int) -> None:
    nodes = [helper.make_node("Conv", ["images", "weight"], ["logits"], group=group)]
    model = graph(nodes, {"weight": np.ones((6, channels // group, 3, 3), np.float32)}, channels)
    assert operators(laid_out(model)) == ["Conv"]


def test_a_graph_with_a_branch_stays() -> None:
    """What a branch reads by name is no input of any node outside it."""
    one = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["N", "C", "H", "W"])],
    )
    nodes = [
        helper.make_node("Conv", ["images", "first"], ["seen"]),
        helper.make_node("If", ["which"], ["logits"], then_branch=one, else_branch=one),
    ]
    weights = {name: np.ones((6, 3, 1, 1), np.float32) for name in ("first", "weight")}
    model = graph(nodes, {**weights, "which": np.array(True)}, channels=3)
    assert laid_out(model).SerializeToString() == model.SerializeToString()
