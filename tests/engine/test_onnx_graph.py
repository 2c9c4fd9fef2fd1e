"""Each ONNX operation against ONNX Runtime, and what is read out of a file."""

import hashlib
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import SSDKDError
from engine.graphs import GraphBatchNorm, check_graph, relative_error
from engine.onnx_graph import read_onnx
from engine.onnx_operations import OPERATIONS
from engine.teacher import load_teacher

SHAPE = (4, 6, 7)
RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def sizes(*values):
    return np.array(values, np.int64)


def write(path, nodes, constants=None, opset=18, batch="batch", shape=SHAPE, metadata=None, kind=TensorProto.FLOAT):
    """A graph from `x` to `y`."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", kind, [batch, *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, str(path))
    return path


def case(operation, *constants, opset=18, **attributes):
    """Operation, constant inputs behind x (None leaves one out), attributes."""
    return pytest.param(
        operation, constants, opset, attributes, id=f"{operation}-{len(constants)}-{opset}-{'-'.join(attributes)}"
    )


CASES = [
    *(
        case(name)
        for name in ("Abs", "Ceil", "Erf", "Exp", "Floor", "HardSwish", "Identity", "Mish", "Neg", "Relu", "Sigmoid")
    ),
    *(
        case(name)
        for name in ("Sign", "Softplus", "Softsign", "Tanh", "GlobalAveragePool", "GlobalMaxPool", "Reciprocal")
    ),
    case("Add", floats(4, 1, 1)),
    case("Sub", np.float32(0.5)),
    case("Mul", floats(7)),
    case("Div", floats(1, 4, 6, 7)),
    case("Max", floats(4, 1, 1)),
    case("Min", np.float32(0.1)),
    case("Pow", np.float32(2.0)),
    case("PRelu", floats(4, 1, 1)),
    case("Celu", alpha=0.5),
    case("Elu", alpha=0.5),
    case("Selu"),
    case("LeakyRelu", alpha=0.2),
    case("HardSigmoid", alpha=0.3, beta=0.4),
    case("Gelu", opset=20),
    case("Gelu", opset=20, approximate="tanh"),
    case("Clip", np.float32(-0.5), np.float32(0.5)),
    case("Clip", None, np.float32(0.5)),
    case("Clip", opset=6, min=-0.25, max=1.0),
    case("Softmax", axis=1),
    case("LogSoftmax", axis=-1),
    case("Conv", floats(5, 4, 3, 3), floats(5), pads=[1, 1, 1, 1], strides=[2, 1]),
    case("Conv", floats(8, 2, 3, 3), group=2, pads=[0, 1, 2, 1]),
    case("Conv", floats(4, 1, 3, 3), group=4, auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", floats(4, 4, 2, 2), auto_pad="SAME_LOWER", strides=[2, 2]),
    case("Conv", floats(4, 4, 2, 2), auto_pad="VALID", dilations=[2, 2]),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", kernel_shape=[3, 2], strides=[2, 2], pads=[0, 0, 1, 1]),
    case("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    case("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    case("AveragePool", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1]),
    case("AveragePool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("BatchNormalization", floats(4), floats(4), floats(4), np.abs(floats(4)), epsilon=1e-3),
    case("InstanceNormalization", floats(4), floats(4), epsilon=1e-3),
    case("LayerNormalization", floats(7), floats(7)),
    case("LayerNormalization", floats(6, 7), axis=-2),
    case("Dropout"),
    case("Flatten"),
    case("Flatten", axis=2),
    case("Reshape", sizes(0, 2, -1)),
    case("Transpose", perm=[0, 2, 3, 1]),
    case("Expand", sizes(1, 4, 6, 7)),
    case("Tile", sizes(1, 2, 1, 1)),
    case("Squeeze", opset=18),
    case("Unsqueeze", sizes(0, -1)),
    case("Unsqueeze", opset=11, axes=[1]),
    case("Slice", sizes(1), sizes(2**63 - 1), sizes(2)),
    case("Slice", sizes(-1, 0), sizes(-(2**63) + 1, 4), sizes(3, 1), sizes(-1, 2)),
    case("Slice", opset=9, starts=[1], ends=[-1], axes=[3]),
    case("Gather", sizes(2, 0, -1), axis=1),
    case("Gather", np.array(1, np.int64), axis=2),
    case("Gather", np.array([[0, 1], [2, 3]], np.int64), axis=1),
    case("Pad", sizes(0, 0, 1, 2, 0, 0, 0, 1)),
    case("Pad", sizes(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
    case("Pad", sizes(0, 0, 1, 1, 0, 0, 1, 1), np.float32(-3.0)),
    case("Pad", opset=10, pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="edge"),
    case("ReduceMean", sizes(2, 3)),
    case("ReduceMean", opset=13, axes=[2, 3], keepdims=0),
    case("ReduceMax", sizes(1), keepdims=0),
    case("ReduceSum", sizes(-1)),
    case("ReduceL2", sizes(1)),
    case("ReduceMin", keepdims=1),
    case("DepthToSpace", blocksize=2),
    case("DepthToSpace", blocksize=2, mode="CRD"),
    case("MatMul", floats(7, 3)),
]


@pytest.mark.parametrize(("operation", "constants", "opset", "attributes"), CASES)
def test_operations_compute_what_onnx_runtime_computes(tmp_path, operation, constants, opset, attributes):
    names = ["" if value is None else f"c{index}" for index, value in enumerate(constants)]
    given = {name: value for name, value in zip(names, constants, strict=True) if name}
    path = write(tmp_path / "m.onnx", [helper.make_node(operation, ["x", *names], ["y"], **attributes)], given, opset)
    _, graph, _ = read_onnx(path)
    images = torch.from_numpy(floats(3, *SHAPE))
    expected, found = graph.reference(images), graph.module(images)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def node(operation, inputs, outputs, **attributes):
    return helper.make_node(operation, inputs.split(), outputs.split(), **attributes)


def test_sizes_that_are_computed_keep_the_batch_free(tmp_path):
    """As torch's older exporter writes x.view(x.size(0), -1), a channel shuffle, and comparisons of sizes."""
    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape zero", "count", axis=0),
        node("Unsqueeze", "count first", "counts"),
        node("Slice", "shape one four", "rest"),
        node("ReduceProd" if False else "Cast", "rest", "rest32", to=TensorProto.INT32),
        node("Cast", "rest32", "rest64", to=TensorProto.INT64),
        node("Concat", "counts minus", "target", axis=0),
        node("Equal", "target minus", "is_minus"),
        node("Where", "is_minus target target", "chosen"),
        node("Split", "x", "a b", axis=1, num_outputs=2),
        node("Concat", "b a", "swapped", axis=1),
        node("Reshape", "swapped chosen", "flat"),
        node("Gemm", "flat weight bias", "y", transB=1, alpha=0.5, beta=2.0),
    ]
    constants = {
        **{"zero": np.array(0, np.int64), "first": sizes(0), "one": sizes(1), "four": sizes(4), "minus": sizes(-1)},
        **{"weight": floats(3, 4 * 6 * 7), "bias": floats(3)},
    }
    _, graph, _ = read_onnx(write(tmp_path / "m.onnx", nodes, constants))
    for batch in (1, 5):
        images = torch.from_numpy(floats(batch, *SHAPE))
        assert relative_error(graph.module(images), graph.reference(images)) < 1e-5


