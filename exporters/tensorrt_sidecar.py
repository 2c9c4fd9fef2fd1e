"""What is written beside a TensorRT plan, and whether plan, sidecar, ONNX file and precision fit together.

The sidecar is a file of its own because a plan with anything in front of it cannot be read by other tools.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import SSDKDError
from engine.hashing import sha256_of
from exporters.files import write_atomically
from exporters.tensorrt_types import NOT_FOUND

SCHEMA_VERSION = 1
# The libraries that make plans, by the modules that are imported, in the order in which they are looked for.
FLAVOURS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
BINDINGS = 2  # an input and an output
LEAST_SHARE = 0.5  # of the weights compute in the precision that was asked for; layers may stay above it on purpose
LOWER = {"fp32": ("fp16", "bf16", "fp8", "int8"), "fp16": ("fp8", "int8"), "int8": ()}  # than what was asked for
SHOWN = 3  # layers, in a sentence


@dataclass(frozen=True)
class Binding:
    """An input or output of a plan: `dtype` in TensorRT's words, and its shapes at the three batch sizes."""

    name: str
    dtype: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Sidecar:
    """What is known of a plan. Types are "fp32", "fp16", "int8"; others by TensorRT's names.

    `compute_capability`, `gpu`: where it was built, None without a GPU. `precision`: what was asked for.
    `weight_bytes`, `computed_weights`, `layers`: as exporters.tensorrt_types reads them from the typed network;
    `weights_in_plan`: weights by their type in the ONNX file and then in the plan; `engine_tensors`: tensors of the
    engine by type, None where it could not be inspected. `timing_cache`: the file, None where none was kept.
    """

    schema_version: int
    flavour: str
    version: str
    compute_capability: str | None
    gpu: str | None
    precision: str
    input: Binding
    output: Binding
    workspace_mb: int | None
    timing_cache: str | None
    onnx_sha256: str
    onnx_bytes: int
    onnx_metadata: dict[str, str]
    plan_sha256: str
    plan_bytes: int
    weight_bytes: dict[str, int]
    computed_weights: dict[str, int]
    layers: dict[str, str]
    weights_in_plan: dict[str, dict[str, int]]
    engine_tensors: dict[str, int] | None
    build_seconds: float
    built_on: str
    platform: str
    ssdkd_version: str
    warnings: tuple[str, ...]


def sidecar_path(plan_path: Path) -> Path:
    """Return where the sidecar of a plan is: `<plan>.json`."""
    return plan_path.with_name(plan_path.name + ".json")


def write_sidecar(plan_path: Path, sidecar: Sidecar) -> None:
    """Write the sidecar of a plan."""
    write_atomically(sidecar_path(plan_path), (json.dumps(asdict(sidecar), indent=1) + "\n").encode())


def read_sidecar(plan_path: Path) -> Sidecar:
    """Read the sidecar of a plan. Raises SSDKDError where it or the plan is missing, or it is unreadable."""
    path = sidecar_path(plan_path)
    hint = "keep both files together, or build the plan again: ssdkd export RUN --export trt"
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        if values["schema_version"] != SCHEMA_VERSION:
            raise SSDKDError(
                f"{path}: expected schema_version {SCHEMA_VERSION}, found {values['schema_version']}",
                "it was written by another version of ssdkd: build the plan again with this one",
            )
        if values["flavour"] not in FLAVOURS:  # it names the module that is imported to open the plan
            raise ValueError(f"flavour {values['flavour']!r}, expected {' or '.join(FLAVOURS)}")
        bindings = {name: _binding(values[name]) for name in ("input", "output")}
        return Sidecar(**(values | bindings | {"warnings": tuple(values["warnings"])}))
    except OSError as error:
        if not plan_path.exists():
            raise SSDKDError(
                f"{plan_path} is not there", "give the path of a plan: ssdkd bench RUN/model.engine"
            ) from error
        raise SSDKDError(f"{plan_path} has no sidecar: {path.name} {_reason(error)}", hint) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SSDKDError(f"{path} is no sidecar of a plan: {type(error).__name__}: {error}", hint) from error


