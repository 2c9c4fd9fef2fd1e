from pathlib import Path

import pytest

from exporters import runtimes
from ssdkd_cli.environment import cpu_name


def test_cores_are_those_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr(runtimes, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(runtimes.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert cpu_name().endswith(", 2 cores")
