import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.features import EPSILON, Unexplained, compared, solve, solve_by_products, teacher_maps
from engine.stages import ALL, EIGHTH, Pair, Places, Stages, stages_of
from engine.students import build_network
from engine.zoo import ZOO

SHAPE = (3, 16, 16)


class Staged(nn.Module):
    """A stage of 1x1 convolutions, then a ReLU that changes its map in place."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(blocks)))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.relu(self.stage(images)).mean((2, 3))
        return logits


def test_the_gradient_of_an_error_keeps_the_memory_layout_of_its_map() -> None:
    student, teacher = build_network("resnet8", classes=4, channels=3, pixels=16), ZOO["resnet14"](4, 3).eval()
    for network in (student, teacher):
        network.to(memory_format=torch.channels_last)
    stages, seen = stages_of(student, teacher, SHAPE, batch=4), []
    inputs = torch.randn(4, *SHAPE).contiguous(memory_format=torch.channels_last)
    _, maps = teacher_maps(stages, inputs)
    stages.pairs[-1].own.register_forward_hook(lambda _, __, output: seen.append(output))
    with compared(stages, maps, torch.ones(len(inputs))) as errors:
        student(inputs)
    (gradient,) = torch.autograd.grad(errors[-1].mean(), seen)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def standardised(maps: Tensor) -> Tensor:
    return F.batch_norm(maps, None, None, training=True)


def unexplained(features: Tensor, places: Places, target: Tensor) -> Tensor:
    """The same by PyTorch's own operations and gradients, the best weights held."""
    rows, wanted = (part.permute(0, 2, 3, 1).flatten(0, 2) for part in (standardised(features[places]), target))
    with torch.no_grad():
        matrix = rows.T @ rows / len(rows) + 0.01 * torch.eye(rows.shape[1])
        weights = torch.linalg.solve(matrix, rows.T @ wanted / len(rows))
    return (rows @ weights - wanted).square().unflatten(0, (len(target), -1)).mean((1, 2))


@pytest.mark.parametrize("places", [EIGHTH, ALL])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_unexplained_and_its_gradient(places: Places, layout: torch.memory_format) -> None:
    features = (3 * torch.randn(8, 5, 6, 7) + 1).contiguous(memory_format=layout).requires_grad_()
    target, upstream = standardised(torch.randn(8, 4, 6, 7)[places]), torch.rand(len(range(8)[places[0]]))
    found, expected = (function(features, places, target) for function in (Unexplained.apply, unexplained))
    torch.testing.assert_close(found, expected)
    of_found, of_expected = (torch.autograd.grad(value, features, upstream)[0] for value in (found, expected))
    assert of_expected.abs().max() > 1e-4
    torch.testing.assert_close(of_found, of_expected, atol=1e-6, rtol=1e-3)
    assert of_found.is_contiguous(memory_format=layout)


