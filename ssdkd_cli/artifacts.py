"""Files made from a student: written, proven, timed, scored; for a whole run and for `export`, `eval` and `bench`."""

import hashlib
import importlib.util
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from engine.errors import SSDKDError
from exporters import FORMATS
from exporters.bench import Latency, bench_together
from exporters.evaluate import LabelledImages, accuracy
from exporters.metadata import describe, metadata_for, preprocessing_of
from exporters.runtimes import Runtime, open_runtime, to_input
from exporters.verify import Verification, reject, verify
from ssdkd_cli import console, runs
from ssdkd_cli.report import Artifact, Percentiles
from ssdkd_cli.runs import StudentCard
from ssdkd_cli.words import milliseconds, size

BATCHES = (32, 16, 8, 4, 2, 1)  # of the throughput: the largest that stays below BATCH_SECONDS a call
BATCH_SECONDS = 0.4
BENCH_SECONDS = 0.5  # each file at each batch size is called for at least so long


@dataclass(frozen=True)
class Proven:
    """A file that was written and compared with the student; it is called *.rejected where it failed."""

    path: Path
    format: str
    verification: Verification
    embed_preprocessing: bool


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


def check_formats(names: Sequence[str]) -> None:
    """Raises SSDKDError for a format that does not exist or whose packages are not installed."""
    for name in names:
        if name not in FORMATS:
            raise SSDKDError(f"there is no export format '{name}'", f"use --export {' or '.join(FORMATS)}")
        missing = [package for package in FORMATS[name].requires if importlib.util.find_spec(package) is None]
        if missing:
            raise SSDKDError(f"--export {name} needs {', '.join(missing)}", f"pip install {' '.join(missing)}")


def write_format(name: str, module: nn.Module, path: Path, card: StudentCard, *, embed_preprocessing: bool) -> None:
    """Write `module` in one of FORMATS. Raises SSDKDError where it cannot be exported, OSError where not written."""
    from exporters.to_onnx import WithPreprocessing

    metadata = metadata_for(
        input_shape=card.input_shape,
        classes=card.classes,
        class_names=card.class_names,
        mean=card.mean,
        std=card.std,
        embed_preprocessing=embed_preprocessing,
        teacher_sha256=card.teacher_sha256,
    )
    network = WithPreprocessing(module, card.mean, card.std).eval() if embed_preprocessing else module
    FORMATS[name].write(network, path, input_shape=card.input_shape, metadata=metadata)


def try_export(module: nn.Module, formats: Sequence[str], input_shape: tuple[int, int, int]) -> None:
    """Raises SSDKDError where `module` cannot be exported: better now than after hours of distilling."""
    with tempfile.TemporaryDirectory(prefix="ssdkd-") as temporary:
        for name in formats:
            FORMATS[name].write(module, Path(temporary) / runs.MODEL, input_shape=input_shape, metadata={})


def export_and_prove(
    name: str,
    module: nn.Module,
    folder: Path,
    samples: NDArray[np.uint8],
    card: StudentCard,
    *,
    embed_preprocessing: bool,
) -> Proven:
    """Write folder/model.<suffix> and run it on `samples`, uint8 [N, H, W, C], against `module`.

    Raises SSDKDError where the module cannot be exported; a file that fails its proof is renamed and returned.
    """
    path = folder / f"{runs.MODEL}{FORMATS[name].suffix}"
    with console.stage("export", f"writing {path.name}") as done:
        write_format(name, module, path, card, embed_preprocessing=embed_preprocessing)
        done(f"{path}, {size(path.stat().st_size)}")
    with console.stage("proof", f"running {path.name} on {len(samples)} held-out synthetic samples") as done:
        verification = verify(module, path, samples, mean=card.mean, std=card.std)
        if not verification.verified:
            path = reject(path)
        done(verification.reason, good=verification.verified)
    if not verification.verified:
        console.warn(f"the file is not proven to compute what the student computes: it was set aside as {path.name}")
    return Proven(path, name, verification, embed_preprocessing)


