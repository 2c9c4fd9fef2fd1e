"""The loop of SSD-KD: invert a batch, remember it in place of the least useful samples, teach the student from memory.

Each round is one turn of invert -> remember -> teach. Nothing in it waits for the device but the metrics at its end,
and a step that is being recorded (engine.recording).
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine import replay
from engine.alteration import PLAIN
from engine.errors import NonFiniteLossError
from engine.images import random_views, render, to_input
from engine.inversion import InversionLosses, invert
from engine.losses import modulation
from engine.replay import ReplayBuffer
from engine.state import State, looks_on
from engine.teaching import averaged_tensors, learning_parameters, rate_factor, rise, update_average

HELD_OUT_SHARES = 8, 32  # one new image in so many is held out: until there are enough, and then
LONGEST_WARMUP = 0.2  # of the time limit
MEASURED = 256  # of the newest held-out samples, each round: more would cost a tenth of it


@dataclass(frozen=True)
class RoundMetrics:
    """What one round did; the losses of the inversion are those of its last step."""

    round: int  # from 1
    rounds: int
    phase: str  # "warm-up" (the buffer fills) or "distill"
    seconds: float  # since the start
    seconds_left: float  # at the pace of the rounds in which the student learns; NaN before the first without a limit
    inversion_loss: float
    prior_loss: float
    spread_loss: float
    class_loss: float
    adversarial_loss: float
    distillation_loss: float  # of the logits, mean of the round's steps; NaN in the warm-up
    feature_loss: float  # of the maps, summed over those compared; 0 where none is, NaN in the warm-up
    agreement: float  # percent, of the averaged student with the teacher on the newest held-out samples
    class_balance: float  # smallest over largest class count of the buffer
    images_per_second: float  # that the student saw, this round
    images_seen: int
    steps: int
    buffer_size: int


def distill(state: State, *, time_limit_seconds: float | None = None) -> Iterator[RoundMetrics]:
    """Run the rounds that are left, one metrics a round; stop early, with the round that ends nearest to a time limit.

    With a time limit the learning rate falls with the time as well, so that a run that is cut short has still cooled
    down. Where the clock was ahead of the rounds it is not repeatable bit for bit, and `state.hurried` says so; nor is
    it where other work changed the number of threads, and `state.compute.threads.changed` says so.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite; names the round.
    """
    settings, started = state.settings, time.perf_counter() - state.seconds
    progress = done_share(state, time_limit_seconds)
    began: tuple[int, float] | None = None  # rounds and seconds before the student's first round here
    while progress < 1:
        round_started = time.perf_counter()
        state.compute.threads.choose()
        targets = choose_targets(state)
        images, inversion_losses = synthesize(state, targets, progress)
        remember(state, images, progress)
        learns = is_taught(state, progress)
        began = began or ((state.round, state.seconds) if learns else None)
        losses = teach(state, progress) if learns else inversion_losses.total.new_full((1, 2), math.nan)

        state.round += 1
        measured = measure(state, inversion_losses, losses)
        now = time.perf_counter()
        state.seconds = now - started
        progress = done_share(state, time_limit_seconds)
        if time_limit_seconds is not None and state.steps:  # one more round would end farther from the limit
            progress = max(progress, state.seconds + (now - round_started) / 2 >= time_limit_seconds)
        state.hurried |= progress > state.round / settings.rounds
        yield RoundMetrics(
            round=state.round,
            rounds=settings.rounds,
            phase="distill" if learns else "warm-up",
            seconds=state.seconds,
            seconds_left=seconds_left(state, began, time_limit_seconds) if progress < 1 else 0.0,
            images_per_second=learns * len(losses) * settings.student_batch / (now - round_started),
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


def seconds_left(state: State, began: tuple[int, float] | None, time_limit_seconds: float | None) -> float:
    """Of the rounds that are left, or until the time is up; NaN where neither is known.

    `began`: rounds and seconds before the first round in which the student learned: those of the warm-up are shorter.
    """
    by_rounds = math.nan
    if began:
        rounds, seconds = began
        by_rounds = (state.settings.rounds - state.round) * (state.seconds - seconds) / (state.round - rounds)
    if time_limit_seconds is None:
        return by_rounds
    by_clock = max(0.0, time_limit_seconds - state.seconds)
    return min(by_rounds, by_clock) if began else by_clock


def is_taught(state: State, progress: float) -> bool:
    """Whether the student learns in this round: the warm-up is over, or has taken its share of the time there is."""
    by_clock = progress > state.round / state.settings.rounds
    return state.round >= state.settings.warmup_rounds or (by_clock and progress >= LONGEST_WARMUP)


def choose_targets(state: State) -> Tensor:
    """The class that each new image shall show, int64 [inversion_batch]: the buffer's rare classes first."""
    if not state.settings.diversity:
        return state.task.random_targets(state.settings.inversion_batch, state.rng)
    counts = replay.class_counts(state.buffer, state.task.classes)
    return state.task.balanced_targets(counts, state.settings.inversion_batch, state.rng)


