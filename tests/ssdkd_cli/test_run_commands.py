import errno
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from engine.teacher import load_teacher
from ssdkd_cli import again, artifacts, files, measuring, proving, report_page, timing
from ssdkd_cli.doubts import busy_warnings
from ssdkd_cli.material import said_of
from ssdkd_cli.report import Percentiles
from ssdkd_cli.timing import Timing

NORMALISED = ("--mean", "0.5", "--std", "0.5")


@pytest.fixture
def run_folder(compressed: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(compressed, tmp_path / "run"))


@pytest.fixture
def embedded(ssdkd: Any, run_folder: Path) -> Path:
    """A run whose model.onnx normalises by itself."""
    ran = ssdkd("export", run_folder, "--overwrite", "--embed-preprocessing")
    assert ran.code == 0, ran.err
    return run_folder


def with_input(source: Path, path: Path, *sizes: int | str) -> Path:
    """A copy of an ONNX file that declares its input as these sizes."""
    model = onnx.load(source)
    for place, size in enumerate(sizes):
        dimension = model.graph.input[0].type.tensor_type.shape.dim[place]
        dimension.Clear()
        setattr(dimension, "dim_param" if isinstance(size, str) else "dim_value", size)
    onnx.save(model, path)
    return path


def test_eval_of_a_run_is_the_report_s_accuracy(ssdkd: Any, shared: Path, compressed: Path) -> None:
    report = json.loads((compressed / "report.json").read_text())
    ran = ssdkd("eval", compressed, "--data", shared / "test.npz", "--json")
    assert ran.code == 0, ran.err
    assert [Path(row["path"]).name for row in ran.json] == ["student.safetensors", "model.onnx"]
    assert {row["accuracy"] for row in ran.json} == {report["student"]["accuracy"]}
    single = ssdkd("eval", compressed / "model.onnx", "--data", shared / "test.npz", "--json")
    assert single.json[0]["accuracy"] == report["student"]["accuracy"]


def test_eval_of_a_teacher_is_the_report_s_accuracy(ssdkd: Any, shared: Path, compressed: Path) -> None:
    report = json.loads((compressed / "report.json").read_text())
    described = ("--input", "1x16x16", *NORMALISED, "--classes", shared / "labels.txt")
    ran = ssdkd("eval", shared / "teacher.pt", "--data", shared / "test.npz", *described, "--json")
    assert ran.code == 0, ran.err
    assert ran.json == [
        {"path": str(shared / "teacher.pt"), "accuracy": report["teacher"]["accuracy"], "images": 20},
    ]


def test_labels_in_another_order_are_warned_of(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    described = ("--input", "1x16x16", *NORMALISED)
    arrays = dict(np.load(shared / "test.npz"))
    teacher = load_teacher(shared / "teacher.pt", input_shape=(1, 16, 16), mean=(0.5,), std=(0.5,))
    right = said_of(teacher, arrays["images"][..., None]).argmax(1)
    for shift, is_warned in ((0, False), (1, True)):
        np.savez(tmp_path / "test.npz", images=arrays["images"], labels=(right + shift) % 4)
        ran = ssdkd("eval", shared / "teacher.pt", "--data", tmp_path / "test.npz", *described, "--json")
        assert ran.json[0]["accuracy"] == (0 if shift else 100)
        assert ("0.0 % accuracy is far below what a trained network reaches, chance is 25.0 %" in ran.err) == is_warned


def test_bench_of_a_run_and_of_a_file(ssdkd: Any, compressed: Path) -> None:
    for model in (compressed, compressed / "model.onnx"):
        (row,) = ssdkd("bench", model, "--json").json
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]
        assert row["batch"] == 32
        assert row["throughput_per_s"] > 0
    assert "CPUExecutionProvider" in ssdkd("bench", compressed).out


def test_bench_of_a_run_without_a_file_says_how_to_make_one(ssdkd: Any, run_folder: Path) -> None:
    (run_folder / "model.onnx").unlink()
    ran = ssdkd("bench", run_folder)
    assert ran.code == 1
    assert f"{run_folder} holds no exported file that can be run here" in ran.err
    command = f"ssdkd export {run_folder}"
    assert ran.err.splitlines()[-1].endswith(f"export it first: {command}")
    assert ssdkd(*command.split()[1:]).code == 0
    assert (run_folder / "model.onnx").exists()


