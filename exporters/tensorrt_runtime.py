"""A TensorRT plan on the GPU that it was built for: as something callable, and timed there."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError, first_line
from exporters.bench import Latency
from exporters.runtimes import Runtime
from exporters.tensorrt_sidecar import Sidecar, check_sidecar, read_sidecar
from exporters.to_tensorrt import Flavour, find_flavour, import_flavour, logger_of, reason_of, smallest_plan

if TYPE_CHECKING:
    import torch

AGAIN = "build it here: ssdkd export RUN --export trt"
OTHER_GPU = "run it on a GPU that the library supports, or `pip install 'tensorrt>=10,<12'` and export again"
WARM_UP_CALLS = 50  # the first compile kernels (TensorRT for RTX) and raise the clocks
ROUND = 100  # calls between two waits for the GPU
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class _Plan:
    """A plan on the GPU. `trt` is the module of its library."""

    trt: Any
    engine: Any
    sidecar: Sidecar
    name: str
    path: Path


def open_plan(path: Path) -> Runtime:
    """Open a plan on this machine's GPU; it takes any number of images, in parts where its largest batch is exceeded.

    Raises SSDKDError where there is no GPU, its sidecar is missing or describes another file, or the plan was built by
    another library, another version of it, or (TensorRT) for another GPU.
    """
    plan = _load(path)
    context = plan.engine.create_execution_context()
    smallest, largest = plan.sidecar.input.min[0], plan.sidecar.input.max[0]

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(images), largest):
            part = images[start : start + largest]
            missing = max(0, smallest - len(part))
            filled = np.concatenate([part, np.zeros((missing, *part.shape[1:]), dtype=np.float32)])
            parts.append(_run_once(plan, context, filled)[: len(part)])
        return np.concatenate(parts)

    channels, height, width = tuple(plan.engine.get_tensor_shape(plan.sidecar.input.name))[1:]
    return Runtime(
        name=plan.name,
        path=path,
        input_shape=(channels, height, width),
        classes=tuple(plan.engine.get_tensor_shape(plan.sidecar.output.name))[1],
        fixed_batch=None,
        metadata=plan.sidecar.onnx_metadata,
        run=run,
    )


def why_plans_do_not_run(flavour: Flavour) -> str | None:
    """Why this machine runs no plan of the library, by trying the smallest; None where it does."""
    import torch

    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    try:
        _engine_of(smallest_plan(flavour), flavour, "a plan")
    except SSDKDError as error:
        return error.message
    return None


def time_plan(path: Path, batch: int, *, cuda_graph: bool, min_seconds: float = 1.0) -> Latency:
    """Time a plan on this machine's GPU with CUDA events: from buffers on the GPU to buffers on the GPU.

    With `cuda_graph` the calls are replayed from a graph: TensorRT's is captured here, TensorRT for RTX captures its
    own. Raises SSDKDError as `open_plan`, for a batch that the plan does not take, and where nothing can be captured.
    """
    import torch

    plan = _load(path)
    smallest, largest = plan.sidecar.input.min[0], plan.sidecar.input.max[0]
    if not smallest <= batch <= largest:
        raise SSDKDError(
            f"{path} takes batches of {smallest} to {largest}, asked for {batch}", "choose a batch that it takes"
        )
    context, captures_itself = _timing_context(plan, cuda_graph)
    shape = (batch, *plan.sidecar.input.min[1:])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        images = torch.randn(shape, device="cuda")
        kept = _bind(plan, context, images)  # the engine has their addresses alone: they must outlive the calls
        for _ in range(WARM_UP_CALLS):
            _enqueue(plan, context, stream)
        stream.synchronize()
        graph = _captured(plan, context, stream) if cuda_graph and not captures_itself else None
        taken, wall_seconds = list[float](), 0.0
        while wall_seconds < min_seconds or len(taken) < FEWEST_ROUNDS * ROUND:
            started = time.perf_counter()
            taken += _time_round(plan, context, stream, graph)
            wall_seconds += time.perf_counter() - started
    del kept
    p50_ms, p90_ms, p99_ms = (float(value) for value in np.percentile(taken, (50, 90, 99)))
    return Latency(
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p99_ms=p99_ms,
        throughput_per_s=batch * len(taken) / wall_seconds,
        batch=batch,
        runtime=f"{plan.name}, CUDA graph" if cuda_graph else plan.name,
    )


def _load(path: Path) -> _Plan:
    import torch

    problem = check_sidecar(path, None)
    if problem:
        raise SSDKDError(problem, AGAIN)
    sidecar = read_sidecar(path)
    flavour = find_flavour(sidecar.flavour)
    if flavour.version != sidecar.version:
        raise SSDKDError(
            f"{path} was built by {flavour.label} {sidecar.version}, here is {flavour.version}: a plan runs on the "
            "version that built it",
            f"{AGAIN}, or install {sidecar.version}",
        )
    if not torch.cuda.is_available():
        raise SSDKDError(
            f"{path} runs on an NVIDIA GPU: PyTorch {torch.__version__} finds none on this machine",
            "run it on a machine with a GPU and its driver",
        )
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    if sidecar.flavour == "tensorrt" and sidecar.compute_capability not in (None, capability):
        raise SSDKDError(
            f"{path} was built for compute capability {sidecar.compute_capability} ({sidecar.gpu}), this GPU has "
            f"{capability} ({torch.cuda.get_device_name()})",
            AGAIN,
        )
    engine = _engine_of(path.read_bytes(), flavour, str(path))
    name = f"{flavour.label} {flavour.version} {torch.cuda.get_device_name()}"
    return _Plan(import_flavour(flavour.name), engine, sidecar, name, path)


def _engine_of(plan: bytes, flavour: Flavour, name: str) -> Any:
    """The engine of a plan on this machine's GPU. Raises SSDKDError, which calls the plan by its `name`."""
    import torch

    logger, messages = logger_of(flavour.name)
    messages.clear()
    engine = import_flavour(flavour.name).Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise SSDKDError(
            f"{name} cannot be loaded by {flavour.label} {flavour.version} on {torch.cuda.get_device_name()}: "
            f"{reason_of(messages)}",
            AGAIN if flavour.name == "tensorrt" else OTHER_GPU,
        )
    return engine


