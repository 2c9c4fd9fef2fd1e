"""The ways to write a network as INT8 that are compared by `benchmarks.quantizers`, and what they start from."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from torch import nn

from exporters.evaluate import LabelledImages
from exporters.runtimes import Shape, to_input
from exporters.to_onnx import INPUT_NAME, OPSET, OUTPUT_NAME

Inputs = NDArray[np.float32]  # [N, C, H, W], as the network takes them

BATCH = 32  # images of a call
MULTIPLIERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ABSORBED = ("Relu", "Clip")  # into the scale of the convolution before them
OPERATORS = (*MULTIPLIERS, *ABSORBED, "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat")
SYMMETRIC = {"ActivationSymmetric": True, "QuantizeBias": False}  # what TensorRT's parser takes


@dataclass(frozen=True)
class Network:
    """A network, its FP32 file, images to calibrate with and, where it is trained, others to score."""

    name: str
    module: nn.Module
    path: Path
    input_shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: NDArray[np.uint8]  # [N, H, W, C]
    scored: LabelledImages | None

    def calibration(self, count: int, seed: int) -> Inputs:
        """`count` images of the pool, drawn by `seed`."""
        drawn = np.random.default_rng(seed).choice(len(self.pool), count, replace=False)
        return to_input(self.pool[drawn], self.mean, self.std)


@dataclass(frozen=True)
class Recipe:
    """A way to write a network as INT8 to a file.

    `everywhere`: for all networks, not only for the first. `seeds`: so many draws of the calibration images.
    """

    library: str
    quantize: Callable[[Network, Inputs, Path], None]
    everywhere: bool = True
    images: int = 512
    seeds: int = 1


def with_onnxruntime(
    network: Network,
    inputs: Inputs,
    path: Path,
    *,
    operators: tuple[str, ...] | None = OPERATORS,
    activations: QuantType = QuantType.QUInt8,
    method: CalibrationMethod = CalibrationMethod.MinMax,
    per_channel: bool = True,
    extra: Mapping[str, object] | None = None,
) -> None:
    """onnxruntime.quantization on the FP32 file; `operators` None: whatever it can."""
    quantize_static(
        network.path,
        path,
        _Batches(inputs),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=operators and list(operators),
        per_channel=per_channel,
        activation_type=activations,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
        extra_options=dict(extra or {}),
    )


def with_torchao(network: Network, inputs: Inputs, path: Path) -> None:
    """torchao's PT2E with the quantizer for x86, then torch's dynamo exporter."""
    pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    example, batch = torch.zeros(2, *network.input_shape), torch.export.Dim("batch")
    graph = torch.export.export(network.module.eval(), (example,), dynamic_shapes=({0: batch},)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(graph, quantizer)
    run_over(prepared, inputs)
    program = torch.onnx.export(
        pt2e.convert_pt2e(prepared),
        (example,),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=({0: batch},),
    )
    assert program is not None
    model = program.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("metadata_props")  # lines of source code: half of a small file
    path.write_bytes(model.SerializeToString())


def with_modelopt(network: Network, inputs: Inputs, path: Path) -> None:
    """NVIDIA's ModelOpt, its torch side, then torch's old exporter: the dynamo one stops at its quantizers.

    BatchNorm is folded before: behind quantized weights no runtime can.
    """
    from torch.fx.experimental.optimization import fuse

    mtq = importlib.import_module("modelopt.torch.quantization")
    quantized = mtq.quantize(fuse(network.module.eval()), mtq.INT8_DEFAULT_CFG, partial(run_over, inputs=inputs))
    with torch.no_grad():
        torch.onnx.export(
            quantized,
            (torch.zeros(2, *network.input_shape),),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}},
        )


class _Batches:
    """The images as ONNX Runtime's calibration reads them."""

    def __init__(self, inputs: Inputs) -> None:
        self.parts: Iterator[Inputs] = (inputs[start : start + BATCH] for start in range(0, len(inputs), BATCH))

    def get_next(self) -> dict[str, Inputs] | None:
        part = next(self.parts, None)
        return None if part is None else {INPUT_NAME: part}


def run_over(module: Callable[[torch.Tensor], torch.Tensor], inputs: Inputs) -> None:
    with torch.no_grad():
        for start in range(0, len(inputs), BATCH):
            module(torch.from_numpy(inputs[start : start + BATCH]))


ort = with_onnxruntime
RECIPES: dict[str, Recipe] = {
    "U8S8": Recipe("onnxruntime", ort, seeds=3),
    "U8S8, every operator": Recipe("onnxruntime", partial(ort, operators=None)),
    "U8S8, multipliers alone": Recipe("onnxruntime", partial(ort, operators=MULTIPLIERS)),
    "U8S8, multipliers, Relu, Clip": Recipe("onnxruntime", partial(ort, operators=(*MULTIPLIERS, *ABSORBED))),
    "U8S8, one scale a weight": Recipe("onnxruntime", partial(ort, per_channel=False)),
    "S8S8 symmetric": Recipe("onnxruntime", partial(ort, activations=QuantType.QInt8, extra=SYMMETRIC), seeds=3),
    "S8S8": Recipe("onnxruntime", partial(ort, activations=QuantType.QInt8), everywhere=False),
    "U8S8, 128 images": Recipe("onnxruntime", ort, everywhere=False, images=128),
    "U8S8, 2048 images": Recipe("onnxruntime", ort, everywhere=False, images=2048),
    "U8S8, moving average": Recipe(
        "onnxruntime", partial(ort, extra={"CalibMovingAverage": True}), everywhere=False, seeds=3
    ),
    "U8S8, entropy": Recipe("onnxruntime", partial(ort, method=CalibrationMethod.Entropy), everywhere=False),
    "U8S8, percentile": Recipe("onnxruntime", partial(ort, method=CalibrationMethod.Percentile), everywhere=False),
    "U8S8, symmetric ranges": Recipe(
        "onnxruntime", partial(ort, extra={"CalibTensorRangeSymmetric": True}), everywhere=False
    ),
    "X86InductorQuantizer": Recipe("torchao", with_torchao),
    "INT8_DEFAULT_CFG": Recipe("modelopt", with_modelopt),
}
PACKAGES = {"onnxruntime": "onnxruntime", "torchao": "torchao", "modelopt": "nvidia-modelopt"}
