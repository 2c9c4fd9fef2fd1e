"""Students: the table, and any network by its name.

Students fit the size of the image. Up to SMALL_PIXELS their first layers keep its resolution (a "CIFAR stem"), so that
32 px end in 4x4 positions or more (VGG: 1x1); above, they are the networks as published for ImageNet, or CIFAR networks
behind a stem that divides by 4. VGGs are the same at every size.
"""

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.checkpoints import read_checkpoint
from engine.errors import SSDKDError, first_line
from engine.layers import initialise_convolutions, with_versions
from engine.mobilenets import MobileNetV2
from engine.probing import FORWARD_ERRORS
from engine.shapes import Shape, words
from engine.user_code import call_user_function
from engine.zoo import VGG, ZOO, Builder, WideResNet, resnet_cifar

if TYPE_CHECKING:
    from engine.teacher import Teacher

SMALL_PIXELS = 64
STUDENT_BATCHNORM_MOMENTUM = 0.1  # at least: some published networks have 0.01, too slow for a few hundred steps

# torchvision's packages of networks that are no float classifiers of images.
OTHER_TASKS = {
    "detection": "a network for object detection",
    "optical_flow": "a network for optical flow",
    "quantization": "a quantized network",
    "segmentation": "a network for segmentation",
    "video": "a network for video",
}


@dataclass(frozen=True)
class StudentEntry:
    """A student of ours; `build` takes classes, channels and the smaller side of the image in pixels."""

    summary: str
    build: Callable[[int, int, int], nn.Module]


def build_student(name: str, *, teacher: "Teacher", weights: Path | None = None, seed: int = 0) -> nn.Module:
    """A student for `teacher`: float32, on the CPU, in train mode, tried with two images of the teacher's size.

    `name` is one of network_names(), `package.module:function`, or `same`: the teacher's own architecture, initialised
    afresh. What the user's function froze stays frozen. The same seed gives the same weights; the global random state
    stays as it was. `weights`: a file to start from.

    Raises:
        SSDKDError: unknown name, a network that cannot take the teacher's images, gives other logits than
            [B, classes] or is frozen as a whole, or weights that do not fit.
    """
    spec = teacher.spec
    channels, height, width = spec.input_shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        if name == "same":
            student = _afresh(teacher)
        else:
            student = build_network(name, classes=spec.classes, channels=channels, pixels=min(height, width))
        student = copy.deepcopy(student).to("cpu", torch.float32)  # what it shares with the teacher would learn there
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise SSDKDError(
                f"the student {name} has no parameter that can learn: expected one with requires_grad",
                "leave at least its last layer unfrozen",
            )
        if weights is not None:
            _load_weights(student, name, weights)
        _try_forward(student.eval(), name, spec.input_shape, spec.classes)
        in_training = copy.deepcopy(student).to(memory_format=torch.channels_last).train()
        _try_forward(in_training, name, spec.input_shape, spec.classes)
    for layer in student.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.momentum is not None:
            layer.momentum = max(layer.momentum, STUDENT_BATCHNORM_MOMENTUM)
    return student.train()


def build_network(name: str, *, classes: int, channels: int, pixels: int) -> nn.Module:
    """The network called `name` for images [B, channels, H, W] with min(H, W) = `pixels`, its logits [B, classes].

    Looked up among STUDENTS, then in published_networks(); with a colon it is the user's `package.module:function`.
    Only STUDENTS depend on `pixels`: published networks are built as they were published.

    Raises:
        SSDKDError: no classifier of that name (the hint has the nearest), or an error in the user's function.
    """
    if ":" in name:
        return call_user_function(name, classes=classes, channels=channels)
    if name in STUDENTS:
        return STUDENTS[name].build(classes, channels, pixels)
    check_network_name(name)
    return next(iter(published_networks(name).values()))(classes, channels)


def check_network_name(name: str) -> None:
    """Raises SSDKDError where no network is called `name`; functions of the user's are not looked for."""
    if ":" in name or name in STUDENTS or published_networks(name):
        return
    _refuse_other_tasks(name)
    near = dict.fromkeys(
        difflib.get_close_matches(name.lower(), STUDENTS, n=2)
        + difflib.get_close_matches(name.lower(), network_names())
    )
    hint = f"did you mean {' or '.join(near)}?" if near else "`ssdkd students` lists ours"
    if (own := Path(f"{name.replace('.', '/')}.py")).is_file():
        hint = f"{own} is code of yours: name its function that builds the network, {name}:FUNCTION"
    raise SSDKDError(
        f"there is no network called '{name}': expected ours, torchvision's or timm's, or package.module:function", hint
    )


