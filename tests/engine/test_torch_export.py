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
from engine.torch_export import _is_formula, read_export

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


class Casting(Small):
    """Casts a map, and makes tensors of its own."""

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        steps = torch.arange(6, device=x.device).to(self.head.weight.dtype)
        return self.head((x.float() * steps + torch.ones(1)).to(torch.float32).flatten(1))


@pytest.mark.parametrize("decompose", [False, True])
def test_a_graph_runs_in_half_precision_and_where_its_images_are(tmp_path, decompose):
    original = Casting().eval()
    _, graph = read_export(write(tmp_path / "a.pt2", original, dynamic=True, decompose=decompose), trust_pickle=False)
    with torch.no_grad():
        torch.testing.assert_close(graph.module(IMAGES), original(IMAGES))
        with torch.autocast("cpu", torch.bfloat16):
            half = graph.module(IMAGES)
        torch.testing.assert_close(half.float(), original(IMAGES), rtol=0.05, atol=0.05)
        assert graph.module.to("meta")(IMAGES.to("meta")).shape == (2, 3)


def test_a_batchnorm_before_a_reshape_leaves_the_batch_free(tmp_path):
    class Flat(Small):
        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.head(x.view(x.size(0), -1))

    original = Flat().eval()
    for decompose in (False, True):
        _, graph = read_export(write(tmp_path / "a.pt2", original, decompose=decompose), trust_pickle=False)
        check_graph(graph, (3, 8, 8), "a.pt2")
        with torch.no_grad():
            torch.testing.assert_close(graph.module(IMAGES[:1]), original(IMAGES[:1]))


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


def making(marker):
    """Python source that makes the folder `marker`; without a dot, at which names of layers are split."""
    return f"getattr(__import__('os'), 'mkdir')({str(marker)!r})"


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


def with_texts(old, new):
    """The program with one text for another, wherever it is a whole value or key."""

    def changed(value):
        if isinstance(value, dict):
            return {changed(key): changed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [changed(inner) for inner in value]
        return new if value == old else value

    return lambda content: json.dumps(changed(json.loads(content))).encode()


def with_signature(**changes):
    def change(content):
        program = json.loads(content)
        program["graph_module"]["module_call_graph"][0]["signature"] |= changes
        return json.dumps(program).encode()

    return change


def structure(kind, context):
    """The inputs of a program, as pytree writes ((one tensor,), `context` of a dictionary)."""
    leaf = {"type": None, "context": None, "children_spec": []}
    images = {"type": "builtins.tuple", "context": "null", "children_spec": [leaf]}
    others = {"type": kind, "context": context, "children_spec": []}
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [images, others]}])


FACTORY = (
    "collections.defaultdict",
    {"default_factory_module": "tampered", "default_factory_name": "x", "dict_context": []},
)


def with_object(_content):
    """A constant that the loader unpickles: it finds the member whatever its case."""
    one = {"as_int": 1}
    meta = {"dtype": 1, "sizes": [one], "strides": [one], "storage_offset": {"as_int": 0}, "layout": 7}
    meta |= {"requires_grad": False, "device": {"type": "cpu", "index": None}}
    payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": meta}
    return json.dumps({"config": {"x": payload}}).encode()


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
        ("models/model.json", lambda _: with_expression("9**9**9**9"), r"expression 9\*\*9"),
        ("models/model.json", lambda _: with_expression(f"1 << {'9' * 9}"), "expression 1 <<"),
        ("models/model.json", lambda _: with_expression("9" * 5000), "expression 9999"),
        ("models/model.json", lambda _: with_expression("Pow(9, Pow(9, Integer(9)))"), "expression Pow"),
        ("models/model.json", lambda _: with_expression("Pow(9, Integer(99))"), "expression Pow"),
        ("models/model.json", lambda _: with_operation("torch.ops.aten.__class__.mro"), "operation .*__class__"),
        ("model_weights_config.json", lambda _: with_pickled_weights, "pickled weights"),
        ("models/model.json", lambda marker: with_texts("x", f"x={making(marker)}"), "the name x=getattr"),
        ("models/model.json", lambda marker: with_texts("relu", f"{making(marker)}; r"), "the name getattr"),
        ("model.json", lambda marker: with_texts("conv.weight", f'conv.w", {making(marker)})#'), "the name conv.w"),
        (
            "models/model.json",
            lambda marker: with_signature(forward_arg_names=["x", f"y={making(marker)}"]),
            "the name y=getattr",
        ),
        (
            "models/model.json",
            lambda marker: with_signature(in_spec=structure("builtins.dict", json.dumps([f"a':{making(marker)}, 'b"]))),
            "the structure .*getattr",
        ),
        ("models/model.json", lambda _: with_signature(in_spec=structure(*FACTORY)), "the structure .*defaultdict"),
    ],
)
def test_a_tampered_program_does_not_run(tmp_path, monkeypatch, suffix, make, reason):
    path, marker = write(tmp_path / "a.pt2"), tmp_path / "ran"
    (tmp_path / "tampered.py").write_text(making(marker))
    monkeypatch.syspath_prepend(tmp_path)
    changes = {suffix: make(marker)}
    if suffix == "model.json":  # a layer has its name in two members
        changes["model_weights_config.json"] = changes[suffix]
    tampered(path, changes)
    with pytest.raises(SSDKDError, match=reason) as caught:
        check_graph(read_export(path, trust_pickle=False)[1], (3, 8, 8), "a.pt2")
    assert not marker.exists()
    assert "--trust-pickle" in caught.value.hint


