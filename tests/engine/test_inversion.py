import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import channel_statistics
from engine.batchnorm import batchnorm_layers
from engine.channel_statistics import recorded_statistics
from engine.config import DistillationSettings
from engine.device import Compute
from engine.generator import Generator
from engine.images import normalization, to_input
from engine.inversion import InversionLosses, Inverter, invert, new_inverter, sample_weights
from engine.losses import batchnorm_loss, batchnorm_prior, flat_statistics
from engine.source import Source
from engine.task import Classification
from engine.zoo import resnet_cifar

CLASSES, IMAGE_SHAPE, BATCH = 4, (1, 16, 16), 24
COMPUTE = Compute(torch.device("cpu"), None)
CONSTANTS = normalization((0.5,), (0.25,), COMPUTE.device)
TARGETS = torch.arange(BATCH) % CLASSES
SETTINGS = DistillationSettings(
    inversion_batch=BATCH, inversion_steps=4, generator_width=4, generator_latent=16, student_steps=1
)


def network(seed: int) -> nn.Module:
    """A network whose BatchNorm layers have seen smooth images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = resnet_cifar(CLASSES, 1, depth=8, width=4)
        with torch.no_grad():
            for _ in range(30):
                module(nn.functional.interpolate(torch.randn(16, 1, 4, 4), (16, 16), mode="bilinear"))
    return module


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return network(0).eval().requires_grad_(False)


@pytest.fixture
def student() -> nn.Module:
    return network(1)


def inverter_of(
    teacher: nn.Module,
    student: nn.Module,
    *,
    generator: Generator | None = None,
    prior: bool = True,
    compute: Compute = COMPUTE,
    **changed: Any,
) -> Inverter:
    """An inverter with the settings that are `changed`; `generator` is shared with another, `prior` is BatchNorm's."""
    layers = tuple(batchnorm_layers(teacher)) if prior else ()
    source = Source(teacher, Classification(CLASSES), IMAGE_SHAPE, (0.5,), (0.25,), layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        inverter = new_inverter(source, student, settings=dataclasses.replace(SETTINGS, **changed), compute=compute)
    return dataclasses.replace(inverter, generator=generator or inverter.generator)


def run(
    teacher: nn.Module, student: nn.Module, *, seed: int = 0, adversarial_weight: float = 1.0, **changed: Any
) -> tuple[Tensor, InversionLosses, Inverter]:
    """One round of an inverter of its own; `changed` as in `inverter_of`."""
    inverter = inverter_of(teacher, student, **changed)
    images, losses = invert(
        inverter,
        TARGETS,
        class_counts=torch.tensor([3, 1, 0, 0]),
        adversarial_weight=adversarial_weight,
        rng=torch.Generator().manual_seed(seed),
    )
    return images, losses, inverter


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, after[name]) for name, value in before.items())


def test_images_are_bytes_of_the_shape_asked_for(teacher: nn.Module, student: nn.Module) -> None:
    images, losses, _ = run(teacher, student)
    assert images.shape == (BATCH, 16, 16, 1)
    assert images.dtype == torch.uint8
    assert images.float().std() > 20
    assert all(term.shape == () and term.isfinite() and not term.requires_grad for term in vars(losses).values())


def test_total_is_the_weighted_sum_of_the_terms(teacher: nn.Module, student: nn.Module) -> None:
    changed = {"batchnorm_weight": 3.0, "spread_weight": 7.0, "class_weight": 0.5}
    _, losses, _ = run(teacher, student, **changed, adversarial_weight=2.0)
    assert losses.spread > 0
    expected = 3.0 * losses.prior + 7.0 * losses.spread + 0.5 * losses.target + 2.0 * losses.adversarial
    torch.testing.assert_close(losses.total, expected)


@pytest.mark.parametrize("meta", [True, False])
def test_the_steps_of_a_round_lower_the_loss(meta: bool, teacher: nn.Module, student: nn.Module) -> None:
    _, first, _ = run(teacher, student, inversion_steps=1, adversarial_weight=0.0, meta=meta)
    _, last, _ = run(teacher, student, inversion_steps=12, adversarial_weight=0.0, meta=meta)
    assert last.total < 0.8 * first.total


