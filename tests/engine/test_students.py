import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from engine.errors import SSDKDError
from engine.students import OTHER_TASKS, STUDENTS, build_network, build_student, network_names, published_networks
from engine.teacher import Preprocessing, Teacher, TeacherSpec
from engine.zoo import resnet_cifar

USUAL = [
    *("mobilenetv2", "mobilenetv3_small", "shufflenetv2", "efficientnet_lite0"),
    *("resnet8", "resnet20", "resnet18", "wrn16_1", "wrn16_2", "wrn40_1", "vgg8"),
]


def teacher_of(
    module: nn.Module, *, arch: str = "resnet8", classes: int = 5, shape: tuple[int, int, int] = (1, 16, 16)
) -> Teacher:
    spec = TeacherSpec(
        path="teacher.pt",
        sha256="0" * 64,
        size_bytes=1,
        format="state_dict",
        arch=arch,
        arch_evidence="stated with --arch",
        input_shape=shape,
        classes=classes,
        class_names=None,
        preprocessing=Preprocessing((0.5,) * shape[0], (0.5,) * shape[0], "default"),
        batchnorm_layers=7,
        parameters=1,
        warnings=(),
    )
    return Teacher(module.eval().requires_grad_(False), spec)


@pytest.fixture
def teacher() -> Teacher:
    network = resnet_cifar(5, 1, depth=8, width=4)
    network(torch.randn(8, 1, 16, 16))  # so that the running statistics are not those of a fresh network
    return teacher_of(network)


def last_map(network: nn.Module, channels: int, pixels: int) -> int:
    """Height of the maps that the last BatchNorm sees."""
    sizes: list[int] = []
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    hook = layers[-1].register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape[-1]))
    assert network.eval()(torch.empty(2, channels, pixels, pixels, device="meta")).shape == (2, 7)
    hook.remove()
    return sizes[0]


def test_the_usual_students_are_in_the_table() -> None:
    assert set(USUAL) <= set(STUDENTS)
    assert all(entry.summary for entry in STUDENTS.values())


@pytest.mark.parametrize("name", STUDENTS)
def test_each_student_keeps_enough_positions_at_every_size(name: str) -> None:
    with torch.device("meta"):
        small, medium, large = (STUDENTS[name].build(7, 1, pixels) for pixels in (32, 64, 224))
        sizes = last_map(small, 1, 32), last_map(medium, 1, 64), last_map(large, 1, 224)
        assert STUDENTS[name].build(7, 4, 16).eval()(torch.empty(2, 4, 16, 16)).shape == (2, 7)
    assert sizes in ([(2, 4, 14)] if name.startswith("vgg") else [(4, 8, 7), (8, 16, 14)])


@pytest.mark.parametrize("name", STUDENTS)
def test_each_student_trains_in_bfloat16_and_channels_last(name: str) -> None:
    student = build_student(name, teacher=teacher_of(nn.Identity(), shape=(3, 16, 16)))
    student = student.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(student(images).float(), torch.arange(4))
    loss.backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", ["wrn16_1", "same", "efficientnet_lite0"])
