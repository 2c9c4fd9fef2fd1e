"""The processors that this process may use, and how its threads wait for each other. Imports no PyTorch."""

import os
from collections.abc import MutableMapping
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "microseconds period" of this container
SPINS = 6000  # a few tenths of a millisecond; the threads' own default is 50 times as long (docs/experiments.md)


def available_threads() -> int:
    """How many processors this process may use: its affinity, or less where a container has a smaller share."""
    share = _share_of_container()
    return min(_processors(), share) if share else _processors()


def computing_threads() -> int:
    """How many threads a runtime shall compute with: as many as OMP_NUM_THREADS says, which is PyTorch's, or all."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(said) if said.isdecimal() and int(said) > 0 else available_threads()


def share_processors(environment: MutableMapping[str, str]) -> None:
    """Tell the OpenMP threads of PyTorch, which reads this when it is first imported, to mind other work.

    No more of them than a container may use, and, where OpenMP is GNU's as in PyTorch's own packages for Linux, none
    that waits long by spinning, which keeps its processor from whoever has work. What the user has set stays.
    """
    if available_threads() < _processors():  # else PyTorch's own choice stays: it knows physical cores
        environment.setdefault("OMP_NUM_THREADS", str(available_threads()))
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPINS))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_of_container() -> int | None:
    """Whole processors that the container may keep busy, at least one; None without a limit."""
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return None