def test_a_busy_machine_is_said(ssdkd: Any, compressed: Path, monkeypatch: Any) -> None:
    for p90, is_said in ((1.6, False), (41.4, True)):
        busy = Timing(Percentiles(p50=1.58, p90=p90, p99=50.0), 1, 100.0, 32, "onnxruntime")
        monkeypatch.setattr(measuring, "time_files", lambda *_, timing=busy, **__: [timing])
        ran = ssdkd("bench", compressed)
        assert ran.code == 0, ran.err
        said = (
            "the machine was busy during the timing: half of the calls took 1.58 ms and one of ten 41.4 ms (model.onnx)"
        )
        assert (said in ran.err) == is_said


def test_the_teacher_is_not_what_bench_times_again() -> None:
    busy = Timing(Percentiles(p50=1.0, p90=4.0, p99=5.0), 1, 100.0, 32, "onnxruntime")
    (of_teacher,) = busy_warnings({"the teacher": busy}, Path("run"))
    (of_both,) = busy_warnings({"the teacher": busy, "model.onnx": busy}, Path("run"))
    assert "ssdkd bench" not in of_teacher
    assert of_both.endswith("1 ms and one of ten 4 ms (model.onnx); time them again with `ssdkd bench run`")


def test_a_file_for_another_machine_is_not_called_slow_by_this_one(
    ssdkd: Any, run_folder: Path, monkeypatch: Any
) -> None:
    report = json.loads((run_folder / "report.json").read_text())
    shutil.copy(run_folder / "model.onnx", run_folder / "model.int8.onnx")
    times = [Timing(Percentiles(p50=p50, p90=p50, p99=p50), 1, 100.0, 32, "onnxruntime") for p50 in (1.8, 1.0)]
    monkeypatch.setattr(measuring, "time_files", lambda *_, **__: times)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    others = ("arm64", "rtx", "a-kiosk-that-is-not-here")  # of a plan's file the CPU says nothing either
    for profile, is_said in (*((name, False) for name in others), ("x86-avx2", True)):
        of_float = {**report["artifacts"][0], "profile": "arm64"}  # what is compared with, whatever it was made for
        of_file = {**of_float, "path": "model.int8.onnx", "precision": "int8", "profile": profile}
        (run_folder / "report.json").write_text(json.dumps({**report, "artifacts": [of_float, of_file]}))
        ran = ssdkd("bench", run_folder)
        assert ran.code == 0, ran.err
        assert ("model.int8.onnx takes 1.8 times as long as model.onnx" in ran.err) == is_said


def test_a_file_that_is_slower_than_float32_is_said(ssdkd: Any, run_folder: Path, monkeypatch: Any) -> None:
    shutil.copy(run_folder / "model.onnx", run_folder / "model.int8.onnx")
    for ms, is_said in ((1.04, False), (1.8, True)):
        times = [Timing(Percentiles(p50=p50, p90=p50, p99=p50), 1, 100.0, 32, "onnxruntime") for p50 in (ms, 1.0)]
        monkeypatch.setattr(measuring, "time_files", lambda *_, times=times, **__: times)
        ran = ssdkd("bench", run_folder)
        assert ran.code == 0, ran.err
        said = (
            "model.int8.onnx takes 1.8 times as long as model.onnx for one image on this machine; the fastest here is"
        )
        assert (f"{said} model.onnx" in ran.err) == is_said


def test_an_export_is_timed_beside_the_run_s_float32_file(ssdkd: Any, run_folder: Path, monkeypatch: Any) -> None:
    def twice_as_slow(runtimes: Any, _samples: Any, **_: Any) -> list[Timing]:
        assert len(runtimes) == 2
        return [Timing(Percentiles(p50=p50, p90=p50, p99=p50), 1, 9.0, 32, "onnxruntime") for p50 in (2.0, 1.0)]

    monkeypatch.setattr(timing, "time_files", twice_as_slow)
    said = "model.fp16.onnx takes 2.0 times as long as model.onnx"
    ran = ssdkd("export", run_folder, "--precision", "fp16", "--json")
    assert ran.code == 0, ran.err
    assert [item["path"] for item in ran.json] == ["model.fp16.onnx"]
    assert said in ran.err
    monkeypatch.setattr(platform, "machine", lambda: "of another kind")
    ran = ssdkd("export", run_folder, "--precision", "fp16", "--profile", "arm64", "--overwrite")
    assert ran.code == 0, ran.err
    assert said not in ran.err  # of that device nothing was timed


