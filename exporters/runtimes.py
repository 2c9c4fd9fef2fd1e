"""A model file, or a module, as something callable: images in, logits out."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError
from engine.processors import computing_threads
from exporters.files import check_utf8

if TYPE_CHECKING:
    from torch import nn

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Shape = tuple[int, int, int]  # C, H, W

WHOLE_BATCH, WHOLE_PIXELS = 256, 64 * 64  # so many images at once up to this area; beyond, fewer

ONNX_PROVIDER = "CPUExecutionProvider"
ONNX_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")  # of the logits
ONNX_IMAGES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ONNX_ERRORS = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
ONLY_FATAL = 4  # of ONNX Runtime's log levels: what goes wrong comes as an exception, too


@dataclass(frozen=True)
class Runtime:
    """An opened model file. `run` takes images [B, C, H, W] float32 and returns logits [B, classes] float32."""

    name: str
    path: Path
    input_shape: Shape
    classes: int
    fixed_batch: int | None  # the one batch size that the file takes; None: any
    metadata: dict[str, str]
    run: Predict


def open_runtime(path: Path, *, input_shape: Shape | None = None) -> Runtime:
    """Open a model file with the runtime of its suffix, on the processors that this process may use.

    `input_shape` (C, H, W) is needed only where the file leaves its height and width open. Raises SSDKDError for a
    missing, damaged or unsuitable file.
    """
    check_utf8(path)
    if not path.is_file():
        raise SSDKDError(f"no model file at {path}", "give the path of a model file: ssdkd bench RUN/model.onnx")
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise SSDKDError(
            f"{path}: expected a model file ending in {' or '.join(OPENERS)}, found {path.suffix or 'no suffix'!r}",
            f"`{shlex.join(['ssdkd', 'export', str(path)])}` makes an ONNX file of a trained network, with --arch, "
            "--input, --mean and --std where `ssdkd inspect` needs them",
        )
    return opener(path, input_shape)


def predictor(module: "nn.Module") -> Predict:
    """Return a torch module as a function from images [B, C, H, W] float32 to logits [B, classes] float32.

    It runs in eval mode on the device of its weights; the training flags are put back after each call.
    """
    import torch

    from engine.modes import evaluating

    first = next(module.parameters(), None)
    device = torch.device("cpu") if first is None else first.device

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with evaluating(module), torch.no_grad():
            logits = module(torch.from_numpy(images).to(device))
        return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    return run


def to_input(images: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """Return images uint8 [N, H, W, C] as a network takes them: float32 [N, C, H, W], (images / 255 - mean) / std."""
    scaled = images.astype(np.float32) / np.float32(255)
    normalised = (scaled - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), dtype=np.float32)


def inference_batch(input_shape: Shape) -> int:
    """Return how many images (C, H, W) to run at once: fewer as they grow, so that feature maps take level memory."""
    _, height, width = input_shape
    return max(1, min(WHOLE_BATCH, WHOLE_BATCH * WHOLE_PIXELS // (height * width)))


def _open_onnx(path: Path, input_shape: Shape | None) -> Runtime:
    import onnxruntime

    session, inputs, output, metadata = _onnx_session(path)
    fixed_batch, shape = _onnx_input(path, inputs, input_shape)
    input_name, image_type = inputs[0].name, ONNX_IMAGES[inputs[0].type]
    if output.type not in ONNX_FLOATS:
        raise SSDKDError(
            f"{path}: expected float logits [batch, classes], found {output.name} {output.type}",
            "ssdkd runs image classifiers whose first output is the logits",
        )

    def call(images: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            (logits,) = session.run([output.name], {input_name: images.astype(image_type, copy=False)})
        except _onnx_errors() as error:
            takes = f"it takes [{fixed_batch or 'batch'}, {', '.join(map(str, shape))}]"
            raise SSDKDError(
                f"{path} cannot run on images of shape {list(images.shape)}: {_plain_reason(error)}",
                "give the image size that it was made for with --input" if input_shape else takes,
            ) from error
        return np.asarray(logits, dtype=np.float32)

    first_batch = fixed_batch or 1
    logits = call(np.zeros((first_batch, *shape), dtype=np.float32))
    if logits.ndim != 2 or len(logits) != first_batch:
        expected = f"[{fixed_batch or 'batch'}, classes]"
        raise SSDKDError(
            f"{path}: expected logits {expected}, found an output of shape {list(logits.shape)}",
            "ssdkd runs image classifiers whose first output is the logits",
        )
    classes = logits.shape[1]

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        if fixed_batch not in (None, len(images)):
            return _in_parts(run, images, fixed_batch)
        logits = call(images)
        if logits.shape != (len(images), classes):
            raise SSDKDError(
                f"{path} gives logits of shape {list(logits.shape)} for {len(images)} images, "
                f"expected [{len(images)}, {classes}]",
                "it promises any batch and is made for one: export it again, with its batch fixed or really open",
            )
        return logits

    return Runtime(
        name=f"onnxruntime {onnxruntime.__version__} {ONNX_PROVIDER}, {computing_threads()} threads",
        path=path,
        input_shape=shape,
        classes=classes,
        fixed_batch=fixed_batch,
        metadata=metadata,
        run=run,
    )


def _onnx_session(path: Path) -> tuple[Any, Sequence[Any], Any, dict[str, str]]:
    """Return ONNX Runtime's session for a file, silent but for exceptions; its inputs, first output and metadata."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(ONLY_FATAL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ONLY_FATAL
    options.intra_op_num_threads = computing_threads()  # or ONNX Runtime pins threads to cores a container may lack
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[ONNX_PROVIDER])
        metadata = dict(session.get_modelmeta().custom_metadata_map)
        inputs, output = session.get_inputs(), session.get_outputs()[0]
        for value in (*inputs, output):
            _ = value.name, value.shape  # their texts are decoded now, and may be damaged
        return session, inputs, output, metadata
    except _onnx_errors() as error:
        raise SSDKDError(
            f"{path} cannot be opened by ONNX Runtime: {_plain_reason(error)}",
            "the file is damaged or uses operators that ONNX Runtime lacks; export it again",
        ) from error


