"""A module as one ONNX file: torch's dynamo exporter, kept quiet, its result checked and cleaned."""

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from engine.errors import SSDKDError

INPUT_NAME = "images"
OUTPUT_NAME = "logits"

# torch's exporter writes its operators in opset 18 and reaches any other by a version converter that may fail
# halfway. 18 is also read by every ONNX Runtime since 1.14 and by TensorRT 10 and 11.
OPSET = 18


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
    proto = _to_proto(module, input_shape)
    for name, value in metadata.items():
        proto.metadata_props.add(key=name, value=value)
    write_atomically(path, proto.SerializeToString())


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, or nothing at all: a temporary file in the same folder, then a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk may say so only here
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _to_proto(module: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    copied = copy.deepcopy(module).to(device="cpu", dtype=torch.float32)
    if any(child.training for child in copied.modules()):
        copied.eval()
    images = torch.zeros(2, *input_shape)
    batch = torch.export.Dim("batch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                copied,
                (images,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                dynamic_shapes=({0: batch},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise SSDKDError(
            f"{type(module).__name__} cannot be exported to ONNX: {_first_line(error)}",
            "choose a student from `ssdkd students`: each of them exports",
        ) from error
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and log lines of torch's exporter off the terminal; exceptions pass."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
