"""Does a model file compute what the student computes? On held-out synthetic samples, by the file alone."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError
from exporters.metadata import NORMALISED, UNIT, describe
from exporters.runtimes import Predict, Runtime, open_runtime, predictor, to_input

if TYPE_CHECKING:
    from torch import nn

# Two float32 programs of one network differ by rounding alone: folded BatchNorm, another order of the same sums.
ERROR_OF_SPREAD = 1e-3  # of the spread that the images make in a logit
ERROR_OF_SIZE = 1e-6  # of the largest logit: what float32 can resolve (2**-23 is 1.2e-7)
MIN_AGREEMENT = 99.5  # percent; below it more than near ties have changed sides
BATCHES = (1, 7)  # sizes tried first: one, and an odd one that no exporter chooses by itself
BATCH = 32  # the size for the rest


@dataclass(frozen=True)
class Verification:
    """Whether a file passed, and why; `max_abs_error` of logits and `agreement` in percent are None if it never ran."""

    verified: bool
    reason: str
    max_abs_error: float | None
    agreement: float | None


def verify(
    module: "nn.Module",
    path: Path,
    images: NDArray[np.uint8],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    threads: int | None = None,
) -> Verification:
    """Compare the file at `path` with `module` on held-out synthetic samples, uint8 [N, H, W, C].

    The reference is the module in float32 on the CPU, fed images normalised by `mean` and `std`; the file is fed as
    its own metadata asks. So the weights, the graph and what the file says of its input are all proven. Never raises
    for a bad file: that is a Verification with `verified` false and the reason.
    """
    try:
        runtime = open_runtime(path, threads=threads)
    except SSDKDError as error:
        return Verification(False, error.message, None, None)
    reference_module = copy.deepcopy(module).float().cpu()
    normalised = to_input(images, mean, std)
    reference = _in_batches(predictor(reference_module), normalised, (BATCH,))
    refusal = _refusal(images, reference) or _mismatch(runtime, images, reference, mean, std)
    if refusal:
        return Verification(False, refusal, None, None)
    embedded = describe(runtime.metadata).input_range == UNIT
    fed = to_input(images, (0.0,), (1.0,)) if embedded else normalised
    try:
        logits = _in_batches(runtime.run, fed, BATCHES)
    except SSDKDError as error:
        return Verification(False, error.message, None, None)
    return _compare(reference, logits)


def reject(path: Path) -> Path:
    """Rename a file that failed to `<name>.rejected`, over an earlier one, and return the new path."""
    rejected = path.with_name(path.name + ".rejected")
    path.replace(rejected)
    return rejected


def _in_batches(predict: Predict, inputs: NDArray[np.float32], first: tuple[int, ...]) -> NDArray[np.float32]:
    logits, start, sizes = [], 0, list(first)
    while start < len(inputs):
        size = sizes.pop(0) if sizes else BATCH
        logits.append(predict(inputs[start : start + size]))
        start += size
    return np.concatenate(logits)


def _refusal(images: NDArray[np.uint8], reference: NDArray[np.float32]) -> str | None:
    """Return why these samples would prove nothing, or None."""
    if len(np.unique(images.reshape(len(images), -1), axis=0)) < 2:
        return "fewer than two different samples: a comparison on them proves nothing"
    if not np.isfinite(reference).all():
        return "the student itself gives NaN or infinite logits"
    if _spread(reference) <= ERROR_OF_SIZE * float(np.abs(reference).max()):
        return "the student gives the same logits for every sample: a comparison proves nothing"
    return None


def _mismatch(
    runtime: Runtime,
    images: NDArray[np.uint8],
    reference: NDArray[np.float32],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> str | None:
    """Return how the file's declared input and output differ from the student's, or None."""
    _, height, width, channels = images.shape
    if runtime.input_shape != (channels, height, width):
        return f"takes images of {runtime.input_shape}, the student takes {(channels, height, width)}"
    if runtime.classes != reference.shape[1]:
        return f"gives {runtime.classes} classes, the student gives {reference.shape[1]}"
    if runtime.fixed_batch is not None:
        return f"the batch is fixed at {runtime.fixed_batch}, expected any batch"
    description = describe(runtime.metadata)
    if description.input_range == NORMALISED and not (
        np.allclose(description.mean or (), mean) and np.allclose(description.std or (), std)
    ):
        return (
            f"its metadata states mean {description.mean} and std {description.std}, "
            f"the student was distilled with {mean} and {std}"
        )
    return None


def _spread(reference: NDArray[np.float32]) -> float:
    """Return how far the images move a logit: the standard deviation over images, averaged over classes."""
    return float(reference.std(axis=0, dtype=np.float64).mean())


def _compare(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> Verification:
    finite = np.isfinite(logits).all(axis=1)  # [N]
    if not finite.all():
        return Verification(
            False, f"NaN or infinite logits for {int((~finite).sum())} of {len(logits)} samples", None, None
        )
    error = float(np.abs(reference - logits).max())
    agreement = 100.0 * float((reference.argmax(axis=1) == logits.argmax(axis=1)).mean())
    tolerance = ERROR_OF_SPREAD * _spread(reference) + ERROR_OF_SIZE * float(np.abs(reference).max())
    measured = (
        f"max abs error {error:.2g} (tolerance {tolerance:.2g}), agreement {agreement:.2f} % on {len(logits)} samples"
    )
    if error > tolerance:
        return Verification(False, f"the logits are not the student's: {measured}", error, agreement)
    if agreement < MIN_AGREEMENT:
        return Verification(False, f"the predictions are not the student's: {measured}", error, agreement)
    return Verification(True, measured, error, agreement)
