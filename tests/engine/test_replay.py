import pytest
import torch
from torch import Tensor

from engine import replay
from engine.replay import ReplayBuffer

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def buffer_of(capacity: int) -> ReplayBuffer:
    return replay.empty_buffer(capacity, (2, 3, 4), views=2, classes=5, device=CPU)


def put(buffer: ReplayBuffer, number: int, values: Tensor | None = None) -> Tensor:
    """Add samples whose image, class and confidence all tell their serial number; returns the slots."""
    serials = torch.arange(buffer.added, buffer.added + number)
    slots = replay.free_slots(buffer, number, torch.zeros(buffer.size) if values is None else values)
    images = serials.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 2)
    views = serials.view(-1, 1, 1).expand(-1, 2, 3)
    logits = (serials / 10).view(-1, 1, 1).expand(-1, 2, 5)
    replay.add(buffer, slots, images, views, logits, serials % 5, serials / 1000)
    return slots


def serials_in(buffer: ReplayBuffer) -> list[int]:
    """The serial number of each slot, which all its fields must agree on."""
    size = buffer.size
    serials = buffer.born[:size]
    assert torch.equal(buffer.images[:size], serials.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 2))
    assert torch.equal(buffer.views[:size], serials.view(-1, 1, 1).expand(-1, 2, 3))
    torch.testing.assert_close(buffer.logits[:size], (serials / 10).view(-1, 1, 1).expand(-1, 2, 5))
    assert torch.equal(buffer.classes[:size], serials % 5)
    torch.testing.assert_close(buffer.confidences[:size], serials / 1000)
    return serials.tolist()


def filled(discrepancies: list[float]) -> ReplayBuffer:
    buffer = buffer_of(len(discrepancies))
    put(buffer, len(discrepancies))
    buffer.discrepancies.copy_(torch.tensor(discrepancies))
    return buffer


def draws(
    buffer: ReplayBuffer, *, batches: int, number: int = 100, beta: float = 1.0, prioritized: bool = True
) -> Tensor:
    rng = generator()
    return torch.cat(
        [replay.sample(buffer, number, beta=beta, prioritized=prioritized, rng=rng)[0] for _ in range(batches)]
    )


# Slots


def test_an_empty_buffer_holds_nothing() -> None:
    buffer = buffer_of(7)
    assert (buffer.capacity, buffer.size, buffer.added) == (7, 0, 0)
    assert buffer.images.shape == (7, 3, 4, 2)
    assert buffer.images.dtype == torch.uint8
    assert replay.class_counts(buffer, 3).tolist() == [0, 0, 0]


def test_slots_fill_in_order() -> None:
    buffer = buffer_of(8)
    assert put(buffer, 3).tolist() == [0, 1, 2]
    assert buffer.size == 3
    assert put(buffer, 5, torch.tensor([-1.0, -2.0, -3.0])).tolist() == [3, 4, 5, 6, 7]
    assert serials_in(buffer) == list(range(8))


def test_a_full_buffer_gives_up_exactly_its_samples_of_lowest_value() -> None:
    buffer = buffer_of(6)
    put(buffer, 6)
    slots = put(buffer, 2, torch.tensor([5.0, 0.2, 4.0, 3.0, 0.1, 2.0]))
    assert sorted(slots.tolist()) == [1, 4]
    assert buffer.size == 6
    assert [serial for slot, serial in enumerate(serials_in(buffer)) if slot not in (1, 4)] == [0, 2, 3, 5]
    assert sorted(serials_in(buffer)) == [0, 2, 3, 5, 6, 7]


def test_empty_slots_are_taken_before_the_least_valuable() -> None:
    buffer = buffer_of(6)
    put(buffer, 4)
    slots = put(buffer, 3, torch.tensor([3.0, 1.0, 2.0, 4.0]))
    assert slots.tolist() == [4, 5, 1]
    assert serials_in(buffer) == [0, 6, 2, 3, 4, 5]


def test_partial_updates_never_touch_other_slots() -> None:
    buffer, rng = buffer_of(20), generator()
    put(buffer, 20)
    for _ in range(10):
        buffer.discrepancies.copy_(torch.rand(20, generator=rng))
        buffer.weights.copy_(torch.rand(20, generator=rng))
        before = {name: value.clone() for name, value in vars(buffer).items() if isinstance(value, Tensor)}
        slots = put(buffer, 6, torch.rand(20, generator=rng))
        assert len(slots.unique()) == 6
        others = torch.ones(20, dtype=torch.bool)
        others[slots] = False
        for name, value in before.items():
            assert torch.equal(getattr(buffer, name)[others], value[others]), name
        assert serials_in(buffer)[slots[0]] >= buffer.added - 6


