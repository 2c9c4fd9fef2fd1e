"""`.pt2` files of torch.export, read without running code of theirs unless they are trusted.

torch.export.load is no reader for strangers' files: it unpickles members (falling back to a full unpickling where the
weights-only one fails), looks operations up by dotted names from `torch` on, which reach `torch.os.system`, and
evaluates size expressions. So every member is checked first: weights are raw numbers or pass the weights-only reader,
every operation is one of ATen's, every expression a formula.
"""

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx

from engine.errors import SSDKDError
from engine.graphs import Graph, loosen_batch, restore_batchnorm
from engine.probing import Shape
from engine.safe_pickle import UNREADABLE, damaged
from engine.unwrap import State

# Of the archive, without its top folder. Anything else (compiled code, pickled objects) needs trust.
RAW = re.compile(
    r"data/(weights|constants)/[\w.]+|archive_(format|version)|byteorder|version|\.data/\w+|\.\w+|extra/.*"
)
JSON = re.compile(r"models/\w+\.json|data/(weights|constants)/\w+_config\.json|serialized_exported_program\.json")
PICKLES = re.compile(r"data/(sample_inputs|weights|constants)/\w+\.pt|serialized_\w+\.pt")
OBJECTS = re.compile(r"data/constants/(custom|opaque)_obj_.*")
OPERATION = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
# Numbers, size symbols and sympy's arithmetic, as sympy.srepr writes them.
FORMULA = re.compile(
    r"(?:Symbol\('[suz]\d+'(?:, \w+=(?:True|False))*\)|[suz]\d+|\d+|int_oo|oo|[\s+\-*/(),<>=&|~]"
    r"|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|evaluate=False)*"
)

TALKATIVE = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")


def read_export(path: Path, *, trust_pickle: bool) -> tuple[State, Graph]:
    """The state dict of a torch.export program, and its graph.

    Raises:
        SSDKDError: it needs --trust-pickle, is damaged, or takes something else than one batch of images.
    """
    if not trust_pickle:
        reason = next(why_not_data(path), None)
        if reason:
            raise SSDKDError(
                f"{path.name} is a torch.export program that may run code when it is loaded: expected weights and ATen"
                f" operations alone, found {reason}. Nothing was run",
                "give the checkpoint that it was exported from, "
                "or add --trust-pickle if you trust whoever made the file",
            )
    try:
        with _quiet():
            program = torch.export.load(io.BytesIO(path.read_bytes()))
    except (*UNREADABLE, AssertionError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    state = {name: value.detach() for name, value in program.state_dict.items() if isinstance(value, Tensor)}
    shape, batch = _image_input(program, path)
    reference = _plain(program.module())
    module = _plain(program.module())
    restore_batchnorm(module)
    if batch is not None:
        loosen_batch(module, batch)

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


def why_not_data(path: Path) -> Iterator[str]:
    """What in a `.pt2` file is more than weights and ATen operations; nothing for a file that is safe to load."""
    try:
        with zipfile.ZipFile(path) as archive:
            for full_name in archive.namelist():
                name = (
                    full_name
                    if full_name.startswith("serialized_") or "/" not in full_name
                    else full_name.partition("/")[2]
                )
                if JSON.fullmatch(name):
                    yield from _unsafe_strings(json.loads(archive.read(full_name)))
                elif PICKLES.fullmatch(name):
                    yield from _unsafe_pickle(full_name, archive.read(full_name))
                elif OBJECTS.fullmatch(name) or not RAW.fullmatch(name):
                    yield f"the member {full_name}"
    except (zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def _unsafe_pickle(name: str, content: bytes) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # whatever it raises, torch.export.load would then unpickle it in full
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        yield f"{wanted.group(1)} in the member {name}" if wanted else f"a pickled object in the member {name}"


def _unsafe_strings(value: object) -> Iterator[str]:
    """Operations and expressions in a program's JSON that are no plain computation."""
    if isinstance(value, dict):
        target = value.get("target")
        if isinstance(target, str) and "inputs" in value and not OPERATION.fullmatch(target):
            yield f"the operation {target}"
        for key, inner in value.items():
            if key == "use_pickle" and inner:
                yield "pickled weights"
            if key == "expr_str" and not (isinstance(inner, str) and FORMULA.fullmatch(inner)):
                yield f"the expression {inner!r}"
            yield from _unsafe_strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _unsafe_strings(inner)


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
    """A program's module as any other: images in, logits out, eval() allowed, any batch.

    Whether the batch is really free is for `check_graph` to find out.
    """
    if not isinstance(exported, fx.GraphModule):
        raise AssertionError(f"ExportedProgram.module() gave a {type(exported).__name__}")
    graph = exported.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph.erase_node(node)
        if node.op == "output" and isinstance(node.args[0], list | tuple) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(exported, graph)
