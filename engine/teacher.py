"""The teacher: a file made into a frozen module, with everything that is known about it and how it is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from engine.batchnorm import batchnorm_layers, statistics_misfit
from engine.checkpoints import read_checkpoint
from engine.errors import SSDKDError
from engine.facts import Metadata, class_names_in, input_shape_in, normalisation_in
from engine.hashing import sha256_of
from engine.onnx_graph import data_files
from engine.probing import as_classifier, input_channels
from engine.resolve import resolve_network
from engine.shapes import Shape, each_channel, words

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FALLBACK_PIXELS = 32
GREY_PIXELS = 28
MAX_CHANNELS, MAX_PIXELS = 64, 4096  # beyond, --input is a slip, and would take all of the machine's memory
# Published ResNet-20, -56 and EfficientNet-lite0 have 0.8 to 1.1; a ResNet without some of its ReLUs 1e5 and more.
LARGEST_MISFIT = 1e3
MISFIT = (
    "The BatchNorm statistics in the file are far from what this network computes: it may be wired otherwise than the "
    "one that was trained. Check the architecture, and say it with --arch."
)
NO_BATCHNORM = (
    "The teacher has no usable BatchNorm statistics, the main clue to its training images: "
    "a student is made with other priors, and its accuracy is unproven."
)
FOLDED = "An exporter may have folded BatchNorm away: give the checkpoint that was exported, if there is one."


@dataclass(frozen=True)
class Preprocessing:
    """What images in 0...1 go through before the network: (image - mean) / std, a value a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str  # "flag", "file", "timm", "default"; "mean" or "std": that one was stated, the other is assumed


@dataclass(frozen=True)
class TeacherSpec:
    """What is known about a teacher, and how."""

    path: str
    sha256: str
    size_bytes: int  # this and the sha256 with the data files of an .onnx
    format: str  # "state_dict", "safetensors", "pickle", "torch.export", "torchscript", "onnx"
    arch: str  # a name that --arch takes, the class name of a pickled module, or "graph"
    arch_evidence: str
    input_shape: Shape  # C, H, W
    classes: int
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing
    batchnorm_layers: int  # usable ones
    parameters: int
    warnings: tuple[str, ...]
    flags: tuple[str, ...] = ()  # what load_teacher was told, but for a number of classes, as words of the command line


@dataclass(frozen=True)
class Teacher:
    """`module`: float32, CPU, eval, frozen; normalised images [B, C, H, W] -> logits [B, classes]."""

    module: nn.Module
    spec: TeacherSpec


def load_teacher(
    path: Path,
    *,
    arch: str | None = None,
    input_shape: Shape | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    classes: int | None = None,
    class_names: tuple[str, ...] | None = None,
    classes_file: Path | None = None,
    trust_pickle: bool = False,
    allow_nonfinite: bool = False,
) -> Teacher:
    """Reads a teacher of any supported format; TeacherSpec says what is found out about it.

    `input_shape`: C, H, W. `mean`, `std`: a value a channel, for images in 0...1. `classes_file`: where `class_names`
    were read, for TeacherSpec.flags alone. `trust_pickle`: code in the file may run. `allow_nonfinite`: NaN weights are
    not refused.

    Raises:
        SSDKDError: everything that makes the file unusable as it is, with the flag that would help.
    """
    if input_shape is not None:
        _check_stated_size(input_shape)
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle, input_shape=input_shape)
    metadata = checkpoint.weights.metadata
    if not allow_nonfinite:
        _refuse_nonfinite(checkpoint.weights.state, path)
    network = resolve_network(checkpoint, path, arch=arch, input_shape=input_shape)
    module = network.module.cpu().float().eval().requires_grad_(False)
    if not allow_nonfinite:
        _refuse_nonfinite(module.state_dict(), path)
    shape, size_warnings = _input_shape(module, input_shape or network.input_shape, metadata, network.pixels)
    module, logits, form_warnings = as_classifier(module, shape, path.name)
    if not allow_nonfinite and not bool(logits.isfinite().all()):
        raise SSDKDError(
            f"{path.name} computes logits that are not finite for images of {words(shape)}",
            "look at the file with `ssdkd inspect`, and take an earlier checkpoint of the training",
        )
    if not allow_nonfinite and not tells_images_apart(logits):
        raise SSDKDError(
            f"{path.name} computes the same logits for every image of {words(shape)}: it has nothing to teach",
            "look at the file with `ssdkd inspect`, and take an earlier checkpoint of the training",
        )
    found = logits.shape[1]
    _check_classes(found, classes, class_names)
    preprocessing, normalisation_warnings = _preprocessing(mean, std, metadata, network.module, shape[0])
    usable = len(batchnorm_layers(module))
    files = [path, *(data_files(path) if checkpoint.format == "onnx" else [])]
    doubts = [MISFIT] if usable and statistics_misfit(module, shape) > LARGEST_MISFIT else []
    return Teacher(
        module,
        TeacherSpec(
            path=str(path),
            sha256=sha256_of(*files),
            size_bytes=sum(file.stat().st_size for file in files),
            format=checkpoint.format,
            arch=network.arch,
            arch_evidence=network.evidence,
            input_shape=shape,
            classes=found,
            class_names=class_names or class_names_in(metadata, found),
            preprocessing=preprocessing,
            batchnorm_layers=usable,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            warnings=(
                *checkpoint.weights.notes,
                *network.warnings,
                *form_warnings,
                *size_warnings,
                *normalisation_warnings,
                *doubts,
                *(() if usable else (NO_BATCHNORM,)),
                *((FOLDED,) if checkpoint.graph and not usable else ()),
            ),
            flags=_flags(arch, input_shape, mean, std, classes_file, trust_pickle),
        ),
    )


