"""Student in, files out that other runtimes open: one table of formats, the proof, the clock."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Format:
    """One file format that a student can be written in.

    `write(module, path, *, input_shape, metadata)` writes `path` or raises; `requires` names the packages it imports.
    """

    name: str
    suffix: str
    requires: tuple[str, ...]
    write: Callable[..., None]


def _write_onnx(
    module: "nn.Module", path: Path, *, input_shape: tuple[int, int, int], metadata: Mapping[str, str]
) -> None:
    from exporters.to_onnx import write_onnx  # torch: not needed to list the formats

    write_onnx(module, path, input_shape=input_shape, metadata=metadata)


FORMATS: dict[str, Format] = {
    "onnx": Format("onnx", ".onnx", ("torch", "onnx", "onnxscript"), _write_onnx),
}
