"""`.pt2` files of torch.export, read without running code of theirs unless they are trusted.

torch.export.load is no reader for strangers' files: it unpickles members (falling back to a full unpickling where the
weights-only one fails), looks operations up by dotted names from `torch` on, which reach `torch.os.system`, evaluates
size expressions, and pastes names and guards into Python source that it runs. So it gets a copy of what was checked:
weights are raw numbers or pass the weights-only reader, every operation is one of ATen's, every expression a formula,
every name a name; guards and the exporter's notes are left out.
"""

import ast
import io
import json
import keyword
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from engine.errors import SSDKDError
from engine.graphs import Graph, loosen_batch, loosen_device, restore_batchnorm, show_outputs
from engine.safe_archive import FILE_OPERATIONS, needs_trust, packed, read_members, without_folder
from engine.safe_pickle import UNREADABLE, damaged
from engine.shapes import Shape
from engine.unwrap import State

# Of the archive, without its top folder. Anything else (compiled code, pickled objects) needs trust. To torch's reader,
# upper and lower case are one.
RAW = re.compile(
    r"data/(weights|constants)/[\w.]+|archive_(format|version)|byteorder|version|\.data/\w+|\.\w+|extra/.*", re.I
)
JSON = re.compile(r"models/\w+\.json|data/(weights|constants)/\w+_config\.json|serialized_exported_program\.json", re.I)
PICKLES = re.compile(r"data/(sample_inputs|weights|constants)/\w+\.pt|serialized_\w+\.pt", re.I)
OBJECTS = re.compile(r"data/constants/(custom|opaque)_obj_.*", re.I)

ATEN_OPERATION = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
NUMBER_OPERATION = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
# Numbers, size symbols and sympy's arithmetic, as sympy.srepr writes them.
FORMULA = re.compile(
    r"(?:Symbol\('[suz]\d++'(?:, \w++=(?:True|False))*\)|[suz]\d++|\d++|int_oo|oo|[\s+\-*/(),<>=&|~]"
    r"|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|evaluate=False)*"
)
LONGEST_FORMULA, MOST_POWERS = 2000, 4
SMALL_POWER = re.compile(r"-?\d|Integer\(-?\d\)")
# Layers of a network are named freely, but these names end between the quotes of Python source.
LAYER = re.compile(r'(?!__|.*\.__)[^"\\\x00-\x1f\x7f]*')
PAYLOAD = re.compile(r"(weight|tensor)_\w+")
WORD = re.compile(r"-?[\w.]*")
CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")

TALKATIVE = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")


def read_export(path: Path, *, trust_pickle: bool) -> tuple[State, Graph]:
    """The state dict of a torch.export program, and its graph.

    Raises:
        SSDKDError: it needs --trust-pickle, is damaged, or takes something else than one batch of images.
    """
    file = io.BytesIO(path.read_bytes()) if trust_pickle else _checked(path)
    try:
        with _quiet():
            program = torch.export.load(file)
    except (*UNREADABLE, AssertionError) as error:
        raise damaged(path, error) from error
    state = {name: value.detach() for name, value in program.state_dict.items() if isinstance(value, Tensor)}
    shape, batch = _image_input(program, path)
    # The guards are Python source in the file; whether the batch is free is for `check_graph` to find out.
    reference = _plain(program.module(check_guards=False))
    module = _plain(program.module(check_guards=False))
    loosen_device(module)
    restore_batchnorm(module)
    if batch is not None:
        loosen_batch(module, batch)
    show_outputs(module)

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = reference(images)
        return out

    return state, Graph(module, run, shape, batch)


@contextmanager
def _quiet() -> Iterator[None]:
    """The loader talks about its own formats, in warnings and in logs that reach the terminal."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _checked(path: Path) -> io.BytesIO:
    """A copy of the archive in which everything was checked.

    Raises:
        SSDKDError: something in it is more than weights and ATen operations, or it is damaged.
    """
    kept: dict[str, bytes] = {}
    for full_name, content in read_members(path).items():
        name = full_name if full_name.startswith("serialized_") else without_folder(full_name)
        reason: str | None = None
        if JSON.fullmatch(name):
            try:
                parsed = _without_notes(json.loads(content))
                reason = next(_unsafe_strings(parsed), None)
                kept[full_name] = json.dumps(parsed).encode()
            except (ValueError, RecursionError) as error:
                raise damaged(path, error) from error
        elif PICKLES.fullmatch(name):
            reason = _unsafe_pickle(full_name, content)
            kept[full_name] = content
        elif RAW.fullmatch(name) and not OBJECTS.fullmatch(name):
            kept[full_name] = content
        else:
            reason = f"the member {full_name}"
        if reason:
            raise needs_trust(path, "a torch.export program", "weights and ATen operations alone", reason)
    return packed(kept)


def _unsafe_pickle(name: str, content: bytes) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # whatever it raises, torch.export.load would then unpickle it in full
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        return f"{wanted.group(1)} in the member {name}" if wanted else f"a pickled object in the member {name}"
    return None


def _without_notes(value: Any, key: str = "") -> Any:
    """A program's JSON without guards, stack traces and other notes, which nothing here needs."""
    if key == "guards_code":
        return []
    if key == "metadata" and isinstance(value, dict) and all(isinstance(note, str) for note in value.values()):
        return {}
    if isinstance(value, dict):
        return {inner_key: _without_notes(inner, inner_key) for inner_key, inner in value.items()}
    return [_without_notes(inner) for inner in value] if isinstance(value, list) else value


