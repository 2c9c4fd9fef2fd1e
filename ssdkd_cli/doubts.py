"""What the user should know though nothing failed: sentences, each from the values that it is about."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import nn

from engine.distill import class_histogram
from engine.inspection import count_flops, count_parameters
from engine.state import State, recordings
from engine.teacher import Teacher
from engine.threads import Threads
from ssdkd_cli.timing import TEACHER, Timing
from ssdkd_cli.words import SAME, count, duration, is_near_chance, milliseconds, percent, times

BUSY = 3  # times the median that one call of ten takes: other work held the processor
CROWDED = (
    "other work on this machine made this run take fewer threads for a while: the same seed may not give the same "
    "result again; OMP_DYNAMIC=false in the environment keeps their number, and is slower beside other work"
)
NOT_REPEATABLE = "the time limit hurried the run: the same seed does not give the same student again"
SAMPLES_A_CLASS = 5  # with fewer on average, the counts of classes say nothing
UNBALANCED = 10  # times as many samples in the largest class as in the smallest
LEAST_KEPT = 2 / 3  # of the teacher's own way from chance; chosen by us: half let 61 % pass, of three classes
TOO_LITTLE = "it has learned too little; take a larger --student, or a larger --effort or --time-limit than it had"


def size_warnings(student: nn.Module, teacher: Teacher) -> list[str]:
    """A sentence on a student that has more parameters or FLOPs than the teacher."""
    spec = teacher.spec
    flops = (count_flops(network, spec.input_shape) for network in (teacher.module, student))
    export = shlex.join(["ssdkd", "export", spec.path, "--precision", "int8", *spec.flags])
    sizes = {"parameters": (spec.parameters, count_parameters(student)), "FLOPs": tuple(flops)}
    more = [
        f"more {name} than the teacher, {count(of_student)} against {count(of_teacher)}"
        for name, (of_teacher, of_student) in sizes.items()
        if of_student > of_teacher
    ]
    advice = f"take a smaller one, or make the teacher's own file smaller with `{export}`"
    return [f"the student has {', and '.join(more)}: {advice}"] if more else []


def run_warnings(state: State) -> list[str]:
    """What the user must know of a distillation that went through."""
    slow = [
        f"{name} is slower than it could be on this GPU, its steps are launched kernel by kernel: {step.refusal}"
        for name, step in recordings(state).items()
        if step.refusal
    ]
    done, planned = state.round, state.settings.rounds
    all_rounds = duration(state.seconds * planned / done) if done < planned else ""
    cut_short = (
        f"distilling ended at its time limit after {done} of {planned} rounds, which take about {all_rounds} here: a "
        "longer --time-limit makes a better student"
    )
    return [
        *prior_warnings(class_histogram(state)),
        *([cut_short] if all_rounds else []),
        *([NOT_REPEATABLE] if state.hurried else []),
        *slow,
    ]


def prior_warnings(histogram: Sequence[int]) -> list[str]:
    """Sentences on samples that leave classes out or prefer some; `histogram`: how many there are of each class."""
    if sum(histogram) < SAMPLES_A_CLASS * len(histogram):
        return []
    missing = sum(number == 0 for number in histogram)
    if missing:
        return [
            f"{missing} of {len(histogram)} classes are in none of the synthetic samples: the teacher's prior has "
            "collapsed there, and the student learns little of these classes"
        ]
    if max(histogram) > UNBALANCED * min(histogram):
        return [
            f"the synthetic samples are unbalanced: {max(histogram):,} of the largest class, {min(histogram):,} of the "
            "smallest; expect the student to be weak on rare ones"
        ]
    return []


def learning_warnings(accuracy: float | None, agreement: float, classes: int, *, of_teacher: float | None) -> list[str]:
    """A sentence on a run's student that learned too little: its agreement says so where labels tell nothing.

    All are percent; `of_teacher`: its accuracy.
    """
    if of_teacher is None or is_near_chance(of_teacher, classes):
        return agreement_warnings(agreement, classes)
    return student_warnings(accuracy, classes, of_teacher=of_teacher, is_run=True)


def student_warnings(accuracy: float | None, classes: int, *, of_teacher: float | None, is_run: bool) -> list[str]:
    """A sentence on a student's accuracy (percent) that is far below its teacher's on the same images.

    The images cannot be to blame there. Where the teacher's accuracy is not known, or near chance itself, they may be.
    `is_run`: as `chance_warnings` takes it.
    """
    if of_teacher is None or is_near_chance(of_teacher, classes):
        asked = "were, and its" if is_run else "are, and it is a student whose"
        blamed = f"If they {asked} teacher does better on these images, it has learned too little"
        return [f"{warning} {blamed}" for warning in chance_warnings(accuracy, classes, is_run=is_run)]
    chance = 100 / classes
    if accuracy is None or accuracy > chance + LEAST_KEPT * (of_teacher - chance):
        return []
    return [
        f"the student has {percent(accuracy)} accuracy, its teacher {percent(of_teacher)} on the same images, chance "
        f"is {percent(chance)}: {TOO_LITTLE}"
    ]


def agreement_warnings(agreement: float, classes: int) -> list[str]:
    """A sentence on a student that agrees with its teacher (percent, of held-out samples) too seldom to be used."""
    chance = 100 / classes
    if agreement > chance + LEAST_KEPT * (100 - chance):
        return []
    return [f"the student agrees with its teacher on {percent(agreement)} of held-out samples: {TOO_LITTLE}"]


def chance_warnings(accuracy: float | None, classes: int, *, is_run: bool) -> list[str]:
    """A sentence on an accuracy (percent) that is too near chance to be that of a trained network.

    `is_run`: of a run's student, whose preprocessing is its teacher's, as that was read then.
    """
    if accuracy is None or not is_near_chance(accuracy, classes):
        return []
    chance = percent(100 / classes)
    those = "were --mean, --std and --input of `ssdkd compress`" if is_run else "are --mean, --std and --input"
    return [
        f"{percent(accuracy)} accuracy is far below what a trained network reaches, chance is {chance}: are "
        "the labels in the order of the network's classes (folders are numbered alphabetically, unless --classes FILE "
        f"names the classes), and {those} those of the training?"
    ]


def busy_warnings(timings: Mapping[str, Timing], model: Path) -> list[str]:
    """One sentence where calls of the same network differ too much to be the network's; `model`: what to time again.

    That is its files: the teacher is timed by `ssdkd compress` alone.
    """
    latencies = {name: timing.latency_ms for name, timing in timings.items()}
    busy = {name: latency for name, latency in latencies.items() if latency.p90 > BUSY * latency.p50}
    if not busy:
        return []
    calls = (f"{milliseconds(of.p50)} and one of ten {milliseconds(of.p90)} ({name})" for name, of in busy.items())
    again = f"; time them again with `ssdkd bench {model}`" if set(busy) - {TEACHER} else ""
    return [f"the machine was busy during the timing: half of the calls took {', '.join(calls)}{again}"]


def slower_warnings(timings: Mapping[str, Timing], float32: str, *, spared: Collection[str] = ()) -> list[str]:
    """A sentence on each file that takes longer for one image than the file called `float32`, if that was timed.

    Of the files in `spared` nothing is said.
    """
    if float32 not in timings:
        return []
    taken = {name: timing.latency_ms.p50 for name, timing in timings.items()}
    fastest = min(taken, key=taken.__getitem__)
    return [
        f"{name} takes {times(ms, taken[float32])} as long as {float32} for one image on this machine; "
        f"the fastest here is {fastest}"
        for name, ms in taken.items()
        if ms > SAME * taken[float32] and name not in spared
    ]


def crowded_warnings(threads: Threads) -> list[str]:
    """A sentence where other work on the machine made a run compute with fewer threads for a while."""
    return [CROWDED] if threads.changed else []
