"""TensorRT plans of proven ONNX files: built and proven here, or by a script on the device."""

from dataclasses import replace
from pathlib import Path

import torch

from engine.errors import SSDKDError
from engine.hashing import sha256_of
from exporters import FORMATS
from exporters.runtimes import open_runtime
from exporters.tensorrt_sidecar import (
    Sidecar,
    check_precision,
    check_sidecar,
    precision_notes,
    read_sidecar,
    sidecar_path,
)
from exporters.to_tensorrt import build_plan
from exporters.verify import Verification, rejected_path
from ssdkd_cli import console, runs
from ssdkd_cli.loss import loss_of
from ssdkd_cli.proving import Proven, accept, proof_of, unproven_place, with_loss
from ssdkd_cli.subject import Subject, predictions
from ssdkd_cli.target import Target
from ssdkd_cli.words import size

NOT_RUN = "it cannot run on this machine"
PLAN = FORMATS["trt"].suffix


def for_tensorrt(proof: Proven, subject: Subject, target: Target) -> list[Proven]:
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
    with unproven_place(plan) as unproven, console.stage("tensorrt", f"building {plan.name} with {said}") as done:
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
        done(f"{plan}, {size(plan.stat().st_size)}; {found.reason}", good=None if found.doubt else found.verified)
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
    found = proof_of(subject, plan, proof.graph.precision)
    if proof.graph.precision != "int8" or not found.verified:
        return found
    return with_loss(found, loss_of(subject, predictions(subject, runtime.run)), len(subject.samples.held_out))


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
