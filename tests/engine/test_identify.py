import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from engine.catalogue import architecture_of, architectures, skeleton, without_memory
from engine.errors import SSDKDError
from engine.identify import NAMES_MATCH, ORDER_MATCHES, blocks_cross, fitting, guess_heads, identify, map_in_order
from engine.zoo import ZOO


def state_of(module):
    return {name: torch.empty(shape) for name, shape in skeleton(module).items()}


def meta_state(build, *arguments, **keywords):
    """A state dict with shapes and no numbers."""
    with without_memory():
        return build(*arguments, **keywords).state_dict()


def renamed(state, rules):
    """With other names for the layers, as other people's code has them."""
    result = {}
    for name, value in state.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        result[name] = value
    assert len(result) == len(state)
    return result


@pytest.mark.parametrize(
    "name",
    ["resnet20", "resnet56", "resnet32_b", "resnet18_cifar", "wrn16_2", "wrn40_1", "vgg8", "vgg16", "vgg19_hidden"],
)
@pytest.mark.parametrize(("classes", "channels"), [(10, 3), (100, 1)])
def test_the_cifar_families_are_found(name, classes, channels):
    match = identify(meta_state(ZOO[name], classes, channels), keeps_order=False)
    assert (match.architecture.name, match.classes, match.channels) == (name, classes, channels)
    assert match.evidence == NAMES_MATCH


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "efficientnet_b0",
        "densenet121",
        "vgg11_bn",
        "vit_b_16",
        "shufflenet_v2_x1_0",
        "googlenet",
    ],
)
@pytest.mark.parametrize("classes", [1000, 7])
def test_torchvisions_networks_are_found(name, classes):
    match = identify(meta_state(models.get_model, name, weights=None, num_classes=classes), keeps_order=False)
    assert (match.architecture.name, match.classes, match.channels) == (name, classes, 3)


def test_a_name_of_two_networks_is_reported_in_full():
    """Our vgg16 has BatchNorm, torchvision's has none."""
    match = identify(meta_state(models.vgg16, num_classes=10), keeps_order=False)
    assert match.architecture.name == "torchvision/vgg16"


def test_the_files_order_does_not_matter_where_the_names_agree():
    state = list(meta_state(ZOO["wrn16_2"], 10, 3).items())
    random.Random(0).shuffle(state)
    assert identify(dict(state), keeps_order=False).architecture.name == "wrn16_2"


def test_other_names_are_matched_by_order():
    """torchvision's names in a network with kuangliu's 3x3 stem, as many people write it."""
    state = renamed(meta_state(ZOO["resnet18_cifar"], 10, 3), {"shortcut": "downsample", "linear": "fc"})
    match = identify(state, keeps_order=True)
    assert (match.architecture.name, match.evidence) == ("resnet18_cifar", ORDER_MATCHES)
    assert match.names["layer2.0.downsample.0.weight"] == "layer2.0.shortcut.0.weight"
    assert match.names["fc.bias"] == "linear.bias"
    with pytest.raises(SSDKDError, match="does not keep the layers' order"):
        identify(state, keeps_order=False)


def test_parameters_before_buffers_as_exporters_write_them():
    state = meta_state(ZOO["resnet8"], 10, 3)
    buffers = {name: value for name, value in state.items() if "running" in name}
    state = renamed(
        {**{name: value for name, value in state.items() if name not in buffers}, **buffers}, {"linear": "fc"}
    )
    assert identify(state, keeps_order=True).architecture.name == "resnet8"


def test_a_shortcut_that_is_created_before_the_other_layers():
    """As in Hugging Face's ResNet: `shortcut.convolution`, then `layer.0.convolution`."""
    blocks: dict[str, dict] = {}
    for name, value in meta_state(ZOO["resnet20_b"], 10, 3).items():
        blocks.setdefault(".".join(name.split(".")[:2]) if "layer" in name else name, {})[name] = value
    first = [sorted(block.items(), key=lambda item: "shortcut" not in item[0]) for block in blocks.values()]
    state = renamed(dict(item for block in first for item in block), {"layer": "stages", "linear": "classifier.1"})
    assert list(state).index("stages2.0.shortcut.0.weight") < list(state).index("stages2.0.conv1.weight")
    match = identify(state, keeps_order=True)
    assert match.architecture.name == "resnet20_b"
    assert match.names["stages2.0.shortcut.0.weight"] == "layer2.0.shortcut.0.weight"
    assert match.names["stages2.0.conv1.weight"] == "layer2.0.conv1.weight"


def test_names_that_only_begin_otherwise_with_a_sequential_head():
    state = renamed(meta_state(ZOO["resnet20"], 10, 3), {r"linear\.": "head.1.", r"^layer(\d)\.": r"stages.\1."})
    assert identify(state, keeps_order=True).architecture.name == "resnet20"


class PreactivationBlock(nn.Module):
    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, bias=False)