def test_the_seed_decides_the_weights_and_nothing_global_changes(teacher: Teacher, name: str) -> None:
    torch.manual_seed(3)
    before, before_python = torch.get_rng_state(), random.getstate()
    first, second, other = (build_student(name, teacher=teacher, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == before_python
    assert all(torch.equal(first[layer], second[layer]) for layer in first)
    assert any(not torch.equal(first[layer], other[layer]) for layer in first)


def test_a_student_comes_ready_to_train(teacher: Teacher) -> None:
    student = build_student("mobilenetv3_small", teacher=teacher)
    assert all(layer.training for layer in student.modules())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in student.parameters())
    assert {layer.momentum for layer in student.modules() if isinstance(layer, nn.BatchNorm2d)} == {0.1}


def test_same_is_a_fresh_copy_of_the_teacher(teacher: Teacher) -> None:
    original = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    student = build_student("same", teacher=teacher)
    assert {name: value.shape for name, value in student.state_dict().items()} == {
        name: value.shape for name, value in original.items()
    }
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            assert name.endswith(("bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")) or not torch.equal(
                parameter, original[name]
            )
            parameter.add_(1)
    assert not student.bn1.running_mean.any()  # type: ignore[union-attr, operator]
    assert teacher.module.bn1.running_mean.any()  # type: ignore[union-attr, operator]
    assert all(torch.equal(value, original[name]) for name, value in teacher.module.state_dict().items())


class WithEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.arange(256.0).view(1, 1, 16, 16))
        self.fc = nn.Linear(256, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc((images + self.embedding).flatten(1))  # type: ignore[no-any-return]


def test_same_shuffles_what_nobody_can_initialise() -> None:
    teacher = teacher_of(WithEmbedding(), arch="WithEmbedding")
    embedding = build_student("same", teacher=teacher).embedding
    assert isinstance(embedding, nn.Parameter)
    assert not torch.equal(embedding, teacher.module.embedding)  # type: ignore[arg-type]
    assert torch.equal(embedding.flatten().sort().values, torch.arange(256.0))


def test_same_needs_layers() -> None:
    with pytest.raises(SSDKDError, match="bare graph") as caught:
        build_student("same", teacher=teacher_of(WithEmbedding(), arch="graph"))
    assert "--arch" in caught.value.hint


def test_starts_from_given_weights(teacher: Teacher, tmp_path: Path) -> None:
    trained = build_student("resnet8", teacher=teacher, seed=7).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in trained.items()}}, tmp_path / "student.pt")
    student = build_student("resnet8", teacher=teacher, weights=tmp_path / "student.pt", seed=0).state_dict()
    assert all(torch.equal(student[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear.weight": torch.zeros(9, 64)}, r"linear.weight is \[9, 64\], expected \[5, 64\]"),
        ({"linear.weight": None}, "linear.weight is missing"),
        ({"extra.weight": torch.zeros(2, 2)}, "extra.weight is not in resnet8"),
        ({"linear.bias": torch.full((5,), torch.nan)}, "linear.bias has values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    teacher: Teacher, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state = {**build_student("resnet8", teacher=teacher).state_dict(), **change}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "student.pt")
    with pytest.raises(SSDKDError, match=message) as caught:
        build_student("resnet8", teacher=teacher, weights=tmp_path / "student.pt")
    assert "--student-weights" in caught.value.hint


def test_a_file_of_the_user_s_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/nets.py").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("nets", "mine.nets"):
        with pytest.raises(SSDKDError, match=f"no network called '{name}'") as caught:
            build_network(name, classes=2, channels=3, pixels=32)
        assert f"{name}:FUNCTION" in caught.value.hint


@pytest.mark.parametrize(
    ("typed", "meant"), [("mobilnetv2", "mobilenetv2"), ("ResNet-8", "resnet8"), ("resnet500", "resnet50")]
)
def test_an_unknown_name_gets_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(SSDKDError, match=f"no network called '{typed}'") as caught:
        build_network(typed, classes=5, channels=3, pixels=32)
    assert f"did you mean {meant}" in caught.value.hint or f" {meant}" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("fasterrcnn_resnet50_fpn", "a network for object detection"),
        ("torchvision/deeplabv3_resnet50", "a network for segmentation"),
        ("raft_large", "a network for optical flow"),
        ("r3d_18", "a network for video"),
        ("quantized_resnet18", "a quantized network"),
    ],
)
def test_torchvisions_networks_for_other_tasks_are_called_what_they_are(name: str, what: str) -> None:
    with pytest.raises(SSDKDError, match=f"{name.removeprefix('torchvision/')} is {what}: expected a") as caught:
        build_network(name, classes=5, channels=3, pixels=32)
    assert "ssdkd students" in caught.value.hint


def test_every_network_of_torchvisions_is_a_classifier_or_is_called_what_it_is() -> None:
    packages = {models.get_model_builder(name).__module__.split(".")[2] for name in models.list_models()}
    classifiers = {
        models.get_model_builder(name).__module__.split(".")[2] for name in models.list_models(module=models)
    }
    assert packages - classifiers == set(OTHER_TASKS)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(SSDKDError) as caught:
        build_network("qqqqqq", classes=5, channels=3, pixels=32)
    assert "ssdkd students" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["resnet56", "wrn28_10", "squeezenet1_1", "timm/resnet18", "mobilenetv2_050", "googlenet"]
)
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_published_networks_follow_classes_and_channels(name: str, channels: int) -> None:
    with torch.device("meta"):
        network = build_network(name, classes=7, channels=channels, pixels=96).eval()
        assert network(torch.empty(2, channels, 96, 96)).shape == (2, 7)


def test_a_name_can_say_whose_network_it_means() -> None:
    assert list(published_networks("resnet18")) == ["torchvision/resnet18", "timm/resnet18"]
    assert list(published_networks("vgg16")) == ["zoo/vgg16", "torchvision/vgg16", "timm/vgg16"]
    assert list(published_networks("timm/vgg16")) == ["timm/vgg16"]
    assert published_networks("zoo/resnet18") == {}
    with torch.device("meta"):
        ours, theirs = (
            build_network(f"{source}/vgg16", classes=5, channels=3, pixels=32) for source in ("zoo", "torchvision")
        )
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in ours.modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in theirs.modules())


def test_published_networks_do_not_depend_on_the_size_of_the_image() -> None:
    with torch.device("meta"):
        assert build_network("mobilenet_v2", classes=5, channels=3, pixels=32).features[0][0].stride == (2, 2)  # type: ignore[index, union-attr]