def synthesize(state: State, targets: Tensor, progress: float) -> tuple[Tensor, InversionLosses]:
    """A batch of images for these targets, uint8 [B, H, W, C].

    The adversarial term waits for the warm-up to end, then falls with the run: a student that hardly moves any more
    could not learn from the samples that fool it. Images that will be held out are spared it: they are to show
    what the student is worth, not where it fails.
    """
    if not state.settings.inversion:
        return random_images(state, len(targets))
    return invert(
        state.inverter,
        targets,
        class_counts=replay.class_counts(state.buffer, state.task.classes),
        adversarial_weight=state.settings.adversarial_weight * (1 - progress) if is_taught(state, progress) else 0.0,
        spared=held_out_number(state, len(targets)),
        rng=state.rng,
    )


def random_images(state: State, number: int) -> tuple[Tensor, InversionLosses]:
    """Uniform noise in the place of inverted images, for the ablation; uint8 [number, H, W, C], losses of zero."""
    shape = (number, *state.buffer.images.shape[1:])
    device = state.compute.device
    images = torch.randint(256, shape, generator=state.rng, device=device, dtype=torch.uint8)
    return images, InversionLosses(*torch.zeros(5, device=device))


def held_out_number(state: State, number: int) -> int:
    """How many of `number` new images, the first ones, are held out from training."""
    wanted = state.held_out.capacity
    share = HELD_OUT_SHARES[state.held_out.size == wanted]
    return min(max(1, number // share), wanted)


@torch.no_grad()
def remember(state: State, images: Tensor, progress: float) -> None:
    """Put new images in the place of the least valuable samples; the first few are held out from training.

    The teacher looks at the views of an image here, once, and what it says is kept beside them. While it looks on as
    the student learns, it is shown the image alone: it will be asked at each step.
    """
    shift = round(state.settings.shift * min(images.shape[1:3]) / 32)
    views = random_views(len(images), state.settings.views, shift, state.rng)
    views[:, 0] = 0  # the image itself
    looks = 1 if looks_on(state, progress) else state.settings.views
    logits = teacher_logits(state, images, views[:, :looks])
    classes, confidences = state.task.predict(logits[:, 0])
    held_out = held_out_number(state, len(images))
    for buffer, part in ((state.held_out, slice(held_out)), (state.buffer, slice(held_out, None))):
        room = buffer.views.shape[1]
        kept = views[part, :room], logits[part, :room]
        values = kept_values(state, buffer)
        slots = replay.free_slots(buffer, len(images[part]), values)
        replay.add(buffer, slots, images[part], *kept, classes[part], confidences[part])


def teacher_logits(state: State, images: Tensor, views: Tensor) -> Tensor:
    """What the teacher says of every view, float32 [B, V, K]."""
    at_once = state.compute.at_once(len(images))
    indices = torch.arange(len(images), device=images.device).repeat(views.shape[1])  # view after view
    logits = []
    for chosen, seen in zip(indices.split(at_once), views.transpose(0, 1).flatten(0, 1).split(at_once), strict=True):
        with state.compute.autocast():
            logits.append(state.teacher(to_input(render(images, chosen, seen), state.normalization)).float())
    return torch.cat(logits).unflatten(0, (views.shape[1], len(images))).transpose(0, 1)


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
    """The student's steps of one round on samples drawn by priority.

    In the first part of the run (`looking_share`; on a GPU all of it) the teacher looks on: images are altered, and
    maps that can be compared are, with a weight that falls to 0: they lead a student that knows little, and would keep
    one that cannot follow them from the logits. What the teacher says on the way of images as they are is kept, and is
    enough later.

    Returns:
        their losses, of the logits and of the maps, float32 [student_steps, 2].
    """
    settings, buffer, batch = state.settings, state.buffer, state.batch
    asks = looks_on(state, progress)
    plain = PLAIN if asks and settings.alter else slice(None)
    if asks:
        batch.feature_weight.fill_(settings.feature_weight * (1 - progress / settings.looking_share))
    parameters = learning_parameters(state.student)
    averaged, learning = averaged_tensors(state.average), averaged_tensors(state.student)
    state.student.train()
    losses = torch.zeros(settings.student_steps, 2, device=state.rng.device)
    for step in range(settings.student_steps):
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor(progress) * rise(state.steps, settings.rise_steps)
        draw(state, any_view=asks)
        (*both, divergences, teacher_logits), gradients = state.gradients[asks]()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        state.optimizer.step()
        replay.update(buffer, batch.slots[plain], divergences[plain], batch.weights[plain])
        if asks:
            replay.remember_logits(buffer, batch.slots[plain], batch.views[plain], teacher_logits[plain])
        update_average(averaged, learning, settings.average_decay, state.steps)
        state.steps += 1
        state.images_seen += len(batch.slots)
        losses[step] = torch.stack(both)
    return losses


def draw(state: State, *, any_view: bool) -> None:
    """Fill the batch: slots by priority, their importance weights, one view of each, any or a seen one, and numbers."""
    settings, batch, rng = state.settings, state.batch, state.rng
    slots, weights = replay.sample(
        state.buffer, settings.student_batch, beta=settings.beta, prioritized=settings.priority, rng=rng
    )
    order = torch.randperm(len(slots), generator=rng, device=rng.device)  # sampled in order: else a slot had its place
    batch.slots.copy_(slots[order])
    batch.weights.copy_(weights[order])
    batch.numbers.normal_(generator=rng)
    if any_view:
        batch.views.random_(settings.views, generator=rng)
    else:
        batch.views.copy_(replay.draw_seen_views(state.buffer, batch.slots, rng))


@torch.no_grad()
def measure(state: State, inversion_losses: InversionLosses, losses: Tensor) -> dict[str, float]:
    """The numbers of the round that just ended; the one place where the host waits for the device.

    Raises:
        NonFiniteLossError: a loss of this round is NaN or infinite.
    """
    counts = replay.class_counts(state.buffer, state.task.classes)
    distillation_loss, feature_loss = losses.mean(0)
    measured = {
        "inversion_loss": inversion_losses.total,
        "prior_loss": inversion_losses.prior,
        "spread_loss": inversion_losses.spread,
        "class_loss": inversion_losses.target,
        "adversarial_loss": inversion_losses.adversarial,
        "distillation_loss": distillation_loss,
        "feature_loss": feature_loss,
        "agreement": 100 * held_out_agreement(state),
        "class_balance": counts.min() / counts.max(),
    }
    values = dict(zip(measured, torch.stack(list(measured.values())).tolist(), strict=True))
    total = values["inversion_loss"]
    taught = values["distillation_loss"], values["feature_loss"]
    if not math.isfinite(total) and not state.steps:
        raise NonFiniteLossError(
            f"the images' loss is not finite in round {state.round}, before the student's first step: {total:.3g}",
            "check --mean and --std, and look at the teacher with `ssdkd inspect`",
        )
    if not math.isfinite(total) or (state.steps and not all(map(math.isfinite, taught))):
        raise NonFiniteLossError(
            f"a loss is not finite in round {state.round}: inversion {total:.3g}, distillation {taught[0]:.3g}, "
            f"maps {taught[1]:.3g}",
            "lower student_rate or generator_rate in the [distillation] table of --config, or try another --seed",
        )
    return values


def held_out_agreement(state: State) -> Tensor:
    """The share of the newest held-out samples on which the kept student predicts the teacher's class, in 0...1."""
    buffer, agreed = state.held_out, []
    newest = buffer.born[: buffer.size].topk(min(MEASURED, buffer.size)).indices
    for slots in newest.split(state.compute.at_once(state.settings.inversion_batch)):
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
