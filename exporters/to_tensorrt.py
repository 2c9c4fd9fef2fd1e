"""An ONNX file as a TensorRT plan: TensorRT 10 and 11 and TensorRT for RTX by the same calls, strongly typed.

The precision is the graph's; nothing here changes it. What was built is described in a sidecar beside the plan.
"""

import hashlib
import importlib
import platform
import re
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from engine.errors import SSDKDError
from exporters.files import write_atomically
from exporters.metadata import ssdkd_version
from exporters.tensorrt_sidecar import FLAVOURS, SCHEMA_VERSION, Binding, Sidecar, write_sidecar
from exporters.tensorrt_types import engine_types, metadata_of, network_types, weights_in_plan

PACKAGES = {"tensorrt": "'tensorrt>=10,<12'", "tensorrt_rtx": "tensorrt-rtx-cu13"}
UNKNOWN_OPERATOR = ("UNSUPPORTED_NODE", "creator &&", "Plugin not found")  # how parsers say that they lack it
PARTS = ("NetworkDefinitionCreationFlag", "Builder", "ILogger", "OnnxParser", "Runtime", "__version__")
NO_GPU_HINT = "build where the plan will run, or `pip install tensorrt-rtx-cu13`, which builds without a GPU"

Batches = tuple[int, int, int]  # smallest, usual, largest


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries that make plans: neither reads the other's, nor those of another version of its own."""

    name: str  # the module's: "tensorrt" or "tensorrt_rtx"
    label: str
    version: str


def find_flavour(wanted: str | None = None) -> Flavour:
    """Return the library that is `wanted`, or TensorRT, or else TensorRT for RTX.

    Raises SSDKDError, with the command that installs it, where it is missing or cannot be imported.
    """
    problems = []
    for name in FLAVOURS if wanted is None else (wanted,):
        try:
            trt = import_flavour(name)
        except Exception as error:  # a damaged package may raise anything
            absent = isinstance(error, ModuleNotFoundError) and error.name == name
            said = _line(str(error)) or type(error).__name__
            reason = "is not installed" if absent else f"is installed but cannot be imported: {said}"
        else:
            missing = [part for part in PARTS if getattr(trt, part, None) is None]
            if missing:
                reason = f"is installed but incomplete: it has no {' and no '.join(missing)}"
            elif not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
                reason = f"is of version {trt.__version__}, which has no strongly typed networks"
            else:
                return Flavour(name, FLAVOURS[name], str(trt.__version__))
        problems.append(f"{FLAVOURS[name]} {reason}")
    commands = [f"pip install {package}" for name, package in PACKAGES.items() if wanted in (None, name)]
    raise SSDKDError(f"a TensorRT plan cannot be made: {'; '.join(problems)}", " or ".join(commands))


def check_builder(flavour: Flavour) -> None:
    """Raises SSDKDError where the library cannot build on this machine: TensorRT needs a GPU, that for RTX does not."""
    _builder(flavour)


