from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch

from engine import threads as threads_module
from engine.threads import SECONDS_BETWEEN_LOOKS, SECONDS_TO_A_SECOND_LOOK, Threads, measured_speeds


class Machine:
    """A clock, and how quick so many threads are; nothing is measured. A look takes a hundredth of a second."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looks: list[Sequence[int]] = []
        self.speeds: dict[int, float] = {}
        self.seconds_a_look = 0.01

    def perf_counter(self) -> float:
        return self.now

    def measured_speeds(self, numbers: Sequence[int]) -> Mapping[int, float]:
        self.looks.append(numbers)
        self.now += self.seconds_a_look
        torch.set_num_threads(numbers[-1])  # as the measuring leaves it
        return {number: self.speeds[number] for number in numbers}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    faked = Machine()
    monkeypatch.setattr(threads_module, "time", faked)
    monkeypatch.setattr(threads_module, "measured_speeds", faked.measured_speeds)
    return faked


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(usual)


def numbers_taken(threads: Threads, machine: Machine, speeds: dict[int, float], *, looks: int) -> list[int]:
    """The number of threads after each of so many looks."""
    machine.speeds = speeds
    found = []
    for _ in range(looks):
        machine.now = max(machine.now, threads.next_look)
        threads.choose()
        found.append(torch.get_num_threads())
    return found


def test_they_become_fewer_on_a_busy_machine_and_more_again_on_an_idle_one(machine: Machine) -> None:
    threads = Threads(4)
    assert numbers_taken(threads, machine, {4: 1.0, 2: 3.0, 1: 6.0}, looks=5) == [4, 2, 2, 1, 1]
    assert threads.changed
    assert numbers_taken(threads, machine, {4: 1.3, 2: 1.2, 1: 1.0}, looks=3) == [2, 2, 2]
    assert numbers_taken(threads, machine, {4: 4.0, 2: 2.0, 1: 1.0}, looks=2) == [4, 4]


def test_a_number_is_compared_with_its_half_and_its_double(machine: Machine) -> None:
    threads = Threads(4)
    numbers_taken(threads, machine, {4: 1.0, 2: 3.0, 1: 6.0}, looks=5)
    assert machine.looks == [[4, 2], [4, 2], [4, 2, 1], [4, 2, 1], [2, 1]]


def test_a_small_difference_changes_nothing(machine: Machine) -> None:
    threads = Threads(4)
    assert numbers_taken(threads, machine, {4: 1.0, 2: 1.3, 1: 0.9}, looks=3) == [4, 4, 4]
    assert not threads.changed


def test_one_busy_moment_changes_nothing(machine: Machine) -> None:
    threads = Threads(4)
    busy, idle = {4: 1.0, 2: 3.0, 1: 2.0}, {4: 4.0, 2: 2.0, 1: 1.0}
    for speeds in (busy, idle, busy, idle):
        assert numbers_taken(threads, machine, speeds, looks=1) == [4]
    assert not threads.changed


def test_looks_wait_for_each_other(machine: Machine) -> None:
    threads = Threads(4)

    def looks_at(now: float) -> int:
        machine.now = now
        threads.choose()
        return len(machine.looks)

    machine.speeds = {4: 4.0, 2: 2.0, 1: 1.0}
    assert [looks_at(now) for now in (0.0, SECONDS_BETWEEN_LOOKS, 0.02 + SECONDS_BETWEEN_LOOKS)] == [1, 1, 2]
    machine.seconds_a_look = SECONDS_BETWEEN_LOOKS  # of a machine with many processors
    assert [looks_at(now) for now in (20.0, 500.0, 526.0)] == [3, 3, 4]


def test_a_suspicion_is_looked_into_soon(machine: Machine) -> None:
    threads = Threads(4)
    machine.seconds_a_look = 0.001
    numbers_taken(threads, machine, {4: 1.0, 2: 3.0, 1: 2.0}, looks=1)
    assert threads.next_look == pytest.approx(machine.now + SECONDS_TO_A_SECOND_LOOK)


def test_who_sets_the_number_between_two_looks_does_no_harm(machine: Machine) -> None:
    threads = Threads(4)
    torch.set_num_threads(3)
    assert numbers_taken(threads, machine, {4: 4.0, 2: 2.0, 1: 1.0}, looks=1) == [4]


def test_with_one_thread_there_is_nothing_to_choose(machine: Machine) -> None:
    threads = Threads(1)
    threads.choose()
    assert machine.looks == []
    assert torch.get_num_threads() == 4


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