class PreactivationResNet(nn.Module):
    """ResNet-8 with BatchNorm before its convolutions and parameter-free shortcuts: the shapes of a plain ResNet-8."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.blocks = nn.Sequential(*(PreactivationBlock(a, b) for a, b in ((16, 16), (16, 32), (32, 64))))
        self.bn = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 10)


def test_the_same_shapes_wired_otherwise_are_not_taken_for_a_plain_resnet():
    ours, plain = skeleton(PreactivationResNet()), skeleton(ZOO["resnet8"](10, 3))
    assert list(ours.values()) == list(plain.values()), "or this test shows nothing"
    assert map_in_order(ours, plain, check_blocks=False) is not None
    assert map_in_order(ours, plain) is None
    with pytest.raises(SSDKDError, match="architecture is not known"):
        identify(state_of(PreactivationResNet()), keeps_order=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "crossing"),
    [
        (["conv1", "bn1", "fc"], ["a.0.conv", "a.0.bn", "b"], False),
        (["a.x", "a.y", "b.x", "b.y"], ["p.x", "p.y", "q.x", "q.y"], False),
        (["a.x", "a.y", "b.x", "b.y"], ["p.1.x", "p.1.y", "p.2.x", "p.2.y"], False),
        (["stem", "a.x", "a.y", "end"], ["p.x", "p.y", "q.x", "q.y"], True),
    ],
)
def test_blocks_cross_where_neither_holds_the_other(ours, theirs, crossing):
    assert blocks_cross(ours, theirs) is crossing
    assert blocks_cross(theirs, ours) is crossing


def test_where_several_fit_it_stops_and_lists_them():
    """torchvision's MobileNetV2 and the one with a CIFAR stem differ in strides alone."""
    state = meta_state(models.mobilenet_v2, num_classes=10)
    with pytest.raises(SSDKDError, match=r"several architectures fit .*: mobilenet_v2 \(.*224 px\), ") as caught:
        identify(state, keeps_order=True, path=Path("my nets/mbv2.pt"))
    assert "mobilenetv2_cifar (usually 32 px). They differ in" in caught.value.message
    assert caught.value.hint.endswith("for example: ssdkd inspect 'my nets/mbv2.pt' --arch mobilenet_v2")
    named = identify(state, keeps_order=True, hint=architecture_of("mobilenetv2_cifar"))
    assert named.architecture.name == "mobilenetv2_cifar"
    assert {match.architecture.name for match in fitting(state, keeps_order=True)} == {
        "mobilenet_v2",
        "mobilenetv2_cifar",
    }


def test_networks_without_a_common_name_are_not_near():
    shapes = {"f.0.weight": (16, 3, 3, 3), "f.1.weight": (16,), "f.2.bias": (16,), "f.2.weight": (16, 16, 3, 3)}
    shapes |= {"fc.weight": (10, 16)}  # by chance
    with pytest.raises(SSDKDError) as caught:
        identify({name: torch.zeros(shape) for name, shape in shapes.items()}, keeps_order=True)
    assert "nor is any near; a network of timm's must be named" in caught.value.message
    assert "\n" not in caught.value.message
    assert "--arch" in caught.value.hint


def test_an_unknown_network_stops_with_the_nearest_and_what_differs():
    state = {**meta_state(ZOO["resnet20"], 10, 3), "attention.weight": torch.empty(64, 64)}
    with pytest.raises(SSDKDError) as caught:
        identify(state, keeps_order=True)
    nearest = caught.value.message.splitlines()[1:]
    assert len(nearest) == 2  # the third by its size has other names
    assert any("resnet20: 1 only in the file (attention.weight)" in line for line in nearest)
    assert "--arch package.module:function" in caught.value.hint


def test_layers_of_another_shape_are_named():
    state = meta_state(ZOO["resnet20"], 10, 3)
    state["layer3.2.conv2.weight"] = torch.empty(64, 64, 5, 5)
    with pytest.raises(SSDKDError, match=re.escape("layer3.2.conv2.weight [64, 64, 5, 5] instead of [64, 64, 3, 3]")):
        identify(state, keeps_order=True)


def test_profilers_leftovers_are_ignored():
    state = meta_state(ZOO["resnet8"], 10, 3)
    state |= {"total_ops": torch.zeros(1), "layer1.0.conv1.total_params": torch.zeros(1)}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    assert identify(state, keeps_order=True).architecture.name == "resnet8"


def test_heads_are_read_off_the_shapes():
    shapes = {"conv1.weight": (16, 1, 3, 3), "deep.weight": (32, 16, 3, 3), "fc.weight": (7, 32), "fc.bias": (7,)}
    assert guess_heads(shapes)[0] == (7, 1)
    assert guess_heads(dict(sorted(shapes.items(), reverse=True)))[0] == (7, 1)
    assert guess_heads({"a.bias": (3,)}) == []


def test_every_candidate_can_be_built_without_memory():
    names = [architecture.name for architecture in architectures()]
    assert {"resnet20", "wrn40_2", "mobilenetv2_cifar", "regnet_y_128gf", "inception_v3", "torchvision/vgg16"} <= set(
        names
    )
    with without_memory():
        network = architecture_of("regnet_y_128gf").build(10, 3)
    assert all(parameter.is_meta for parameter in network.parameters())


def test_the_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    identify(meta_state(ZOO["resnet8"], 10, 3), keeps_order=True)
    assert torch.equal(torch.random.get_rng_state(), before)
