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

    def __str__(self) -> str:
        if not self.points:
            return "as much agreement with the teacher as in float32"
        way = "less" if self.points > 0 else "more"
        return f"{abs(self.points):.2f} points {way} agreement with the teacher than in float32"


NOTHING = Loss()


def loss_of(subject: Subject, predicted: NDArray[np.int64]) -> Loss:
    """What a file loses that predicts these classes [M] of the held-out samples."""
    teachers, number = subject.samples.held_out_logits.argmax(1), len(predicted)
    lost = int(((subject.predicted == teachers) & (predicted != teachers)).sum())
    gained = int(((subject.predicted != teachers) & (predicted == teachers)).sum())
    return Loss(100 * (lost - gained) / number, 100 * Z_95 * math.sqrt(lost + gained) / number)


def loses_too_much(loss: Loss, allowed: float) -> bool:
    """Whether the lower bound of what is lost is above the points `allowed`: few samples blame a file for no less."""
    return loss.points - loss.margin > allowed


def is_in_doubt(loss: Loss, allowed: float) -> bool:
    """Whether more is lost than the points `allowed`, and chance may have done it."""
    return loss.points > allowed and not loses_too_much(loss, allowed)


def most_lost(samples: int) -> float:
    """Points that may be lost: MOST_LOST, or one sample where so few samples cannot show half a point.

    Never more than the proof of the file allows: what it would reject is to be remedied first.
    """
    return min(max(MOST_LOST, 100 / samples), 100 - LIMITS["int8"].min_agreement)