def test_maps_in_bfloat16_are_compared_in_float32_and_have_gradients_of_their_own_kind() -> None:
    features = torch.randn(8, 5, 6, 6).to(torch.bfloat16).requires_grad_()
    target = standardised(torch.randn(8, 4, 6, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Unexplained.apply(features, ALL, target)
    torch.testing.assert_close(found, unexplained(features.float(), ALL, target), check_dtype=True)
    (gradient,) = torch.autograd.grad(found.sum(), features)
    (expected,) = torch.autograd.grad(unexplained(features.float(), ALL, target).sum(), features)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-2)


def whole(student: "Staged", teacher: "Staged") -> Stages:
    """The ends of their stages, all of them."""
    return Stages(teacher, (Pair(student.stage, teacher.stage, ALL),))


def test_a_teachers_map_is_kept_as_it_is_before_what_follows_changes_it() -> None:
    student, teacher, images = Staged(1), Staged(2).eval(), torch.randn(4, *SHAPE)
    logits, (found,) = teacher_maps(whole(student, teacher), images)
    expected = teacher.stage(images)
    assert expected.min() < -0.1  # which the ReLU behind it takes away
    torch.testing.assert_close(logits, expected.relu().mean((2, 3)))
    variance, mean = torch.var_mean(expected, (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(found, (expected - mean) / (variance + EPSILON).sqrt(), atol=1e-3, rtol=1e-3)
    assert not found.requires_grad


class WithImages(nn.Conv2d):
    """Gives its images beside its map while it learns."""

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        maps = super().forward(images)
        return (maps, images) if self.training else maps


class OtherInTraining(nn.Module):
    """Two maps, of which the first, or both, are of another form while it learns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = (WithImages if kind == "a pair" else nn.Conv2d)(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        shown = images
        if self.training and self.kind == "smaller":
            shown = images[:, :, 2:, 2:]
        if self.training and self.kind == "of more images":
            shown = torch.cat((images, images))
        maps = self.first(shown)
        logits: Tensor = self.second(maps[0] if isinstance(maps, tuple) else maps).mean((2, 3))
        return logits[: len(images)]


@pytest.mark.parametrize(("kind", "left"), [("a pair", 1), ("smaller", 1), ("of more images", 0)])
def test_maps_that_are_others_in_training_are_left_out(kind: str, left: int) -> None:
    student, teacher = OtherInTraining(kind), ZOO["resnet8"](4, 3).eval()
    stages, inputs = stages_of(student, teacher, SHAPE, batch=16), torch.randn(16, *SHAPE)
    assert len(stages.pairs) == 2
    _, maps = teacher_maps(stages, inputs)
    with compared(stages, maps, torch.ones(len(inputs))) as errors:
        student.train()(inputs)
    assert len(errors) == left


def test_the_error_does_not_grow_with_the_students_weights() -> None:
    student, teacher = Staged(1), Staged(2)
    stages = whole(student, teacher)
    inputs = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    _, maps = teacher_maps(stages, inputs)
    found = []
    for factor in (100.0, 100.0):
        with torch.no_grad():
            student.stage[0].weight.mul_(factor)
        with compared(stages, maps, torch.ones(len(inputs))) as errors:
            student(inputs)
        (gradient,) = torch.autograd.grad(errors[0].sum(), student.stage[0].weight)
        found.append((errors[0].sum().detach(), gradient * factor if found else gradient))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-2)  # the gradient shrinks as they grow


def test_a_student_that_fails_keeps_no_hook() -> None:
    student, teacher = Staged(1), Staged(2)
    stages = whole(student, teacher)
    inputs = torch.randn(4, *SHAPE)
    _, maps = teacher_maps(stages, inputs)
    with pytest.raises(RuntimeError), compared(stages, maps, torch.ones(len(inputs))):
        student(torch.randn(4, 1, 16, 16))
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


def test_a_student_that_computes_the_same_misses_nothing() -> None:
    student, teacher = Staged(1), Staged(2)
    with torch.no_grad():
        product = teacher.stage[1].weight[:, :, 0, 0] @ teacher.stage[0].weight[:, :, 0, 0]
        student.stage[0].weight.copy_(product[:, :, None, None])
    stages = whole(student, teacher)
    inputs = torch.randn(4, *SHAPE)
    _, maps = teacher_maps(stages, inputs)
    with compared(stages, maps, torch.ones(len(inputs))) as errors:
        student(inputs)
    assert float(errors[0].detach()) < 2e-3  # what the ridge leaves


def test_the_error_is_what_no_linear_map_of_the_students_channels_explains() -> None:
    student, teacher = ZOO["vgg8"](4, 3), ZOO["resnet8"](4, 3).eval()
    stages, inputs, seen = stages_of(student, teacher, SHAPE, batch=32), torch.randn(32, *SHAPE), []
    stages.pairs[0].own.register_forward_hook(lambda _, __, output: seen.append(output.detach().clone()))
    _, maps = teacher_maps(stages, inputs)
    with compared(stages, maps, torch.ones(len(inputs))) as errors:
        student(inputs)
    rows, wanted = (part.permute(0, 2, 3, 1).flatten(0, 2) for part in (seen[0][EIGHTH], maps[0]))
    rows = torch.cat((rows, torch.ones(len(rows), 1)), 1)
    missed = wanted - rows @ torch.linalg.lstsq(rows, wanted).solution
    assert [error.shape for error in errors] == [()] * len(stages.pairs)
    assert 0.3 < missed.square().mean() < 0.99
    torch.testing.assert_close(errors[0], missed.square().mean(), atol=0.01, rtol=0)
    for image in (0, 5):  # of those compared, every second one
        with compared(stages, maps, 16 * F.one_hot(torch.tensor(2 * image), 32).float()) as errors:
            student(inputs)
        expected = missed.square().mean(1).unflatten(0, (16, -1)).mean(1)[image]
        torch.testing.assert_close(errors[0], expected, atol=0.03, rtol=0)


def test_a_student_that_has_the_teachers_channels_in_other_ones_misses_nothing() -> None:
    target = standardised(torch.randn(8, 6, 9, 9))
    mixed = torch.einsum("bchw,cd->bdhw", target, torch.randn(6, 10))
    assert Unexplained.apply(mixed, ALL, target).mean() < 0.01
    assert Unexplained.apply(torch.randn(8, 10, 9, 9), ALL, target).mean() > 0.95


def test_a_channel_that_is_the_same_everywhere_explains_nothing_and_harms_nothing() -> None:
    features, target = torch.randn(8, 3, 6, 6), standardised(torch.randn(8, 2, 6, 6))
    features[:, 1] = 7.0
    features.requires_grad_()
    found = Unexplained.apply(features, ALL, target)
    torch.testing.assert_close(found, unexplained(features[:, ::2], ALL, target))
    (gradient,) = torch.autograd.grad(found.sum(), features)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("channels", [1, 8, 320])
@pytest.mark.parametrize("kind", ["independent", "of low rank", "nearly equal"])
def test_a_system_is_solved_by_a_factorisation_and_by_products(channels: int, kind: str) -> None:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, channels if kind == "independent" else 1 + channels // 8, generator=draws)
    if kind == "of low rank":
        rows = rows @ torch.randn(rows.shape[1], channels, generator=draws)
    if kind == "nearly equal":
        rows = rows[:, :1] + 0.3 * torch.randn(2000, channels, generator=draws)
    matrix = torch.corrcoef(rows.T).reshape(channels, channels)
    wanted = matrix @ torch.randn(channels, 4, generator=draws)
    expected = torch.linalg.solve((matrix + 0.01 * torch.eye(channels)).double(), wanted.double())
    assert (solve(matrix, wanted) - expected).norm() < 1e-3 * expected.norm()
    found = solve_by_products(matrix + 0.01 * torch.eye(channels), wanted)
    assert (found - expected).norm() < 1e-2 * expected.norm()


def test_what_is_not_finite_stays_so_and_is_no_error() -> None:
    assert solve(torch.full((3, 3), torch.nan), torch.ones(3, 2)).isnan().all()


def test_the_gradient_is_zero_where_nothing_is_compared() -> None:
    student, teacher = build_network("resnet8", classes=4, channels=3, pixels=16), ZOO["resnet14"](4, 3).eval()
    stages, inputs = stages_of(student, teacher, SHAPE, batch=4), torch.randn(4, *SHAPE)
    seen: list[Tensor] = []
    _, maps = teacher_maps(stages, inputs)
    assert maps[0].shape == (2, 16, 8, 16)
    stages.pairs[0].own.register_forward_hook(lambda _, __, output: seen.append(output))
    with compared(stages, maps, torch.ones(len(inputs))) as errors:
        student(inputs)
    (gradient,) = torch.autograd.grad(errors[0].sum(), seen)
    assert gradient[1::2].abs().max() == 0
    assert gradient[:, :, 1::2].abs().max() == 0
    assert gradient[::2, :, ::2].abs().amax((1, 3)).min() > 0
