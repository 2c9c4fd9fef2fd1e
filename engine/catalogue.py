"""The networks that a bare state dict is compared with: our zoo and torchvision's classifiers, built without memory."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from engine.zoo import ZOO

Shape = tuple[int, ...]
Builder = Callable[[int, int], nn.Module]  # (classes, channels)

# Written by profilers or counting batches: no part of what a network computes.
IGNORED_SUFFIXES = ("num_batches_tracked", "total_ops", "total_params", "_extra_state")
TORCHVISION_PREFIX = "torchvision/"  # before the names that our zoo has too
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


@dataclass(frozen=True)
class Architecture:
    """A network that can be built by name; `parameters` are its sizes with 1,000 (ours: 10) classes and 3 channels."""

    name: str
    build: Builder
    parameters: tuple[int, ...]
    classes: int
    pixels: int  # the image side it is usually trained at


class _WithoutMemory(TorchFunctionMode):
    """Layers are built on the meta device; sums over small ranges, which some networks do while they are built, are not."""

    def __torch_function__(
        self, function: Callable[..., object], _types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        arguments = dict(kwargs or {})
        if function in _FACTORIES and arguments.get("device") is None:
            arguments["device"] = "meta"
        return function(*args, **arguments)


@contextmanager
def without_memory() -> Iterator[None]:
    """Networks built inside have shapes but no numbers: fast, and the random state of nobody is touched."""
    # torch.nn.init warns about tensors without elements; torchvision about its own defaults.
    with _WithoutMemory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def skeleton(module: nn.Module) -> dict[str, Shape]:
    """The names and shapes that a state dict of `module` has, without those of IGNORED_SUFFIXES."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items() if not name.endswith(IGNORED_SUFFIXES)}


def build_torchvision(classes: int, channels: int, *, name: str, **options: object) -> nn.Module:
    """One of torchvision's classifiers with that many classes, its first convolution for `channels` channels."""
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "transform_input": False, **options}
    module: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    if channels != 3:
        path, first = next((path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Conv2d))
        module.set_submodule(
            path,
            nn.Conv2d(
                channels, first.out_channels, first.kernel_size, first.stride, first.padding, first.dilation,
                first.groups, first.bias is not None, first.padding_mode,
            ),
        )  # fmt: skip
    return module


@cache
def architectures() -> tuple[Architecture, ...]:
    """Every candidate, ours first; takes about a second the first time."""
    with without_memory():
        ours = [
            Architecture(name, build, (sum(parameter.numel() for parameter in build(10, 3).parameters()),), 10, 32)
            for name, build in ZOO.items()
        ]
    theirs = []
    for name in models.list_models(module=models):
        sizes = {weights.meta["num_params"] for weights in models.get_model_weights(name)}
        qualified = TORCHVISION_PREFIX + name if name in ZOO else name
        pixels = 299 if name == "inception_v3" else 224
        for options in ({"aux_logits": True}, {"aux_logits": False}) if name in ("googlenet", "inception_v3") else ({},):
            build = partial(build_torchvision, name=name, **options)
            if options:
                with without_memory():
                    sizes = {sum(parameter.numel() for parameter in build(1000, 3).parameters())}
            theirs.append(Architecture(qualified, build, tuple(sorted(sizes)), 1000, pixels))
    return (*ours, *theirs)
