"""All that a distillation is between its rounds, and how it begins."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from engine import replay
from engine.config import DistillationSettings
from engine.device import Compute
from engine.images import Normalization
from engine.inversion import Inverter, new_inverter
from engine.recording import Recorded
from engine.replay import ReplayBuffer
from engine.source import Source
from engine.stages import Stages, stages_of
from engine.task import Classification
from engine.teaching import Batch, empty_batch, loss_and_gradients, new_optimizer


@dataclass
class State:
    """All that a run is: what it was given, what it has learned, where it stands."""

    teacher: nn.Module
    student: nn.Module
    inherited: frozenset[str]  # names of the student's parameters that began as the teacher's
    stages: Stages  # the teacher that looks on, and where its maps are taught, if anywhere
    average: nn.Module  # the weight average of the student: the one that is kept
    optimizer: torch.optim.Optimizer
    batch: Batch  # what the student is shown now
    gradients: Mapping[bool, Recorded]  # whether the teacher looks on -> what `loss_and_gradients` gives
    inverter: Inverter
    buffer: ReplayBuffer
    held_out: ReplayBuffer  # the newest samples that the student never learns from
    task: Classification
    normalization: Normalization
    settings: DistillationSettings
    compute: Compute
    rng: torch.Generator
    round: int = 0
    steps: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    hurried: bool = False  # the clock was ahead of the rounds once: the same seed may give another student


def start(
    source: Source,
    student: nn.Module,
    *,
    settings: DistillationSettings,
    compute: Compute,
    seed: int,
    inherited: frozenset[str] = frozenset(),
) -> State:
    """The state before the first round, whose clock has counted what it took to get there.

    Moves both networks to the device and freezes the teacher.

    `inherited` names the student's parameters that begin as the teacher's: they learn at a rate of their own.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)  # the generator's initial weights and the student's dropout, if it has any
    torch.set_float32_matmul_precision("highest")  # the regressors need it, and a user's code may have asked for less
    device, task, image_shape = compute.device, source.task, source.image_shape
    teacher = source.network
    teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    student.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    inverter = new_inverter(source, student, settings=settings, compute=compute)
    capacity = settings.samples if settings.replay else settings.rounds * settings.inversion_batch
    stages = Stages(teacher, ())
    if settings.feature_weight:
        stages = stages_of(student, teacher, image_shape, batch=settings.student_batch)
    empty = partial(replay.empty_buffer, image_shape=image_shape, classes=task.classes, device=device)
    buffer, batch = empty(capacity, views=settings.views), empty_batch(settings.student_batch, image_shape[0], device)
    step = partial(
        loss_and_gradients,
        student,
        batch,
        buffer,
        task=task,
        normalization=inverter.problem.normalization,
        alters=settings.alter,
        temperature=settings.temperature,
        compute=compute,
    )
    recorded = partial(Recorded, device=device, enabled=settings.cuda_graphs and compute.has_graphs)
    return State(
        teacher=teacher,
        student=student,
        inherited=inherited,
        stages=stages,
        average=copy.deepcopy(student).eval().requires_grad_(False),
        optimizer=new_optimizer(student, inherited, settings),
        batch=batch,
        gradients={
            True: recorded(partial(step, stages=stages)),
            False: recorded(partial(step, stages=None)),
        },
        inverter=inverter,
        buffer=buffer,
        held_out=empty(settings.held_out, views=1),
        task=task,
        normalization=inverter.problem.normalization,
        settings=settings,
        compute=compute,
        rng=torch.Generator(device).manual_seed(seed),
        seconds=time.perf_counter() - started,
    )


def looks_on(state: State, progress: float) -> bool:
    """Whether the teacher looks at what the student is shown at each step: in the first part of a run, or all of it
    (`looking_share`), for its maps and for altered images.
    """
    settings = state.settings
    return (settings.alter or bool(state.stages.pairs)) and progress < settings.looking_share


def recordings(state: State) -> dict[str, Recorded]:
    """Each step of the run that a GPU can record, by name."""
    inner, gradients, looks = state.inverter.inner_step, state.gradients, looks_on(state, 0.0)
    steps = {"inversion in the warm-up": inner[False], "inversion": inner[True]}
    if not looks or state.settings.looking_share < 1:
        steps["teaching"] = gradients[False]
    if looks:
        steps["teaching while the teacher looks on"] = gradients[True]
    return steps
