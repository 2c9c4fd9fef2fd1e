"""A first look at a network by running it: does it take the images, and are these logits that come out?"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.errors import SSDKDError, first_line
from engine.hooks import removing
from engine.shapes import Shape, words

TRIED_PIXELS = (32, 64, 96, 128, 224, 256, 299, 384, 28)
# What layers raise at sizes that they cannot take.
FORWARD_ERRORS = (
    *(RuntimeError, ValueError, AssertionError, IndexError, TypeError, KeyError, AttributeError, torch.jit.Error),
)
NEVER_RUNS = "ssdkd_never_runs"  # set on layers that the forward pass leaves out


class Logits(nn.Module):
    """A network whose output is put into the form of logits; the layers inside stay as they are.

    With `keeps_layout` its tensors stay contiguous whatever memory format it is moved to: code that calls `view` on a
    feature map fails on others.
    """

    def __init__(self, network: nn.Module, *, probabilities: bool, keeps_layout: bool) -> None:
        super().__init__()
        self.network = network
        self.probabilities = probabilities
        self.keeps_layout = keeps_layout

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        out: Tensor = self.network(images.contiguous() if self.keeps_layout else images).flatten(1)
        return out.clamp_min(1e-12).log() if self.probabilities else out

    def to(self, *arguments: Any, **keywords: Any) -> Self:
        """As nn.Module.to, but for the memory format where that must stay."""
        if self.keeps_layout:
            keywords.pop("memory_format", None)
        return super().to(*arguments, **keywords)


def network_inside(module: nn.Module) -> nn.Module:
    """The network in `Logits`, whose layers have the names of its architecture; any other module as it is."""
    return module.network if isinstance(module, Logits) else module


def as_classifier(module: nn.Module, shape: Shape, name: str) -> tuple[nn.Module, Tensor, list[str]]:
    """Runs noise [2, C, H, W] through the network; returns it with its logits [2, classes] and warnings.

    Outputs [B, classes, 1, 1] are flattened, probabilities (a softmax at the end) made logits again. BatchNorm layers
    that did not run are marked NEVER_RUNS. `name`: of the file, for messages.

    Raises:
        SSDKDError: the network cannot take such images, or what it gives is no vector of logits.
    """
    ran: set[nn.Module] = set()
    norms = [layer for layer in module.modules() if is_batchnorm(layer)]
    handles = [layer.register_forward_hook(lambda layer, *_: ran.add(layer)) for layer in norms]
    images = noise(shape)
    try:
        with removing(handles), torch.no_grad():
            out = module(images)
    except FORWARD_ERRORS as error:
        raise (_wrong_channels(module, shape, name) or _wrong_size(module, shape, name, error)) from error
    for layer in norms:
        if layer not in ran:
            setattr(layer, NEVER_RUNS, True)
    if not isinstance(out, Tensor):
        raise SSDKDError(
            f"{name} computes a {type(out).__name__}: expected a tensor of logits [B, classes]",
            "write a function that returns a module with logits alone, and name it: --arch package.module:function",
        )
    if out.dim() == 4 and out.shape[2:] != (1, 1):
        raise SSDKDError(
            f"{name} computes {list(out.shape)} for 2 images of {words(shape)}: expected logits [2, classes]",
            "ssdkd compresses classifiers; this looks like a network for segmentation or detection",
        )
    if out.shape[0] != 2 or out.flatten(1).shape[1] < 2 or out.dim() == 3:
        raise SSDKDError(
            f"{name} computes {list(out.shape)} for 2 images of {words(shape)}: expected logits [2, 2 or more classes]",
            "give a classifier whose last layer has one output for each class",
        )
    probabilities = _are_probabilities(out.flatten(1))
    keeps_layout = not _takes_channels_last(module, images)
    if out.dim() == 2 and not probabilities and not keeps_layout:
        return module, out, []
    module = Logits(module, probabilities=probabilities, keeps_layout=keeps_layout).eval()
    warnings = (
        ["The network ends in a softmax; logarithms of its probabilities are used as logits."] if probabilities else []
    )
    with torch.no_grad():
        return module, module(images), warnings


def noise(shape: Shape, images: int = 2) -> Tensor:
    """The same standard normal images [images, C, H, W] each time; nobody's random state is touched."""
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(0))


def is_batchnorm(layer: nn.Module) -> bool:
    """Whether it is a BatchNorm layer, of whatever library."""
    return any("BatchNorm" in kind.__name__ for kind in type(layer).__mro__)


def input_channels(module: nn.Module) -> int | None:
    """How many channels the first convolution takes; None without one."""
    first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    return first.in_channels if first is not None else None


def _wrong_channels(module: nn.Module, shape: Shape, name: str) -> SSDKDError | None:
    """None where the first convolution's channels are not what is amiss: some stems turn pixels into channels."""
    channels = input_channels(module)
    if channels in (None, shape[0]) or not _runs(module, (channels, *shape[1:])):
        return None
    return SSDKDError(
        f"--input says {shape[0]} channels, but the first convolution of {name} takes {channels}",
        f"give --input {words((channels, *shape[1:]))}",
    )


def _wrong_size(module: nn.Module, shape: Shape, name: str, error: BaseException) -> SSDKDError:
    reason = first_line(error)
    for pixels in TRIED_PIXELS:
        other = (shape[0], pixels, pixels)
        if _runs(module, other):
            return SSDKDError(
                f"{name} cannot take images of {words(shape)}: {reason}",
                f"give the size that it was trained at; it takes, for example, --input {words(other)}",
            )
    return SSDKDError(
        f"{name} cannot take images of {words(shape)}, nor of any other size that was tried: {reason}",
        "give the size that it was trained at with --input CxHxW",
    )


def _runs(module: nn.Module, shape: Shape) -> bool:
    try:
        with torch.no_grad():
            module(noise(shape))
    except FORWARD_ERRORS:
        return False
    return True


def _takes_channels_last(module: nn.Module, images: Tensor) -> bool:
    """Whether the network runs with channels_last tensors, which are faster; it is left as it was."""
    try:
        with torch.no_grad():
            module.to(memory_format=torch.channels_last)
            module(images.contiguous(memory_format=torch.channels_last))
    except FORWARD_ERRORS:
        return False
    finally:
        module.to(memory_format=torch.contiguous_format)
    return True


def _are_probabilities(out: Tensor) -> bool:
    sums = out.sum(1)
    return bool((out >= 0).all() and (out <= 1).all() and (sums - 1).abs().max() < 1e-4)
