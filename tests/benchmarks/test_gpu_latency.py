import subprocess
import sys

import pytest
import torch

from benchmarks.gpu_latency import percentiles, tried
from engine.errors import SSDKDError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so() -> None:
    ran = subprocess.run([sys.executable, "-m", "benchmarks.gpu_latency"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "no CUDA GPU" in ran.stderr


def test_what_cannot_run_is_written_down_with_its_reason() -> None:
    def refuse() -> dict[str, float]:
        raise SSDKDError("TensorRT is not installed", "pip install it")

    assert tried(refuse) == {"not_run": "TensorRT is not installed"}
    assert tried(lambda: {"p50": 1.0}) == {"latency_ms": {"p50": 1.0}}


def test_percentiles() -> None:
    assert percentiles([float(number) for number in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
