import io
import json
import pickle
import warnings
import zipfile

import pytest
import torch
from torch import nn

from engine.errors import SSDKDError
from engine.graphs import GraphBatchNorm, check_graph, same_logits
from engine.torch_export import read_export, why_not_data

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self, batch_in_view=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 36, 3)
        self.norm.running_mean.fill_(0.25)
        self.batch_in_view = batch_in_view

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.view(self.batch_in_view or x.shape[0], -1))


def write(path, module=None, batch=2, dynamic=False, decompose=False):
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export((module or Small()).eval(), (IMAGES[:batch],), dynamic_shapes=shapes)
        if decompose:
            program = program.run_decompositions()
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getvalue())
    return path


def tampered(path, changes):
    """The archive with some members replaced or added: suffix of the name -> function of the old content."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(members)).partition("/")[0]
    for suffix, change in changes.items():
        name = next((name for name in members if name.endswith(suffix)), f"{top}/{suffix}")
        members[name] = change(members.get(name, b""))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("decompose", [False, True])
def test_state_graph_and_batchnorm_come_back_without_trust(tmp_path, dynamic, decompose):
    original = Small().eval()
    path = write(tmp_path / "a.pt2", original, dynamic=dynamic, decompose=decompose)
    assert list(why_not_data(path)) == []
    state, graph = read_export(path, trust_pickle=False)
    assert torch.equal(state["norm.running_mean"], original.norm.running_mean)
    assert (graph.input_shape, graph.batch) == ((3, 8, 8), None if dynamic else 2)
    layers = [layer for layer in graph.module.modules() if isinstance(layer, GraphBatchNorm)]
    assert len(layers) == 1
    assert torch.equal(layers[0].running_mean, original.norm.running_mean)
    assert same_logits(graph.module, graph, (3, 8, 8))
    check_graph(graph, (3, 8, 8), "a.pt2")
    images = torch.cat([IMAGES, IMAGES, IMAGES[:1]])
    with torch.no_grad():
        torch.testing.assert_close(graph.module(images), original(images))


def test_a_batch_that_is_really_fixed_is_said(tmp_path):
    class Fixed(Small):
        def forward(self, x):
            return super().forward(x) + torch.arange(6, dtype=torch.float32).reshape(2, 3)

    _, graph = read_export(write(tmp_path / "a.pt2", Fixed()), trust_pickle=False)
    with pytest.raises(SSDKDError, match="exported for batches of 2") as caught:
        check_graph(graph, (3, 8, 8), "a.pt2")
    assert "dynamic batch" in caught.value.hint


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.marker),)


def pickled_inputs(marker):
    buffer = io.BytesIO()
    torch.save(RunsCode(marker), buffer)
    return buffer.getvalue()


def with_operation(target):
    def change(content):
        program = json.loads(content)
        program["graph_module"]["graph"]["nodes"][0]["target"] = target
        return json.dumps(program).encode()

    return change


def with_expression(text):
    def change(content):
        program = json.loads(content)
        program["graph_module"]["graph"]["sym_int_values"] = {"s0": {"as_expr": {"expr_str": text, "hint": None}}}
        return json.dumps(program).encode()

    return change


def with_pickled_weights(content):
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


@pytest.mark.parametrize(
    ("suffix", "make", "reason"),
    [
        ("data/sample_inputs/model.pt", lambda marker: lambda _: pickled_inputs(marker), r"mkdir in the member"),
        (
            "data/constants/opaque_obj_0",
            lambda marker: lambda _: pickle.dumps(RunsCode(marker)),
            "member .*opaque_obj_0",
        ),
        ("data/aotinductor/model/run.so", lambda _: lambda _: b"\x7fELF", r"member .*run\.so"),
        ("models/model.json", lambda _: with_operation("torch.os.system"), r"operation torch\.os\.system"),
        ("models/model.json", lambda _: with_operation("torch.ops.aten.from_file.default"), "operation .*from_file"),
        ("models/model.json", lambda _: with_expression("__import__('os').getcwd()"), "expression .*__import__"),
        ("model_weights_config.json", lambda _: with_pickled_weights, "pickled weights"),
    ],
)
def test_a_tampered_program_does_not_run(tmp_path, suffix, make, reason):
    path, marker = write(tmp_path / "a.pt2"), tmp_path / "ran"
    tampered(path, {suffix: make(marker)})
    with pytest.raises(SSDKDError, match=reason) as caught:
        read_export(path, trust_pickle=False)
    assert not marker.exists()
    assert "--trust-pickle" in caught.value.hint


def test_damaged_programs(tmp_path):
    path = tampered(write(tmp_path / "a.pt2"), {"models/model.json": lambda content: content[:100]})
    with pytest.raises(SSDKDError, match="damaged or cut short"):
        read_export(path, trust_pickle=False)
    path = tampered(write(tmp_path / "b.pt2"), {"data/weights/weight_0": lambda content: content[:8]})
    with pytest.raises(SSDKDError, match="damaged or cut short"):
        read_export(path, trust_pickle=False)


def test_two_inputs_are_refused(tmp_path):
    class Two(nn.Module):
        def forward(self, x, y):
            return x.mean((2, 3)) + y.mean((2, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Two(), (IMAGES, IMAGES)), tmp_path / "a.pt2")
    with pytest.raises(SSDKDError, match="takes 2 inputs"):
        read_export(tmp_path / "a.pt2", trust_pickle=False)
