import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import provenance, unfinished

SOURCE: dict[str, Any] = {"command": "ssdkd demo", "commit": "abc1234", "machine": {"cores": 2}, "created": "today"}


def test_there_is_nothing_to_go_on_with_at_first(tmp_path: Path) -> None:
    assert unfinished(tmp_path / "none.json", SOURCE) == {}


def test_seeds_of_the_same_code_and_machine_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    path.write_text(json.dumps({**SOURCE, "created": "yesterday", "runs": [{"seed": 0}]}))
    assert unfinished(path, SOURCE)["runs"] == [{"seed": 0}]


@pytest.mark.parametrize("other", [{"commit": "def5678"}, {"machine": {"cores": 4}}, {"command": "ssdkd"}])
def test_another_commit_machine_or_command_is_never_mixed_in(tmp_path: Path, other: dict[str, Any]) -> None:
    path = tmp_path / "demo.json"
    path.write_text(json.dumps({**SOURCE, "runs": []}))
    with pytest.raises(SystemExit, match=f"other {next(iter(other))}"):
        unfinished(path, SOURCE | other)


def test_a_machine_without_git_gives_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance("ssdkd demo")["commit"] == ""
