import shlex

import pytest
import torch
from torch import nn

from engine.errors import SSDKDError
from engine.inspection import count_flops, inspect_teacher
from engine.students import build_network
from engine.teacher import FOLDED, NO_BATCHNORM, load_teacher
from engine.zoo import ZOO


def trained(module):
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator))
    return module


def inspected(tmp_path, module, name="teacher.pt", **options):
    torch.save(module.state_dict(), tmp_path / name)
    return inspect_teacher(load_teacher(tmp_path / name, allow_nonfinite=True, **options))


def test_a_sound_teacher_has_no_findings(tmp_path):
    inspection = inspected(tmp_path, trained(ZOO["resnet8"](10, 3)))
    assert inspection.findings == ()
    assert inspection.layers == {"Conv2d": 7, "BatchNorm2d": 7, "Linear": 1}
    assert inspection.spec.arch == "resnet8"


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_graph_is_told_by_its_weights(tmp_path, suffix):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
            self.rows = nn.Conv1d(8, 8, 1)
            self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))  # four dimensions, and no convolution

        def forward(self, images):
            maps = self.norm(self.conv(images).relu()) * self.scale
            return self.linear(self.rows(maps.mean(3)).mean(2))

    path, batch = tmp_path / f"own.{suffix}", ({0: torch.export.Dim("batch")},)
    module, images = trained(Own()).eval(), torch.zeros(2, 3, 32, 32)
    if suffix == "onnx":
        torch.onnx.export(module, (images,), path, dynamo=True, dynamic_shapes=batch, optimize=False, verbose=False)
    else:
        torch.export.save(torch.export.export(module, (images,), dynamic_shapes=batch), path)
    inspection = inspect_teacher(load_teacher(path))
    assert inspection.spec.arch == "graph"
    assert inspection.layers == {"convolution": 2, "BatchNorm": 1, "matrix product": 1}


def test_flops_count_multiplications_and_additions():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5)
    )
    network.train()
    assert count_flops(network, (3, 4, 4)) == 2 * (16 * 8 * 27 + 8 * 16 * 5)
    assert network.training
    assert network[1].num_batches_tracked == 0
    with pytest.raises(RuntimeError):
        count_flops(network, (3, 5, 5))
    assert network.training


def test_the_command_repeats_what_was_said_and_quotes_it(tmp_path):
    inspection = inspected(
        tmp_path,
        trained(ZOO["resnet20"](10, 3)),
        "my teacher.pt",
        arch="resnet20",
        input_shape=(3, 24, 24),
        mean=(0.5,) * 3,
    )
    words = shlex.split(inspection.command)
    assert words[:3] == ["ssdkd", "compress", str(tmp_path / "my teacher.pt")]
    assert words[3:] == ["--student", "resnet8", "--arch", "resnet20", "--input", "3x24x24", "--mean", "0.5,0.5,0.5"]


@pytest.mark.parametrize(
    ("name", "student"), [("resnet18_cifar", "mobilenetv2"), ("resnet56", "resnet20"), ("wrn16_1", "resnet8")]
)
def test_the_suggested_student_is_smaller_than_the_teacher(tmp_path, name, student):
    assert f"--student {student}" in inspected(tmp_path, trained(ZOO[name](10, 3))).command


@pytest.mark.parametrize(
    ("name", "input_shape", "command"),
    [
        ("resnet8", (3, 32, 32), "export {path} --precision int8"),  # nothing is smaller
        ("torchvision/mobilenet_v3_small", (3, 224, 224), "compress {path} --student resnet8"),  # few FLOPs
    ],
)
def test_the_suggestion_is_smaller_in_parameters_and_flops(tmp_path, name, input_shape, command):
    network = build_network(name, classes=10, channels=3, pixels=input_shape[1])
    inspection = inspected(tmp_path, trained(network), arch=name, input_shape=input_shape)
    assert inspection.command.startswith(f"ssdkd {command.format(path=tmp_path / 'teacher.pt')}")
    if inspection.student:
        student = build_network(inspection.student, classes=10, channels=3, pixels=input_shape[1])
        assert count_flops(student, input_shape) < inspection.flops
    else:
        assert "--student" not in inspection.command


def with_nan(network):
    network.conv1.weight[0, 0, 0, 0] = float("nan")


def with_dead_classes(network):
    network.linear.weight[[2, 5]] = 0


def with_equal_classes(network):
    network.linear.weight[3] = network.linear.weight[7]


def with_a_constant_layer(network):
    network.layer2[0].conv2.weight.fill_(0.5)


def with_a_new_batchnorm(network):
    network.layer1[0].bn1.running_mean.zero_()
    network.layer1[0].bn1.running_var.fill_(1)


def with_a_negative_variance(network):
    network.layer1[0].bn1.running_var[3] = -1


def with_variances_of_zero(network):
    network.layer1[0].bn1.running_var.zero_()


def with_huge_weights(network):
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.fill_(1e20)


def with_dead_channels(network):
    network.layer1[0].bn1.running_var[:3] = 0


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (with_nan, "NaN or infinite numbers in 1 tensors: conv1.weight."),
        (with_dead_classes, "Dead classes, whose weights in the last layer are all zero: 2, 5."),
        (with_equal_classes, "Classes with the same weights in the last layer, which cannot be told apart: 3, 7."),
        (
            with_a_constant_layer,
            "All weights are the same number in layer2.0.conv2.weight: these layers were never trained.",
        ),
        (
            with_a_new_batchnorm,
            "Running statistics never trained, or not finite, in 1 of 7 BatchNorm layers: layer1.0.bn1.",
        ),
    ],
)
def test_what_is_suspicious_is_said(tmp_path, damage, finding):
    network = trained(ZOO["resnet8"](10, 3))
    with torch.no_grad():
        damage(network)
    inspection = inspected(tmp_path, network)
    assert inspection.findings == (finding,)
    assert (inspection.command is None) == (damage is with_nan)


VARIANCES = "Running variances that are not positive in 1 of 7 BatchNorm layers: layer1.0.bn1."
LOGITS = "The logits are not finite for images of 3x32x32."


@pytest.mark.parametrize(
    ("damage", "findings", "is_refused"),
    [
        (with_a_negative_variance, (VARIANCES, LOGITS), True),
        (with_variances_of_zero, (VARIANCES,), False),
        (with_huge_weights, (LOGITS,), True),
        (with_dead_channels, (), False),
    ],
)
def test_a_command_that_would_fail_is_not_proposed(tmp_path, damage, findings, is_refused):
    network = trained(ZOO["resnet8"](10, 3))
    with torch.no_grad():
        damage(network)
    inspection = inspected(tmp_path, network)
    assert inspection.findings == findings
    assert (inspection.command is None) == is_refused
    if is_refused:
        with pytest.raises(SSDKDError, match="computes logits that are not finite"):
            load_teacher(tmp_path / "teacher.pt")
    else:
        # A layer without a usable variance is no prior: its statistics would be divided by 0.
        assert load_teacher(tmp_path / "teacher.pt").spec.batchnorm_layers == (7 if damage is with_dead_channels else 6)


def test_a_teacher_without_batchnorm(tmp_path):
    class Plain(nn.Sequential):
        pass

    network = Plain(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 8, 8)), str(tmp_path / "teacher.pt"))
    inspection = inspect_teacher(load_teacher(tmp_path / "teacher.pt", input_shape=(3, 8, 8)))
    assert inspection.findings == ()  # it is said once, by the teacher's warnings
    assert inspection.spec.warnings[-2:] == (NO_BATCHNORM, FOLDED)
    assert inspection.flops == 2 * (36 * 4 * 27 + 4 * 3)
