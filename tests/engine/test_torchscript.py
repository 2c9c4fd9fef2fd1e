import io
import warnings
import zipfile

import pytest
import torch
from torch import Tensor, nn

from engine.errors import SSDKDError
from engine.graphs import GraphBatchNorm, check_graph, relative_error
from engine.safe_archive import FILE_OPERATIONS
from engine.students import build_network
from engine.torchscript import Bare, read_torchscript
from exporters.to_onnx import to_onnx


class Awkward(nn.Module):
    """What scripted networks have and traced ones have not: branches on sizes, lists that grow, assertions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(8, 3)
        self.norm.running_mean.fill_(0.25)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError("no images")
        parts = [self.norm(self.first(x))]
        if x.size(2) > 4 and x.shape[3] % 2 == 0:
            parts.append(parts[0] * 2.0)
        else:
            parts.append(parts[0])
        joined = torch.cat(parts, 1)
        return self.head(joined.mean([2, 3]).view(x.size(0), -1))


def save(path, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module(), str(path))
    return path


def test_a_scripted_network_becomes_operations_with_its_batchnorm(tmp_path):
    original = Awkward().eval()
    path = save(tmp_path / "a.pt", lambda: torch.jit.script(original))
    state, graph, notes = read_torchscript(path)
    assert notes == []
    assert list(state) == list(original.state_dict())
    layers = [layer for layer in graph.module.modules() if isinstance(layer, GraphBatchNorm)]
    assert [layer.running_mean.tolist() for layer in layers] == [[0.25] * 4]
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert relative_error(graph.module(images), original(images)) < 1e-6
        assert torch.equal(graph.reference(images), original(images).detach())
    assert sum(parameter.numel() for parameter in graph.module.parameters()) == sum(
        parameter.numel() for parameter in original.parameters()
    )


def test_a_traced_network_makes_its_tensors_where_the_images_are(tmp_path):
    class Making(Awkward):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            x = torch.cat((x, x + torch.zeros(x.shape[0], 1, 1, 1)), 1)
            return self.head(x.mean((2, 3)))

    path = save(tmp_path / "a.pt", lambda: torch.jit.trace(Making().eval(), torch.zeros(2, 3, 8, 8)))
    _, graph, notes = read_torchscript(path, (3, 8, 8))
    assert notes == []
    check_graph(graph, (3, 8, 8), "a.pt")
    assert graph.module.to("meta")(torch.zeros(5, 3, 8, 8, device="meta")).shape == (5, 3)


def test_the_convolutions_of_a_trace_are_those_that_exporters_know(tmp_path):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, padding=1),
        nn.Conv2d(4, 4, (3, 1), padding="same", dilation=2, groups=4, bias=False),
        nn.ConvTranspose2d(4, 5, 3, 2, output_padding=1),
        nn.Flatten(2),
        nn.Conv1d(5, 6, 4, 2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    ).eval()
    path = save(tmp_path / "a.pt", lambda: torch.jit.trace(network, torch.zeros(2, 3, 8, 8)))
    _, graph, _ = read_torchscript(path, (3, 8, 8))
    aten = torch.ops.aten
    targets = [node.target for node in graph.module.graph.nodes if "conv" in str(node.target)]
    as_it_was = aten._convolution_mode.default  # with its padding in words
    assert targets == [aten.conv2d.default, as_it_was, aten.convolution.default, aten.convolution.default]
    check_graph(graph, (3, 8, 8), "a.pt")
    proto = to_onnx(graph.module, input_shape=(3, 8, 8), metadata={})
    kinds = [node.op_type for node in proto.graph.node if "Conv" in node.op_type]
    assert kinds == ["Conv", "Conv", "ConvTranspose", "Conv"]


def test_a_loop_is_run_as_it_is_and_said(tmp_path):
    class Loop(Awkward):
        def forward(self, x: Tensor) -> Tensor:
            total = self.norm(self.first(x))
            count = 0
            while bool(total.mean() > -1e9) and count < x.size(0):
                total = total * 0.5
                count += 1
            return total.mean([2, 3])

    path = save(tmp_path / "a.pt", lambda: torch.jit.script(Loop().eval()))
    _, graph, notes = read_torchscript(path)
    assert isinstance(graph.module, Bare)
    assert notes == ["The TorchScript graph has an instruction prim::Loop, so its BatchNorm layers cannot be used."]


def test_a_graph_without_gradients_is_refused(tmp_path):
    class Rounded(Awkward):
        def forward(self, x: Tensor) -> Tensor:
            return torch.round(self.first(x) * 8).to(torch.int32).sum([2, 3]).to(torch.float32)

    path = save(tmp_path / "a.pt", lambda: torch.jit.script(Rounded().eval()))
    _, graph, _ = read_torchscript(path)
    with pytest.raises(SSDKDError, match="cannot be run with gradients"):
        check_graph(graph, (3, 8, 8), "a.pt")


@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_truncated_archive(tmp_path, kept):
    path = save(tmp_path / "a.pt", lambda: torch.jit.script(Awkward().eval()))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(SSDKDError, match="damaged or cut short"):
        read_torchscript(path)


class Saves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x.mean([2, 3]))
        torch.save(y, "VICTIM")
        return y


class SavesWhenLoaded(Awkward):
    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.head.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        torch.save(state[0], "VICTIM")
        self.training = state[1]


def with_script(path, old, new):
    """The archive with another text in the script of its network."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(old.encode(), new.encode()) if name.endswith(".py") else content)
    return path


