"""The loop of SSD-KD: invert a batch, remember it in place of the least useful samples, teach the student from memory.

Each round is one turn of invert -> remember -> teach. Nothing in it waits for the device but the metrics at its end.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import replay
from engine.config import DistillationSettings
from engine.device import Compute
from engine.errors import NonFiniteLossError
from engine.images import Normalization, normalization, random_views, render, to_input
from engine.inversion import InversionLosses, Inverter, invert, new_inverter
from engine.losses import BatchNormPrior, batchnorm_prior, modulation
from engine.replay import ReplayBuffer
from engine.task import Classification

RATE_RISE = 0.05  # the share of a run in which the learning rate rises
HELD_OUT_SHARE = 16  # one new image in this many is held out
MEASURED = 256  # of the newest held-out samples, each round: more would cost a tenth of it


@dataclass
class State:
    """All that a run is: what it was given, what it has learned, where it stands."""

    teacher: nn.Module
    student: nn.Module
    inherited: frozenset[str]  # names of the student's parameters that began as the teacher's
    average: nn.Module  # the weight average of the student: the one that is kept
    optimizer: torch.optim.Optimizer
    inverter: Inverter
    buffer: ReplayBuffer
    held_out: ReplayBuffer  # the newest samples that the student never learns from
    prior: BatchNormPrior | None
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


@dataclass(frozen=True)
class RoundMetrics:
    """What one round did; the losses of the inversion are those of its last step."""

    round: int  # from 1
    rounds: int
    phase: str  # "warm-up" (the buffer fills) or "distill"
    seconds: float  # since the start
    seconds_left: float
    inversion_loss: float
    prior_loss: float
    class_loss: float
    adversarial_loss: float
    distillation_loss: float  # mean of the round's steps; NaN in the warm-up
    agreement: float  # percent, of the averaged student with the teacher on held-out synthetic samples
    class_balance: float  # smallest over largest class count of the buffer
    images_per_second: float  # that the student saw, this round
    images_seen: int
    steps: int
    buffer_size: int


def start(
    teacher: nn.Module,
    student: nn.Module,
    *,
    task: Classification,
    image_shape: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batchnorm_layers: list[nn.Module],
    settings: DistillationSettings,
    compute: Compute,
    seed: int,
    inherited: frozenset[str] = frozenset(),
) -> State:
    """The state before the first round. Moves both networks to the device and freezes the teacher.

    `image_shape` is (C, H, W), `mean` and `std` one value a channel for pixels in 0...1, `batchnorm_layers` those of
    the teacher that serve as a prior (none: smooth, standardised images take their place), `inherited` the names of the
    student's parameters that begin as the teacher's: they learn at a rate of their own.
    """
    torch.manual_seed(seed)  # the generator's initial weights and the student's dropout, if it has any
    teacher.to(compute.device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    student.to(compute.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    capacity = settings.samples if settings.replay else settings.rounds * settings.inversion_batch
    return State(
        teacher=teacher,
        student=student,
        inherited=inherited,
        average=copy.deepcopy(student).eval().requires_grad_(False),
        optimizer=new_optimizer(student, inherited, settings),
        inverter=new_inverter(image_shape, settings, compute),
        buffer=replay.empty_buffer(
            capacity, image_shape, views=settings.views, classes=task.classes, device=compute.device
        ),
        held_out=replay.empty_buffer(
            settings.held_out, image_shape, views=1, classes=task.classes, device=compute.device
        ),
        prior=batchnorm_prior(batchnorm_layers) if batchnorm_layers else None,
        task=task,
        normalization=normalization(mean, std, compute.device),
        settings=settings,
        compute=compute,
        rng=torch.Generator(compute.device).manual_seed(seed),
    )


def new_optimizer(
    student: nn.Module, inherited: frozenset[str], settings: DistillationSettings
) -> torch.optim.Optimizer:
    """SGD over two groups, new parameters and inherited ones; `initial_lr` of each is the peak of its rate."""
    old = [parameter for name, parameter in student.named_parameters() if name in inherited]
    new = [parameter for name, parameter in student.named_parameters() if name not in inherited]
    rates = ((new, settings.student_rate), (old, settings.inherited_rate))
    return torch.optim.SGD(
        [{"params": parameters, "initial_lr": rate} for parameters, rate in rates if parameters],
        lr=settings.student_rate,
        momentum=settings.student_momentum,
        weight_decay=settings.student_decay,
        nesterov=settings.student_momentum > 0,
    )


def distill(state: State, *, time_limit_seconds: float | None = None) -> Iterator[RoundMetrics]:
    """Run the rounds that are left, one metrics a round; stop early when the time is spent.

    With a time limit the learning rate falls with the time as well, so that a run that is cut short has still cooled
    down; where the clock was ahead of the rounds it is not repeatable bit for bit, and `state.hurried` says so.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite; names the round.
    """
    settings, started = state.settings, time.perf_counter() - state.seconds
    progress = done_share(state, time_limit_seconds)
    while progress < 1:
        round_started = time.perf_counter()
        targets = choose_targets(state)
        images, inversion_losses = synthesize(state, targets, progress)
        remember(state, images)
        losses = teach(state, progress) if is_taught(state) else inversion_losses.total.new_full((1,), math.nan)

        state.round += 1
        measured = measure(state, inversion_losses, losses)
        now = time.perf_counter()
        state.seconds = now - started
        progress = done_share(state, time_limit_seconds)
        state.hurried |= progress > state.round / settings.rounds
        taught = len(losses) if state.round > settings.warmup_rounds else 0
        yield RoundMetrics(
            round=state.round,
            rounds=settings.rounds,
            phase="distill" if taught else "warm-up",
            seconds=state.seconds,
            seconds_left=state.seconds * (1 - progress) / progress if progress < 1 else 0.0,
            images_per_second=taught * settings.student_batch / (now - round_started),
            images_seen=state.images_seen,
            steps=state.steps,
            buffer_size=state.buffer.size,
            **measured,
        )


def done_share(state: State, time_limit_seconds: float | None) -> float:
    """How much of the run is done, 0 to 1 and beyond: by its rounds, or by the clock where that is ahead of them."""
    by_rounds = state.round / state.settings.rounds
    by_clock = state.seconds / time_limit_seconds if time_limit_seconds is not None else 0.0
    return max(by_rounds, by_clock)


def is_taught(state: State) -> bool:
    """Whether the warm-up is over and the student learns in this round."""
    return state.round >= state.settings.warmup_rounds


def choose_targets(state: State) -> Tensor:
    """The class that each new image shall show, int64 [inversion_batch]: the buffer's rare classes first."""
    if not state.settings.diversity:
        return state.task.random_targets(state.settings.inversion_batch, state.rng)
    counts = replay.class_counts(state.buffer, state.task.classes)
    return state.task.balanced_targets(counts, state.settings.inversion_batch, state.rng)


