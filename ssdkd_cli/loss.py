"""What an INT8 file loses: points of agreement with the teacher; how many may be lost, and what is due to chance."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporters.verify import LIMITS
from ssdkd_cli.subject import Subject

MOST_LOST = 0.5  # points of agreement with the teacher that an INT8 file may lose against the float student
FEWEST_SAMPLES = 100  # held out, that show what an INT8 file loses: of fewer, one is more than a point
Z_95 = 1.645  # standard deviations: 95 % of a normal distribution lie below


@dataclass(frozen=True)
class Loss:
    """Points of agreement with the teacher that a file loses against the float network, on held-out samples.

    `margin` is that of its lower bound, one-sided, 95 %: chance alone turns as many predictions right as wrong, so a
    net loss has the variance of all that turned (McNemar 1947; the normal approximation, coarse below ten of them).
    """

    points: float = 0.0
    margin: float = 0.0
    samples: int = 1

    def __str__(self) -> str:
        if not self.margin:
            return f"as much agreement with the teacher as in float32, of {self.samples} samples"
        way = "less" if self.points >= 0 else "more"
        points = f"{abs(self.points):.2f} ± {self.margin:.2f} points {way}"
        return f"{points} agreement with the teacher than in float32, of {self.samples} samples"

    @property
    def allowed(self) -> float:
        """Points that may be lost: MOST_LOST, or one sample where so few samples cannot show half a point.

        Never more than the proof of the file allows: what it would reject is to be remedied first.
        """
        return min(max(MOST_LOST, 100 / self.samples), 100 - LIMITS["int8"].min_agreement)

    @property
    def is_within(self) -> bool:
        """Whether no more is lost than may be."""
        return self.points <= self.allowed

    @property
    def is_in_doubt(self) -> bool:
        """Whether more is lost than may be, and chance may have done it: few samples blame a file for no less."""
        return self.allowed < self.points <= self.allowed + self.margin


NOTHING = Loss()


def loss_of(subject: Subject, predicted: NDArray[np.int64]) -> Loss:
    """What a file loses that predicts these classes [M] of the held-out samples."""
    teachers, number = subject.samples.held_out_logits.argmax(1), len(predicted)
    lost = int(((subject.predicted == teachers) & (predicted != teachers)).sum())
    gained = int(((subject.predicted != teachers) & (predicted == teachers)).sum())
    return Loss(100 * (lost - gained) / number, 100 * Z_95 * math.sqrt(lost + gained) / number, number)