def time_files(runtimes: Sequence[Runtime], samples: NDArray[np.uint8]) -> list[Timing]:
    """Time files of the same input in turn, on the CPU, with `samples` uint8 [N, H, W, C] as images.

    Where one takes a single batch size, all are timed at that one alone. Raises SSDKDError for a file that cannot
    be run, or not at the batch size of another.
    """
    fixed = [runtime.fixed_batch for runtime in runtimes if runtime.fixed_batch is not None]
    batches = fixed[:1] or BATCHES
    first = min(batches)
    images = to_input(samples[np.arange(max(batches)) % len(samples)], (0.5,), (0.25,))  # [largest batch, C, H, W]
    single = bench_together(runtimes, images[:first], min_seconds=BENCH_SECONDS)
    slowest_seconds = max(latency.p50_ms for latency in single) / first / 1e3  # of one image
    batch = next(batch for batch in batches if batch * slowest_seconds <= BATCH_SECONDS or batch == first)
    many = bench_together(runtimes, images[:batch], min_seconds=BENCH_SECONDS) if batch > first else single
    return [_timing(one, several) for one, several in zip(single, many, strict=True)]


def _timing(single: Latency, several: Latency) -> Timing:
    percentiles = Percentiles(p50=single.p50_ms, p90=single.p90_ms, p99=single.p99_ms)
    return Timing(percentiles, single.batch, several.throughput_per_s, several.batch, single.runtime)


def measure(
    teacher: nn.Module, proofs: Sequence[Proven], folder: Path, samples: NDArray[np.uint8], card: StudentCard
) -> tuple[Timing | None, dict[Path, Timing]]:
    """The timings of the teacher as ONNX and of the proven files, taken in turn; None for a teacher that cannot be."""
    paths = [proof.path for proof in proofs if proof.verification.verified]
    if not paths:
        return None, {}
    with console.stage("speed", "timing teacher and student in turn") as done:
        students = [open_runtime(path) for path in paths]
        with tempfile.TemporaryDirectory(dir=folder, prefix=".teacher-") as temporary:
            beside = Path(temporary) / "teacher.onnx"
            unknown = ""
            try:
                write_format("onnx", teacher, beside, card, embed_preprocessing=False)
                teacher_timing, *timings = time_files([open_runtime(beside), *students], samples)
            except SSDKDError as error:
                unknown = error.message
                teacher_timing, timings = None, time_files(students, samples)
        words = [
            f"{path.name} {milliseconds(timing.latency_ms.p50)}" for path, timing in zip(paths, timings, strict=True)
        ]
        if teacher_timing:
            words.insert(0, f"teacher {milliseconds(teacher_timing.latency_ms.p50)}")
        done(", ".join(words))
    if unknown:
        console.warn(f"the teacher's latency is unknown: {unknown}")
    return teacher_timing, dict(zip(paths, timings, strict=True))


def score_file(runtime: Runtime, labelled: LabelledImages) -> float:
    """The accuracy of a file, percent, on labelled images of its size; preprocessing as it says."""
    mean, std = preprocessing_of(describe(runtime.metadata), channels=runtime.input_shape[0])
    return accuracy(runtime.run, labelled, mean=mean, std=std, batch=runtime.fixed_batch)


def artifact(
    proven: Proven,
    folder: Path,
    timings: Mapping[Path, Timing],
    labelled: LabelledImages | None,
    notes: Sequence[str] = (),
) -> Artifact:
    """What the report says of a file; what was not measured is None."""
    content = proven.path.read_bytes()
    timing = timings.get(proven.path)
    verification = proven.verification
    runnable = verification.verified and labelled is not None
    return Artifact(
        path=proven.path.relative_to(folder).as_posix(),
        sha256=hashlib.sha256(content).hexdigest(),
        format=proven.format,
        precision="fp32",
        precision_requested="fp32",
        profile=None,
        size_bytes=len(content),
        runtime=timing.runtime if timing else "onnxruntime",
        max_abs_error=_finite(verification.max_abs_error),
        agreement=_finite(verification.agreement),
        accuracy=score_file(open_runtime(proven.path), labelled) if runnable and labelled is not None else None,
        latency_ms=timing.latency_ms if timing else None,
        throughput_per_s=timing.throughput_per_s if timing else None,
        batch=timing.batch if timing else None,
        verified=verification.verified,
        verified_reason=verification.reason,
        notes=("takes images in 0...1", *notes) if proven.embed_preprocessing else tuple(notes),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