def test_a_whole_buffer_can_be_replaced_at_once() -> None:
    buffer = buffer_of(4)
    put(buffer, 4)
    put(buffer, 4, torch.rand(4, generator=generator()))
    assert sorted(serials_in(buffer)) == [4, 5, 6, 7]


def test_class_counts_leave_empty_slots_out() -> None:
    buffer = buffer_of(100)
    put(buffer, 7)  # classes 0 1 2 3 4 0 1
    assert replay.class_counts(buffer, 6).tolist() == [2, 2, 1, 1, 1, 0]


def test_no_samples_change_nothing() -> None:
    buffer = buffer_of(3)
    assert put(buffer, 0).tolist() == []
    assert (buffer.added, buffer.size) == (0, 0)


# Priorities


def test_new_samples_enter_with_the_highest_priority() -> None:
    buffer = buffer_of(6)
    put(buffer, 4)
    assert buffer.discrepancies[:4].tolist() == [1, 1, 1, 1]
    buffer.discrepancies[:4] = torch.tensor([0.5, 7.0, 2.0, 3.0])
    buffer.weights[:] = 0.3
    slots = put(buffer, 3, torch.tensor([9.0, 8.0, 1.0, 7.0]))
    assert slots.tolist() == [4, 5, 2]
    torch.testing.assert_close(buffer.discrepancies, torch.tensor([0.5, 7.0, 7.0, 3.0, 7.0, 7.0]))
    torch.testing.assert_close(buffer.weights, torch.tensor([0.3, 0.3, 1.0, 0.3, 1.0, 1.0]))


