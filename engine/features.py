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
from engine.layers import Part
from engine.stages import Pair, Stages

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
        if stage not in expected or not _fits(output, *expected[stage]):
            return
        pair, target = expected.pop(stage)
        fitted = regressed(standardised(Part.apply(output, pair.places)), target)
        distances = SquaredDistances.apply(fitted, target) / target[0].numel()
        errors.append((weights[pair.places[0]] * distances).mean())

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
    return F.batch_norm(maps.to(torch.float32, copy=True), None, None, training=True)


class SquaredDistances(torch.autograd.Function):
    """Of each map from its target; in fewer passes over memory than PyTorch's own operations make of it."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, targets: Tensor) -> Tensor:
        """[b, C, H, W], both float32, to [b]; the targets have no gradient."""
        apart = maps - targets
        ctx.save_for_backward(apart)
        return torch.linalg.vector_norm(apart, dim=(1, 2, 3)).square()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """d distance / d map = 2 (map - target)."""
        (apart,) = ctx.saved_tensors
        return apart * (2 * upstream)[:, None, None, None], None


def regressed(own: Tensor, target: Tensor) -> Tensor:
    """The linear map of a student's channels that is nearest to the teacher's, as a map [b, D, H, W].

    Its gradient is that of the student's channels alone: the best map has none. It is a ridge regression over all
    positions of all images.

    Args:
        own: standardised channels of the student, float32 [b, C, H, W].
        target: those of the teacher, float32 [b, D, H, W].
    """
    rows, wanted = (maps.permute(0, 2, 3, 1).flatten(0, 2) for maps in (own, target))
    with torch.autocast(own.device.type, enabled=False):
        with torch.no_grad():
            weights = solve(rows.T @ rows / len(rows), rows.T @ wanted / len(rows))
        fitted = rows @ weights
    return fitted.unflatten(0, (len(own), *own.shape[2:])).permute(0, 3, 1, 2)


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

    A factorisation would make the host wait for a GPU. Newton's iteration finds the inverse; in float32 its product
    with `wanted` is corrected once. On a CPU it takes five to twenty times as long as a factorisation.
    """
    identity = torch.eye(len(matrix), device=matrix.device)
    inverse = identity / matrix.abs().sum(0).max()
    for _ in range(NEWTON_STEPS):
        inverse = inverse @ (2 * identity - matrix @ inverse)
    solution = inverse @ wanted
    return solution + inverse @ (wanted - matrix @ solution)
