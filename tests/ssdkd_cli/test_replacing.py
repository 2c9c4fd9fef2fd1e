import contextlib
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import SSDKDError
from ssdkd_cli import replacing, runs


@pytest.mark.parametrize("name", runs.OUTPUTS)
def test_what_a_run_would_replace_needs_overwrite(name: str, tmp_path: Path) -> None:
    replacing.check_free(tmp_path, overwrite=False)
    (tmp_path / name).write_text("mine")
    with pytest.raises(SSDKDError, match=rf"\({name}\)"):
        replacing.check_free(tmp_path, overwrite=False)
    replacing.check_inputs(tmp_path, [tmp_path / "teacher.pt"])
    (tmp_path / "link").symlink_to(name)
    with pytest.raises(SSDKDError, match="link is needed for the run"):
        replacing.check_inputs(tmp_path, [tmp_path / "link"])
    replacing.clear(tmp_path)
    assert not (tmp_path / name).exists()


def test_a_folder_called_like_a_file_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(SSDKDError, match=r"model\.onnx is a folder"):
        replacing.check_free(tmp_path, overwrite=True)


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_all(folder: Path, content: str, *names: str) -> None:
    for name in names:
        (folder / name).write_text(content)


FINISHED = (runs.STUDENT, runs.CONFIG, runs.METRICS, runs.REPORT)


def test_what_is_set_aside_comes_back_or_goes(tmp_path: Path) -> None:
    write_all(tmp_path, "first", *FINISHED)
    replacing.set_aside(tmp_path)
    assert set(texts(tmp_path)) == {f"{replacing.PREVIOUS}/{name}" for name in FINISHED}
    write_all(tmp_path, "killed before it had a student", runs.CONFIG, runs.METRICS)
    replacing.recover(tmp_path)
    assert texts(tmp_path) == dict.fromkeys(FINISHED, "first")
    replacing.set_aside(tmp_path)
    replacing.drop_previous(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_that_waits_outlives_interrupted_ones(tmp_path: Path) -> None:
    write_all(tmp_path, "finished", *FINISHED)
    for _ in range(2):
        replacing.set_aside(tmp_path)
        write_all(tmp_path, "interrupted", runs.CONFIG, runs.STUDENT)
        replacing.recover(tmp_path)
        assert texts(tmp_path / replacing.PREVIOUS) == dict.fromkeys(FINISHED, "finished")
    replacing.set_aside(tmp_path)
    replacing.recover(tmp_path)
    assert texts(tmp_path) == dict.fromkeys(FINISHED, "finished")
    replacing.set_aside(tmp_path)
    write_all(tmp_path, "the next", *FINISHED)
    replacing.set_aside(tmp_path)
    assert texts(tmp_path / replacing.PREVIOUS) == dict.fromkeys(FINISHED, "the next")


def test_a_run_that_never_came_to_its_files_takes_no_finished_one_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_report(folder: Path) -> Any:
        return SimpleNamespace(artifacts=("model.onnx",) * ((folder / runs.REPORT).read_text() == "finished"))

    monkeypatch.setattr(replacing, "read_report", read_report)
    write_all(tmp_path, "finished", *FINISHED)
    for _ in range(2):
        replacing.set_aside(tmp_path)
        write_all(tmp_path, "without files", *FINISHED)
        replacing.recover(tmp_path)
        assert texts(tmp_path / replacing.PREVIOUS) == dict.fromkeys(FINISHED, "finished")


@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize("step", [replacing.set_aside, replacing.recover])
def test_a_run_that_is_killed_while_it_moves_files_loses_none(
    step: Any, mine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    for moves in itertools.count():
        folder = tmp_path / str(moves)
        folder.mkdir()
        write_all(folder, "first", *FINISHED)
        if mine:
            (folder / replacing.PREVIOUS).mkdir()
            write_all(folder / replacing.PREVIOUS, "mine", "notes.txt")
        if step is replacing.recover:
            replacing.set_aside(folder)
            write_all(folder, "of the new run", runs.CONFIG, runs.METRICS)
        left = [moves]

        def counting(operation: Any, left: list[int] = left) -> Any:
            def counted(*given: Any, **named: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise KilledError
                return operation(*given, **named)

            return counted

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "mkdir", "unlink", "rmdir"):
                patch.setattr(Path, name, counting(getattr(Path, name)))
            with contextlib.suppress(KilledError):
                step(folder)
        replacing.recover(folder)
        found = texts(folder)
        assert {name: found.pop(name) for name in FINISHED} == dict.fromkeys(FINISHED, "first")
        assert list(found.values()) == ["mine"] * mine
        if left[0] >= 0:
            break
    assert moves > len(FINISHED)


def test_what_no_run_wrote_is_no_beginning_of_one(tmp_path: Path) -> None:
    replacing.set_aside(tmp_path)  # of a run that is killed before its student
    write_all(tmp_path, "the user's", "model.onnx", runs.CONFIG)
    replacing.recover(tmp_path)
    assert texts(tmp_path) == {"model.onnx": "the user's", runs.CONFIG: "the user's"}
    with pytest.raises(SSDKDError, match=r"files that a run would replace \(config\.toml, model\.onnx\)"):
        replacing.check_free(tmp_path, overwrite=False)
    with pytest.raises(SSDKDError, match=r"config\.toml is needed for the run"):
        replacing.check_inputs(tmp_path, [tmp_path / runs.CONFIG])


def test_a_file_of_the_run_that_waits_is_an_input_too(tmp_path: Path) -> None:
    write_all(tmp_path, "first", *FINISHED, "model.onnx")
    replacing.set_aside(tmp_path)
    with pytest.raises(SSDKDError, match=r"model\.onnx is needed for the run"):
        replacing.check_inputs(tmp_path, [tmp_path / replacing.PREVIOUS / "model.onnx"])
