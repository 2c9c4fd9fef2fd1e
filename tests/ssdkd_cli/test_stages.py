import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from ssdkd_cli import artifacts
from ssdkd_cli.again import smooth_noise


@pytest.fixture
def run_folder(compressed: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(compressed, tmp_path / "run"))


def test_inspect_says_what_is_in_the_file(ssdkd: Any, shared: Path) -> None:
    ran = ssdkd("inspect", shared / "teacher.pt", "--input", "1x16x16", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["spec"]["arch"], ran.json["spec"]["classes"]) == ("resnet8", 4)
    assert ran.json["command"].startswith(f"ssdkd compress {shared}/teacher.pt --student ")
    shown = ssdkd("inspect", shared / "teacher.pt", "--input", "1x16x16")
    assert ran.json["command"] in shown.out
    assert "resnet8" in shown.out


def test_students_lists_their_sizes(ssdkd: Any) -> None:
    rows = {row["name"]: row for row in ssdkd("students", "--json").json}
    assert rows["resnet20"]["parameters_32px"] == 269_722
    assert {"mobilenetv2", "shufflenetv2", "wrn16_1", "vgg8"} <= set(rows)
    shown = ssdkd("students").out
    assert all(name in shown for name in rows)


def test_doctor_says_what_is_here(ssdkd: Any) -> None:
    facts = ssdkd("doctor", "--json").json
    assert facts["onnxruntime"]
    assert "CPUExecutionProvider" in facts["onnxruntime_providers"]
    assert {"torch", "cuda", "gpu", "cpu", "cpu_precision", "tensorrt", "tensorrt_rtx"} <= set(facts)
    assert facts["findings"]
    assert "PyTorch" in ssdkd("doctor").out or "torch" in ssdkd("doctor").out


def test_eval_of_a_run_is_the_report_s_accuracy(ssdkd: Any, shared: Path, compressed: Path) -> None:
    report = json.loads((compressed / "report.json").read_text())
    ran = ssdkd("eval", compressed, "--data", shared / "test.npz", "--json")
    assert ran.code == 0, ran.err
    assert [Path(row["path"]).name for row in ran.json] == ["student.safetensors", "model.onnx"]
    assert {row["accuracy"] for row in ran.json} == {report["student"]["accuracy"]}
    single = ssdkd("eval", compressed / "model.onnx", "--data", shared / "test.npz", "--json")
    assert single.json[0]["accuracy"] == report["student"]["accuracy"]


def test_bench_of_a_run_and_of_a_file(ssdkd: Any, compressed: Path) -> None:
    for model in (compressed, compressed / "model.onnx"):
        (row,) = ssdkd("bench", model, "--json").json
        assert 0 < row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p99"]
        assert row["batch"] == 32
        assert row["throughput_per_s"] > 0
    assert "CPUExecutionProvider" in ssdkd("bench", compressed).out


def test_export_again_needs_neither_teacher_nor_config(ssdkd: Any, run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "config.toml").unlink()
    ran = ssdkd("export", run_folder, "--embed-preprocessing", "--out", tmp_path / "deploy", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json[0]["verified"], ran.json[0]["notes"]) == (True, ["takes images in 0...1"])
    model = onnx.load(tmp_path / "deploy/model.onnx")
    assert {item.key: item.value for item in model.metadata_props}["ssdkd.input_range"] == "0...1"


def test_export_into_the_run_updates_its_report(ssdkd: Any, run_folder: Path) -> None:
    refused = ssdkd("export", run_folder)
    assert refused.code == 1
    assert "--overwrite" in refused.err
    ran = ssdkd("export", run_folder, "--overwrite", "--embed-preprocessing", "--json")
    assert ran.code == 0, ran.err
    report = json.loads((run_folder / "report.json").read_text())
    assert [item["notes"] for item in report["artifacts"]] == [["takes images in 0...1"]]
    assert report["artifacts"] == ran.json


def test_export_of_a_student_that_the_file_does_not_match_exits_3(
    ssdkd: Any, run_folder: Path, monkeypatch: Any
) -> None:
    write = artifacts.write_format

    def swapped(name: str, module: Any, path: Path, card: Any, **options: Any) -> None:
        module.linear.weight.data *= -1
        write(name, module, path, card, **options)
        module.linear.weight.data *= -1

    monkeypatch.setattr(artifacts, "write_format", swapped)
    ran = ssdkd("export", run_folder, "--overwrite", "--json")
    assert ran.code == 3
    assert ran.json[0]["path"] == "model.onnx.rejected"
    report = json.loads((run_folder / "report.json").read_text())
    assert [item["path"] for item in report["artifacts"]] == ["model.onnx.rejected"]
    assert report["recommendation"] is None


def test_export_of_a_teacher_as_it_is(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    ran = ssdkd(
        *("export", shared / "teacher.pt", "--input", "1x16x16", "--mean", "0.5", "--std", "0.5"),
        *("--out", tmp_path / "teacher", "--json"),
    )
    assert ran.code == 0, ran.err
    (artifact,) = ran.json
    assert artifact["verified"] is True
    assert "random images" in artifact["notes"][0]
    assert {path.name for path in (tmp_path / "teacher").iterdir()} == {"model.onnx"}


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


def test_smooth_noise_has_structure_and_is_always_the_same() -> None:
    images = smooth_noise(8, (3, 20, 30))
    assert images.shape == (8, 20, 30, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images, smooth_noise(8, (3, 20, 30)))
    neighbours = np.abs(np.diff(images.astype(int), axis=2)).mean()
    strangers = np.abs(images[:, :, :15].astype(int) - images[:, :, 15:].astype(int)).mean()
    assert neighbours < 0.8 * strangers
    assert images.reshape(8, -1).std(1).min() > 20
