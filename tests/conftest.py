import os
import shutil

import pytest

from engine.processors import available_threads

# Workers share the cores: OpenMP threads of each, which spin while they wait, would take them from the others.
# Read when PyTorch is first imported, here and in what the tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_DYNAMIC", "false")  # what else runs must not change what a seed gives


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One for each processor, 8 at most; one where there is a GPU, which its tests do not share."""
    return 1 if shutil.which("nvidia-smi") else min(8, available_threads())
