"""The dynamic replay buffer: a fixed number of synthetic samples, drawn by priority, replaced a part at a time.

Everything lives on the run's device and nothing waits for the host: the number of filled slots follows from the number
of samples added alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1.0  # of the mean discrepancy: half of the draws are uniform: what was learned is drawn again (log)


@dataclass
class ReplayBuffer:
    """N slots; the first `size` of them are filled."""

    images: Tensor  # uint8 [N, H, W, C]
    views: Tensor  # int64 [N, V, 3], the augmentations in which the student sees it; the first is the image itself
    logits: Tensor  # float32 [N, V, K], the teacher's, of the views that it has seen; the latest, where it looks on
    seen: Tensor  # bool [N, V]; the first view always is
    classes: Tensor  # int64 [N], the class that the teacher predicts
    confidences: Tensor  # float32 [N], the teacher's confidence in it
    discrepancies: Tensor  # float32 [N], delta: w_(i-1) KL(T || S) when the sample was last drawn and not altered
    weights: Tensor  # float32 [N], w: the importance weight then
    born: Tensor  # int64 [N], serial number of the sample
    added: int = 0

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return len(self.images)

    @property
    def size(self) -> int:
        """The number of filled slots."""
        return min(self.added, self.capacity)


def empty_buffer(
    capacity: int, image_shape: tuple[int, int, int], *, views: int, classes: int, device: torch.device
) -> ReplayBuffer:
    """A buffer of `capacity` slots for images of (C, H, W), each with `views` augmentations."""
    channels, height, width = image_shape
    return ReplayBuffer(
        images=torch.zeros(capacity, height, width, channels, dtype=torch.uint8, device=device),
        views=torch.zeros(capacity, views, 3, dtype=torch.int64, device=device),
        logits=torch.zeros(capacity, views, classes, device=device),
        seen=torch.zeros(capacity, views, dtype=torch.bool, device=device),
        classes=torch.zeros(capacity, dtype=torch.int64, device=device),
        confidences=torch.zeros(capacity, device=device),
        discrepancies=torch.zeros(capacity, device=device),
        weights=torch.ones(capacity, device=device),
        born=torch.zeros(capacity, dtype=torch.int64, device=device),
    )


def sample_bytes(image_shape: tuple[int, int, int], views: int, classes: int) -> int:
    """The memory that a slot for an image of (C, H, W) takes: most of `empty_buffer`."""
    return math.prod(image_shape) + views * (3 * 8 + 4 * classes)


def class_counts(buffer: ReplayBuffer, classes: int) -> Tensor:
    """How many samples of each class the buffer holds, int64 [classes]."""
    ones = torch.ones_like(buffer.classes[: buffer.size])
    return ones.new_zeros(classes).scatter_add_(0, buffer.classes[: buffer.size], ones)


def free_slots(buffer: ReplayBuffer, number: int, values: Tensor) -> Tensor:
    """The slots that `number` new samples take: empty ones first, then those of lowest value, int64 [number].

    `values` is float32 [size]: what keeping each sample is worth.
    """
    empty = torch.arange(buffer.size, min(buffer.size + number, buffer.capacity), device=buffer.images.device)
    lowest = values.topk(number - len(empty), largest=False).indices
    return torch.cat((empty, lowest))


def add(
    buffer: ReplayBuffer,
    slots: Tensor,
    images: Tensor,
    views: Tensor,
    logits: Tensor,
    classes: Tensor,
    confidences: Tensor,
) -> None:
    """Overwrite `slots` [B] by new samples, which enter with the highest priority.

    Args:
        buffer: changed in place.
        slots: from `free_slots`.
        images: uint8 [B, H, W, C].
        views: int64 [B, V, 3].
        logits: float32 [B, L, K], of the first L views.
        classes: int64 [B].
        confidences: float32 [B].
    """
    highest = buffer.discrepancies.max() if buffer.added else torch.ones((), device=slots.device)
    buffer.images[slots] = images
    buffer.views[slots] = views
    looks = logits.shape[1]
    buffer.logits[slots, :looks] = logits
    buffer.seen[slots] = torch.arange(buffer.seen.shape[1], device=slots.device) < looks
    buffer.classes[slots] = classes
    buffer.confidences[slots] = confidences
    buffer.discrepancies[slots] = highest
    buffer.weights.index_fill_(0, slots, 1.0)
    buffer.born[slots] = torch.arange(buffer.added, buffer.added + len(slots), device=slots.device)
    buffer.added += len(slots)


def sample(
    buffer: ReplayBuffer, number: int, *, beta: float, prioritized: bool, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw slots by P(x) = (delta(x) + eps) / sum, one from each of `number` equal shares of the total.

    Stratified inverse-CDF sampling (Schaul et al. 2016, appendix B.2.1).

    Returns:
        slots, int64 [number], and their importance weights w(x) = (|B| P(x))^(-beta), float32 [number].
    """
    if not prioritized:
        slots = torch.randint(buffer.size, (number,), generator=rng, device=rng.device)
        return slots, torch.ones(number, device=rng.device)
    discrepancies = buffer.discrepancies[: buffer.size]
    priorities = discrepancies + EPSILON * discrepancies.mean() + 1e-12
    cumulative = priorities.double().cumsum(0)
    strata = torch.arange(number, device=rng.device, dtype=torch.float64)
    points = (strata + torch.rand(number, generator=rng, device=rng.device, dtype=torch.float64)) / number
    slots = torch.searchsorted(cumulative, points * cumulative[-1]).clamp_max_(buffer.size - 1)
    return slots, (priorities[slots] / priorities.mean()) ** -beta


def draw_seen_views(buffer: ReplayBuffer, slots: Tensor, rng: torch.Generator) -> Tensor:
    """One of the views that the teacher has seen, of each of `slots` [B], int64 [B]."""
    seen = buffer.seen[slots]
    numbers = torch.rand(seen.shape, generator=rng, device=rng.device)
    return numbers.masked_fill(~seen, -1.0).argmax(1)


def remember_logits(buffer: ReplayBuffer, slots: Tensor, views: Tensor, logits: Tensor) -> None:
    """Keep what the teacher says now, float32 [B, K], of one view of each of `slots`; both int64 [B]."""
    buffer.logits[slots, views] = logits
    buffer.seen[slots, views] = torch.ones_like(slots, dtype=torch.bool)  # a number would have to be sent to the GPU


def update(buffer: ReplayBuffer, slots: Tensor, divergences: Tensor, weights: Tensor) -> None:
    """delta(x) = w_(i-1)(x) KL(T(x) || S(x)) for samples that were drawn, which then remember that draw's weights.

    Args:
        buffer: changed in place.
        slots: int64 [B], from `sample`.
        divergences: KL of each sample, float32 [B].
        weights: w_i, float32 [B], from `sample`.
    """
    buffer.discrepancies[slots] = buffer.weights[slots] * divergences
    buffer.weights[slots] = weights