def _run_once(plan: _Plan, context: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        buffers = _bind(plan, context, torch.from_numpy(np.ascontiguousarray(images)).cuda())
        _enqueue(plan, context, stream)
        logits = buffers[1].float().cpu().numpy()
    return np.asarray(logits, dtype=np.float32)


def _bind(plan: _Plan, context: Any, images: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Give a context its input and an output buffer, both on the GPU in the plan's own types, and return them."""
    import torch

    names = plan.sidecar.input.name, plan.sidecar.output.name
    dtypes = [getattr(torch, _torch_name(plan.engine.get_tensor_dtype(name).name)) for name in names]
    inputs = images.to(dtypes[0]).contiguous()
    if not context.set_input_shape(names[0], tuple(inputs.shape)):
        raise SSDKDError(
            f"{plan.path} cannot run on images of shape {list(images.shape)}",
            f"it takes {list(plan.sidecar.input.min)} to {list(plan.sidecar.input.max)}",
        )
    outputs = torch.empty(tuple(context.get_tensor_shape(names[1])), dtype=dtypes[1], device="cuda")
    for name, buffer in zip(names, (inputs, outputs), strict=True):
        context.set_tensor_address(name, buffer.data_ptr())
    return inputs, outputs


def _torch_name(name: str) -> str:
    return {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}[name]


def _enqueue(plan: _Plan, context: Any, stream: "torch.cuda.Stream") -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        messages = logger_of(plan.sidecar.flavour)[1]
        raise SSDKDError(f"{plan.path} fails on {plan.name}: {reason_of(messages)}", AGAIN)


def _timing_context(plan: _Plan, cuda_graph: bool) -> tuple[Any, bool]:
    """Return a context to be timed, and whether it captures a CUDA graph by itself, as TensorRT for RTX does."""
    if not hasattr(plan.trt, "CudaGraphStrategy"):
        return plan.engine.create_execution_context(), False
    config = plan.engine.create_runtime_config()
    # Or the first calls run a kernel for any shape while the one for this shape is compiled in the background.
    config.dynamic_shapes_kernel_specialization_strategy = plan.trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if cuda_graph:
        config.cuda_graph_strategy = plan.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return plan.engine.create_execution_context(config), True


def _captured(plan: _Plan, context: Any, stream: "torch.cuda.Stream") -> "torch.cuda.CUDAGraph":
    """Return one call as a CUDA graph, captured after calls have run: the first call may do what cannot be captured."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            _enqueue(plan, context, stream)
    except RuntimeError as error:  # of the end of the capture, which hides what began it
        raise SSDKDError(f"{plan.path} cannot be captured on {plan.name}: {first_line(error)}", AGAIN) from error
    return graph


def _time_round(
    plan: _Plan, context: Any, stream: "torch.cuda.Stream", graph: "torch.cuda.CUDAGraph | None"
) -> list[float]:
    """Return the milliseconds of each of ROUND calls, by events on the stream that they run on."""
    import torch

    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(ROUND)]
    for before, after in events:
        before.record(stream)
        if graph is None:
            _enqueue(plan, context, stream)
        else:
            graph.replay()
        after.record(stream)
    stream.synchronize()
    return [before.elapsed_time(after) for before, after in events]
