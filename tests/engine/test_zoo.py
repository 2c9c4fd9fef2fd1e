import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.mobilenets import InvertedResidual
from engine.zoo import ZOO, BlockVGG, HalvingPool, PreactivationBlock, ZeroPaddedShortcut, resnet_cifar

ONE_OF_EACH_FAMILY = ["resnet8", "resnet8_b", "wrn10_1", "vgg8", "vgg8_hidden", "vgg8_blocks", "mobilenetv2_cifar_x0_5"]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_each_network_gives_logits_and_carries_usable_batchnorm(name: str) -> None:
    with torch.device("meta"):
        network = ZOO[name](7, 1).eval()
        assert network(torch.empty(2, 1, 16, 16)).shape == (2, 7)
    batchnorms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(batchnorms) >= 5
    assert all(layer.track_running_stats and layer.affine for layer in batchnorms)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet20", 269_722),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("resnet18_cifar", 11_173_962),
        ("wrn28_10", 36_479_194),
        ("wrn40_2", 2_243_546),
        ("vgg16", 14_728_266),
        ("mobilenetv2_cifar", 2_236_682),
        ("mobilenetv2_cifar_projected", 2_296_922),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, published: int) -> None:
    with torch.device("meta"):
        assert parameters(ZOO[name](10, 3)) == published


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", {"conv1.weight", "bn1.running_var", "layer3.2.conv2.weight", "linear.bias"}),
        ("resnet20_b", {"layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.running_mean"}),
        ("resnet18_cifar", {"layer4.0.shortcut.0.weight", "layer4.1.bn2.weight", "linear.weight"}),
        ("wrn16_2", {"block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.weight", "bn1.weight", "fc.bias"}),
        ("vgg11", {"features.0.bias", "features.1.running_mean", "features.25.weight", "classifier.weight"}),
        ("vgg11_hidden", {"features.25.weight", "classifier.0.weight", "classifier.3.weight", "classifier.6.bias"}),
        ("vgg11_blocks", {"block0.0.weight", "block4.3.weight", "block4.4.running_var", "classifier.weight"}),
        ("mobilenetv2_cifar", {"features.0.0.weight", "features.1.conv.1.weight", "features.18.1.bias"}),
        ("mobilenetv2_cifar_projected", {"layers.0.shortcut.1.weight", "layers.16.conv3.weight", "linear.weight"}),
    ],
)  # fmt: skip
def test_layer_names_are_those_of_the_published_files(name: str, expected: set[str]) -> None:
    with torch.device("meta"):
        assert expected <= ZOO[name](10, 3).state_dict().keys()


def test_option_a_has_no_parameters_and_option_b_projects() -> None:
    with torch.device("meta"):
        assert not any("shortcut" in name for name in ZOO["resnet8"](10, 3).state_dict())
        assert sum("shortcut.0" in name for name in ZOO["resnet8_b"](10, 3).state_dict()) == 2


def test_the_zero_padded_shortcut_strides_and_pads_on_both_sides() -> None:
    x = torch.randn(2, 4, 5, 5)
    out = ZeroPaddedShortcut(4, stride=2)(x)
    assert out.shape == (2, 8, 3, 3)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_option_a_keeps_the_memory_layout(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=memory_format).requires_grad_()
    (gradient,) = torch.autograd.grad(ZeroPaddedShortcut(4, stride=2)(x).square().sum(), x)
    assert gradient.is_contiguous(memory_format=memory_format)
    kept = torch.zeros_like(x)
    kept[:, :, ::2, ::2] = 2 * x.detach()[:, :, ::2, ::2]
    assert torch.equal(gradient, kept)


@pytest.mark.parametrize("channels_out", [4, 8])
def test_a_wide_block_takes_its_shortcut_behind_the_activation_only_where_it_projects(channels_out: int) -> None:
    block = PreactivationBlock(4, channels_out, stride=1).eval()
    x = torch.randn(2, 4, 6, 6)
    activated = F.relu(block.bn1(x))
    branch = block.conv2(F.relu(block.bn2(block.conv1(activated))))
    shortcut = x if block.convShortcut is None else block.convShortcut(activated)
    assert (block.convShortcut is None) == (channels_out == 4)
    torch.testing.assert_close(block(x), branch + shortcut)


def test_inverted_residuals_add_their_input_only_where_shapes_agree() -> None:
    block = InvertedResidual(8, 8, stride=1, expansion=6).eval()
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(x), x + block.conv(x))
    assert InvertedResidual(8, 8, stride=2, expansion=6).eval()(x).shape == (2, 8, 2, 2)


@pytest.mark.parametrize(("pixels", "halved"), [(7, 3), (2, 1), (1, 1)])
def test_halving_pool_stops_at_one_pixel(pixels: int, halved: int) -> None:
    assert HalvingPool()(torch.zeros(1, 2, pixels, pixels)).shape == (1, 2, halved, halved)


@pytest.mark.parametrize(("pixels", "last_map"), [(32, 4), (64, 4)])
def test_block_vgg_pools_a_fourth_time_from_64_pixels_on(pixels: int, last_map: int) -> None:
    sizes: list[int] = []
    with torch.device("meta"):
        network = BlockVGG(10, 3, depth=8).eval()
        hook = network.block4.register_forward_hook(lambda _module, _inputs, out: sizes.append(out.shape[-1]))
        network(torch.empty(1, 3, pixels, pixels))
    hook.remove()
    assert sizes == [last_map]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_exports_with_a_dynamic_batch(name: str) -> None:
    network = ZOO[name](5, 3).eval()
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(network, (torch.randn(2, 3, 16, 16),), dynamic_shapes=batch)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), network(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_trains_in_bfloat16_and_channels_last(name: str) -> None:
    network = ZOO[name](5, 3).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
        loss = F.cross_entropy(logits.float(), torch.arange(4))
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_the_stem_of_stride_four_shrinks_the_maps_and_keeps_the_weights_shapes() -> None:
    sizes: list[int] = []
    with torch.device("meta"):
        plain, strided = (resnet_cifar(10, 3, depth=8, stem_stride=stride).eval() for stride in (1, 4))
        for network in (plain, strided):
            network.layer1.register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape[-1]))
            network(torch.empty(1, 3, 96, 96))
    assert sizes == [96, 24]
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in strided.state_dict().items()
    }


def test_convolutions_start_at_he_scale() -> None:
    torch.manual_seed(0)
    weight = resnet_cifar(10, 3, depth=8, width=64).layer3[0].conv2.weight  # type: ignore[index, union-attr]
    fan_out = weight.shape[0] * 9
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)
