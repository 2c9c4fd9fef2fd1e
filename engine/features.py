"""Feature matching: a student also learns what its teacher computes on the way, in the pairs of engine.stages.

A target for every position of every map says more of an image than the logits do (Romero et al. 2015, FitNets). The
teacher's channels are compared with what the best linear map of the student's makes of them. FitNets learns that
regressor beside the student; here it is solved for in each batch, so that it is the best one from the first step on,
and nothing has to be kept. Channels that the student began with are no reason to compare one with one: through a
regressor it learns more (docs/experiments.md).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.hooks import removing
from engine.layers import among_zeros, layout_of
from engine.stages import Pair, Places, Stages

EPSILON = 1e-5  # of a variance: a channel may be the same everywhere
RIDGE = 1e-2  # of a standardised channel's variance
NEWTON_STEPS = 14  # of Newton's iteration; what they leave undone is as if the ridge were larger


@torch.no_grad()
def teacher_maps(stages: Stages, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The teacher's logits [B, K], and its maps of the pairs of `stages` as they are compared.

    A map is float32 [b, D, h, w]; its channels have mean 0 and variance 1.
    """
    pairs = {pair.theirs: pair for pair in stages.pairs}
    maps: dict[nn.Module, Tensor] = {}

    def keep(stage: nn.Module, _inputs: object, output: Tensor) -> None:
        maps[stage] = standardised(output[pairs[stage].places])  # here, while caches hold it

    with removing([stage.register_forward_hook(keep) for stage in pairs]):
        logits = stages.teacher(inputs)
    return logits, [maps[stage] for stage in pairs]


@contextlib.contextmanager
def compared(stages: Stages, targets: list[Tensor], weights: Tensor) -> Iterator[list[Tensor]]:
    """Within the context a forward pass of the student fills the list with the error of each map, a float32 scalar.

    The error of an image is the mean squared distance of the teacher's map from what a ridge regression makes of the
    student's. Its mean is the share of the teacher's variance that the student's channels do not explain: 1 where they
    know no more than each channel's mean. That of a map is the weighted mean over the images that are compared.

    A module that gives no such map in training mode is left out; of one that runs twice there, its first map counts.

    Args:
        stages: of `stages_of`.
        targets: of `teacher_maps`, one a pair.
        weights: of the images of the batch, float32 [B].
    """
    errors: list[Tensor] = []
    expected = {pair.own: (pair, target) for pair, target in zip(stages.pairs, targets, strict=True)}

    def compare(stage: nn.Module, _inputs: object, output: object) -> None:
        if stage in expected and _fits(output, *expected[stage]):
            pair, target = expected.pop(stage)
            errors.append((weights[pair.places[0]] * Unexplained.apply(output, pair.places, target)).mean())

    with removing([stage.register_forward_hook(compare) for stage in expected]):
        yield errors


def _fits(output: object, pair: Pair, target: Tensor) -> bool:
    """Whether it is a map whose compared part is of the target's images, height and width."""
    if not isinstance(output, Tensor) or output.dim() != target.dim():
        return False
    part = output[pair.places]
    return len(part) == len(target) and part.shape[2:] == target.shape[2:]


def standardised(maps: Tensor) -> Tensor:
    """Maps [B, C, H, W] in float32, each channel with mean 0 and variance 1 over the batch.

    Made of a copy, as what follows a map in its network may change it in place.
    """
    return F.batch_norm(_copied(maps), None, None, training=True, eps=EPSILON)


class Unexplained(torch.autograd.Function):
    """Of each image the share of the teacher's variance that no linear map of the student's channels explains.

    Its gradient is that of the student's channels alone: the best map has none. It is a ridge regression over all
    positions that are compared. As one operation, with a gradient of its own, it takes less time (docs/experiments.md).
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, places: Places, target: Tensor) -> Tensor:
        """Mean squared distances, float32 [b].

        Args:
            ctx: of PyTorch's.
            features: the student's map, [B, C, H, W]; it may be changed in place afterwards.
            places: what of it is compared, [b, C, h, w].
            target: standardised channels of the teacher there, float32 [b, D, h, w].
        """
        part = _copied(features[places])
        with torch.autocast(part.device.type, enabled=False):
            own, *statistics = torch.native_batch_norm(part, None, None, None, None, True, 0.0, EPSILON)
            rows, wanted = _rows(own), _rows(target)
            weights = solve(rows.T @ rows / len(rows), rows.T @ wanted / len(rows))
            apart = torch.addmm(wanted, rows, weights, beta=-1).unflatten(0, (len(part), -1))  # [b, h w, D]
        ctx.save_for_backward(part, *statistics, weights, apart)
        ctx.places, ctx.shape, ctx.dtype, ctx.layout = places, features.shape, features.dtype, layout_of(features)
        return torch.linalg.vector_norm(apart, dim=(1, 2)).square() / apart[0].numel()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """In the memory layout of the map, as layers before it run best; zero where nothing was compared."""
        part, mean, inverse_deviation, weights, apart = ctx.saved_tensors
        of_rows = (apart * (2 / apart[0].numel() * upstream)[:, None, None]).flatten(0, 1) @ weights.T
        of_own = of_rows.view(len(part), *part.shape[2:], -1).permute(0, 3, 1, 2)
        (of_part, *_) = torch.ops.aten.native_batch_norm_backward(
            of_own, part, None, None, None, mean, inverse_deviation, True, EPSILON, [True, False, False]
        )
        return among_zeros(of_part.to(ctx.dtype), ctx.shape, ctx.places, ctx.layout), None, None


def _copied(maps: Tensor) -> Tensor:
    return maps.to(torch.float32, copy=True, memory_format=torch.channels_last)


def _rows(maps: Tensor) -> Tensor:
    """[B, C, H, W] in channels_last as [B H W, C], the same memory."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def solve(correlations: Tensor, wanted: Tensor) -> Tensor:
    """The solution x [C, D] of (correlations [C, C] + a ridge) x = wanted [C, D], all float32.

    NaN in it gives NaN, and no error.
    """
    matrix = correlations + RIDGE * torch.eye(len(correlations), device=correlations.device)
    if matrix.is_cpu:
        return torch.cholesky_solve(wanted, torch.linalg.cholesky_ex(matrix)[0])
    return solve_by_products(matrix, wanted)


def solve_by_products(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The solution x [C, D] of matrix [C, C] x = wanted [C, D]; it is symmetric, its eigenvalues are RIDGE or more.

    A CUDA graph holds products; whether it would hold a factorisation was not tried. Newton's iteration finds the
    inverse; in float32 its product with `wanted` is corrected once. On a CPU it takes five to twenty times as long as
    a factorisation.
    """
    identity = torch.eye(len(matrix), device=matrix.device)
    inverse = identity / matrix.abs().sum(0).max()
    for _ in range(NEWTON_STEPS):
        inverse = torch.addmm(inverse, inverse @ matrix, inverse, beta=2, alpha=-1)
    solution = inverse @ wanted
    return solution + inverse @ (wanted - matrix @ solution)
