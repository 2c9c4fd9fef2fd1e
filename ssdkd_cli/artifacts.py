"""Files made from a student: written, proven, timed, scored; for a whole run and for `export`, `eval` and `bench`."""

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import nn

from engine.device import Compute
from engine.errors import SSDKDError
from exporters import FORMATS
from exporters.bench import Latency, bench_together
from exporters.evaluate import LabelledImages, accuracy
from exporters.files import write_atomically
from exporters.metadata import describe, preprocessing_of
from exporters.precision import to_fp16, to_int8
from exporters.runtimes import Runtime, open_runtime, to_input
from exporters.tensorrt_sidecar import Sidecar, check_precision, check_sidecar, precision_notes, read_sidecar
from exporters.to_onnx import to_onnx
from exporters.to_tensorrt import build_plan, check_builder
from exporters.verify import Verification, reject, verify
from ssdkd_cli import console, runs
from ssdkd_cli.precisions import Graph, Subject, float_graph, graph_in, most_lost
from ssdkd_cli.report import Artifact, Percentiles
from ssdkd_cli.target import Target
from ssdkd_cli.words import milliseconds, size

TRIAL_IMAGES = 4
PROOF_SAMPLES = 256  # held-out samples that float files are proven on; INT8 files are on all
NOT_RUN = "it cannot run on this machine, which has no GPU for it"
BATCHES = (32, 16, 8, 4, 2, 1)  # of the throughput: the largest that stays below BATCH_SECONDS a call
BATCH_SECONDS = 0.4
BENCH_SECONDS = 0.5  # each file at each batch size is called for at least so long


