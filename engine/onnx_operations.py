"""ONNX operations as PyTorch functions with gradients: inputs by position, attributes by name.

Sizes and axes are int64: constants arrive as tuples of Python ints, computed ones as tensors on the CPU, so that
hardly an operation waits for a GPU; where one of these meets the images it moves to their device, and the host waits.
What is not here, ssdkd says it cannot run; what is here is compared with ONNX Runtime on every file that is read.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.onnx_windows import average_pool, convolution, max_pool

Ints = Sequence[int]
Sizes = Tensor | Ints | int

# TensorProto.DataType; half precision is computed in float32.
DTYPES = {1: torch.float32, 10: torch.float32, 11: torch.float32, 16: torch.float32} | {
    **{2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64, 9: torch.bool},
}


def ints(value: Sizes) -> list[int]:
    """Sizes as plain numbers."""
    if isinstance(value, Tensor):
        return [int(item) for item in value.flatten().tolist()]
    return [value] if isinstance(value, int) else [int(item) for item in value]


def tensor(value: Any, like: Any = None) -> Tensor:
    """A constant as a tensor, and what is on the CPU on the device of `like`; lone numbers mix with every device."""
    device = like.device if isinstance(like, Tensor) else None
    if isinstance(value, Tensor):
        stays = device is None or not value.is_cpu or not value.dim()
        return value if stays else value.to(device)
    if isinstance(value, int | float):
        return torch.full((), value, device=device)
    return torch.tensor(value, device=device)


def _together(*values: Any) -> list[Tensor]:
    """Values of one operation as tensors on the device of the images, if one of them is there."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    like = next((found for found in tensors if not found.is_cpu), tensors[0] if tensors else None)
    return [tensor(value, like) for value in values]


def _pairwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    return lambda a, b: function(*_together(a, b))


def _divide(a: Any, b: Any) -> Tensor:
    a, b = _together(a, b)
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha a b + beta c, with either factor transposed."""
    product = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def reshape(x: Any, shape: Sizes, *, allowzero: int = 0) -> Tensor:
    """A size of 0 is that of the input unless `allowzero`."""
    whole = tensor(x)
    return whole.reshape(
        [whole.shape[axis] if size == 0 and not allowzero else size for axis, size in enumerate(ints(shape))]
    )


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """To two dimensions, cut before `axis`."""
    return x.reshape(math.prod(x.shape[:axis]), -1) if axis else x.reshape(1, -1)


def slice_(
    x: Any,
    starts: Sizes = (),
    ends: Sizes = (),
    axes: Sizes | None = None,
    steps: Sizes | None = None,
    **attributes: Sizes,
) -> Tensor:
    """x[start:end:step] along each of `axes`; old files have these as attributes."""
    whole = tensor(x)
    begins, stops = ints(attributes.get("starts", starts)), ints(attributes.get("ends", ends))
    along = attributes.get("axes", axes)
    where = list(range(len(begins))) if along is None else ints(along)
    strides = [1] * len(begins) if steps is None else ints(steps)
    for axis, begin, stop, step in zip(where, begins, stops, strides, strict=True):
        size = whole.shape[axis]  # files say "to the end" by the largest int64
        first, last = (0, size) if step > 0 else (-1, size - 1)
        begin = max(0, min(begin + size if begin < 0 else begin, last))
        stop = max(first, min(stop + size if stop < 0 else stop, last))
        if step > 0:
            whole = whole[(slice(None),) * (axis % whole.dim()) + (slice(begin, stop, step),)]
        else:
            whole = whole.index_select(axis, torch.arange(begin, stop, step, device=whole.device))
    return whole


def gather(x: Any, indices: Any, *, axis: int = 0) -> Tensor:
    """x at `indices` along `axis`, negative ones from the end."""
    whole = tensor(x)
    chosen = tensor(indices).to(whole.device)
    chosen = torch.where(chosen < 0, chosen + whole.shape[axis], chosen)
    picked = whole.index_select(axis, chosen.flatten())
    axis %= whole.dim()
    return picked.reshape([*whole.shape[:axis], *chosen.shape, *whole.shape[axis + 1 :]])


def split(
    x: Tensor, sizes: Sizes | None = None, *, axis: int = 0, num_outputs: int = 0, **attributes: Ints
) -> list[Tensor]:
    """Parts of given sizes, or `num_outputs` of the same, the last one smaller."""
    given = attributes.get("split", sizes)
    part: Any = ints(given) if given is not None else math.ceil(x.shape[axis] / num_outputs)
    return list(torch.split(x, part, dim=axis))


def squeeze(x: Any, axes: Sizes | None = None, **attributes: Ints) -> Tensor:
    """Without the axes of size 1."""
    along = attributes.get("axes", axes)
    return tensor(x).squeeze() if along is None else tensor(x).squeeze(tuple(ints(along)))


def unsqueeze(x: Any, axes: Sizes = (), **attributes: Ints) -> Tensor:
    """With axes of size 1 at the positions `axes` of the result."""
    whole = tensor(x)
    along = ints(attributes.get("axes", axes))
    for axis in sorted(axis % (whole.dim() + len(along)) for axis in along):
        whole = whole.unsqueeze(axis)
    return whole


def _reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(
        x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0, **attributes: Ints
    ) -> Tensor:
        along = attributes.get("axes", axes)
        where = [] if along is None else ints(along)
        if not where and noop_with_empty_axes:
            return x
        return function(x, tuple(where) or tuple(range(x.dim())), bool(keepdims))

    return reduce


def pad(
    x: Tensor,
    pads: Sizes = (),
    value: Any = 0.0,
    axes: Sizes | None = None,
    *,
    mode: str = "constant",
    **attributes: Any,
) -> Tensor:
    """Constant, edge or reflected pixels around some axes; old files have the sizes as attributes."""
    sizes = ints(attributes.get("pads", pads))
    where = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in ints(axes)]
    around = {axis: (sizes[index], sizes[index + len(where)]) for index, axis in enumerate(where)}
    touched = min((axis for axis, both in around.items() if any(both)), default=x.dim())
    both = [side for axis in reversed(range(touched, x.dim())) for side in around.get(axis, (0, 0))]
    fill = float(attributes.get("value", value if value is not None else 0.0))
    if mode == "constant":
        return F.pad(x, both, value=fill)
    return F.pad(x, both, mode={"edge": "replicate", "reflect": "reflect"}[mode])


def clip(x: Tensor, low: Any = None, high: Any = None, **attributes: float) -> Tensor:
    """Between two numbers; old files have them as attributes."""
    low, high = attributes.get("min", low), attributes.get("max", high)
    return x.clamp(None if low is None else float(low), None if high is None else float(high))


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Along one axis; for the two-dimensional logits of a classifier, old files mean the same."""
    return x.softmax(axis)


