import os
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch

from engine import threads as threads_module
from engine.threads import SECONDS_BETWEEN_LOOKS, Threads, measured_speeds, shared_threads

CPU = torch.device("cpu")


class Machine:
    """A clock, and how quick so many threads are on it; nothing is measured."""

    def __init__(self) -> None:
        self.now, self.looks = 0.0, 0
        self.speeds: dict[int, float] = {}

    def perf_counter(self) -> float:
        return self.now

    def measured_speeds(self, numbers: Sequence[int]) -> Mapping[int, float]:
        self.looks += 1
        torch.set_num_threads(numbers[-1])  # as the measuring leaves it
        return {number: self.speeds[number] for number in numbers}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    faked = Machine()
    monkeypatch.setattr(threads_module, "time", faked)
    monkeypatch.setattr(threads_module, "measured_speeds", faked.measured_speeds)
    return faked


@pytest.fixture(autouse=True)
def _four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_DYNAMIC", raising=False)
    usual = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(usual)


def test_they_become_fewer_on_a_busy_machine_and_more_again_on_an_idle_one(machine: Machine) -> None:
    threads = Threads(4)
    machine.speeds = {4: 1.0, 2: 3.0, 1: 2.0}
    assert threads.choose()
    assert torch.get_num_threads() == 2
    machine.now += SECONDS_BETWEEN_LOOKS
    machine.speeds = {4: 0.5, 2: 1.0, 1: 2.0}
    assert threads.choose()
    assert torch.get_num_threads() == 1
    machine.now += SECONDS_BETWEEN_LOOKS
    machine.speeds = {4: 4.0, 2: 2.0, 1: 1.0}
    assert threads.choose()
    assert torch.get_num_threads() == 4


def test_a_small_difference_changes_nothing(machine: Machine) -> None:
    machine.speeds = {4: 1.0, 2: 1.3, 1: 0.9}
    assert not Threads(4).choose()
    assert torch.get_num_threads() == 4


def test_a_look_is_taken_every_few_seconds(machine: Machine) -> None:
    machine.speeds = {4: 4.0, 2: 2.0, 1: 1.0}
    threads = Threads(4)
    for machine.now in (0.0, SECONDS_BETWEEN_LOOKS - 0.1, SECONDS_BETWEEN_LOOKS, 2 * SECONDS_BETWEEN_LOOKS - 0.1):
        threads.choose()
    assert machine.looks == 2


def test_after_the_context_there_are_as_many_as_before(machine: Machine) -> None:
    machine.speeds = {4: 1.0, 2: 1.0, 1: 4.0}
    with shared_threads(CPU) as threads:
        threads.choose()
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4


def test_what_goes_wrong_leaves_as_many_as_before() -> None:
    with pytest.raises(KeyboardInterrupt), shared_threads(CPU):
        raise_with_one_thread()
    assert torch.get_num_threads() == 4


def raise_with_one_thread() -> None:
    torch.set_num_threads(1)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("device", "dynamic"), [("cpu", "false"), ("cpu", "FALSE"), ("cuda", "true")])
def test_a_gpu_and_who_says_so_keep_their_number(
    device: str, dynamic: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "OMP_DYNAMIC", dynamic)
    with shared_threads(torch.device(device)) as threads:
        assert not threads.choose()
    assert machine.looks == 0


@pytest.mark.parametrize(("most", "numbers"), [(1, [1]), (2, [2, 1]), (6, [6, 3, 1]), (16, [16, 8, 4, 2, 1])])
def test_each_number_to_choose_from_is_half_of_the_one_before(most: int, numbers: list[int]) -> None:
    assert Threads(most).numbers == numbers


def test_speeds_are_those_of_each_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two threads are in each other's way, as beside other work; here the operation itself says how long."""
    clock = Machine()

    def slow_with_two(values: torch.Tensor, *, out: torch.Tensor) -> None:
        clock.now += 0.004 if torch.get_num_threads() == 2 else 0.001

    monkeypatch.setattr(threads_module, "time", clock)
    monkeypatch.setattr(threads_module.torch, "exp", slow_with_two)
    speeds = measured_speeds([2, 1])
    assert speeds[2] == pytest.approx(250)
    assert speeds[1] == pytest.approx(1000)


def test_the_speed_of_one_thread_is_that_of_its_work() -> None:
    speeds = measured_speeds([1])
    assert 100 < speeds[1] < 100_000  # 131,072 exponentials
