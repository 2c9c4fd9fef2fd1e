"""Files made from a network: written, proven, scored; for a whole run and for `export`."""

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from engine.device import Compute
from engine.errors import SSDKDError
from engine.hashing import sha256_of
from exporters import FORMATS
from exporters.evaluate import LabelledImages, accuracy
from exporters.files import write_atomically
from exporters.metadata import describe, preprocessing_of
from exporters.precision import to_fp16, to_int8
from exporters.runtimes import Runtime, open_runtime
from exporters.tensorrt_sidecar import (
    Sidecar,
    check_precision,
    check_sidecar,
    precision_notes,
    read_sidecar,
    sidecar_path,
)
from exporters.to_onnx import to_onnx
from exporters.to_tensorrt import build_plan, check_builder
from exporters.verify import Verification, rejected_path, verify
from ssdkd_cli import console, runs
from ssdkd_cli.precisions import (
    Graph,
    Integers,
    Loss,
    Subject,
    agreement,
    float_graph,
    half_graph,
    integer_graph,
    loses_too_much,
    loss_of,
    most_lost,
    predictions,
)
from ssdkd_cli.report import Artifact
from ssdkd_cli.target import Target
from ssdkd_cli.timing import Timing
from ssdkd_cli.words import size

TRIAL_IMAGES = 4
PROOF_SAMPLES = 256  # held-out samples that float files are proven on; INT8 files are on all
NOT_RUN = "it cannot run on this machine"
PLAN = FORMATS["trt"].suffix


@dataclass(frozen=True)
class Proven:
    """A file that was written and compared with the network; it is called *.rejected where it failed."""

    path: Path
    format: str
    runtime: str  # what is to run it
    graph: Graph
    verification: Verification
    notes: tuple[str, ...] = ()


def try_target(module: nn.Module, target: Target, input_shape: tuple[int, int, int]) -> None:
    """Make every file that was asked for once of an untrained network: better to fail now than after hours.

    Raises SSDKDError where it cannot be exported, or not in that precision or format.
    """
    exported = to_onnx(module, input_shape=input_shape, metadata={})
    random = np.random.default_rng(0).standard_normal((TRIAL_IMAGES, *input_shape), dtype=np.float32)
    graphs = {"fp32": exported}
    if "fp16" in target.asked:
        graphs["fp16"] = to_fp16(exported)
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
            proofs += _for_tensorrt(proof, subject, target)
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
        return half_graph(exported)
    qat, fallback = (target.qat, target.fallback) if is_asked else ("off", False)
    with console.stage("int8", "quantizing, calibrated on synthetic samples") as done:
        graph = integer_graph(subject, exported, Integers(target.scheme, qat, fallback, compute, seed))
        done("; ".join(graph.notes), good=not loses_too_much(graph.loss, most_lost(len(subject.samples.held_out))))
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
    with _unproven(path) as unproven:
        with console.stage("export", f"writing {path.name}") as done:
            write_atomically(unproven, graph.model.SerializeToString())
            done(f"{path}, {size(unproven.stat().st_size)}")
        with console.stage("proof", f"running {path.name} on held-out synthetic samples") as done:
            found = _verified(subject, unproven, graph.precision)
            if graph.precision == "int8" and found.verified:
                found = _with_loss(found, graph.loss, len(subject.samples.held_out))
            found = replace(found, reason=found.reason.replace(unproven.name, path.name))
            done(found.reason, good=bool(found.verified))
        if not found.verified and not is_asked:
            console.warn(f"no {graph.precision} file: ask for it with --precision {graph.precision}, and more is tried")
            return None
        path = accept(unproven, path) if found.verified else unproven.replace(rejected_path(path))
    if not found.verified:
        console.warn(f"the file is not proven to compute what the student computes: it was set aside as {path.name}")
    return Proven(path, "onnx", "onnxruntime", graph, found)


def _with_loss(found: Verification, loss: Loss, samples: int) -> Verification:
    """`found`, and a word on what an INT8 file loses against the teacher; where that is too much it is not verified."""
    allowed = most_lost(samples)
    if loss.points <= allowed:
        return found
    is_too_much = loses_too_much(loss, allowed)
    verdict = "" if is_too_much else f"; on {samples} samples the difference may be chance"
    said = f"it loses {loss.points:.2f} points of agreement with the teacher, {allowed:.2f} may be lost{verdict}"
    return replace(found, verified=not is_too_much, reason=f"{said}; {found.reason}")


