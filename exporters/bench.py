"""How long a model file takes: percentiles of many single calls, several files measured in turn."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError
from exporters.runtimes import Runtime

WARM_UP_SECONDS = 0.2
WARM_UP_CALLS = 2  # the first call plans its memory
TURN_SECONDS = 0.06  # of one file before the next has its turn: short against the moods of a busy machine
SETTLE_SECONDS = 0.04  # before a turn counts: so long the threads of the file before it spin, and hold a core
STABLE = 0.03  # the medians of the first and second half of the calls differ by at most this share
GIVE_UP = 4  # times min_seconds: measuring ends here, stable or not
FEWEST_CALLS = 5  # even so


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call at a batch size, as percentiles over many calls, and images per second."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput_per_s: float
    batch: int
    runtime: str


def bench_together(
    runtimes: Sequence[Runtime],
    images: NDArray[np.float32],
    *,
    min_seconds: float = 1.0,
    min_repeats: int = 50,
) -> list[Latency]:
    """Time several runtimes on the same batch [B, C, H, W], in short turns of equal length: noise hits all alike.

    After a warm-up each is called for at least `min_seconds` and `min_repeats` times, until every median is stable;
    where the machine is too busy for that, or the file too slow, it ends after four times `min_seconds` of each.
    All of them are measured to the same end. Raises SSDKDError where a file takes another batch size.
    """
    batch, turn_seconds = len(images), TURN_SECONDS
    settle_seconds = SETTLE_SECONDS if len(runtimes) > 1 else 0.0
    for runtime in runtimes:
        if runtime.fixed_batch not in (None, batch):
            raise SSDKDError(
                f"{runtime.path} takes batches of {runtime.fixed_batch} only, asked for {batch}",
                f"time it alone: ssdkd bench {runtime.path}",
            )
        turn_seconds = max(turn_seconds, _warm_up(runtime, images))
    taken: list[list[int]] = [[] for _ in runtimes]  # nanoseconds, a list a runtime
    collecting = gc.isenabled()
    gc.disable()  # a full collection in a process that has loaded torch takes longer than a small network
    try:
        while not _enough(taken, min_seconds, min_repeats):
            for runtime, own in zip(runtimes, taken, strict=True):
                own += _take_turn(runtime, images, settle_seconds, turn_seconds)
    finally:
        if collecting:
            gc.enable()
    return [_latency(runtime, own, batch) for runtime, own in zip(runtimes, taken, strict=True)]


def _warm_up(runtime: Runtime, images: NDArray[np.float32]) -> float:
    """Return the seconds of a call of a file that is warm."""
    started, calls, seconds = time.perf_counter(), 0, 0.0
    while calls < WARM_UP_CALLS or time.perf_counter() - started < WARM_UP_SECONDS:
        call_started = time.perf_counter()
        runtime.run(images)
        seconds = time.perf_counter() - call_started
        calls += 1
    return seconds


def _take_turn(runtime: Runtime, images: NDArray[np.float32], settle_seconds: float, turn_seconds: float) -> list[int]:
    """Return the nanoseconds of each call of one turn, at least one; those of its first `settle_seconds` do not count.

    ONNX Runtime's threads wait for more work by spinning. On two cores a ResNet-56 of 27 ms took 52 ms where the
    threads of another file, which had just been called, held the second core (docs/experiments.md).
    """
    turn_started = time.perf_counter()
    while time.perf_counter() - turn_started < settle_seconds:
        runtime.run(images)
    taken: list[int] = []
    turn_started = time.perf_counter()
    while not taken or time.perf_counter() - turn_started < turn_seconds:
        started = time.perf_counter_ns()
        runtime.run(images)
        taken.append(time.perf_counter_ns() - started)
    return taken


def _enough(taken: Sequence[list[int]], min_seconds: float, min_repeats: int) -> bool:
    fewest, shortest = min(map(len, taken)), min(sum(own) for own in taken) / 1e9  # calls, seconds
    if fewest < FEWEST_CALLS or shortest < min_seconds:
        return False
    return shortest >= GIVE_UP * min_seconds or (fewest >= min_repeats and all(map(_is_stable, taken)))


def _is_stable(taken: list[int]) -> bool:
    half = len(taken) // 2
    first, second = float(np.median(taken[:half])), float(np.median(taken[half:]))
    return abs(first - second) <= STABLE * min(first, second)


def _latency(runtime: Runtime, taken: list[int], batch: int) -> Latency:
    p50_ms, p90_ms, p99_ms = (float(value) for value in np.percentile(np.asarray(taken) / 1e6, (50, 90, 99)))
    return Latency(
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p99_ms=p99_ms,
        throughput_per_s=batch * len(taken) / (sum(taken) / 1e9),
        batch=batch,
        runtime=runtime.name,
    )