@pytest.mark.parametrize(("opset", "attributes"), [(13, {}), (18, {"num_outputs": 3})])
def test_a_split_without_sizes_makes_equal_parts(tmp_path, opset, attributes):
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b", "c"], axis=2, **attributes),
        helper.make_node("Concat", ["c", "a", "b"], ["y"], axis=2),
    ]
    _, graph, _ = read_onnx(write(tmp_path / "m.onnx", nodes, opset=opset))
    images = torch.from_numpy(floats(2, *SHAPE))
    assert torch.equal(graph.module(images), graph.reference(images))


MASK = np.arange(42).reshape(1, 1, 6, 7) % 3 == 0
DEVICES = [
    ([node("Where", "mask x zero", "y")], {"mask": MASK, "zero": np.float32(0)}),
    ([node("Where", "mask x zero", "y")], {"mask": MASK[0, 0, 0], "zero": np.float32(0)}),
    ([node("Where", "mask zero x", "y")], {"mask": MASK, "zero": np.float32(0)}),
    (
        [node("Greater", "x zero", "g"), node("And", "g mask", "both"), node("Where", "both x zero", "y")],
        {"mask": MASK, "zero": np.float32(0)},
    ),
    (
        [
            node("Shape", "x", "shape"),
            node("ConstantOfShape", "shape", "zeros"),
            node("Concat", "x zeros", "y", axis=1),
        ],
        {},
    ),
    (
        [
            node("Shape", "x", "shape"),
            node("ConstantOfShape", "shape", "ones", value=numpy_helper.from_array(sizes(1))),
            node("Cast", "ones", "float", to=1),
            node("Mul", "float x", "z"),
            node("Sub", "z float", "y"),
        ],
        {},
    ),
    (
        [node("Expand", "half some", "halves"), node("Sum", "x halves", "z"), node("Concat", "halves x", "y", axis=0)],
        {"half": np.float32(0.5), "some": sizes(1, 4, 6, 7)},
    ),
    ([node("Cast", "table", "float", to=1), node("Add", "x float", "y")], {"table": np.arange(42).reshape(6, 7)}),
    ([node("Gather", "x table", "y", axis=1)], {"table": np.array([[0, 1], [2, 3]])}),
    (
        [
            node("Shape", "x", "shape"),
            node("Gather", "shape three", "width", axis=0),
            node("Cast", "width", "float", to=1),
            node("Sqrt", "float", "root"),
            node("Greater", "width three", "wide"),
            node("Div", "x root", "z"),
            node("Where", "wide z x", "y"),
        ],
        {"three": np.array(3, np.int64)},
    ),
]


