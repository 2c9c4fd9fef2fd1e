import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine import recording
from engine.recording import PLAIN_CALLS, Outputs, Recorded, alike, copied

GPU = torch.device("cuda", 0)  # named, never asked: what would ask it is replaced


class Doubling:
    """Twice what lies in its memory; counts how often it is called."""

    def __init__(self) -> None:
        self.memory = torch.ones(3)
        self.calls = 0

    def __call__(self) -> Outputs:
        self.calls += 1
        return (2 * self.memory,)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the GPU: a graph is the function's arithmetic without its Python. Returns what was asked of it."""
    asked: list[str] = []

    def beside(function: Callable[[], Outputs], device: torch.device) -> Outputs:
        asked.append("beside")
        return function()

    def without_waiting(function: Callable[[], Outputs], device: torch.device) -> Outputs:
        asked.append("without waiting")
        return copied(function())

    def capture(function: Doubling, device: torch.device) -> Callable[[], Outputs]:
        asked.append("capture")

        def replay() -> Outputs:
            asked.append("replay")
            return (2 * function.memory,)

        return replay

    monkeypatch.setattr(recording, "beside", beside)
    monkeypatch.setattr(recording, "without_waiting", without_waiting)
    monkeypatch.setattr(recording, "capture", capture)
    return asked


@pytest.mark.parametrize(("device", "enabled"), [(torch.device("cpu"), True), (GPU, False)], ids=str)
def test_a_cpu_calls_the_function_and_so_does_who_wants_no_graphs(
    graphs: list[str], device: torch.device, enabled: bool
) -> None:
    function = Doubling()
    step = Recorded(function, device, enabled=enabled)
    for _ in range(PLAIN_CALLS + 3):
        step()
    assert (function.calls, step.status, graphs) == (PLAIN_CALLS + 3, "called", [])


def test_a_gpu_replays_after_its_first_calls_what_lies_in_the_memory_then(graphs: list[str]) -> None:
    function = Doubling()
    step = Recorded(function, GPU)
    for value in range(PLAIN_CALLS + 4):
        function.memory.fill_(value)
        (found,) = step()
        assert found.tolist() == [2 * value] * 3
    assert step.status == "replayed"
    assert function.calls == PLAIN_CALLS + 1  # and once as the measure of the recording
    assert graphs == ["beside"] * PLAIN_CALLS + ["without waiting", "capture", *["replay"] * 4]


def test_a_function_that_makes_the_host_wait_is_never_recorded(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(function: object, device: object) -> Outputs:
        raise RuntimeError("called a synchronizing CUDA operation\nat some line")

    monkeypatch.setattr(recording, "without_waiting", waits)
    function = Doubling()
    step = Recorded(function, GPU)
    outputs = [step()[0].tolist() for _ in range(PLAIN_CALLS + 3)]
    assert outputs == [[2, 2, 2]] * (PLAIN_CALLS + 3)
    assert step.status == "called: it cannot be recorded (called a synchronizing CUDA operation)"
    assert "capture" not in graphs
    assert function.calls == PLAIN_CALLS + 3


def test_a_recording_that_fails_leaves_the_plain_call(graphs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: object, device: object) -> Callable[[], Outputs]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recording, "capture", fails)
    step = Recorded(Doubling(), GPU)
    assert [step()[0].tolist() for _ in range(PLAIN_CALLS + 3)] == [[2, 2, 2]] * (PLAIN_CALLS + 3)
    assert "operation not permitted" in step.status


@pytest.mark.parametrize("wrong", [3.0, -1.0, 0.0, math.nan])
def test_a_recording_that_gives_other_values_is_not_used(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    monkeypatch.setattr(recording, "capture", lambda function, device: lambda: (wrong * function.memory,))
    function = Doubling()
    step = Recorded(function, GPU)
    assert [step()[0].tolist() for _ in range(PLAIN_CALLS + 3)] == [[2, 2, 2]] * (PLAIN_CALLS + 3)
    assert step.status == "called: the recording gave other values"


def test_another_error_of_the_function_is_not_hidden(graphs: list[str]) -> None:
    def fails() -> Outputs:
        raise ValueError("a fault of the student's")

    step = Recorded(fails, GPU)
    with pytest.raises(ValueError, match="a fault of the student's"):
        step()


def outputs(*values: list[float]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (outputs([1.0, 2.0], [3.0]), outputs([1.0, 2.0], [3.0]), True),
        (outputs([1.02, 2.0], [3.0]), outputs([1.0, 2.0], [3.0]), True),  # rounding
        (outputs([1.0, 2.0], [2.5]), outputs([1.0, 2.0], [3.0]), False),  # one of them alone
        (outputs([1e-7], [1.0]), outputs([-1e-7], [1.0]), True),  # a gradient of nothing
        (outputs([0.0], [0.0]), outputs([0.0], [0.0]), True),
        (outputs([1.0], [0.0]), outputs([0.0], [0.0]), False),
        (outputs([math.nan]), outputs([math.nan]), False),
        (outputs([1.0]), outputs([math.inf]), False),
    ],
)
def test_outputs_are_compared_by_their_norms(found: Outputs, expected: Outputs, same: bool) -> None:
    assert alike(found, expected) is same


def test_copies_keep_their_values() -> None:
    memory = torch.ones(2)
    (kept,) = copied((memory,))
    memory.fill_(5)
    assert kept.tolist() == [1, 1]
