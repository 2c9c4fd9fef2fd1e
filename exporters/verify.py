"""Does a model file compute what the student computes? On held-out synthetic samples, by the file alone."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError
from exporters.metadata import NORMALISED, UNIT, describe
from exporters.runtimes import Predict, Runtime, inference_batch, open_runtime, predictor, to_input

if TYPE_CHECKING:
    from torch import nn

Images = NDArray[np.uint8]  # [N, H, W, C]
Logits = NDArray[np.float32]  # [N, classes]
Constants = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, of images in 0...1

ERROR_OF_SIZE = 1e-6  # of the largest logit: rounding that does not shrink with the spread (2**-23 is 1.2e-7)


@dataclass(frozen=True)
class Limits:
    """How far a file may be from the student, by its precision."""

    error_of_spread: float  # of the spread: how far the images move a logit
    error_of_size: float  # of the largest logit
    min_agreement: float  # percent of equal predictions
    every_logit: bool = True  # each is to be as near; else those of a class, by their root mean square error


# fp32: two float32 programs of one network differ by rounding alone: folded BatchNorm, another order of the same sums.
# Measured over twelve networks, 8 to 110 layers, 32 and 224 px: at most 4.5e-5 of the spread (1.2e-6 once trained),
# while 1 % of noise on one convolution's weights makes 7e-3 or more, one weight of the last one off by 10 % 1e-3.
# More than 0.5 % of predictions apart are no longer near ties.
# fp16: a rounding is 2**13 times as coarse; measured on ResNet-56: 2.5e-3 of the spread.
# int8: an image that leaves the ranges may move a logit by twice the spread where no accuracy is lost, so the root
# mean square of a class counts. Measured: at most 0.18 of the spread on students that keep their accuracy, 0.23 on an
# ImageNet network, up to 0.37 where products saturate and a point is lost (docs/experiments.md); 1 for a class that has
# become a constant. It is there to find a wrong file; whether a right one is good enough, the agreement says.
LIMITS = {
    "fp32": Limits(5e-4, ERROR_OF_SIZE, 99.5),
    "fp16": Limits(3e-2, 2e-3, 98.0),
    "int8": Limits(0.75, ERROR_OF_SIZE, 90.0, every_logit=False),
}
SMALLEST_SPREAD = 0.5  # of the average class's: a rounding moves the logits of all classes alike
UNCHANGED: Constants = (0.0,), (1.0,)
BATCHES = (1, 7)  # the first batches: one image, and an odd number that no exporter would choose by itself
BATCH = 32  # the batches after them, smaller ones for large images


@dataclass(frozen=True)
class Verification:
    """Whether a file passed, and why; `max_abs_error` of logits and `agreement` in percent are None if it never ran.

    `verified` is None for a file that cannot run on this machine. `doubt`: what too few samples could not decide, of a
    file that passed. `logits`: what such a file says of each sample, [N, classes].
    """

    verified: bool | None
    reason: str
    max_abs_error: float | None
    agreement: float | None
    doubt: str | None = None
    logits: Logits | None = field(default=None, repr=False, compare=False)


def verify(
    module: "nn.Module",
    path: Path,
    images: Images,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    precision: str = "fp32",
    reference: Logits | None = None,
) -> Verification:
    """Compare the file at `path` with `module` on held-out synthetic samples, uint8 [N, H, W, C].

    It must compute in `precision`, and be as near to the module as that allows (LIMITS).

    The reference is the module in float32 on the CPU, fed images normalised by `mean` and `std` (`reference`, where its
    logits are known already); the file is fed as its own metadata asks. So the weights, the graph and what the file
    says of its input are all proven. A bad file
    raises nothing: it gives a Verification that is not `verified`, with the reason.
    """
    if len(images) < 2 or not (images != images[0]).any():
        return _failed("there are fewer than two different samples: a comparison on them proves nothing")
    limits = LIMITS[precision]
    if reference is None:
        reference = _run_all(predictor(copy.deepcopy(module).float().cpu()), images, (mean, std))
    try:
        runtime = open_runtime(path)
        problem = (
            _reference_problem(reference)
            or _interface_problem(runtime, images, reference, mean, std)
            or _precision_problem(path, precision)
        )
        if problem:
            return _failed(problem)
        embedded = describe(runtime.metadata).input_range == UNIT
        fed, not_fed = (UNCHANGED, (mean, std)) if embedded else ((mean, std), UNCHANGED)
        logits = _run_all(runtime.run, images, fed)
        verdict = _compare(reference, logits, limits)
        mixed = _mixed_batch(logits, runtime.run, images, fed, _tolerance(reference, limits))
        if not mixed and (verdict.verified or _matches(reference, logits, limits)):
            return replace(verdict, logits=logits)
        cause = (
            _broken_weights(path)
            or _wrong_normalisation(reference, _run_all(runtime.run, images, not_fed), embedded, limits)
            or _swapped_classes(reference, logits, limits)
            or mixed
        )
    except SSDKDError as error:
        return _failed(error.message)
    reason = f"{cause}: {verdict.reason}" if cause else verdict.reason
    return Verification(False, reason, verdict.max_abs_error, verdict.agreement)


def rejected_path(path: Path) -> Path:
    """Where a file that failed is set aside: `<name>.rejected`."""
    return path.with_name(path.name + ".rejected")


def _failed(reason: str) -> Verification:
    return Verification(False, reason, None, None)


def _run_all(predict: Predict, images: Images, constants: Constants) -> Logits:
    """Return the logits of all `images`, normalised by `constants`, in batches of 1, 7 and then 32 or fewer."""
    _, height, width, channels = images.shape
    batch = min(BATCH, inference_batch((channels, height, width)))
    sizes = (*BATCHES, *(batch for _ in range(0, len(images), batch)))
    parts = np.split(images, np.cumsum(sizes)[:-1])
    return np.concatenate([predict(to_input(part, *constants)) for part in parts if len(part)])


def _reference_problem(reference: Logits) -> str | None:
    """Return why the student's own logits prove nothing, or None."""
    if not np.isfinite(reference).all():
        return "the network itself gives NaN or infinite logits"
    if _spreads(reference).mean() <= ERROR_OF_SIZE * float(np.abs(reference).max()):
        return "the network gives the same logits for every sample: a comparison on them proves nothing"
    return None