def test_each_round_paints_over_leaves_of_its_own(teacher: nn.Module, student: nn.Module) -> None:
    inverter, counts, seen = inverter_of(teacher, student, leaves=True), torch.zeros(CLASSES, dtype=torch.int64), []
    for seed in (0, 1, 0):
        rng = torch.Generator().manual_seed(seed)
        images, _ = invert(inverter, TARGETS, class_counts=counts, adversarial_weight=0.0, rng=rng)
        assert inverter.problem.leaves is not None
        seen.append(inverter.problem.leaves.clone())
        each = seen[-1].flatten(1)
        assert each.std(1).min() > 1
        assert torch.cdist(each, each).fill_diagonal_(torch.inf).min() > 100
        like = torch.corrcoef(torch.stack((images.permute(0, 3, 1, 2).float().flatten(), each.flatten())))[0, 1]
        assert like > 0.8
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_images_come_nearer_to_the_teachers_statistics(teacher: nn.Module, student: nn.Module) -> None:
    prior = batchnorm_prior(batchnorm_layers(teacher))

    def distance(images: Tensor) -> float:
        with torch.no_grad(), recorded_statistics(prior.layers) as recorded:
            teacher(to_input(images, CONSTANTS))
        return batchnorm_loss(prior, flat_statistics(prior, recorded)).item()

    noise = torch.randint(256, (BATCH, 16, 16, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    few, _, _ = run(teacher, student, inversion_steps=1, adversarial_weight=0.0)
    many, _, _ = run(teacher, student, inversion_steps=20, adversarial_weight=0.0)
    assert distance(many) < 0.6 * distance(few)
    assert distance(many) < 0.3 * distance(noise)


@pytest.mark.parametrize("changed", [{}, {"adversarial_weight": 0.0}, {"spread_weight": 0.0}])
def test_a_device_that_freezes_batchnorm_makes_the_same_images(
    changed: dict[str, Any], teacher: nn.Module, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = run(teacher, student, **changed)
    asked: list[nn.Module] = []
    original = channel_statistics.WatchedBatchNorm.forward

    def noted(ctx: Any, features: Tensor, layer: Any, *rest: Any) -> Any:
        asked.append(layer)
        return original(ctx, features, layer, *rest)

    monkeypatch.setattr(Compute, "freezes_batchnorm", True)
    monkeypatch.setattr(channel_statistics.WatchedBatchNorm, "forward", staticmethod(noted))
    images, losses, _ = run(teacher, student, **changed)
    frozen = {layer for network in (teacher, student) for layer in network.modules() if layer in set(asked)}
    expected = (teacher, student) if changed.get("adversarial_weight", 1.0) else (teacher,)
    assert frozen == {layer for network in expected for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)}
    for own, theirs in zip(dataclasses.astuple(losses), dataclasses.astuple(usual[1]), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-2, atol=1e-4)
    assert (images.int() - usual[0].int()).abs().float().mean() < 1


def test_the_spread_term_makes_images_differ(teacher: nn.Module, student: nn.Module) -> None:
    def deviation(images: Tensor) -> float:
        return to_input(images, CONSTANTS).mean((2, 3)).std().item()

    changed = {"inversion_steps": 20, "adversarial_weight": 0.0}
    alike, off, inverter = run(teacher, student, spread_weight=0.0, **changed)
    apart, on, _ = run(teacher, student, spread_weight=100.0, **changed)
    assert inverter.problem.spread is None
    assert off.spread == 0
    _, unchanged, _ = run(teacher, student, spread_weight=1e-6, **changed)
    assert on.spread < 0.3 * unchanged.spread
    assert deviation(apart) > 1.2 * deviation(alike)


def test_the_class_term_makes_images_of_the_targets(teacher: nn.Module, student: nn.Module) -> None:
    changed = {"batchnorm_weight": 0.0, "class_weight": 1.0, "adversarial_weight": 0.0}
    _, first, _ = run(teacher, student, inversion_steps=1, **changed)
    images, last, _ = run(teacher, student, inversion_steps=40, **changed)
    assert last.target < 0.7 * first.target
    predicted = teacher(to_input(images, CONSTANTS)).argmax(1)
    assert (predicted == TARGETS).float().mean() > 0.6


def test_the_adversarial_term_drives_the_student_away(teacher: nn.Module, student: nn.Module) -> None:
    def apart(weight: float) -> float:
        changed = {"batchnorm_weight": 0.1, "class_weight": 0.0, "adversarial_weight": weight}
        images, losses, _ = run(teacher, student, inversion_steps=15, **changed)
        assert losses.adversarial <= 0
        inputs = to_input(images, CONSTANTS)
        with torch.no_grad():
            return Classification(CLASSES).discrepancy(teacher(inputs), student.eval()(inputs), 1.0).mean().item()

    assert apart(20.0) > 2 * apart(0.0)


def test_without_the_adversarial_term_the_student_is_not_run(teacher: nn.Module) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the student ran")

    student = network(1)
    student.register_forward_pre_hook(fail)
    _, losses, _ = run(teacher, student, adversarial_weight=0.0)
    assert losses.adversarial == 0
    with pytest.raises(AssertionError, match="the student ran"):
        run(teacher, student, adversarial_weight=1.0)


def test_where_the_student_never_agrees_there_is_nothing_to_drive_it_from(teacher: nn.Module) -> None:
    class Opposed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return -10 * teacher(images)

    _, losses, _ = run(teacher, Opposed())
    assert losses.adversarial == 0


def test_a_student_equal_to_the_teacher_has_no_adversarial_term(teacher: nn.Module) -> None:
    _, losses, _ = run(teacher, copy.deepcopy(teacher))
    assert losses.adversarial.abs() < 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_the_student_is_left_as_it_was(training: bool, teacher: nn.Module, student: nn.Module) -> None:
    student.train(training)
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = state_of(student)
    run(teacher, student)
    assert student.training is training
    assert all(module.training is training for module in student.modules())
    assert all((parameter.grad == 7).all() for parameter in student.parameters())
    assert same(before, state_of(student))


def test_a_student_without_gradients_gets_none(teacher: nn.Module, student: nn.Module) -> None:
    run(teacher, student)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_the_teacher_is_left_as_it_was(teacher: nn.Module, student: nn.Module) -> None:
    before = state_of(teacher)
    run(teacher, student)
    assert same(before, state_of(teacher))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_meta_step_moves_the_generator_so_that_the_next_round_starts_nearer(
    teacher: nn.Module, student: nn.Module
) -> None:
    generator = inverter_of(teacher, student).generator
    before = state_of(generator)
    starts = []
    for seed in range(6):
        _, losses, _ = run(
            teacher, student, inversion_steps=1, adversarial_weight=0.0, generator=generator, meta=False, seed=99
        )
        starts.append(losses.total.item())  # of the first step: what the generator offers
        run(teacher, student, adversarial_weight=0.0, generator=generator, seed=seed)
    moved = state_of(generator)
    assert all(not torch.equal(moved[name], before[name]) for name in before if name.endswith("weight"))
    assert starts[-1] < 0.8 * starts[0]


def test_the_generator_follows_its_fast_copy_by_the_meta_rate(teacher: nn.Module, student: nn.Module) -> None:
    before = state_of(inverter_of(teacher, student).generator)
    _, _, inverter = run(teacher, student, meta_rate=0.25)
    fast = dict(inverter.problem.fast_generator.named_parameters())
    for name, parameter in inverter.generator.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.25 * (fast[name] - before[name]), rtol=1e-4, atol=1e-6)
    assert not same(before, state_of(inverter.generator))


def round_of(inverter: Inverter, *, adversarial_weight: float = 1.0, seed: int = 0) -> Tensor:
    counts, rng = torch.tensor([3, 1, 0, 0]), torch.Generator().manual_seed(seed)
    return invert(inverter, TARGETS, class_counts=counts, adversarial_weight=adversarial_weight, rng=rng)[0]


def test_without_the_meta_step_every_round_starts_from_the_first_generator(
    teacher: nn.Module, student: nn.Module
) -> None:
    inverter = inverter_of(teacher, student, meta=False)
    before = state_of(inverter.generator)
    first = round_of(inverter)
    assert same(before, state_of(inverter.generator))
    assert torch.equal(first, round_of(inverter))  # the optimiser has forgotten the first round, too


def test_a_round_depends_on_what_it_is_given_and_on_nothing_of_the_round_before(
    teacher: nn.Module, student: nn.Module
) -> None:
    inverter = inverter_of(teacher, student, meta=False)
    first = round_of(inverter)
    assert not torch.equal(first, round_of(inverter, adversarial_weight=20.0))
    assert not torch.equal(first, round_of(inverter, seed=1))
    others = torch.roll(TARGETS, 1)
    rng = torch.Generator().manual_seed(0)
    shown, _ = invert(inverter, others, class_counts=torch.ones(CLASSES), adversarial_weight=1.0, rng=rng)
    assert not torch.equal(first, shown)
    assert torch.equal(first, round_of(inverter))


def test_the_same_generator_of_numbers_gives_the_same_images(teacher: nn.Module, student: nn.Module) -> None:
    torch.manual_seed(0)
    first, first_losses, _ = run(teacher, student)
    torch.manual_seed(1)
    again, again_losses, _ = run(teacher, student)
    other, _, _ = run(teacher, student, seed=1)
    assert torch.equal(first, again)
    assert all(torch.equal(term, getattr(again_losses, name)) for name, term in vars(first_losses).items())
    assert not torch.equal(first, other)


def test_a_teacher_without_batchnorm_gets_smooth_images_of_some_contrast(
    teacher: nn.Module, student: nn.Module
) -> None:
    _, first, _ = run(teacher, student, prior=False, inversion_steps=1, adversarial_weight=0.0)
    images, last, _ = run(teacher, student, prior=False, inversion_steps=30, adversarial_weight=0.0)
    assert last.prior < 0.6 * first.prior
    inputs = to_input(images, CONSTANTS)
    assert 0.4 < inputs.std() < 1.6
    assert inputs.diff(dim=3).square().mean() < 2 * 0.4 * inputs.var()  # independent pixels would give 2 var


def test_bfloat16_gives_nearly_the_losses_of_float32(teacher: nn.Module, student: nn.Module) -> None:
    compute = Compute(COMPUTE.device, torch.bfloat16)
    _, exact, _ = run(teacher, student, inversion_steps=1)
    images, near, _ = run(teacher, student, inversion_steps=1, compute=compute)
    assert images.dtype == torch.uint8
    for name in ("total", "prior", "spread", "target"):
        assert getattr(near, name).item() == pytest.approx(getattr(exact, name).item(), rel=0.05), name


def test_sample_weights_are_phi_with_mean_1() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 2.1972246], [2.1972246, 0.0], [0.0, 2.1972246]])  # 1/2, 9/10 ...
    counts = torch.tensor([3, 1])
    settings = dataclasses.replace(SETTINGS, gamma=1.0)
    phi = torch.tensor([0.25 * 0.5, 0.75 * 0.1, 0.25 * 0.1, 0.75 * 0.1])
    weights = sample_weights(logits, Classification(2), counts, settings)
    torch.testing.assert_close(weights[1:], (phi / phi.mean())[1:], rtol=1e-4, atol=0)
    assert weights.mean().item() == pytest.approx(1)
    off = dataclasses.replace(settings, diversity=False, difficulty=False)
    assert sample_weights(logits, Classification(2), counts, off).tolist() == [1, 1, 1, 1]


