"""One distillation of ours: on a budget of seconds, looked at as it runs, or of rounds; the task and rivals are given.

The clock is the engine's own: it runs from its start to the last round and stands still while the student is scored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.names import OFF, OURS
from engine.config import DistillationSettings, settings_for
from engine.device import Compute, choose_device
from engine.distill import RoundMetrics, averaged_student, distill
from engine.inheritance import inherit
from engine.source import source_of
from engine.state import State, start
from engine.students import build_student
from engine.teacher import Teacher, load_teacher
from exporters.evaluate import LabelledImages, accuracy, load_labelled
from exporters.runtimes import predictor
from ssdkd_cli.compress import DEMO_DEFAULTS, DEMO_TEACHER

PLAIN = {"diversity": False, "difficulty": False, "priority": False, "replay": False}
AFRESH = {"inherit": False, "feature_weight": 0.0}
OWN: Mapping[str, Mapping[str, Any]] = {
    OURS: {},
    OFF: PLAIN,
    "logits alone": {"feature_weight": 0.0},
    "ssdkd afresh": AFRESH,
}


@dataclass(frozen=True)
class Task:
    """A teacher, the name of its student, and labelled images that only the score sees."""

    teacher_path: Path
    student: str
    test_images: Path
    samples: int = DistillationSettings.samples

    def teacher(self) -> Teacher:
        """The teacher, read anew: a run changes the modules that it is given."""
        return load_teacher(self.teacher_path)

    def labelled(self) -> LabelledImages:
        """The test images, at the teacher's size."""
        spec = self.teacher().spec
        return load_labelled(
            self.test_images, input_shape=spec.input_shape, classes=spec.classes, class_names=spec.class_names
        )


DEMO = Task(
    DEMO_TEACHER,
    str(DEMO_DEFAULTS["student"]),
    Path(str(DEMO_DEFAULTS["eval_data"])),
    int(str(DEMO_DEFAULTS["samples"])),
)


@dataclass(frozen=True)
class Point:
    """The student after so many seconds: its accuracy in percent of the test images."""

    seconds: float
    accuracy: float


def scorer(teacher: Teacher, labelled: LabelledImages) -> Callable[[nn.Module], float]:
    """Module in eval mode to percent."""
    preprocessing = teacher.spec.preprocessing

    def score(module: nn.Module) -> float:
        return accuracy(predictor(module), labelled, mean=preprocessing.mean, std=preprocessing.std)

    return score


def begin(student_name: str, teacher: Teacher, settings: DistillationSettings, *, seed: int, compute: Compute) -> State:
    """The engine's state before the first round, as `ssdkd compress` would make it."""
    student = build_student(student_name, teacher=teacher, seed=seed)
    inherited = inherit(student, teacher.module) if settings.inherit else frozenset()
    return start(source_of(teacher), student, settings=settings, compute=compute, seed=seed, inherited=inherited)


def run_own(
    task: Task,
    score: Callable[[nn.Module], float],
    *,
    seconds: float,
    every: float,
    seed: int,
    changed: Mapping[str, Any],
) -> tuple[list[Point], State]:
    """A run with the settings of `--effort full --time-limit SECONDS` and what is `changed`: curve and last state."""
    teacher = task.teacher()
    sized = {"samples": task.samples, **changed}
    settings = settings_for("full", image_shape=teacher.spec.input_shape, **sized)
    state = begin(task.student, teacher, settings, seed=seed, compute=choose_device("cpu"))
    points: list[Point] = []
    finished = False
    while not finished:
        finished = True
        for metrics in distill(state, time_limit_seconds=seconds):
            if metrics.seconds_left > 0 and metrics.seconds >= every * (len(points) + 1):
                finished = False
                break  # the clock stands still until the next round is asked for
        points.append(Point(state.seconds, score(averaged_student(state))))
    return points, state


def run_rounds(task: Task, *, rounds: int, seed: int, changed: Mapping[str, Any]) -> tuple[RoundMetrics, State]:
    """A run of so many rounds, in which a busy machine changes nothing but the seconds: last metrics and state."""
    teacher = task.teacher()
    sized = {"samples": task.samples, "rounds": rounds, **changed}
    settings = settings_for("full", image_shape=teacher.spec.input_shape, **sized)
    state = begin(task.student, teacher, settings, seed=seed, compute=choose_device("cpu"))
    for metrics in distill(state):
        last = metrics
    return last, state
