from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from engine.features import teacher_maps
from engine.onnx_graph import read_onnx
from engine.probing import Logits
from engine.shapes import Shape
from engine.stages import ALL, Stages, stages_of
from engine.students import build_network
from engine.torch_export import read_export
from engine.torchscript import Bare, read_torchscript
from engine.zoo import ZOO, ResNet, resnet_cifar

SHAPE = (3, 16, 16)


def stages_between(student: nn.Module, teacher: nn.Module, shape: Shape, **keywords: Any) -> Stages:
    """`stages_of`, of a student all of whose parameters began as the teacher's."""
    return stages_of(student, teacher, shape, inherited=dict(student.named_parameters()), **keywords)


def names(stages: Stages, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    assert stages.pairs
    own, theirs = ({module: name for name, module in network.named_modules()} for network in (student, teacher))
    return [(own[pair.own], theirs[pair.theirs]) for pair in stages.pairs]


class Once(nn.Module):
    """A stage of convolutions, and their means."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(blocks)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.stage(images).mean((2, 3))
        return logits


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
    stages = stages_between(*networks, SHAPE, batch=4, places=ALL)
    assert names(stages, *networks) == [(name, name) for name in expected]
    assert all(pair.aligned for pair in stages.pairs)


def shaped(*blocks: int) -> nn.Module:
    """A ResNet of three stages with so many blocks in each."""
    return ResNet(5, 3, blocks=blocks, widths=(8, 16, 32), projection=True)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ((3, 1, 3), ["layer2", "layer3"]),  # the first is the teacher's own to begin with; none of the shortcuts
        ((2, 3, 3), ["layer1", "layer2", "layer3"]),
        ((3, 3, 1), ["layer3"]),
    ],
)
def test_behind_a_stage_with_fewer_blocks_whole_ones_follow(blocks: tuple[int, ...], expected: list[str]) -> None:
    networks = shaped(*blocks), shaped(3, 3, 3)
    stages = stages_between(*networks, SHAPE, batch=64, places=ALL)
    assert names(stages, *networks) == [(name, name) for name in expected]
    assert all(pair.aligned for pair in stages.pairs)


def test_what_holds_a_shorter_stage_is_no_stage_itself() -> None:
    def nested(blocks: int) -> nn.Module:
        inner = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(blocks)))
        means = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(nn.Sequential(inner, nn.Sequential(nn.Conv2d(3, 3, 1))), means)

    networks = nested(1), nested(2)
    stages = stages_between(*networks, SHAPE, batch=16, places=ALL)
    assert names(stages, *networks) == [("0.0", "0.0"), ("0.1", "0.1")]


@pytest.mark.parametrize("inherited", [(), ("conv1.weight", "layer1x.0.conv1.weight")])
@pytest.mark.parametrize("blocks", [(1, 1, 1), (3, 3, 3)])
def test_a_stage_that_began_afresh_has_channels_of_its_own(blocks: tuple[int, ...], inherited: tuple[str, ...]) -> None:
    student, teacher = shaped(*blocks), shaped(3, 3, 3)
    stages = stages_of(student, teacher, SHAPE, batch=64, inherited=inherited, places=ALL)
    assert len(stages.pairs) == 3
    assert not any(pair.aligned for pair in stages.pairs)


def test_a_teacher_whose_output_is_put_into_form_has_the_stages_of_its_network() -> None:
    student, teacher = Once(1), Once(2)
    wrapped = Logits(teacher, probabilities=True, keeps_layout=False)
    stages = stages_between(student, wrapped, SHAPE, batch=4, places=ALL)
    assert names(stages, student, teacher) == [("stage", "stage")]
    assert stages.pairs[0].aligned
    inputs = torch.rand(4, *SHAPE)
    torch.testing.assert_close(teacher_maps(stages, inputs)[0], wrapped(inputs))  # logits, not probabilities


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        pytest.param("resnet8", "resnet20", [("layer1", "layer1"), ("layer2", "layer2")], id="a longer one"),
        pytest.param("wrn16_2", "wrn10_1", [("block1", "block1"), ("block2", "block2")], id="a narrower one"),
        pytest.param("resnet20", "vgg8", [("features.2", "layer1"), ("features.6", "layer2")], id="another family"),
        pytest.param("resnet20", "mobilenetv2", [("features.3", "layer1"), ("features.6", "layer2")], id="mobile"),
    ],
)
def test_others_are_compared_where_maps_have_one_size(
    teacher: str, student: str, expected: list[tuple[str, str]]
) -> None:
    networks = build_network(student, classes=5, channels=3, pixels=16), ZOO[teacher](5, 3)
    stages = stages_between(*networks, SHAPE, batch=16, places=ALL)
    assert names(stages, *networks)[:2] == expected  # those of 16 and 8 px
    assert not any(pair.aligned for pair in stages.pairs)
    assert all(pair.standardised for pair in stages.pairs)


@pytest.mark.parametrize(("batch", "sizes"), [(1, 2), (3, 2), (4, 3), (39, 3), (40, 4)])
def test_a_map_has_enough_positions_for_its_channels(batch: int, sizes: int) -> None:
    student = build_network("mobilenetv2", classes=5, channels=3, pixels=32)
    teacher = ZOO["resnet18_cifar"](5, 3)  # of 32, 16, 8 and 4 px, where the student has 24, 32, 64 or 96, 160 or more
    assert len(stages_between(student, teacher, (3, 32, 32), batch=batch, places=ALL).pairs) == sizes


def test_positions_that_are_not_compared_do_not_count() -> None:
    student = build_network("mobilenetv2", classes=5, channels=3, pixels=32)
    found = [
        len(stages_between(student, ZOO["resnet18_cifar"](5, 3), (3, 32, 32), batch=batch).pairs)
        for batch in (158, 160)
    ]
    assert found == [3, 4]  # a quarter of them is


def write_program(network: nn.Module, images: Tensor, path: Path) -> nn.Module:
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)), path)
    return read_export(path, trust_pickle=False)[1].module


def write_script(network: nn.Module, images: Tensor, path: Path) -> nn.Module:
    torch.jit.trace(network, images).save(str(path))  # type: ignore[no-untyped-call]
    return read_torchscript(path, SHAPE)[1].module


def write_onnx(network: nn.Module, images: Tensor, path: Path) -> nn.Module:
    batch = {"dynamic_axes": {"images": {0: "batch"}}, "input_names": ["images"]}
    torch.onnx.export(network, (images,), str(path), dynamo=False, **batch)  # type: ignore[arg-type]
    return read_onnx(path)[1].module


@pytest.mark.parametrize("write", [write_program, write_script, write_onnx])
@pytest.mark.filterwarnings("ignore")  # of what PyTorch will write no more
def test_a_graph_of_plain_blocks_shows_the_maps_at_their_ends(
    write: Callable[[nn.Module, Tensor, Path], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, images = ZOO["resnet8"](5, 3).eval(), torch.rand(2, *SHAPE)
    student = build_network("vgg8", classes=5, channels=3, pixels=16)
    found, expected = (
        teacher_maps(stages_between(student, teacher, SHAPE, batch=64, places=ALL), images)
        for teacher in (network, write(network, images, tmp_path / "network"))
    )
    assert [tuple(maps.shape) for maps in found[1]] == [(2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_graph_of_bottlenecks_shows_the_map_before_the_convolution_that_halves_it(tmp_path: Path) -> None:
    network, shape = resnet50(num_classes=5).eval(), (3, 64, 64)
    graph = write_program(network, torch.rand(2, *shape), tmp_path / "network")
    student = build_network("vgg8", classes=5, channels=3, pixels=64)
    found = [
        [
            maps.shape[1]
            for maps in teacher_maps(stages_between(student, teacher, shape, batch=64), torch.rand(2, *shape))[1]
        ]
        for teacher in (network, graph)
    ]
    assert found == [[64, 256, 512], [64, 128, 256]]  # inside the next stage's first block


def test_the_images_may_be_of_any_proportions() -> None:
    student = build_network("mobilenetv2", classes=5, channels=3, pixels=32)
    assert len(stages_between(student, ZOO["resnet8"](5, 3), (3, 17, 30), batch=16, places=ALL).pairs) == 3


def test_looking_for_stages_leaves_the_networks_as_they_were() -> None:
    student, teacher = resnet_cifar(5, 3, depth=8).train(), resnet_cifar(5, 3, depth=20).eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    stages_between(student, teacher, SHAPE, batch=4, places=ALL)
    assert student.training
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


class Twice(Once):
    """Runs its one stage twice."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.stage(images))


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


class Attention(nn.Module):
    """A map [heads B, C, H, W], one [B, heads, H, W], and the one that is handed on."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.heads, self.weights = nn.Identity(), nn.Identity()
        self.convolution = nn.Conv2d(3, 8 * blocks, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.heads(self.convolution(images).unflatten(1, (2, -1)).flatten(0, 1))
        logits: Tensor = self.weights(maps.unflatten(0, (-1, 2)).sum(2).repeat(1, 3, 1, 1)).mean((2, 3))
        return logits


def test_attention_is_no_map() -> None:
    networks = Attention(1), Attention(2)
    assert names(stages_between(*networks, SHAPE, batch=16, places=ALL), *networks) == [("convolution", "convolution")]


@pytest.mark.parametrize("kind", [Twice, ChannelsLast])
def test_what_is_no_single_map_is_not_compared(kind: Callable[[int], nn.Module]) -> None:
    assert not stages_between(kind(1), kind(2), SHAPE, batch=4, places=ALL).pairs


@pytest.mark.parametrize(("kind", "expected"), [(InPairs, ("stage.0", "stage.1")), (OneBlock, ("block", "block"))])
def test_what_is_no_stage_has_no_channels_in_common(
    kind: Callable[[int], nn.Module], expected: tuple[str, str]
) -> None:
    student, teacher = kind(1), kind(2)
    stages = stages_between(student, teacher, SHAPE, batch=4, places=ALL)
    assert names(stages, student, teacher) == [expected]
    assert not stages.pairs[0].aligned


@pytest.mark.parametrize(
    ("teacher", "student", "grows"), [("resnet20", "resnet8", False), ("wrn16_1", "wrn10_1", True)]
)
def test_maps_grow_where_no_batchnorm_ends_the_stage(teacher: str, student: str, grows: bool) -> None:
    own = build_network(student, classes=10, channels=3, pixels=16)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    stages = stages_between(own, ZOO[teacher](10, 3), (3, 16, 16), batch=4, places=ALL)
    assert [pair.standardised for pair in stages.pairs] == [grows] * 3
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


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_has_no_maps_and_does_no_harm() -> None:
    student, teacher = build_network("vgg8", classes=5, channels=3, pixels=16), ZOO["resnet8"](5, 3).eval()
    expected = len(stages_between(student, teacher, SHAPE, batch=64, places=ALL).pairs)
    scripted = Bare(torch.jit.script(Once(2)))  # type: ignore[no-untyped-call]
    assert not stages_between(student, scripted, SHAPE, batch=64, places=ALL).pairs
    student.features[2] = torch.jit.script(nn.Identity())  # type: ignore[no-untyped-call,operator]
    assert len(stages_between(student, teacher, SHAPE, batch=64, places=ALL).pairs) == expected
    assert not any(module._forward_hooks for network in (student, scripted) for module in network.modules())


def test_what_a_student_drops_is_no_growth() -> None:
    assert [
        pair.standardised for pair in stages_between(Dropping(1), Dropping(2), SHAPE, batch=4, places=ALL).pairs
    ] == [False]


def test_a_map_grows_with_weights_that_are_computed_from_others() -> None:
    student = Once(1)
    nn.utils.parametrizations.weight_norm(student.stage[0])
    assert [pair.standardised for pair in stages_between(student, Once(2), SHAPE, batch=4, places=ALL).pairs] == [True]
