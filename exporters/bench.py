"""How long a model file takes: percentiles of many single calls, several files measured in turn."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError
from exporters.runtimes import Runtime

WARM_UP_SECONDS = 0.2
WARM_UP_CALLS = 3
BLOCK_CALLS = 10  # calls of one file in a row, so that its weights are in the caches as they are in production
STABLE = 0.02  # the medians of the first and second half of the calls differ by at most this share
GIVE_UP_FACTOR = 8  # times min_seconds: a file's measuring ends here, stable or not


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call at a batch size, as percentiles over `repeats` calls, and images per second."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput_per_s: float
    batch: int
    threads: int
    runtime: str
    repeats: int


def bench(runtime: Runtime, images: NDArray[np.float32], *, min_seconds: float = 1.0, min_repeats: int = 50) -> Latency:
    """Time `runtime` on one batch of images [B, C, H, W]; see bench_together."""
    return bench_together([runtime], images, min_seconds=min_seconds, min_repeats=min_repeats)[0]


def bench_together(
    runtimes: Sequence[Runtime],
    images: NDArray[np.float32],
    *,
    min_seconds: float = 1.0,
    min_repeats: int = 50,
) -> list[Latency]:
    """Time several runtimes on the same batch [B, C, H, W], in turn, so that noise of the machine hits all alike.

    Each is warmed up, then called for at least `min_seconds` and `min_repeats` times, until its median is stable, at
    most eight times `min_seconds`. Raises SSDKDError where a file takes another batch size.
    """
    batch = len(images)
    for runtime in runtimes:
        if runtime.fixed_batch not in (None, batch):
            raise SSDKDError(
                f"{runtime.path} takes batches of {runtime.fixed_batch} only, asked for {batch}",
                f"--batch {runtime.fixed_batch}",
            )
        _warm_up(runtime, images)
    nanoseconds: list[list[int]] = [[] for _ in runtimes]
    open_indices = list(range(len(runtimes)))
    while open_indices:
        for index in open_indices:
            nanoseconds[index] += _time_block(runtimes[index], images)
        open_indices = [index for index in open_indices if not _measured(nanoseconds[index], min_seconds, min_repeats)]
    return [_latency(runtime, taken, batch) for runtime, taken in zip(runtimes, nanoseconds, strict=True)]


def _warm_up(runtime: Runtime, images: NDArray[np.float32]) -> None:
    started, calls = time.perf_counter(), 0
    while calls < WARM_UP_CALLS or time.perf_counter() - started < WARM_UP_SECONDS:
        runtime.run(images)
        calls += 1


def _time_block(runtime: Runtime, images: NDArray[np.float32]) -> list[int]:
    runtime.run(images)  # not timed: the file before it left the caches full of its own weights
    taken = []
    for _ in range(BLOCK_CALLS):
        started = time.perf_counter_ns()
        runtime.run(images)
        taken.append(time.perf_counter_ns() - started)
    return taken


def _measured(taken: list[int], min_seconds: float, min_repeats: int) -> bool:
    seconds = sum(taken) / 1e9
    if seconds >= GIVE_UP_FACTOR * min_seconds:
        return True
    if seconds < min_seconds or len(taken) < min_repeats:
        return False
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
        threads=runtime.threads,
        runtime=runtime.name,
        repeats=len(taken),
    )