def _refuse_other_tasks(name: str) -> None:
    """Raises SSDKDError where torchvision has a network of that name that is no classifier of images."""
    import torchvision.models as torchvision_models

    source, _, bare = name.rpartition("/")
    if source not in ("", "torchvision") or bare not in torchvision_models.list_models():
        return
    package = torchvision_models.get_model_builder(bare).__module__.split(".")[2]
    if package in OTHER_TASKS:
        raise SSDKDError(
            f"torchvision's {bare} is {OTHER_TASKS[package]}: expected a float classifier of images",
            "name a classifier; `ssdkd students` lists ours",
        )


def published_networks(name: str) -> dict[str, Builder]:
    """Every published network called `name`, under a name without doubt: `zoo/...`, `torchvision/...`, `timm/...`.

    Such a full name is accepted as `name` too. The builders take (classes, channels) and load no weights.
    """
    wanted, _, bare = name.rpartition("/")
    sources = {"zoo": _zoo_builder, "torchvision": _torchvision_builder, "timm": _timm_builder}
    found = {f"{source}/{bare}": find(bare) for source, find in sources.items() if wanted in ("", source)}
    return {full_name: builder for full_name, builder in found.items() if builder is not None}


def network_names() -> list[str]:
    """Every name that build_network knows: ours first, then torchvision's and timm's."""
    import timm
    import torchvision.models as torchvision_models

    theirs = [*torchvision_models.list_models(module=torchvision_models), *timm.list_models()]
    return list(dict.fromkeys([*STUDENTS, *ZOO, *theirs]))


def _zoo_builder(name: str) -> Builder | None:
    return ZOO.get(name)


def _torchvision_builder(name: str) -> Builder | None:
    import torchvision.models as torchvision_models

    if name not in torchvision_models.list_models(module=torchvision_models):
        return None
    return partial(_build_torchvision, name)


def _build_torchvision(name: str, classes: int, channels: int) -> nn.Module:
    import torchvision.models as torchvision_models

    # In training these two return three logits unless told not to; their own initialisation takes long, and warns.
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision_models.get_model(name, weights=None, num_classes=classes, **options)
    return network if channels == 3 else _with_channels(network, channels)


def _with_channels(network: nn.Module, channels: int) -> nn.Module:
    """Makes the first convolution one of `channels` inputs, initialised afresh."""
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.weight.shape[2:]))
    first.reset_parameters()
    return network


def _timm_builder(name: str) -> Builder | None:
    import timm

    return partial(_build_timm, name) if timm.is_model(name) else None


def _build_timm(name: str, classes: int, channels: int) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)


def _keep_resolution(network: nn.Module, layers: int = 2) -> nn.Module:
    """Gives the first `layers` convolutions or poolings of stride 2 a stride of 1: a total stride of 32 becomes 8."""
    strided = [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d) and layer.stride in (2, (2, 2))
    ]
    for layer in strided[:layers]:
        layer.stride = (1, 1)
    return network


def _afresh(teacher: "Teacher") -> nn.Module:
    """A copy of the teacher's module with new weights."""
    if teacher.spec.arch == "graph":
        raise SSDKDError(
            "--student same: the teacher is a bare graph, whose layers cannot be initialised afresh",
            "name its architecture with --arch, or choose another student (`ssdkd students`)",
        )
    student = copy.deepcopy(teacher.module)
    initialised: set[int] = set()
    for layer in student.modules():
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
            initialised.update(id(parameter) for parameter in layer.parameters(recurse=False))
    with torch.no_grad():
        for parameter in student.parameters():
            # Nobody says how such a parameter starts (a position embedding, say). Shuffled, it keeps its scale and
            # loses what it has learnt.
            if id(parameter) not in initialised:
                parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    return initialise_convolutions(student).requires_grad_(True)


def _load_weights(student: nn.Module, name: str, path: Path) -> None:
    found = read_checkpoint(path).weights.state
    expected = student.state_dict()
    expected_names = [layer for layer in expected if not layer.endswith("num_batches_tracked")]
    differences = [
        *(f"{layer} is missing" for layer in expected_names if layer not in found),
        *(f"{layer} is not in {name}" for layer in found if layer not in expected),
        *(
            f"{layer} is {list(found[layer].shape)}, expected {list(expected[layer].shape)}"
            for layer in expected_names
            if layer in found and found[layer].shape != expected[layer].shape
        ),
        *(f"{layer} has values that are not finite" for layer in expected_names if not _is_finite(found.get(layer))),
    ]
    if differences:
        raise SSDKDError(
            f"the weights in {path.name} do not fit the student {name}: {'; '.join(differences[:4])}"
            + (f"; and {len(differences) - 4} more" if len(differences) > 4 else ""),
            "give the weights of this very network with --student-weights, or leave the option out",
        )
    student.load_state_dict(with_versions(student, {**expected, **found}))


def _is_finite(weight: Tensor | None) -> bool:
    return weight is None or bool(torch.isfinite(weight).all())