def expand(x: Any, shape: Sizes) -> Tensor:
    """Repeated to `shape`, where both broadcast."""
    whole = tensor(x)
    return whole.broadcast_to(np.broadcast_shapes(whole.shape, tuple(ints(shape))))


def constant_of_shape(shape: Sizes, *, value: Any = 0.0, device: torch.device) -> Tensor:
    """A tensor of one number on `device`; integers, which are mostly sizes, stay on the CPU."""
    return torch.full(ints(shape), value, device="cpu" if type(value) is int else device)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the condition holds, else b."""
    chosen, a, b = _together(condition, a, b)
    return torch.where(chosen.to(a.device if b.is_cpu else b.device), a, b)


def shape_of(x: Any, *, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes of x, a tensor or a constant, as a tensor on the CPU."""
    return torch.tensor(np.shape(x)[start:end], dtype=torch.int64)


def concat(*parts: Any, axis: int) -> Tensor:
    """Parts end to end; lone tuples are sizes."""
    return torch.cat(_together(*parts), axis)


def cast(x: Any, *, to: int, saturate: int = 1) -> Tensor:
    """To another number type."""
    del saturate  # of 8-bit floats, which are not in DTYPES
    return tensor(x).to(DTYPES[to])


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Over the axes from `axis` on."""
    del stash_type  # the precision of the statistics: float32 here
    return F.layer_norm(x, x.shape[axis:], weight, bias, epsilon)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """A slope a channel below zero."""
    return torch.where(x < 0, x * slope, x)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels to blocks of pixels."""
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, blocksize, blocksize, channels // blocksize**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, channels // blocksize**2, height * blocksize, width * blocksize)


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Over the pixels of each image."""
    return F.instance_norm(x, weight=weight, bias=bias, eps=epsilon)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": _pairwise(torch.add),
    "And": _pairwise(torch.logical_and),
    "AveragePool": average_pool,
    "Cast": cast,
    "Ceil": torch.ceil,
    "Celu": lambda x, alpha=1.0: F.celu(x, alpha),
    "Clip": clip,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Conv": convolution,
    "DepthToSpace": depth_to_space,
    "Div": _divide,
    "Dropout": lambda x, *_, **_attributes: x,
    "Elu": lambda x, alpha=1.0: F.elu(x, alpha),
    "Equal": _pairwise(torch.eq),
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": expand,
    "Flatten": flatten,
    "Floor": torch.floor,
    "Gather": gather,
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": gemm,
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True),
    "Greater": _pairwise(torch.gt),
    "GreaterOrEqual": _pairwise(torch.ge),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "LeakyRelu": lambda x, alpha=0.01: F.leaky_relu(x, alpha),
    "Less": _pairwise(torch.lt),
    "LessOrEqual": _pairwise(torch.le),
    "Log": torch.log,
    "LogSoftmax": lambda x, axis=-1: x.log_softmax(axis),
    "MatMul": torch.matmul,
    "Max": _pairwise(torch.maximum),
    "MaxPool": max_pool,
    "Min": _pairwise(torch.minimum),
    "Mish": F.mish,
    "Mod": lambda a, b, fmod=0: (torch.fmod if fmod else torch.remainder)(*_together(a, b)),
    "Mul": _pairwise(torch.mul),
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": _pairwise(torch.logical_or),
    "PRelu": prelu,
    "Pad": pad,
    "Pow": _pairwise(torch.pow),
    "Reciprocal": torch.reciprocal,
    "ReduceL2": _reduction(lambda x, axes, keep: x.norm(2, axes, keep)),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum),
    "Relu": F.relu,
    "Reshape": reshape,
    "Selu": F.selu,
    "Shape": shape_of,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Slice": slice_,
    "Softmax": softmax,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "SpaceToDepth": lambda x, blocksize: F.pixel_unshuffle(x, blocksize),
    "Split": split,
    "Sqrt": torch.sqrt,
    "Squeeze": squeeze,
    "Sub": _pairwise(torch.sub),
    "Sum": lambda *parts: sum(_together(*parts)),
    "Swish": F.silu,
    "Tanh": torch.tanh,
    "Tile": lambda x, repeats: x.repeat(ints(repeats)),
    "Transpose": lambda x, perm=None: x.permute(perm if perm is not None else tuple(reversed(range(x.dim())))),
    "Unsqueeze": unsqueeze,
    "Where": where,
}
