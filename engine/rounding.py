"""Weights rounded together: each takes over what those before it have lost, so that the layer stays where it was.

To the nearest integer every weight is off by a little of its own; a layer that adds many inputs which rise and fall
together (the nine pixels of a depthwise convolution) adds these errors up. Here a layer's weights are rounded one
input after another, and what one is off by is taken out of the weights that are still to come, as its inputs' second
moments on synthetic samples say: the least squares of the layer's outputs (Frantar and Alistarh, Optimal Brain
Compression, NeurIPS 2022, in the fixed order of Frantar et al., GPTQ, ICLR 2023).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.images import Normalization, to_input
from engine.quantization import Grid, Ranges, hooked, quantized_layers, rounded_inputs

PLACES = 14  # a side, of an image, at which a convolution's windows are looked at: every second one at 28 px
DAMPING = 0.3  # of the mean second moment, added to each: what few samples say of an input is not all of it
PART_INPUTS = 2304  # 256 windows of 3x3; a layer with more inputs is cut into parts of so many, each on its own
BLOCK_INPUTS = 128  # whose errors are handed on to the rest of the part at once


@torch.no_grad()
def rounded_weights(
    module: nn.Module, images: Tensor, ranges: Ranges, grid: Grid, *, normalization: Normalization, batch: int
) -> dict[str, Tensor]:
    """The weights of each layer of `ranges` on the grid, by the layer's name; `module` keeps its own.

    Args:
        module: float32, in eval mode.
        images: uint8 [N, H, W, C], synthetic samples on its device.
        ranges: of the layers' inputs, from `observed_ranges`.
        grid: the integers. Without a scale a channel BatchNorm's folding would undo all this.
        normalization, batch: how many images the network takes at once, and how.
    """
    layers = {name: layer for name, layer in quantized_layers(module).items() if name in ranges}
    moments: dict[str, list[Tensor]] = {}

    def look(name: str, inputs: Tensor) -> None:
        windows = _windows(layers[name], rounded_inputs(inputs, *ranges[name], symmetric=grid.symmetric_activations))
        parts = [part @ part.transpose(1, 2) for part in windows.split(PART_INPUTS, dim=1)]
        moments[name] = [old + new for old, new in zip(moments[name], parts, strict=True)] if name in moments else parts

    with hooked(layers, look):
        for part in images.split(batch):
            module(to_input(part, normalization))
    return {name: _rounded_layer(layers[name], moments.pop(name), grid) for name in [*moments]}


def _windows(layer: nn.Conv2d | nn.Linear, inputs: Tensor) -> Tensor:
    """What a layer's weights are multiplied with, [G, K, P]: K inputs of an output channel, at P places, G groups.

    Of a convolution PLACES x PLACES windows of each image at most. Where the layer itself does not say how it pads
    ("same", a class of timm's), only as much is padded as one window needs: these are weights of a least squares.
    """
    if isinstance(layer, nn.Linear):
        return inputs.flatten(0, -2).T[None]
    stated = (0, 0) if isinstance(layer.padding, str) else layer.padding
    padding, strides = [], []
    for side, kernel, pad, dilation, stride in zip(
        inputs.shape[2:], layer.kernel_size, stated, layer.dilation, layer.stride, strict=True
    ):
        reach = dilation * (kernel - 1) + 1
        padding.append(max(pad, -(-(reach - side) // 2)))
        places = (side + 2 * padding[-1] - reach) // stride + 1
        strides.append(stride * -(-places // PLACES))
    columns = F.unfold(
        inputs, layer.kernel_size, dilation=layer.dilation, padding=tuple(padding), stride=tuple(strides)
    )
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)  # [B, G * K, L] to [G, K, B * L]


def _rounded_layer(layer: nn.Conv2d | nn.Linear, moments: list[Tensor], grid: Grid) -> Tensor:
    """The weights of a layer on the grid, in the shape that they have; `moments` [G, K, K] of each part of its inputs.

    An output channel's largest weight is the end of its scale, and stays there.
    """
    groups = len(moments[0])
    weights = layer.weight.flatten(1).unflatten(0, (groups, -1))  # [G, O, K]
    scale = grid.scale(layer.weight).unflatten(0, (groups, -1))  # [G, O]
    parts = weights.split([moment.shape[1] for moment in moments], dim=2)
    rounded = [
        _rounded_part(part, moment, scale, grid.weight_levels) for part, moment in zip(parts, moments, strict=True)
    ]
    return torch.cat(rounded, 2).reshape_as(layer.weight)


def _rounded_part(weights: Tensor, moments: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Weights [G, O, K] on the grid of `scale` [G, O], by their inputs' second moments [G, K, K].

    Those of the strongest inputs come first, while there are many left to make up for them.
    """
    if not moments.isfinite().all():  # inputs beyond 1e19: each weight on its own
        moments = torch.ones_like(moments).diagonal(dim1=1, dim2=2).diag_embed()
    strength = moments.diagonal(dim1=1, dim2=2)  # [G, K]
    order = strength.argsort(1, descending=True)
    damping = DAMPING * strength.mean(1, keepdim=True).clamp_min(torch.finfo(strength.dtype).tiny)
    moments = moments.double() + torch.diag_embed(damping.double().expand_as(strength))
    moments = moments.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    handed_on = torch.linalg.cholesky(inverse, upper=True).float()  # row k: how an error of k is made up for after it
    handed_on = handed_on / handed_on.diagonal(dim1=1, dim2=2)[:, :, None]

    steps = weights.take_along_dim(order[:, None], 2) / scale[:, :, None]  # in steps of the grid
    ends = torch.where(steps.abs() > levels - 1e-3, steps.sign() * levels, 0)  # 0: no end
    for first in range(0, steps.shape[2], BLOCK_INPUTS):
        block = slice(first, min(first + BLOCK_INPUTS, steps.shape[2]))
        errors = torch.empty_like(steps[:, :, block])
        for index in range(block.start, block.stop):
            wanted, largest = steps[:, :, index], ends[:, :, index]
            whole = torch.where(largest == 0, wanted.round().clamp(-levels, levels), largest)
            error = (wanted - whole)[:, :, None]
            steps[:, :, index], errors[:, :, index - first] = whole, error[:, :, 0]
            steps[:, :, index + 1 : block.stop] -= error * handed_on[:, index, None, index + 1 : block.stop]
        steps[:, :, block.stop :] -= errors @ handed_on[:, block, block.stop :]
    return (steps * scale[:, :, None]).take_along_dim(order.argsort(1)[:, None], 2)
