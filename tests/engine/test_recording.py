import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine import recording
from engine.errors import SSDKDError
from engine.recording import PLAIN_CALLS, Function, Outputs, Recorded, alike, laid_out_as

GPU = torch.device("cuda", 0)  # named, never asked: what would ask it is replaced


class Doubling:
    """Twice what lies in its memory; counts how often it is called."""

    def __init__(self) -> None:
        self.memory = torch.ones(3)
        self.calls = 0

    def __call__(self) -> Outputs:
        self.calls += 1
        return doubled(self.memory)


def doubled(memory: Tensor) -> Outputs:
    return Outputs((memory.sum(),), (2 * memory,))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the GPU: a graph is the function's arithmetic without its Python. Returns what was asked of it."""
    asked: list[str] = []

    def called(name: str) -> Callable[[Function, torch.device], Outputs]:
        def run(function: Function, device: torch.device) -> Outputs:
            asked.append(name)
            return function()

        return run

    def capture(function: Doubling, device: torch.device) -> Function:
        asked.append("capture")

        def replay() -> Outputs:
            asked.append("replay")
            return doubled(function.memory)

        return replay

    monkeypatch.setattr(recording, "beside", called("beside"))
    monkeypatch.setattr(recording, "without_waiting", called("without waiting"))
    monkeypatch.setattr(recording, "capture", capture)
    monkeypatch.setattr(recording, "random_state", lambda device: asked.append("keep the random state"))
    monkeypatch.setattr(recording, "set_random_state", lambda state, device: asked.append("take it back"))
    return asked


def calls(step: Recorded, function: Doubling, number: int = PLAIN_CALLS + 4) -> None:
    """Call the step on batch after batch; each time its outputs must be those of the batch."""
    for value in range(1, number + 1):
        function.memory.fill_(value)
        assert step().gradients[0].tolist() == [2 * value] * 3, value


def test_without_graphs_the_function_is_called(graphs: list[str]) -> None:
    function = Doubling()
    step = Recorded(function, GPU, enabled=False)
    calls(step, function)
    assert (function.calls, step.replays, step.refusal, graphs) == (PLAIN_CALLS + 4, False, None, [])


def test_a_gpu_replays_after_its_first_calls_what_lies_in_the_memory_then(graphs: list[str]) -> None:
    function = Doubling()
    step = Recorded(function, GPU, enabled=True)
    calls(step, function)
    assert step.replays
    assert function.calls == PLAIN_CALLS + 2  # the recording is compared on the batch after its own
    recorded = ["without waiting", "capture", "keep the random state", "take it back", "replay"]
    assert graphs == ["beside"] * PLAIN_CALLS + recorded + ["replay"] * 2


def failing(kind: type[Exception], message: str) -> Callable[[object, object], Outputs]:
    def fail(function: object, device: object) -> Outputs:
        raise kind(message)

    return fail


def test_a_function_that_makes_the_host_wait_is_never_recorded(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "without_waiting", failing(RuntimeError, "a synchronizing operation\nat some line"))
    function = Doubling()
    step = Recorded(function, GPU, enabled=True)
    calls(step, function)
    assert step.refusal == "it cannot be recorded: a synchronizing operation"
    assert not step.replays
    assert "capture" not in graphs
    assert function.calls == PLAIN_CALLS + 4


def test_a_recording_that_fails_leaves_the_plain_call(graphs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "TIDIES_UP", True)
    monkeypatch.setattr(recording, "capture", failing(RuntimeError, ""))
    function = Doubling()
    step = Recorded(function, GPU, enabled=True)
    calls(step, function)
    assert step.refusal == "the recording failed: RuntimeError"
    assert function.calls == PLAIN_CALLS + 4


def test_where_pytorch_cannot_go_on_after_that_the_run_stops_and_says_what_to_type(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "TIDIES_UP", False)
    monkeypatch.setattr(recording, "capture", failing(RuntimeError, "not permitted when stream is capturing"))
    function = Doubling()
    step = Recorded(function, GPU, enabled=True)
    calls(step, function, PLAIN_CALLS)
    with pytest.raises(SSDKDError, match="not permitted when stream is capturing") as caught:
        step()
    assert "cuda_graphs = false" in caught.value.hint


