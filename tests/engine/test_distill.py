import dataclasses
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import distill as loop
from engine import replay
from engine.batchnorm import batchnorm_layers
from engine.config import DistillationSettings
from engine.device import Compute
from engine.distill import RoundMetrics, averaged_student, class_histogram, distill
from engine.errors import NonFiniteLossError
from engine.images import random_views, render, to_input
from engine.source import Source
from engine.state import State, start
from engine.task import Classification
from engine.teaching import averaged_tensors, rate_factor, update_average
from engine.zoo import resnet_cifar

CLASSES = 4
SETTINGS = DistillationSettings(
    rounds=4,
    samples=64,
    held_out=8,
    warmup_rounds=1,
    inversion_batch=32,
    inversion_steps=2,
    generator_width=4,
    generator_latent=16,
    student_batch=16,
    student_steps=3,
    rise_steps=1,
)


AGREEING = 9  # a seed with which these two random networks agree on some samples: only those have an adversarial term


def network(seed: int, classes: int = CLASSES, channels: int = 1, depth: int = 8) -> nn.Module:
    """A network whose BatchNorm layers have seen images."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = resnet_cifar(classes, channels, depth=depth, width=4)
        for _ in range(10):
            module(torch.randn(16, channels, 16, 16))
    return module


def begin(
    *,
    seed: int = AGREEING,
    teacher: nn.Module | None = None,
    image_shape: tuple[int, int, int] = (1, 16, 16),
    inherited: frozenset[str] = frozenset(),
    **changed: Any,
) -> State:
    channels = image_shape[0]
    teacher = teacher or network(0, channels=channels)
    source = Source(
        teacher,
        Classification(CLASSES),
        image_shape,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        batchnorm_layers=tuple(batchnorm_layers(teacher)),
    )
    return start(
        source,
        network(1, channels=channels),
        settings=dataclasses.replace(SETTINGS, **changed),
        compute=Compute(torch.device("cpu"), None),
        seed=seed,
        inherited=inherited,
    )


def finish(**changed: Any) -> tuple[State, list[RoundMetrics]]:
    state = begin(**changed)
    return state, list(distill(state))


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.fixture(scope="module")
def finished() -> tuple[State, list[RoundMetrics]]:
    """A run of the default method; tests only look at it."""
    return finish()


# What a run yields


def test_metrics_count_what_was_done(finished: tuple[State, list[RoundMetrics]]) -> None:
    state, metrics = finished
    assert [item.round for item in metrics] == [1, 2, 3, 4]
    assert {item.rounds for item in metrics} == {4}
    assert [item.phase for item in metrics] == ["warm-up", "distill", "distill", "distill"]
    assert [item.steps for item in metrics] == [0, 3, 6, 9]
    assert [item.images_seen for item in metrics] == [0, 48, 96, 144]
    assert [item.buffer_size for item in metrics] == [28, 56, 64, 64]  # 4 of 32 are held out, then 1
    assert (state.round, state.steps, state.images_seen) == (4, 9, 144)


def test_metrics_are_in_range(finished: tuple[State, list[RoundMetrics]]) -> None:
    _, metrics = finished
    for item in metrics:
        assert 0 <= item.agreement <= 100
        assert 0 <= item.class_balance <= 1
        assert item.prior_loss > 0
        assert item.class_loss > 0
        assert item.adversarial_loss <= 0
        assert math.isfinite(item.inversion_loss)
    assert metrics[0].spread_loss > 0  # a fresh generator's images are much alike
    assert math.isnan(metrics[0].distillation_loss)
    assert metrics[0].images_per_second == 0
    assert all(item.distillation_loss > 0 and item.images_per_second > 0 for item in metrics[1:])
    assert metrics[0].adversarial_loss == 0  # the student knows nothing yet
    seconds = [item.seconds for item in metrics]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert math.isnan(metrics[0].seconds_left)  # how long rounds take in which the student learns is not known
    assert all(item.seconds_left > 0 for item in metrics[1:-1])
    assert metrics[-1].seconds_left == 0


def test_agreement_is_that_of_the_kept_student_on_the_held_out_samples(
    finished: tuple[State, list[RoundMetrics]],
) -> None:
    state, metrics = finished
    images = to_input(state.held_out.images[: state.held_out.size], state.normalization)
    with torch.no_grad():
        agree = state.teacher(images).argmax(1) == averaged_student(state)(images).argmax(1)
    assert metrics[-1].agreement == pytest.approx(100 * agree.float().mean().item())


def test_class_balance_is_that_of_the_buffer(finished: tuple[State, list[RoundMetrics]]) -> None:
    state, metrics = finished
    histogram = class_histogram(state)
    assert len(histogram) == CLASSES
    assert sum(histogram) == 64
    assert metrics[-1].class_balance == pytest.approx(min(histogram) / max(histogram))


@pytest.mark.parametrize("alter", [True, False])
def test_the_buffer_holds_what_the_teacher_says(alter: bool) -> None:
    state, _ = finish(alter=alter, feature_weight=0.0)
    for buffer in (state.buffer, state.held_out):
        filled = torch.arange(buffer.size)
        for view in range(buffer.views.shape[1]):
            seen = render(buffer.images, filled, buffer.views[filled, view])
            with torch.no_grad():
                logits = state.teacher(to_input(seen, state.normalization))
            known = buffer.seen[filled, view]
            assert known.any()
            assert known.all() or alter
            torch.testing.assert_close(buffer.logits[filled, view][known], logits[known], atol=1e-4, rtol=1e-4)
        classes, confidences = state.task.predict(buffer.logits[filled, 0])
        assert torch.equal(buffer.classes[filled], classes)
        torch.testing.assert_close(buffer.confidences[filled], confidences)
        assert (buffer.views[filled, 0] == 0).all()  # the image itself
    assert state.buffer.views.shape[1] == state.settings.views
    assert (state.buffer.views[:, 1:] != 0).any()


def test_a_student_with_shorter_stages_learns_their_maps() -> None:
    state, metrics = finish(teacher=network(0, depth=14), rounds=8, looking_share=1.0)
    losses = [item.feature_loss for item in metrics]
    assert math.isnan(losses[0])
    assert 0 < losses[-1] < 0.9 * losses[1]
    assert state.buffer.seen[:, 0].all()
    assert not state.buffer.seen.all()  # the teacher was asked at each step, of the views that were drawn


def test_after_the_maps_the_teacher_s_kept_logits_are_enough() -> None:
    state = begin(teacher=network(0, depth=14), rounds=8, looking_share=0.5)
    asked: list[int] = []
    state.teacher.register_forward_hook(lambda _, inputs, output: asked.append(len(output)))
    per_round, losses = [], []
    for item in distill(state):
        per_round.append(len(asked))
        losses.append(item.feature_loss)
        asked.clear()
    assert all(loss > 0 for loss in losses[1:4])
    assert losses[4:] == [0.0] * 4
    settings = state.settings
    inner = settings.inversion_steps
    assert per_round[1:4] == [inner + 1 + settings.student_steps] * 3  # a look at each new image, and one a step
    assert per_round[4:] == [inner + settings.views] * 4  # a look at each view of the new ones
    known = state.buffer.seen.nonzero()
    for slot, view in known[::7].tolist():
        image = render(state.buffer.images, torch.tensor([slot]), state.buffer.views[slot, view][None])
        with torch.no_grad():
            logits = state.teacher(to_input(image, state.normalization))
        torch.testing.assert_close(state.buffer.logits[slot, view], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", [8, 14])
def test_without_the_weight_no_map_is_compared(depth: int) -> None:
    _, metrics = finish(teacher=network(0, depth=depth), feature_weight=0.0)
    assert [item.feature_loss for item in metrics[1:]] == [0.0, 0.0, 0.0]


def test_no_slot_has_a_place_of_its_own_in_a_batch() -> None:
    state = begin()
    for _ in distill(state):
        pass
    assert state.buffer.size == state.buffer.capacity
    plain, drawn = torch.zeros(2, state.buffer.size)
    for _ in range(400):
        loop.draw(state, any_view=True)
        drawn += batch_counts(state.batch.slots, state.buffer.size)
        plain += batch_counts(state.batch.slots[1::2], state.buffer.size)
    often = drawn >= 50
    assert often.sum() > 20
    shares = plain[often] / drawn[often]
    assert shares.min() > 0.25
    assert shares.max() < 0.75


def batch_counts(slots: Tensor, size: int) -> Tensor:
    return torch.bincount(slots, minlength=size).float()


def test_without_maps_and_altered_images_the_teacher_never_looks_on() -> None:
    state, _ = finish(alter=False, feature_weight=0.0)
    assert state.buffer.seen.all()
    assert not state.batch.numbers.equal(torch.zeros_like(state.batch.numbers))  # drawn all the same: one order for all


def test_only_images_as_they_are_count_for_priorities_and_are_remembered() -> None:
    state = begin(rounds=8, looking_share=1.0, student_steps=1)
    rounds = distill(state)
    next(rounds)  # the warm-up
    buffer = state.buffer
    for _ in range(3):
        before = buffer.discrepancies.clone(), buffer.logits.clone(), buffer.born.clone()
        next(rounds)
        batch, old = state.batch, buffer.born == before[2]  # those that this round did not replace
        plain = set(batch.slots[1::2].tolist())
        moved = ((buffer.discrepancies != before[0]) & old).nonzero().flatten().tolist()
        known = ((buffer.logits != before[1]).flatten(1).any(1) & old).nonzero().flatten().tolist()
        assert set(moved) <= plain
        assert set(known) <= plain
        assert plain & {*moved} or not plain & {*old.nonzero().flatten().tolist()}
    slots = batch.slots[1::2]
    inputs = to_input(render(buffer.images, slots, buffer.views[slots, batch.views[1::2]]), state.normalization)
    with torch.no_grad():
        expected = state.teacher(inputs)
    torch.testing.assert_close(buffer.logits[slots, batch.views[1::2]], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_once", [3, 50, 1000])
def test_the_teacher_says_the_same_however_many_views_it_gets_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = begin()
    images = torch.randint(256, (5, 16, 16, 1), generator=state.rng, dtype=torch.uint8)
    views = random_views(5, 4, 3, state.rng)
    usual = loop.teacher_logits(state, images, views)
    monkeypatch.setattr(Compute, "at_once", lambda compute, batch: at_once)
    torch.testing.assert_close(loop.teacher_logits(state, images, views), usual)
    seen = render(images, torch.arange(5), views[:, 2])
    torch.testing.assert_close(usual[:, 2], state.teacher(to_input(seen, state.normalization)))


def test_the_student_learns_what_the_teacher_says() -> None:
    state = begin(rounds=12, student_steps=12, student_rate=0.05)

    def apart(student: nn.Module) -> float:
        images = to_input(state.held_out.images[: state.held_out.size], state.normalization)
        with torch.no_grad():
            return state.task.discrepancy(state.teacher(images), student(images), 4.0).mean().item()

    metrics = list(distill(state))
    assert apart(averaged_student(state)) < 0.5 * apart(network(1).eval())
    assert metrics[-1].distillation_loss < 0.5 * metrics[1].distillation_loss


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (2, 17, 23), (4, 16, 16)], ids=str)
def test_other_sizes_and_channels(image_shape: tuple[int, int, int]) -> None:
    channels, height, width = image_shape
    state, metrics = finish(image_shape=image_shape, rounds=2)
    assert state.buffer.images.shape == (64, height, width, channels)
    assert metrics[-1].distillation_loss > 0
    assert state.buffer.views[..., :2].abs().max() == round(state.settings.shift * min(height, width) / 32)


def test_a_teacher_without_batchnorm_runs() -> None:
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    state, metrics = finish(teacher=teacher)
    assert state.inverter.problem.prior is None
    assert all(math.isfinite(item.inversion_loss) and item.prior_loss > 0 for item in metrics)
    assert all(item.spread_loss == 0 for item in metrics)


# Repeatability


@pytest.fixture
def _two_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


def test_threads_are_chosen_once_a_round() -> None:
    state = begin()
    looks: list[int] = []
    state.compute.threads.choose = lambda: looks.append(state.round)  # type: ignore[method-assign]
    list(distill(state))
    assert looks == [0, 1, 2, 3]


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("depth", [8, 14])
def test_the_same_seed_gives_the_same_student_bit_for_bit(depth: int) -> None:
    (first, first_metrics), (again, again_metrics) = (finish(seed=3, teacher=network(0, depth=depth)) for _ in range(2))
    assert same(copy_of(first.student), copy_of(again.student))
    assert same(copy_of(averaged_student(first)), copy_of(averaged_student(again)))
    assert same(copy_of(first.inverter.generator), copy_of(again.inverter.generator))
    for buffer, other in ((first.buffer, again.buffer), (first.held_out, again.held_out)):
        for name, value in vars(buffer).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(other, name))), name
    timed = {"seconds", "seconds_left", "images_per_second"}
    for item, other_item in zip(first_metrics, again_metrics, strict=True):
        for name, value in dataclasses.asdict(item).items():
            assert name in timed or value == getattr(other_item, name) or math.isnan(value), name


def test_another_seed_gives_another_student(finished: tuple[State, list[RoundMetrics]]) -> None:
    other, _ = finish(seed=1)
    assert not same(copy_of(finished[0].student), copy_of(other.student))
    assert not rows(finished[0].buffer.images) & rows(other.buffer.images)


# The time and the learning rate


def test_the_rate_falls_to_nothing_as_a_half_cosine() -> None:
    assert rate_factor(0) == 1
    assert rate_factor(0.5) == pytest.approx(0.5)
    assert rate_factor(0.75) == pytest.approx(0.146447, abs=1e-6)
    assert rate_factor(1) == pytest.approx(0, abs=1e-12)
    steps = [rate_factor(step / 200) for step in range(201)]
    assert steps == sorted(steps, reverse=True)


def rates(state: State, **limits: float) -> list[float]:
    return [state.optimizer.param_groups[0]["lr"] for _ in distill(state, **limits)]


def test_the_rate_of_each_round_follows_the_rounds() -> None:
    found = rates(begin(rounds=5, warmup_rounds=0, student_rate=0.1))
    assert found == pytest.approx([0.1 * rate_factor(done / 5) for done in range(5)])


def test_the_rate_rises_over_the_first_steps_and_then_falls_with_the_run() -> None:
    state = begin(rounds=5, warmup_rounds=0, student_rate=0.1, student_steps=1, rise_steps=4)
    risen = [0.25, 0.5, 0.75, 1, 1]
    assert rates(state) == pytest.approx([0.1 * rate_factor(done / 5) * share for done, share in enumerate(risen)])


def test_inherited_layers_learn_at_their_own_rate() -> None:
    state = begin(inherited=frozenset({"conv1.weight", "linear.bias"}), student_rate=0.4, inherited_rate=0.0)
    before = copy_of(state.student)
    list(distill(state))
    unmoved = {
        name
        for name, _ in state.student.named_parameters()
        if torch.equal(before[name], state.student.get_parameter(name))
    }
    assert unmoved == {"conv1.weight", "linear.bias"}
    new, old = state.optimizer.param_groups
    assert new["lr"] == pytest.approx(0.4 * rate_factor(3 / 4))
    assert (old["lr"], len(old["params"])) == (0, 2)


def test_a_time_limit_ends_the_run_and_takes_the_rate_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    state = begin(rounds=1000, student_rate=0.1, warmup_rounds=0, student_steps=1)
    assert state.seconds > 0  # what it took to get here is counted
    state.seconds = 0.0
    found = rates(state, time_limit_seconds=60.0)  # a round looks at the clock twice
    assert 28 <= state.round <= 32
    assert state.hurried
    assert max(found) == 0.1
    assert found[-1] < 0.002
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(("limit", "rounds"), [(42.0, 4), (43.0, 5), (51.0, 5)])
def test_a_time_limit_ends_the_run_with_the_round_that_is_nearest(
    limit: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10_000, 5))  # a round takes 5 s, and who shows it as long
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    state = begin(rounds=1000, warmup_rounds=0, student_steps=1)
    state.seconds = 0.0
    metrics = list(distill(state, time_limit_seconds=limit))
    assert (len(metrics), metrics[-1].seconds) == (rounds, 10.0 * rounds)
    assert metrics[-1].seconds_left == 0
    assert state.hurried


def test_a_run_that_goes_on_under_a_time_limit_goes_on_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    state = begin(rounds=1000, student_rate=0.1, warmup_rounds=0, student_steps=1)
    for _ in range(20):
        next(distill(state, time_limit_seconds=60.0))
    before = state.optimizer.param_groups[0]["lr"]
    next(distill(state, time_limit_seconds=60.0))
    assert state.optimizer.param_groups[0]["lr"] < before < 0.05


def test_a_time_limit_that_is_not_reached_changes_nothing(finished: tuple[State, list[RoundMetrics]]) -> None:
    state = begin()
    assert len(list(distill(state, time_limit_seconds=1e9))) == 4
    assert not state.hurried
    assert same(copy_of(state.student), copy_of(finished[0].student))


def test_a_warm_up_takes_a_fifth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    state = begin(rounds=1000, warmup_rounds=100, student_steps=1)
    phases = [item.phase for item in distill(state, time_limit_seconds=60.0)]  # a round looks at the clock twice
    first = phases.index("distill")
    assert 6 <= first <= 7
    assert set(phases[first:]) == {"distill"}
    assert state.steps == len(phases) - first


def test_time_left_under_a_limit_is_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    for item in distill(begin(rounds=1000, warmup_rounds=100), time_limit_seconds=30.0):
        assert item.seconds_left == pytest.approx(max(0.0, 30 - item.seconds))


def test_time_left_is_reckoned_with_the_rounds_in_which_the_student_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(seconds: float, stage: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any) -> Any:
            now[0] += seconds
            return stage(*arguments)

        return slow

    monkeypatch.setattr(loop, "synthesize", taking(1, loop.synthesize))
    monkeypatch.setattr(loop, "teach", taking(5, loop.teach))
    settings = {"rounds": 6, "warmup_rounds": 3, "student_steps": 1}
    state = begin(**settings)
    rounds = distill(state)
    lefts = [next(rounds).seconds_left for _ in range(4)]
    assert [math.isnan(left) for left in lefts] == [True, True, True, False]
    assert lefts[3] == 12
    rounds.close()
    assert [item.seconds_left for item in distill(state)] == [6, 0]  # taken up again
    limited = begin(**settings)
    limited.seconds = 0.0
    lefts = [item.seconds_left for item in distill(limited, time_limit_seconds=100.0)]
    assert lefts == [99, 98, 97, 12, 6, 0]


# The parts of the method, each switched off


def generator_moves(**changed: Any) -> bool:
    state = begin(**changed)
    before = copy_of(state.inverter.generator)
    list(distill(state))
    return not same(before, copy_of(state.inverter.generator))


def test_without_the_meta_step_the_generator_stays() -> None:
    assert generator_moves()
    assert not generator_moves(meta=False)


def test_without_replay_the_buffer_grows_and_forgets_nothing() -> None:
    state, metrics = finish(replay=False)
    assert [item.buffer_size for item in metrics] == [28, 56, 87, 118]
    assert state.buffer.capacity >= 118
    assert state.buffer.born[:118].tolist() == list(range(118))


def test_with_replay_some_early_samples_stay_and_some_go(finished: tuple[State, list[RoundMetrics]]) -> None:
    born = set(finished[0].buffer.born.tolist())
    assert len(born) == 64
    assert set(range(87, 118)) <= born  # the newest are all there
    assert 0 < len(born & set(range(60))) < 60


def test_without_inversion_the_samples_are_noise() -> None:
    state, metrics = finish(inversion=False)
    values = state.buffer.images.float()
    assert values.mean().item() == pytest.approx(127.5, abs=3)
    assert values.std().item() == pytest.approx(73.9, abs=2)
    assert state.buffer.images.unique().numel() == 256
    neighbours = values[:, :, 1:].flatten(), values[:, :, :-1].flatten()
    assert torch.corrcoef(torch.stack(neighbours))[0, 1].abs() < 0.05
    for item in metrics:
        assert item.inversion_loss == item.prior_loss == item.spread_loss == item.class_loss == 0
        assert item.adversarial_loss == 0
    assert metrics[-1].distillation_loss > 0
    assert not generator_moves(inversion=False)


def test_noise_depends_on_the_seed_of_the_run_alone() -> None:
    first, again = begin(inversion=False), begin(inversion=False)
    torch.manual_seed(1)
    noise, _ = loop.random_images(first, 4)
    assert torch.equal(noise, loop.random_images(again, 4)[0])


def test_without_priorities_no_draw_is_weighted(finished: tuple[State, list[RoundMetrics]]) -> None:
    state, _ = finish(priority=False)
    assert (state.buffer.weights == 1).all()
    assert (finished[0].buffer.weights != 1).any()


def test_importance_weights_weigh_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    state = crowded(student_steps=1)
    slots, weights = torch.arange(16), torch.linspace(0.1, 3.0, 16)
    monkeypatch.setattr(replay, "sample", lambda *_, **__: (slots, weights))
    state.buffer.images.random_(generator=state.rng)
    losses = loop.teach(state, 0.5)
    divergences = state.buffer.discrepancies[slots]  # of the first draw: nothing has weighed them yet
    loss = losses[0, 0]
    torch.testing.assert_close(loss, (weights * divergences).sum() / weights.sum())
    assert (loss - divergences.mean()).abs() > 1e-3 * loss
    assert torch.equal(state.buffer.weights[slots], weights)


def test_without_the_adversarial_weight_the_term_is_absent(finished: tuple[State, list[RoundMetrics]]) -> None:
    _, metrics = finish(adversarial_weight=0.0)
    assert all(item.adversarial_loss == 0 for item in metrics)
    assert any(item.adversarial_loss < 0 for item in finished[1])


def test_the_adversarial_weight_waits_for_the_warm_up_then_falls_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    original = loop.invert

    def invert(*arguments: Any, adversarial_weight: float, **named: Any) -> Any:
        asked.append(adversarial_weight)
        return original(*arguments, adversarial_weight=adversarial_weight, **named)

    monkeypatch.setattr(loop, "invert", invert)
    finish(rounds=4, warmup_rounds=1, adversarial_weight=2.0)
    assert asked == [0.0, 1.5, 1.0, 0.5]


def test_the_images_that_are_held_out_are_those_that_were_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    spared: list[Tensor] = []
    original = loop.invert

    def invert(*arguments: Any, **named: Any) -> Any:
        images, losses = original(*arguments, **named)
        spared.append(images[: named["spared"]])
        return images, losses

    monkeypatch.setattr(loop, "invert", invert)
    state, _ = finish(rounds=3)
    assert [len(images) for images in spared] == [4, 4, 1]  # of 32: an eighth until eight are held out, then less
    newest = state.held_out.images[state.held_out.born.argsort()]
    assert torch.equal(newest, torch.cat(spared)[-8:])


def crowded(**changed: Any) -> State:
    """A state whose full buffer holds 61 samples of class 0 and one of each other class."""
    state = begin(**changed)
    images = torch.zeros(64, 16, 16, 1, dtype=torch.uint8)
    classes = torch.tensor([0] * 30 + [1, 2, 3] + [0] * 31)
    confidences = torch.linspace(0.0, 0.63, 64)
    views = torch.zeros(64, state.settings.views, 3, dtype=torch.int64)
    logits = torch.randn(64, state.settings.views, CLASSES, generator=state.rng)
    replay.add(state.buffer, torch.arange(64), images, views, logits, classes, confidences)
    return state


def test_diversity_asks_for_the_rare_classes_first() -> None:
    assert loop.choose_targets(crowded()).bincount(minlength=4).tolist()[0] == 0
    targets = loop.choose_targets(crowded(diversity=False, inversion_batch=4000)).bincount(minlength=4)
    assert ((targets - 1000).abs() < 120).all()


@pytest.mark.parametrize(
    ("diversity", "difficulty", "value"),
    [
        (True, True, lambda share, confidence: (1 - share) * (1 - confidence)),
        (True, False, lambda share, confidence: 1 - share),
        (False, True, lambda share, confidence: 1 - confidence),
    ],
)
def test_samples_are_worth_their_phi(diversity: bool, difficulty: bool, value: Callable[[float, float], float]) -> None:
    state = crowded(diversity=diversity, difficulty=difficulty)
    shares = [61 / 64] * 30 + [1 / 64] * 3 + [61 / 64] * 31
    expected = [value(share, confidence) for share, confidence in zip(shares, state.buffer.confidences, strict=True)]
    torch.testing.assert_close(loop.kept_values(state, state.buffer), torch.tensor(expected))


def test_without_phi_the_oldest_samples_go_first() -> None:
    state = crowded(diversity=False, difficulty=False)
    assert loop.kept_values(state, state.buffer).tolist() == list(range(64))
    born = finish(diversity=False, difficulty=False)[0].buffer.born
    assert sorted(born.tolist()) == list(range(54, 118))


def test_remembering_replaces_easy_samples_of_crowded_classes() -> None:
    state = crowded()
    loop.remember(state, torch.randint(256, (16, 16, 16, 1), dtype=torch.uint8, generator=state.rng), 0.5)
    replaced = [slot for slot, born in enumerate(state.buffer.born.tolist()) if born >= 64]
    assert replaced == list(range(50, 64))  # the most confident of class 0; two of 16 are held out
    assert state.held_out.size == 2


@pytest.mark.parametrize(
    "off",
    [
        {"diversity": False, "difficulty": False, "priority": False, "meta": False, "replay": False},
        {"gamma": 3.0},
        {"gamma": 0.0, "beta": 1.0},
        {"temperature": 1.0},
        {"spread_weight": 0.0},
    ],
    ids=str,
)
def test_each_setting_gives_another_student(off: dict[str, Any], finished: tuple[State, list[RoundMetrics]]) -> None:
    state, metrics = finish(**off)
    assert math.isfinite(metrics[-1].distillation_loss)
    assert not same(copy_of(state.student), copy_of(finished[0].student))


# Held-out samples


def test_held_out_samples_are_never_in_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: set[bytes] = set()
    held_out: set[bytes] = set()
    state = begin(rounds=6)
    for _ in distill(state):
        trained |= rows(state.buffer.images[: state.buffer.size])
        held_out |= rows(state.held_out.images[: state.held_out.size])
    assert len(held_out) == 12  # four of 32 a round, one once there are eight
    assert state.held_out.born.tolist() == [8, 9, 10, 11, 4, 5, 6, 7]  # the newest eight
    assert not trained & held_out


# What must not happen


@pytest.mark.parametrize("depth", [8, 14])
def test_the_teacher_is_left_as_it_was(depth: int) -> None:
    teacher = network(0, depth=depth)
    before = copy_of(teacher)
    list(distill(begin(teacher=teacher)))
    assert same(before, copy_of(teacher))
    assert not teacher.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("depth", [8, 14])
def test_a_run_that_is_left_half_way_leaves_no_hooks(depth: int) -> None:
    state = begin(teacher=network(0, depth=depth))
    rounds = distill(state)
    next(rounds)
    next(rounds)
    rounds.close()
    for module in (*state.teacher.modules(), *state.student.modules()):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


class ForbidReading(TorchDispatchMode):
    """Fails at what would make the host wait on a GPU: reading a value, or a shape that depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2")

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in self.FORBIDDEN or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            raise AssertionError(f"the host waits for {name}")
        return function(*args, **(kwargs or {}))