def test_network_names_has_each_source_once() -> None:
    names = network_names()
    assert {"mobilenetv2", "resnet110_b", "squeezenet1_1", "efficientnet_lite0", "convnext_atto"} <= set(names)
    assert len(names) == len(set(names))


def test_a_size_that_the_network_cannot_take_is_said(teacher: Teacher) -> None:
    with pytest.raises(SSDKDError, match="the student alexnet cannot take images of 1x16x16") as caught:
        build_student("alexnet", teacher=teacher)
    assert "ssdkd students" in caught.value.hint


def test_other_outputs_than_logits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Teacher
) -> None:
    source = """
from torch import nn
def ten(): return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
"""
    (tmp_path / "other_students.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SSDKDError, match=r"gives \[2, 10\] for 2 images of 1x16x16: expected logits of shape \[2, 5\]"):
        build_student("other_students:ten", teacher=teacher)
    ten = replace(teacher, spec=replace(teacher.spec, classes=10))
    assert build_student("other_students:ten", teacher=ten)(torch.zeros(3, 1, 16, 16)).shape == (3, 10)


USERS_STUDENTS = """
from torch import nn


class LeNet(nn.Module):
    def __init__(self, classes, flatten, heads):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 4, stride=3), nn.BatchNorm2d(6), nn.Linear(6 * 5 * 5, classes)
        self.flatten, self.heads = flatten, heads

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = self.fc(x.flatten(1) if self.flatten else x.view(x.size(0), -1))
        return (x, x) if self.training and self.heads > 1 else x


def view(classes): return LeNet(classes, False, 1)
def flatten(classes): return LeNet(classes, True, 1)
def frozen(classes): return flatten(classes).requires_grad_(False)


def with_a_frozen_layer(classes):
    student = flatten(classes)
    student.conv.requires_grad_(False)
    return student


def two_heads(classes): return LeNet(classes, True, 2)
def of_two_inputs(classes): return nn.Bilinear(2, 2, classes)
"""


def test_a_student_is_tried_as_it_will_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Teacher
) -> None:
    (tmp_path / "users_students.py").write_text(USERS_STUDENTS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SSDKDError, match=r"view cannot be trained on images of 1x16x16 in channels_last") as caught:
        build_student("users_students:view", teacher=teacher)
    assert "flatten(1)" in caught.value.hint
    with pytest.raises(SSDKDError, match=r"of_two_inputs cannot take images of 1x16x16: .*missing 1 required"):
        build_student("users_students:of_two_inputs", teacher=teacher)
    with pytest.raises(SSDKDError, match="two_heads gives tuple in train mode"):
        build_student("users_students:two_heads", teacher=teacher)
    with pytest.raises(SSDKDError, match="frozen has no parameter that can learn"):
        build_student("users_students:frozen", teacher=teacher)
    student = build_student("users_students:flatten", teacher=teacher)
    assert student.training
    assert not student.norm.running_mean.any()  # type: ignore[union-attr, operator]
    assert student.norm.num_batches_tracked == 0  # type: ignore[union-attr]
    assert student.conv.weight.is_contiguous()  # type: ignore[union-attr, operator]


def test_a_student_shares_nothing_with_its_teacher(monkeypatch: pytest.MonkeyPatch, teacher: Teacher) -> None:
    monkeypatch.setattr(
        "engine.students.build_network", lambda *_, **__: nn.Sequential(teacher.module.requires_grad_(True))
    )
    student = build_student("users_students:around_the_teacher", teacher=teacher)
    assert not {*student.modules()} & {*teacher.module.modules()}
    assert not {*student.parameters()} & {*teacher.module.parameters()}
    assert not teacher.module.training


class ChangesItsReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.conv(images))
        maps[:, :2] = 0
        return maps.mean((2, 3))


def test_a_student_without_gradients_is_refused(monkeypatch: pytest.MonkeyPatch, teacher: Teacher) -> None:
    monkeypatch.setattr("engine.students.build_network", lambda *_, **__: ChangesItsReLU())
    with pytest.raises(SSDKDError, match=r"cannot be trained on images of 1x16x16 .*modified by an inplace") as caught:
        build_student("users_students:changes_its_relu", teacher=teacher)
    assert "change nothing in place" in caught.value.hint


def test_what_the_user_froze_stays_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: Teacher) -> None:
    (tmp_path / "freezing_students.py").write_text(USERS_STUDENTS)
    monkeypatch.chdir(tmp_path)
    student = build_student("freezing_students:with_a_frozen_layer", teacher=teacher)
    learns = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    assert {name for name, able in learns.items() if not able} == {"conv.weight", "conv.bias"}
    assert all(parameter.requires_grad for parameter in build_student("same", teacher=teacher).parameters())