def synthesize(state: State, targets: Tensor, progress: float) -> tuple[Tensor, InversionLosses]:
    """A batch of images for these targets, uint8 [B, H, W, C].

    The adversarial term waits for the warm-up to end, then falls with the run: a student that hardly moves any more
    could not learn from the samples that fool it.
    """
    if not state.settings.inversion:
        return random_images(state, len(targets))
    return invert(
        state.inverter,
        state.teacher,
        state.student,
        targets,
        task=state.task,
        prior=state.prior,
        class_counts=replay.class_counts(state.buffer, state.task.classes),
        adversarial_weight=state.settings.adversarial_weight * (1 - progress) if is_taught(state) else 0.0,
        normalization=state.normalization,
        settings=state.settings,
        compute=state.compute,
        rng=state.rng,
    )


def random_images(state: State, number: int) -> tuple[Tensor, InversionLosses]:
    """Uniform noise in the place of inverted images, for the ablation; uint8 [number, H, W, C], losses of zero."""
    shape = (number, *state.buffer.images.shape[1:])
    device = state.compute.device
    images = torch.randint(256, shape, generator=state.rng, device=device, dtype=torch.uint8)
    return images, InversionLosses(*torch.zeros(4, device=device))


@torch.no_grad()
def remember(state: State, images: Tensor) -> None:
    """Put new images in the place of the least valuable samples; every sixteenth is held out from training.

    The teacher looks at the views of an image here and never again: what the student learns from it is kept beside it.
    """
    shift = round(state.settings.shift * images.shape[1] / 32)
    views = random_views(len(images), state.settings.views, shift, state.rng)
    views[:, 0] = 0  # the image itself
    logits = teacher_logits(state, images, views)
    classes, confidences = state.task.predict(logits[:, 0])
    held_out = min(max(1, len(images) // HELD_OUT_SHARE), state.held_out.capacity)
    for buffer, part in ((state.held_out, slice(held_out)), (state.buffer, slice(held_out, None))):
        kept = slice(buffer.views.shape[1])
        values = kept_values(state, buffer)
        slots = replay.free_slots(buffer, len(images[part]), values)
        replay.add(buffer, slots, images[part], views[part, kept], logits[part, kept], classes[part], confidences[part])


def teacher_logits(state: State, images: Tensor, views: Tensor) -> Tensor:
    """What the teacher says of every view, float32 [B, V, K]; one forward pass a view."""
    indices = torch.arange(len(images), device=images.device)
    logits = []
    for view in views.unbind(1):
        with state.compute.autocast():
            logits.append(state.teacher(to_input(render(images, indices, view), state.normalization)).float())
    return torch.stack(logits, dim=1)


def kept_values(state: State, buffer: ReplayBuffer) -> Tensor:
    """What keeping each sample is worth, float32 [size]: its phi with the class counts of now; the oldest where off."""
    settings = state.settings
    if buffer is state.held_out or not (settings.diversity or settings.difficulty):
        return buffer.born[: buffer.size].float()
    return modulation(
        buffer.classes[: buffer.size],
        buffer.confidences[: buffer.size],
        replay.class_counts(buffer, state.task.classes),
        gamma=settings.gamma,
        diversity=settings.diversity,
        difficulty=settings.difficulty,
    )


def teach(state: State, progress: float) -> Tensor:
    """The student's steps of one round on samples drawn by priority; their losses, float32 [student_steps]."""
    settings, buffer, rng = state.settings, state.buffer, state.rng
    for group in state.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rate_factor(progress)
    state.student.train()
    losses = []
    for _ in range(settings.student_steps):
        slots, weights = replay.sample(
            buffer, settings.student_batch, beta=settings.beta, prioritized=settings.priority, rng=rng
        )
        view = torch.randint(settings.views, slots.shape, generator=rng, device=rng.device)
        inputs = to_input(render(buffer.images, slots, buffer.views[slots, view]), state.normalization)
        with state.compute.autocast():
            student_logits = state.student(inputs)
        divergences = state.task.discrepancy(buffer.logits[slots, view], student_logits, settings.temperature)
        loss = (weights / weights.mean() * divergences).mean()
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        replay.update(buffer, slots, divergences.detach(), weights)
        update_average(state.average, state.student, settings.average_decay, state.steps)
        state.steps += 1
        state.images_seen += len(slots)
        losses.append(loss.detach())
    return torch.stack(losses)


def rate_factor(progress: float) -> float:
    """The learning rate's share of its peak: a linear rise, then a half cosine to 0; `progress` is in 0...1."""
    return min(1.0, (progress + 0.01) / RATE_RISE) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average: nn.Module, student: nn.Module, decay: float, steps: int) -> None:
    """Move the weight average towards the student; its memory grows from one step to 1 / (1 - decay) steps."""
    share = max(1 - decay, 1 / (1 + steps))
    targets, sources = list(average.state_dict().values()), list(student.state_dict().values())
    floating = [index for index, target in enumerate(targets) if target.is_floating_point()]
    torch._foreach_lerp_([targets[index] for index in floating], [sources[index] for index in floating], share)


@torch.no_grad()
def measure(state: State, inversion_losses: InversionLosses, losses: Tensor) -> dict[str, float]:
    """The numbers of the round that just ended; the one place where the host waits for the device.

    Raises:
        NonFiniteLossError: a loss of this round is NaN or infinite.
    """
    counts = replay.class_counts(state.buffer, state.task.classes)
    measured = {
        "inversion_loss": inversion_losses.total,
        "prior_loss": inversion_losses.prior,
        "class_loss": inversion_losses.target,
        "adversarial_loss": inversion_losses.adversarial,
        "distillation_loss": losses.mean(),
        "agreement": 100 * held_out_agreement(state),
        "class_balance": counts.min() / counts.max(),
    }
    values = dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True))
    total, loss = values["inversion_loss"], values["distillation_loss"]
    if not math.isfinite(total) and not state.steps:
        raise NonFiniteLossError(
            f"the images' loss is not finite in round {state.round}, before the student's first step: {total:.3g}",
            "check --mean and --std, and look at the teacher with `ssdkd inspect`",
        )
    if not math.isfinite(total) or (state.steps and not math.isfinite(loss)):
        raise NonFiniteLossError(
            f"a loss is not finite in round {state.round}: inversion {total:.3g}, distillation {loss:.3g}",
            "lower student_rate or generator_rate in the [distillation] table of --config, or try another --seed",
        )
    return values


def held_out_agreement(state: State) -> Tensor:
    """The share of the newest held-out samples on which the kept student predicts the teacher's class, in 0...1."""
    buffer, agreed = state.held_out, []
    newest = buffer.born[: buffer.size].topk(min(MEASURED, buffer.size)).indices
    for slots in newest.split(state.settings.inversion_batch):
        images, known = buffer.images[slots], buffer.logits[slots, 0]
        with state.compute.autocast():
            student_logits = state.average(to_input(images, state.normalization))
        agreed.append(state.task.agreement(known, student_logits))
    return torch.cat(agreed).float().mean()


def averaged_student(state: State) -> nn.Module:
    """The student that is kept, its weight average: chosen without labels. A copy on the CPU, float32, in eval mode."""
    kept: nn.Module = copy.deepcopy(state.average).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return kept.eval()


def class_histogram(state: State) -> list[int]:
    """How many samples of each class the buffer holds."""
    return replay.class_counts(state.buffer, state.task.classes).tolist()