def test_an_export_for_no_device_leaves_what_is_recommended_for_one(
    ssdkd: Any, run_folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(proving, "FEWEST_SAMPLES", 2)
    assert ssdkd("export", run_folder, "--precision", "int8", "--profile", "arm64").code == 0
    of_arm = json.loads((run_folder / "report.json").read_text())["recommendation"]
    assert of_arm["artifact"] == "model.int8.onnx"
    assert ssdkd("export", run_folder, "--precision", "fp16").code == 0
    assert json.loads((run_folder / "report.json").read_text())["recommendation"] == of_arm


def test_a_file_that_is_gone_is_written_anew_by_what_is_proposed(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(compressed, tmp_path / "a run"))
    found = json.loads((run / "report.json").read_text())
    (of_onnx,) = found["artifacts"]
    plan = {**of_onnx, "path": "model.fp16.engine", "format": "trt", "precision": "fp16"}
    of_device = {**of_onnx, "path": "model.int8.onnx", "precision": "int8", "profile": "x86-avx2"}
    embedded = {**of_onnx, "path": "model.fp16.onnx", "precision": "fp16", "input_range": "0...1"}
    found["artifacts"] += [plan, of_device, embedded]
    (run / "report.json").write_text(json.dumps(found))
    (run / "model.onnx").unlink()
    said = ssdkd("report", run).err
    for wanted in (
        "--export onnx --precision fp32",
        "--export trt --precision fp16",
        "--export onnx --precision int8 --profile x86-avx2",
        "--export onnx --precision fp16 --embed-preprocessing",
    ):
        assert f"is gone; `ssdkd export '{run}' {wanted} --overwrite` writes it anew" in said
    assert ssdkd("export", run, "--export", "onnx", "--precision", "fp32", "--overwrite").code == 0
    assert "model.onnx is gone" not in ssdkd("report", run).err


@pytest.mark.parametrize("batch", [1, 8])
def test_bench_of_a_file_with_a_fixed_batch(ssdkd: Any, compressed: Path, tmp_path: Path, batch: int) -> None:
    path = with_input(compressed / "model.onnx", tmp_path / "fixed.onnx", batch)
    ran = ssdkd("bench", path, "--json")
    assert ran.code == 0, ran.err
    (row,) = ran.json
    assert (row["latency_batch"], row["batch"]) == (batch, batch)
    assert row["throughput_per_s"] == pytest.approx(1000 * batch / row["latency_ms"]["p50"], rel=1)
    assert (f"of {batch} images at once" in ran.err) == (batch > 1)


def test_bench_of_files_that_take_different_batches(ssdkd: Any, run_folder: Path) -> None:
    with_input(run_folder / "model.onnx", run_folder / "model_8.onnx", 8)
    rows = ssdkd("bench", run_folder, "--json").json
    assert [(Path(row["path"]).name, row["latency_batch"], row["batch"]) for row in rows] == [
        ("model.onnx", 8, 8),
        ("model_8.onnx", 8, 8),
    ]
    with_input(run_folder / "model.onnx", run_folder / "model_9.onnx", 9)
    ran = ssdkd("bench", run_folder)
    assert ran.code == 1
    assert "model_9.onnx takes batches of 9 only, asked for 8" in ran.err
    assert f"ssdkd bench {run_folder / 'model_9.onnx'}" in " ".join(ran.err.split())


def test_eval_of_a_file_that_leaves_its_size_open(ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path) -> None:
    path = with_input(compressed / "model.onnx", tmp_path / "open.onnx", "n", 1, "h", "w")
    ran = ssdkd("eval", path, "--data", shared / "test.npz", "--input", "1x16x16", *NORMALISED, "--json")
    assert ran.code == 0, ran.err
    ours = ssdkd("eval", compressed / "model.onnx", "--data", shared / "test.npz", "--json")
    assert ran.json[0]["accuracy"] == ours.json[0]["accuracy"]
    assert "--input" in ssdkd("eval", path, "--data", shared / "test.npz").err


def test_eval_refuses_what_would_have_no_effect(ssdkd: Any, shared: Path, compressed: Path) -> None:
    for option in (("--input", "1x16x16"), ("--mean", "0.5"), ("--std", "0.5"), NORMALISED):
        ran = ssdkd("eval", compressed, "--data", shared / "test.npz", *option)
        assert ran.code == 1
        given = " ".join(option[::2])
        assert f"{given} describe a single file; {compressed} is a run" in ran.err
        assert f"leave {given} out" in ran.err
    ran = ssdkd("eval", compressed / "model.onnx", "--data", shared / "test.npz", "--trust-pickle")
    assert ran.code == 1
    assert "--trust-pickle is for a run" in ran.err
    ran = ssdkd("eval", compressed / "model.onnx", "--data", shared / "test.npz", "--classes", "5")
    assert ran.code == 1
    assert "--classes says 5" in ran.err


def test_a_file_that_normalises_by_itself_is_not_normalised_twice(ssdkd: Any, shared: Path, embedded: Path) -> None:
    accuracies = [row["accuracy"] for row in ssdkd("eval", embedded, "--data", shared / "test.npz", "--json").json]
    assert accuracies[0] == accuracies[1]
    ran = ssdkd("eval", embedded / "model.onnx", "--data", shared / "test.npz", *NORMALISED)
    assert ran.code == 1
    assert "--mean and --std would normalise twice" in ran.err
    assert "leave --mean and --std out" in ran.err


def test_eval_needs_one_number_a_channel(ssdkd: Any, shared: Path, compressed: Path) -> None:
    words = ("eval", compressed / "model.onnx", "--data", shared / "test.npz")
    ran = ssdkd(*words, "--mean", "0.4,0.5,0.6")
    assert ran.code == 1
    assert "--mean has 3 values, but the network takes 1 channel\n" in ran.err


def test_export_again_needs_neither_teacher_nor_config(ssdkd: Any, run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "config.toml").unlink()
    ran = ssdkd("export", run_folder, "--embed-preprocessing", "--out", tmp_path / "deploy", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json[0]["verified"], ran.json[0]["notes"]) == (True, ["takes images in 0...1"])
    model = onnx.load(tmp_path / "deploy/model.onnx")
    assert {item.key: item.value for item in model.metadata_props}["ssdkd.input_range"] == "0...1"


def test_export_into_the_run_updates_its_report(ssdkd: Any, shared: Path, run_folder: Path) -> None:
    refused = ssdkd("export", run_folder)
    assert refused.code == 1
    assert "--overwrite" in refused.err
    shown = ssdkd("export", run_folder, "--overwrite", "--eval-data", shared / "test.npz")
    report = json.loads((run_folder / "report.json").read_text())
    assert f"the teacher's accuracy: {report['teacher']['accuracy']:.1f} %" in shown.out  # the report's
    ran = ssdkd("export", run_folder, "--overwrite", "--embed-preprocessing", "--json")
    assert ran.code == 0, ran.err
    report = json.loads((run_folder / "report.json").read_text())
    assert [item["notes"] for item in report["artifacts"]] == [["takes images in 0...1"]]
    assert [item["input_range"] for item in report["artifacts"]] == ["0...1"]
    assert report["artifacts"] == ran.json


@pytest.mark.parametrize("mark", ["student.safetensors", "report.json", "metrics.jsonl"])
def test_export_into_another_run_is_refused(ssdkd: Any, shared: Path, run_folder: Path, mark: str) -> None:
    for name in {"student.safetensors", "report.json", "metrics.jsonl"} - {mark}:
        (run_folder / name).unlink()
    before = {path: path.read_bytes() for path in run_folder.iterdir()}
    teacher = (shared / "teacher.pt", "--input", "1x16x16", *NORMALISED)
    for source in (teacher, (shared / "run",)):
        ran = ssdkd("export", *source, "--out", run_folder, "--overwrite")
        assert ran.code == 1
        assert f"{run_folder} holds another run ({mark})" in ran.err
        assert "--out DIR" in ran.err
    assert {path: path.read_bytes() for path in run_folder.iterdir()} == before


def test_export_into_the_run_by_another_name(ssdkd: Any, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_folder)
    ran = ssdkd("export", run_folder, "--out", Path(), "--overwrite", "--json")
    assert ran.code == 0, ran.err
    assert json.loads((run_folder / "report.json").read_text())["artifacts"] == ran.json


def test_a_report_that_cannot_be_updated_is_found_before_anything_is_written(ssdkd: Any, run_folder: Path) -> None:
    (run_folder / "report.json").write_text("{}")
    (run_folder / "model.onnx").write_bytes(b"before")
    ran = ssdkd("export", run_folder, "--overwrite")
    assert ran.code == 1
    assert "is not a report of schema" in ran.err
    assert f"ssdkd export {run_folder} --out DIR" in ran.err
    assert ssdkd("export", run_folder, "--out", run_folder.parent / "elsewhere").code == 0
    assert (run_folder / "model.onnx").read_bytes() == b"before"


def test_export_of_a_teacher_over_itself(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(compressed / "model.onnx", tmp_path))
    before = path.read_bytes()
    ran = ssdkd("export", path, "--out", tmp_path, "--overwrite")
    assert ran.code == 1
    assert "is the teacher itself" in ran.err
    assert path.read_bytes() == before


def test_export_of_a_student_that_the_file_does_not_match_exits_3(
    ssdkd: Any, run_folder: Path, monkeypatch: Any
) -> None:
    float_graph = artifacts.float_graph

    def swapped(subject: Any) -> Any:
        subject.module.linear.weight.data *= -1
        graph = float_graph(subject)
        subject.module.linear.weight.data *= -1
        return graph

    monkeypatch.setattr(artifacts, "float_graph", swapped)
    ran = ssdkd("export", run_folder, "--overwrite", "--json")
    assert ran.code == 3
    assert ran.json[0]["path"] == "model.onnx.rejected"
    report = json.loads((run_folder / "report.json").read_text())
    assert {item["path"]: item["verified"] for item in report["artifacts"]} == {
        "model.onnx": True,  # it was proven by the run and is still there
        "model.onnx.rejected": False,
    }
    assert report["recommendation"]["artifact"] == "model.onnx"


def test_export_of_a_teacher_as_it_is(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    described = ("--input", "1x16x16", "--mean", "0.5", "--std", "0.5")
    data = ("--eval-data", shared / "test.npz")
    shown = ssdkd("export", shared / "teacher.pt", *described, *data, "--out", tmp_path / "shown")
    assert "accuracy" in shown.out.splitlines()[0]
    assert "the teacher's accuracy: " in shown.out
    command = ("export", shared / "teacher.pt", *described, "--out", tmp_path / "teacher", "--json")
    ran = ssdkd(*command)
    assert ran.code == 0, ran.err
    (artifact,) = ran.json
    assert artifact["verified"] is True
    assert "random images" in artifact["notes"][0]
    assert {path.name for path in (tmp_path / "teacher").iterdir()} == {"model.onnx"}
    again = ssdkd(*command, "--precision", "fp16")  # whose model.onnx it is, nobody knows
    assert again.code == 1
    assert "model.onnx is there already" in again.err


def test_what_describes_a_teacher_does_not_describe_a_run(ssdkd: Any, compressed: Path) -> None:
    ran = ssdkd("export", compressed, "--mean", "0.1")
    assert ran.code == 1
    assert "--mean" in ran.err


def test_a_student_that_was_tampered_with_is_refused(ssdkd: Any, shared: Path, run_folder: Path) -> None:
    path = run_folder / "student.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "cannot be read as a student" in ssdkd("export", run_folder, "--overwrite").err
    path.write_bytes(content)
    save_file(load_file(path), path)  # without the card
    ran = ssdkd("eval", run_folder, "--data", shared / "test.npz")
    assert ran.code == 1
    assert "cannot be read as a student" in ran.err


def test_a_report_in_a_folder_that_cannot_be_written_is_shown(
    ssdkd: Any, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(report: object, folder: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr(report_page, "write_report", refuse)
    ran = ssdkd("report", run_folder, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["schema_version"] == 1
    assert f"{run_folder} cannot be written (Read-only file system)" in ran.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_report_is_not_written_while_an_export_writes_another(ssdkd: Any, run_folder: Path) -> None:
    with files.locked(run_folder):
        ran = ssdkd("report", run_folder)
    assert ran.code == 1
    assert f"another ssdkd is writing {run_folder}" in ran.err
    assert ssdkd("report", run_folder).code == 0


def test_a_replaced_file_is_scored_and_said(ssdkd: Any, shared: Path, run_folder: Path) -> None:
    model = onnx.load(run_folder / "model.onnx")
    model.producer_name = "another"
    onnx.save(model, run_folder / "model.onnx")
    for words in (("eval", run_folder, "--data", shared / "test.npz"), ("bench", run_folder)):
        ran = ssdkd(*words)
        assert ran.code == 0, ran.err
        assert "model.onnx is not the file that the report describes" in ran.err


def test_a_run_whose_report_cannot_be_read_is_scored(ssdkd: Any, shared: Path, run_folder: Path) -> None:
    (run_folder / "report.json").write_text("{")
    for words in (("eval", run_folder, "--data", shared / "test.npz"), ("bench", run_folder)):
        assert ssdkd(*words).code == 0


def test_a_file_of_a_run_that_does_not_say_what_it_takes(ssdkd: Any, shared: Path, run_folder: Path) -> None:
    model = onnx.load(run_folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, run_folder / "model.onnx")
    ran = ssdkd("eval", run_folder, "--data", shared / "test.npz")
    assert ran.code == 1
    assert f"{run_folder / 'model.onnx'}: the model file does not say how its images are normalised" in ran.err
    assert f"ssdkd export {run_folder} --overwrite" in ran.err


def test_files_that_were_timed_later_than_the_teacher_are_said_to_be(ssdkd: Any, run_folder: Path) -> None:
    for _ in range(2):
        assert ssdkd("export", run_folder, "--overwrite").code == 0
    warnings = json.loads((run_folder / "report.json").read_text())["warnings"]
    assert warnings.count(again.TIMED_LATER) == 1


def test_what_was_timed_on_another_machine_is_left_out(ssdkd: Any, run_folder: Path, monkeypatch: Any) -> None:
    """Distilled on a server, exported on the device: neither is compared with the other."""
    assert ssdkd("export", run_folder, "--precision", "fp16").code == 0
    before = json.loads((run_folder / "report.json").read_text())
    monkeypatch.setattr(again, "cpu_name", lambda: "of an edge device")

    def quick(runtimes: Any, _samples: Any, **_: Any) -> list[Timing]:
        p50s = 1.0 + np.arange(len(runtimes))
        return [Timing(Percentiles(p50=p50, p90=p50, p99=p50), 1, 9.0, 4, "onnxruntime") for p50 in p50s]

    monkeypatch.setattr(timing, "time_files", quick)
    for _ in range(2):
        ran = ssdkd("export", run_folder, "--precision", "int8", "--overwrite", "--qat", "off")
        assert ran.code in (0, 3), ran.err  # the student is worth little
    after = json.loads((run_folder / "report.json").read_text())
    assert before["teacher"]["latency_ms"] is not None
    assert (after["teacher"]["latency_ms"], after["teacher"]["throughput_per_s"]) == (None, None)
    assert after["environment"] == before["environment"]
    latencies = {item["path"]: item["latency_ms"]["p50"] for item in after["artifacts"] if item["verified"]}
    assert latencies["model.fp16.onnx"] == latencies["model.onnx"] - 1  # timed again, in turn, in the order of names
    assert "faster than the teacher" not in after["recommendation"]["why"]
    (said,) = [text for text in after["warnings"] if "on another machine than the run's" in text]
    assert said.endswith(f"of an edge device, not {before['environment']['cpu']}")
