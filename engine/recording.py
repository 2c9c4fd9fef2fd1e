"""A computation that a GPU records once and then repeats by itself.

A step of a small network is hundreds of short kernels, and the host takes longer to launch them than the GPU to run
them. As a CUDA graph they are one launch. A recording counts only if it gives what the plain call gives on the next
batch; else the plain call stays, and `refusal` says why. Which devices have graphs, engine.device says.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from engine.errors import SSDKDError, first_line

PLAIN_CALLS = 3  # before the recording: libraries choose their kernels and allocate in their first calls
TOLERANCE = 0.05  # of an output's norm: half precision and sums in any order are far below, another batch far above
FLOOR = 0.01  # of the largest norm of its kind: less is rounding (a bias before a BatchNorm has a gradient of nothing)
TIDIES_UP = TorchVersion(torch.__version__) >= "2.14"  # a failed capture leaves older versions unable to draw numbers


class Outputs(NamedTuple):
    """What a step computes before its optimiser takes it."""

    losses: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


Function = Callable[[], Outputs]


class Recorded:
    """`function()`, replayed as a CUDA graph after its first calls, or called as it is.

    The function takes no arguments. It reads tensors whose memory stays where it is, never makes the host wait, and may
    change nothing but BatchNorm statistics (which see one batch twice, when the recording is tried). What it returns is
    overwritten by the next call.
    """

    def __init__(self, function: Function, device: torch.device, *, enabled: bool) -> None:
        """`enabled` off: the function is called as it is; on, `device` must have CUDA graphs."""
        self.function = function
        self.device = device
        self.enabled = enabled
        self.refusal: str | None = None  # why there is no recording though one was asked for
        self._calls = 0
        self._candidate: Function | None = None  # recorded, not yet compared
        self._replay: Function | None = None

    @property
    def replays(self) -> bool:
        """Whether a recording has taken the function's place."""
        return self._replay is not None

    def __call__(self) -> Outputs:
        """The function's outputs, of what lies in its memory now.

        Raises:
            SSDKDError: the recording failed in a PyTorch that cannot go on after that.
        """
        if self._replay is not None:
            return self._replay()
        if not self.enabled or self.refusal:
            return self.function()
        if self._candidate is not None:
            return self._compare()
        self._calls += 1
        return beside(self.function, self.device) if self._calls <= PLAIN_CALLS else self._record()

    def _record(self) -> Outputs:
        try:
            outputs = without_waiting(self.function, self.device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a student of the user's may read a value
            self.refusal = f"it cannot be recorded: {first_line(error)}"
        if self.refusal:
            return self.function()
        try:
            self._candidate = capture(self.function, self.device)
        except RuntimeError as error:
            self.refusal = f"the recording failed: {first_line(error)}"
            if not TIDIES_UP:
                raise SSDKDError(
                    f"a step could not be recorded as a CUDA graph: {first_line(error)}",
                    "put cuda_graphs = false into the [distillation] table of the file given with --config",
                ) from error
        return outputs

    def _compare(self) -> Outputs:
        candidate, self._candidate = self._candidate, None
        assert candidate is not None
        numbers = random_state(self.device)
        try:
            expected = self.function()
        except torch.OutOfMemoryError:
            self.refusal = "the recording leaves no memory to compare it with the plain call"
        if self.refusal:
            del candidate  # and its memory
            return self.function()
        set_random_state(numbers, self.device)  # so that dropout drops the same
        found = candidate()
        if not alike(found, expected):
            self.refusal = "the recording gave other values than the plain call"
            return expected
        self._replay = candidate
        return found


def alike(found: Outputs, expected: Outputs) -> bool:
    """Whether losses and gradients are finite and those of the plain call, each as `near` has it among its kind."""
    return all(near(*pair) for pair in zip(found, expected, strict=True))


def near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors of one kind are finite, each within TOLERANCE of its norm (or of FLOOR of the largest norm)."""
    norms = torch.stack([tensor.float().norm() for tensor in expected])
    distances = torch.stack([(a.float() - b.float()).norm() for a, b in zip(found, expected, strict=True)])
    close = distances <= TOLERANCE * norms.clamp_min(FLOOR * float(norms.max()))
    return bool((close & norms.isfinite()).all())


def laid_out_as(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients in the memory layout of their parameters, as fused optimisers need it and `backward` makes it."""
    return tuple(
        gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    )


# What asks the GPU. Tests on a CPU put others in their place.


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream beside the usual one: each that is used keeps memory of its own."""
    return torch.cuda.Stream(device)


def beside(function: Function, device: torch.device) -> Outputs:
    """`function()` on the side stream, as libraries want it before a recording, in order with all other work."""
    stream, current = side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            return function()
    finally:
        current.wait_stream(stream)


def without_waiting(function: Function, device: torch.device) -> Outputs:
    """`function()`. Raises RuntimeError where it makes the host wait: no graph holds that."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            return beside(function, device)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def capture(function: Function, device: torch.device) -> Function:
    """The CUDA graph of `function()`, as a function that replays it and returns its outputs, always the same memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=side_stream(device), capture_error_mode="thread_local"):
                outputs = function()
        except BaseException:
            torch.cuda.set_stream(current)  # a recording that fails leaves its own stream behind
            raise

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def random_state(device: torch.device) -> Tensor:
    """The state of the device's own generator of random numbers."""
    return torch.cuda.get_rng_state(device)


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Take the device's generator back to `state`."""
    torch.cuda.set_rng_state(state, device)