def build_plan(
    onnx_path: Path,
    plan_path: Path,
    *,
    precision: str,
    batches: Batches,
    workspace_mb: int | None,
    timing_cache: Path | None,
    flavour: Flavour,
) -> Sidecar:
    """Write the plan of an ONNX file with one input [batch, C, H, W], and its sidecar `<plan>.json`.

    `precision` is what was asked for: it is written down for `check_precision`, the graph decides. `timing_cache` is
    read and written back by TensorRT; that for RTX keeps none. The plan is the serialized engine and nothing else.
    Raises SSDKDError where the graph cannot be parsed or built, which leaves no file behind.
    """
    if not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise SSDKDError(
            f"the batch sizes of a plan are {batches}: expected 1 <= smallest <= usual <= largest",
            "put them right in the device profile: ssdkd profiles show NAME",
        )
    started = time.perf_counter()
    try:
        model = onnx_path.read_bytes()
    except OSError as error:
        raise SSDKDError(f"{onnx_path} cannot be read: {error.strerror}", "give the path of an ONNX file") from error
    trt, builder, messages = import_flavour(flavour.name), _builder(flavour), logger_of(flavour.name)[1]
    if hasattr(trt, "IRuntimeCache"):  # TensorRT for RTX: it times nothing, and looks for a GPU if told to remember
        timing_cache = None
    network = _parsed(trt, builder, model, onnx_path, flavour)
    bindings = _bindings(network, onnx_path, batches)
    config = _config(trt, builder, bindings[0], precision=precision, workspace_mb=workspace_mb)
    if timing_cache is not None:
        _read_timings(config, timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise SSDKDError(
            f"{onnx_path}: {flavour.label} {flavour.version} cannot build it: {reason_of(messages)}",
            "leave the layer that it names in float32, choose another --precision, or another version of the library",
        )
    plan, seconds, gpu = bytes(serialized), time.perf_counter() - started, _gpu()
    sidecar = Sidecar(
        schema_version=SCHEMA_VERSION,
        flavour=flavour.name,
        version=flavour.version,
        compute_capability=gpu[0] if gpu else None,
        gpu=gpu[1] if gpu else None,
        precision=precision,
        input=bindings[0],
        output=bindings[1],
        workspace_mb=workspace_mb,
        timing_cache=timing_cache.name if timing_cache else None,
        onnx_sha256=hashlib.sha256(model).hexdigest(),
        onnx_bytes=len(model),
        onnx_metadata=metadata_of(model),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        **asdict(network_types(trt, network)),
        weights_in_plan=weights_in_plan(plan, model),
        engine_tensors=_engine_types(trt, flavour, plan) if gpu else None,
        build_seconds=round(seconds, 3),
        built_on=datetime.now(UTC).isoformat(timespec="seconds"),
        platform=f"{platform.system()} {platform.machine()}",
        ssdkd_version=ssdkd_version(),
        warnings=tuple(dict.fromkeys(_line(text) for severity, text in messages if severity == "WARNING")),
    )
    write_atomically(plan_path, plan)
    write_sidecar(plan_path, sidecar)
    if timing_cache is not None:
        write_atomically(timing_cache, bytes(config.get_timing_cache().serialize()))
    return sidecar


def smallest_plan(flavour: Flavour) -> bytes:
    """A plan that copies one number. Raises SSDKDError where the library cannot build it here."""
    trt, builder, messages = import_flavour(flavour.name), _builder(flavour), logger_of(flavour.name)[1]
    network = _strongly_typed(trt, builder)
    number = network.add_input("number", trt.float32, (1,))
    network.mark_output(network.add_identity(number).get_output(0))
    serialized = builder.build_serialized_network(network, builder.create_builder_config())
    if serialized is None:
        raise SSDKDError(f"{flavour.label} {flavour.version} cannot build here: {reason_of(messages)}", NO_GPU_HINT)
    return bytes(serialized)


def import_flavour(name: str) -> Any:
    """Return the module of a library, imported only when it is used."""
    return importlib.import_module(name)


@cache
def logger_of(name: str) -> tuple[Any, list[tuple[str, str]]]:
    """Return the one logger of a library and the list that it fills with (severity, text), instead of printing.

    One a process: while any object of TensorRT lives, it keeps to the first logger that it was given.
    """
    trt, messages = import_flavour(name), list[tuple[str, str]]()

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants it called by name

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                messages.append((severity.name, text))

    return Collector(), messages


def _builder(flavour: Flavour) -> Any:
    logger, messages = logger_of(flavour.name)
    messages.clear()
    try:
        builder, reason = import_flavour(flavour.name).Builder(logger), ""
    except (RuntimeError, TypeError) as error:  # TypeError: pybind11 was given a null pointer
        builder, reason = None, _line(str(error))
    if builder is None:
        reason = reason_of(messages) or reason or "it gives no reason"
        raise SSDKDError(f"{flavour.label} {flavour.version} cannot build here: {reason}", NO_GPU_HINT)
    return builder


def _strongly_typed(trt: Any, builder: Any) -> Any:
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def _parsed(trt: Any, builder: Any, model: bytes, path: Path, flavour: Flavour) -> Any:
    """Return the graph as a strongly typed network, in TensorRT 11 and that for RTX the only kind."""
    network = _strongly_typed(trt, builder)
    parser = trt.OnnxParser(network, logger_of(flavour.name)[0])
    if parser.parse(model, str(path)):
        return network
    library, errors = f"{flavour.label} {flavour.version}", [parser.get_error(n) for n in range(parser.num_errors)]
    error = next((error for error in errors if error.node_operator()), None)
    if error is None:
        reason = _line(errors[0].desc()) if errors else "no reason is given"
        raise SSDKDError(f"{path} cannot be read by {library}: {reason}", "the file is damaged: export it again")
    operator = error.node_operator() + (f" (node {error.node_name()})" if error.node_name() else "")
    if any(word in f"{error.code()} {error.desc()}" for word in UNKNOWN_OPERATOR):
        raise SSDKDError(
            f"{path}: {library} does not know the operator {operator}", "choose a student without it: ssdkd students"
        )
    raise SSDKDError(
        f"{path}: {library} refuses the operator {operator}: {_line(error.desc())}",
        "export it with a device profile of TensorRT (`ssdkd profiles`), or choose another --precision or student",
    )


def _bindings(network: Any, path: Path, batches: Batches) -> tuple[Binding, Binding]:
    """Return the one input and output of a network, whose batch is open or the one that is asked for."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if len(inputs) != 1 or network.num_outputs != 1 or len(inputs[0].shape) != 4 or -1 in tuple(inputs[0].shape)[1:]:
        found = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in inputs)
        raise SSDKDError(
            f"{path}: expected one input [batch, channels, height, width] with its image size stated, and one output; "
            f"found {found or 'no input'} and {network.num_outputs} outputs",
            "plans are made of image classifiers, as `ssdkd export RUN --export onnx` writes them",
        )
    fixed = inputs[0].shape[0]
    if fixed != -1 and set(batches) != {fixed}:
        raise SSDKDError(
            f"{path} takes batches of {fixed} only, the plan was to take {batches[0]} to {batches[2]}",
            "export it with an open batch: ssdkd export RUN --export onnx",
        )
    return _binding(inputs[0], batches), _binding(network.get_output(0), batches)


def _binding(tensor: Any, batches: Batches) -> Binding:
    smallest, usual, largest = ((batch, *tuple(tensor.shape)[1:]) for batch in batches)
    return Binding(tensor.name, tensor.dtype.name.lower(), smallest, usual, largest)


def _config(trt: Any, builder: Any, images: Binding, *, precision: str, workspace_mb: int | None) -> Any:
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape(images.name, images.min, images.opt, images.max)
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector tells names alone
    if precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and it multiplies with 10 bits of mantissa
    if workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    return config


def _read_timings(config: Any, path: Path) -> None:
    """Give the builder the timings of earlier builds; those of another GPU or version are left."""
    known = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if known is None or not config.set_timing_cache(known, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _gpu() -> tuple[str, str] | None:
    """Return the compute capability, for example "8.9", and the name of the GPU, or None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.get_device_capability())), torch.cuda.get_device_name()


def _engine_types(trt: Any, flavour: Flavour, plan: bytes) -> dict[str, int] | None:
    """Ask the engine itself, on the GPU, for the types of its tensors; None where it cannot run on this GPU."""
    engine = trt.Runtime(logger_of(flavour.name)[0]).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    return engine_types(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


def reason_of(messages: list[tuple[str, str]]) -> str:
    """Return the first error among what a library's logger was told, on one line."""
    errors = [_line(text) for severity, text in messages if severity in ("ERROR", "INTERNAL_ERROR")]
    return errors[0] if errors else ""


def _line(text: str) -> str:
    """Return a message of TensorRT on one line, without its own source files, codes and repetitions."""
    lines = [
        line for line in text.splitlines() if line.strip() and not line.startswith(("Invalid Node", "[checkMacros"))
    ]
    kept = " ".join(" ".join(lines).split())
    kept = re.sub(r"\s*In \S+ at \S+:\d+|^\[[^]]*\]\s*|^[\w:]+: (?=Error Code)|Error Code \d+: ", "", kept)
    return kept.strip().rstrip(".")
