import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gpu
from benchmarks.gpu_data import load_split
from benchmarks.gpu_teachers import Schedule, compact, open_teacher
from engine.errors import SSDKDError
from engine.students import STUDENTS
from engine.zoo import ZOO

PAIR = "wrn16_1-wrn10_1"
CLASSES = ("ash", "birch", "cedar")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of flat JPEG images whose colour is their class, 8 a class to learn from and 4 to test with."""
    root = tmp_path_factory.mktemp("data")
    for split, images in (("train", 8), ("test", 4)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = np.zeros((16, 16, 3), np.uint8)
                pixels[..., number] = 150 + index
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return root


def run(data: Path, out: Path, *words: str) -> dict[str, Any]:
    gpu.main([str(data), "--out", str(out), "--tiny", "--device", "cpu", "--pairs", PAIR, *words])
    merged: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    return merged


@pytest.fixture(scope="module")
def measured(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    run(data, out, "--seeds", "2")
    return out


def test_each_run_says_what_was_done_and_where(measured: Path) -> None:
    merged = json.loads((measured / "gpu.json").read_text())
    assert [each["seed"] for each in merged["runs"]] == [0, 1]
    first = merged["runs"][0]
    assert first == json.loads((measured / "runs" / f"{PAIR}-ssdkd-64-seed0.json").read_text())
    assert (first["pair"], first["method"], first["samples"], first["failed"]) == (PAIR, "ssdkd", 64, None)
    assert first["command"].startswith("python -m benchmarks.gpu DATA --out FOLDER --tiny --device cpu")
    assert first["machine"]["gpu"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    assert (first["rounds"], first["steps"], first["images_seen"]) == (8, 12, 12 * 16)
    assert first["images_per_second"] == pytest.approx(first["images_seen"] / first["seconds"])
    assert first["ratio_percent"] == pytest.approx(100 * first["student_accuracy"] / first["teacher_accuracy"])
    assert first["teacher_training"]["trained_epochs"] == 1
    assert first["settings"]["samples"] == 64
    (row,) = merged["summary"]
    assert row["seeds"] == 2
    assert row["student_accuracy"] == pytest.approx(sum(each["student_accuracy"] for each in merged["runs"]) / 2)


def test_the_curve_begins_at_zero_rises_in_time_and_ends_with_the_student(measured: Path) -> None:
    for each in json.loads((measured / "gpu.json").read_text())["runs"]:
        seconds = [point["seconds"] for point in each["curve"]]
        assert seconds[0] == 0
        assert len(seconds) == 1 + gpu.TINY.points
        assert seconds == sorted(set(seconds))
        assert seconds[-1] == each["seconds"]
        assert all(0 <= point["accuracy"] <= 100 for point in each["curve"])
        assert each["curve"][-1]["accuracy"] == each["student_accuracy"]


def test_a_second_call_repeats_only_what_is_not_there(data: Path, measured: Path, tmp_path: Path) -> None:
    first, second = (measured / "runs" / f"{PAIR}-ssdkd-64-seed{seed}.json" for seed in (0, 1))
    teacher = measured / "teachers" / "wrn16_1.pt"
    kept, trained = first.read_bytes(), teacher.read_bytes()
    result = json.loads(second.read_text())
    second.rename(second.with_suffix(".partial"))  # as a run that was killed while it wrote leaves it
    merged = run(data, measured, "--seeds", "2")
    assert first.read_bytes() == kept
    assert teacher.read_bytes() == trained
    again = json.loads(second.read_text())
    assert again["student_accuracy"] == result["student_accuracy"]  # the same seed, the same student
    assert again["curve"] != result["curve"]  # measured anew
    assert len(merged["runs"]) == 2


def test_the_training_images_are_needed_for_a_new_teacher_alone(data: Path, measured: Path, tmp_path: Path) -> None:
    gpu.main([str(data), "--pack", str(tmp_path)])
    (tmp_path / "train.npz").unlink()
    before = (measured / "gpu.json").read_bytes()
    run(tmp_path, measured, "--seeds", "2", "--buffer", "16", "64", "--seconds", "215")
    sizes = json.loads((measured / "gpu_buffer.json").read_text())
    assert sizes["kind"] == "gpu_buffer"
    assert sorted((each["samples"], each["seed"]) for each in sizes["runs"]) == [(16, 0), (16, 1), (64, 0), (64, 1)]
    assert (measured / "gpu.json").read_bytes() == before


def test_the_buffer_is_varied_by_itself(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--buffer", "16", "64", "--changed", "priority=false")
    assert not (tmp_path / "buffers").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_peak_of_its_memory_is_measured(data: Path, tmp_path: Path) -> None:
    (only,) = run(data, tmp_path, "--seeds", "1", "--device", "cuda")["runs"]
    assert 0 < only["peak_memory_gb"] < 2


def test_packed_images_are_the_folders(data: Path, tmp_path: Path) -> None:
    gpu.main([str(data), "--pack", str(tmp_path)])
    for split in ("train", "test"):
        packed, plain = load_split(tmp_path, split), load_split(data, split)
        assert np.array_equal(packed.images, plain.images)
        assert np.array_equal(packed.labels, plain.labels)
        assert packed.class_names == CLASSES
    assert plain.images.shape == (12, 16, 16, 3)
    assert plain.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_runs_of_another_length_are_never_mixed(data: Path, measured: Path) -> None:
    with pytest.raises(SystemExit, match="other seconds_limit"):
        run(data, measured, "--seeds", "2", "--seconds", "1")


def test_a_run_that_fails_is_written_down_and_the_others_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: gpu.Job) -> dict[str, Any]:
        if job.seed == 0:
            raise SSDKDError("no student", "try another")
        return {"seconds": 1.0, "student_accuracy": job.evaluate(job.teacher.module), "curve": []}

    monkeypatch.setattr(gpu, "run_ssdkd", refuse)
    failed, other = run(data, tmp_path, "--seeds", "2")["runs"]
    assert failed["failed"] == "no student"
    assert other["failed"] is None
    assert other["ratio_percent"] == 100


def test_ours_runs_once_more_with_each_changed_setting(data: Path, measured: Path, tmp_path: Path) -> None:
    (tmp_path / "teachers").mkdir()
    shutil.copy(measured / "teachers" / "wrn16_1.pt", tmp_path / "teachers")
    runs = run(data, tmp_path, "--seeds", "1", "--changed", "alter=false", "beta=0.7")["runs"]
    changed = {run["method"]: (run["settings"]["alter"], run["settings"]["beta"]) for run in runs}
    assert changed == {"ssdkd": (True, 0.4), "ssdkd_alter=false": (False, 0.4), "ssdkd_beta=0.7": (True, 0.7)}


@pytest.mark.parametrize("changed", ["alter", "alter=0", "colour=1"])
def test_a_setting_that_does_not_exist_is_said_at_once(
    data: Path, tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(data, tmp_path, "--changed", changed)
    assert f"--changed {changed}: " in capsys.readouterr().err
    assert not (tmp_path / "teachers").exists()


def test_too_little_time_is_said_at_once(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="too few"):
        run(data, tmp_path, "--minutes", "0.1")
    assert not (tmp_path / "teachers").exists()


def test_runs_share_what_a_teacher_leaves_of_the_minutes() -> None:
    assert gpu.run_seconds(8, 3, 110) == pytest.approx((480 - 110) / 3 - gpu.RUN_OVERHEAD_SECONDS)


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    schedule = Schedule()
    rates = [schedule.rate(progress / 100) for progress in range(101)]
    assert max(rates) == rates[15] == schedule.peak_rate
    assert rates[:16] == sorted(rates[:16])
    assert rates[15:] == sorted(rates[15:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_a_saved_teacher_has_half_the_bytes_and_whole_statistics(measured: Path) -> None:
    teacher, training = open_teacher(measured / "teachers" / "wrn16_1.pt", "wrn16_1", (3, 16, 16))
    state = teacher.module.state_dict()
    small = compact(state)
    assert small["bn1.running_var"].dtype == torch.float32
    assert small["fc.weight"].dtype == torch.float16
    assert torch.equal(small["fc.weight"].float(), state["fc.weight"])  # the teacher is what the file holds
    assert training["trained_seconds"] > 0


@pytest.mark.parametrize("pair", list(gpu.PAIRS))
def test_every_pair_has_a_teacher_and_a_student_of_ours(pair: str) -> None:
    teacher, student = gpu.PAIRS[pair]
    assert teacher in ZOO
    assert student in STUDENTS
