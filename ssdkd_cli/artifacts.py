"""Files made from a network: written, proven, scored; for a whole run and for `export`."""

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from torch import nn

from engine.device import Compute
from engine.errors import SSDKDError
from exporters.evaluate import LabelledImages
from exporters.files import write_atomically
from exporters.metadata import input_range
from exporters.precision import to_fp16, to_int8
from exporters.to_onnx import to_onnx
from exporters.to_tensorrt import build_plan, check_builder
from ssdkd_cli import console, runs
from ssdkd_cli.doubts import busy_warnings, crowded_warnings
from ssdkd_cli.plans import PLAN, drop_outdated, for_tensorrt
from ssdkd_cli.precisions import Graph, Integers, half_graph, integer_graph
from ssdkd_cli.proving import Proven, prove, settle, unproven_place
from ssdkd_cli.report import Artifact
from ssdkd_cli.subject import Subject, float_graph
from ssdkd_cli.target import Target
from ssdkd_cli.timing import TEACHER, Timing, measure
from ssdkd_cli.words import size

TRIAL_IMAGES = 4


def try_target(module: nn.Module, target: Target, input_shape: tuple[int, int, int]) -> None:
    """Make every file that was asked for once of an untrained network: better to fail now than after hours.

    Raises SSDKDError where it cannot be exported, or not in that precision or format.
    """
    exported = to_onnx(module, input_shape=input_shape, metadata={})
    random = np.random.default_rng(0).standard_normal((TRIAL_IMAGES, *input_shape), dtype=np.float32)
    graphs = {"fp32": exported}
    if "fp16" in target.asked:
        graphs["fp16"] = to_fp16(exported, half_io=target.half_io)
    if "int8" in target.asked:
        graphs["int8"] = to_int8(exported, random, target.scheme)
    if target.flavour is None:
        return
    check_builder(target.flavour)
    with tempfile.TemporaryDirectory(prefix="ssdkd-") as folder:
        path = Path(folder) / "trial.onnx"
        for precision in target.asked:
            write_atomically(path, graphs[precision].SerializeToString())
            build_plan(
                path,
                path.with_suffix(PLAN),
                precision=precision,
                batches=target.batches,
                workspace_mb=target.profile.workspace_mb,
                timing_cache=None,
                flavour=target.flavour,
            )


@dataclass(frozen=True)
class Made:
    """Files as the report has them; the timings by a file's name, the teacher's beside it; what was warned of."""

    artifacts: tuple[Artifact, ...]
    timings: Mapping[str, Timing]
    teacher_timing: Timing | None
    warnings: tuple[str, ...]


def make(
    subject: Subject,
    target: Target,
    folder: Path,
    *,
    labelled: LabelledImages | None,
    compute: Compute,
    seed: int,
    teacher: Subject | None = None,
    beside: Sequence[Path] = (),
    notes: tuple[str, ...] = (),
) -> Made:
    """Write every file of `target` into `folder`, prove it, score it on `labelled`, and time what is proven.

    In turn with them are timed the `teacher`, if any, and ONNX files that are there, `beside` the new ones. Raises
    SSDKDError where the network cannot be exported, or not in a precision or format that was asked for.
    """
    files = make_files(subject, target, folder, labelled, compute=compute, seed=seed)
    verified = [file for file in files if file.proof.verification.verified]
    of_onnx, plans = ([file.path for file in verified if file.format == name] for name in ("onnx", "trt"))
    earlier = [path for path in beside if of_onnx and path not in of_onnx]
    batch, samples = target.timed_batch, subject.samples.held_out
    teacher_timing, timings, unknown = measure(
        [*of_onnx, *earlier], plans, samples, folder, batch=batch, teacher=teacher
    )
    of_teacher = {TEACHER: teacher_timing} if teacher_timing else {}
    of_files = {path.name: timing for path, timing in timings.items()}
    doubts = [*busy_warnings({**of_teacher, **of_files}, folder), *crowded_warnings(compute.threads)]
    profile = target.profile.name if target.is_named or target.flavour else None
    artifacts = (artifact(file, subject, timings.get(file.path), profile=profile, notes=notes) for file in files)
    return Made(tuple(artifacts), of_files, teacher_timing, (*unknown, *console.warn_all(doubts)))


