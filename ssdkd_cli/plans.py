"""TensorRT plans of proven ONNX files: built and proven here, or by a script on the device."""

from pathlib import Path

import torch

from engine.errors import SSDKDError
from engine.hashing import sha256_of
from exporters import FORMATS
from exporters.evaluate import LabelledImages
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
from exporters.verify import Verification
from ssdkd_cli import console, runs
from ssdkd_cli.proving import UNPROVEN, Proof, Proven, prove, settle, unproven_place
from ssdkd_cli.subject import Subject
from ssdkd_cli.target import Target
from ssdkd_cli.words import size

NOT_RUN = "it cannot run on this machine"
PLAN = FORMATS["trt"].suffix


def for_tensorrt(source: Proven, subject: Subject, target: Target, labelled: LabelledImages | None) -> list[Proven]:
    """The TensorRT plan of a proven ONNX file; where the device builds it itself, the script that does."""
    from exporters.jetson import write_build_script

    precision, plan = source.graph.precision, source.path.with_suffix(PLAN)
    if target.flavour is None:
        script = write_build_script(
            source.path.parent,
            source.path,
            precision=precision,
            batches=target.batches,
            workspace_mb=target.profile.workspace_mb,
            plan_name=plan.name,
        )
        console.note(f"{script} builds {plan.name} of {source.path.name} on the device; it needs no Python there")
        return []
    said = f"{target.flavour.label} {target.flavour.version}"
    with unproven_place(plan) as unproven, console.stage("tensorrt", f"building {plan.name} with {said}") as done:
        sidecar = build_plan(
            source.path,
            unproven,
            precision=precision,
            batches=target.batches,
            workspace_mb=target.profile.workspace_mb,
            timing_cache=plan.parent / runs.TIMING_CACHE,
            flavour=target.flavour,
        )
        proof = _prove_plan(unproven, source, sidecar, subject, labelled)
        found = proof.verification
        plan = settle(unproven, plan, failed=found.verified is False)
        done(f"{plan}, {size(plan.stat().st_size)}; {found.reason}", good=None if found.doubt else found.verified)
    return [Proven(plan, "trt", said, source.graph, proof, precision_notes(sidecar))]


def _prove_plan(
    plan: Path, source: Proven, sidecar: Sidecar, subject: Subject, labelled: LabelledImages | None
) -> Proof:
    """A plan's precision and origin always, what it computes where there is a GPU that runs it.

    TensorRT has just built it for the GPU that is there, if one is; TensorRT for RTX may not support that one.
    """
    problem = check_sidecar(plan, source.path) or check_precision(sidecar)
    if problem:
        return Proof(Verification(False, problem.replace(UNPROVEN, ""), None, None))
    try:
        open_runtime(plan)
    except SSDKDError as error:
        if torch.cuda.is_available() and sidecar.flavour == "tensorrt":
            return Proof(Verification(False, error.message, None, None))
        said = f"{NOT_RUN}: {error.message}; {source.path.name}, its source, is verified"
        return Proof(Verification(None, said, None, None))
    return prove(plan, subject, source.graph.precision, labelled)


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
                console.warn(f"{plan.name} is deleted: it was of another {path.name} than the one that is there now")
    if script.exists() and sha256_of(path) not in script.read_text(encoding="utf-8"):
        script.unlink()
