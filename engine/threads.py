"""How many threads PyTorch computes with on a CPU, where other work may hold some of the processors.

Every operation of a step waits for the slowest of its threads. Beside another program that keeps two processors busy,
two threads take four times as long as one (docs/experiments.md).
"""

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

SECONDS_BETWEEN_LOOKS = 5.0  # a look takes a hundredth of that
TURNS, SECONDS_A_TURN = 5, 0.005
MUCH_QUICKER = 1.4  # than with as many threads as now
SMALLEST_SHARE = 32768  # values: PyTorch gives no thread fewer


class Threads:
    """PyTorch's threads: `most` of them, or fewer while that is quicker."""

    def __init__(self, most: int) -> None:
        self.numbers = [most]  # to choose from: half as many each
        while self.numbers[-1] > 1:
            self.numbers.append(self.numbers[-1] // 2)
        self.next_look = time.perf_counter()

    def choose(self) -> bool:
        """Take as many threads as get on best, if the last look is some seconds ago; returns whether that changed."""
        if len(self.numbers) == 1 or time.perf_counter() < self.next_look:
            return False
        now = torch.get_num_threads()
        speeds = measured_speeds(self.numbers)
        best = max(speeds, key=lambda number: speeds[number])
        chosen = best if speeds[best] > MUCH_QUICKER * speeds[now] else now
        torch.set_num_threads(chosen)
        self.next_look = time.perf_counter() + SECONDS_BETWEEN_LOOKS
        return chosen != now


@contextlib.contextmanager
def shared_threads(device: torch.device) -> Iterator[Threads]:
    """Threads to choose within the context; after it there are as many as before it.

    There is nothing to choose on a GPU, or where the environment says OMP_DYNAMIC=false: the number of threads changes
    how sums are rounded, and so what a seed gives.
    """
    most = torch.get_num_threads()
    fixed = device.type != "cpu" or os.environ.get("OMP_DYNAMIC", "").lower() == "false"
    try:
        yield Threads(1 if fixed else most)
    finally:
        torch.set_num_threads(most)


def measured_speeds(numbers: Sequence[int]) -> Mapping[int, float]:
    """How often a second each number of threads gets an operation of a few tenths of a millisecond done.

    The median of turns; each number has one after another, since what else runs comes and goes.
    """
    values = torch.zeros(4 * max(numbers) * SMALLEST_SHARE)
    out = torch.empty_like(values)
    speeds: dict[int, list[float]] = {number: [] for number in numbers}
    for _ in range(TURNS):
        for number in numbers:
            torch.set_num_threads(number)
            torch.exp(values, out=out)  # new threads begin here
            done, started = 0, time.perf_counter()
            while (seconds := time.perf_counter() - started) < SECONDS_A_TURN:
                torch.exp(values, out=out)
                done += 1
            speeds[number].append(done / seconds)
    return {number: statistics.median(of_turns) for number, of_turns in speeds.items()}
