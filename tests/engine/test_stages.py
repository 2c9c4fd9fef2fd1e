from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from engine.features import teacher_maps
from engine.onnx_graph import read_onnx
from engine.probing import Logits
from engine.stages import ALL, EIGHTH, QUARTER, Stages, stages_of
from engine.students import build_network
from engine.torch_export import read_export
from engine.torchscript import Bare, read_torchscript
from engine.zoo import ZOO, resnet_cifar

SHAPE = (3, 16, 16)


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


def test_a_teacher_whose_output_is_put_into_form_has_the_stages_of_its_network() -> None:
    student, teacher = Once(1), Once(2)
    wrapped = Logits(teacher, probabilities=True, keeps_layout=False)
    stages = stages_of(student, wrapped, SHAPE, batch=4)
    assert names(stages, student, teacher) == [("stage", "stage")]
    inputs = torch.rand(4, *SHAPE)
    torch.testing.assert_close(teacher_maps(stages, inputs)[0], wrapped(inputs))  # logits, not probabilities


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        pytest.param("resnet20", "resnet8", [("layer1", "layer1"), ("layer2", "layer2")], id="a shorter one"),
        pytest.param("wrn16_1", "wrn10_1", [("block1", "block1"), ("block2", "block2")], id="a shorter wide one"),
        pytest.param("resnet8", "resnet20", [("layer1", "layer1"), ("layer2", "layer2")], id="a longer one"),
        pytest.param("wrn16_2", "wrn10_1", [("block1", "block1"), ("block2", "block2")], id="a narrower one"),
        pytest.param("resnet20", "vgg8", [("features.2", "layer1"), ("features.6", "layer2")], id="another family"),
        pytest.param("resnet20", "mobilenetv2", [("features.3", "layer1"), ("features.6", "layer2")], id="mobile"),
    ],
)
def test_the_last_maps_of_one_size_are_compared(teacher: str, student: str, expected: list[tuple[str, str]]) -> None:
    networks = build_network(student, classes=5, channels=3, pixels=16), ZOO[teacher](5, 3)
    stages = stages_of(*networks, SHAPE, batch=16)
    assert names(stages, *networks)[:2] == expected  # those of 16 and 8 px


def places(stages: Stages) -> str:
    """What is compared of each map, by its initial."""
    return "".join({str(EIGHTH): "E", str(QUARTER): "Q", str(ALL): "A"}[str(pair.places)] for pair in stages.pairs)


@pytest.mark.parametrize(
    ("batch", "expected"), [(1, "QA"), (4, "EAA"), (8, "EQA"), (16, "EEA"), (40, "EEAA"), (64, "EEAA"), (256, "EEEA")]
)
def test_as_little_is_compared_as_a_regressor_needs(batch: int, expected: str) -> None:
    student = build_network("mobilenetv2", classes=5, channels=3, pixels=32)
    teacher = ZOO["resnet18_cifar"](5, 3)  # of 32, 16, 8 and 4 px, where the student has 24, 32, 64 or 96, 160 or more
    assert places(stages_of(student, teacher, (3, 32, 32), batch=batch)) == expected


@pytest.mark.parametrize(("batch", "expected"), [(64, "EEA"), (256, "EEQA")])
def test_of_a_wide_map_with_few_positions_nothing_is_compared(batch: int, expected: str) -> None:
    student, teacher = ZOO["resnet18_cifar"](5, 3), ZOO["resnet34_cifar"](5, 3)
    assert places(stages_of(student, teacher, (3, 32, 32), batch=batch)) == expected  # the last has 512 channels, 4x4


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
        teacher_maps(stages_of(student, teacher, SHAPE, batch=64), images)
        for teacher in (network, write(network, images, tmp_path / "network"))
    )
    assert [tuple(maps.shape) for maps in found[1]] == [(1, 16, 8, 8), (2, 32, 8, 8), (2, 64, 4, 4)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_graph_of_bottlenecks_shows_the_map_before_the_convolution_that_halves_it(tmp_path: Path) -> None:
    network, shape = resnet50(num_classes=5).eval(), (3, 64, 64)
    graph = write_program(network, torch.rand(2, *shape), tmp_path / "network")
    student = build_network("vgg8", classes=5, channels=3, pixels=64)
    found = [
        [maps.shape[1] for maps in teacher_maps(stages_of(student, teacher, shape, batch=64), torch.rand(2, *shape))[1]]
        for teacher in (network, graph)
    ]
    assert found == [[64, 256, 512], [64, 128, 256]]  # inside the next stage's first block


def test_the_images_may_be_of_any_proportions() -> None:
    student = build_network("mobilenetv2", classes=5, channels=3, pixels=32)
    assert len(stages_of(student, ZOO["resnet8"](5, 3), (3, 17, 30), batch=16).pairs) == 3


def test_looking_for_stages_leaves_the_networks_as_they_were() -> None:
    student, teacher = resnet_cifar(5, 3, depth=8).train(), resnet_cifar(5, 3, depth=20).eval()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    stages_of(student, teacher, SHAPE, batch=4)
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
    assert names(stages_of(*networks, SHAPE, batch=16), *networks) == [("convolution", "convolution")]


@pytest.mark.parametrize("kind", [Twice, ChannelsLast])
def test_what_is_no_single_map_is_not_compared(kind: Callable[[int], nn.Module]) -> None:
    assert not stages_of(kind(1), kind(2), SHAPE, batch=4).pairs


@pytest.mark.parametrize(("kind", "expected"), [(InPairs, ("stage.0", "stage.1")), (OneBlock, ("block", "block"))])
def test_a_map_may_be_any_module_s(kind: Callable[[int], nn.Module], expected: tuple[str, str]) -> None:
    student, teacher = kind(1), kind(2)
    assert names(stages_of(student, teacher, SHAPE, batch=4), student, teacher) == [expected]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_has_no_maps_and_does_no_harm() -> None:
    student, teacher = build_network("vgg8", classes=5, channels=3, pixels=16), ZOO["resnet8"](5, 3).eval()
    expected = len(stages_of(student, teacher, SHAPE, batch=64).pairs)
    scripted = Bare(torch.jit.script(Once(2)))  # type: ignore[no-untyped-call]
    assert not stages_of(student, scripted, SHAPE, batch=64).pairs
    student.features[2] = torch.jit.script(nn.Identity())  # type: ignore[no-untyped-call,operator]
    assert len(stages_of(student, teacher, SHAPE, batch=64).pairs) == expected
    assert not any(module._forward_hooks for network in (student, scripted) for module in network.modules())
