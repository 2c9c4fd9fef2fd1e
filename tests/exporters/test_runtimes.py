import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import nn

from engine.errors import SSDKDError
from engine.processors import computing_threads
from exporters.metadata import describe
from exporters.runtimes import inference_batch, open_runtime, predictor, to_input


def foreign(
    path: Path,
    shape: Sequence[int | str | None],
    *,
    kind: int = TensorProto.FLOAT,
    pooled: bool = True,
    operator: str = "Identity",
) -> Path:
    """An ONNX file of another tool: the mean of each channel as logits, no metadata."""
    nodes = [helper.make_node(operator, ["x"], ["y"])]
    if pooled:
        nodes.append(helper.make_node("ReduceMean", ["y"], ["z"], axes=[2, 3], keepdims=0))
    output = helper.make_tensor_value_info("z" if pooled else "y", kind, None)
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", kind, shape)], [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def classifier(
    path: Path,
    nodes: Sequence[NodeProto],
    *,
    shape: Sequence[int | str] = ("n", 3, 8, 8),
    initializer: Sequence[TensorProto] = (),
    output: int | ValueInfoProto = TensorProto.FLOAT,
) -> Path:
    """An ONNX file of these nodes, from "x" to "z"."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("z", output, None) if isinstance(output, int) else output]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializer=initializer)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_opened_file_says_what_it_takes_and_gives(exported: Path) -> None:
    runtime = open_runtime(exported)
    threads = computing_threads()
    assert runtime.name == f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider, {threads} threads"
    assert (runtime.input_shape, runtime.classes, runtime.fixed_batch) == ((3, 8, 8), 5, None)
    assert runtime.path == exported
    assert describe(runtime.metadata).class_names == ("cat", "dog", "T-shirt/top", "é", "5")


def test_logits_do_not_depend_on_the_threads(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).standard_normal((9, 3, 8, 8), dtype=np.float32)
    logits = []
    for threads in (1, 2):
        monkeypatch.setattr("exporters.runtimes.computing_threads", lambda threads=threads: threads)
        logits.append(open_runtime(exported).run(images))
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-6)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SSDKDError, match="no model file at"):
        open_runtime(tmp_path / "model.onnx")
    with pytest.raises(SSDKDError, match="no model file at"):
        open_runtime(tmp_path)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(b"TFL3")
    said = r"expected a model file ending in \.onnx or \.engine, found '\.tflite'"
    with pytest.raises(SSDKDError, match=said) as caught:
        open_runtime(tmp_path / "model.tflite")
    assert caught.value.hint == (
        f"`ssdkd export {tmp_path / 'model.tflite'}` makes an ONNX file of a trained network, with --arch, --input, "
        "--mean and --std where `ssdkd inspect` needs them"
    )


@pytest.mark.parametrize("content", [b"", b"no model at all\n" * 20, bytes(1000)])
def test_file_that_is_no_model(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(SSDKDError, match="cannot be opened by ONNX Runtime: ") as caught:
        open_runtime(path)
    assert "ONNXRuntimeError" not in caught.value.message
    assert caught.value.message.count(str(path)) == 1
    assert capfd.readouterr() == ("", "")


def test_operator_that_the_runtime_lacks(tmp_path: Path) -> None:
    with pytest.raises(SSDKDError, match=r"cannot be opened by ONNX Runtime: .*Unheard"):
        open_runtime(foreign(tmp_path / "model.onnx", ["n", 3, 8, 8], operator="Unheard"))


@pytest.mark.parametrize(
    ("shape", "kind", "pooled", "message"),
    [
        (
            ["n", 3, 8, 8],
            TensorProto.DOUBLE,
            True,
            r"one float32 or float16 input .* found x tensor\(double\)",
        ),
        (["n", 3, 8], TensorProto.FLOAT, False, "expected one float32 or float16 input"),
        (["n", 3, 8, 8], TensorProto.FLOAT, False, r"expected logits \[batch, classes\], found .* \[1, 3, 8, 8\]"),
        (["n", 3, "h", "w"], TensorProto.FLOAT, True, "leaves its image size open"),
    ],
)
def test_file_that_is_no_classifier_of_images(
    shape: list[int | str], kind: int, pooled: bool, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SSDKDError, match=message):
        open_runtime(foreign(tmp_path / "model.onnx", shape, kind=kind, pooled=pooled))


def test_stated_size_completes_an_open_one(tmp_path: Path) -> None:
    path = foreign(tmp_path / "model.onnx", [None, 3, "h", None])
    assert open_runtime(path, input_shape=(3, 16, 20)).input_shape == (3, 16, 20)
    with pytest.raises(SSDKDError, match="takes images of 3xanyxany, found --input 1x16x16"):
        open_runtime(path, input_shape=(1, 16, 16))


def test_file_with_a_fixed_batch_takes_any_number(tmp_path: Path) -> None:
    runtime = open_runtime(foreign(tmp_path / "model.onnx", [4, 3, 8, 8]))
    images = np.random.default_rng(0).standard_normal((9, 3, 8, 8), dtype=np.float32)
    assert runtime.fixed_batch == 4
    np.testing.assert_allclose(runtime.run(images), images.mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_open_size_that_the_network_was_not_made_for(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((192, 2), dtype=np.float32), "weights")
    flat = [helper.make_node("Flatten", ["x"], ["y"]), helper.make_node("MatMul", ["y", "weights"], ["z"])]
    path = classifier(tmp_path / "model.onnx", flat, shape=["n", 3, "h", "w"], initializer=[weights])
    assert open_runtime(path, input_shape=(3, 8, 8)).classes == 2
    with pytest.raises(SSDKDError, match=r"cannot run on images of shape \[1, 3, 16, 16\]") as caught:
        open_runtime(path, input_shape=(3, 16, 16))
    assert "--input" in caught.value.hint


def test_rows_that_are_not_the_images(tmp_path: Path) -> None:
    """Such logits would be compared with every label in turn: an accuracy, and a wrong one."""
    mixing = [
        helper.make_node("ReduceMean", ["x"], ["y"], axes=[0, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["y", "first"], ["z"]),
    ]
    first = numpy_helper.from_array(np.array([0], dtype=np.int64), "first")
    path = classifier(tmp_path / "model.onnx", mixing, initializer=[first])
    images = np.zeros((5, 3, 8, 8), dtype=np.float32)
    assert open_runtime(path).run(images[:1]).shape == (1, 3)
    with pytest.raises(SSDKDError, match=r"gives logits of shape \[1, 3\] for 5 images, expected \[5, 3\]"):
        open_runtime(path).run(images)
    fixed = classifier(tmp_path / "fixed.onnx", mixing, shape=[4, 3, 8, 8], initializer=[first])
    with pytest.raises(SSDKDError, match=r"expected logits \[4, classes\], found an output of shape \[1, 3\]"):
        open_runtime(fixed)


def test_output_that_is_no_logits(tmp_path: Path) -> None:
    mean = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    answer = helper.make_node("ArgMax", ["y"], ["z"], axis=1)
    path = classifier(tmp_path / "answer.onnx", [mean, answer], output=TensorProto.INT64)
    with pytest.raises(SSDKDError, match=r"expected float logits .* found z tensor\(int64\)"):
        open_runtime(path)
    table = helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2])  # scikit-learn
    row = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    rows = helper.make_value_info("z", helper.make_sequence_type_proto(row))
    path = classifier(tmp_path / "table.onnx", [mean, table], output=rows)
    with pytest.raises(SSDKDError, match=r"expected float logits .* found z seq\(map\(int64,tensor\(float\)\)\)"):
        open_runtime(path)


@pytest.mark.parametrize("shape", [[0, 3, 8, 8], ["n", 3, 0, 0]])
def test_size_of_zero(shape: list[int | str], tmp_path: Path) -> None:
    with pytest.raises(SSDKDError, match=r"Expected: 0|leaves its image size open"):
        open_runtime(foreign(tmp_path / "model.onnx", shape))


def test_images_of_another_size(exported: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SSDKDError, match=r"cannot run on images of shape \[2, 3, 9, 9\]") as caught:
        open_runtime(exported).run(np.zeros((2, 3, 9, 9), dtype=np.float32))
    assert caught.value.hint == "it takes [batch, 3, 8, 8]"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("pixels", "batch"), [((8, 8), 256), ((64, 64), 256), ((64, 128), 128), ((224, 224), 20), ((512, 512), 4)]
)
def test_fewer_large_images_are_run_at_once(pixels: tuple[int, int], batch: int) -> None:
    assert inference_batch((3, *pixels)) == batch
    assert inference_batch((3, 5000, 5000)) == 1


def test_predictor_runs_in_eval_mode_and_puts_the_flags_back() -> None:
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5)).train()
    module[2].eval()
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    logits = predictor(module)(images)
    np.testing.assert_allclose(logits, images.reshape(2, 12) / np.sqrt(1 + 1e-5), rtol=1e-6)
    assert [child.training for child in module] == [True, True, False]
    assert module[1].num_batches_tracked == 0
    assert torch.equal(module[1].running_mean, torch.zeros(12))


def test_predictor_puts_the_flags_back_after_an_error() -> None:
    module = nn.Linear(5, 2).train()
    with pytest.raises(RuntimeError):
        predictor(module)(np.zeros((1, 4), dtype=np.float32))
    assert module.training


def test_input_is_scaled_normalised_and_channels_first() -> None:
    images = np.array([[[[0, 255], [51, 102]]]], dtype=np.uint8)  # [1, 1, 2, 2]
    inputs = to_input(images, (0.0, 0.5), (1.0, 0.25))
    assert inputs.dtype == np.float32
    assert inputs.flags.c_contiguous
    np.testing.assert_allclose(inputs, [[[[0.0, 0.2]], [[2.0, -0.4]]]], atol=1e-6)


def test_a_model_file_is_used_without_torch() -> None:
    modules = ["exporters", "exporters.metadata", "exporters.runtimes", "exporters.bench", "exporters.evaluate"]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_damaged_name_is_a_known_error(exported: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(exported.read_bytes().replace(b"images", b"\xff\xff\xff\xff\xff\xff"))
    with pytest.raises(SSDKDError, match="cannot be opened by ONNX Runtime"):
        open_runtime(damaged)
