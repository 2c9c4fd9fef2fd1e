"""A model file, or a module, as something callable: images in, logits out."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError

if TYPE_CHECKING:
    from torch import nn

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Runtime:
    """An opened model file. `run` takes images [B, C, H, W] float32 and returns logits [B, classes] float32."""

    name: str
    path: Path
    threads: int
    input_shape: tuple[int, int, int]  # C, H, W
    classes: int
    fixed_batch: int | None  # the one batch size that the file takes; None: any
    metadata: dict[str, str]
    run: Predict


def open_runtime(
    path: Path, *, threads: int | None = None, device: str = "cpu", input_shape: tuple[int, int, int] | None = None
) -> Runtime:
    """Open a model file with the runtime of its suffix.

    `threads` defaults to the processors that this process may use. `input_shape` (C, H, W) is needed only where the
    file leaves its height and width open. Raises SSDKDError for a missing, damaged or unsuitable file.
    """
    if not path.is_file():
        raise SSDKDError(f"no model file at {path}", "give the path of a model file: ssdkd bench RUN/model.onnx")
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise SSDKDError(
            f"{path}: expected a model file ending in {' or '.join(OPENERS)}, found {path.suffix or 'no suffix'!r}",
            "export the run first: ssdkd export RUN --export onnx",
        )
    return opener(path, threads or available_threads(), device, input_shape)


def predictor(module: "nn.Module") -> Predict:
    """Return a torch module as a function from images [B, C, H, W] float32 to logits [B, classes] float32.

    It runs in eval mode on the device of its weights; the training flags are put back after each call.
    """
    import torch

    first = next(module.parameters(), None)
    device = torch.device("cpu") if first is None else first.device

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        training = [child for child in module.modules() if child.training]
        if training:
            module.eval()
        try:
            with torch.no_grad():
                logits = module(torch.from_numpy(images).to(device))
        finally:
            for child in training:
                child.training = True
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    return run


def to_input(images: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """Return images uint8 [N, H, W, C] as a network takes them: float32 [N, C, H, W], (images / 255 - mean) / std."""
    scaled = images.astype(np.float32) / np.float32(255)
    normalised = (scaled - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype=np.float32)


def available_threads() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_onnx(path: Path, threads: int, device: str, input_shape: tuple[int, int, int] | None) -> Runtime:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    onnxruntime.set_default_logger_severity(4)  # fatal only: what goes wrong comes as an exception
    provider = PROVIDERS[device.split(":")[0]]
    if provider not in onnxruntime.get_available_providers():
        raise SSDKDError(
            f"this ONNX Runtime cannot run on {device!r}: it has no {provider}",
            "pip install onnxruntime-gpu, or run on the CPU",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    provider_options: dict[str, Any] = {}
    if device != "cpu":  # TF32 keeps 10 bits of a float's 23: a float32 file would fail its proof
        provider_options = {"device_id": device.partition(":")[2] or "0", "use_tf32": "0"}
    known = tuple(
        getattr(errors, name)
        for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    )
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, provider_options)])
    except known as error:
        raise SSDKDError(
            f"{path} cannot be opened by ONNX Runtime: {_one_line(error)}",
            "the file is damaged or uses operators that ONNX Runtime lacks; export it again",
        ) from error

    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{value.name} {value.type} {value.shape}" for value in inputs)
        raise SSDKDError(
            f"{path}: expected one float32 input [batch, channels, height, width], found {found}",
            "ssdkd runs image classifiers with one float32 input",
        )
    batch, *declared = inputs[0].shape
    shape = tuple(value if isinstance(value, int) else None for value in declared)
    if input_shape is None and None in shape:
        raise SSDKDError(
            f"{path} leaves its input open: {inputs[0].shape}", "state it: --input CxHxW, for example --input 3x224x224"
        )
    if input_shape is not None and any(
        value not in (None, wanted) for value, wanted in zip(shape, input_shape, strict=True)
    ):
        raise SSDKDError(
            f"{path} takes {'x'.join(map(str, shape))}, asked for {'x'.join(map(str, input_shape))}",
            "leave --input out",
        )
    resolved = input_shape or tuple(int(value) for value in shape if value is not None)
    fixed_batch = batch if isinstance(batch, int) else None
    input_name, output_name = inputs[0].name, outputs[0].name

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            (logits,) = session.run([output_name], {input_name: images})
        except known as error:
            raise SSDKDError(
                f"{path} cannot run on images of shape {list(images.shape)}: {_one_line(error)}",
                f"it takes [{batch}, {', '.join(map(str, resolved))}]",
            ) from error
        return np.asarray(logits, dtype=np.float32)

    logits = run(np.zeros((fixed_batch or 1, *resolved), dtype=np.float32))
    if logits.ndim != 2:
        raise SSDKDError(
            f"{path}: expected logits [batch, classes], found an output of shape {list(logits.shape)}",
            "ssdkd runs image classifiers whose first output is the logits",
        )
    return Runtime(
        name=f"onnxruntime {onnxruntime.__version__} {provider}",
        path=path,
        threads=threads,
        input_shape=(resolved[0], resolved[1], resolved[2]),
        classes=logits.shape[1],
        fixed_batch=fixed_batch,
        metadata=dict(session.get_modelmeta().custom_metadata_map),
        run=run,
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
OPENERS: dict[str, Callable[[Path, int, str, tuple[int, int, int] | None], Runtime]] = {".onnx": _open_onnx}
