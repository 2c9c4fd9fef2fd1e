"""What files a run makes, in which precision and for which device: real files, real builds."""

import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engine.hashing import sha256_of
from exporters.precision import integer_share, precision_problem
from exporters.tensorrt_sidecar import (
    Binding,
    Sidecar,
    check_precision,
    check_sidecar,
    read_sidecar,
    write_sidecar,
)
from ssdkd_cli import proving
from ssdkd_cli.loss import Loss
from ssdkd_cli.report import read_report

NORMALISED = ("--input", "1x16x16", "--mean", "0.5", "--std", "0.5")
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT for RTX is not installed: it exists for Linux on x86_64 alone",
)


def arguments(shared: Path, out: Path, *more: object) -> list[object]:
    """A short run; the config of the other tests asks for float32 alone, this one for nothing."""
    config = out.parent / "config.toml"
    config.write_text((shared / "ssdkd.toml").read_text().replace('precision = ["fp32"]\n', ""))
    return ["compress", shared / "teacher.pt", "--student", "resnet8", "--config", config, "--out", out, *more]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(("model", "build"))}


def test_where_no_precision_is_asked_for_all_are_measured(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "FEWEST_SAMPLES", 2)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json", "--eval-data", shared / "test.npz"))
    assert ran.code == 0, ran.err
    found = {item["precision"]: item for item in ran.json["artifacts"]}
    assert list(found) == ["fp32", "fp16", "int8"], ran.err
    assert found["fp32"]["path"] == "model.onnx"
    for precision, item in found.items():
        model = onnx.load(tmp_path / "run" / item["path"])
        assert precision_problem(model, precision) is None
        assert item["verified"] is True
        assert item["integer_share"] == pytest.approx(100 * integer_share(model))
        assert item["latency_ms"]["p50"] > 0
        assert item["accuracy"] is not None
        assert 0 <= item["teacher_agreement"] <= 100
    fastest = min(found.values(), key=lambda item: item["latency_ms"]["p50"])
    assert ran.json["recommendation"]["artifact"] == fastest["path"]
    assert found["fp16"]["size_bytes"] < 0.8 * found["fp32"]["size_bytes"]


def test_a_precision_that_nobody_asked_for_may_fail(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loss, "allowed", -100.0)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json"))
    assert ran.code == 0, ran.err
    assert [item["precision"] for item in ran.json["artifacts"]] == ["fp32", "fp16"]
    assert names_in(tmp_path / "run") == {"model.onnx", "model.fp16.onnx"}
    assert "no int8 file: ask for it with --precision int8" in ran.err


def test_a_precision_that_was_asked_for_may_not(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loss, "allowed", -100.0)
    options = ("--precision", "int8", "--qat", "off", "--no-fallback", "--json")
    ran = ssdkd(*arguments(shared, tmp_path / "run", *options))
    assert ran.code == 3
    of_int8 = ran.json["artifacts"][1]
    assert (of_int8["path"], of_int8["verified"]) == ("model.int8.onnx.rejected", False)
    assert "points of agreement with the teacher, -100.00 may be lost" in of_int8["verified_reason"]
    assert ran.json["recommendation"]["artifact"] == "model.onnx"


