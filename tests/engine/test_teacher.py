"""Row 5 of the issue: one teacher in each format; then what is found out about a teacher, and what stops."""

import json
import sys
import warnings
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from engine.batchnorm import batchnorm_layers
from engine.channel_statistics import recorded_statistics
from engine.errors import SSDKDError
from engine.inspection import inspect_teacher
from engine.losses import batchnorm_loss, batchnorm_prior, flat_statistics
from engine.probing import Logits
from engine.students import STUDENTS
from engine.teacher import NO_BATCHNORM, load_teacher
from engine.zoo import ZOO

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Unknown(nn.Module):
    """A small network of nobody's, with what exporters find hard: branches, sizes, grouped and 1x1 convolutions."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.head = nn.Linear(16, classes)

    def forward(self, images):
        x = self.stem(images)
        y = F.relu6(self.norm(self.depthwise(x)))
        y = torch.cat((x + y, F.max_pool2d(x, 3, 1, 1)), 1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def trained(module, seed=0):
    """A network whose BatchNorm statistics and weights look trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(0.2 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
    return module.eval().requires_grad_(False)


def known():
    return trained(ZOO["resnet8"](5, 3))


def unknown():
    return trained(Unknown())


def quietly(function, *arguments, **keywords):
    """Exporters warn about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **keywords)


def write_onnx(module, path, batch=2, dynamic=True, **options):
    quietly(
        torch.onnx.export,
        module,
        (IMAGES[:batch],),
        str(path),
        dynamo=False,
        input_names=["images"],
        dynamic_axes={"images": {0: "batch"}} if dynamic else None,
        **options,
    )


def write_onnx_with_batchnorm(module, path):
    write_onnx(module, path, training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False)


def write_onnx_by_dynamo(module, path):
    shapes = ({0: torch.export.Dim("batch")},)
    quietly(
        torch.onnx.export,
        module,
        (IMAGES,),
        str(path),
        dynamo=True,
        dynamic_shapes=shapes,
        external_data=False,
        verbose=False,
    )


def write_export(module, path, dynamic=True, batch=2):
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with path.open("wb") as file:
        quietly(torch.export.save, torch.export.export(module, (IMAGES[:batch],), dynamic_shapes=shapes), file)


def write_traced(module, path):
    quietly(lambda: torch.jit.save(torch.jit.trace(module, IMAGES), str(path)))


def write_scripted(module, path):
    quietly(lambda: torch.jit.save(torch.jit.script(module), str(path)))


def write_frozen(module, path):
    quietly(lambda: torch.jit.save(torch.jit.freeze(torch.jit.trace(module, IMAGES)), str(path)))


def renamed(state):
    return {name.replace("linear", "fc").replace("layer", "stage"): value for name, value in state.items()}


FORMATS = {
    "bare": lambda module, path: torch.save(module.state_dict(), path),
    "legacy": lambda module, path: torch.save(module.state_dict(), path, _use_new_zipfile_serialization=False),
    "wrapped": lambda module, path: torch.save({"state_dict": nn.DataParallel(module).state_dict(), "epoch": 1}, path),
    "renamed": lambda module, path: torch.save(renamed(module.state_dict()), path),
    "safetensors": lambda module, path: safetensors.torch.save_file(module.state_dict(), path),
    "pickled": lambda module, path: torch.save(module, path),
    ".pt2": write_export,
    ".pt2, batch of 1": lambda module, path: write_export(module, path, dynamic=False, batch=1),
    "traced": write_traced,
    "ONNX with BatchNorm": write_onnx_with_batchnorm,
}
# Our ResNet cannot be scripted.
FORMATS_OF_THE_UNKNOWN = {**FORMATS, "scripted": write_scripted}
WITHOUT_STATISTICS = {"frozen": write_frozen, "ONNX folded": write_onnx, "ONNX by dynamo": write_onnx_by_dynamo}


def statistics_loss(module):
    prior = batchnorm_prior(batchnorm_layers(module))
    with recorded_statistics(prior.layers) as recorded, torch.no_grad():
        module(IMAGES)
    return batchnorm_loss(prior, flat_statistics(prior, recorded))


def assert_same_teacher(found, original):
    with torch.no_grad():
        torch.testing.assert_close(found(IMAGES), original(IMAGES), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found(IMAGES[:1]), original(IMAGES[:1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics_loss(found), statistics_loss(original), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_a_known_teacher_is_the_same_in_every_format(tmp_path, form):
    original = known()
    FORMATS[form](original, tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher", input_shape=(3, 16, 16), trust_pickle=form == "pickled")
    assert_same_teacher(teacher.module, original)
    assert teacher.spec.arch == ("ResNet" if form == "pickled" else "resnet8")
    assert teacher.spec.batchnorm_layers == 7
    assert teacher.spec.classes == 5
    assert teacher.spec.parameters == sum(parameter.numel() for parameter in original.parameters())
    assert NO_BATCHNORM not in teacher.spec.warnings
    assert not teacher.module.training
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


@pytest.mark.parametrize("form", [".pt2", ".pt2, batch of 1", "traced", "scripted", "ONNX with BatchNorm"])
def test_an_unknown_network_runs_from_its_graph_with_its_batchnorm_layers(tmp_path, form):
    original = unknown()
    FORMATS_OF_THE_UNKNOWN[form](original, tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher", input_shape=(3, 16, 16))
    assert_same_teacher(teacher.module, original)
    assert (teacher.spec.arch, teacher.spec.batchnorm_layers) == ("graph", 2)
    assert teacher.spec.parameters == sum(parameter.numel() for parameter in original.parameters())


@pytest.mark.parametrize("form", WITHOUT_STATISTICS)
@pytest.mark.parametrize("make", [known, unknown])
def test_where_the_exporter_folded_batchnorm_away_it_runs_with_a_warning(tmp_path, form, make):
    original = make()
    WITHOUT_STATISTICS[form](original, tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher", input_shape=(3, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(teacher.module(IMAGES), original(IMAGES), rtol=1e-4, atol=1e-4)
    assert teacher.spec.arch == "graph"
    assert teacher.spec.batchnorm_layers == 0
    assert NO_BATCHNORM in teacher.spec.warnings


@pytest.mark.parametrize("form", [*FORMATS, *WITHOUT_STATISTICS])
def test_gradients_reach_the_images(tmp_path, form):
    {**FORMATS, **WITHOUT_STATISTICS}[form](known(), tmp_path / "teacher")
    module = load_teacher(tmp_path / "teacher", input_shape=(3, 16, 16), trust_pickle=form == "pickled").module
    images = IMAGES.clone().requires_grad_()
    module(images).square().sum().backward()
    reference = IMAGES.clone().requires_grad_()
    known()(reference).square().sum().backward()
    torch.testing.assert_close(images.grad, reference.grad, rtol=1e-3, atol=1e-3)


def test_a_graph_decides_where_several_architectures_fit(tmp_path):
    """MobileNetV2's weights fit two networks of other strides; the graph shows which it is."""
    original = trained(ZOO["mobilenetv2_cifar_x0_5"](5, 3))
    write_traced(original, tmp_path / "teacher.pt")
    spec = load_teacher(tmp_path / "teacher.pt", input_shape=(3, 16, 16)).spec
    assert spec.arch == "mobilenetv2_cifar_x0_5"
    assert spec.arch_evidence == "layer names and shapes match; same logits as the graph"


def test_a_stated_architecture_that_computes_something_else_is_refused(tmp_path):
    original = trained(ZOO["mobilenetv2_cifar"](5, 3))
    write_traced(original, tmp_path / "teacher.pt")
    with pytest.raises(SSDKDError, match="does not compute what the file computes"):
        load_teacher(tmp_path / "teacher.pt", arch="mobilenet_v2", input_shape=(3, 32, 32))
    assert load_teacher(tmp_path / "teacher.pt", input_shape=(3, 32, 32)).spec.arch == "mobilenetv2_cifar"


def save(tmp_path, module=None, **beside):
    """A checkpoint of ResNet-8 (or `module`) with other facts beside the weights."""
    path = tmp_path / "teacher.pt"
    torch.save({"state_dict": (module or known()).state_dict(), **beside}, path)
    return path


def test_what_is_assumed_is_said(tmp_path):
    spec = load_teacher(save(tmp_path)).spec
    assert spec.input_shape == (3, 32, 32)
    assert spec.preprocessing.mean == (0.485, 0.456, 0.406)
    assert spec.preprocessing.source == "default"
    assert [warning for warning in spec.warnings if "3x32x32 is assumed" in warning]
    assert [warning for warning in spec.warnings if "ImageNet's are assumed" in warning]


@pytest.mark.parametrize(("given", "missing"), [("mean", "std"), ("std", "mean")])
def test_one_of_mean_and_std_alone_leaves_the_other_assumed(tmp_path, given, missing):
    spec = load_teacher(save(tmp_path), **{given: (0.25,)}).spec
    usual = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    assert getattr(spec.preprocessing, given) == (0.25,) * 3
    assert getattr(spec.preprocessing, missing) == usual[missing]
    assert spec.preprocessing.source == given
    (said,) = (warning for warning in spec.warnings if "assumed" in warning and "size" not in warning)
    assert said == (
        f"The {missing} of the training images is not in the file: ImageNet's is assumed; "
        f"say it with --{missing} if it is another."
    )


def test_grey_images(tmp_path):
    spec = load_teacher(save(tmp_path, trained(ZOO["resnet8"](5, 1)))).spec
    assert spec.input_shape == (1, 28, 28)
    assert (spec.preprocessing.mean, spec.preprocessing.std) == ((0.5,), (0.5,))


def test_facts_in_the_file_are_used(tmp_path):
    path = save(
        tmp_path,
        args={"img_size": 24},
        mean=np.array([0.5, 0.4, 0.3]),
        std=torch.tensor([0.25, 0.25, 0.25]),
        class_to_idx={"cat": 1, "ant": 0, "dog": 2, "elk": 3, "fox": 4},
    )
    spec = load_teacher(path).spec
    assert spec.input_shape == (3, 24, 24)
    assert spec.preprocessing.mean == (0.5, 0.4, 0.3)
    assert spec.preprocessing.source == "file"
    assert spec.class_names == ("ant", "cat", "dog", "elk", "fox")
    assert spec.warnings == ()


def test_flags_win_over_the_file_and_are_kept(tmp_path):
    path = save(tmp_path, image_size=24, mean=[0.5] * 3, std=[0.5] * 3)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    names = {"class_names": tuple("abcde"), "classes_file": tmp_path / "names.txt"}
    spec = load_teacher(path, input_shape=(3, 20, 24), mean=mean, std=std, **names).spec
    assert (spec.input_shape, spec.class_names) == ((3, 20, 24), tuple("abcde"))
    assert (spec.preprocessing.mean, spec.preprocessing.std, spec.preprocessing.source) == (mean, std, "flag")
    assert spec.flags[:6] == ("--input", "3x20x24", "--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6")
    assert spec.flags[6:] == ("--classes", str(tmp_path / "names.txt"))


def test_a_stated_architecture(tmp_path):
    state = known().state_dict()
    layers, names = {}, {}
    for name in state:
        layer, _, suffix = name.rpartition(".")
        names[name] = f"l{layers.setdefault(layer, len(layers))}.{suffix}"
    torch.save({names[name]: value for name, value in state.items()}, tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", arch="resnet8", input_shape=(3, 16, 16))
    assert teacher.spec.arch_evidence == "stated with --arch; shapes match in order; layer names differ"
    assert_same_teacher(teacher.module, known())
    with pytest.raises(SSDKDError, match="do not fit --arch resnet20: 60 missing"):
        load_teacher(save(tmp_path), arch="resnet20")
    with pytest.raises(SSDKDError, match="resnet200"):
        load_teacher(tmp_path / "teacher.pt", arch="resnet200x")


def test_a_name_for_two_networks_asks_for_the_image_size(tmp_path):
    """Our student MobileNetV2 has other strides for large images than for small ones."""
    path = save(tmp_path, trained(models.mobilenet_v2(num_classes=5)))
    with pytest.raises(SSDKDError, match="one network for small images and another for large ones"):
        load_teacher(path, arch="mobilenetv2")
    small = load_teacher(path, arch="mobilenetv2", input_shape=(3, 32, 32)).module
    large = load_teacher(path, arch="mobilenet_v2", input_shape=(3, 32, 32)).module
    assert not torch.allclose(small(IMAGES), large(IMAGES))


def test_a_name_of_two_libraries(tmp_path, monkeypatch):
    """torchvision's and timm's ResNet-18 compute the same; where two of a name do not, the full name is asked for."""
    shape = (3, 32, 32)
    path = save(tmp_path, trained(models.resnet18(num_classes=5)))
    assert load_teacher(path, arch="resnet18", input_shape=shape).spec.arch == "torchvision/resnet18"
    networks = {
        "a/net": ZOO["mobilenetv2_cifar_x0_5"],
        "b/net": lambda classes, _: models.mobilenet_v2(num_classes=classes, width_mult=0.5),
    }
    monkeypatch.setattr("engine.rebuild.published_networks", lambda _: networks)
    path = save(tmp_path, trained(models.mobilenet_v2(num_classes=5, width_mult=0.5)))
    with pytest.raises(SSDKDError, match="fit a/net and b/net, which differ") as caught:
        load_teacher(path, arch="net", input_shape=shape)
    assert "--arch a/net" in caught.value.hint


def test_the_users_own_network(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(4, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)
    )
    teacher = load_teacher(save(tmp_path, trained(network)), arch="nets:build", input_shape=(3, 16, 16))
    assert (teacher.spec.arch, teacher.spec.classes, teacher.spec.batchnorm_layers) == ("nets:build", 6, 1)
    assert_same_teacher(teacher.module, network)


def test_timm_brings_its_own_preprocessing(tmp_path):
    timm = pytest.importorskip("timm")
    network = trained(timm.create_model("tf_efficientnet_lite0", num_classes=4))
    path = save(tmp_path, network)
    spec = load_teacher(path, arch="tf_efficientnet_lite0").spec
    assert spec.preprocessing.source == "timm"
    assert spec.preprocessing.mean == (0.5, 0.5, 0.5)
    assert spec.input_shape == (3, 224, 224)
    size, constants = spec.warnings  # timm's weights have 1,000 classes, this network 4: it was trained otherwise
    assert "3x224x224 is assumed" in size
    assert "those of timm's own weights, of other classes, are assumed" in constants


def test_a_file_called_after_a_network_of_timms_is_compared_with_those(tmp_path):
    timm = pytest.importorskip("timm")
    network = trained(timm.create_model("tf_efficientnet_lite0", num_classes=4))
    path = tmp_path / "EfficientNet-lite0-57934424.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(
        SSDKDError, match=r"several architectures fit .*: efficientnet_lite0, tf_efficientnet_lite0\."
    ) as caught:
        load_teacher(path)
    assert caught.value.hint.endswith(f": ssdkd inspect {path} --arch efficientnet_lite0")


def test_statistics_that_another_wiring_computed_are_noticed(tmp_path):
    original = known()
    for layer in batchnorm_layers(original):
        layer.momentum = None
        layer.reset_running_stats()
    original.train()(10 * IMAGES)
    path = save(tmp_path, original)
    assert not [warning for warning in load_teacher(path).spec.warnings if "wired otherwise" in warning]
    with torch.no_grad():
        original.bn1.running_var.mul_(1e-7)
    path = save(tmp_path, original)
    assert [warning for warning in load_teacher(path).spec.warnings if "wired otherwise" in warning]


def test_our_own_student_is_found_by_its_card(tmp_path):
    """At 96 px our resnet8 has a stem of stride 4, and the same names and shapes as the published one."""
    student = trained(STUDENTS["resnet8"].build(5, 3, 96))
    card = {
        "student": "resnet8",
        "input_shape": [3, 96, 96],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "teacher_sha256": "0",
    }
    safetensors.torch.save_file(student.state_dict(), tmp_path / "student.safetensors", {"ssdkd": json.dumps(card)})
    teacher = load_teacher(tmp_path / "student.safetensors")
    assert teacher.spec.arch_evidence == "named in the file; layer names and shapes match"
    assert (teacher.spec.input_shape, teacher.spec.preprocessing.source) == ((3, 96, 96), "file")
    assert_same_teacher(teacher.module, student)


class Loop(Unknown):
    """A network that is no list of operations."""

    def forward(self, images):
        x = self.stem(images)
        count = 0
        while bool(x.mean() > -1e9) and count < 2:
            x = F.relu6(self.norm(self.depthwise(x)))
            count += 1
        return self.head(torch.cat((x, x), 1).mean([2, 3]))


def test_a_scripted_loop_runs_with_a_warning(tmp_path):
    original = trained(Loop())
    write_scripted(original, tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", input_shape=(3, 16, 16))
    torch.testing.assert_close(teacher.module(IMAGES), original(IMAGES))
    assert [warning for warning in teacher.spec.warnings if "prim::Loop" in warning]
    assert NO_BATCHNORM in teacher.spec.warnings
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


def test_half_precision_is_converted_and_said(tmp_path):
    original = known()
    torch.save({name: value.half() for name, value in original.state_dict().items()}, tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", input_shape=(3, 16, 16))
    assert {parameter.dtype for parameter in teacher.module.parameters()} == {torch.float32}
    assert "The weights are float16; they are converted to float32." in teacher.spec.warnings


def test_batchnorm_that_was_never_trained_is_no_prior(tmp_path):
    spec = load_teacher(save(tmp_path, ZOO["resnet8"](5, 3))).spec
    assert spec.batchnorm_layers == 0
    assert NO_BATCHNORM in spec.warnings


def test_a_softmax_at_the_end_is_undone(tmp_path):
    original = unknown()
    write_traced(nn.Sequential(original, nn.Softmax(1)), tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", input_shape=(3, 16, 16))
    torch.testing.assert_close(teacher.module(IMAGES), original(IMAGES).log_softmax(1), rtol=1e-4, atol=1e-4)
    assert [warning for warning in teacher.spec.warnings if "softmax" in warning]
    assert len(batchnorm_layers(teacher.module)) == 2


class WithView(Unknown):
    """As much older code is."""

    def __init__(self, classes: int = 5):
        super().__init__(classes)
        self.head = nn.Linear(8 * 8 * 8, classes)

    def forward(self, images):
        x = F.relu(self.norm(self.depthwise(self.stem(images))))
        return self.head(x.view(x.size(0), -1))


def test_timms_constants_are_found_where_the_output_is_put_into_form(tmp_path):
    network = trained(WithView())
    network.default_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    torch.save(network, tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", input_shape=(3, 16, 16), trust_pickle=True)
    assert isinstance(teacher.module, Logits)
    preprocessing = teacher.spec.preprocessing
    assert (preprocessing.mean, preprocessing.std, preprocessing.source) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "timm")


class WithIdleHead(Unknown):
    """As networks with a head that only training uses."""

    def __init__(self):
        super().__init__()
        self.idle = nn.BatchNorm2d(3)


@pytest.mark.parametrize("form", ["pickled", ".pt2", "traced", "scripted"])
def test_code_that_calls_view_runs_with_channels_last(tmp_path, form):
    """The engine moves the teacher to channels_last, on which `view` fails."""
    original = trained(WithView())
    FORMATS_OF_THE_UNKNOWN[form](original, tmp_path / "teacher")
    module = load_teacher(tmp_path / "teacher", input_shape=(3, 16, 16), trust_pickle=form == "pickled").module
    expected = original(IMAGES)
    module.to("cpu", memory_format=torch.channels_last)
    found = module(IMAGES.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(batchnorm_layers(module)) == 2


def test_batchnorm_layers_that_do_not_run_are_no_prior(tmp_path, monkeypatch):
    (tmp_path / "idle_head.py").write_text("")
    monkeypatch.setattr(WithIdleHead, "__module__", "idle_head")
    monkeypatch.setitem(sys.modules, "idle_head", ModuleType("idle_head"))
    sys.modules["idle_head"].WithIdleHead = WithIdleHead
    torch.save(trained(WithIdleHead()), tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", input_shape=(3, 16, 16), trust_pickle=True)
    assert teacher.spec.batchnorm_layers == 2
    assert statistics_loss(teacher.module) > 0


def test_nan_weights_stop_unless_they_are_to_be_inspected(tmp_path):
    network = known()
    network.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
    path = save(tmp_path, network)
    with pytest.raises(SSDKDError, match=r"NaN or infinite weights: .* 1 broken tensors \(layer1\.0\.conv1\.weight\)"):
        load_teacher(path)
    assert load_teacher(path, allow_nonfinite=True).spec.classes == 5


def test_quantized_weights_stop(tmp_path):
    state = known().state_dict()
    state["linear.weight"] = state["linear.weight"].to(torch.int8)
    torch.save(state, tmp_path / "teacher.pt")
    with pytest.raises(SSDKDError, match="quantized weights"):
        load_teacher(tmp_path / "teacher.pt")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"classes": 10}, "--classes says 10, but the teacher's last layer has 5 outputs"),
        ({"class_names": ("a", "b")}, "--classes says 2, but the teacher's last layer has 5 outputs"),
        ({"input_shape": (1, 32, 32)}, "first convolution of teacher.pt takes 3"),
        ({"mean": (0.5,) * 4}, "--mean has 4 values, but the network takes 3 channels"),
        ({"std": (0.5, 0.5)}, "--std has 2 values"),
    ],
)
def test_what_contradicts_the_network_stops(tmp_path, keywords, message):
    with pytest.raises(SSDKDError, match=message) as caught:
        load_teacher(save(tmp_path), **keywords)
    assert caught.value.hint


class SpaceToDepth(nn.Module):
    """Turns 4x4 pixels into channels before its first convolution, as TResNets do."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(48, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, images):
        return self.linear(self.bn(self.conv(nn.functional.pixel_unshuffle(images, 4))).mean((2, 3)))


def test_a_stem_that_turns_pixels_into_channels_takes_pictures(tmp_path):
    torch.save(SpaceToDepth(), tmp_path / "teacher.pt")
    found = load_teacher(tmp_path / "teacher.pt", input_shape=(3, 32, 32), trust_pickle=True)
    assert (found.spec.input_shape, found.spec.classes) == ((3, 32, 32), 5)
    with pytest.raises(SSDKDError, match="cannot take images of 3x30x30") as caught:  # and not for its channels
        load_teacher(tmp_path / "teacher.pt", input_shape=(3, 30, 30), trust_pickle=True)
    assert caught.value.hint.endswith("--input 3x32x32")


def test_a_single_mean_and_std_are_those_of_every_channel(tmp_path):
    found = load_teacher(save(tmp_path), mean=(0.5,), std=(0.25,)).spec.preprocessing
    assert (found.mean, found.std, found.source) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "flag")


@pytest.mark.parametrize("shape", [(3, 100_000, 32), (3, 32, 4097), (65, 32, 32), (0, 32, 32), (3, -1, 32), (3, 32, 0)])
def test_a_size_far_out_of_range_stops_before_anything_is_read(tmp_path, shape):
    with pytest.raises(SSDKDError, match=rf"--input {'x'.join(map(str, shape))}: expected 1 to 64 channels") as caught:
        load_teacher(tmp_path / "nowhere.pt", input_shape=shape)
    assert "--input 3x224x224" in caught.value.hint


def test_a_size_that_the_network_cannot_take(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 62 * 62, 5))
    torch.save(trained(network), tmp_path / "teacher.pt")
    for stated in (None, (3, 48, 48)):
        with pytest.raises(SSDKDError, match=r"cannot take images of 3x\d\dx\d\d: (addmm: )?mat1 and mat2") as caught:
            load_teacher(tmp_path / "teacher.pt", input_shape=stated, trust_pickle=True)
        assert "--input 3x64x64" in caught.value.hint


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (nn.Unflatten(1, (5, 1, 1)), None),
        (nn.Linear(5, 1), "expected logits"),
        (nn.Unflatten(1, (5, 1)), "expected logits"),
    ],
)
def test_other_outputs_than_logits(tmp_path, tail, message):
    write_traced(nn.Sequential(unknown(), trained(tail) if message else tail), tmp_path / "teacher.pt")
    if message:
        with pytest.raises(SSDKDError, match=message):
            load_teacher(tmp_path / "teacher.pt", input_shape=(3, 16, 16))
    else:
        assert load_teacher(tmp_path / "teacher.pt", input_shape=(3, 16, 16)).spec.classes == 5


def test_the_random_state_is_left_alone(tmp_path):
    path = save(tmp_path)
    before = torch.random.get_rng_state()
    load_teacher(path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_teacher_that_says_the_same_of_every_image(tmp_path):
    network = trained(STUDENTS["resnet8"].build(5, 3, 32))
    nn.init.zeros_(network.linear.weight)
    path = save(tmp_path, network)
    with pytest.raises(SSDKDError, match="computes the same logits for every image of 3x32x32") as caught:
        load_teacher(path, input_shape=(3, 32, 32))
    assert "ssdkd inspect" in caught.value.hint
    found = inspect_teacher(load_teacher(path, input_shape=(3, 32, 32), allow_nonfinite=True))
    assert "The logits are the same for every image." in found.findings
    assert found.command is None
