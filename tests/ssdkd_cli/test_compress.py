import errno
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from engine import device
from engine.config import DistillationSettings
from engine.distill import distill
from engine.errors import NonFiniteLossError, SSDKDError
from engine.students import build_student
from engine.teacher import load_teacher
from engine.threads import Threads
from exporters.verify import Verification
from ssdkd_cli import (
    artifacts,
    console,
    doubts,
    environment,
    files,
    labels,
    pipeline,
    preparation,
    proving,
    replacing,
    runs,
    teaching,
    timing,
)
from ssdkd_cli.report import NO_FILES
from ssdkd_cli.target import resolve_target


def arguments(shared: Path, out: Path, *more: object) -> list[object]:
    teacher, config = shared / "teacher.pt", shared / "ssdkd.toml"
    return ["compress", teacher, "--student", "resnet8", "--config", config, "--out", out, *more]


def test_a_run_leaves_all_its_files(compressed: Path) -> None:
    assert {path.name for path in compressed.iterdir()} == {
        *("student.safetensors", "model.onnx", "report.json", "report.md"),
        *("metrics.jsonl", "samples.png", "samples.npz", "config.toml"),
    }


def test_the_report_says_what_was_done(compressed: Path, shared: Path) -> None:
    report = json.loads((compressed / "report.json").read_text())
    assert report["command"].startswith(f"ssdkd compress {shared}/teacher.pt --student resnet8")
    teacher, student, distillation = report["teacher"], report["student"], report["distillation"]
    assert (teacher["arch"], teacher["classes"], teacher["input_shape"]) == ("resnet8", 4, [1, 16, 16])
    assert teacher["class_names"] == ["apple", "bird", "cat", "dog"]
    assert teacher["accuracy_images"] == 20
    assert 0 <= teacher["accuracy"] <= 100
    assert 0 <= student["agreement"] <= 100
    assert student["parameters"] == teacher["parameters"]
    assert student["size_bytes"] == (compressed / "student.safetensors").stat().st_size
    assert (distillation["rounds"], distillation["steps"]) == (3, 4)
    assert distillation["images_seen"] == 4 * 16
    assert sum(distillation["class_histogram"]) == distillation["samples"]
    assert distillation["settings"]["student_batch"] == 16
    (artifact,) = report["artifacts"]
    assert (artifact["path"], artifact["format"], artifact["precision"]) == ("model.onnx", "onnx", "fp32")
    assert artifact["verified"] is True
    assert artifact["agreement"] == 100
    assert artifact["accuracy"] == student["accuracy"]
    assert 0 < artifact["latency_ms"]["p50"] <= artifact["latency_ms"]["p99"]
    assert report["recommendation"]["artifact"] == "model.onnx"
    assert report["gates"] == []


