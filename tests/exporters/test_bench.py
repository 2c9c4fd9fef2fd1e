import gc
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import SSDKDError
from exporters.bench import bench, bench_together
from exporters.runtimes import Runtime, open_runtime

Images = NDArray[np.float32]
IMAGE = np.zeros((1, 3, 8, 8), dtype=np.float32)


def runtime_of(call: Callable[[], object], *, name: str = "stand-in", fixed_batch: int | None = None) -> Runtime:
    def run(images: Images) -> Images:
        call()
        return np.zeros((len(images), 2), dtype=np.float32)

    return Runtime(name, Path(f"{name}.onnx"), 1, (3, 8, 8), 2, fixed_batch, {}, run)


def waiting(milliseconds: float) -> Callable[[], None]:
    return lambda: time.sleep(milliseconds / 1e3)


def test_percentiles_and_throughput_of_a_known_duration() -> None:
    latency = bench(runtime_of(waiting(4)), np.repeat(IMAGE, 8, axis=0), min_seconds=0.1, min_repeats=20)
    assert 4 <= latency.p50_ms < 40  # sleep never ends early; a busy machine ends it late
    assert latency.p50_ms <= latency.p90_ms <= latency.p99_ms
    assert latency.repeats >= 20
    assert latency.batch == 8
    assert 0.2 * 8 / latency.p50_ms <= latency.throughput_per_s / 1e3 <= 8 / 4


def test_rare_slow_calls_show_in_p99_alone() -> None:
    calls = iter(range(10**9))
    latency = bench(
        runtime_of(lambda: time.sleep(0.05 if next(calls) % 40 == 39 else 0.0005)),
        IMAGE,
        min_seconds=0.3,
        min_repeats=200,
    )
    assert latency.p99_ms >= 50
    assert latency.p50_ms < 25


def test_files_take_turns_of_equal_time() -> None:
    order: list[str] = []
    fast = runtime_of(lambda: (order.append("fast"), time.sleep(0.002)), name="fast")
    slow = runtime_of(lambda: (order.append("slow"), time.sleep(0.03)), name="slow")
    first, second = bench_together([fast, slow], IMAGE, min_seconds=0.3, min_repeats=5)
    assert (first.runtime, second.runtime) == ("fast", "slow")
    assert first.p50_ms < second.p50_ms
    changes = sum(here != there for here, there in pairwise(order))
    assert changes >= 2 * 5  # not one after the other
    time_of_fast, time_of_slow = first.repeats / first.throughput_per_s, second.repeats / second.throughput_per_s
    assert 0.2 < time_of_fast / time_of_slow < 5


def test_a_median_that_never_settles_ends_the_measuring() -> None:
    started, calls = time.perf_counter(), iter(range(10**9))
    latency = bench(runtime_of(lambda: time.sleep(0.0002 * next(calls))), IMAGE, min_seconds=0.05, min_repeats=10**6)
    assert time.perf_counter() - started < 10
    assert latency.repeats >= 5


def test_batch_that_the_file_does_not_take() -> None:
    with pytest.raises(SSDKDError, match=r"fixed\.onnx takes batches of 4 only, asked for 1") as caught:
        bench(runtime_of(waiting(0), name="fixed", fixed_batch=4), IMAGE)
    assert caught.value.hint == "--batch 4"


def test_garbage_collection_waits_and_goes_on_even_after_an_error() -> None:
    seen: list[bool] = []
    bench(runtime_of(lambda: seen.append(gc.isenabled())), IMAGE, min_seconds=0.01, min_repeats=5)
    assert seen[-1] is False
    assert gc.isenabled()

    def fail() -> None:
        if not gc.isenabled():
            raise SSDKDError("out of memory", "--batch 1")

    with pytest.raises(SSDKDError, match="out of memory"):
        bench(runtime_of(fail), IMAGE)
    assert gc.isenabled()


def test_a_real_file_says_how_it_was_measured(exported: Path) -> None:
    latency = bench(open_runtime(exported, threads=1), np.repeat(IMAGE, 2, axis=0), min_seconds=0.02, min_repeats=10)
    assert (latency.batch, latency.threads) == (2, 1)
    assert latency.runtime.startswith("onnxruntime ")
    assert latency.p50_ms > 0