def _interface_problem(
    runtime: Runtime,
    images: Images,
    reference: Logits,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> str | None:
    """Return how the file's declared input and output differ from the student's, or None."""
    _, height, width, channels = images.shape
    if runtime.input_shape != (channels, height, width):
        taken = "x".join(map(str, runtime.input_shape))
        return f"it takes images of {taken}, the network takes {channels}x{height}x{width}"
    if runtime.classes != reference.shape[1]:
        return f"it gives {runtime.classes} classes, the network gives {reference.shape[1]}"
    if runtime.fixed_batch is not None:
        return f"its batch is fixed at {runtime.fixed_batch}, expected any batch"
    said = describe(runtime.metadata)
    if said.input_range not in (NORMALISED, UNIT):
        return f"its metadata does not say how images are normalised, expected {NORMALISED} or {UNIT}"
    if said.input_range == NORMALISED and (said.mean, said.std) != (mean, std):
        return f"its metadata states mean {said.mean} and std {said.std}, the network's are {mean} and {std}"
    return None


def _spreads(reference: Logits) -> NDArray[np.float64]:
    """Return how far the images move each logit: its standard deviation over images, float64 [classes]."""
    return np.asarray(reference.std(axis=0, dtype=np.float64))


def _tolerance(reference: Logits, limits: Limits) -> NDArray[np.float64]:
    """Return how large `_errors` may be, float64 [classes]: of the average spread, or of a class's own."""
    spreads = _spreads(reference)
    average = np.full_like(spreads, spreads.mean())
    allowed = average if limits.every_logit else np.maximum(spreads, SMALLEST_SPREAD * average)
    return limits.error_of_spread * allowed + limits.error_of_size * float(np.abs(reference).max())


def _errors(reference: Logits, logits: Logits, limits: Limits) -> NDArray[np.float64]:
    """Return the error of each class over the images, float64 [classes]: the largest, or the root mean square."""
    errors = np.abs(reference.astype(np.float64) - logits)
    return np.asarray(errors.max(axis=0) if limits.every_logit else np.sqrt(np.square(errors).mean(axis=0)))


def _matches(reference: Logits, logits: Logits, limits: Limits) -> bool:
    return bool((_errors(reference, logits, limits) <= _tolerance(reference, limits)).all())


def _compare(reference: Logits, logits: Logits, limits: Limits) -> Verification:
    finite = np.isfinite(logits).all(axis=1)  # [N]
    if not finite.all():
        return _failed(f"NaN or infinite logits for {int((~finite).sum())} of {len(logits)} samples")
    largest, agreement = float(np.abs(reference - logits).max()), _agreement(reference, logits)
    errors, tolerances = _errors(reference, logits, limits), _tolerance(reference, limits)
    worst = (errors - tolerances).argmax()  # class
    held = f"{errors[worst]:.2g} (tolerance {tolerances[worst]:.2g})"
    error = f"max abs error {held}" if limits.every_logit else f"rms error {held}, max abs error {largest:.2g}"
    measured = f"{error}, the same predictions on {agreement:.2f} % of {len(logits)} samples"
    if errors[worst] > tolerances[worst]:
        return Verification(False, f"the logits are not the network's, {measured}", largest, agreement)
    if agreement < limits.min_agreement:
        return Verification(False, f"the predictions are not the network's, {measured}", largest, agreement)
    return Verification(True, measured, largest, agreement)


def _agreement(reference: Logits, logits: Logits) -> float:
    """Return the percentage of equal predictions; where classes tie in the student, each of them is its prediction."""
    chosen = np.take_along_axis(reference, logits.argmax(axis=1)[:, None], axis=1)[:, 0]  # [N]
    rounding = ERROR_OF_SIZE * float(np.abs(reference).max())
    return 100.0 * float((chosen >= reference.max(axis=1) - rounding).mean())


def _precision_problem(path: Path, precision: str) -> str | None:
    """Return how an ONNX file differs from the precision that was asked for, or None."""
    import onnx

    from exporters.precision import precision_problem

    return precision_problem(onnx.load(path), precision) if path.suffix == ".onnx" else None


def _broken_weights(path: Path) -> str | None:
    """Name the tensors of an ONNX file that hold NaN or infinity; a runtime's ReLU may turn NaN into 0 and hide it."""
    import onnx

    if path.suffix != ".onnx":
        return None
    names = []
    for tensor in onnx.load(path).graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            names.append(tensor.name)
    return f"the file holds NaN or infinity in {', '.join(names[:3])}" if names else None


def _wrong_normalisation(reference: Logits, other: Logits, embedded: bool, limits: Limits) -> str | None:
    """Name a file that is right on the input that its metadata does not ask for."""
    if not _matches(reference, other, limits):
        return None
    found, stated = (NORMALISED, UNIT) if embedded else (UNIT, NORMALISED)
    return f"its normalisation is wrong, it takes images {found} and its metadata says {stated}"


def _swapped_classes(reference: Logits, logits: Logits, limits: Limits) -> str | None:
    """Name the classes whose logits stand in another class's place."""
    tolerance = _tolerance(reference, limits)
    wrong = np.flatnonzero(~(_errors(reference, logits, limits) <= tolerance))  # classes
    holds: dict[int, int] = {}
    for here in wrong:
        errors = _errors(reference[:, wrong], logits[:, [here]], limits)  # [classes that are wrong]
        nearest = int(errors.argmin())
        if not errors[nearest] <= tolerance[wrong[nearest]] or int(wrong[nearest]) in holds.values():
            return None
        holds[int(here)] = int(wrong[nearest])
    shown = ", ".join(f"{here} holds {there}" for here, there in list(holds.items())[:4])
    return f"classes have changed places ({shown})" if holds else None


def _mixed_batch(
    logits: Logits, run: Predict, images: Images, constants: Constants, tolerance: NDArray[np.float64]
) -> str | None:
    """Name a file that gives an image other logits among others than alone; an average over samples may hide it."""
    first = images[: sum(BATCHES)]
    together = run(to_input(first, *constants))
    if (np.abs(together - logits[: len(first)]) > tolerance).any():
        return "an image's logits depend on the images beside it"
    return None
