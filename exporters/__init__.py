"""Student in, files out that other runtimes open: one table of formats, the precision, the proof, the clock."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One file format. All are made of the ONNX graph, which holds the precision; `requires` names packages."""

    suffix: str
    requires: tuple[str, ...]


PRECISIONS = ("fp32", "fp16", "int8")
FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ("torch", "onnx", "onnxscript")),
    "trt": Format(".engine", ()),  # tensorrt or tensorrt_rtx: to_tensorrt.find_flavour looks for either
}