def run_untrusted(path):
    """All that happens to a teacher: loading, and a forward pass."""
    state, graph, _ = read_torchscript(path, (3, 8, 8))
    graph.reference(torch.zeros(1, 3, 8, 8))
    return state


@pytest.mark.parametrize(
    "call",
    [
        "torch.save",
        "ops.aten.save",
        "ops.aten  .  save",
        'getattr(torch, "save")',
        'getattr(torch, "sa" "ve")',
        'getattr(torch, "\\163ave")',
        'getattr(torch, """save""")',
        "getattr(torch, 'save')",
        'getattr(getattr(ops, "aten"), "save")',
        "torch.\\\n    save",
        "torch.save # ",
        "(torch).save",
    ],
)
def test_a_script_that_writes_files_is_not_run(tmp_path, call):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = with_script(save(tmp_path / "a.pt", lambda: torch.jit.script(Saves().eval())), "VICTIM", str(victim))
    with_script(path, "torch.save(", f"{call}(" if "#" not in call else f"{call}\n    (")
    with pytest.raises(SSDKDError, match="a TorchScript archive that may do more than compute") as caught:
        run_untrusted(path)
    assert victim.read_text() == "precious"
    assert "--trust-pickle" in caught.value.hint


def test_a_script_that_writes_files_when_loaded_is_not_run(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = save(tmp_path / "a.pt", lambda: torch.jit.script(SavesWhenLoaded().eval()))
    with pytest.raises(SSDKDError, match=r"save in .*code/"):
        read_torchscript(with_script(path, "VICTIM", str(victim)), (3, 8, 8))
    assert victim.read_text() == "precious"


def test_a_trusted_script_is_run(tmp_path):
    victim = tmp_path / "victim"
    path = with_script(save(tmp_path / "a.pt", lambda: torch.jit.script(Saves().eval())), "VICTIM", str(victim))
    _, graph, _ = read_torchscript(path, (3, 8, 8), trust_pickle=True)
    graph.reference(torch.zeros(1, 3, 8, 8))
    assert victim.exists()


@pytest.mark.parametrize(
    "call",
    [
        'ops.image.read_file("x")',
        "__torch__.torch.classes.c10d.Work()",
        'rpc_async("other", x)',
        'torch.from_file("x")',
    ],
)
def test_other_ways_out_of_memory_are_refused(tmp_path, call):
    path = save(tmp_path / "a.pt", lambda: torch.jit.script(Saves().eval()))
    with pytest.raises(SSDKDError, match="may do more than compute"):
        read_torchscript(with_script(path, 'torch.save(y, "VICTIM")', f"z = {call}"), (3, 8, 8))


def test_every_operation_of_torchs_on_files_is_known():
    """What a script that passes can call: ATen's, prim's and torchvision's operations."""
    named_like_files = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith(("aten::", "prim::", "torchvision::"))
        for argument in schema.arguments
        if "str" in str(argument.type) and any(word in argument.name for word in ("file", "path", "url", "dir"))
    }
    assert named_like_files == set(FILE_OPERATIONS)


@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(1, 3, 64, 64))])
@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_published_networks_need_no_trust(tmp_path, make, name):
    network = build_network(f"torchvision/{name}", classes=5, channels=3, pixels=64).eval()
    path = save(tmp_path / "a.pt", lambda: make(network))
    state, _, _ = read_torchscript(path, (3, 64, 64))
    assert list(state) == list(network.state_dict())


def test_texts_in_a_script_are_no_code(tmp_path):
    class Message(Awkward):
        def forward(self, x: Tensor) -> Tensor:
            if x.dim() != 4:
                raise ValueError('torch can\'t save this # as it is: "ops" \\')
            return self.head(torch.cat([x.mean([2, 3])] * 3, 1)[:, :8])

    path = save(tmp_path / "a.pt", lambda: torch.jit.script(Message().eval()))
    assert isinstance(read_torchscript(path, (3, 8, 8))[1].module, nn.Module)


def test_the_archive_may_come_with_extra_files(tmp_path):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Awkward().eval()), file, _extra_files={"config.txt": "{}"})
    (tmp_path / "a.pt").write_bytes(file.getvalue())
    assert "head.weight" in read_torchscript(tmp_path / "a.pt")[0]


class TakesTwo(nn.Module):
    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        return (images * mask).mean((2, 3))


def test_a_network_of_two_inputs(tmp_path):
    path = save(tmp_path / "a.pt", lambda: torch.jit.script(TakesTwo().eval()))
    with pytest.raises(SSDKDError, match="takes 2 inputs: expected one"):
        read_torchscript(path, (3, 8, 8))


class OfTwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        deviation, mean = torch.std_mean(self.norm(x), [2, 3])
        return self.head(torch.cat([deviation, mean], 1))


def test_an_operation_of_two_outputs_leaves_the_batchnorm(tmp_path):
    network = OfTwoOutputs().eval()
    _, graph, notes = read_torchscript(save(tmp_path / "a.pt", lambda: torch.jit.script(network)), (3, 8, 8))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(graph.module(images), network(images))
    assert notes == []
    assert any(isinstance(layer, GraphBatchNorm) for layer in graph.module.modules())
