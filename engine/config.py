"""Every number of a distillation in one frozen value. One dial, the effort, sets its size; the rest has a default."""

from dataclasses import dataclass, fields, replace
from typing import Any

from engine.errors import SSDKDError

EFFORTS: dict[str, int] = {"smoke": 16, "quick": 150, "full": 1200}  # rounds
# What is not here has 1 for integers, 0 for the rest.
LOWEST = {"student_batch": 4, "warmup_rounds": 0, "shift": 0, "held_out": 2, "temperature": 0.01}
HIGHEST = 10**9  # of all but shares of the run: more is a slip
SHARES = ("looking_share",)  # of the run: 1 at most
USUAL_BATCH = 64  # images of a step
ROUNDS_OF_A_BUFFER = 8  # that fill it, where batches are larger than usual: it is not to be another one each round
# Where batches may be larger: a GPU does in minutes what takes two cores hours, and its student has time to learn more.
GPU_DEFAULTS: dict[str, Any] = {"looking_share": 1.0, "leaves": True}
BATCH_PIXELS = 128 * 64 * 64  # a batch has no more pixels than this, unless so few images are below the smallest batch


@dataclass(frozen=True)
class DistillationSettings:
    """Settings of `engine.distill`. docs/method.md gives their sources, docs/experiments.md the measurements."""

    rounds: int = EFFORTS["full"]
    samples: int = 5000  # |B|, slots of the replay buffer
    held_out: int = 1024  # newest synthetic samples that are never trained on
    warmup_rounds: int = 10  # rounds of inversion before the student takes its first step

    inversion_batch: int = USUAL_BATCH  # samples a round
    inversion_steps: int = 10  # K
    generator_width: int = 16  # channels at full resolution
    generator_latent: int = 256
    generator_rate: float = 2e-2  # Adam
    latent_rate: float = 0.1  # Adam
    meta_rate: float = 1.0  # epsilon, how far the generator follows its fast copy in a round
    leaves: bool = False  # the generator paints over dead leaves (engine.leaves); off: over nothing
    batchnorm_weight: float = 100.0  # a_bn
    spread_weight: float = 100.0  # a_sp, of images that lie too near to each other (engine.spread); 0: off
    class_weight: float = 0.5  # a_ce
    adversarial_weight: float = 1.0  # a_adv
    gamma: float = 1.0  # exponent of the difficulty-aware part of phi
    beta: float = 0.4  # exponent of the importance weights

    student_batch: int = USUAL_BATCH
    student_steps: int = 40  # a round
    student_rate: float = 0.1  # peak; SGD with Nesterov momentum; a half cosine to 0
    rise_steps: int = 60  # of the student, over which its rate rises to that
    student_momentum: float = 0.9
    student_decay: float = 5e-4
    temperature: float = 4.0
    feature_weight: float = 30.0  # of each map that is compared with the teacher's (engine.features); 0: logits alone
    looking_share: float = 0.5  # of the run, in which the teacher looks on at each step, and that weight falls to 0
    alter: bool = True  # every second image of a step is altered while the teacher looks on (engine.alteration)
    inherit: bool = True  # begin with the layers that the student shares with the teacher; off: all of it afresh
    inherited_rate: float = 0.05  # peak of the learning rate of those layers
    average_decay: float = 0.99  # of the weight average that is kept, per step
    views: int = 8  # augmentations of each sample
    shift: int = 4  # pixels, of the augmentations at 32 px; scaled with the shorter side

    cuda_graphs: bool = True  # a GPU repeats recorded steps (engine.recording); off: every kernel is launched anew

    # The parts of the method, each of which an ablation turns off.
    diversity: bool = True  # diversity-aware part of phi, and targets that level the buffer
    difficulty: bool = True  # difficulty-aware part of phi
    priority: bool = True  # priority sampling and importance weights; off: uniform draws
    meta: bool = True  # the meta step; off: every round starts from the first generator
    replay: bool = True  # a buffer of fixed size; off: it grows by every sample
    inversion: bool = True  # off: the samples are random noise


def settings_for(
    effort: str, *, image_shape: tuple[int, int, int], largest_batch: int = USUAL_BATCH, **overrides: Any
) -> DistillationSettings:
    """The settings of an effort for images of (C, H, W), with what the user set put over them.

    Large images shrink both batches with their area, to no less than 16: up to 181 pixels a side memory stays level.
    Where `largest_batch` is above the usual one, a round makes an eighth of the buffer at most, or the usual batch, and
    GPU_DEFAULTS take the place of the defaults.

    Raises:
        SSDKDError: unknown effort or setting, or a value of another type.
    """
    if effort not in EFFORTS:
        raise SSDKDError(f"unknown effort '{effort}'", f"use --effort {', '.join(EFFORTS)}")
    types = {field.name: type(field.default) for field in fields(DistillationSettings)}
    for name, value in overrides.items():
        if name not in types:
            raise SSDKDError(f"unknown distillation setting '{name}'", f"the settings are: {', '.join(sorted(types))}")
        accepted = (int, float) if types[name] is float else types[name]
        if not isinstance(value, accepted) or (isinstance(value, bool) and types[name] is not bool):
            raise SSDKDError(
                f"distillation setting '{name}' is {value!r}: expected {types[name].__name__}",
                "correct the config file",
            )
    rounds, samples = EFFORTS[effort], overrides.get("samples", DistillationSettings.samples)
    batch = batch_for(image_shape, largest_batch)
    sized = DistillationSettings(
        rounds=rounds,
        inversion_batch=min(batch, max(batch_for(image_shape), samples // ROUNDS_OF_A_BUFFER)),
        student_batch=batch,
        warmup_rounds=min(10, max(1, rounds // 4)),
    )
    settings = replace(sized, **{**(GPU_DEFAULTS if largest_batch > USUAL_BATCH else {}), **overrides})
    _check_ranges(settings)
    floats: dict[str, Any] = {name: float(value) for name, value in overrides.items() if types[name] is float}
    return replace(settings, **floats)


def batch_for(image_shape: tuple[int, int, int], largest: int = USUAL_BATCH) -> int:
    """Images of (C, H, W) a step: `largest` of small ones, fewer of large ones, never fewer than 16."""
    _, height, width = image_shape
    return max(16, min(largest, BATCH_PIXELS // (height * width)))


def _check_ranges(settings: DistillationSettings) -> None:
    for name, value in vars(settings).items():
        lowest = LOWEST.get(name, 1 if isinstance(getattr(DistillationSettings, name), int) else 0)
        highest = 1 if name in SHARES else HIGHEST
        if not lowest <= value <= highest and not isinstance(value, bool):
            raise SSDKDError(
                f"distillation setting '{name}' is {value}: expected {lowest} or more, {highest:,} at most",
                "correct that value",
            )
    if settings.warmup_rounds >= settings.rounds:
        raise SSDKDError(
            f"warmup_rounds is {settings.warmup_rounds}, of {settings.rounds} rounds: the student would never learn",
            "set fewer warmup_rounds or more rounds in the [distillation] table of the file given with --config",
        )
    if settings.samples < settings.inversion_batch:
        raise SSDKDError(
            f"the replay buffer holds {settings.samples} samples, one round makes {settings.inversion_batch}",
            f"use --samples {settings.inversion_batch} or more",
        )