def make_files(
    subject: Subject,
    target: Target,
    folder: Path,
    labelled: LabelledImages | None,
    *,
    compute: Compute,
    seed: int,
) -> list[Proven]:
    """Write every file of `target` into `folder` and prove it; the ONNX files first, float32 before the others.

    A precision that nobody asked for and that fails is left out with a word. Raises SSDKDError as `make` does.
    """
    exported = float_graph(subject)
    files: list[Proven] = []
    for precision in target.precisions:
        is_asked = precision == "fp32" or precision in target.asked
        try:
            graph = _graph(precision, subject, exported, target, is_asked=is_asked, compute=compute, seed=seed)
        except SSDKDError as error:
            if is_asked:
                raise
            console.warn(f"no {precision} file: {error.message}")
            continue
        file = _write_and_prove(graph, subject, folder, labelled, is_asked=is_asked)
        if file is None:
            continue
        files.append(file)
        if "trt" in target.formats and precision in target.asked and file.proof.verification.verified:
            files += for_tensorrt(file, subject, target, labelled)
        drop_outdated(file.path)
    return files


def _graph(
    precision: str,
    subject: Subject,
    exported: onnx.ModelProto,
    target: Target,
    *,
    is_asked: bool,
    compute: Compute,
    seed: int,
) -> Graph:
    """The network in one precision; what is not asked for is tried without the steps that take long."""
    if precision == "fp32":
        return Graph(precision, exported)
    if precision == "fp16":
        return half_graph(exported, half_io=target.half_io)
    qat, fallback = (target.qat, target.fallback) if is_asked else ("off", False)
    with console.stage("int8", "quantizing, calibrated on synthetic samples") as done:
        graph = integer_graph(subject, exported, Integers(target.scheme, qat, fallback, compute, seed))
        done("; ".join(graph.notes), good=None if graph.loss.is_in_doubt else graph.loss.is_within)
    return graph


def file_name(precision: str, suffix: str) -> str:
    """model.onnx, model.int8.onnx, model.fp16.engine."""
    return f"{runs.MODEL}{'' if precision == 'fp32' else f'.{precision}'}{suffix}"


def file_names(target: Target) -> list[str]:
    """What `make_files` writes."""
    names = [file_name(precision, ".onnx") for precision in target.precisions]
    if "trt" in target.formats:
        names += [file_name(precision, PLAN) for precision in target.asked if target.flavour]
    return names


def _write_and_prove(
    graph: Graph, subject: Subject, folder: Path, labelled: LabelledImages | None, *, is_asked: bool
) -> Proven | None:
    """The ONNX file of `graph`, run against the network; None where it failed and nobody asked.

    Until it is proven it has another name: what is called model.onnx has always been run.
    """
    path = folder / file_name(graph.precision, ".onnx")
    with unproven_place(path) as unproven:
        with console.stage("export", f"writing {path.name}") as done:
            write_atomically(unproven, graph.model.SerializeToString())
            done(f"{path}, {size(unproven.stat().st_size)}")
        with console.stage("proof", f"running {path.name} on held-out synthetic samples") as done:
            proof = prove(unproven, subject, graph.precision, labelled)
            found = proof.verification
            done(found.reason, good=None if found.doubt else bool(found.verified))
        if not found.verified and not is_asked:
            more = ": ask for it with --precision int8, and more is tried" if graph.precision == "int8" else ""
            console.warn(f"no {graph.precision} file{more}")
            return None
        path = settle(unproven, path, failed=not found.verified)
    if not found.verified:
        console.warn(f"the file failed its proof: it was set aside as {path.name}")
    return Proven(path, "onnx", "onnxruntime", graph, proof)


def artifact(
    file: Proven, subject: Subject, timing: Timing | None, *, profile: str | None, notes: tuple[str, ...] = ()
) -> Artifact:
    """What the report says of a file; what was not measured is None. `profile`: the device profile it was made for."""
    content = file.path.read_bytes()
    verification, graph = file.proof.verification, file.graph
    embedded = ("takes images in 0...1",) if subject.embed_preprocessing else ()
    return Artifact(
        path=file.path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        format=file.format,
        precision=graph.precision,
        precision_requested=graph.precision,
        profile=profile,
        size_bytes=len(content),
        runtime=timing.runtime if timing else file.runtime,
        max_abs_error=_finite(verification.max_abs_error),
        agreement=_finite(verification.agreement),
        accuracy=file.proof.accuracy,
        latency_ms=timing.latency_ms if timing else None,
        throughput_per_s=timing.throughput_per_s if timing else None,
        batch=timing.batch if timing else None,
        verified=verification.verified,
        verified_reason=verification.reason,
        notes=(*embedded, *graph.notes, *file.notes, *notes),
        teacher_agreement=file.proof.teacher_agreement,
        integer_share=100 * graph.integer_share,
        float_layers=graph.float_layers,
        input_range=input_range(embed_preprocessing=subject.embed_preprocessing),
        doubt=verification.doubt,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