def test_discrepancies_follow_the_weights_of_the_draw_before() -> None:
    buffer = filled([1.0, 1.0, 1.0])
    slots = torch.tensor([0, 2])
    replay.update(buffer, slots, torch.tensor([10.0, 20.0]), torch.tensor([0.5, 0.25]))
    assert buffer.discrepancies.tolist() == [10, 1, 20]  # w_0 is 1
    replay.update(buffer, slots, torch.tensor([8.0, 8.0]), torch.tensor([2.0, 3.0]))
    assert buffer.discrepancies.tolist() == [4, 1, 2]
    replay.update(buffer, slots, torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert buffer.discrepancies.tolist() == [2, 1, 3]
    assert buffer.weights.tolist() == [1, 1, 1]


def test_draws_follow_the_priorities() -> None:
    discrepancies = [0.0, 0.5, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    buffer = filled(discrepancies)
    priorities = torch.tensor(discrepancies) + replay.EPSILON * sum(discrepancies) / 8
    probabilities = priorities / priorities.sum()
    counts = draws(buffer, batches=600).bincount(minlength=8)
    expected = 60_000 * probabilities
    assert ((counts - expected).square() / expected).sum() < 24.3  # chi-square of 7 degrees of freedom, 0.1 %
    assert counts[0] == pytest.approx(60_000 / 16, rel=0.1)  # what was learned is drawn half as often as by chance


def test_each_batch_alone_follows_the_priorities() -> None:
    buffer = filled([1.0, 2.0, 3.0, 4.0])
    for seed in range(20):
        slots, _ = replay.sample(buffer, 100, beta=0.4, prioritized=True, rng=generator(seed))
        expected = torch.tensor(
            [17.5, 22.5, 27.5, 32.5]
        )  # half of the draws go by the discrepancies, half to all alike
        assert ((slots.bincount(minlength=4) - expected).abs() <= 1).all()  # stratified


def test_equal_and_vanished_discrepancies_are_drawn_uniformly() -> None:
    for discrepancy in (3.0, 0.0):
        slots, weights = replay.sample(filled([discrepancy] * 10), 100, beta=1.0, prioritized=True, rng=generator())
        assert slots.bincount(minlength=10).tolist() == [10] * 10
        torch.testing.assert_close(weights, torch.ones(100))


@pytest.mark.parametrize("prioritized", [True, False])
def test_empty_slots_are_never_drawn(prioritized: bool) -> None:
    buffer = buffer_of(50)
    put(buffer, 3)
    assert set(draws(buffer, batches=5, prioritized=prioritized).tolist()) == {0, 1, 2}


def test_importance_weights_by_hand() -> None:
    buffer = filled([1.0, 3.0])
    slots, weights = replay.sample(buffer, 1000, beta=0.5, prioritized=True, rng=generator())
    for slot, share in ((0, 0.375), (1, 0.625)):
        expected = torch.full((1000,), (2 * share) ** -0.5)[slots == slot]
        torch.testing.assert_close(weights[slots == slot], expected, rtol=2e-3, atol=0)


def test_importance_weights_with_beta_1_undo_the_bias() -> None:
    discrepancies = torch.rand(50, generator=generator(1)) * 10
    buffer, values = filled(discrepancies.tolist()), torch.randn(50, generator=generator(2)) + discrepancies
    rng, weighted, plain = generator(3), [], []
    for _ in range(400):
        slots, weights = replay.sample(buffer, 100, beta=1.0, prioritized=True, rng=rng)
        weighted.append((weights * values[slots]).mean())
        plain.append(values[slots].mean())
    assert torch.stack(weighted).mean().item() == pytest.approx(values.mean().item(), abs=0.05)
    assert torch.stack(plain).mean() > values.mean() + 0.5  # the bias that there is to undo


def test_beta_0_does_not_weigh() -> None:
    _, weights = replay.sample(filled([1.0, 9.0]), 10, beta=0.0, prioritized=True, rng=generator())
    assert weights.tolist() == [1.0] * 10


def test_draws_without_priorities_are_uniform_and_unweighted() -> None:
    buffer = filled([0.0, 1.0, 100.0, 1.0])
    _, weights = replay.sample(buffer, 10, beta=1.0, prioritized=False, rng=generator())
    assert weights.tolist() == [1.0] * 10
    counts = draws(buffer, batches=100, prioritized=False).bincount(minlength=4)
    assert ((counts - 2500).abs() < 175).all()  # four deviations


def test_one_sample_is_drawn_again_and_again() -> None:
    slots, weights = replay.sample(filled([2.0]), 5, beta=0.4, prioritized=True, rng=generator())
    assert slots.tolist() == [0] * 5
    torch.testing.assert_close(weights, torch.ones(5))


def test_draws_depend_on_the_generator_alone() -> None:
    buffer = filled([1.0, 2.0, 3.0, 4.0, 5.0])
    first, again, other = (
        replay.sample(buffer, 64, beta=0.4, prioritized=True, rng=generator(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_views_that_the_teacher_has_not_seen_are_not_drawn_until_its_logits_are_kept() -> None:
    buffer, rng = buffer_of(4), generator()
    images, views = torch.zeros(4, 3, 4, 2, dtype=torch.uint8), torch.zeros(4, 2, 3, dtype=torch.int64)
    slots, classes = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    replay.add(buffer, slots, images, views, torch.ones(4, 1, 5), classes, torch.zeros(4))
    assert buffer.seen.tolist() == [[True, False]] * 4
    many = slots.repeat(50)
    assert (replay.draw_seen_views(buffer, many, rng) == 0).all()
    replay.remember_logits(buffer, torch.tensor([2]), torch.tensor([1]), torch.full((1, 5), 7.0))
    drawn = replay.draw_seen_views(buffer, many, rng)
    assert {(slot, view) for slot, view in zip(many.tolist(), drawn.tolist(), strict=True)} == {
        *((slot, 0) for slot in range(4)),
        (2, 1),
    }
    assert 15 <= drawn[many == 2].sum() <= 35  # one as often as the other
    assert buffer.logits[2].tolist() == [[1.0] * 5, [7.0] * 5]
    replay.add(buffer, torch.tensor([2]), images[:1], views[:1], torch.ones(1, 2, 5), classes[:1], torch.zeros(1))
    assert buffer.seen[2].tolist() == [True, True]


def test_a_slot_takes_what_is_said() -> None:
    buffer = replay.empty_buffer(64, (3, 16, 16), views=4, classes=100, device=torch.device("cpu"))
    taken = sum(value.nbytes for value in vars(buffer).values() if isinstance(value, Tensor))
    said = 64 * replay.sample_bytes((3, 16, 16), views=4, classes=100)
    assert 0.95 * taken < said <= taken
