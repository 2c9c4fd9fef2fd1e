"""How far the images of a batch lie apart, which a teacher's BatchNorm statistics do not say.

The running variance of a channel is that of its values in all places of all images. A generator can meet it with one
texture in every image, and does; of photographs, a part of the variance lies between the images: one is dark, the
next has no edges. That part is much the same for photographs and for dead leaves (docs/experiments.md), so the images'
own means of each channel are to differ at least as much as those of dead leaves do.
"""

import torch
from torch import Tensor, nn

from engine.channel_statistics import recorded_statistics
from engine.device import Compute
from engine.images import Normalization, to_input
from engine.leaves import dead_leaves
from engine.losses import BatchNormPrior, flat_statistics
from engine.shapes import Shape

IMAGES = 128  # that the spread is taken from, in whole batches: 256 on a GPU
LEAST = 1e-6  # of a running variance: the root of nothing has no gradient


@torch.no_grad()
def spread_of_leaves(
    teacher: nn.Module,
    prior: BatchNormPrior,
    image_shape: Shape,
    normalization: Normalization,
    *,
    batch: int,
    compute: Compute,
) -> Tensor:
    """The deviation of dead leaves' own means of each channel, in deviations of all its values, float32 [R].

    The teacher is in eval mode; it looks at `batch` images at a time, always the same ones.
    """
    rng = torch.Generator(compute.device).manual_seed(0)
    statistics = []
    for _ in range(-(-IMAGES // batch)):
        images = dead_leaves(batch, image_shape, normalization, rng)
        with recorded_statistics(prior.layers, between=True) as recorded, compute.autocast():
            teacher(to_input(images, normalization))
        statistics.append(flat_statistics(prior, recorded))
    _, variance, between = torch.stack(statistics).mean(0)
    return (between / (variance + prior.floor)).sqrt()


def spread_loss(prior: BatchNormPrior, between: Tensor, wanted: Tensor) -> Tensor:
    """L_sp: how much less the images' own means of each channel differ than is `wanted`, squared; scalar.

    `between` [R] is the variance of those means, `wanted` [R] a deviation in running ones; averaged as in L_bn.
    """
    missing = (wanted - (between / prior.variance + LEAST).sqrt()).clamp_min(0)
    return (prior.weight * missing.square()).sum()