def tells_images_apart(logits: Tensor) -> bool:
    """Whether the logits [B, K] of different images differ."""
    return bool((logits != logits[:1]).any())


def _check_stated_size(shape: Shape) -> None:
    channels, height, width = shape
    if not (1 <= channels <= MAX_CHANNELS and min(height, width) >= 1 and max(height, width) <= MAX_PIXELS):
        raise SSDKDError(
            f"--input {words(shape)}: expected 1 to {MAX_CHANNELS} channels and sides of 1 to {MAX_PIXELS} pixels",
            "give the channels, height and width that the network was trained at, for example --input 3x224x224",
        )


def _refuse_nonfinite(state: Mapping[str, object], path: Path) -> None:
    broken = [
        name
        for name, value in state.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.float().isfinite().all()
    ]
    if broken:
        raise SSDKDError(
            f"{path.name} holds NaN or infinite weights: expected finite numbers, found {len(broken)} broken tensors"
            f" ({', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''})",
            "take an earlier checkpoint of the training; `ssdkd inspect` lists what is broken",
        )


def _input_shape(
    module: nn.Module, stated: Shape | None, metadata: Metadata, pixels: int | None
) -> tuple[Shape, list[str]]:
    """The flag's, the file's, timm's, or the architecture's usual size, with a warning where it is assumed."""
    if stated:
        return stated, []
    channels = input_channels(module) or 3
    from_file = input_shape_in(metadata, channels)
    if from_file:
        return from_file, []
    config, is_own = _timm_config(module)
    timm_size = config.get("input_size")
    side = pixels or FALLBACK_PIXELS
    if channels == 1 and side == FALLBACK_PIXELS:
        side = GREY_PIXELS
    shape = (channels, side, side)
    if isinstance(timm_size, tuple) and len(timm_size) == 3:
        shape = (channels, timm_size[1], timm_size[2])
        if is_own:
            return shape, []
    return shape, [
        f"The image size is not in the file: {words(shape)} is assumed; say it with --input if it is another."
    ]


def _preprocessing(
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    metadata: Metadata,
    module: nn.Module,
    channels: int,
) -> tuple[Preprocessing, list[str]]:
    """Each of mean and std from its flag, else both from the file, timm or ImageNet.

    With a warning for the last, and for timm's where the network has other classes than timm's weights.
    """
    mean = None if mean is None else each_channel("--mean", mean, channels)
    std = None if std is None else each_channel("--std", std, channels)
    if mean is not None and std is not None:
        return Preprocessing(mean, std, "flag"), []
    config, is_own = _timm_config(module)
    of_timm = normalisation_in(config, channels)
    usual = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    sources = {
        "file": normalisation_in(metadata, channels),
        "timm": of_timm,
        "default": usual,
    }
    source, found = next((source, found) for source, found in sources.items() if found)
    chosen = mean or found[0], std or found[1]
    if source == "file" or (source == "timm" and is_own):
        return Preprocessing(*chosen, source), []
    usually, timms = "ImageNet's" if channels == 3 else "0.5", "of timm's own weights, of other classes,"
    if mean is None and std is None:
        return Preprocessing(*chosen, source), [
            "The mean and std of the training images are not in the file: "
            f"{f'those {timms}' if of_timm else usually} are assumed; "
            "say them with --mean and --std if they are others."
        ]
    stated, missing = ("mean", "std") if std is None else ("std", "mean")
    return Preprocessing(*chosen, stated), [
        f"The {missing} of the training images is not in the file: {f'that {timms}' if of_timm else usually} is "
        f"assumed; say it with --{missing} if it is another."
    ]


def _timm_config(module: nn.Module) -> tuple[Metadata, bool]:
    """timm's record of how its own weights of a network were trained (mean, std, input_size).

    And whether that can be this training: with other classes it was another one.
    """
    config = getattr(module, "default_cfg", None)
    if not isinstance(config, dict):
        return {}, False
    return config, config.get("num_classes") == getattr(module, "num_classes", None)


def _check_classes(found: int, stated: int | None, names: tuple[str, ...] | None) -> None:
    wanted = stated if stated is not None else len(names) if names else found
    if wanted != found:
        raise SSDKDError(
            f"--classes says {wanted}, but the teacher's last layer has {found} outputs",
            f"leave --classes away or give {found}; or give the file whose last layer has {wanted} outputs",
        )


def _flags(
    arch: str | None,
    shape: Shape | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    classes_file: Path | None,
    trust: bool,
) -> tuple[str, ...]:
    flags = {
        "--arch": arch,
        "--input": words(shape) if shape else None,
        "--mean": ",".join(map(str, mean)) if mean else None,
        "--std": ",".join(map(str, std)) if std else None,
        "--classes": str(classes_file) if classes_file else None,
    }
    given = [word for flag, value in flags.items() if value for word in (flag, value)]
    return (*given, "--trust-pickle") if trust else tuple(given)
