"""Files made from a network: written, proven, scored; for a whole run and for `export`."""

import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from torch import nn

from engine.device import Compute
from engine.errors import SSDKDError
from exporters.evaluate import LabelledImages, accuracy
from exporters.files import write_atomically
from exporters.metadata import describe, input_range, preprocessing_of
from exporters.precision import to_fp16, to_int8
from exporters.runtimes import Runtime, open_runtime
from exporters.to_onnx import to_onnx
from exporters.to_tensorrt import build_plan, check_builder
from exporters.verify import rejected_path
from ssdkd_cli import console, runs
from ssdkd_cli.loss import is_in_doubt, most_lost
from ssdkd_cli.plans import PLAN, drop_outdated, for_tensorrt
from ssdkd_cli.precisions import Graph, Integers, half_graph, integer_graph
from ssdkd_cli.proving import Proven, accept, proof_of, unproven_place, with_loss
from ssdkd_cli.report import Artifact
from ssdkd_cli.subject import Subject, agreement, float_graph, predictions
from ssdkd_cli.target import Target
from ssdkd_cli.timing import Timing
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


def make_files(subject: Subject, target: Target, folder: Path, *, compute: Compute, seed: int) -> list[Proven]:
    """Write every file of `target` into `folder` and prove it; the ONNX files first, float32 before the others.

    A precision that nobody asked for and that fails is left out with a word. Raises SSDKDError where the network cannot
    be exported, or not in a precision or format that was asked for.
    """
    exported = float_graph(subject)
    proofs: list[Proven] = []
    for precision in target.precisions:
        is_asked = precision == "fp32" or precision in target.asked
        try:
            graph = _graph(precision, subject, exported, target, is_asked=is_asked, compute=compute, seed=seed)
        except SSDKDError as error:
            if is_asked:
                raise
            console.warn(f"no {precision} file: {error.message}")
            continue
        proof = _write_and_prove(graph, subject, folder, is_asked=is_asked)
        if proof is None:
            continue
        proofs.append(proof)
        if "trt" in target.formats and precision in target.asked and proof.verification.verified:
            proofs += for_tensorrt(proof, subject, target)
        drop_outdated(proof.path)
    return proofs


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
        allowed = most_lost(len(subject.samples.held_out))
        in_doubt = is_in_doubt(graph.loss, allowed)
        done("; ".join(graph.notes), good=None if in_doubt else graph.loss.points <= allowed)
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


def _write_and_prove(graph: Graph, subject: Subject, folder: Path, *, is_asked: bool) -> Proven | None:
    """The ONNX file of `graph`, run on held-out samples against the network; None where it failed and nobody asked.

    Until it is proven it has another name: what is called model.onnx has always been run.
    """
    path = folder / file_name(graph.precision, ".onnx")
    with unproven_place(path) as unproven:
        with console.stage("export", f"writing {path.name}") as done:
            write_atomically(unproven, graph.model.SerializeToString())
            done(f"{path}, {size(unproven.stat().st_size)}")
        with console.stage("proof", f"running {path.name} on held-out synthetic samples") as done:
            found = proof_of(subject, unproven, graph.precision)
            if graph.precision == "int8" and found.verified:
                found = with_loss(found, graph.loss, len(subject.samples.held_out))
            found = replace(found, reason=found.reason.replace(unproven.name, path.name))
            done(found.reason, good=None if found.doubt else bool(found.verified))
        if not found.verified and not is_asked:
            console.warn(f"no {graph.precision} file: ask for it with --precision {graph.precision}, and more is tried")
            return None
        path = accept(unproven, path) if found.verified else unproven.replace(rejected_path(path))
    if not found.verified:
        console.warn(f"the file is not proven to compute what the network computes: it was set aside as {path.name}")
    return Proven(path, "onnx", "onnxruntime", graph, found)


def score_file(runtime: Runtime, labelled: LabelledImages) -> float:
    """The accuracy of a file, percent, on labelled images of its size; preprocessing as it says."""
    mean, std = preprocessing_of(describe(runtime.metadata), channels=runtime.input_shape[0])
    return accuracy(runtime.run, labelled, mean=mean, std=std, batch=runtime.fixed_batch)


def artifact(
    proven: Proven,
    subject: Subject,
    timings: Mapping[Path, Timing],
    labelled: LabelledImages | None,
    *,
    profile: str | None,
    notes: tuple[str, ...] = (),
) -> Artifact:
    """What the report says of a file; what was not measured is None. `profile`: the device profile that was named."""
    content = proven.path.read_bytes()
    timing, verification, graph = timings.get(proven.path), proven.verification, proven.graph
    embedded = ("takes images in 0...1",) if subject.embed_preprocessing else ()
    runtime = open_runtime(proven.path) if verification.verified else None
    return Artifact(
        path=proven.path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        format=proven.format,
        precision=graph.precision,
        precision_requested=graph.precision,
        profile=profile,
        size_bytes=len(content),
        runtime=timing.runtime if timing else proven.runtime,
        max_abs_error=_finite(verification.max_abs_error),
        agreement=_finite(verification.agreement),
        accuracy=score_file(runtime, labelled) if runtime and labelled else None,
        latency_ms=timing.latency_ms if timing else None,
        throughput_per_s=timing.throughput_per_s if timing else None,
        batch=timing.batch if timing else None,
        verified=verification.verified,
        verified_reason=verification.reason,
        notes=(*embedded, *graph.notes, *proven.notes, *notes),
        teacher_agreement=agreement(subject, predictions(subject, runtime.run)) if runtime else None,
        integer_share=100 * graph.integer_share,
        float_layers=graph.float_layers,
        input_range=input_range(embed_preprocessing=subject.embed_preprocessing),
        doubt=verification.doubt,
    )


def timed_paths(proofs: list[Proven]) -> tuple[list[Path], list[Path]]:
    """The ONNX files and the plans that are worth timing: those that are verified."""
    verified = [proof for proof in proofs if proof.verification.verified]
    of_onnx, of_tensorrt = ([proof.path for proof in verified if proof.format == name] for name in ("onnx", "trt"))
    return of_onnx, of_tensorrt


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