def test_an_object_under_a_name_in_capitals_does_not_run(tmp_path):
    path, marker = write(tmp_path / "a.pt2"), tmp_path / "ran"
    changes = {
        "data/constants/model_constants_config.json": with_object,
        "data/constants/OPAQUE_OBJ_0": lambda _: pickle.dumps(RunsCode(marker)),
    }
    with pytest.raises(SSDKDError, match=r"opaque_obj_0|OPAQUE_OBJ_0") as caught:
        read_export(tampered(path, changes), trust_pickle=False)
    assert not marker.exists()
    assert "--trust-pickle" in caught.value.hint


@pytest.mark.parametrize("second", ["model.pt", "MODEL.pt"])
def test_two_members_of_one_name_are_refused(tmp_path, second):
    """Python's reader takes the last of them, torch's another."""
    path, marker = write(tmp_path / "a.pt2"), tmp_path / "ran"
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("sample_inputs/model.pt"))
        harmless = archive.read(name)
    tampered(path, {"sample_inputs/model.pt": lambda _: pickled_inputs(marker)})
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(name.replace("model.pt", second), harmless)
    with pytest.raises(SSDKDError, match=r"model\.pt more than once") as caught:
        read_export(path, trust_pickle=False)
    assert not marker.exists()
    assert "--trust-pickle" in caught.value.hint


@pytest.mark.parametrize("trust", [False, True])
def test_guards_are_not_run(tmp_path, trust):
    marker = tmp_path / "ran"

    def change(content):
        return json.dumps(json.loads(content) | {"guards_code": [f"1 #\n)\n{making(marker)}\ndef g():\n  (1"]}).encode()

    path = tampered(write(tmp_path / "a.pt2"), {"models/model.json": change})
    _, graph = read_export(path, trust_pickle=trust)
    assert not marker.exists()
    check_graph(graph, (3, 8, 8), "a.pt2")


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


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Pow(Symbol('s0', integer=True), Integer(2)))",
        "Add(Pow(Symbol('s0', integer=True), Integer(-1)), Integer(1000000))",
        "Max(1, s0 // 2 + 3)",
        "int_oo",
    ],
)
def test_sizes_that_torch_writes_are_formulas(text):
    assert _is_formula(text)


class NamedAsOurs(nn.Module):
    """Has layers of the names that are given to what is put into a graph."""

    def __init__(self):
        super().__init__()
        self.batchnorm_1, self.batchnorm_0 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.output_0 = nn.Linear(3, 3)
        self.batchnorm_1.running_mean.fill_(0.5)

    def forward(self, x):
        return self.output_0(self.batchnorm_0(self.batchnorm_1(x)).mean((2, 3)))


@pytest.mark.parametrize("decompose", [False, True])
def test_layers_may_have_any_names(tmp_path, decompose):
    network = NamedAsOurs()
    _, graph = read_export(write(tmp_path / "a.pt2", network, dynamic=True, decompose=decompose), trust_pickle=False)
    assert torch.allclose(graph.module(IMAGES), network(IMAGES), atol=1e-5)
    assert sum(isinstance(layer, GraphBatchNorm) for layer in graph.module.modules()) == 2
