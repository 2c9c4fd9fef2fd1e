"""How many threads PyTorch computes with on a CPU, where other work may hold some of the processors.

Every operation of a step waits for the slowest of its threads: beside another program that keeps two processors busy,
two threads take four times as long as one (docs/experiments.md).
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch

SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_TO_A_SECOND_LOOK = 0.5
LARGEST_SHARE = 0.01  # of the time that looks may take
TURNS, SECONDS_A_TURN = 5, 0.005
MUCH_QUICKER = 1.4  # that fewer threads must be: a change makes the run one that its seed does not repeat
QUICKER = 1.1  # that more of them must be
SMALLEST_SHARE = 32768  # values: PyTorch gives no thread fewer


class Threads:
    """PyTorch's threads: `most` of them, or fewer while that is quicker. With one there is nothing to choose.

    The number changes how sums are rounded. It is the whole process's, and stays when a loop that chose has ended.
    """

    def __init__(self, most: int) -> None:
        self.numbers = [most]  # to choose from: half as many each
        while self.numbers[-1] > 1:
            self.numbers.append(self.numbers[-1] // 2)
        self.place = 0  # in the numbers
        self.changed = False  # whether they were ever fewer
        self.suspected = False
        self.next_look = time.perf_counter()

    def choose(self) -> None:
        """Compare the present number with half and twice as many, if the last look is some seconds ago.

        Fewer are taken after two looks that say so: one may have met a moment.
        """
        started = time.perf_counter()
        if len(self.numbers) == 1 or started < self.next_look:
            return
        wanted = self._quickest()
        fewer = wanted > self.place
        if wanted < self.place or (fewer and self.suspected):
            self.place, self.changed = wanted, True
        self.suspected = fewer and not self.suspected
        torch.set_num_threads(self.numbers[self.place])
        now = time.perf_counter()
        pause = SECONDS_TO_A_SECOND_LOOK if self.suspected else SECONDS_BETWEEN_LOOKS
        self.next_look = now + max(pause, (now - started) / LARGEST_SHARE)

    def _quickest(self) -> int:
        """The place of the number to take now."""
        first = max(0, self.place - 1)
        speeds = measured_speeds(self.numbers[first : self.place + 2])
        now = speeds[self.numbers[self.place]]
        best = self.numbers.index(max(speeds, key=lambda number: speeds[number]))
        enough = QUICKER if best < self.place else MUCH_QUICKER
        return best if speeds[self.numbers[best]] > enough * now else self.place


def measured_speeds(numbers: Sequence[int]) -> Mapping[int, float]:
    """How often a second each number of threads gets a short operation done, with two threads one of 0.1 ms.

    The median of turns; each number has one after another, since what else runs comes and goes. Leaves the last number.
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