def test_forbidding_to_read_works() -> None:
    with pytest.raises(AssertionError, match="the host waits"), ForbidReading():
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError, match="the host waits"), ForbidReading():
        torch.arange(3)[torch.tensor([True, False, True])]


def test_nothing_in_a_round_reads_a_value_before_its_metrics() -> None:
    state = begin()
    list(distill(state))
    with ForbidReading():
        images, _ = loop.synthesize(state, loop.choose_targets(state), 0.5)
        loop.remember(state, images, 0.5)
        loop.teach(state, 0.5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(("good_rounds", "warmup"), [(0, 1), (1, 3), (2, 1)])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_round(
    poison: float, good_rounds: int, warmup: int
) -> None:
    state = begin(warmup_rounds=warmup)
    rounds = distill(state)
    for _ in range(good_rounds):
        next(rounds)
    nn.init.constant_(state.teacher.get_submodule("linear").bias, poison)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteLossError, match=rf"not finite in round {good_rounds + 1}\b") as caught:
        next(rounds)
    # No rate of the student's can be at fault where it has not learned yet.
    in_warmup = good_rounds < warmup
    assert ("student_rate" in caught.value.hint) != in_warmup
    assert ("--std" in caught.value.hint and "ssdkd inspect" in caught.value.hint) == in_warmup
    assert ("before the student's first step" in caught.value.message) == in_warmup


