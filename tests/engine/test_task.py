import pytest
import torch
import torch.nn.functional as F

from engine.task import Classification


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levelled(counts: list[int], number: int) -> list[int]:
    """The counts, sorted, after adding one at a time to a rarest class."""
    counts = list(counts)
    for _ in range(number):
        counts[counts.index(min(counts))] += 1
    return sorted(counts)


@pytest.mark.parametrize("seed", range(12))
def test_balanced_targets_level_any_counts_as_far_as_they_can(seed: int) -> None:
    rng = generator(seed)
    classes = int(torch.randint(2, 40, (), generator=rng))
    number = int(torch.randint(1, 200, (), generator=rng))
    counts = torch.randint(0, int(torch.randint(1, 60, (), generator=rng)), (classes,), generator=rng)
    targets = Classification(classes).balanced_targets(counts, number, rng)
    assert targets.shape == (number,)
    assert targets.dtype == torch.int64
    after = counts + targets.bincount(minlength=classes)
    assert sorted(after.tolist()) == levelled(counts.tolist(), number)


def test_targets_of_an_empty_buffer_are_level_at_once() -> None:
    targets = Classification(10).balanced_targets(torch.zeros(10, dtype=torch.int64), 128, generator())
    assert sorted(targets.bincount(minlength=10).tolist()) == [12] * 2 + [13] * 8


def test_a_thousand_classes_share_a_small_batch() -> None:
    counts = torch.arange(1000) % 7 == 0  # 143 classes are full
    targets = Classification(1000).balanced_targets(counts.long() * 5, 128, generator())
    assert len(targets.unique()) == 128
    assert not counts[targets].any()


def test_two_classes_of_which_one_is_missing() -> None:
    targets = Classification(2).balanced_targets(torch.tensor([30, 0]), 20, generator())
    assert targets.tolist() == [1] * 20
    targets = Classification(2).balanced_targets(torch.tensor([30, 0]), 40, generator())
    assert targets.bincount().tolist() == [5, 35]


def test_ties_go_to_other_classes_with_other_generators() -> None:
    task, counts = Classification(100), torch.zeros(100, dtype=torch.int64)
    first, again, other = (set(task.balanced_targets(counts, 10, generator(seed)).tolist()) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    drawn = torch.cat([task.balanced_targets(counts, 10, generator(seed)) for seed in range(200)])
    frequencies = drawn.bincount(minlength=100)  # 20 are expected, with a deviation of 4.2
    assert frequencies.min() >= 5
    assert frequencies.max() <= 40


def test_random_targets_are_uniform() -> None:
    targets = Classification(5).random_targets(10_000, generator())
    assert targets.shape == (10_000,)
    assert ((targets.bincount(minlength=5) - 2000).abs() < 160).all()  # four deviations


def test_target_loss_is_the_cross_entropy_of_each_sample() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    loss = Classification(2).target_loss(logits.bfloat16(), torch.tensor([0, 0, 0]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([0.693147, 0.126928, 2.126928]))


def test_prediction_is_the_likeliest_class_and_the_confidence_in_it() -> None:
    classes, confidences = Classification(3).predict(
        torch.tensor([[0.0, 1.0, 0.0], [5.0, 5.0, 5.0], [-9.0, -9.0, 9.0]])
    )
    assert classes[[0, 2]].tolist() == [1, 2]
    torch.testing.assert_close(confidences, torch.tensor([0.576117, 1 / 3, 1.0]))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_discrepancy_is_the_divergence_times_the_squared_temperature(temperature: float) -> None:
    teacher, student = torch.randn(2, 16, 10, generator=generator()).mul(5)
    expected = F.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="none"
    ).sum(1)
    actual = Classification(10).discrepancy(teacher, student, temperature)
    torch.testing.assert_close(actual, expected * temperature**2, atol=1e-4, rtol=1e-4)
    assert (actual > 0.1).all()


def test_discrepancy_by_hand_and_its_direction() -> None:
    even, uneven = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986123]])  # 1/2 1/2 and 1/4 3/4
    task = Classification(2)
    torch.testing.assert_close(task.discrepancy(even, uneven, 1.0), torch.tensor([0.143841]))
    torch.testing.assert_close(task.discrepancy(uneven, even, 1.0), torch.tensor([0.130812]))


def test_equal_logits_have_no_discrepancy_and_neither_has_a_constant_offset() -> None:
    logits = torch.randn(8, 5, generator=generator())
    torch.testing.assert_close(Classification(5).discrepancy(logits, logits, 4.0), torch.zeros(8))
    torch.testing.assert_close(
        Classification(5).discrepancy(logits, logits + 3, 4.0), torch.zeros(8), atol=1e-5, rtol=0
    )


def test_discrepancy_stays_finite_for_certain_networks_in_half_precision() -> None:
    teacher, student = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]])
    value = Classification(2).discrepancy(teacher.bfloat16(), student.bfloat16(), 1.0)
    torch.testing.assert_close(value, torch.tensor([400.0]))


def test_agreement_compares_predictions_not_confidence() -> None:
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    student = torch.tensor([[0.1, 0.0], [0.0, 9.0], [-5.0, -4.0]])
    assert Classification(2).agreement(teacher, student).tolist() == [True, False, True]
