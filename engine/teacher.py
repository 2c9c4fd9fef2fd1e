"""The teacher: a file made into a frozen module, with everything that is known about it and how it is known."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.checkpoints import Checkpoint, read_checkpoint, sha256_of
from engine.errors import SSDKDError
from engine.rebuild import Rebuilt, rebuild

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.5,), (0.5,)
NO_BATCHNORM = "The teacher has no usable BatchNorm statistics, the main clue to its training data: the accuracy of a student is unproven."


@dataclass(frozen=True)
class Preprocessing:
    """What images in 0...1 go through before the network: (image - mean) / std, a value a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str  # "flag", "file", "timm", "default"


@dataclass(frozen=True)
class TeacherSpec:
    """What is known about a teacher, and how."""

    path: str
    sha256: str
    size_bytes: int
    format: str  # "state_dict", "safetensors", "pickle", "torch.export", "torchscript", "onnx"
    arch: str  # a name that --arch takes, the class name of a pickled module, or "graph"
    arch_evidence: str
    input_shape: tuple[int, int, int]  # C, H, W
    classes: int
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing
    batchnorm_layers: int
    parameters: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Teacher:
    """`module`: float32, CPU, eval, frozen; normalised images [B, C, H, W] -> logits [B, classes]."""

    module: nn.Module
    spec: TeacherSpec


def load_teacher(
    path: Path,
    *,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
    trust_pickle: bool = False,
    allow_nonfinite: bool = False,
) -> Teacher:
    """Reads a teacher of any supported format; see TeacherSpec for what is found out about it.

    `input_shape`: C, H, W. `trust_pickle`: code in the file may run. `allow_nonfinite`: NaN weights are not refused.
    Raises SSDKDError for everything that makes the file unusable as it is, with the flag that would help.
    """
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    network = _network(checkpoint, arch, input_shape)
    module = _frozen(network.module)
    warnings = [*checkpoint.weights.notes, *network.warnings]
    if not allow_nonfinite:
        _refuse_nonfinite(module, path)
    metadata = checkpoint.weights.metadata
    shape, assumed = _input_shape(module, input_shape, metadata, network.pixels)
    warnings += assumed
    found_classes = _check_forward(module, shape, allow_nonfinite)
    names = class_names or _class_names(metadata, found_classes)
    _check_classes(found_classes, classes, class_names)
    preprocessing, assumed = _preprocessing(mean, std, metadata, shape[0])
    warnings += assumed
    usable = len(batchnorm_layers(module))
    if not usable:
        warnings.append(NO_BATCHNORM)
    spec = TeacherSpec(
        path=str(path),
        sha256=sha256_of(path),
        size_bytes=path.stat().st_size,
        format=checkpoint.format,
        arch=network.arch,
        arch_evidence=network.evidence,
        input_shape=shape,
        classes=found_classes,
        class_names=names,
        preprocessing=preprocessing,
        batchnorm_layers=usable,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        warnings=tuple(dict.fromkeys(warnings)),
    )
    return Teacher(module, spec)


def batchnorm_layers(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers that can serve as a prior, in order of registration: finite running statistics that were trained."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and _is_trained(layer)]


def _is_trained(layer: _BatchNorm) -> bool:
    mean, variance = layer.running_mean, layer.running_var
    if mean is None or variance is None:
        return False
    finite = bool(mean.isfinite().all() and variance.isfinite().all())
    return finite and not bool((mean == 0).all() and (variance == 1).all())


def _network(checkpoint: Checkpoint, arch: str | None, input_shape: tuple[int, int, int] | None) -> Rebuilt:
    weights = checkpoint.weights
    if weights.module is not None:
        return Rebuilt(weights.module, type(weights.module).__name__, "the file holds the network itself", None, ())
    named = next((str(weights.metadata[key]) for key in ("arch", "architecture", "model_name") if weights.metadata.get(key)), None)
    pixels = min(input_shape[1:]) if input_shape else None
    return rebuild(weights.state, keeps_order=checkpoint.keeps_order, arch=arch, pixels=pixels, named_in_file=named)


def _frozen(module: nn.Module) -> nn.Module:
    return module.cpu().float().eval().requires_grad_(False)


def _refuse_nonfinite(module: nn.Module, path: Path) -> None:
    broken = [name for name, value in module.state_dict().items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise SSDKDError(
            f"{path.name} holds NaN or infinite weights: expected finite numbers, found {len(broken)} broken tensors"
            f" ({', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}).",
            "Take an earlier checkpoint of the training; `ssdkd inspect` lists what is broken.",
        )


def _input_shape(
    module: nn.Module, stated: tuple[int, int, int] | None, metadata: Mapping[str, object], pixels: int | None
) -> tuple[tuple[int, int, int], list[str]]:
    if stated:
        return stated, []
    first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else 3
    if channels == 1 and pixels == 32:
        pixels = 28
    side = pixels or 32
    shape = (channels, side, side)
    return shape, [f"The input size is not in the file; {channels}x{side}x{side} was assumed. Say it with --input if it is another."]


def _preprocessing(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, metadata: Mapping[str, object], channels: int
) -> tuple[Preprocessing, list[str]]:
    if mean and std:
        return Preprocessing(mean, std, "flag"), []
    default_mean, default_std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (GREY_MEAN * channels, GREY_STD * channels)
    return Preprocessing(mean or default_mean, std or default_std, "default"), [
        "The mean and std of the training images are not in the file; ImageNet's were assumed. Say them with --mean and --std if they are others."
    ]


def _class_names(metadata: Mapping[str, object], classes: int) -> tuple[str, ...] | None:
    return None


def _check_classes(found: int, stated: int | None, names: tuple[str, ...] | None) -> None:
    wanted = stated or (len(names) if names else None)
    if wanted and wanted != found:
        raise SSDKDError(
            f"--classes says {wanted}, but the teacher's last layer has {found} outputs.",
            f"Leave --classes away, or give the file whose head has {wanted} outputs.",
        )


def _check_forward(module: nn.Module, shape: tuple[int, int, int], allow_nonfinite: bool) -> int:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        logits: Tensor = module(torch.randn(2, *shape, generator=generator))
    if not allow_nonfinite and not bool(logits.isfinite().all()):
        raise SSDKDError("The teacher's logits are not finite on noise.", "Check the file with `ssdkd inspect`.")
    return math.prod(logits.shape[1:])
