from pathlib import Path

import pytest

from exporters import runtimes
from ssdkd_cli.environment import _import_of, cpu_name


def test_cores_are_those_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr(runtimes, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(runtimes.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert cpu_name().endswith(", 2 cores")


@pytest.mark.parametrize(("source", "said"), [("raise RuntimeError('truncated')", "truncated"), ("1 / 0", "division")])
def test_a_damaged_package_is_said_and_no_traceback(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert _import_of("damaged_package").startswith(f"cannot be imported: {said}")