@dataclass(frozen=True)
class Proven:
    """A file that was written and compared with the student; it is called *.rejected where it failed."""

    path: Path
    format: str
    graph: Graph
    verification: Verification
    embed_preprocessing: bool
    notes: tuple[str, ...] = ()


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
            batches = target.profile.batches
            build_plan(
                path,
                path.with_suffix(".engine"),
                precision=precision,
                batches=(batches.smallest, batches.usual, batches.largest),
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
    if precision != "int8":
        return graph_in(
            precision, subject, exported, target.scheme, qat="off", fallback=False, compute=compute, seed=seed
        )
    with console.stage("int8", "quantizing, calibrated on synthetic samples") as done:
        graph = graph_in(
            precision,
            subject,
            exported,
            target.scheme,
            qat=target.qat if is_asked else "off",
            fallback=target.fallback and is_asked,
            compute=compute,
            seed=seed,
        )
        done("; ".join(graph.notes), good=graph.lost <= most_lost(len(subject.samples.held_out)))
    return graph


def file_name(precision: str, suffix: str) -> str:
    """model.onnx, model.int8.onnx, model.fp16.engine."""
    return f"{runs.MODEL}{'' if precision == 'fp32' else f'.{precision}'}{suffix}"


def file_names(target: Target) -> list[str]:
    """What `make_files` writes."""
    names = [file_name(precision, ".onnx") for precision in target.precisions]
    if "trt" in target.formats:
        names += [file_name(precision, FORMATS["trt"].suffix) for precision in target.asked if target.flavour]
    return names


def _write_and_prove(graph: Graph, subject: Subject, folder: Path, *, is_asked: bool) -> Proven | None:
    """The ONNX file of `graph`, run on held-out samples against the network; None where it failed and nobody asked."""
    path, card = folder / file_name(graph.precision, ".onnx"), subject.card
    with console.stage("export", f"writing {path.name}") as done:
        write_atomically(path, graph.model.SerializeToString())
        done(f"{path}, {size(path.stat().st_size)}")
    samples = subject.samples.held_out[: None if graph.precision == "int8" else PROOF_SAMPLES]
    with console.stage("proof", f"running {path.name} on {len(samples)} held-out synthetic samples") as done:
        verification = verify(subject.module, path, samples, mean=card.mean, std=card.std, precision=graph.precision)
        allowed = most_lost(len(subject.samples.held_out))
        if verification.verified and graph.precision == "int8" and graph.lost > allowed:
            reason = (
                f"it loses {graph.lost:.2f} points of agreement with the teacher, at most {allowed:.2f} are allowed"
            )
            verification = replace(verification, verified=False, reason=f"{reason}; {verification.reason}")
        if not verification.verified and is_asked:
            path = reject(path)
        done(verification.reason, good=bool(verification.verified))
    if not verification.verified and not is_asked:
        path.unlink()
        console.warn(f"no {graph.precision} file: ask for it with --precision {graph.precision}, and more is tried")
        return None
    if not verification.verified:
        console.warn(f"the file is not proven to compute what the student computes: it was set aside as {path.name}")
    return Proven(path, "onnx", graph, verification, subject.embed_preprocessing)


def _for_tensorrt(proof: Proven, subject: Subject, target: Target) -> list[Proven]:
    """The TensorRT plan of a proven ONNX file; where the device builds it itself, the script that does."""
    from exporters.jetson import write_build_script

    precision, profile, folder = proof.graph.precision, target.profile, proof.path.parent
    plan = folder / file_name(precision, FORMATS["trt"].suffix)
    batches = profile.batches.smallest, profile.batches.usual, profile.batches.largest
    if target.flavour is None:
        script = write_build_script(
            folder,
            proof.path,
            precision=precision,
            batches=batches,
            workspace_mb=profile.workspace_mb,
            plan_name=plan.name,
        )
        console.note(f"{script} builds {plan.name} of {proof.path.name} on the device; it needs no Python there")
        return []
    said = f"{target.flavour.label} {target.flavour.version}"
    with console.stage("tensorrt", f"building {plan.name} with {said}") as done:
        sidecar = build_plan(
            proof.path,
            plan,
            precision=precision,
            batches=batches,
            workspace_mb=profile.workspace_mb,
            timing_cache=folder / runs.TIMING_CACHE,
            flavour=target.flavour,
        )
        verification = _verify_plan(plan, proof, sidecar, subject)
        if verification.verified is False:
            plan = reject(plan)
        done(f"{plan}, {size(plan.stat().st_size)}; {verification.reason}", good=verification.verified)
    notes = (f"built by {said}", *precision_notes(sidecar))
    return [Proven(plan, "trt", proof.graph, verification, proof.embed_preprocessing, notes)]


def _verify_plan(plan: Path, proof: Proven, sidecar: Sidecar, subject: Subject) -> Verification:
    """A plan's precision and origin always, what it computes where there is a GPU that runs it."""
    problem = check_sidecar(plan, proof.path) or check_precision(sidecar)
    if problem:
        return Verification(False, problem, None, None)
    if not has_gpu():
        return Verification(None, f"{NOT_RUN}; {proof.path.name}, of which it is made, is verified", None, None)
    precision, card = proof.graph.precision, subject.card
    samples = subject.samples.held_out[: None if precision == "int8" else PROOF_SAMPLES]
    return verify(subject.module, plan, samples, mean=card.mean, std=card.std, precision=precision)


def time_files(runtimes: Sequence[Runtime], samples: NDArray[np.uint8], *, batch: int | None = None) -> list[Timing]:
    """Time files of the same input in turn, on the CPU, with `samples` uint8 [N, H, W, C] as images.

    `batch`: of the throughput; None: the largest of BATCHES that does not take too long.

    Where one takes a single batch size, all are timed at that one alone. Raises SSDKDError for a file that cannot
    be run, or not at the batch size of another.
    """
    fixed = [runtime.fixed_batch for runtime in runtimes if runtime.fixed_batch is not None]
    batches = tuple(fixed[:1]) or ((batch, 1) if batch else BATCHES)
    first = min(batches)
    images = to_input(samples[np.arange(max(batches)) % len(samples)], (0.5,), (0.25,))  # [largest batch, C, H, W]
    single = bench_together(runtimes, images[:first], min_seconds=BENCH_SECONDS)
    slowest_seconds = max(latency.p50_ms for latency in single) / first / 1e3  # of one image
    most = batch or next(size for size in batches if size * slowest_seconds <= BATCH_SECONDS or size == first)
    many = bench_together(runtimes, images[:most], min_seconds=BENCH_SECONDS) if most > first else single
    return [_timing(one, several) for one, several in zip(single, many, strict=True)]


def time_plans(paths: Sequence[Path], batch: int) -> list[Timing]:
    """Time TensorRT plans on the GPU, by its own clock and replayed from a CUDA graph, at 1 and at most `batch` images.

    Raises SSDKDError for a plan that cannot run here.
    """
    from exporters.tensorrt_runtime import time_plan

    timings = []
    for path in paths:
        bounds = read_sidecar(path).input
        sizes = bounds.min[0], min(batch, bounds.max[0])
        timings.append(_timing(*(time_plan(path, size, cuda_graph=True, min_seconds=BENCH_SECONDS) for size in sizes)))
    return timings


def _timing(single: Latency, several: Latency) -> Timing:
    percentiles = Percentiles(p50=single.p50_ms, p90=single.p90_ms, p99=single.p99_ms)
    return Timing(percentiles, single.batch, several.throughput_per_s, several.batch, single.runtime)


def measure(
    teacher: Subject, proofs: Sequence[Proven], folder: Path, *, batch: int | None = None
) -> tuple[Timing | None, dict[Path, Timing]]:
    """The timings of the teacher as ONNX and of the proven files, taken in turn; None for a teacher that cannot be.

    `batch`: of the throughput; None: as large as suits the machine.
    """
    paths = [proof.path for proof in proofs if proof.verification.verified and proof.format == "onnx"]
    if not paths:
        return None, {}
    samples = teacher.samples.held_out
    with console.stage("speed", "timing teacher and student in turn") as done:
        students = [open_runtime(path) for path in paths]
        with tempfile.TemporaryDirectory(dir=folder, prefix=".teacher-") as temporary:
            beside = Path(temporary) / "teacher.onnx"
            unknown = ""
            try:
                write_atomically(beside, float_graph(teacher).SerializeToString())
                teacher_timing, *timings = time_files([open_runtime(beside), *students], samples, batch=batch)
            except SSDKDError as error:
                unknown = error.message
                teacher_timing, timings = None, time_files(students, samples, batch=batch)
        words = [
            f"{path.name} {milliseconds(timing.latency_ms.p50)}" for path, timing in zip(paths, timings, strict=True)
        ]
        if teacher_timing:
            words.insert(0, f"teacher {milliseconds(teacher_timing.latency_ms.p50)}")
        done(", ".join(words))
    if unknown:
        console.warn(f"the teacher's latency is unknown: {unknown}")
    return teacher_timing, dict(zip(paths, timings, strict=True)) | measure_plans(proofs, batch)


def measure_plans(proofs: Sequence[Proven], batch: int | None) -> dict[Path, Timing]:
    """The timings of the plans that were proven, which takes the GPU that they run on."""
    plans = [proof.path for proof in proofs if proof.verification.verified and proof.format == "trt"]
    return dict(zip(plans, time_plans(plans, batch or BATCHES[0]), strict=True)) if plans else {}


def score_file(runtime: Runtime, labelled: LabelledImages) -> float:
    """The accuracy of a file, percent, on labelled images of its size; preprocessing as it says."""
    mean, std = preprocessing_of(describe(runtime.metadata), channels=runtime.input_shape[0])
    return accuracy(runtime.run, labelled, mean=mean, std=std, batch=runtime.fixed_batch)


def artifact(
    proven: Proven,
    folder: Path,
    timings: Mapping[Path, Timing],
    subject: Subject,
    target: Target,
    labelled: LabelledImages | None,
    notes: Sequence[str] = (),
) -> Artifact:
    """What the report says of a file; what was not measured is None."""
    content = proven.path.read_bytes()
    timing, verification, graph = timings.get(proven.path), proven.verification, proven.graph
    runtime = open_runtime(proven.path) if verification.verified else None
    said = ("takes images in 0...1",) if proven.embed_preprocessing else ()
    return Artifact(
        path=proven.path.relative_to(folder).as_posix(),
        sha256=hashlib.sha256(content).hexdigest(),
        format=proven.format,
        precision=graph.precision,
        precision_requested=graph.precision,
        profile=target.profile.name if target.is_named else None,
        size_bytes=len(content),
        runtime=timing.runtime if timing else {"onnx": "onnxruntime", "trt": "tensorrt"}[proven.format],
        max_abs_error=_finite(verification.max_abs_error),
        agreement=_finite(verification.agreement),
        accuracy=score_file(runtime, labelled) if runtime and labelled else None,
        latency_ms=timing.latency_ms if timing else None,
        throughput_per_s=timing.throughput_per_s if timing else None,
        batch=timing.batch if timing else None,
        verified=verification.verified,
        verified_reason=verification.reason,
        notes=(*said, *graph.notes, *proven.notes, *notes),
        teacher_agreement=agreement_with_teacher(runtime, subject) if runtime else None,
        integer_share=100 * graph.integer_share,
        float_layers=graph.float_layers,
    )


def runs_here(target: Target) -> bool:
    """Whether the files that were asked for can be run on this machine."""
    return "onnx" in target.formats or (target.flavour is not None and has_gpu())


def has_gpu() -> bool:
    """Whether there is a GPU to run a plan on."""
    import torch

    return torch.cuda.is_available()


def usual_batch(target: Target) -> int | None:
    """The batch of the throughput that a named profile sets; None: as large as suits the machine."""
    return target.profile.batches.usual if target.is_named else None


def agreement_with_teacher(runtime: Runtime, subject: Subject) -> float:
    """Percent of the held-out samples on which a file predicts the teacher's class."""
    card, images = subject.card, subject.samples.held_out
    mean, std = preprocessing_of(describe(runtime.metadata), channels=card.input_shape[0])
    teachers = LabelledImages(images, subject.samples.held_out_logits.argmax(1), ())
    return accuracy(runtime.run, teachers, mean=mean, std=std, batch=runtime.fixed_batch)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
