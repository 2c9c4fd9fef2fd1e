"""How fast INT8 is on this processor: every student of the table in float32 and INT8, in turn, in one process.

    python -m benchmarks.int8_speed [--teacher FILE ...] [--pixels 32] [--out benchmarks/results/int8_speed.json]

The students have random weights, which cost as much time as trained ones; a --teacher is loaded. Integers as the
profile x86-vnni wants them. Run it on an idle machine.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.common import RESULTS, provenance, save
from engine.students import STUDENTS, build_network
from engine.teacher import load_teacher
from exporters.bench import bench_together
from exporters.precision import Scheme, integer_share, to_int8
from exporters.runtimes import open_runtime
from exporters.to_onnx import to_onnx
from profiles import load_profile

BATCHES = (1, 32)
CLASSES, CHANNELS, CALIBRATION_IMAGES = 10, 3, 64
PROFILE = "x86-vnni"


def student(name: str, pixels: int) -> nn.Module:
    """A student whose BatchNorm layers have seen something."""
    torch.manual_seed(0)
    module = build_network(name, classes=CLASSES, channels=CHANNELS, pixels=pixels).train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(16, CHANNELS, pixels, pixels))
    return module.eval()


def measure(name: str, module: nn.Module, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Medians in milliseconds at each batch, float32 and INT8 in turn, and how many times faster INT8 is."""
    exported = to_onnx(module, input_shape=shape, metadata={})
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((CALIBRATION_IMAGES, *shape), dtype=np.float32)
    quantized = to_int8(exported, inputs, Scheme(**dataclasses.asdict(load_profile(PROFILE).quantization)))
    row: dict[str, Any] = {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "integer_share": 100 * integer_share(quantized),
        "size_ratio": quantized.ByteSize() / exported.ByteSize(),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"]
        for path, model in zip(paths, (exported, quantized), strict=True):
            onnx.save(model, path)
        runtimes = [open_runtime(path) for path in paths]
        for batch in BATCHES:
            exact, integer = bench_together(runtimes, inputs[:batch], min_seconds=1.0)
            row[f"fp32_ms_{batch}"], row[f"int8_ms_{batch}"] = exact.p50_ms, integer.p50_ms
            row[f"times_faster_{batch}"] = exact.p50_ms / integer.p50_ms
    row["runtime"] = runtimes[0].name
    print(f"{name}: {row['times_faster_1']:.2f} and {row['times_faster_32']:.2f} times faster", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, action="append", default=[])
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "int8_speed.json")
    arguments = parser.parse_args()
    source = provenance(
        f"python -m benchmarks.int8_speed {'--teacher FILE ' * len(arguments.teacher)}--pixels {arguments.pixels}"
    )
    rows = []
    for path in arguments.teacher:
        teacher = load_teacher(path)
        rows.append(measure(path.stem, teacher.module, teacher.spec.input_shape))
    shape = (CHANNELS, arguments.pixels, arguments.pixels)
    for name in STUDENTS:
        rows.append(measure(name, student(name, arguments.pixels), shape))
        save(
            arguments.out,
            {"kind": "int8_speed", **source, "profile": PROFILE, "pixels": arguments.pixels, "rows": rows},
        )


if __name__ == "__main__":
    main()