@contextlib.contextmanager
def _unproven(path: Path) -> Iterator[Path]:
    """Where a file is until it is proven, beside its own place; what is still there at the end is deleted."""
    beside = path.with_name(f".unproven-{path.name}")
    try:
        yield beside
    finally:
        for file in (beside, sidecar_path(beside)):
            file.unlink(missing_ok=True)


def accept(unproven: Path, path: Path) -> Path:
    """Give a proven file its own name, over an earlier one, and drop the reject of that name."""
    for file in (rejected_path(path), sidecar_path(rejected_path(path))):
        file.unlink(missing_ok=True)
    return unproven.replace(path)


def drop_outdated(path: Path) -> None:
    """Delete the plan and the build script that were made of another ONNX file than the one now at `path`.

    A plan whose sidecar does not say what it was made of is not ours to delete: that is said.
    """
    plan = path.with_suffix(PLAN)
    script = plan.with_name(f"build_{plan.name}.sh")
    if plan.exists():
        try:
            sidecar = read_sidecar(plan)
        except SSDKDError as error:
            console.warn(f"{plan} may be of another network than {path.name}: {error.message}")
        else:
            if sidecar.onnx_sha256 != sha256_of(path):
                plan.unlink()
                sidecar_path(plan).unlink()
    if script.exists() and sha256_of(path) not in script.read_text(encoding="utf-8"):
        script.unlink()


def _for_tensorrt(proof: Proven, subject: Subject, target: Target) -> list[Proven]:
    """The TensorRT plan of a proven ONNX file; where the device builds it itself, the script that does."""
    from exporters.jetson import write_build_script

    precision, plan = proof.graph.precision, proof.path.with_suffix(PLAN)
    if target.flavour is None:
        script = write_build_script(
            proof.path.parent,
            proof.path,
            precision=precision,
            batches=target.batches,
            workspace_mb=target.profile.workspace_mb,
            plan_name=plan.name,
        )
        console.note(f"{script} builds {plan.name} of {proof.path.name} on the device; it needs no Python there")
        return []
    said = f"{target.flavour.label} {target.flavour.version}"
    with _unproven(plan) as unproven, console.stage("tensorrt", f"building {plan.name} with {said}") as done:
        sidecar = build_plan(
            proof.path,
            unproven,
            precision=precision,
            batches=target.batches,
            workspace_mb=target.profile.workspace_mb,
            timing_cache=plan.parent / runs.TIMING_CACHE,
            flavour=target.flavour,
        )
        found = _verify_plan(unproven, proof, sidecar, subject)
        found = replace(found, reason=found.reason.replace(unproven.name, plan.name))
        if found.verified is False:
            plan = rejected_path(plan)
        sidecar_path(unproven).replace(sidecar_path(plan))
        plan = unproven.replace(plan) if found.verified is False else accept(unproven, plan)
        done(f"{plan}, {size(plan.stat().st_size)}; {found.reason}", good=found.verified)
    return [Proven(plan, "trt", said, proof.graph, found, precision_notes(sidecar))]


def _verify_plan(plan: Path, proof: Proven, sidecar: Sidecar, subject: Subject) -> Verification:
    """A plan's precision and origin always, what it computes where there is a GPU that runs it.

    TensorRT has just built it for the GPU that is there, if one is; TensorRT for RTX may not support that one.
    """
    problem = check_sidecar(plan, proof.path) or check_precision(sidecar)
    if problem:
        return Verification(False, problem, None, None)
    try:
        runtime = open_runtime(plan)
    except SSDKDError as error:
        if torch.cuda.is_available() and sidecar.flavour == "tensorrt":
            return Verification(False, error.message, None, None)
        return Verification(None, f"{NOT_RUN}: {error.message}; {proof.path.name}, its source, is verified", None, None)
    found = _verified(subject, plan, proof.graph.precision)
    if proof.graph.precision != "int8" or not found.verified:
        return found
    return _with_loss(found, loss_of(subject, predictions(subject, runtime.run)), len(subject.samples.held_out))


def _verified(subject: Subject, path: Path, precision: str) -> Verification:
    """A file run on held-out samples against the network."""
    samples, card = subject.samples.held_out[: None if precision == "int8" else PROOF_SAMPLES], subject.card
    return verify(subject.module, path, samples, mean=card.mean, std=card.std, precision=precision)


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
    )


def timed_paths(proofs: list[Proven]) -> tuple[list[Path], list[Path]]:
    """The ONNX files and the plans that are worth timing: those that are verified."""
    verified = [proof for proof in proofs if proof.verification.verified]
    of_onnx, of_tensorrt = ([proof.path for proof in verified if proof.format == name] for name in ("onnx", "trt"))
    return of_onnx, of_tensorrt


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