def _try_forward(student: nn.Module, name: str, input_shape: Shape, classes: int) -> None:
    """Makes sure that it gives logits, in train mode for images in channels_last and with gradients, as training has
    them.
    """
    size = words(input_shape)
    images = torch.zeros(2, *input_shape)
    if student.training:
        images = images.contiguous(memory_format=torch.channels_last)
    try:
        with torch.set_grad_enabled(student.training):
            logits = student(images)
            if isinstance(logits, Tensor) and logits.requires_grad:
                learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
                torch.autograd.grad(logits.sum(), learning, allow_unused=True)
    except FORWARD_ERRORS as error:
        reason = first_line(error)
        if student.training:
            hints = {
                "inplace": "operations that change nothing in place",
                "view": "reshape or flatten(1) in place of view",
            }
            hint = next((f"use {better} in its forward pass" for word, better in hints.items() if word in reason), None)
            raise SSDKDError(
                f"the student {name} cannot be trained on images of {size} in channels_last, the memory format of"
                f" training: {reason}",
                hint or "choose a student that can (`ssdkd students`)",
            ) from error
        raise SSDKDError(
            f"the student {name} cannot take images of {size}: {reason}",
            "choose a student that can (`ssdkd students`), or correct --input if that is not the teacher's size",
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        mode = " in train mode" if student.training else ""
        raise SSDKDError(
            f"the student {name} gives {found}{mode} for 2 images of {size}: expected logits of shape [2, {classes}]",
            "choose a student for classification whose number of classes can be set",
        )


def _any_size(build: Builder) -> Callable[[int, int, int], nn.Module]:
    return lambda classes, channels, _pixels: build(classes, channels)


def _by_size(small: Builder, large: Builder) -> Callable[[int, int, int], nn.Module]:
    return lambda classes, channels, pixels: (small if pixels <= SMALL_PIXELS else large)(classes, channels)


def _with_stem(build: Callable[..., nn.Module]) -> Callable[[int, int, int], nn.Module]:
    return _by_size(build, partial(build, stem_stride=4))


def _adapted(build: Builder) -> Callable[[int, int, int], nn.Module]:
    return _by_size(lambda classes, channels: _keep_resolution(build(classes, channels)), build)


STUDENTS: dict[str, StudentEntry] = {
    "mobilenetv2": StudentEntry(
        "inverted residuals, ReLU6; the usual choice for edge devices",
        _by_size(MobileNetV2, partial(_build_torchvision, "mobilenet_v2")),
    ),
    "mobilenetv3_small": StudentEntry(
        "inverted residuals with squeeze-excite and hard-swish; few operations",
        _adapted(partial(_build_torchvision, "mobilenet_v3_small")),
    ),
    "shufflenetv2": StudentEntry(
        "channel split and shuffle, width 1.0; light on memory traffic",
        _adapted(partial(_build_torchvision, "shufflenet_v2_x1_0")),
    ),
    "efficientnet_lite0": StudentEntry(
        "EfficientNet without squeeze-excite, ReLU6; made for integer hardware",
        _adapted(partial(_build_timm, "efficientnet_lite0")),
    ),
    "resnet8": StudentEntry("the smallest CIFAR ResNet", _with_stem(partial(resnet_cifar, depth=8))),
    "resnet14": StudentEntry("CIFAR ResNet, two blocks a stage", _with_stem(partial(resnet_cifar, depth=14))),
    "resnet20": StudentEntry("CIFAR ResNet, three blocks a stage", _with_stem(partial(resnet_cifar, depth=20))),
    "resnet56": StudentEntry("CIFAR ResNet, nine blocks a stage", _with_stem(partial(resnet_cifar, depth=56))),
    "resnet18": StudentEntry(
        "ResNet-18: large and accurate, plain convolutions that every runtime is good at",
        _by_size(ZOO["resnet18_cifar"], partial(_build_torchvision, "resnet18")),
    ),
    "wrn10_1": StudentEntry("the smallest wide ResNet", _with_stem(partial(WideResNet, depth=10, widen=1))),
    "wrn16_1": StudentEntry("wide ResNet of depth 16, width 1", _with_stem(partial(WideResNet, depth=16, widen=1))),
    "wrn16_2": StudentEntry("wide ResNet of depth 16, width 2", _with_stem(partial(WideResNet, depth=16, widen=2))),
    "wrn40_1": StudentEntry("wide ResNet of depth 40, width 1", _with_stem(partial(WideResNet, depth=40, widen=1))),
    "vgg8": StudentEntry("five 3x3 convolutions in a row; no shortcuts", _any_size(partial(VGG, depth=8))),
    "vgg11": StudentEntry("eight 3x3 convolutions in a row; no shortcuts", _any_size(partial(VGG, depth=11))),
}