def test_a_student_that_diverges_stops_the_run() -> None:
    with pytest.raises(NonFiniteLossError, match=r"in round [23]\b"):
        finish(student_rate=1e18)


# The student that is kept


def test_the_kept_student_is_a_float32_copy_on_the_cpu_in_eval_mode(
    finished: tuple[State, list[RoundMetrics]],
) -> None:
    state, _ = finished
    kept = averaged_student(state)
    assert not any(module.training for module in kept.modules())
    assert same(copy_of(kept), copy_of(state.average))
    assert not same(copy_of(kept), copy_of(state.student))
    for name, value in kept.state_dict().items():
        assert value.device.type == "cpu", name
        assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32), name
        assert value.is_contiguous(), name
    before = copy_of(state.average)
    nn.init.zeros_(kept.get_parameter("linear.weight"))
    assert same(before, copy_of(state.average))


def test_the_average_forgets_soon_at_first_and_then_as_its_decay_says() -> None:
    average, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(average.weight, 100.0)
    for step, value in enumerate((2.0, 4.0, 9.0)):
        nn.init.constant_(student.weight, value)
        update_average(averaged_tensors(average), averaged_tensors(student), 0.5, step)
    # the first is taken whole, 10/11 of the second, 10/12 of the third
    assert average.weight.item() == pytest.approx(((2 + 4 * 10) / 11 + 9 * 5) / 6)
    for step, share in ((10, 0.5), (90, 0.1), (990, 0.01), (10**6, 0.01)):
        nn.init.zeros_(average.weight)
        update_average(averaged_tensors(average), averaged_tensors(student), 0.99, step)
        assert average.weight.item() == pytest.approx(9 * share)