def test_a_recording_that_leaves_no_memory_for_the_plain_call_is_not_used(graphs: list[str]) -> None:
    function = Doubling()
    step = Recorded(function, GPU, enabled=True)
    calls(step, function, PLAIN_CALLS + 1)
    assert graphs[-1] == "capture"
    replay = weakref.ref(step._candidate)

    def without_memory() -> Outputs:
        if replay() is not None:
            raise torch.OutOfMemoryError
        return function()

    step.function = without_memory
    calls(step, function)
    assert step.refusal == "the recording leaves no memory to compare it with the plain call"
    assert not step.replays


@pytest.mark.parametrize("wrong", [3.0, -1.0, 0.0, math.nan])
def test_a_recording_that_gives_other_values_is_not_used(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    def capture(function: Doubling, device: torch.device) -> Function:
        return lambda: Outputs((function.memory.sum(),), (wrong * function.memory,))

    monkeypatch.setattr(recording, "capture", capture)
    function = Doubling()
    step = Recorded(function, GPU, enabled=True)
    calls(step, function)
    assert step.refusal == "the recording gave other values than the plain call"


def test_a_recording_that_keeps_the_batch_it_was_made_of_is_not_used(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(function: Doubling, device: torch.device) -> Function:
        kept = doubled(function.memory.clone())
        return lambda: kept

    monkeypatch.setattr(recording, "capture", capture)
    function = Doubling()
    step = Recorded(function, GPU, enabled=True)
    calls(step, function)
    assert step.refusal


@pytest.mark.parametrize("kind", [ValueError, torch.OutOfMemoryError])
@pytest.mark.parametrize("where", ["beside", "without_waiting"])
def test_another_error_of_the_function_is_not_hidden(
    graphs: list[str], monkeypatch: pytest.MonkeyPatch, where: str, kind: type[Exception]
) -> None:
    monkeypatch.setattr(recording, where, failing(kind, "a fault of the student's"))
    step = Recorded(Doubling(), GPU, enabled=True)
    for _ in range(PLAIN_CALLS if where == "without_waiting" else 0):
        step()
    with pytest.raises(kind, match="a fault of the student's"):
        step()


def tensors(*values: list[float]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (tensors([1.0, 2.0], [3.0]), tensors([1.0, 2.0], [3.0]), True),
        (tensors([1.02, 2.0], [3.0]), tensors([1.0, 2.0], [3.0]), True),  # rounding
        (tensors([1.0, 2.0], [2.5]), tensors([1.0, 2.0], [3.0]), False),  # one of them alone
        (tensors([1e-7], [1.0]), tensors([-1e-7], [1.0]), True),  # a gradient of nothing
        (tensors([0.0], [0.0]), tensors([0.0], [0.0]), True),
        (tensors([1.0], [0.0]), tensors([0.0], [0.0]), False),
        (tensors([math.nan]), tensors([math.nan]), False),
        (tensors([1.0]), tensors([math.inf]), False),
    ],
)
def test_tensors_are_compared_by_their_norms(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], same: bool
) -> None:
    one = tensors([1.0])
    assert alike(Outputs(found, one), Outputs(expected, one)) is same
    assert alike(Outputs(one, found), Outputs(one, expected)) is same


def test_large_losses_do_not_hide_wrong_gradients() -> None:
    losses = tensors([1000.0])
    assert not alike(Outputs(losses, tensors([0.0])), Outputs(losses, tensors([0.1])))


def test_gradients_get_the_layout_of_their_parameters() -> None:
    parameter = torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    gradient, fitting = torch.randn(4, 3, 2, 2), torch.randn_like(parameter)
    laid_out, same = laid_out_as([parameter, parameter], [gradient, fitting])
    assert laid_out.stride() == parameter.stride() != gradient.stride()
    assert torch.equal(laid_out, gradient)
    assert same is fitting
