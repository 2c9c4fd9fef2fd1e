import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from engine.errors import SSDKDError
from ssdkd_cli import files, runs


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
@pytest.mark.parametrize("command", ["compress", "export"])
def test_two_runs_do_not_write_into_one_folder(command: str, ssdkd: Any, shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = {
        "compress": ["compress", shared / "teacher.pt", "--student", "resnet8", "--out", folder, "--overwrite"],
        "export": ["export", shared / "teacher.pt", "--input", "1x16x16", "--out", folder],
    }
    with files.new_folder(folder):
        (folder / runs.STUDENT).write_text("of the other")
        ran = ssdkd(*words[command])
        assert ran.code == 1
        assert f"another ssdkd is writing {folder}" in ran.err
        assert "--out DIR" in ran.err
        assert [path.name for path in folder.iterdir()] == [runs.STUDENT]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_folder_that_another_process_has_just_made_is_left_to_it(tmp_path: Path) -> None:
    folder, made = tmp_path / "deep" / "run", files.check_writable

    def made_by_another(path: Path) -> None:
        made(path)
        other.enter_context(files.locked(path))

    with contextlib.ExitStack() as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "check_writable", made_by_another)
        with pytest.raises(SSDKDError, match="another ssdkd is writing"), files.new_folder(folder):
            pass
        assert folder.is_dir()


def test_no_place_for_temporary_files_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    with (
        pytest.raises(SSDKDError, match="temporary files cannot be written") as caught,
        files.new_folder(tmp_path / "a"),
    ):
        pass
    assert "TMPDIR" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_broken_link_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(SSDKDError, match="link cannot be made"):
        files.check_writable(tmp_path / "link")


def test_what_a_killed_process_left_is_swept_away(tmp_path: Path) -> None:
    left = (".unproven-model.fp16.onnx", ".unproven-model.engine.json", ".report.json.4711.part")
    left += (".student.safetensors.1.part", "..unproven-model.onnx.12.part", ".tensorrt_timing.cache.3.part")
    others = (".hidden", ".unproven", "a.part", "model.onnx", "report.json", ".download.iso.12.part")
    for name in (*left, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / ".teacher-ab12_x").mkdir()
    (tmp_path / ".teacher-ab12_x" / "teacher.onnx").write_text("x")
    with files.new_folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_limit_on_the_size_of_files_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (100_000, resource.RLIM_INFINITY))
    files.check_file_size(100_000)
    with pytest.raises(SSDKDError, match=r"a file may have 0\.1 MB here; the run writes one of 0\.3 MB") as caught:
        files.check_file_size(300_000)
    assert "ulimit -f unlimited" in caught.value.hint
