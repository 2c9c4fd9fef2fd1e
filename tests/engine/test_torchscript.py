import warnings

import pytest
import torch
from torch import Tensor, nn

from engine.errors import SSDKDError
from engine.graphs import GraphBatchNorm, check_graph, relative_error
from engine.torchscript import Bare, read_torchscript


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
