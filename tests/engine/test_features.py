from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.features import Stages, compared, shared_stages, teacher_maps
from engine.probing import Logits
from engine.zoo import ZOO, resnet_cifar

SHAPE = (3, 16, 16)


def names(stages: Stages | None, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    assert stages is not None
    own, theirs = ({module: name for name, module in network.named_modules()} for network in (student, teacher))
    return [(own[mine], theirs[other]) for mine, other in stages.pairs]


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
    assert stages is not None
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
    assert shared_stages(ZOO[student](5, 3), ZOO[teacher](5, 3), SHAPE) is None


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
    assert shared_stages(kind(1), kind(2), SHAPE) is None


class Staged(nn.Module):
    """A stage of 1x1 convolutions, then a ReLU that changes its map in place."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(blocks)))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.relu(self.stage(images)).mean((2, 3))
        return logits


def test_the_error_is_the_share_of_the_variance_that_is_missed() -> None:
    student, teacher = Staged(1), Staged(2)
    stages = shared_stages(student, teacher, SHAPE)
    assert stages is not None
    inputs = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    logits, maps = teacher_maps(stages, inputs)
    with compared(stages, maps) as errors:
        student_logits = student(inputs)
    with torch.no_grad():
        theirs, own = teacher.stage(inputs), student.stage(inputs)
    torch.testing.assert_close(maps[0], theirs)  # before the ReLU
    torch.testing.assert_close(logits, theirs.relu().mean((2, 3)))
    missed = (own - theirs).square().mean((1, 2, 3))
    torch.testing.assert_close(errors[0], missed / theirs.var((0, 2, 3)).mean())
    (errors[0].sum() + student_logits.sum()).backward()  # type: ignore[no-untyped-call]
    assert student.stage[0].weight.grad.abs().sum() > 0
    assert not maps[0].requires_grad


def test_a_student_that_fails_keeps_no_hook() -> None:
    student, teacher = Staged(1), Staged(2)
    stages = shared_stages(student, teacher, SHAPE)
    assert stages is not None
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
    assert stages is not None
    inputs = torch.randn(4, *SHAPE)
    _, maps = teacher_maps(stages, inputs)
    with compared(stages, maps) as errors:
        student(inputs)
    torch.testing.assert_close(errors[0], torch.zeros(4), atol=1e-6, rtol=0)
