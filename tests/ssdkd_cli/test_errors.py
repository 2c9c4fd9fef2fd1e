"""Everything that a user can get wrong: one row each, through the same main() as the console script."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from engine.zoo import ZOO

RUN = ("--student", "resnet8", "--effort", "smoke", "--device", "cpu", "--input", "1x16x16", "--out", "{out}")


class RunsCode:
    """Unpickling it makes a folder called `ran`."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["SSDKD_TEST_FOLDER"]) / "ran"),)


def no_checkpoint(folder: Path) -> None:
    (folder / "teacher.txt").write_text("not a checkpoint, but long enough to be looked at " * 20)


def truncated(folder: Path) -> None:
    content = (folder / "teacher.pt").read_bytes()
    (folder / "half.pt").write_bytes(content[: len(content) // 2])


def code_in_pickle(folder: Path) -> None:
    torch.save({"state_dict": RunsCode()}, folder / "code.pt")


def plain_pickle(folder: Path) -> None:
    (folder / "code.pkl").write_bytes(pickle.dumps(RunsCode()))


def unknown_network(folder: Path) -> None:
    save_file({"a.weight": torch.randn(7, 13, 3, 3), "b.weight": torch.randn(4, 7)}, folder / "unknown.safetensors")


def not_finite(folder: Path) -> None:
    state = ZOO["resnet8"](4, 1).state_dict()
    state["conv1.weight"][0] = float("nan")
    torch.save(state, folder / "nan.pt")


def other_classes(folder: Path) -> None:
    for name in ("one", "two", "three"):
        (folder / "three" / name).mkdir(parents=True)
        Image.new("L", (16, 16)).save(folder / "three" / name / "image.png")


def empty_folder(folder: Path) -> None:
    (folder / "empty").mkdir()


def broken_images(folder: Path) -> None:
    for name in "abcd":
        (folder / "broken" / name).mkdir(parents=True)
        (folder / "broken" / name / "image.png").write_bytes(b"no picture")


def broken_npz(folder: Path) -> None:
    (folder / "broken.npz").write_bytes(b"no archive")


def another_run(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/report.json").write_text("{}")


def teacher_called_model(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "teacher.pt").read_bytes())  # the content decides what it is


def data_called_samples(folder: Path) -> None:
    (folder / "samples.npz").write_bytes((folder / "test.npz").read_bytes())


def weights_called_student(folder: Path) -> None:
    (folder / "student.safetensors").write_bytes(b"weights")


def link_to_itself(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def file_as_out(folder: Path) -> None:
    (folder / "out").write_text("a file")


def bad_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "bad.toml").write_text(text) and None


def wrong_labels(folder: Path) -> None:
    (folder / "three.txt").write_text("a\nb\nc\n")


def nothing(_: Path) -> None:
    pass


COMPRESS = ("compress", "{in}/teacher.pt", *RUN)
TEXT = ("compress", "{in}/teacher.txt", *RUN)  # what is found out before it is read comes first
HERE = (*COMPRESS, "--out", "{in}")
OVER = (*RUN, "--out", "{in}", "--overwrite")
DEMO = ("demo", "--config", "{in}/bad.toml")
CONFIGURED = (*COMPRESS, "--config", "{in}/bad.toml")
PIXELS = ("--std", "58,57,57", "--mean", "123,116,103")
DIVIDE = "If it is of images in 0...255, divide by 255:"
# (name, what to prepare, arguments, exit code, part of the message, part of the hint)
ROWS: list[tuple[str, Callable[[Path], None], tuple[str, ...], int, str, str]] = [
    ("more samples than memory", nothing, (*COMPRESS, "--samples", "999999999"), 1, "GB of memory", "fewer --samples"),
    ("no file", nothing, ("compress", "{in}/gone.pt", *RUN), 1, "no file", "folder"),
    ("no checkpoint", no_checkpoint, ("compress", "{in}/teacher.txt", *RUN), 1, "teacher.txt", ""),
    ("truncated", truncated, ("compress", "{in}/half.pt", *RUN), 1, "half.pt", ""),
    ("code in pickle", code_in_pickle, ("compress", "{in}/code.pt", *RUN), 1, "code.pt", "--trust-pickle"),
    ("plain pickle", plain_pickle, ("compress", "{in}/code.pkl", *RUN), 1, "code.pkl", "--trust-pickle"),
    ("unknown network", unknown_network, ("compress", "{in}/unknown.safetensors", *RUN), 1, "", "--arch"),
    ("NaN weights", not_finite, ("compress", "{in}/nan.pt", *RUN), 1, "NaN", "ssdkd inspect"),
    ("unknown arch", nothing, (*COMPRESS, "--arch", "resnet21"), 1, "resnet21", "resnet20"),
    ("wrong arch", nothing, (*COMPRESS, "--arch", "resnet20"), 1, "resnet20", "--arch"),
    ("unknown student", nothing, (*COMPRESS, "--student", "mobilnetv2"), 1, "mobilnetv2", "did you mean mobilenetv2"),
    ("student's code missing", nothing, (*COMPRESS, "--student", "no.such:thing"), 1, "no module 'no'", "PYTHONPATH"),
    ("student cannot", nothing, (*COMPRESS, "--student", "inception_v3"), 1, "cannot take images of", "--input"),
    ("size too small", nothing, (*COMPRESS, "--input", "1x8x8"), 1, "1x8x8: expected 1 to 4 channels, 16", "--input"),
    ("size too large", nothing, (*COMPRESS, "--input", "1x16x9999"), 1, "16 to 512 pixels", "--input"),
    ("size absurd", nothing, (*COMPRESS, "--input", "1x99999999999999999999x28"), 2, "channels x height x width", ""),
    ("seed too large", nothing, (*COMPRESS, "--seed", "18446744073709551616"), 2, "--seed", ""),
    ("out of nothing", nothing, (*COMPRESS, "--out", ""), 2, "expected a path", ""),
    *((f"{command} of nothing", nothing, (command, ""), 2, "expected a path", "") for command in (
        *("inspect", "export", "bench", "report"),
    )),
    ("data of nothing", nothing, (*COMPRESS, "--eval-data", ""), 2, "expected a path", ""),
    ("channels", nothing, (*COMPRESS, "--input", "3x16x16"), 1, "--input says 3 channels", "--input 1x16x16"),
    ("student weights", nothing, (*COMPRESS, "--student-weights", "{in}/gone.pt"), 1, "gone.pt", ""),
    ("classes against head", nothing, (*COMPRESS, "--classes", "7"), 1, "--classes says 7", "--classes"),
    ("labels against head", wrong_labels, (*COMPRESS, "--classes", "{in}/three.txt"), 1, "3", "--classes"),
    ("labels file gone", nothing, (*COMPRESS, "--classes", "gone.txt"), 1, "gone.txt", "one name a line"),
    ("mean of three", nothing, (*COMPRESS, "--mean", ".5,.5,.5", "--std", "1,1,1"), 1, "--mean", "--mean"),
    *((f"mean of pixels {name}", bad_config("[compress]\nmean=[123,116,103]\nstd=[58,57,57]"), words, 2,
       f"up to 1, as images are in 0...1 here; found {found}", "") for name, words, found in (
        ("typed", (*COMPRESS, *PIXELS), f"123. {DIVIDE} --mean 0.482,0.455,0.404 --std 0.227,0.224,0.224"),
        ("of a file", ("inspect", "{in}/teacher.pt", *PIXELS), f"123. {DIVIDE} --mean 0.482,0.455,0.404 --std 0.2"),
        ("configured", CONFIGURED, f"123. {DIVIDE} --mean 0.482,0.455,0.404 --std 0.227,0.224,0.224"),
        ("alone", (*COMPRESS, "--mean", "51"), f"51. {DIVIDE} --mean 0.2 "),
        ("half", (*COMPRESS, "--mean", "51", "--std", "0.3"), f"51. {DIVIDE} --mean 0.2 "),
        ("never", (*COMPRESS, "--mean", "256"), "256 "),
    )),
    ("other classes", other_classes, (*COMPRESS, "--eval-data", "{in}/three"), 1, "4 class", ""),
    ("no folder", nothing, (*COMPRESS, "--eval-data", "{in}/gone"), 1, "gone", ""),
    ("data first", no_checkpoint, (*TEXT, "--eval-data", "{in}/gone"), 1, "found nothing there", "a class"),
    ("name first", no_checkpoint, (*TEXT, "--student", "resnet9"), 1, "no network called 'resnet9'", "resnet8"),
    ("empty folder", empty_folder, (*COMPRESS, "--eval-data", "{in}/empty"), 1, "found 0", ""),
    ("broken images", broken_images, (*COMPRESS, "--eval-data", "{in}/broken"), 1, "image.png", ""),
    ("broken npz", broken_npz, (*COMPRESS, "--eval-data", "{in}/broken.npz"), 1, "broken.npz", ""),
    ("another run", another_run, COMPRESS, 1, "holds another run (report.json)", "--overwrite"),
    ("user's own model", teacher_called_model, HERE, 1, "would replace (model.onnx)", "--overwrite"),
    ("teacher is output", teacher_called_model, ("compress", "{in}/model.onnx", *OVER), 1, "is needed", "--out"),
    ("data is output", data_called_samples, (*HERE, *OVER, "--eval-data", "{in}/samples.npz"), 1, "is needed", "--out"),
    ("weights are output", weights_called_student, (
        *(*HERE, *OVER, "--student-weights", "{in}/student.safetensors"),
    ), 1, "student.safetensors is needed", "--out"),
    ("out is a file", file_as_out, COMPRESS, 1, "is a file", "--out DIR"),
    ("out below a file", file_as_out, (*COMPRESS, "--out", "{out}/below"), 1, "Not a directory", "--out DIR"),
    ("name too long", nothing, (*COMPRESS, "--out", "{in}/" + "x" * 300), 1, "File name too long", "shorter path"),
    ("out leads to itself", link_to_itself, (*COMPRESS, "--out", "{in}/loop/sub"), 1, "symbolic links", "to itself"),
    ("out no UTF-8", nothing, (*COMPRESS, "--out", "{in}/caf\udce9"), 1, "is no UTF-8", "another name"),
    ("bench no UTF-8", nothing, ("bench", "{in}/caf\udce9.onnx"), 1, "is no UTF-8", "another name"),
    ("no such device", nothing, (*COMPRESS, "--device", "tpu7"), 1, "tpu7", "--device"),
    ("export format", nothing, (*COMPRESS, "--export", "tflite"), 2, "'tflite'", "expected one of onnx, trt"),
    ("config gone", nothing, (*COMPRESS, "--config", "gone.toml"), 1, "gone.toml", "check the path"),
    ("config no TOML", bad_config("[compress"), CONFIGURED, 1, "is not TOML", "config.toml"),
    ("config deep", bad_config("[compress]\nmean=" + "[" * 5000), CONFIGURED, 1, "too deeply nested", "config.toml"),
    ("config table in a table", bad_config("[compress]\nmean.a=1"), CONFIGURED, 1, "found a table", "config.toml"),
    ("config table", bad_config("[train]\nx=1"), CONFIGURED, 1, "found 'train'", "[compress]"),
    ("config key", bad_config("[compress]\nefort='full'"), CONFIGURED, 1, "unknown key 'efort'", "'effort'"),
    ("config within config", bad_config("[compress]\nconfig='x'"), CONFIGURED, 1, "unknown key 'config'", ""),
    ("setting", bad_config("[distillation]\ngama=1"), CONFIGURED, 1, "unknown distillation setting 'gama'", "gamma"),
    ("config NUL", bad_config('[compress]\nout="a\\u0000b"'), CONFIGURED, 1, "'out' holds a NUL", "take it out"),
    ("setting absurd", bad_config(f"[distillation]\ngamma=1{'0' * 400}"), CONFIGURED, 1, "1,000,000,000 at most", ""),
    ("setting's type", bad_config("[distillation]\nmeta=1"), CONFIGURED, 1, "'meta' is 1: expected bool", "config"),
    *((f"config {key} {value}", bad_config(f"[compress]\n{key}={value}"), CONFIGURED, 1,
       f"[compress]: expected words or a number for '{key}', found {value}", f"delete '{key}'") for key, value in (
        *(("eval-data", "false"), ("time-limit", "false"), ("max-size-mb", "false"), ("export", "true")),
    )),
    ("config value", bad_config("[compress]\nclasses=1"), CONFIGURED, 2, "at least 2", ""),
    ("teacher of demo", bad_config("[compress]\nteacher='x'"), DEMO, 1, "names a teacher", "ssdkd compress"),
    ("effort", nothing, (*COMPRESS, "--effort", "huge"), 2, "smoke, quick, full", ""),
    ("input", nothing, (*COMPRESS, "--input", "32"), 2, "3x32x32", ""),
    ("std zero", nothing, (*COMPRESS, "--std", "0"), 2, "above 0", ""),
    ("time", nothing, (*COMPRESS, "--time-limit", "10"), 2, "10m", ""),
    ("time absurd", nothing, (*COMPRESS, "--time-limit", "9" * 400 + "s"), 2, "10m", ""),
    ("classes absurd", nothing, (*COMPRESS, "--classes", "9" * 5000), 2, "9 digits at most", ""),
    ("one class", nothing, (*COMPRESS, "--classes", "1"), 2, "at least 2", ""),
    ("no student", nothing, ("compress", "{in}/teacher.pt"), 2, "--student", ""),
    ("no command", nothing, ("distil",), 2, "distil", ""),
    *((f"{flag} comes later", nothing, (*COMPRESS, flag, "1"), 2, flag, "") for flag in (
        *("--devices", "--task"),
    )),
    ("--resume comes later", nothing, (*COMPRESS, "--resume"), 2, "--resume", ""),
    ("export no run", empty_folder, ("export", "{in}/empty"), 1, "is no run", "ssdkd compress"),
    ("export no format", nothing, ("export", "{in}/teacher.pt", "--export", "tflite"), 2, "'tflite'", "onnx, trt"),
    ("no such precision", nothing, (*COMPRESS, "--precision", "int4"), 2, "'int4'", "fp32, fp16, int8"),
    ("no such profile", nothing, (*COMPRESS, "--profile", "jetson-orrin"), 1, "jetson-orrin", "jetson-orin"),
    ("--qat of another kind", nothing, (*COMPRESS, "--qat", "maybe"), 2, "auto, on, off", ""),
    ("--qat for no integers", nothing, (*COMPRESS, "--precision", "fp16", "--qat", "on"), 1, "--qat on", "int8"),
    ("--max-drop and no labels", nothing, (*COMPRESS, "--max-drop", "1"), 1, "no labelled images", "--eval-data"),
    ("an infinite limit", nothing, (*COMPRESS, "--max-size-mb", "inf"), 2, "finite number", ""),
    ("--max-drop below 0", nothing, (*COMPRESS, "--max-drop", "-1"), 2, "--max-drop", ""),
    ("--min-agreement above 100", nothing, (*COMPRESS, "--min-agreement", "101"), 2, "--min-agreement", ""),
    ("a latency that nobody can measure", nothing,
     (*COMPRESS, "--profile", "jetson-orin", "--max-latency-ms", "1"), 1, "cannot be judged here", "device"),
    ("eval no model", nothing, ("eval", "{in}/gone.onnx", "--data", "{in}/test.npz"), 1, "gone.onnx", ""),
    ("eval no teacher", nothing, ("eval", "{in}/gone.pt", "--data", "{in}/test.npz"), 1, "gone.pt", "spelling"),
    ("bench no run", empty_folder, ("bench", "{in}/empty"), 1, "is no run: it holds no", "ssdkd bench model.onnx"),
    ("bench no plan", nothing, ("bench", "{in}/gone.engine"), 1, "gone.engine is not there", "ssdkd bench"),
    ("bench no model", no_checkpoint, ("bench", "{in}/teacher.txt"), 1, ".onnx", "teacher.txt"),
    ("bench teacher", nothing, ("bench", "{in}/teacher.pt"), 1, "found '.pt'", "ssdkd export {in}/teacher.pt"),
    ("report no run", empty_folder, ("report", "{in}/empty"), 1, "report.json", "ssdkd report"),
    ("report no folder", nothing, ("report", "{in}/gone"), 1, "there is no folder", "ssdkd report runs/NAME"),
    ("inspect nothing", no_checkpoint, ("inspect", "{in}/teacher.txt"), 1, "teacher.txt", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prepare", "words", "code", "message", "hint"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_bad_input(
    prepare: Callable[[Path], None],
    words: tuple[str, ...],
    code: int,
    message: str,
    hint: str,
    ssdkd: Any,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSDKD_TEST_FOLDER", str(tmp_path))
    for name in ("teacher.pt", "test.npz"):
        (tmp_path / name).write_bytes((shared / name).read_bytes())
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ran = ssdkd(
        *(word.replace("{in}", str(tmp_path)).replace("{out}", str(tmp_path / "out")) for word in words), "--json"
    )
    said = " ".join(ran.err.replace("│", " ").split())  # usage errors stand in a box
    assert ran.code == code, ran.err
    assert message in said
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert not (tmp_path / "ran").exists()
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind
    if code == 1:
        errors = [line for line in ran.err.splitlines() if line.startswith(("ERROR ", "HINT "))]
        assert [line.split()[0] for line in errors] == ["ERROR", "HINT"]
        assert message in errors[0]
        assert hint.replace("{in}", str(tmp_path)) in errors[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_cuda_where_there_is_none(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    ran = ssdkd(
        "compress", shared / "teacher.pt", "--student", "resnet8", "--device", "cuda", "--out", tmp_path / "run"
    )
    assert ran.code == 1
    assert "no CUDA GPU" in ran.err
    assert "--device cpu" in ran.err


def test_an_onnx_of_somebody_else_needs_its_normalisation(
    ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(compressed / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    ran = ssdkd("eval", tmp_path / "foreign.onnx", "--data", shared / "test.npz")
    assert ran.code == 1
    assert "--mean" in ran.err
    stated = ssdkd(
        "eval", tmp_path / "foreign.onnx", "--data", shared / "test.npz", "--mean", ".5", "--std", ".5", "--json"
    )
    ours = ssdkd("eval", compressed / "model.onnx", "--data", shared / "test.npz", "--json")
    assert stated.json[0]["accuracy"] == ours.json[0]["accuracy"]
    assert np.isfinite(ours.json[0]["accuracy"])
