from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.features import Stages, compared, shared_stages, teacher_maps
from engine.probing import Logits
from engine.students import build_network
from engine.zoo import ZOO, resnet_cifar

SHAPE = (3, 16, 16)


def names(stages: Stages, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    assert stages.pairs
    own, theirs = ({module: name for name, module in network.named_modules()} for network in (student, teacher))
    return [(own[pair.own], theirs[pair.theirs]) for pair in stages.pairs]


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ("resnet20", "resnet8", ["layer1", "layer2", "layer3"]),
        ("wrn16_1", "wrn10_1", ["block1.layer", "block2.layer", "block3.layer"]),
        ("resnet34_cifar", "resnet18_cifar", ["layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_the_stages_are_those_with_fewer_blocks(teacher: str, student: str, expected: list[str]) -> None:
    networks = ZOO[student](5, 3), ZOO[teacher](5, 3)
    assert names(shared_stages(*networks, SHAPE), *networks) == [(name, name) for name in expected]


def test_a_teacher_whose_output_is_put_into_form_has_the_stages_of_its_network() -> None:
    student, teacher = Staged(1), Staged(2)
    wrapped = Logits(teacher, probabilities=True, keeps_layout=False)
    stages = shared_stages(student, wrapped, SHAPE)
    assert names(stages, student, teacher) == [("stage", "stage")]
    assert stages.pairs
    inputs = torch.rand(4, *SHAPE)
    torch.testing.assert_close(teacher_maps(stages, inputs)[0], wrapped(inputs))  # logits, not probabilities


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        pytest.param("resnet8", "resnet8", id="the same"),
        pytest.param("resnet8", "resnet20", id="a longer one"),
        pytest.param("wrn16_2", "wrn10_1", id="a narrower one"),
        pytest.param("resnet20", "vgg8", id="another family"),
    ],
)
def test_others_share_none(teacher: str, student: str) -> None:
    assert not shared_stages(ZOO[student](5, 3), ZOO[teacher](5, 3), SHAPE).pairs


def test_looking_for_stages_leaves_the_networks_as_they_were() -> None:
    student, teacher = resnet_cifar(5, 3, depth=8).train(), resnet_cifar(5, 3, depth=20).eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    shared_stages(student, teacher, SHAPE)
    assert student.training
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


class Twice(nn.Module):
    """Runs its one stage twice."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(blocks)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.stage(self.stage(images)).mean((2, 3))
        return logits


class OfPairs(nn.Sequential):
    """Gives two maps."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(images), images


class InPairs(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stage = OfPairs(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(blocks)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.stage(images)[0].mean((2, 3))
        return logits


class ChannelsLast(nn.Module):
    """A stage whose maps are [B, H, W, C], as Swin's are."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(*(nn.Linear(3, 3) for _ in range(blocks)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.stage(images.permute(0, 2, 3, 1)).mean((1, 2))
        return logits


class Block(nn.Module):
    """One convolution, or two: a part of a block is missing, no block of a stage."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        if parts > 1:
            self.second = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        for part in self.children():
            images = part(images)
        return images


class OneBlock(nn.Module):
    def __init__(self, parts: int) -> None:
        super().__init__()
        self.block = Block(parts)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.block(images).mean((2, 3))
        return logits


@pytest.mark.parametrize("kind", [Twice, InPairs, ChannelsLast, OneBlock])
def test_what_is_no_single_map_is_not_compared(kind: Callable[[int], nn.Module]) -> None:
    assert not shared_stages(kind(1), kind(2), SHAPE).pairs


class Staged(nn.Module):
    """A stage of 1x1 convolutions, then a ReLU that changes its map in place."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(blocks)))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.relu(self.stage(images)).mean((2, 3))
        return logits


@pytest.mark.parametrize(
    ("teacher", "student", "grows"), [("resnet20", "resnet8", False), ("wrn16_1", "wrn10_1", True)]
)
def test_maps_grow_where_no_batchnorm_ends_the_stage(teacher: str, student: str, grows: bool) -> None:
    own = build_network(student, classes=10, channels=3, pixels=16)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    stages = shared_stages(own, ZOO[teacher](10, 3), (3, 16, 16))
    assert [pair.grows for pair in stages.pairs] == [grows] * 3
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


class Dropping(nn.Module):
    """A network that forgets some of each image while it learns."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.stage = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(blocks)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.stage(self.dropout(images)).mean((2, 3))
        return logits


def test_what_a_student_drops_is_no_growth() -> None:
    assert [pair.grows for pair in shared_stages(Dropping(1), Dropping(2), SHAPE).pairs] == [False]


def test_a_map_grows_with_weights_that_are_computed_from_others() -> None:
    student = Staged(1)
    nn.utils.parametrizations.weight_norm(student.stage[0])
    assert [pair.grows for pair in shared_stages(student, Staged(2), SHAPE).pairs] == [True]


def test_maps_that_do_not_grow_miss_a_share_of_the_variance() -> None:
    student, teacher = build_network("resnet8", classes=4, channels=3, pixels=16), ZOO["resnet14"](4, 3).eval()
    stages = shared_stages(student, teacher, SHAPE)
    assert [pair.grows for pair in stages.pairs] == [False] * 3
    inputs, seen = torch.randn(4, *SHAPE), []
    _, maps = teacher_maps(stages, inputs)
    handle = stages.pairs[1].own.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with compared(stages, maps) as errors:
        student(inputs)
    handle.remove()
    missed = (seen[0] - maps[1]).square().mean((1, 2, 3))
    torch.testing.assert_close(errors[1], missed / maps[1].var((0, 2, 3), correction=0).mean())


def test_the_gradient_of_an_error_keeps_the_memory_layout_of_its_map() -> None:
    student, teacher = build_network("resnet8", classes=4, channels=3, pixels=16), ZOO["resnet14"](4, 3).eval()
    for network in (student, teacher):
        network.to(memory_format=torch.channels_last)
    stages, seen = shared_stages(student, teacher, SHAPE), []
    inputs = torch.randn(4, *SHAPE).contiguous(memory_format=torch.channels_last)
    _, maps = teacher_maps(stages, inputs)
    stages.pairs[-1].own.register_forward_hook(lambda _, __, output: seen.append(output))
    with compared(stages, maps) as errors:
        student(inputs)
    (gradient,) = torch.autograd.grad(errors[-1].mean(), seen)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_a_student_whose_maps_grow_does_not_run_away() -> None:
    torch.manual_seed(0)
    student, teacher = build_network("wrn16_2", classes=4, channels=3, pixels=16), ZOO["wrn40_2"](4, 3)
    for _ in range(10):
        teacher(torch.randn(16, *SHAPE))
    stages, inputs = shared_stages(student, teacher.eval(), SHAPE), torch.randn(64, *SHAPE)
    _, maps = teacher_maps(stages, inputs)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    losses = []
    for _ in range(8):
        with compared(stages, maps) as errors:
            student(inputs)
        loss = 10 * torch.stack(errors).sum(0).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)  # 4e32 after six steps, were they not standardised
    assert losses[-1] < 0.75 * losses[0]


def test_the_error_is_one_less_the_correlation_of_the_channels() -> None:
    student, teacher = Staged(1), Staged(2)
    stages = shared_stages(student, teacher, SHAPE)
    assert stages.pairs
    inputs = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    logits, maps = teacher_maps(stages, inputs)
    with compared(stages, maps) as errors:
        student_logits = student(inputs)
    with torch.no_grad():
        theirs, own = teacher.stage(inputs), student.stage(inputs)
    channels = [(theirs[:, channel].flatten(), own[:, channel].flatten()) for channel in range(3)]
    torch.testing.assert_close(logits, theirs.relu().mean((2, 3)))
    for channel, (their, _) in enumerate(channels):  # before the ReLU
        expected = (their - their.mean()) / their.std(correction=0)
        torch.testing.assert_close(maps[0][:, channel].flatten(), expected, atol=1e-3, rtol=1e-3)
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in channels]
    assert errors[0].shape == (4,)
    torch.testing.assert_close(errors[0].mean(), 1 - torch.stack(correlations).mean(), atol=1e-3, rtol=1e-3)
    (errors[0].sum() + student_logits.sum()).backward()  # type: ignore[no-untyped-call]
    assert student.stage[0].weight.grad.abs().sum() > 0
    assert not maps[0].requires_grad


def test_the_error_does_not_grow_with_the_students_weights() -> None:
    student, teacher = Staged(1), Staged(2)
    stages = shared_stages(student, teacher, SHAPE)
    assert stages.pairs
    inputs = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    _, maps = teacher_maps(stages, inputs)
    found = []
    for factor in (100.0, 100.0):
        with torch.no_grad():
            student.stage[0].weight.mul_(factor)
        with compared(stages, maps) as errors:
            student(inputs)
        (gradient,) = torch.autograd.grad(errors[0].sum(), student.stage[0].weight)
        found.append((errors[0].sum().detach(), gradient * factor if found else gradient))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-2)  # the gradient shrinks as they grow


def test_a_student_that_fails_keeps_no_hook() -> None:
    student, teacher = Staged(1), Staged(2)
    stages = shared_stages(student, teacher, SHAPE)
    assert stages.pairs
    _, maps = teacher_maps(stages, torch.randn(4, *SHAPE))
    with pytest.raises(RuntimeError), compared(stages, maps):
        student(torch.randn(4, 1, 16, 16))
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


def test_a_student_that_computes_the_same_misses_nothing() -> None:
    student, teacher = Staged(1), Staged(2)
    with torch.no_grad():
        product = teacher.stage[1].weight[:, :, 0, 0] @ teacher.stage[0].weight[:, :, 0, 0]
        student.stage[0].weight.copy_(product[:, :, None, None])
    stages = shared_stages(student, teacher, SHAPE)
    assert stages.pairs
    inputs = torch.randn(4, *SHAPE)
    _, maps = teacher_maps(stages, inputs)
    with compared(stages, maps) as errors:
        student(inputs)
    torch.testing.assert_close(errors[0], torch.zeros(4), atol=1e-6, rtol=0)