def _onnx_input(path: Path, inputs: Sequence[Any], input_shape: Shape | None) -> tuple[int | None, Shape]:
    """Return the batch that the graph fixes (None: any) and the shape of its images, completed by what was stated."""
    if len(inputs) != 1 or inputs[0].type not in ONNX_IMAGES or len(inputs[0].shape) != 4:
        found = ", ".join(f"{value.name} {value.type} {value.shape}" for value in inputs)
        raise SSDKDError(
            f"{path}: expected one float32 or float16 input [batch, channels, height, width], found {found}",
            "ssdkd runs image classifiers with one such input",
        )
    batch, *sizes = (size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape)
    declared = "x".join("any" if size is None else str(size) for size in sizes)
    if input_shape is None and None in sizes:
        raise SSDKDError(f"{path} leaves its image size open ({declared})", "state it, for example --input 3x224x224")
    if input_shape and any(size not in (None, stated) for size, stated in zip(sizes, input_shape, strict=True)):
        raise SSDKDError(
            f"{path} takes images of {declared}, found --input {'x'.join(map(str, input_shape))}", "leave --input out"
        )
    channels, height, width = input_shape or (size or 0 for size in sizes)
    return batch, (channels, height, width)


def _onnx_errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions, which share no base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (*(getattr(state, name) for name in ONNX_ERRORS), UnicodeDecodeError)  # a damaged name


def _plain_reason(error: BaseException) -> str:
    """Return an error of ONNX Runtime on one line, without its codes and the path that we name anyway."""
    return re.sub(
        r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?", "", " ".join(str(error).split())
    )


def _in_parts(run: Predict, images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return the logits of any number of images from a file that takes `size` at once; the last part is filled up."""
    count = len(images)
    filled = np.concatenate([images, np.zeros((-count % size, *images.shape[1:]), dtype=np.float32)])
    return np.concatenate([run(filled[start : start + size]) for start in range(0, len(filled), size)])[:count]


def _open_plan(path: Path, input_shape: Shape | None) -> Runtime:
    from exporters.tensorrt_runtime import open_plan

    runtime = open_plan(path)
    if input_shape is not None and input_shape != runtime.input_shape:
        declared, stated = ("x".join(map(str, sizes)) for sizes in (runtime.input_shape, input_shape))
        raise SSDKDError(f"{path} takes images of {declared}, found --input {stated}", "leave --input out")
    return runtime


OPENERS: dict[str, Callable[[Path, Shape | None], Runtime]] = {".onnx": _open_onnx, ".engine": _open_plan}
