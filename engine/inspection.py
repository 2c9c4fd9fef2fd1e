"""What `ssdkd inspect` says about a teacher: its size, what is suspicious, and the command that compresses it."""

import shlex
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from engine.batchnorm import has_possible_variances, has_running_statistics, is_trained
from engine.graphs import GraphBatchNorm
from engine.modes import evaluating
from engine.probing import noise
from engine.shapes import words
from engine.students import build_network
from engine.teacher import Teacher, TeacherSpec, tells_images_apart

MAX_NAMED = 3
SUGGESTED_STUDENTS = ("mobilenetv2", "resnet20", "resnet8")  # the largest first
WORTH_TRYING = (0.5, 1.0)  # below this share of the teacher's parameters and of its FLOPs; rather the first

aten = torch.ops.aten
KINDS = {aten.convolution: "convolution", aten.addmm: "matrix product", aten.mm: "matrix product"}


@dataclass(frozen=True)
class Inspection:
    """A teacher as `ssdkd inspect` shows it."""

    spec: TeacherSpec
    flops: int  # of one image: multiplications and additions counted apart
    layers: dict[str, int]  # class name -> how many, of those with weights; of a graph its operations
    findings: tuple[str, ...]  # what is suspicious; empty if nothing is
    student: str | None  # the one to try; None if none of ours is smaller
    command: str | None  # what to type: `ssdkd compress`, `ssdkd export` without a student; None if it would be refused


def inspect_teacher(teacher: Teacher) -> Inspection:
    """Looks at the weights of a teacher, which may have been loaded with allow_nonfinite=True."""
    spec, module = teacher.spec, teacher.module
    broken = _nonfinite_tensors(module)
    findings = [
        *_batchnorm_findings(module),
        *([f"NaN or infinite numbers in {len(broken)} tensors: {_some(broken)}."] if broken else []),
        *_constant_findings(module),
        *_class_findings(module, spec.classes),
    ]
    with torch.no_grad(), _Operations() as operations:
        logits = module(noise(spec.input_shape))  # of the images that load_teacher tries
    kinds = _graph_kinds(module, operations) if spec.arch == "graph" else _layer_kinds(module)
    finite, differ = bool(logits.isfinite().all()), tells_images_apart(logits)
    if not finite and not broken:
        findings.append(f"The logits are not finite for images of {words(spec.input_shape)}.")
    if not differ:
        findings.append("The logits are the same for every image.")
    accepted = finite and differ and not broken
    flops = count_flops(module, spec.input_shape)
    student = suggested_student(spec, flops)
    verb, wanted = ("compress", ("--student", student)) if student else ("export", ("--precision", "int8"))
    return Inspection(
        spec=spec,
        flops=flops,
        layers=dict(kinds.most_common()),
        findings=tuple(findings),
        student=student,
        command=shlex.join(["ssdkd", verb, spec.path, *wanted, *spec.flags]) if accepted else None,
    )


def suggested_student(spec: TeacherSpec, flops: int) -> str | None:
    """The largest of SUGGESTED_STUDENTS that is much smaller than a teacher of so many FLOPs, else just smaller."""
    sizes = {}  # parameters and FLOPs
    for name in SUGGESTED_STUDENTS:
        with torch.device("meta"):
            network = build_network(
                name, classes=spec.classes, channels=spec.input_shape[0], pixels=min(spec.input_shape[1:])
            )
        parameters = sum(parameter.numel() for parameter in network.parameters())
        sizes[name] = parameters, count_flops(network, spec.input_shape)
    fitting = (
        name
        for share in WORTH_TRYING
        for name, (parameters, operations) in sizes.items()
        if parameters < share * spec.parameters and operations < share * flops
    )
    return next(fitting, None)


def count_parameters(module: nn.Module, names: Collection[str] | None = None) -> int:
    """Weights of a network, all or those of these names; buffers are not counted."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if names is None or name in names)


def count_flops(module: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiplications plus additions of one image (C, H, W) through convolutions and matrix products."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    counter = FlopCounterMode(display=False)
    with evaluating(module), torch.no_grad(), counter:
        module(torch.zeros(1, *input_shape, device=device))
    return int(counter.get_total_flops())


def _layer_kinds(module: nn.Module) -> Counter[str]:
    """How many layers with weights there are of each class."""
    with_weights = (layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None)
    return Counter(type(layer).__name__ for layer in with_weights)


class _Operations(TorchDispatchMode):
    """Counts the convolutions and matrix products that run within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted.update([KINDS[func.overloadpacket]] if func.overloadpacket in KINDS else [])
        return func(*args, **(kwargs or {}))


def _graph_kinds(module: nn.Module, operations: _Operations) -> Counter[str]:
    """How many of each a graph has, whose only layers are BatchNorm's; `operations`: those of its forward pass."""
    norms = sum(isinstance(layer, GraphBatchNorm) for layer in module.modules())
    return operations.counted + Counter(BatchNorm=norms)


def _batchnorm_findings(module: nn.Module) -> list[str]:
    layers = {name: layer for name, layer in module.named_modules() if has_running_statistics(layer)}
    impossible = [name for name, layer in layers.items() if not has_possible_variances(layer)]
    untrained = [name for name, layer in layers.items() if name not in impossible and not is_trained(layer)]
    kinds = {"variances that are not positive": impossible, "statistics never trained, or not finite,": untrained}
    return [
        f"Running {kind} in {len(names)} of {len(layers)} BatchNorm layers: {_some(names)}."
        for kind, names in kinds.items()
        if names
    ]


def _nonfinite_tensors(module: nn.Module) -> list[str]:
    return [name for name, value in _float_tensors(module).items() if not value.isfinite().all()]


def _constant_findings(module: nn.Module) -> list[str]:
    constant = [
        name
        for name, value in _float_tensors(module).items()
        if value.dim() >= 2 and value.numel() > 1 and bool((value == value.flatten()[0]).all())
    ]
    if not constant:
        return []
    return [f"All weights are the same number in {_some(constant)}: these layers were never trained."]


def _float_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _class_findings(module: nn.Module, classes: int) -> list[str]:
    """Classes that the teacher can never tell apart from others, by the rows of its last matrix."""
    heads = [
        parameter.detach()
        for parameter in module.parameters()
        if parameter.dim() >= 2 and parameter.shape[0] == classes
    ]
    if not heads:
        return []
    rows = heads[-1].flatten(1)  # [classes, features]
    zero = (rows == 0).all(1).nonzero().flatten().tolist()
    _, group, sizes = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    alike = [index for index, size in enumerate(sizes[group].tolist()) if size > 1 and index not in zero]
    findings = []
    if zero:
        findings.append(f"Dead classes, whose weights in the last layer are all zero: {_some(zero)}.")
    if alike:
        findings.append(f"Classes with the same weights in the last layer, which cannot be told apart: {_some(alike)}.")
    return findings


def _some(names: list[str] | list[int]) -> str:
    return ", ".join(map(str, names[:MAX_NAMED])) + (f", ... ({len(names)} in all)" if len(names) > MAX_NAMED else "")
