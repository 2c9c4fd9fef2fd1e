"""Real builds by TensorRT for RTX, which needs no GPU for them."""

import dataclasses
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16

from engine.errors import SSDKDError
from engine.students import build_network
from exporters.tensorrt_sidecar import (
    SCHEMA_VERSION,
    Sidecar,
    check_precision,
    check_sidecar,
    precision_notes,
    read_sidecar,
    sidecar_path,
)
from exporters.to_onnx import write_onnx
from exporters.to_tensorrt import Flavour, build_plan, check_builder, find_flavour

HAS_PACKAGE = (sys.platform, platform.machine()) == ("linux", "x86_64") or importlib.util.find_spec("tensorrt_rtx")
pytestmark = pytest.mark.skipif(
    not HAS_PACKAGE, reason="TensorRT for RTX is not installed: no package for this platform"
)

NAMES, PRECISIONS = ("wrn10_1", "mobilenetv2", "wrn16_2"), ("fp32", "fp16", "int8")
SHAPE = (3, 32, 32)
SHAPES = {"wrn10_1": (1, 28, 28)}  # the demo's student

Graphs = Callable[[str, str], Path]


class Images(CalibrationDataReader):
    """Two batches of noise for a model."""

    def __init__(self, source: Path) -> None:
        rng, (images,) = np.random.default_rng(0), onnx.load(source).graph.input
        shape = [dimension.dim_value for dimension in images.type.tensor_type.shape.dim[1:]]
        self.batches = iter([{"images": rng.standard_normal((4, *shape), dtype=np.float32)} for _ in range(2)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize(source: Path, target: Path, *, int32_bias: bool = False, float_nodes: Sequence[str] = ()) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            source,
            target,
            Images(source),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(float_nodes),
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": int32_bias},
        )
    return target


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """ONNX files by network and precision, made when they are first asked for."""
    folder = tmp_path_factory.mktemp("graphs")

    def graph(name: str, precision: str) -> Path:
        path, source = folder / f"{name}.{precision}.onnx", folder / f"{name}.fp32.onnx"
        if not source.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                shape = SHAPES.get(name, SHAPE)
                network = build_network(name, classes=10, channels=shape[0], pixels=shape[1]).eval()
            write_onnx(network, source, input_shape=shape, metadata={"ssdkd.classes": "10"})
        if precision == "fp16" and not path.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of weights that are too small for float16
                onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)
        if precision == "int8" and not path.exists():
            quantize(source, path)
        return path

    return graph


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return find_flavour("tensorrt_rtx")


def build(
    graph: Path, plan: Path, flavour: Flavour, precision: str = "fp32", batches: tuple[int, int, int] = (1, 8, 64)
) -> Sidecar:
    return build_plan(
        graph, plan, precision=precision, batches=batches, workspace_mb=256, timing_cache=None, flavour=flavour
    )