def test_the_average_follows_the_statistics_of_batchnorm_too() -> None:
    average, student = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    student.running_mean, student.num_batches_tracked = torch.tensor([1.0, 2.0]), torch.tensor(7)
    update_average(averaged_tensors(average), averaged_tensors(student), 0.99, 0)
    assert torch.equal(torch.as_tensor(average.running_mean), torch.tensor([1.0, 2.0]))
    assert average.num_batches_tracked == 0


def test_a_student_that_was_not_taught_is_kept_as_it_came() -> None:
    state, metrics = finish(rounds=1)
    assert [item.phase for item in metrics] == ["warm-up"]
    assert same(copy_of(averaged_student(state)), copy_of(network(1)))


# A teacher that does not know all classes


def test_a_dead_class_shows_in_the_histogram() -> None:
    teacher = network(0)
    with torch.no_grad():
        teacher.get_parameter("linear.bias")[2] = -1000
    state, metrics = finish(teacher=teacher)
    histogram = class_histogram(state)
    assert histogram[2] == 0
    assert sum(histogram) == 64
    assert {item.class_balance for item in metrics} == {0.0}


def test_a_collapsed_teacher_shows_in_the_histogram() -> None:
    teacher = network(0)
    with torch.no_grad():
        teacher.get_parameter("linear.bias")[1] = 1000
    state, metrics = finish(teacher=teacher)
    assert class_histogram(state) == [0, 64, 0, 0]
    assert all(math.isfinite(item.inversion_loss) for item in metrics)