def test_sample_weights_stay_finite_where_one_class_has_the_whole_buffer() -> None:
    logits = torch.tensor([[90.0, 0.0], [90.0, 0.0]])
    weights = sample_weights(logits, Classification(2), torch.tensor([5, 0]), SETTINGS)
    assert weights.isfinite().all()


@pytest.mark.parametrize("spared", [0, 6, BATCH])
def test_spared_images_have_no_part_in_the_adversarial_term(teacher: nn.Module, spared: int) -> None:
    student = copy.deepcopy(teacher)  # which agrees on every image, and is less sure
    with torch.no_grad():
        student.linear.weight /= 2
    weights = {"batchnorm_weight": 0.0, "spread_weight": 0.0, "class_weight": 0.0}
    off = {**weights, "diversity": False, "difficulty": False, "meta": False}
    inverter = inverter_of(teacher, student, inversion_steps=1, **off)
    counts = torch.zeros(CLASSES, dtype=torch.int64)
    rng = torch.Generator().manual_seed(0)
    _, losses = invert(inverter, TARGETS, class_counts=counts, adversarial_weight=2.0, spared=spared, rng=rng)
    assert losses.total == pytest.approx(2 * float(losses.adversarial))

    rng = torch.Generator().manual_seed(0)
    _, without = invert(inverter, TARGETS, class_counts=counts, adversarial_weight=2.0, spared=0, rng=rng)
    share = float(losses.adversarial / without.adversarial)
    assert share == pytest.approx(1 - spared / BATCH, abs=0.1)
    assert (share == 0.0) is (spared == BATCH)