def _unsafe_strings(value: object, key: str = "") -> Iterator[str]:
    """What in a program's JSON is no plain computation; every string in it is looked at."""
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            if inner_key == "use_pickle" and inner:
                yield "pickled weights"
            if inner_key in ("as_graph", "as_operator", "as_custom_obj", "custom_obj") and inner is not None:
                yield f"an argument {inner_key}"
            yield from _unsafe_strings(inner, inner_key)
    elif isinstance(value, list):
        for inner in value:
            yield from _unsafe_strings(inner, key)
    elif isinstance(value, str):
        kind, is_safe = STRINGS.get(key, (key, WORD.fullmatch))
        if not is_safe(value):
            yield f"the {kind} {value}"


def _is_operation(target: str) -> bool:
    """Whether it is one of ATen's, or arithmetic on sizes."""
    aten = ATEN_OPERATION.fullmatch(target)
    if aten is None or aten.group(1) in FILE_OPERATIONS:
        return bool(NUMBER_OPERATION.fullmatch(target))
    operation = getattr(getattr(torch.ops.aten, aten.group(1), None), aten.group(2), None)
    return isinstance(operation, torch._ops.OpOverload)


def _is_name(text: str) -> bool:
    """Whether it can stand in Python source as a variable, or not at all."""
    return not text or (text.isidentifier() and not keyword.iskeyword(text))


def _is_formula(text: str) -> bool:
    """Whether it is arithmetic on sizes that ends soon: sympy would work out any power of any power."""
    if len(text) > LONGEST_FORMULA or not FORMULA.fullmatch(text):
        return False
    try:
        parts = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    numbers = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, int)]
    powers = [part for part in parts if isinstance(part, ast.Call) and ast.unparse(part.func) == "Pow"]
    return (
        max(map(abs, numbers), default=0) <= sys.maxsize
        and not any(isinstance(part, ast.Pow | ast.LShift | ast.RShift) for part in parts)
        and len(powers) <= MOST_POWERS
        and all(len(power.args) == 2 and SMALL_POWER.fullmatch(ast.unparse(power.args[1])) for power in powers)
    )


def _is_structure(text: str) -> bool:
    """Whether it is pytree's notation of nested tuples, lists and dictionaries; others import what they name."""
    try:
        version, tree = json.loads(text)
        return version == 1 and _is_tree(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _is_tree(tree: dict[str, Any]) -> bool:
    keys = json.loads(tree["context"] or "null")
    return (
        (tree["type"] in CONTAINERS or tree["type"] is None)
        and (keys is None or all(isinstance(key, str) and _is_name(key) for key in keys))
        and all(map(_is_tree, tree["children_spec"]))
    )


def _is_anything(_text: str) -> bool:
    return True


# The strings of a program by their key: what they are, and whether one is safe. torch pastes names into source as they
# stand and writes texts as Python literals.
STRINGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "target": ("operation", _is_operation),
    "expr_str": ("expression", _is_formula),
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), ("name", _is_name)),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "fqn"), ("name", LAYER.fullmatch)),
    **dict.fromkeys(("in_spec", "out_spec"), ("structure", _is_structure)),
    "path_name": ("member", PAYLOAD.fullmatch),
    **dict.fromkeys(("as_string", "as_strings", "torch_version"), ("text", _is_anything)),
}


def _image_input(program: torch.export.ExportedProgram, path: Path) -> tuple[Shape, int | None]:
    """(C, H, W) of the one input, and the batch size if it is fixed."""
    names = program.graph_signature.user_inputs
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() != 4:
        raise SSDKDError(
            f"{path.name} takes {len(values)} inputs: expected one tensor of images [B, C, H, W]",
            "export the network with images as its only input, or give the checkpoint that it was exported from",
        )
    example = next((value for value in _tensors(program.example_inputs)), values[0])
    batch = values[0].shape[0]
    channels, height, width = (int(size) for size in example.shape[1:])
    return (channels, height, width), batch if isinstance(batch, int) else None


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _plain(exported: torch.nn.Module) -> fx.GraphModule:
    """A program's module as any other: images in, logits out, eval() allowed, any batch."""
    if not isinstance(exported, fx.GraphModule):
        raise AssertionError(f"ExportedProgram.module() gave a {type(exported).__name__}")
    graph = exported.graph
    for node in list(graph.nodes):
        if node.op == "output" and isinstance(node.args[0], list | tuple) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(exported, graph)
