"""How long files take on this machine: the teacher and the student's files in turn, TensorRT plans on the GPU."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError
from exporters.bench import Latency, bench_together
from exporters.files import write_atomically
from exporters.runtimes import Runtime, open_runtime, to_input
from exporters.tensorrt_sidecar import read_sidecar
from ssdkd_cli import console
from ssdkd_cli.report import Percentiles
from ssdkd_cli.subject import Subject, float_graph
from ssdkd_cli.words import milliseconds

BATCHES = (32, 16, 8, 4, 2, 1)  # of the throughput: the largest that stays below BATCH_SECONDS a call
BATCH_SECONDS = 0.4
TEACHER = "the teacher"  # as `busy_warnings` is given it
BENCH_SECONDS = 0.25  # each file at each batch size is called for at least so long; twice that said the same (log)


@dataclass(frozen=True)
class Timing:
    """Of one file: latency of a single image, throughput at the larger `batch`.

    `latency_batch` is 1, or the size of a file that takes one batch size only; `batch` is then the same.
    """

    latency_ms: Percentiles
    latency_batch: int
    throughput_per_s: float
    batch: int
    runtime: str


def measure(
    paths: Sequence[Path],
    plans: Sequence[Path],
    samples: NDArray[np.uint8],
    folder: Path,
    *,
    batch: int | None,
    teacher: Subject | None = None,
) -> tuple[Timing | None, dict[Path, Timing], list[str]]:
    """The timings of ONNX files (and of the teacher as one, in turn with them), then of plans on the GPU.

    `samples`: uint8 [N, H, W, C]. `batch`: of the throughput; None: as large as suits the machine. What cannot be timed
    has none; the warnings, which were said, name it.
    """
    if not paths and not plans:
        return None, {}, []
    warnings: list[str] = []
    with console.stage("speed", f"timing {', '.join(path.name for path in (*paths, *plans))}") as done:
        runtimes = [open_runtime(path) for path in paths]
        of_teacher = None
        if runtimes and teacher is not None:
            of_teacher, timed, warnings = _beside_teacher(runtimes, samples, folder, batch, teacher)
        else:
            timed = time_files(runtimes, samples, batch=batch) if runtimes else []
        timings = dict(zip(paths, timed, strict=True))
        for plan in plans:
            try:
                timings[plan] = time_plan_file(plan, batch or BATCHES[0])
            except SSDKDError as error:
                warnings += console.warn_all([f"the latency of {plan.name} is unknown: {error.message}"])
        words = [f"{path.name} {milliseconds(timing.latency_ms.p50)}" for path, timing in timings.items()]
        if of_teacher:
            words.insert(0, f"teacher {milliseconds(of_teacher.latency_ms.p50)}")
        done(", ".join(words))
    return of_teacher, timings, warnings


def _beside_teacher(
    runtimes: Sequence[Runtime],
    samples: NDArray[np.uint8],
    folder: Path,
    batch: int | None,
    teacher: Subject,
) -> tuple[Timing | None, list[Timing], list[str]]:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".teacher-") as temporary:
        beside = Path(temporary) / "teacher.onnx"
        try:
            write_atomically(beside, float_graph(teacher).SerializeToString())
            of_teacher, *timed = time_files([open_runtime(beside), *runtimes], samples, batch=batch)
        except SSDKDError as error:
            warnings = console.warn_all([f"the teacher's latency is unknown: {error.message}"])
            return None, time_files(runtimes, samples, batch=batch), warnings
    return of_teacher, timed, []


def time_files(runtimes: Sequence[Runtime], samples: NDArray[np.uint8], *, batch: int | None = None) -> list[Timing]:
    """Time files of the same input in turn, on the CPU, with `samples` uint8 [N, H, W, C] as images.

    `batch`: of the throughput; None: the largest of BATCHES that does not take too long. Where a file takes a single
    batch size, all are timed at that one alone. Raises SSDKDError for a file that cannot be run, or not at the batch
    size of another.
    """
    fixed = [runtime.fixed_batch for runtime in runtimes if runtime.fixed_batch is not None]
    batches = tuple(fixed[:1]) or ((batch, 1) if batch else BATCHES)
    first = min(batches)
    images = to_input(samples[np.arange(max(batches)) % len(samples)], (0.5,), (0.25,))  # [largest batch, C, H, W]
    single = bench_together(runtimes, images[:first], min_seconds=BENCH_SECONDS)
    slowest_seconds = max(latency.p50_ms for latency in single) / first / 1e3  # of one image
    fits = (size for size in batches if size in (batch, first) or size * slowest_seconds <= BATCH_SECONDS)
    most = next(fits)
    many = bench_together(runtimes, images[:most], min_seconds=BENCH_SECONDS) if most > first else single
    return [_timing(one, several) for one, several in zip(single, many, strict=True)]


def time_plan_file(path: Path, batch: int) -> Timing:
    """Time a TensorRT plan on the GPU, by its clock and replayed from a CUDA graph, at 1 and at most `batch` images.

    Raises SSDKDError for a plan that cannot run here.
    """
    from exporters.tensorrt_runtime import time_plan

    bounds = read_sidecar(path).input
    sizes = bounds.min[0], min(batch, bounds.max[0])
    return _timing(*(time_plan(path, size, cuda_graph=True, min_seconds=BENCH_SECONDS) for size in sizes))


def _timing(single: Latency, several: Latency) -> Timing:
    percentiles = Percentiles(p50=single.p50_ms, p90=single.p90_ms, p99=single.p99_ms)
    return Timing(percentiles, single.batch, several.throughput_per_s, several.batch, single.runtime)
