import dataclasses
from typing import Any

import pytest

from engine.config import EFFORTS, DistillationSettings, settings_for
from engine.errors import SSDKDError

CIFAR = (3, 32, 32)


@pytest.mark.parametrize("effort", EFFORTS)
def test_effort_sets_the_rounds_and_leaves_the_rest_at_its_default(effort: str) -> None:
    settings = settings_for(effort, image_shape=CIFAR)
    assert settings.rounds == EFFORTS[effort]
    changed = {
        field.name
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != getattr(DistillationSettings(), field.name)
    }
    assert changed <= {"rounds", "warmup_rounds"}


def test_efforts_grow_and_each_has_rounds_left_after_its_warm_up() -> None:
    assert list(EFFORTS.values()) == sorted(EFFORTS.values())
    warmups = {effort: settings_for(effort, image_shape=CIFAR).warmup_rounds for effort in EFFORTS}
    assert list(warmups.values()) == sorted(warmups.values())
    assert all(1 <= warmups[effort] <= rounds / 4 for effort, rounds in EFFORTS.items())


@pytest.mark.parametrize(
    ("image_shape", "batch"),
    [
        ((1, 16, 16), 64),
        ((3, 64, 128), 64),
        ((3, 96, 96), 56),
        ((3, 128, 128), 32),
        ((3, 224, 224), 16),
        ((3, 512, 512), 16),
    ],
)
def test_batches_shrink_with_the_area_of_large_images(image_shape: tuple[int, int, int], batch: int) -> None:
    settings = settings_for("quick", image_shape=image_shape)
    assert (settings.inversion_batch, settings.student_batch) == (batch, batch)


@pytest.mark.parametrize(
    ("image_shape", "samples", "batches"),
    [
        ((3, 32, 32), 5000, (256, 256)),
        ((3, 32, 32), 1000, (125, 256)),
        ((3, 32, 32), 200, (64, 256)),
        ((3, 64, 64), 5000, (128, 128)),
        ((3, 96, 96), 5000, (56, 56)),
        ((3, 224, 224), 5000, (16, 16)),
    ],
)
def test_where_batches_may_be_larger_only_small_images_make_them_so(
    image_shape: tuple[int, int, int], samples: int, batches: tuple[int, int]
) -> None:
    settings = settings_for("full", image_shape=image_shape, largest_batch=256, samples=samples)
    assert (settings.inversion_batch, settings.student_batch) == batches
    typed = settings_for("full", image_shape=image_shape, largest_batch=256, inversion_batch=20, student_batch=30)
    assert (typed.inversion_batch, typed.student_batch) == (20, 30)


def test_where_batches_may_be_larger_the_teacher_looks_on_to_the_end() -> None:
    usual = settings_for("full", image_shape=(3, 32, 32))
    assert (usual.student_steps, usual.looking_share, usual.leaves) == (40, 0.5, False)
    longer = settings_for("full", image_shape=(3, 224, 224), largest_batch=256)
    assert (longer.student_steps, longer.looking_share, longer.leaves) == (40, 1.0, True)
    typed = settings_for("full", image_shape=(3, 32, 32), largest_batch=256, student_steps=7, leaves=False)
    assert (typed.student_steps, typed.looking_share, typed.leaves) == (7, 1.0, False)


def test_overrides_win_over_effort_and_size() -> None:
    settings = settings_for(
        "smoke", image_shape=(3, 224, 224), rounds=77, student_batch=100, gamma=2, beta=0.5, priority=False
    )
    assert (settings.rounds, settings.student_batch, settings.inversion_batch) == (77, 100, 16)
    assert (settings.gamma, settings.beta, settings.priority) == (2, 0.5, False)
    assert isinstance(settings.gamma, float)


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ({"looking_share": 1.5}, "'looking_share' is 1.5: expected 0 or more, 1 at most", "correct"),
        ({"looking_share": 2}, "'looking_share' is 2: expected 0 or more, 1 at most", "correct"),
        ({"student_batch": 3}, "'student_batch' is 3: expected 4 or more", "correct"),
        ({"sample": 10}, "unknown distillation setting 'sample'", "samples"),
        ({"rounds": 1.5}, "'rounds' is 1.5: expected int", "config"),
        ({"rounds": "10"}, "'rounds' is '10': expected int", "config"),
        ({"gamma": "1"}, "'gamma' is '1': expected float", "config"),
        ({"replay": 1}, "'replay' is 1: expected bool", "config"),
        ({"replay": None}, "'replay' is None: expected bool", "config"),
    ],
)
def test_wrong_overrides_are_named(overrides: dict[str, object], message: str, hint: str) -> None:
    with pytest.raises(SSDKDError) as caught:
        settings_for("quick", image_shape=CIFAR, **overrides)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_unknown_effort_lists_the_known_ones() -> None:
    with pytest.raises(SSDKDError, match="unknown effort 'huge'") as caught:
        settings_for("huge", image_shape=CIFAR)
    assert all(effort in caught.value.hint for effort in EFFORTS)


def test_settings_cannot_change_during_a_run() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillationSettings().rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"samples": 50}, "holds 50 samples, one round makes 64"),
        ({"rounds": 0}, "'rounds' is 0: expected 1 or more"),
        ({"samples": -3}, "'samples' is -3"),
        ({"held_out": 1}, "'held_out' is 1: expected 2 or more"),
        ({"temperature": 0.0}, "'temperature' is 0.0: expected 0.01 or more"),
        ({"beta": -0.1}, "'beta' is -0.1: expected 0 or more"),
        ({"beta": float("nan")}, "'beta' is nan"),
        ({"rounds": 10**30}, "1,000,000,000 at most"),
        ({"gamma": 10**400}, "1,000,000,000 at most"),
        ({"rounds": True}, "'rounds' is True: expected int"),
        ({"rounds": 5, "warmup_rounds": 5}, "the student would never learn"),
    ],
)
def test_values_out_of_range_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SSDKDError) as raised:
        settings_for("full", image_shape=CIFAR, **overrides)
    assert message in raised.value.message


@pytest.mark.parametrize("name", ["feature_weight", "spread_weight", "looking_share", "shift"])
def test_what_may_be_nothing_may_be_written_as_zero(name: str) -> None:
    assert getattr(settings_for("quick", image_shape=CIFAR, **{name: 0}), name) == 0