@pytest.mark.parametrize(("nodes", "constants"), DEVICES)
def test_constants_follow_the_network_to_its_device(tmp_path, nodes, constants):
    _, graph, _ = read_onnx(write(tmp_path / "m.onnx", nodes, constants))
    images = torch.from_numpy(floats(2, *SHAPE))
    found = graph.module(images)
    torch.testing.assert_close(found, graph.reference(images))
    elsewhere = graph.module.to("meta")(images.to("meta"))
    assert (elsewhere.device.type, elsewhere.shape) == ("meta", found.shape)


class Operations(TorchDispatchMode):
    """Lists what is run inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append(operation)
        return operation(*args, **(kwargs or {}))


def test_masks_and_zeros_are_not_copied_each_time(tmp_path):
    """A copy from the CPU makes a GPU wait."""
    nodes = [
        *(node("Where", "mask x zero", "kept"), node("Shape", "x", "shape"), node("ConstantOfShape", "shape", "zeros")),
        node("Concat", "kept zeros", "y", axis=1),
    ]
    _, graph, _ = read_onnx(write(tmp_path / "m.onnx", nodes, {"mask": MASK, "zero": np.float32(0)}))
    assert [buffer.dtype for buffer in graph.module.buffers()] == [torch.bool]
    module, images = graph.module.to("meta"), torch.empty(2, *SHAPE, device="meta")
    with Operations() as operations:
        module(images)
    assert torch.ops.aten.where.self in operations.seen
    assert torch.ops.aten._to_copy.default not in operations.seen


def test_a_batch_written_into_a_reshaping_is_made_free(tmp_path):
    nodes = [node("Reshape", "x target", "flat"), node("MatMul", "flat weight", "y")]
    path = write(tmp_path / "m.onnx", nodes, {"target": sizes(1, 168), "weight": floats(168, 3)}, batch=1)
    _, graph, _ = read_onnx(path)
    assert graph.batch == 1
    check_graph(graph, SHAPE, "m.onnx")
    assert graph.module(torch.zeros(5, *SHAPE)).shape == (5, 3)


def test_images_with_the_channels_last(tmp_path):
    nodes = [
        node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
        node("GlobalAveragePool", "t", "p"),
        node("Flatten", "p", "y"),
    ]
    _, graph, _ = read_onnx(write(tmp_path / "m.onnx", nodes, shape=(8, 9, 3)))
    assert graph.input_shape == (3, 8, 9)
    images = torch.from_numpy(floats(2, 3, 8, 9))
    torch.testing.assert_close(graph.module(images), images.mean((2, 3)))
    torch.testing.assert_close(graph.reference(images), images.mean((2, 3)))


def test_layers_keep_their_names_or_get_those_of_their_place(tmp_path):
    def nodes(weight):
        return [node("Conv", f"x {weight}", "c"), node("BatchNormalization", "c bn.weight bn.bias bn.mean bn.var", "y")]

    constants = {"bn.weight": floats(2), "bn.bias": floats(2), "bn.mean": floats(2), "bn.var": np.abs(floats(2))}
    for weight, expected in (("stem.conv.weight", "stem.conv.weight"), ("onnx::Conv_12", "layer0.weight")):
        path = write(tmp_path / "m.onnx", nodes(weight), {weight: floats(2, 4, 3, 3), **constants})
        state, graph, _ = read_onnx(path)
        assert next(iter(state)) == expected
        assert len(state) == 5
        layer = next(layer for layer in graph.module.modules() if isinstance(layer, GraphBatchNorm))
        np.testing.assert_array_equal(layer.running_mean, constants["bn.mean"])


def test_metadata(tmp_path):
    path = write(tmp_path / "m.onnx", [node("Relu", "x", "y")], metadata={"ssdkd.mean": "[0.5]", "author": "me"})
    assert read_onnx(path)[2] == {"ssdkd.mean": "[0.5]", "author": "me"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("TopK", "x k", "y i"), node("Det", "x", "z")], "cannot run with gradients: Det, TopK"),
        ([node("QuantizeLinear", "x s", "q"), node("DequantizeLinear", "q s", "y")], "is quantized"),
    ],
)
def test_what_cannot_be_run_is_said(tmp_path, nodes, message):
    path = write(tmp_path / "m.onnx", nodes, {"k": sizes(1), "s": np.float32(0.1)})
    with pytest.raises(SSDKDError, match=message) as caught:
        read_onnx(path)
    assert "give the" in caught.value.hint


def test_weights_that_are_too_few_for_their_shape(tmp_path):
    path = write(tmp_path / "m.onnx", [node("Mul", "x w", "y")], {"w": floats(2, 2)})
    model = onnx.load(path)
    model.graph.initializer[0].dims[0] = 7
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SSDKDError, match="damaged"):
        read_onnx(path)


def test_other_inputs_than_images_are_refused(tmp_path):
    path = write(tmp_path / "m.onnx", [node("Cast", "x", "y", to=1)], kind=TensorProto.INT64)
    with pytest.raises(SSDKDError, match="expected one float tensor of images"):
        read_onnx(path)


def test_every_operation_is_tried():
    tried = {parameter.values[0] for parameter in CASES}
    in_graphs = {"Cast", "Concat", "Equal", "Gemm", "Shape", "Split", "Where"}
    rest = {
        "And",
        "ConstantOfShape",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Log",
        "Mod",
        "Not",
        "Or",
        "SpaceToDepth",
    }
    assert set(OPERATIONS) - tried - in_graphs - rest == {"Sqrt", "Sum", "Swish"}


def test_a_whole_network_of_torchs_exporter(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    network[1].running_mean.fill_(0.5)
    images = torch.from_numpy(floats(2, *SHAPE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network.eval(), (images,), str(tmp_path / "m.onnx"), dynamo=False)
    _, graph, _ = read_onnx(tmp_path / "m.onnx")
    assert (graph.batch, graph.input_shape) == (2, SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(graph.module(images), network(images), rtol=1e-4, atol=1e-5)


def with_external_data(path):
    """A network of one Gemm whose weights lie in weights.bin."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    write(path, nodes, {"head.weight": floats(3, 4 * 6 * 7), "head.bias": floats(3)})
    model = onnx.load(str(path))
    onnx.save(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_in_a_file_beside(tmp_path):
    path = with_external_data(tmp_path / "teacher.onnx")
    state, graph, _ = read_onnx(path)
    assert [list(value.shape) for value in state.values()] == [[3, 168], [3]]
    images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert relative_error(graph.module(images).detach(), graph.reference(images)) < 1e-5


def test_files_of_weights_count_in_size_and_sha256(tmp_path):
    path = with_external_data(tmp_path / "teacher.onnx")
    files = [path, tmp_path / "weights.bin"]
    before = load_teacher(path, input_shape=SHAPE).spec
    assert before.size_bytes == sum(file.stat().st_size for file in files) > 2000
    assert before.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    model = onnx.load(str(path))
    onnx.save(model, str(tmp_path / "whole.onnx"))
    whole = load_teacher(tmp_path / "whole.onnx", input_shape=SHAPE).spec
    assert whole.sha256 == hashlib.sha256((tmp_path / "whole.onnx").read_bytes()).hexdigest()


def test_a_missing_file_of_weights_is_named(tmp_path):
    path = with_external_data(tmp_path / "teacher.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(SSDKDError, match=r"teacher\.onnx keeps its weights in weights\.bin, which must lie") as caught:
        read_onnx(path)
    assert str(tmp_path) in caught.value.message
    assert "copy it there" in caught.value.hint


def test_a_file_of_weights_that_is_elsewhere_is_not_read(tmp_path):
    path = with_external_data(tmp_path / "teacher.onnx")
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere.bin")
    (tmp_path / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(SSDKDError, match=r"weights\.bin, which cannot be read: expected a plain file beside it"):
        read_onnx(path)


def test_a_file_of_weights_that_is_cut_short(tmp_path):
    path = with_external_data(tmp_path / "teacher.onnx")
    content = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(SSDKDError, match="damaged or cut short"):
        read_onnx(path)


def test_the_shape_of_a_constant(tmp_path):
    nodes = [node("Shape", "c", "n"), node("Cast", "n", "f", to=1), node("Mul", "x f", "y")]
    _, graph, _ = read_onnx(write(tmp_path / "a.onnx", nodes, {"c": sizes(5, 6, 7)}))
    images = torch.randn(2, *SHAPE)
    assert torch.equal(graph.module(images), 3 * images)
