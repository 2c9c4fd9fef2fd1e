"""The clock is a stand-in that only a call of a model moves: what is measured is exact, however busy the machine is."""

import gc
from collections.abc import Callable, Iterator
from itertools import count, groupby, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import SSDKDError
from exporters.bench import Latency, _latency, bench_together
from exporters.runtimes import Runtime, open_runtime

Images = NDArray[np.float32]
IMAGE = np.zeros((1, 3, 8, 8), dtype=np.float32)


class Machine:
    """A clock, in nanoseconds, the order in which models were called, and the nanoseconds that counted of the last."""

    def __init__(self) -> None:
        self.nanoseconds = 0
        self.calls: list[str] = []
        self.counted: list[int] = []

    def runtime(self, milliseconds: Iterator[float], *, name: str = "model", fixed_batch: int | None = None) -> Runtime:
        def run(images: Images) -> Images:
            self.calls.append(name)
            self.nanoseconds += round(next(milliseconds) * 1e6)
            return np.zeros((len(images), 2), dtype=np.float32)

        return Runtime(name, Path(f"{name}.onnx"), (3, 8, 8), 2, fixed_batch, {}, run)


def bench(runtime: Runtime, images: Images, **options: float) -> Latency:
    return bench_together([runtime], images, **options)[0]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    clock = SimpleNamespace(perf_counter=lambda: made.nanoseconds / 1e9, perf_counter_ns=lambda: made.nanoseconds)
    monkeypatch.setattr("exporters.bench.time", clock)

    def latency(runtime: Runtime, taken: list[int], batch: int) -> Latency:
        made.counted = taken
        return _latency(runtime, taken, batch)

    monkeypatch.setattr("exporters.bench._latency", latency)
    return made


def test_percentiles_and_throughput(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    durations = (rng.choice([1.0, 2.0, 10.0], p=[0.6, 0.35, 0.05]) for _ in count())
    latency = bench(machine.runtime(durations), np.repeat(IMAGE, 8, axis=0), min_seconds=10)
    assert (latency.p50_ms, latency.p90_ms, latency.p99_ms) == (1.0, 2.0, 10.0)
    assert latency.throughput_per_s == pytest.approx(8 / (0.6 * 1e-3 + 0.35 * 2e-3 + 0.05 * 10e-3), rel=0.05)
    assert (latency.batch, latency.runtime) == (8, "model")


@pytest.mark.parametrize(("milliseconds", "repeats"), [(1.0, 1000), (10.0, 100), (50.0, 50)])
def test_both_minima_hold(machine: Machine, milliseconds: float, repeats: int) -> None:
    latency = bench(machine.runtime(repeat(milliseconds)), IMAGE, min_seconds=1.0, min_repeats=50)
    assert latency.p50_ms == latency.p99_ms == milliseconds
    assert repeats <= len(machine.counted) <= repeats * 1.05


def test_files_take_short_turns_of_equal_time(machine: Machine) -> None:
    fast, slow = machine.runtime(repeat(1.0), name="fast"), machine.runtime(repeat(40.0), name="slow")
    first, second = bench_together([fast, slow], IMAGE)
    assert (first.p50_ms, second.p50_ms) == (1.0, 40.0)
    turns = [(name, len(list(calls))) for name, calls in groupby(machine.calls)][2:]  # without the warm-up
    assert [name for name, _ in turns] == ["fast", "slow"] * (len(turns) // 2)
    assert all(99 <= calls * {"fast": 1, "slow": 40}[name] <= 160 for name, calls in turns)  # milliseconds


@pytest.mark.parametrize("milliseconds", [1.0, 27.0])
def test_a_file_is_not_timed_while_the_threads_of_the_one_before_it_spin(machine: Machine, milliseconds: float) -> None:
    """For 35 ms after another file's last call each call takes twice as long."""
    switched = 0

    def durations() -> Iterator[float]:
        nonlocal switched
        while True:
            if len(machine.calls) < 2 or machine.calls[-2] != machine.calls[-1]:
                switched = machine.nanoseconds
            yield milliseconds * (2 if machine.nanoseconds - switched < 35e6 else 1)

    both = [machine.runtime(durations(), name=name) for name in ("one", "two")]
    assert [(latency.p50_ms, latency.p99_ms) for latency in bench_together(both, IMAGE)] == [(milliseconds,) * 2] * 2


def test_measuring_goes_on_until_the_median_is_stable(machine: Machine) -> None:
    settling = (2.0 if call < 450 else 1.0 for call in count())
    latency = bench(machine.runtime(settling), IMAGE, min_seconds=1.0)
    assert latency.p50_ms == 1.0
    assert len(machine.counted) > 1200  # after one second it is 650: half of them at 2 ms


def test_a_median_that_never_settles_ends_after_four_times_the_least(machine: Machine) -> None:
    bench(machine.runtime(1.01**call for call in count()), IMAGE, min_seconds=1.0)
    assert 4.0 <= sum(machine.counted) / 1e9 < 4.2


def test_a_very_slow_file_is_called_five_times(machine: Machine) -> None:
    assert bench(machine.runtime(repeat(9000.0)), IMAGE).p50_ms == 9000
    assert len(machine.counted) == 5


def test_batch_that_the_file_does_not_take(machine: Machine) -> None:
    with pytest.raises(SSDKDError, match=r"fixed\.onnx takes batches of 4 only, asked for 1") as caught:
        bench(machine.runtime(repeat(1.0), name="fixed", fixed_batch=4), IMAGE)
    assert caught.value.hint == "time it alone: ssdkd bench fixed.onnx"


def calling(machine: Machine, call: Callable[[], None]) -> Runtime:
    def durations() -> Iterator[float]:
        while True:
            call()
            yield 1.0

    return machine.runtime(durations())


def test_garbage_collection_waits_and_goes_on_even_after_an_error(machine: Machine) -> None:
    seen: list[bool] = []
    bench(calling(machine, lambda: seen.append(gc.isenabled())), IMAGE)
    assert seen[-1] is False
    assert gc.isenabled()

    def fail() -> None:
        if not gc.isenabled():
            raise SSDKDError("out of memory", "--batch 1")

    with pytest.raises(SSDKDError, match="out of memory"):
        bench(calling(machine, fail), IMAGE)
    assert gc.isenabled()


def test_a_real_file_on_the_real_clock(exported: Path) -> None:
    latency = bench(open_runtime(exported), np.repeat(IMAGE, 2, axis=0), min_seconds=0.02, min_repeats=10)
    assert latency.batch == 2
    assert latency.runtime.startswith("onnxruntime ")
    assert 0 < latency.p50_ms <= latency.p90_ms <= latency.p99_ms
    assert latency.throughput_per_s > 0
