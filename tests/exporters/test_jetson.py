"""The script runs under sh with a trtexec of ours, which writes down what it is asked for."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from engine.errors import SSDKDError
from exporters.jetson import write_build_script

TRTEXEC = r"""#!/bin/sh
printf '%s\n' "$@" >arguments
echo "what trtexec says"
[ -z "${FAILING:-}" ] || exit 1
for argument; do
    case $argument in
    --saveEngine=*) [ -n "${LAZY:-}" ] || printf 'the plan' >"${argument#--saveEngine=}" ;;
    --exportLayerInfo=*) printf '{"Layers": [{"Inputs": [{"Name": "half", %s}]}]}' "$TYPE" >"${argument#*=}" ;;
    esac
done
"""
FP16, FP32 = '"Format/Datatype": "Row major linear FP16 format"', '"Format/Datatype": "Row major linear FP32 format"'
INT8 = '"DataType": "Int8"'


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with trtexec and all that the script needs, and nothing else."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in ("sh", "dirname", "sha256sum", "rm", "mv", "grep", "tail", "wc", "cut"):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    (folder / "trtexec").write_text(TRTEXEC)
    (folder / "trtexec").chmod(0o755)
    return folder


def script_for(folder: Path, precision: str = "fp16", *, name: str = "model.onnx", **options: object) -> Path:
    folder.mkdir(exist_ok=True)
    write_graph(folder / name)
    words = {"batches": (1, 4, 16), "workspace_mb": 512, "plan_name": f"model.{precision}.engine"} | options
    return write_build_script(folder, folder / name, precision=precision, **words)


def write_graph(path: Path, shape: tuple[int | str, ...] = ("batch", 3, 8, 8)) -> None:
    value = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    onnx.save(
        helper.make_model(helper.make_graph([helper.make_node("Relu", ["images"], ["z"])], "g", [value], [output])),
        path,
    )


def run(script: Path, tools: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(script)],
        cwd="/",
        env={"PATH": str(tools), "TYPE": FP16, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_trtexec_is_asked_for_the_plan(tmp_path: Path, tools: Path) -> None:
    folder = tmp_path / "a run's folder"
    script = script_for(folder)
    done = run(script, tools)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "arguments").read_text().splitlines() == [
        "--onnx=model.onnx",
        "--stronglyTyped",
        "--minShapes=images:1x3x8x8",
        "--optShapes=images:4x3x8x8",
        "--maxShapes=images:16x3x8x8",
        "--memPoolSize=workspace:512M",
        "--timingCacheFile=timing.cache",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=model.fp16.engine.layers.json",
        "--skipInference",
        "--saveEngine=model.fp16.engine.part",
    ]
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "arguments",
        "build_model.fp16.engine.sh",
        "model.fp16.engine",
        "model.fp16.engine.layers.json",
        "model.fp16.engine.log",
        "model.onnx",
    ]
    assert (folder / "model.fp16.engine").read_bytes() == b"the plan"
    assert (folder / "model.fp16.engine.log").read_text() == "what trtexec says\n"
    assert f"8 bytes, sha256 {hashlib.sha256(b'the plan').hexdigest()}" in done.stdout
    assert "--loadEngine=model.fp16.engine --shapes=images:4x3x8x8 --useCudaGraph" in done.stdout


def test_script_can_be_run_by_its_name(tmp_path: Path) -> None:
    script = script_for(tmp_path)
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/bin/sh\n")
    assert "@" not in script.read_text().replace('"$@"', "")


def test_float32_is_built_without_tf32(tmp_path: Path, tools: Path) -> None:
    script = script_for(tmp_path / "run", "fp32", workspace_mb=None)
    assert run(script, tools, TYPE=FP32).returncode == 0
    arguments = (script.parent / "arguments").read_text().splitlines()
    assert "--noTF32" in arguments
    assert not any("memPoolSize" in argument for argument in arguments)


def test_fixed_batch_has_no_shapes(tmp_path: Path, tools: Path) -> None:
    write_graph(tmp_path / "fixed.onnx", (4, 3, 8, 8))
    script = write_build_script(
        tmp_path, tmp_path / "fixed.onnx", precision="fp16", batches=(4, 4, 4), workspace_mb=64, plan_name="plan"
    )
    assert run(script, tools).returncode == 0
    assert "Shapes" not in (tmp_path / "arguments").read_text()


def test_names_that_the_shell_would_read(tmp_path: Path, tools: Path) -> None:
    script = script_for(tmp_path / "run", name="it's $HOME `x`.onnx", plan_name='my "plan" $1')
    done = run(script, tools)
    assert (done.returncode, done.stderr) == (0, "")
    assert (script.parent / 'my "plan" $1').read_bytes() == b"the plan"
    assert "--onnx=it's $HOME `x`.onnx\n" in (script.parent / "arguments").read_text()


@pytest.mark.parametrize(("precision", "types"), [("fp16", FP32), ("fp32", FP16), ("int8", FP16), ("fp32", INT8)])
def test_engine_of_another_precision_is_rejected(precision: str, types: str, tmp_path: Path, tools: Path) -> None:
    script = script_for(tmp_path / "run", precision)
    done = run(script, tools, TYPE=types)
    assert done.returncode == 3
    assert f"error: {precision} was asked for and the engine is of another precision" in done.stderr
    plan = script.parent / f"model.{precision}.engine"
    assert not plan.exists()
    assert plan.with_name(plan.name + ".rejected").read_bytes() == b"the plan"


def test_int8_engine_passes(tmp_path: Path, tools: Path) -> None:
    assert run(script_for(tmp_path / "run", "int8"), tools, TYPE=INT8).returncode == 0


def test_engine_that_does_not_tell_its_types_is_kept_with_a_warning(tmp_path: Path, tools: Path) -> None:
    script = script_for(tmp_path / "run")
    done = run(script, tools, TYPE='"Kind": "half"')
    assert done.returncode == 0
    assert done.stderr.startswith("warning: this trtexec does not tell the types")
    assert (script.parent / "model.fp16.engine").exists()


def test_another_or_no_onnx_file(tmp_path: Path, tools: Path) -> None:
    script = script_for(tmp_path / "run")
    with (script.parent / "model.onnx").open("ab") as file:
        file.write(b"x")
    done = run(script, tools)
    assert done.returncode == 1
    assert done.stderr.startswith("error: model.onnx is not the file that this script was written for: sha256 ")
    (script.parent / "model.onnx").unlink()
    done = run(script, tools)
    assert (done.returncode, "model.onnx is not beside this script" in done.stderr) == (1, True)
    assert not (script.parent / "arguments").exists()


@pytest.mark.skipif(Path("/usr/src/tensorrt/bin/trtexec").exists(), reason="trtexec is installed here")
def test_no_trtexec(tmp_path: Path, tools: Path) -> None:
    (tools / "trtexec").unlink()
    done = run(script_for(tmp_path / "run"), tools)
    assert done.returncode == 2
    assert done.stderr.startswith("error: trtexec is neither on PATH nor in /usr/src/tensorrt/bin")


@pytest.mark.parametrize("variable", ["FAILING", "LAZY"])
def test_failing_trtexec_leaves_the_earlier_plan(variable: str, tmp_path: Path, tools: Path) -> None:
    script = script_for(tmp_path / "run")
    (script.parent / "model.fp16.engine").write_bytes(b"earlier")
    done = run(script, tools, **{variable: "1"})
    assert done.returncode == 4
    assert "all that it said is in model.fp16.engine.log" in done.stderr
    assert ("what trtexec says" in done.stderr) == (variable == "FAILING")
    assert (script.parent / "model.fp16.engine").read_bytes() == b"earlier"
    assert not (script.parent / "model.fp16.engine.part").exists()


def test_graph_that_is_no_classifier_of_images(tmp_path: Path) -> None:
    write_graph(tmp_path / "model.onnx", ("batch", 3, "height", "width"))
    with pytest.raises(SSDKDError, match=r"expected one input .* with its image size stated"):
        write_build_script(
            tmp_path, tmp_path / "model.onnx", precision="fp16", batches=(1, 1, 1), workspace_mb=1, plan_name="plan"
        )
    (tmp_path / "model.onnx").write_bytes(b"no model at all")
    with pytest.raises(SSDKDError, match=r"model\.onnx is no ONNX file"):
        write_build_script(
            tmp_path, tmp_path / "model.onnx", precision="fp16", batches=(1, 1, 1), workspace_mb=1, plan_name="plan"
        )
    with pytest.raises(SSDKDError, match=r"no\.onnx cannot be read: No such file"):
        write_build_script(
            tmp_path, tmp_path / "no.onnx", precision="fp16", batches=(1, 1, 1), workspace_mb=1, plan_name="plan"
        )
