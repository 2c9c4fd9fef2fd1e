"""A computation that a GPU records once and then repeats by itself.

A step of a small network is hundreds of short kernels, and the host takes longer to launch them than the GPU to run
them. As a CUDA graph they are one launch. A recording counts only if it gives what the plain call gives; else the plain
call stays, and `status` says why.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]

PLAIN_CALLS = 3  # before the recording: libraries choose their kernels and allocate in their first calls
TOLERANCE = 0.05  # of an output's norm: half precision and sums in any order are far below, other inputs far above
FLOOR = 0.01  # of the largest norm: what is smaller is rounding (a bias before a BatchNorm has a gradient of nothing)


class Recorded:
    """`function()`, called as it is on a CPU, replayed as a CUDA graph on a GPU after its first calls.

    The function takes no arguments. It reads tensors whose memory stays where it is, never makes the host wait, and may
    change nothing but BatchNorm statistics (which see one batch twice, when the recording is tried). What it returns is
    overwritten by the next call.
    """

    def __init__(self, function: Callable[[], Outputs], device: torch.device, *, enabled: bool = True) -> None:
        """`enabled` off: a GPU calls the function as it is, too."""
        self.function = function
        self.device = device
        self.status = "to be recorded" if enabled and device.type == "cuda" else "called"
        self.calls = 0
        self._replay: Callable[[], Outputs] | None = None

    def __call__(self) -> Outputs:
        """The function's outputs, of what lies in its memory now."""
        if self._replay is not None:
            return self._replay()
        self.calls += 1
        if self.status != "to be recorded":
            return self.function()
        if self.calls <= PLAIN_CALLS:
            return beside(self.function, self.device)
        return self._record()

    def _record(self) -> Outputs:
        try:
            expected = without_waiting(self.function, self.device)
            replay = capture(self.function, self.device)
            found = replay()
        except RuntimeError as error:  # a student of the user's may read a value, or allocate what no graph can
            self.status = f"called: it cannot be recorded ({str(error).splitlines()[0]})"
            return self.function()
        if not alike(found, expected):
            self.status = "called: the recording gave other values"
            return expected
        self.status, self._replay = "replayed", replay
        return found


def alike(found: Outputs, expected: Outputs) -> bool:
    """Whether each output is finite and that of the plain call, within TOLERANCE of its norm."""
    norms = torch.stack([tensor.float().norm() for tensor in expected])
    distances = torch.stack([(a.float() - b.float()).norm() for a, b in zip(found, expected, strict=True)])
    near = distances <= TOLERANCE * norms.clamp_min(FLOOR * float(norms.max()))
    return bool((near & norms.isfinite()).all())


def copied(outputs: Outputs) -> Outputs:
    """The outputs in memory of their own."""
    return tuple(tensor.clone() for tensor in outputs)


def beside(function: Callable[[], Outputs], device: torch.device) -> Outputs:
    """`function()` on a stream of its own, as libraries want it before a recording, in order with all other work."""
    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        outputs = function()
    current.wait_stream(stream)
    return outputs


def without_waiting(function: Callable[[], Outputs], device: torch.device) -> Outputs:
    """Copies of `function()`'s outputs. Raises RuntimeError where it makes the host wait: no graph holds that."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            return copied(beside(function, device))
        finally:
            torch.cuda.set_sync_debug_mode(before)


def capture(function: Callable[[], Outputs], device: torch.device) -> Callable[[], Outputs]:
    """The CUDA graph of `function()`, as a function that replays it and returns its outputs, always the same memory."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function()
    finally:
        torch.cuda.set_stream(current)  # a recording that fails leaves its own stream behind

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay
