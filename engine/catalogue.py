"""The networks that a bare state dict is compared with: our zoo and torchvision's classifiers, built without memory."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from engine.students import published_networks
from engine.zoo import ZOO, Builder

TensorShape = tuple[int, ...]

# Written by profilers or counting batches: no part of what a network computes.
IGNORED_SUFFIXES = ("num_batches_tracked", "total_ops", "total_params", "_extra_state")
TORCHVISION, TIMM = "torchvision/", "timm/"  # full names; see engine.students.published_networks
# Their extra training heads may or may not be in a file.
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
SHORTEST_NAME, MAX_NAMED_ALIKE = 6, 8
_FILLING = {"normal_", "uniform_", "zero_", "fill_", "erfinv_", "mul_", "add_", "clamp_", "kaiming_uniform_"}
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


@dataclass(frozen=True)
class Architecture:
    """A network that can be built by name."""

    name: str  # as --arch takes it
    build: Builder
    parameters: tuple[int, ...]  # its sizes with `classes` classes and 3 channels; empty if not known
    classes: int
    pixels: int | None  # the image side that it is usually trained at, where that is known


class _WithoutMemory(TorchFunctionMode):
    """Tensors are made on the meta device, except for the small ranges that some networks compute with."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        _types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if getattr(function, "__name__", "") in _FILLING and args and getattr(args[0], "is_meta", False):
            return args[0]
        arguments = dict(kwargs or {})
        if function in _FACTORIES and arguments.get("device") is None:
            arguments["device"] = "meta"
        return function(*args, **arguments)


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks built inside have shapes but no numbers: fast, and nobody's random state is touched."""
    # torch.nn.init warns about tensors without elements, torchvision about its own defaults.
    with _WithoutMemory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def skeleton(module: nn.Module) -> dict[str, TensorShape]:
    """The names and shapes that a state dict of `module` has, without those of IGNORED_SUFFIXES."""
    return {
        name: tuple(value.shape) for name, value in module.state_dict().items() if not name.endswith(IGNORED_SUFFIXES)
    }


def architecture_of(name: str) -> Architecture | None:
    """The candidate called `name`, or None."""
    return next((architecture for architecture in architectures() if architecture.name == name), None)


def timms_named_like(file_stem: str) -> list[Architecture]:
    """timm's networks whose name stands in a file's name, with all that end in the same words (`tf_...`).

    timm has more than a thousand: to compare a file with all of them would take minutes.
    """
    import timm  # slow to import, and seldom needed here

    def letters(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    names = {name: letters(name) for name in timm.list_models()}
    inside = [word for word in names.values() if len(word) >= SHORTEST_NAME and word in letters(file_stem)]
    longest = max(inside, key=len, default=None)
    alike = [name for name, word in names.items() if longest and word.endswith(longest)]
    return [
        Architecture(name, published_networks(TIMM + name)[TIMM + name], (), 0, None)
        for name in sorted(alike, key=len)[:MAX_NAMED_ALIKE]
    ]


@cache
def architectures() -> tuple[Architecture, ...]:
    """Every candidate, ours first; takes about a second the first time."""
    return (*(_ours(name, build) for name, build in ZOO.items()), *_torchvisions())


def _ours(name: str, build: Builder) -> Architecture:
    return Architecture(name, build, (_count(build, 10),), classes=10, pixels=32)


def _torchvisions() -> Iterator[Architecture]:
    for name in models.list_models(module=models):
        full_name = TORCHVISION + name
        published = list(models.get_model_weights(name))
        pixels: int = published[0].transforms.keywords["crop_size"]
        builders: list[Builder]
        if name in WITH_AUXILIARY_HEADS:
            builders = [partial(_with_auxiliary_heads, name, heads) for heads in (False, True)]
            sizes = [(_count(build, 1000),) for build in builders]
        else:
            builders = [published_networks(full_name)[full_name]]
            sizes = [tuple({weights.meta["num_params"] for weights in published})]
        for build, size in zip(builders, sizes, strict=True):
            yield Architecture(full_name if name in ZOO else name, build, size, classes=1000, pixels=pixels)


def _with_auxiliary_heads(name: str, heads: bool, classes: int, channels: int) -> nn.Module:
    if not heads:
        return published_networks(TORCHVISION + name)[TORCHVISION + name](classes, channels)
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, init_weights=False, aux_logits=True)
    return network


def _count(build: Builder, classes: int) -> int:
    with without_memory():
        return sum(parameter.numel() for parameter in build(classes, 3).parameters())