def check_sidecar(plan_path: Path, onnx_path: Path | None) -> str | None:
    """Return what is wrong with a plan, its sidecar and the ONNX file that it is said to be made from, or None."""
    try:
        sidecar = read_sidecar(plan_path)
        plan, model = _sha256(plan_path), _sha256(onnx_path) if onnx_path else None
    except SSDKDError as error:
        return error.message
    if plan != sidecar.plan_sha256:
        return f"{plan_path.name} is not the plan that its sidecar describes: sha256 {plan}, not {sidecar.plan_sha256}"
    if onnx_path and model != sidecar.onnx_sha256:
        return (
            f"{plan_path.name} was made from another ONNX file than {onnx_path.name}: sha256 {sidecar.onnx_sha256}, "
            f"found {model}"
        )
    return None


def check_precision(sidecar: Sidecar, *, least_share: float = LEAST_SHARE) -> str | None:
    """Return how the precision of a plan differs from what was asked for, or None.

    Judged by the strongly typed network that it was built from, by the weights found in its bytes, and by the engine's
    own word where it could be inspected. float32 must be whole; of fp16 and int8 at least `least_share` of the weights
    compute so and nothing computes in less.
    """
    asked, computed = sidecar.precision, sidecar.computed_weights
    total = sum(computed.values())
    if not total:
        return f"{asked} was asked for, and the graph has no convolution or matrix product with weights"
    lower = [kind for kind in LOWER[asked] if computed.get(kind)]
    if lower or computed.get(asked, 0) < least_share * total:
        kinds = lower or [kind for kind in computed if kind != asked]
        names = [name for name, kind in sidecar.layers.items() if kind in kinds]
        return (
            f"{asked} was asked for, and {sum(computed[kind] for kind in kinds):,} of the graph's {total:,} weights "
            f"compute in {' and '.join(kinds)}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        )
    held = sidecar.weights_in_plan.get(asked, {})
    otherwise = sum(size for kind, size in held.items() if kind not in (asked, NOT_FOUND))
    if otherwise > (1 - least_share) * sum(held.values()):
        return f"{asked} was asked for, and the plan holds these weights otherwise: {_counts(held)}"
    tensors = sidecar.engine_tensors
    if tensors is None or sum(tensors.values()) <= BINDINGS:  # one fused layer shows its input and output alone
        return None
    if not tensors.get(asked) or any(tensors.get(kind) for kind in LOWER[asked]):
        return f"{asked} was asked for, and the tensors of the engine are {_counts(tensors)}"
    return None


def precision_notes(sidecar: Sidecar) -> tuple[str, ...]:
    """Return what the check of a plan's precision rests on, and what it cannot tell."""
    asked, held = sidecar.precision, sidecar.weights_in_plan.get(sidecar.precision, {})
    notes = [
        f"the strongly typed network computes {_counts(sidecar.computed_weights)} of its weights; "
        f"the plan holds of those that are {asked}: {_counts(held) or 'none'}"
    ]
    if sidecar.engine_tensors is not None:
        notes.append(f"the engine inspector counts tensors: {_counts(sidecar.engine_tensors)}")
    else:
        notes.append("the engine was not inspected, which takes a GPU that it runs on")
    if sidecar.flavour == "tensorrt_rtx" and asked == "int8":
        notes.append(
            "TensorRT for RTX chooses its kernels on the device, and NVIDIA's support matrix has INT8 for weight-only "
            "matrix products alone: whether convolutions compute in integers is not known, measure against FP16 there"
        )
    return tuple(notes)


def _binding(values: dict[str, Any]) -> Binding:
    shapes = {name: tuple(values[name]) for name in ("min", "opt", "max")}
    return Binding(values["name"], values["dtype"], **shapes)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise SSDKDError(f"{path} {_reason(error)}", "give the path of the file") from error


def _reason(error: OSError) -> str:
    return "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
