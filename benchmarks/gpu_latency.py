"""Latency of students on a machine with a GPU: in PyTorch (bfloat16, a CUDA graph), ONNX Runtime, as TensorRT plans.

    python -m benchmarks.gpu_latency [--students wrn16_2 ...] [--pixels 32] [--out benchmarks/results/gpu_latency.json]

One command for a machine with a GPU, some minutes. The students have random weights, which cost as much time as trained
ones. What is not installed, or not supported by the chip, is written down with the library's own reason.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import RESULTS, provenance, save
from benchmarks.int8_speed import CHANNELS, CLASSES, student
from engine.errors import SSDKDError
from exporters.bench import bench_together
from exporters.precision import to_fp16
from exporters.runtimes import Runtime
from exporters.tensorrt_runtime import time_plan
from exporters.to_onnx import to_onnx
from exporters.to_tensorrt import build_plan, find_flavour

BATCHES = (1, 64)
STUDENTS = ("wrn16_2", "resnet20", "mobilenetv2")
WARM_UP, REPLAYS = 20, 200
PROVIDERS = {"GPU": "CUDAExecutionProvider", "CPU": "CPUExecutionProvider"}  # of ONNX Runtime


def percentiles(taken_ms: list[float]) -> dict[str, float]:
    """p50, p90 and p99 of single calls."""
    return dict(zip(("p50", "p90", "p99"), np.percentile(taken_ms, (50, 90, 99)).tolist(), strict=True))


def in_torch(module: nn.Module, batch: int, shape: tuple[int, int, int]) -> dict[str, float]:
    """Milliseconds of a call replayed from a CUDA graph, bfloat16, channels last, by CUDA events."""
    network = module.to("cuda", torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, *shape, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                network(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            network(images)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return percentiles([start.elapsed_time(end) for start, end in events])


def in_onnxruntime(path: Path, provider: str, batch: int, shape: tuple[int, int, int]) -> dict[str, float]:
    """Milliseconds of a call with arrays on the host. Raises RuntimeError where ONNX Runtime has no such provider.

    On a CPU it takes as many threads as it likes.
    """
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"onnxruntime {onnxruntime.__version__} has no {provider}: onnxruntime-gpu has")
    session = onnxruntime.InferenceSession(path, providers=[provider])
    name = session.get_inputs()[0].name

    def run(images: Any) -> Any:
        return session.run(None, {name: images})[0]

    runtime = Runtime(f"onnxruntime {provider}", path, shape, CLASSES, None, {}, run)
    images = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
    (latency,) = bench_together([runtime], images)
    return {"p50": latency.p50_ms, "p90": latency.p90_ms, "p99": latency.p99_ms}


def in_tensorrt(path: Path, precision: str, batch: int) -> dict[str, float]:
    """Milliseconds of a call of a plan, replayed from a CUDA graph. Raises SSDKDError where there is no library."""
    plan = path.with_suffix(".engine")
    batches = (min(BATCHES), max(BATCHES), max(BATCHES))
    build_plan(
        path, plan, precision=precision, batches=batches, workspace_mb=None, timing_cache=None, flavour=find_flavour()
    )
    latency = time_plan(plan, batch, cuda_graph=True)
    return {"p50": latency.p50_ms, "p90": latency.p90_ms, "p99": latency.p99_ms}


def tried(measure: Callable[..., dict[str, float]], *given: Any) -> dict[str, Any]:
    """What `measure` found, or why it could not."""
    try:
        return {"latency_ms": measure(*given)}
    except (SSDKDError, RuntimeError, OSError) as error:
        return {"not_run": error.message if isinstance(error, SSDKDError) else str(error).splitlines()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS))
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_latency.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "no CUDA GPU that PyTorch can use: run this on a machine that has one (`ssdkd doctor` says what is missing)"
        )
    source = provenance(f"python -m benchmarks.gpu_latency --pixels {arguments.pixels}")
    shape, rows = (CHANNELS, arguments.pixels, arguments.pixels), []
    for name in arguments.students:
        with tempfile.TemporaryDirectory() as folder:
            exported = to_onnx(student(name, arguments.pixels), input_shape=shape, metadata={})
            paths = {"fp32": Path(folder) / "fp32.onnx", "fp16": Path(folder) / "fp16.onnx"}
            paths["fp32"].write_bytes(exported.SerializeToString())
            paths["fp16"].write_bytes(to_fp16(exported).SerializeToString())
            for batch in BATCHES:
                rows += [
                    {"network": name, "batch": batch, "runtime": runtime, **found}
                    for runtime, found in (
                        ("torch, bfloat16, CUDA graph", tried(in_torch, student(name, arguments.pixels), batch, shape)),
                        *(
                            (
                                f"ONNX Runtime on the {processor}, float32",
                                tried(in_onnxruntime, paths["fp32"], provider, batch, shape),
                            )
                            for processor, provider in PROVIDERS.items()
                        ),
                        ("TensorRT, float32", tried(in_tensorrt, paths["fp32"], "fp32", batch)),
                        ("TensorRT, float16", tried(in_tensorrt, paths["fp16"], "fp16", batch)),
                    )
                ]
                print(*rows[-5:], sep="\n", flush=True)
                save(arguments.out, {"kind": "gpu_latency", **source, "pixels": arguments.pixels, "rows": rows})


if __name__ == "__main__":
    main()
