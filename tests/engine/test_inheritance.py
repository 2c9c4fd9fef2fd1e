import pytest
import torch
from torch import nn

from engine.inheritance import inherit
from engine.probing import Logits
from engine.zoo import ZOO, resnet_cifar


def trained(network: nn.Module) -> nn.Module:
    """A network whose weights and statistics are none that a fresh one has."""
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 2)
    return network.eval().requires_grad_(False)


def test_layers_of_the_same_name_and_shape_become_the_teachers_statistics_included() -> None:
    teacher, student = trained(resnet_cifar(7, 1, depth=20)), resnet_cifar(7, 1, depth=8)
    inherited = inherit(student, teacher)
    assert inherited == {name for name, _ in student.named_parameters()}  # one block a stage, the first of each
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_teacher_whose_output_is_put_into_form_has_the_names_of_its_network() -> None:
    teacher, student = trained(resnet_cifar(7, 1, depth=20)), resnet_cifar(7, 1, depth=8)
    inherited = inherit(student, Logits(teacher, probabilities=False, keeps_layout=True))
    assert inherited == {name for name, _ in student.named_parameters()}


@pytest.mark.parametrize(
    ("teacher", "student", "first", "last"),
    [
        pytest.param(ZOO["resnet20"](7, 1), ZOO["resnet8"](5, 1), True, False, id="other classes"),
        pytest.param(ZOO["resnet20"](7, 3), ZOO["resnet8"](7, 1), False, True, id="other channels"),
    ],
)
def test_only_layers_that_fit_are_taken(teacher: nn.Module, student: nn.Module, first: bool, last: bool) -> None:
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    inherited = inherit(student, trained(teacher))
    taken = {name for name, tensor in student.named_parameters() if not torch.equal(tensor, before[name])}
    assert inherited == taken
    assert ("conv1.weight" in taken, "linear.weight" in taken) == (first, last)
    assert "layer2.0.conv1.weight" in taken


def test_a_layer_of_another_kind_is_not_taken() -> None:
    teacher = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4))
    student = nn.Sequential(nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Linear(4, 4))
    assert inherit(student, trained(teacher)) == {"2.weight", "2.bias"}
    assert student[1].running_mean.eq(0).all()


def test_the_teacher_itself_is_not_copied() -> None:
    teacher, student = trained(ZOO["resnet8"](7, 1)), ZOO["resnet8"](7, 1)
    before = student.conv1.weight.clone()
    assert inherit(student, teacher) == set()
    assert torch.equal(student.conv1.weight, before)


def test_a_stranger_gives_nothing() -> None:
    student = ZOO["vgg8"](7, 1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert inherit(student, trained(ZOO["wrn16_1"](7, 1))) == set()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_what_its_author_froze_stays_as_it_is() -> None:
    teacher, student = trained(resnet_cifar(7, 1, depth=20)), resnet_cifar(7, 1, depth=8)
    student.conv1.requires_grad_(False)
    before = student.conv1.weight.clone()
    inherited = inherit(student, teacher)
    assert torch.equal(student.conv1.weight, before)
    assert inherited == {name for name, _ in student.named_parameters()} - {"conv1.weight"}
