"""A module as one ONNX file: torch's dynamo exporter, kept quiet, its result checked and cleaned."""

import copy
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from engine.errors import SSDKDError, first_line
from exporters.files import write_atomically
from exporters.metadata import ssdkd_version
from exporters.quiet import quiet

INPUT_NAME = "images"
OUTPUT_NAME = "logits"

# torch's exporter writes its operators in opset 18 and reaches any other by a version converter that may fail
# halfway. 18 is also read by every ONNX Runtime since 1.14 and by TensorRT 10 and 11.
OPSET = 18

MAX_BYTES = 2_000_000_000  # protobuf ends at 2 GiB; the graph around the weights needs some of it

HINT = "`ssdkd students` lists networks that export; one of your own must pass torch.export with any batch size"


class WithPreprocessing(nn.Module):
    """The network with its normalisation in front: takes images in 0...1, [B, C, H, W], gives logits [B, classes]."""

    mean: Tensor  # [1, C, 1, 1]
    std: Tensor  # [1, C, 1, 1]

    def __init__(self, module: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images in 0...1."""
        logits: Tensor = self.module((images - self.mean) / self.std)  # [B, classes]
        return logits


def write_onnx(
    module: nn.Module, path: Path, *, input_shape: tuple[int, int, int], metadata: Mapping[str, str]
) -> None:
    """Write `module` to `path` as one self-contained ONNX file with a dynamic batch.

    Input "images" [batch, C, H, W] float32, output "logits" [batch, classes] float32. `metadata` becomes the file's
    metadata_props. The module itself is not touched: a float32 copy in eval mode on the CPU is exported.
    Raises SSDKDError where the network cannot be exported, OSError where the file cannot be written; neither leaves
    a file behind.
    """
    write_atomically(path, to_onnx(module, input_shape=input_shape, metadata=metadata).SerializeToString())


def to_onnx(module: nn.Module, *, input_shape: tuple[int, int, int], metadata: Mapping[str, str]) -> onnx.ModelProto:
    """`module` as a checked ONNX model; as `write_onnx`, without the file."""
    proto = _to_proto(module, input_shape)
    for name, value in metadata.items():
        proto.metadata_props.add(key=name, value=value)
    return proto


def _to_proto(module: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """Return `module` as a checked ONNX model without metadata."""
    name = type(module).__name__
    size_bytes = 4 * sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    if size_bytes >= MAX_BYTES:
        raise SSDKDError(
            f"{name} has {size_bytes / 1e9:.1f} GB of weights; one ONNX file holds at most {MAX_BYTES / 1e9:.1f} GB",
            "choose a smaller network: ssdkd students",
        )
    if any(isinstance(child, torch.jit.ScriptModule) for child in module.modules()):
        raise SSDKDError(
            f"{name} is TorchScript, or has a part that is: torch's ONNX exporter does not take it",
            "give the plain network that was scripted: a teacher's with --arch, a student's as your own function",
        )
    try:
        with quiet(), torch.no_grad():  # where it fails it prints whole graphs, past `verbose=False`
            program = torch.onnx.export(
                copy.deepcopy(module).to(device="cpu", dtype=torch.float32).eval(),
                (torch.zeros(2, *input_shape),),  # 2: torch.export takes a batch of 1 for a constant
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise SSDKDError(f"{name} cannot be exported to ONNX: {_root_cause(error)}", HINT) from error
    assert program is not None  # None comes only from the old exporter
    proto = program.model_proto
    _strip_traces(proto)
    problem = _interface_problem(proto)
    if problem:
        raise SSDKDError(f"{name} cannot be exported to ONNX: {problem}", HINT)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _strip_traces(proto: onnx.ModelProto) -> None:
    """Remove what the exporter notes at each node: paths, lines of source code and class names of this machine.

    A model that is handed on must not carry them; without them the same network also gives the same bytes everywhere.
    """
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    proto.producer_name, proto.producer_version = "ssdkd", ssdkd_version()


def _interface_problem(proto: onnx.ModelProto) -> str | None:
    """Return how the graph differs from images [batch, C, H, W] -> logits [batch, classes], or None."""
    inputs, outputs = list(proto.graph.input), list(proto.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        return f"expected one input and one output, found {len(inputs)} and {len(outputs)}"
    for value in (*inputs, *outputs):
        dimensions = value.type.tensor_type.shape.dim
        if not dimensions or not dimensions[0].dim_param:
            size = dimensions[0].dim_value if dimensions else "none"
            return f"it works for one batch size only ({value.name}: {size}), expected any"
    return None


def _root_cause(error: BaseException) -> str:
    """Return the first line of the exception that started the chain: the others are the exporter's advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
