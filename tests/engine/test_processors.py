import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import processors
from engine.processors import SPINS, available_threads, computing_threads, share_processors


@pytest.mark.parametrize(
    ("content", "threads"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("", None)]
)
def test_threads_follow_the_share_of_a_container(
    content: str, threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(content)
    monkeypatch.setattr(processors, "CPU_QUOTA", tmp_path / "cpu.max")
    assert available_threads() == (threads or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("5,2", 5), ("0", None), ("many", None), (None, None)])
def test_runtimes_compute_with_the_threads_that_pytorch_is_given(
    said: str | None, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert computing_threads() == (threads or available_threads())


@pytest.mark.parametrize(("quota", "threads"), [("200000 100000", {"OMP_NUM_THREADS": "2"}), ("max 100000", {})])
def test_threads_are_told_to_mind_others(
    quota: str, threads: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(processors, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    environment: dict[str, str] = {}
    share_processors(environment)
    assert environment == {**threads, "GOMP_SPINCOUNT": str(SPINS)}


@pytest.mark.parametrize("waiting", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_the_user_has_set_stays(waiting: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    monkeypatch.setattr(processors, "CPU_QUOTA", tmp_path / "cpu.max")
    environment = {"OMP_NUM_THREADS": "3", **waiting}
    share_processors(environment)
    assert environment == {"OMP_NUM_THREADS": "3", **waiting}


def test_the_command_says_it_before_pytorch_is_there() -> None:
    code = """if True:
        import os, sys
        sys.argv = ["ssdkd", "students", "--json"]
        from ssdkd_cli.main import main
        print("torch" in sys.modules)
        main()
        print(os.environ["GOMP_SPINCOUNT"])
    """
    set_here = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in set_here}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert (said[0], said[-1]) == ("False", str(SPINS))


def test_benchmarks_say_it_before_pytorch_is_there_and_not_after() -> None:
    code = """if True:
        import os, sys
        import benchmarks.common
        print("torch" in sys.modules, os.environ.pop("GOMP_SPINCOUNT"))
        import torch, importlib
        importlib.reload(benchmarks)
        print(os.environ.get("GOMP_SPINCOUNT"))
    """
    set_here = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in set_here}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"False {SPINS}", "None"]