def test_a_profile_is_named_in_the_report(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--profile", "x86-avx2", "--precision", "int8", "--json"))
    assert ran.code in (0, 3), ran.err  # after three rounds the student may lose more than half a point
    of_int8 = ran.json["artifacts"][1]
    assert of_int8["profile"] == "x86-avx2"
    assert any("calibrated on synthetic samples" in note for note in of_int8["notes"])


@pytest.mark.parametrize(
    ("limit", "passes"),
    [
        (("--max-size-mb", "100"), True),
        (("--max-size-mb", "0.001"), False),
        (("--max-latency-ms", "0"), False),
        (("--min-agreement", "0"), True),
    ],
)
def test_limits_decide_the_exit_code(ssdkd: Any, compressed: Path, tmp_path: Path, limit: Any, passes: bool) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    ran = ssdkd("export", folder, "--overwrite", *limit)
    assert ran.code == (0 if passes else 3), ran.err
    (gate,) = read_report(folder).gates
    assert (gate.name, gate.passed, gate.artifact) == (limit[0].strip("-").replace("-", "_"), passes, "model.onnx")
    assert ("NO" in (folder / "report.md").read_text()) != passes


def test_the_drop_of_accuracy_is_a_limit_too(ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path) -> None:
    report = read_report(compressed)
    assert report.teacher.accuracy is not None
    assert report.student.accuracy is not None
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    ran = ssdkd("export", folder, "--overwrite", "--max-drop", "0", "--eval-data", shared / "test.npz")
    (gate,) = read_report(folder).gates
    assert gate.value == pytest.approx(report.teacher.accuracy - report.student.accuracy)
    assert ran.code == (0 if gate.passed else 3)


def test_integers_of_a_teacher_are_calibrated_on_samples_of_it(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import sampling
    from ssdkd_cli import material

    monkeypatch.setattr(sampling, "LEARNING_ROUNDS", 1)
    monkeypatch.setattr(material, "SYNTHETIC_SAMPLES", 64)
    ran = ssdkd("export", shared / "teacher.pt", *NORMALISED, "--precision", "int8", "--out", tmp_path, "--json")
    assert ran.code in (0, 3), ran.err
    assert [item["precision"] for item in ran.json] == ["fp32", "int8"]
    assert "128 synthetic samples" in ran.err
    assert not any("random images" in note for item in ran.json for note in item["notes"])


def test_a_jetson_gets_the_file_and_a_script(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    ran = ssdkd("export", folder, "--overwrite", "--profile", "jetson-orin", "--json")
    assert ran.code == 0, ran.err
    assert names_in(folder) == {"model.onnx", "model.fp16.onnx", "build_model.fp16.engine.sh"}
    assert precision_problem(onnx.load(folder / "model.fp16.onnx"), "fp16") is None
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    built = subprocess.run(["sh", "build_model.fp16.engine.sh"], cwd=folder, capture_output=True, text=True,
                           env=environment, check=False)  # fmt: skip
    assert built.returncode == 2  # there is no trtexec here
    assert "trtexec" in built.stderr


@needs_rtx
def test_plans_are_built_and_described(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    wanted = ("--precision", "fp32", "--precision", "fp16", "--profile", "rtx")
    ran = ssdkd("export", folder, "--overwrite", *wanted, "--json")
    assert ran.code == 0, ran.err
    plans = {item["precision"]: item for item in ran.json if item["format"] == "trt"}
    assert set(plans) == {"fp32", "fp16"}
    for precision, item in plans.items():
        plan = folder / item["path"]
        assert check_sidecar(plan, folder / item["path"].replace(".engine", ".onnx")) is None
        assert check_precision(read_sidecar(plan)) is None
        assert read_sidecar(plan).precision == precision
        assert item["verified"] is None
        assert "cannot run on this machine" in item["verified_reason"]
        assert item["latency_ms"] is None
    assert json.loads((folder / "model.fp16.engine.json").read_text())["flavour"] == "tensorrt_rtx"
    timed = ssdkd("bench", folder, "--json")
    assert [Path(row["path"]).name for row in timed.json] == ["model.fp16.onnx", "model.onnx"]
    assert "model.engine is left out" in timed.err
    alone = ssdkd("bench", folder / "model.fp16.engine")
    assert alone.code == 1
    assert "GPU" in alone.err


@pytest.mark.parametrize("half", [False, True], ids=["float32 outside", "float16 outside"])
def test_an_fp16_file_has_the_interface_that_was_asked_for(
    half: bool, ssdkd: Any, compressed: Path, tmp_path: Path
) -> None:
    folder, flags = tmp_path / "out", ["--fp16-io"] if half else []
    ran = ssdkd("export", compressed, "--out", folder, "--precision", "fp16", *flags, "--json")
    assert ran.code == 0, ran.err
    (item,) = [item for item in ran.json if item["precision"] == "fp16"]
    assert item["verified"] is True
    assert ("its input and output are float16" in item["notes"]) is half
    graph = onnx.load(folder / "model.fp16.onnx").graph
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
    timed = ssdkd("bench", folder / "model.fp16.onnx", "--json")
    assert timed.json[0]["latency_ms"]["p50"] > 0


@needs_rtx
def test_a_plan_takes_and_gives_float16_where_that_was_asked_for(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    wanted = ("--precision", "fp16", "--fp16-io", "--export", "trt", "--profile", "rtx")
    ran = ssdkd("export", compressed, "--out", tmp_path / "out", *wanted)
    assert ran.code == 0, ran.err
    sidecar = read_sidecar(tmp_path / "out" / "model.fp16.engine")
    assert (sidecar.input.dtype, sidecar.output.dtype) == ("half", "half")  # in TensorRT's words
    assert check_precision(sidecar) is None


@needs_rtx
def test_a_plan_can_be_asked_for_in_compress(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--export", "trt", "--profile", "rtx", "--json"))
    assert ran.code == 0, ran.err
    assert [(item["format"], item["precision"]) for item in ran.json["artifacts"]] == [
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("trt", "fp16"),
    ]
    assert ran.json["recommendation"] is None  # a plan that could not be run here


def test_tensorrt_that_is_not_there_is_said_before_the_run(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters import to_tensorrt

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(to_tensorrt, "import_flavour", missing)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--export", "trt"))
    assert ran.code == 1
    assert "pip install" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_precision_is_added_to_a_run_and_the_rest_stays(
    ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    before, content = read_report(folder), (folder / "model.onnx").read_bytes()
    ran = ssdkd("export", folder, "--precision", "fp16")
    assert ran.code == 0, ran.err
    after = read_report(folder)
    assert (folder / "model.onnx").read_bytes() == content
    assert [item.path for item in after.artifacts] == ["model.onnx", "model.fp16.onnx"]
    retimed = dataclasses.replace(after.artifacts[0], latency_ms=None, throughput_per_s=None, batch=None)
    assert retimed == dataclasses.replace(before.artifacts[0], latency_ms=None, throughput_per_s=None, batch=None)
    again = ssdkd("export", folder, "--precision", "fp16")
    assert again.code == 1
    assert "model.fp16.onnx is there already" in again.err


def test_a_file_that_was_replaced_is_not_the_one_that_was_proven(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    assert "model.onnx" not in ssdkd("report", folder).err
    model = onnx.load(folder / "model.onnx")
    model.producer_name = "somebody else"
    onnx.save(model, folder / "model.onnx")
    replaced = f"{folder / 'model.onnx'} is not the file that the report describes"
    assert replaced in ssdkd("report", folder).err
    ran = ssdkd("export", folder, "--precision", "fp16")
    assert ran.code == 0, ran.err
    assert replaced in ran.err
    assert [item.path for item in read_report(folder).artifacts] == ["model.fp16.onnx"]
    (folder / "model.fp16.onnx").unlink()
    assert f"{folder / 'model.fp16.onnx'} is gone" in ssdkd("report", folder).err


def test_what_was_known_of_the_same_bytes_stays_known(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    before = read_report(folder).artifacts[0]
    assert before.accuracy is not None
    assert ssdkd("export", folder, "--overwrite").code == 0
    assert read_report(folder).artifacts[0].accuracy == before.accuracy


def test_a_limit_that_was_set_once_holds_for_all_that_is_recommended(
    ssdkd: Any, compressed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    assert ssdkd("export", folder, "--overwrite", "--max-size-mb", "0.001").code == 3
    assert read_report(folder).recommendation is None
    assert ssdkd("export", folder, "--precision", "fp16").code == 0  # without a limit of its own
    assert read_report(folder).recommendation is None
    (folder / "model.fp16.onnx").unlink()
    assert ssdkd("export", folder, "--overwrite", "--max-size-mb", "9").code == 0
    recommendation = read_report(folder).recommendation
    assert recommendation is not None
    assert recommendation.artifact == "model.onnx"
    assert ssdkd("export", folder, "--precision", "fp16", "--max-size-mb", "0.001").code == 3
    assert read_report(folder).recommendation is None  # what was recommended is larger still
    (folder / "model.fp16.onnx").unlink()
    megabytes = 0.8 * (folder / "model.onnx").stat().st_size / 1e6
    assert ssdkd("export", folder, "--overwrite", "--max-size-mb", megabytes).code == 3
    assert read_report(folder).recommendation is None
    assert ssdkd("export", folder, "--precision", "fp16").code == 0
    recommendation = read_report(folder).recommendation
    assert recommendation is not None
    assert recommendation.artifact == "model.fp16.onnx"


def test_the_drop_needs_a_teacher_s_accuracy_on_these_images(
    ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path
) -> None:
    images = dict(np.load(shared / "test.npz"))
    np.savez(tmp_path / "fewer.npz", images=images["images"][:9], labels=images["labels"][:9])
    options = ("--max-drop", "1", "--eval-data", tmp_path / "fewer.npz", "--out", tmp_path / "elsewhere")
    ran = ssdkd("export", compressed, *options)
    assert ran.code == 1
    assert "has on 20 images; these are 9 others" in ran.err
    images["labels"] = np.roll(images["labels"], 1)
    np.savez(tmp_path / "others.npz", **images)
    ran = ssdkd("export", compressed, *options[:3], tmp_path / "others.npz", *options[4:])
    assert ran.code == 1
    assert "has on 20 images; these are 20 others" in ran.err


def test_a_report_holds_accuracies_on_one_set_of_images(
    ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    images = dict(np.load(shared / "test.npz"))
    np.savez(tmp_path / "fewer.npz", images=images["images"][:9], labels=images["labels"][:9])
    ran = ssdkd("export", folder, "--precision", "fp16", "--json", "--eval-data", tmp_path / "fewer.npz")
    assert ran.code == 0, ran.err
    assert ran.json[0]["accuracy"] is not None
    assert "leaves these accuracies out" in ran.err
    found = {item.path: item.accuracy for item in read_report(folder).artifacts}
    assert found["model.fp16.onnx"] is None
    assert found["model.onnx"] is not None
    assert ssdkd("export", folder, "--precision", "fp16", "--overwrite", "--eval-data", shared / "test.npz").code == 0
    assert read_report(folder).artifacts[1].accuracy is not None


@needs_rtx
def test_a_plan_that_cannot_be_judged_here_leaves_the_recommendation(
    ssdkd: Any, compressed: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    before = read_report(folder).recommendation
    assert before is not None
    ran = ssdkd("export", folder, "--export", "trt", "--profile", "rtx", "--precision", "fp16")
    assert ran.code == 0, ran.err
    report = read_report(folder)
    assert "model.fp16.engine" in {item.path for item in report.artifacts}
    assert report.recommendation == before


def test_what_stops_an_export_is_said_before_its_work(ssdkd: Any, shared: Path, compressed: Path) -> None:
    ran = ssdkd("export", shared / "teacher.pt", *NORMALISED, "--precision", "int8", "--out", compressed)
    assert ran.code == 1
    assert "holds another run" in ran.err
    assert "synthetic samples" not in ran.err


def plan_of(onnx_file: Path, plan: Path) -> None:
    """A plan, of importance for its bytes alone, and the sidecar that says of which ONNX file it was made."""
    plan.write_bytes(b"plan")
    binding = Binding("images", "float", (1,), (1,), (1,))
    write_sidecar(
        plan,
        Sidecar(
            schema_version=1,
            flavour="tensorrt",
            version="10.3.0",
            compute_capability="8.7",
            gpu="Orin",
            precision="fp32",
            input=binding,
            output=binding,
            workspace_mb=None,
            timing_cache=None,
            onnx_sha256=sha256_of(onnx_file),
            onnx_bytes=1,
            onnx_metadata={},
            plan_sha256=hashlib.sha256(b"plan").hexdigest(),
            plan_bytes=4,
            weight_bytes={},
            computed_weights={},
            layers={},
            weights_in_plan={},
            engine_tensors=None,
            build_seconds=1.0,
            built_on="2026-01-01T00:00:00+00:00",
            platform="Linux aarch64",
            ssdkd_version="0.1.0",
            warnings=(),
        ),
    )


def test_plans_of_a_file_that_is_replaced_go_with_it(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    (folder / "model.onnx").write_bytes(b"another network")
    plan_of(folder / "model.onnx", folder / "model.engine")
    for name in ("build_model.engine.sh", "model.onnx.rejected"):
        (folder / name).write_text("of the file that was")
    ran = ssdkd("export", folder, "--overwrite")
    assert ran.code == 0, ran.err
    assert "model.engine is deleted: it was of another model.onnx than the one that is there now" in ran.err
    assert names_in(folder) == {"model.onnx"}


def test_plans_of_the_same_network_and_plans_of_the_user_stay(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    plan_of(folder / "model.onnx", folder / "model.engine")
    (folder / "model.fp16.engine").write_text("built on the device, or by trtexec")
    ran = ssdkd("export", folder, "--overwrite")
    assert ran.code == 0, ran.err
    assert "may be of another network" not in ran.err
    ran = ssdkd("export", folder, "--precision", "fp16", "--out", folder)
    assert ran.code == 0, ran.err
    assert "model.fp16.engine may be of another network than model.fp16.onnx: " in ran.err
    kept = {"model.engine", "model.engine.json", "model.fp16.engine"}
    assert names_in(folder) == {"model.onnx", "model.fp16.onnx", *kept}


def test_a_proven_file_stays_where_a_new_one_is_rejected(
    ssdkd: Any, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    wanted = ("export", folder, "--precision", "int8", "--qat", "off", "--no-fallback")
    monkeypatch.setattr(Loss, "allowed", 100.0)
    assert ssdkd(*wanted).code == 0
    proven, of_float = (folder / "model.int8.onnx").read_bytes(), (folder / "model.onnx").stat().st_mtime_ns
    monkeypatch.setattr(Loss, "allowed", -100.0)
    assert ssdkd(*wanted, "--overwrite").code == 3
    assert (folder / "model.int8.onnx").read_bytes() == proven
    assert (folder / "model.onnx").stat().st_mtime_ns == of_float  # it was not asked for
    assert names_in(folder) == {"model.onnx", "model.int8.onnx", "model.int8.onnx.rejected"}
    known = {item.path: item.verified for item in read_report(folder).artifacts}
    assert known == {"model.onnx": True, "model.int8.onnx": True, "model.int8.onnx.rejected": False}
    monkeypatch.setattr(Loss, "allowed", 100.0)
    assert ssdkd(*wanted, "--overwrite").code == 0
    assert names_in(folder) == {"model.onnx", "model.int8.onnx"}
    assert {item.path for item in read_report(folder).artifacts} == {"model.onnx", "model.int8.onnx"}


@needs_rtx
@pytest.mark.parametrize(
    ("failure", "code"), [(KeyboardInterrupt(), 130), (OSError(errno.ENOSPC, "No space left on device"), 1)]
)
def test_a_plan_stays_until_the_next_one_is_whole(
    ssdkd: Any,
    compressed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    wanted = ("export", folder, "--overwrite", "--export", "trt", "--precision", "fp32")
    assert ssdkd(*wanted).code == 0
    before = {name: (folder / name).read_bytes() for name in ("model.engine", "model.engine.json")}

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("exporters.to_tensorrt.write_sidecar", fail)
    assert ssdkd(*wanted).code == code
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob(".unproven*"))
    assert check_sidecar(folder / "model.engine", folder / "model.onnx") is None


def test_a_folder_made_for_an_export_that_fails_goes_again(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    (folder / "student.safetensors").write_bytes(b"damaged")
    assert ssdkd("export", folder, "--out", tmp_path / "deep" / "new").code == 1
    assert not (tmp_path / "deep").exists()


def test_samples_of_another_network_are_named(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(compressed, tmp_path / "run"))
    arrays = dict(np.load(folder / "samples.npz"))
    np.savez(
        folder / "samples.npz", **{**arrays, "held_out_logits": np.zeros((len(arrays["held_out"]), 12), np.float32)}
    )
    ran = ssdkd("export", folder, "--precision", "fp16")
    assert ran.code == 1
    assert "samples.npz is of another network" in ran.err


def test_a_trained_network_is_proven_against_the_student(
    ssdkd: Any, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import quantization
    from ssdkd_cli import precisions

    monkeypatch.setattr(quantization, "RATE", 0.5)  # it moves far from where it began
    monkeypatch.setattr(precisions, "STEPS", 20)
    ran = ssdkd("export", compressed, "--precision", "int8", "--qat", "on", "--out", tmp_path / "out")
    assert ran.code == 3
    assert "are not the network's" in ran.err
    assert names_in(tmp_path / "out") == {"model.onnx", "model.int8.onnx.rejected"}