def test_a_student_larger_than_the_teacher_is_warned_of(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--student", "resnet14", "--json"))
    assert ran.code == 0, ran.err
    for name in ("parameters", "FLOPs"):
        (warning,) = [text for text in ran.json["warnings"] if f"more {name} than the teacher" in text]
        assert f"`ssdkd export {shared / 'teacher.pt'} --precision int8 --input 1x16x16" in warning
        assert warning in ran.err


def test_doubts_of_the_machine_are_in_the_report(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "cpuinfo").write_text("flags : avx2\n")
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(doubts, "BUSY", 0)
    monkeypatch.setattr(device, "Threads", CrowdedThreads)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json", "--profile", "x86-vnni"))
    assert ran.code == 0, ran.err
    for words in ("has no VNNI", "machine was busy", "fewer threads"):
        (warning,) = [text for text in ran.json["warnings"] if words in text]
        assert warning in ran.err
    (busy,) = [text for text in ran.json["warnings"] if "machine was busy" in text]
    for words in ("(the teacher)", "(model.onnx)", f"ssdkd bench {tmp_path / 'run'}"):
        assert words in busy
    exported = ssdkd("export", tmp_path / "run", "--overwrite", "--profile", "x86-vnni", "--precision", "fp32")
    assert "has no VNNI" in exported.err
    assert "machine was busy" in exported.err
    assert "fewer threads" in exported.err


def test_a_teacher_that_cannot_be_timed_is_in_the_report(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def refused(_subject: object) -> None:
        raise SSDKDError("the network cannot be exported", "")

    monkeypatch.setattr(timing, "float_graph", refused)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json"))
    assert ran.code == 0, ran.err
    assert ran.json["teacher"]["latency_ms"] is None
    said = "the teacher's latency is unknown: the network cannot be exported"
    assert ran.json["warnings"].count(said) == ran.err.count(said) == 1


class CrowdedThreads(Threads):
    """Threads that once made room for other work."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.changed = True


def test_what_fails_is_said_beside_the_json(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    data = ("--eval-data", shared / "test.npz")
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json", "--max-size-mb", "0.001", *data))
    assert ran.code == 3
    assert ran.err.splitlines()[-1].startswith("✗ --max-size-mb 0.001: model.onnx has 0.3")
    accuracy = ran.json["teacher"]["accuracy"]
    said = f"20 labelled images, for the report alone: teacher {accuracy:.1f} %"
    assert ran.err.index(said) < ran.err.index("✓ distil")
    assert any(
        "accuracy is far below what a trained network reaches" in text for text in ran.json["warnings"]
    )  # the labels are arbitrary


def test_metrics_are_one_json_line_a_round(compressed: Path) -> None:
    lines = [json.loads(line) for line in (compressed / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert [line["phase"] for line in lines] == ["warm-up", "distill", "distill"]
    assert lines[0]["distillation_loss"] is None  # nothing was learned yet: unknown, not NaN
    assert lines[2]["distillation_loss"] > 0
    assert lines[0]["feature_loss"] is None
    assert lines[2]["feature_loss"] >= 0


def test_the_model_file_takes_any_batch_and_says_what_it_is(compressed: Path) -> None:
    session = onnxruntime.InferenceSession(compressed / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (logits,) = session.run(["logits"], {"images": np.zeros((batch, 1, 16, 16), np.float32)})
        assert logits.shape == (batch, 4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["ssdkd.class_names"]) == ["apple", "bird", "cat", "dog"]


def test_config_toml_repeats_the_run_bit_for_bit(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    again = ssdkd("compress", "--config", compressed / "config.toml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    first, second = (load_file(folder / "student.safetensors") for folder in (compressed, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "again/config.toml").read_text() == (compressed / "config.toml").read_text()


def test_json_is_the_report_and_nothing_else(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    build = preparation.build_student

    def chatty(*args: Any, **kwargs: Any) -> Any:
        print("a user's own code prints")
        return build(*args, **kwargs)

    monkeypatch.setattr(preparation, "build_student", chatty)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json", "--time-limit", "1h"))
    assert ran.code == 0, ran.err
    assert ran.json == json.loads((tmp_path / "run/report.json").read_text())
    assert "a user's own code prints" in ran.err
    assert ran.json["teacher"]["accuracy"] is None
    assert not any("time limit" in warning for warning in ran.json["warnings"])  # it hurried nothing


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_teacher_whose_name_is_no_text(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    teacher = shutil.copy(shared / "teacher.pt", tmp_path / "caf\udce9.pt")
    config = ("--config", shared / "ssdkd.toml", "--out", tmp_path / "run")
    ran = ssdkd("compress", teacher, "--student", "resnet8", *config, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["teacher"]["path"] == f"{tmp_path}/caf\\udce9.pt"
    assert ssdkd("export", tmp_path / "run", "--overwrite").code == 0


def test_embedded_preprocessing_is_proven_too(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json", "--embed-preprocessing"))
    assert ran.code == 0, ran.err
    (artifact,) = ran.json["artifacts"]
    assert artifact["verified"] is True
    assert artifact["notes"] == ["takes images in 0...1"]


def test_a_file_that_fails_its_proof_is_set_aside(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    float_graph = artifacts.float_graph

    def corrupt(subject: Any) -> Any:
        weight = next(parameter for parameter in subject.module.parameters() if parameter.dim() == 4)
        with torch.no_grad():
            weight.add_(0.5)
            graph = float_graph(subject)
            weight.sub_(0.5)
        return graph

    monkeypatch.setattr(artifacts, "float_graph", corrupt)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json"))
    assert ran.code == 3
    (artifact,) = ran.json["artifacts"]
    assert (artifact["path"], artifact["verified"]) == ("model.onnx.rejected", False)
    assert ran.json["recommendation"] is None
    assert (tmp_path / "run/model.onnx.rejected").exists()
    assert not (tmp_path / "run/model.onnx").exists()
    assert "REJECTED" in (tmp_path / "run/report.md").read_text()


def test_a_file_that_never_ran_has_no_numbers(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(proving, "verify", lambda *_, **__: Verification(False, "cannot be opened", None, None))
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--json"))
    assert ran.code == 3
    (artifact,) = ran.json["artifacts"]
    assert artifact["max_abs_error"] is None
    assert artifact["latency_ms"] is None
    assert artifact["verified_reason"] == "cannot be opened"


def test_an_interrupted_run_keeps_the_student_so_far(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    plain = console.plain_round

    def interrupt(metrics: Any) -> str:
        if metrics.round == 2:
            raise KeyboardInterrupt
        return plain(metrics)

    with monkeypatch.context() as patch:
        patch.setattr(console, "plain_round", interrupt)
        patch.setattr(console, "PLAIN_LINE_SECONDS", 0.0)
        ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 130
    assert str(tmp_path / "run/student.safetensors") in ran.err
    assert str(tmp_path / "run/metrics.jsonl") in ran.err
    assert f"ssdkd export {tmp_path}/run" in ran.err
    assert "Traceback" not in ran.err
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    reported = ssdkd("report", tmp_path / "run")
    assert reported.code == 1
    assert "was interrupted before its report" in reported.err
    assert f"ssdkd export {tmp_path}/run" in " ".join(reported.err.split())
    assert "round 1/3  warm-up  image loss" in ran.err  # there is no student yet whose agreement could be said
    assert "round 2/3  agreement" not in ran.err  # it was interrupted there
    again = f"ssdkd compress --config {tmp_path}/run/config.toml --out {tmp_path}/run-again"
    assert f"`{again}` runs it again" in " ".join(reported.err.split())
    assert ssdkd(*shlex.split(again)[1:]).code == 0
    scored = ssdkd("eval", tmp_path / "run", "--data", shared / "test.npz", "--json")
    assert scored.code == 0, scored.err
    assert [row["images"] for row in scored.json] == [20]
    exported = ssdkd("export", tmp_path / "run", "--json")  # as the warning says
    assert exported.code == 0, exported.err
    assert exported.json[0]["verified"] is True
    (said,) = (note for note in exported.json[0]["notes"] if "is an interrupted run" in note)
    assert re.search(r"it ended after round 2 of 3, at \d+\.\d % agreement", said)
    assert said in " ".join(exported.err.split())


def test_what_is_said_after_an_interruption_works_where_a_file_is_there(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "a run"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "integer_graph", interrupt)
        ran = ssdkd(*arguments(shared, folder, "--precision", "int8"))
    assert ran.code == 130
    assert (folder / "model.onnx").exists()
    command = f"ssdkd export '{folder}' --overwrite"
    assert f"make files of it with `{command}`" in ran.err
    reported = ssdkd("report", folder, "--json")
    assert reported.code == 0, reported.err
    assert (reported.json["artifacts"], reported.json["recommendation"]) == ([], None)
    assert reported.json["warnings"][-1] == NO_FILES
    assert reported.json["student"]["agreement"] > 0
    exported = ssdkd(*shlex.split(command)[1:], "--json")
    assert exported.code == 0, exported.err
    assert exported.json[0]["verified"] is True
    whole = ssdkd("report", folder, "--json").json
    assert [item["path"] for item in whole["artifacts"]] == ["model.onnx"]
    assert whole["recommendation"]["artifact"] == "model.onnx"
    assert NO_FILES not in whole["warnings"]


def test_a_file_without_finite_logits_on_a_labelled_image_costs_no_report(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """As of an FP16 file that overflows on a real image and on none of its proof samples."""
    score_file = proving.score_file

    def overflowing(runtime: Any, labelled: Any) -> float:
        if "fp16" in runtime.path.name:
            raise SSDKDError("the model gives NaN or infinite logits on images 0 to 31", "")
        return float(score_file(runtime, labelled))

    monkeypatch.setattr(proving, "score_file", overflowing)
    for precision, code in (("fp32", 0), ("fp16", 3)):
        config = tmp_path / f"{precision}.toml"
        config.write_text((shared / "ssdkd.toml").read_text().replace('["fp32"]', f'["{precision}"]'))
        words = ["compress", shared / "teacher.pt", "--student", "resnet8", "--config", config, "--out"]
        ran = ssdkd(*words, tmp_path / precision, "--eval-data", shared / "test.npz", "--json")
        assert ran.code == code, ran.err
        assert ran.json["student"]["accuracy"] is not None
    of_float, of_half = ran.json["artifacts"]
    assert of_float["accuracy"] is not None
    assert (of_half["path"], of_half["accuracy"]) == ("model.fp16.onnx.rejected", None)
    assert of_half["verified_reason"].startswith("on labelled images the model gives NaN or infinite logits")


def test_a_student_without_finite_logits_on_a_labelled_image_costs_no_run(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def not_finite(*_: Any) -> NoReturn:
        raise SSDKDError("the model gives NaN", "")

    monkeypatch.setattr(pipeline, "network_accuracy", not_finite)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--eval-data", shared / "test.npz", "--json"))
    assert ran.code == 0, ran.err
    assert ran.json["student"]["accuracy"] is None
    assert "the student's accuracy is unknown: the model gives NaN" in ran.err


def test_before_the_first_step_there_is_no_student_to_keep(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def interrupt(_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(console, "plain_round", interrupt)  # after the first round, of the warm-up
    ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 130
    assert "student.safetensors" not in ran.err
    assert "interrupted in the warm-up: the student had not begun, nothing is kept" in ran.err
    assert not (tmp_path / "run").exists()


def test_no_tick_before_the_error_that_nothing_was_learned(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    distill = teaching.distill
    monkeypatch.setattr(teaching, "distill", lambda *given, **named: itertools.islice(distill(*given, **named), 1))
    ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 1
    assert re.search(r"the time was up in round 1 of \d+, before the student's first step", ran.err)
    assert re.search(r"a round takes .* here: give --time-limit \d+s or more", ran.err)
    assert "✓ distil" not in ran.err


def test_ctrl_c_after_the_last_round_keeps_the_student(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    save, saved = teaching.save_distilled, []

    def interrupted_once(*given: Any) -> None:
        saved.append(given)
        if len(saved) == 1:
            raise KeyboardInterrupt
        save(*given)

    monkeypatch.setattr(teaching, "save_distilled", interrupted_once)
    ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 130
    assert str(tmp_path / "run/student.safetensors") in ran.err
    assert (tmp_path / "run/samples.npz").exists()


def test_ctrl_c_again_while_the_student_is_saved(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    save = teaching.runs.save_student

    def interrupted(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(*given)

    monkeypatch.setattr(teaching, "distill", fail_after(2, KeyboardInterrupt()))
    monkeypatch.setattr(teaching.runs, "save_student", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ran = ssdkd(*arguments(shared, tmp_path / "run"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ran.code == 130
    assert str(tmp_path / "run/student.safetensors") in ran.err
    assert (tmp_path / "run/samples.npz").exists()


def fail_after(rounds: int, error: BaseException) -> Any:
    distill = teaching.distill

    def failing(*given: Any, **named: Any) -> Any:
        for metrics in distill(*given, **named):
            yield metrics
            if metrics.round == rounds:
                raise error

    return failing


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error"), ZeroDivisionError()])
def test_a_run_that_fails_late_keeps_its_student(
    error: Exception, ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(teaching, "distill", fail_after(2, error))
    if isinstance(error, ZeroDivisionError):  # a bug, and keeps its traceback
        with pytest.raises(ZeroDivisionError):
            ssdkd(*arguments(shared, tmp_path / "run"))
    else:
        ran = ssdkd(*arguments(shared, tmp_path / "run"))
        assert ran.code == 1
        assert str(tmp_path / "run/student.safetensors") in ran.err
        assert "--overwrite" in ran.err
    assert ssdkd("export", tmp_path / "run").code == 0


def test_metrics_that_cannot_be_written_do_not_end_the_run(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    opened, attempts = Path.open, []

    def full(path: Path, *given: Any, **named: Any) -> Any:
        if path.name == "metrics.jsonl":
            attempts.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *given, **named)

    monkeypatch.setattr(Path, "open", full)
    ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 0, ran.err
    assert ran.err.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert len(attempts) == 1


def test_a_student_whose_folder_is_full_is_kept_elsewhere(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    write = teaching.runs.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path == tmp_path / "run/student.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(teaching.runs, "write_atomically", full)
    ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 1
    assert "No space left on device" in ran.err
    (elsewhere,) = (tmp_path / "temporary").glob("ssdkd-*")
    assert f"ssdkd export {elsewhere}" in ran.err
    assert ssdkd("export", elsewhere).code == 0


def test_a_format_given_twice_is_written_once(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--export", "onnx", "--export", "onnx", "--json"))
    assert ran.code == 0, ran.err
    assert [artifact["path"] for artifact in ran.json["artifacts"]] == ["model.onnx"]


def test_scoring_leaves_the_student_where_it_is(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    taught, scored = [], []
    teach, predictor = pipeline.teach, labels.predictor
    monkeypatch.setattr(pipeline, "teach", lambda *given, **named: taught.append(teach(*given, **named)) or taught[0])
    monkeypatch.setattr(labels, "predictor", lambda module: scored.append(module) or predictor(module))
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--eval-data", shared / "test.npz"))
    assert ran.code == 0, ran.err
    assert len(scored) == 2  # the teacher before, the student after
    assert all(module is not taught[0].student for module in scored)


def test_overwrite_replaces_the_run_and_nothing_else(
    ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compressed, folder)
    (folder / "model.onnx.rejected").write_text("old")
    (folder / "notes.txt").write_text("mine")
    (folder / "model_v2.onnx").write_text("mine")
    ran = ssdkd(*arguments(shared, folder, "--overwrite", "--seed", "1"))
    assert ran.code == 0, ran.err
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "model_v2.onnx").read_text() == "mine"
    assert not (folder / "model.onnx.rejected").exists()
    assert json.loads((folder / "report.json").read_text())["distillation"]["seed"] == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("learned", [False, True])
def test_a_run_that_fails_loses_no_earlier_run(
    learned: bool, ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compressed, folder)
    before = contents(folder)
    monkeypatch.setattr(teaching, "distill", fail_after(2 if learned else 1, KeyboardInterrupt()))
    assert ssdkd(*arguments(shared, folder, "--overwrite")).code == 130
    if learned:  # both are kept
        assert contents(folder / replacing.PREVIOUS) == before
        assert (folder / runs.STUDENT).read_bytes() != before[runs.STUDENT]
    else:
        assert contents(folder) == before
    assert (folder / replacing.PREVIOUS).exists() is learned


def test_a_second_failure_loses_no_earlier_run(
    ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compressed, folder)
    before = contents(folder)
    for rounds in (2, 1):  # with a student, then without
        with monkeypatch.context() as patch:
            patch.setattr(teaching, "distill", fail_after(rounds, KeyboardInterrupt()))
            assert ssdkd(*arguments(shared, folder, "--overwrite")).code == 130
    assert contents(folder) == before
    assert not (folder / replacing.PREVIOUS).exists()


def test_an_earlier_run_that_a_killed_one_left_behind_is_found(
    ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compressed, folder)
    before = contents(folder)
    replacing.set_aside(folder)
    (folder / runs.METRICS).write_text("of a run that was killed")
    ran = ssdkd(*arguments(shared, folder))
    assert ran.code == 1
    assert "holds another run" in ran.err
    assert contents(folder) == before


def test_a_run_is_not_repeated_over_its_own_config(ssdkd: Any, compressed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(compressed, folder)
    before = contents(folder)
    ran = ssdkd("compress", "--config", folder / "config.toml", "--out", folder, "--overwrite")
    assert ran.code == 1
    assert "config.toml is needed for the run" in ran.err
    assert contents(folder) == before


def test_folders_that_were_there_stay_and_new_ones_go(ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/.ssdkd-write-test").write_text("mine")
    for out in ("mine", "mine/new/run"):
        assert ssdkd(*arguments(shared, tmp_path / out, "--student", "resnet9")).code == 1
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == [".ssdkd-write-test"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fails_while_the_student_is_written(
    code: int, ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(code, "as the system says it", str(tmp_path / "run/student.safetensors"))

    monkeypatch.setattr(pipeline.runs, "write_atomically", full)
    ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 1
    assert "student.safetensors" in ran.err
    assert "--out DIR" in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_too_little_space_is_found_before_the_work(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 1
    assert "MB free" in ran.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_batch_size_to_try(
    error: Exception, ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(teaching, "distill", fail)
    ran = ssdkd(*arguments(shared, tmp_path / "run", "--batch-size", "64", "--json"))
    assert ran.code == 1
    assert "out of memory with a batch of 64" in ran.err
    assert "--batch-size 32" in ran.err
    assert ran.out == ""
    assert not (tmp_path / "run").exists()  # so that the hint can be followed


def test_a_loss_that_is_not_finite_leaves_no_student(
    ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NonFiniteLossError("a loss became NaN in round 7", "lower student_rate")

    monkeypatch.setattr(teaching, "distill", fail)
    ran = ssdkd(*arguments(shared, tmp_path / "run"))
    assert ran.code == 1
    assert "round 7" in ran.err
    assert not (tmp_path / "run").exists()


def test_a_run_out_of_time_can_be_typed_again(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = arguments(shared, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(teaching, "distill", lambda state, **_: itertools.islice(distill(state), 1))
        ran = ssdkd(*words, "--time-limit", "1s")
    assert ran.code == 1
    assert "here: give --time-limit" in ran.err
    again = ssdkd(*words, "--time-limit", "1h")
    assert again.code == 0, again.err


def test_a_bug_keeps_its_traceback(ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(teaching, "distill", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ssdkd(*arguments(shared, tmp_path / "run"))


@pytest.mark.parametrize("student", ["same", "resnet8"])
def test_a_teacher_without_latency_is_reported_as_unknown(
    student: str, ssdkd: Any, shared: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from engine.errors import SSDKDError

    def no_teacher(subject: Any) -> Any:
        raise SSDKDError("the teacher cannot be exported", "")

    monkeypatch.setattr(timing, "float_graph", no_teacher)
    config = shared / "ssdkd.toml"
    ran = ssdkd(
        *("compress", shared / "teacher.pt", "--student", student, "--config", config, "--out", tmp_path / "run"),
        "--json",
    )
    assert ran.code == 0, ran.err
    assert ran.json["teacher"]["latency_ms"] is None
    assert ran.json["artifacts"][0]["latency_ms"] is not None
    assert "the teacher cannot be exported" in ran.err


def test_the_demo_s_teacher_and_images_go_together(ssdkd: Any, tmp_path: Path) -> None:
    config = tmp_path / "short.toml"
    config.write_text("[distillation]\nrounds = 2\nwarmup_rounds = 1\nstudent_steps = 2\n")
    ran = ssdkd("demo", "--config", config, "--batch-size", "32", "--out", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    teacher, student = ran.json["teacher"], ran.json["student"]
    assert teacher["accuracy"] > 90
    assert teacher["accuracy_images"] == 2000
    assert teacher["class_names"][0] == "T-shirt/top"
    assert 2 * student["parameters"] <= teacher["parameters"]
    assert student["inherited_parameters"] == student["parameters"]
    assert ran.json["distillation"]["matched_stages"] == 3
    assert not [warning for warning in ran.json["warnings"] if "assumed" in warning]  # all that it needs is stated


def test_a_student_inherits_unless_it_has_weights_or_is_told_not_to(shared: Path, tmp_path: Path) -> None:
    teacher = load_teacher(shared / "teacher.pt", input_shape=(1, 16, 16))

    def inherited(weights: Path | None, inherit: bool) -> frozenset[str]:
        options: Any = types.SimpleNamespace(student="resnet14", student_weights=weights, seed=0)
        target = resolve_target(formats=(), precisions=["fp32"], profile=None, qat="auto", fallback=True)
        _, names = preparation.build(options, teacher, DistillationSettings(inherit=inherit), target)
        return names

    stated = tmp_path / "student.pt"
    torch.save(build_student("resnet14", teacher=teacher).state_dict(), stated)
    assert inherited(None, True) == {name for name, _ in teacher.module.named_parameters()}
    assert inherited(stated, True) == inherited(None, False) == frozenset()