def made(
    path: Path,
    nodes: Sequence[NodeProto],
    *,
    shape: Sequence[int | str] = ("n", 3, 8, 8),
    initializer: Sequence[TensorProto] = (),
    inputs: Sequence[str] = ("x",),
) -> Path:
    """An ONNX file of these nodes, from "x" to "z"."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs]
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", values, [output], initializer=initializer)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())
    return path


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_plan_is_of_the_precision_that_was_asked_for(
    name: str, precision: str, graphs: Graphs, flavour: Flavour, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graph, plan = graphs(name, precision), tmp_path / "model.engine"
    capfd.readouterr()
    sidecar = build(graph, plan, flavour, precision)
    assert capfd.readouterr() == ("", "")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.engine", "model.engine.json"]
    assert (read_sidecar(plan), check_sidecar(plan, graph)) == (sidecar, None)
    assert (check_precision(sidecar), set(sidecar.computed_weights)) == (None, {precision})
    assert set(sidecar.layers.values()) == {precision}
    held = sidecar.weights_in_plan[precision]
    assert held[precision] > 0.95 * sum(held.values())
    assert set(held) <= {precision, "not found"}


def test_sidecar_says_what_the_plan_is(graphs: Graphs, flavour: Flavour, tmp_path: Path) -> None:
    graph, plan = graphs("resnet8", "fp16"), tmp_path / "model.engine"
    sidecar = build(graph, plan, flavour, "fp16", (1, 4, 16))
    assert (sidecar.flavour, sidecar.version) == ("tensorrt_rtx", flavour.version)
    assert sidecar.plan_sha256 == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert sidecar.onnx_sha256 == hashlib.sha256(graph.read_bytes()).hexdigest()
    assert (sidecar.plan_bytes, sidecar.onnx_bytes) == (plan.stat().st_size, graph.stat().st_size)
    assert (sidecar.input.name, sidecar.input.dtype) == ("images", "float")
    assert (sidecar.input.min, sidecar.input.opt, sidecar.input.max) == ((1, *SHAPE), (4, *SHAPE), (16, *SHAPE))
    assert (sidecar.output.name, sidecar.output.dtype, sidecar.output.max) == ("logits", "float", (16, 10))
    assert (sidecar.precision, sidecar.workspace_mb, sidecar.timing_cache) == ("fp16", 256, None)
    assert sidecar.onnx_metadata["ssdkd.classes"] == "10"
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(graph).graph.initializer]
    assert sidecar.weight_bytes["fp16"] == sum(values.nbytes for values in stored if values.dtype == np.float16)
    assert (sidecar.compute_capability is None) == (not torch.cuda.is_available())


def test_fp16_halves_the_plan_of_a_network_above_a_million_weights(
    graphs: Graphs, flavour: Flavour, tmp_path: Path
) -> None:
    whole, half, integer = (
        build(graphs("mobilenetv2", precision), tmp_path / precision, flavour, precision) for precision in PRECISIONS
    )
    assert whole.weight_bytes["fp32"] > 4_000_000
    assert half.plan_bytes < 0.6 * whole.plan_bytes
    assert integer.weights_in_plan["int8"]["int8"] > 2_000_000  # though the plan is no smaller: docs/tensorrt.md
    assert "is not known" in precision_notes(integer)[-1]
    assert not any("is not known" in note for note in precision_notes(half))


@pytest.mark.parametrize(
    ("graph", "asked"), [(graph, asked) for graph in PRECISIONS for asked in PRECISIONS if graph != asked]
)
def test_graph_of_another_precision_is_named(
    graph: str, asked: str, graphs: Graphs, flavour: Flavour, tmp_path: Path
) -> None:
    sidecar = build(graphs("resnet8", graph), tmp_path / "model.engine", flavour, asked)
    problem = check_precision(sidecar)
    assert problem is not None
    assert problem.startswith(f"{asked} was asked for, and 74,800 of the graph's 74,800 weights compute in {graph}: ")
    assert "node_Conv" in problem


def test_weights_that_are_stored_in_float16_and_computed_in_float32_are_no_fp16(
    flavour: Flavour, tmp_path: Path
) -> None:
    weights = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float16), "w")
    nodes = [
        helper.make_node("Cast", ["w"], ["float_w"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "float_w"], ["z"], name="stem"),
    ]
    sidecar = build(made(tmp_path / "m.onnx", nodes, initializer=[weights]), tmp_path / "plan", flavour, "fp16")
    assert sidecar.weight_bytes["fp16"] == 2 * 216
    assert check_precision(sidecar) == ("fp16 was asked for, and 216 of the graph's 216 weights compute in fp32: stem")


def test_integers_that_meet_float_activations_are_no_int8(flavour: Flavour, tmp_path: Path) -> None:
    initializer = [
        numpy_helper.from_array(np.ones((8, 3, 3, 3), np.int8), "q"),
        numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["z"], name="stem"),
    ]
    sidecar = build(made(tmp_path / "m.onnx", nodes, initializer=initializer), tmp_path / "plan", flavour, "int8")
    assert (sidecar.weight_bytes["int8"], sidecar.computed_weights) == (216, {"fp32": 216})
    assert check_precision(sidecar) == ("int8 was asked for, and 216 of the graph's 216 weights compute in fp32: stem")


def test_layers_may_stay_above_the_precision_but_not_most(graphs: Graphs, flavour: Flavour, tmp_path: Path) -> None:
    source = graphs("resnet8", "fp32")
    largest = max(
        (node for node in onnx.load(source).graph.node if node.op_type == "Conv"),
        key=lambda node: int(node.name.rpartition("_")[2]),
    )
    mixed = quantize(source, tmp_path / "mixed.onnx", float_nodes=[largest.name])
    sidecar = build(mixed, tmp_path / "plan", flavour, "int8")
    assert sidecar.layers[largest.name] == "fp32"
    assert sidecar.computed_weights == {"int8": 74_800 - 36_864, "fp32": 36_864}
    assert check_precision(sidecar) is None
    assert check_precision(sidecar, least_share=0.9) == (
        f"int8 was asked for, and 36,864 of the graph's 74,800 weights compute in fp32: {largest.name}"
    )
    assert "36,864 of the graph's" in str(
        check_precision(dataclasses.replace(sidecar, precision="int8"), least_share=1)
    )
    assert "compute in int8" in str(check_precision(dataclasses.replace(sidecar, precision="fp32")))


def test_network_without_weights_has_no_precision(flavour: Flavour, tmp_path: Path) -> None:
    graph = made(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["z"])])
    assert "no convolution" in str(check_precision(build(graph, tmp_path / "plan", flavour)))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Det", ["x"], ["z"], name="odd"), r"does not know the operator Det \(node odd\)$"),
        (helper.make_node("Det", ["x"], ["z"]), "does not know the operator Det$"),
        (
            helper.make_node("Special", ["x"], ["z"], name="odd", domain="com.example"),
            r"does not know the operator Special \(node odd\)$",
        ),
        (
            helper.make_node("MatMul", ["x", "w"], ["z"], name="mixed"),
            r"refuses the operator MatMul \(node mixed\): .*`A` is of type Float and `B` is of type Half\.?\)?$",
        ),
    ],
)
def test_operator_that_cannot_be_parsed_is_named(
    node: NodeProto, message: str, flavour: Flavour, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = numpy_helper.from_array(np.ones((8, 4), np.float16), "w")
    graph = made(tmp_path / "model.onnx", [node], initializer=[weights])
    with pytest.raises(SSDKDError, match=message) as caught:
        build(graph, tmp_path / "plan", flavour)
    assert caught.value.message.startswith(f"{graph}: TensorRT for RTX {flavour.version}")
    assert "\n" not in caught.value.message
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


def test_int32_bias_is_refused_by_name(graphs: Graphs, flavour: Flavour, tmp_path: Path) -> None:
    graph = quantize(graphs("resnet8", "fp32"), tmp_path / "model.onnx", int32_bias=True)
    with pytest.raises(SSDKDError, match=r"refuses the operator DequantizeLinear .*Int32"):
        build(graph, tmp_path / "plan", flavour, "int8")


def test_damaged_file(flavour: Flavour, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model at all")
    with pytest.raises(SSDKDError, match=r"model\.onnx cannot be read by TensorRT for RTX .*: .*parse"):
        build(tmp_path / "model.onnx", tmp_path / "plan", flavour)


def test_empty_and_missing_file(flavour: Flavour, tmp_path: Path) -> None:
    with pytest.raises(SSDKDError, match=r"model\.onnx cannot be read: No such file"):
        build(tmp_path / "model.onnx", tmp_path / "plan", flavour)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(SSDKDError, match="found no input and 0 outputs"):
        build(tmp_path / "model.onnx", tmp_path / "plan", flavour)


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([helper.make_node("Relu", ["x"], ["z"])], {"shape": ("n", 3, "h", "w")}, r"found x \[-1, 3, -1, -1\] and 1"),
        ([helper.make_node("Relu", ["x"], ["z"])], {"shape": ("n", 192)}, r"found x \[-1, 192\] and 1 outputs"),
        ([helper.make_node("Add", ["x", "y"], ["z"])], {"inputs": ("x", "y")}, r"found x .*, y \[-1, 3, 8, 8\] and 1"),
        ([helper.make_node("Relu", ["x"], ["z"])], {"shape": (4, 3, 8, 8)}, "takes batches of 4 only, .* 1 to 64"),
    ],
)
def test_network_that_is_no_classifier_of_any_batch(
    nodes: list[NodeProto], options: dict[str, tuple[int | str, ...]], message: str, flavour: Flavour, tmp_path: Path
) -> None:
    graph = made(tmp_path / "model.onnx", nodes, **options)
    with pytest.raises(SSDKDError, match=message):
        build(graph, tmp_path / "plan", flavour)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_fixed_batch_that_is_asked_for(flavour: Flavour, tmp_path: Path) -> None:
    graph = made(tmp_path / "model.onnx", [helper.make_node("Relu", ["x"], ["z"])], shape=(4, 3, 8, 8))
    sidecar = build(graph, tmp_path / "plan", flavour, batches=(4, 4, 4))
    assert sidecar.input.min == sidecar.input.max == (4, 3, 8, 8)


@pytest.mark.parametrize("batches", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_batches_out_of_order(batches: tuple[int, int, int], flavour: Flavour, tmp_path: Path) -> None:
    with pytest.raises(SSDKDError, match="expected 1 <= smallest <= usual <= largest"):
        build(tmp_path / "model.onnx", tmp_path / "plan", flavour, batches=batches)


# What stands in for TensorRT where only that for RTX is: a module called tensorrt, found before any other.

PARTS = "NetworkDefinitionCreationFlag, Builder, ILogger, OnnxParser, Runtime"


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    before = sys.modules.pop("tensorrt", None)
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(source: str) -> None:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "tensorrt.py").write_text(source)

    yield install
    sys.modules.pop("tensorrt", None)
    if before is not None:
        sys.modules["tensorrt"] = before


def test_tensorrt_comes_first_and_rtx_where_it_is_wanted(tensorrt: Callable[[str], None], flavour: Flavour) -> None:
    tensorrt(f"from tensorrt_rtx import {PARTS}\n__version__ = '10.3.0'")
    assert find_flavour() == Flavour("tensorrt", "TensorRT", "10.3.0")
    assert find_flavour("tensorrt_rtx") == flavour == Flavour("tensorrt_rtx", "TensorRT for RTX", flavour.version)
    check_builder(flavour)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ModuleNotFoundError('No module named tensorrt', name='tensorrt')", "TensorRT is not installed"),
        (
            "raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory')",
            "TensorRT is installed but cannot be imported: libnvinfer.so.10: cannot open shared object file",
        ),
        ("raise FileNotFoundError('Could not find: nvinfer_11.dll')", "cannot be imported: Could not find: nvinfer_11"),
        ("raise RuntimeError('libnvinfer.so.10 is truncated')", "cannot be imported: libnvinfer.so.10 is truncated"),
        ("raise AttributeError", "TensorRT is installed but cannot be imported: AttributeError"),
        ("__version__ = '10.3.0'", "TensorRT is installed but incomplete: it has no NetworkDefinitionCreationFlag"),
        ("", "incomplete: it has no NetworkDefinitionCreationFlag and no Builder and no ILogger"),
        (
            f"from tensorrt_rtx import {PARTS}\n__version__ = None",
            "TensorRT is installed but incomplete: it has no __ver",
        ),
        ("import cuda_that_is_missing", "cannot be imported: No module named 'cuda_that_is_missing'"),
        (
            f"from tensorrt_rtx import {PARTS}\nclass NetworkDefinitionCreationFlag: EXPLICIT_BATCH = 0\n"
            "__version__ = '8.6.1'",
            "TensorRT is of version 8.6.1, which has no strongly typed networks",
        ),
    ],
)
def test_library_that_is_missing_broken_or_too_old(
    source: str, message: str, tensorrt: Callable[[str], None], flavour: Flavour
) -> None:
    tensorrt(source)
    with pytest.raises(SSDKDError) as caught:
        find_flavour("tensorrt")
    assert message in caught.value.message
    assert caught.value.hint == "pip install 'tensorrt>=10,<12'"
    assert find_flavour() == flavour


def test_a_builder_that_is_nothing_builds_nothing(tensorrt: Callable[[str], None]) -> None:
    tensorrt(f"from tensorrt_rtx import {PARTS}\n__version__ = '10.3.0'\ndef Builder(logger): pass")
    with pytest.raises(SSDKDError, match=r"TensorRT 10\.3\.0 cannot build here: it gives no reason") as caught:
        check_builder(find_flavour("tensorrt"))
    assert "tensorrt-rtx-cu13" in caught.value.hint


def test_no_library_at_all(tensorrt: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt("raise ModuleNotFoundError('No module named tensorrt', name='tensorrt')")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # as if it were not there
    with pytest.raises(SSDKDError, match=r"TensorRT is not installed; TensorRT for RTX is not installed") as caught:
        find_flavour()
    assert caught.value.hint == "pip install 'tensorrt>=10,<12' or pip install tensorrt-rtx-cu13"


def test_builder_without_its_gpu(tensorrt: Callable[[str], None]) -> None:
    tensorrt(
        f"from tensorrt_rtx import {PARTS}\n"
        "__version__ = '10.16.1'\n"
        "def Builder(logger):\n"
        "    logger.log(ILogger.ERROR, 'createInferBuilder: Error Code 6: API Usage Error (CUDA initialization failure "
        "with error: 35. In x at /_src/y.cpp:1)')\n"
        "    raise TypeError('pybind11::init(): factory function returned nullptr')\n"
    )
    with pytest.raises(SSDKDError, match=r"10\.16\.1 cannot build here: .*CUDA initialization failure") as caught:
        check_builder(find_flavour())
    assert "tensorrt-rtx-cu13" in caught.value.hint


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_timings_are_kept_where_the_library_times(
    tensorrt: Callable[[str], None], graphs: Graphs, flavour: Flavour, tmp_path: Path
) -> None:
    tensorrt("from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\ndel IRuntimeCache")
    cache, graph = tmp_path / "timing.cache", graphs("resnet8", "fp16")

    def build_with(library: Flavour) -> Sidecar:
        return build_plan(
            graph,
            tmp_path / "plan",
            precision="fp16",
            batches=(1, 1, 1),
            workspace_mb=None,
            timing_cache=cache,
            flavour=library,
        )

    assert build_with(flavour).timing_cache is None
    assert not cache.exists()
    assert build_with(find_flavour("tensorrt")).timing_cache == "timing.cache"
    written = cache.read_bytes()
    assert written[:4] == b"ptrt"
    assert build_with(find_flavour("tensorrt")).timing_cache == "timing.cache"
    cache.write_bytes(b"of another version")
    build_with(find_flavour("tensorrt"))
    assert cache.read_bytes()[:4] == b"ptrt"


def test_library_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys, exporters.to_tensorrt, exporters.tensorrt_runtime, exporters.jetson;"
        "sys.exit(bool({'tensorrt', 'tensorrt_rtx', 'torch', 'onnxruntime'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_sidecar_names_no_module_to_import(tmp_path: Path) -> None:
    plan = tmp_path / "model.engine"
    plan.write_bytes(b"plan")
    sidecar_path(plan).write_text(json.dumps({"schema_version": SCHEMA_VERSION, "flavour": "antigravity"}))
    with pytest.raises(SSDKDError, match="flavour 'antigravity', expected tensorrt or tensorrt_rtx"):
        read_sidecar(plan)
