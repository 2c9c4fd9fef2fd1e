"""TorchScript archives: their state dict, and their operations as a module whose BatchNorm layers take hooks.

A loaded ScriptModule's own layers take none. So the frozen graph is written out operation by operation; branches, which
are decisions about sizes or about training, are taken as one example image takes them.

Loading an archive runs its scripts. They are no Python, but they have operations on files (`torch.save` overwrites), so
the scripts of a file that is not trusted are searched for these first.
"""

import io
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from engine.errors import SSDKDError
from engine.graphs import Graph, loosen_device, rename_convolutions, restore_batchnorm, show_outputs
from engine.probing import FORWARD_ERRORS, TRIED_PIXELS, noise
from engine.safe_archive import FILE_OPERATIONS, needs_trust, packed, read_members, without_folder
from engine.safe_pickle import UNREADABLE, damaged
from engine.shapes import Shape
from engine.unwrap import State

# TorchScript's own operations on numbers and lists, which PyTorch's dispatcher does not take from Python.
ON_NUMBERS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "neg", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{"len": len, "copy": list, "Int": int, "Float": float, "Bool": bool, "div": operator.truediv, "list": list},
    **{"remainder": operator.mod, "__getitem__": operator.getitem, "__contains__": operator.contains},
    **{"__is__": operator.is_, "__isnot__": operator.is_not, "__not__": operator.not_},
    **{"__and__": operator.and_, "__or__": operator.or_},
}

# Of the archive, without its top folder: what torch needs to load it, and the form of PyTorch before 1.4, in which any
# member may be a script. To torch's reader, upper and lower case are one.
SCRIPTS = re.compile(r"code/.*\.py", re.I)
OBJECTS = re.compile(r"(data|constants)\.pkl", re.I)
RAW = re.compile(r"(data|constants)/\d+|version|byteorder|\.\w+(/\w+)?", re.I)
OLD = re.compile(r"model\.json", re.I)

TEXT = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
ATTRIBUTE = re.compile(r"\bgetattr\(([\w.() ]*), \u2400(\d+)\u2400\)")
NOT_COMPUTATION = re.compile(
    rf"\b(?:{'|'.join(FILE_OPERATIONS)}|rpc_\w+|torch\.classes)\b"
    r"|(?<![\w.])ops\b(?!\.(?:prim|aten|torchvision)\.)(?:\.\w+)*"
)
# Ways to write one of these so that it does not look like it; torch writes none of them.
DISGUISE = re.compile(r"""["'#\\]|\bgetattr\b|\b(?:torch|__torch__)\b(?!\.\w)""")
CUSTOM_CLASS = re.compile(rb"torch[.\s]classes")


def read_torchscript(
    path: Path, input_shape: Shape | None = None, *, trust_pickle: bool = False
) -> tuple[State, Graph, list[str]]:
    """The state dict of a TorchScript archive, its graph, and warnings.

    `input_shape`: C, H, W if it is known; the archive does not say.

    Raises:
        SSDKDError: it is damaged, or it needs --trust-pickle.
    """
    file = io.BytesIO(path.read_bytes()) if trust_pickle else _checked(path)
    try:
        # torch.jit is deprecated, and warns; the files are there nevertheless.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            script = torch.jit.load(file, map_location="cpu").eval()
            # Frozen, all methods become one graph and all weights constants; without optimizing, BatchNorm stays.
            trainable = any(True for _ in script.parameters()) or any(True for _ in script.buffers())
            frozen = torch.jit.freeze(script, optimize_numerics=False) if trainable else script
    except UNREADABLE as error:
        raise damaged(path, error) from error
    state = {name: value.detach() for name, value in script.state_dict().items() if isinstance(value, Tensor)}

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = script(images)
        return out

    shape = input_shape or _working_shape(script, state)
    notes = []
    module: nn.Module = Bare(script)
    if shape is not None:
        try:
            operations = _as_operations(frozen.graph, noise(shape))
            loosen_device(operations)
            rename_convolutions(operations)
            module = restore_batchnorm(operations)
            show_outputs(operations)
        except _NotPlainError as error:
            notes.append(f"The TorchScript graph has {error}, so its BatchNorm layers cannot be used.")
    return state, Graph(module, run, None, None), notes


def _checked(path: Path) -> io.BytesIO:
    """A copy of the archive in which everything was checked.

    Raises:
        SSDKDError: its scripts may do more than compute, or it is damaged.
    """
    kept: dict[str, bytes] = {}
    for full_name, content in read_members(path).items():
        name = without_folder(full_name)
        found: str | None = None
        if SCRIPTS.fullmatch(name):
            found = _not_computation(content.decode("latin-1"))
        elif OBJECTS.fullmatch(name):
            found = "torch.classes" if CUSTOM_CLASS.search(content) else None
        elif OLD.fullmatch(name):
            found = "an archive of PyTorch before 1.4"
        elif not RAW.fullmatch(name):
            continue
        if found:
            raise needs_trust(path, "a TorchScript archive", "operations on tensors alone", f"{found} in {full_name}")
        kept[full_name] = content
    return packed(kept)


def _not_computation(script: str) -> str | None:
    """What in a script may reach files, other processes or unknown code; texts in it are not looked at."""
    texts: list[str] = []

    def put_aside(match: re.Match[str]) -> str:
        texts.append(match.group(1))
        return f"\u2400{len(texts) - 1}\u2400"  # no byte of the script is read as this

    def attribute(match: re.Match[str]) -> str:
        owner, name = match.group(1), texts[int(match.group(2))]
        return match.group() if "\\" in name else f"{owner}.{name if name.isidentifier() else 'layer'}"

    if '"""' in script:
        return '"""'
    script = TEXT.sub(put_aside, script)
    # So torch writes layers whose names are no variables, as those of Sequential; `getattr` gets anything else too.
    while (shorter := ATTRIBUTE.sub(attribute, script)) != script:
        script = shorter
    found = NOT_COMPUTATION.search(script) or DISGUISE.search(script)
    return found.group() if found else None


class Bare(nn.Module):
    """A ScriptModule as it is, inside a module that knows all that modules know."""

    def __init__(self, script: nn.Module) -> None:
        super().__init__()
        self.script = script

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> what the archive computes."""
        out: Tensor = self.script(images)
        return out


class _NotPlainError(Exception):
    """A graph with what a list of operations cannot hold."""


def _working_shape(script: nn.Module, state: State) -> Shape | None:
    """A size of images that the network takes; TorchScript does not say which it was made for."""
    first = next((value for value in state.values() if value.dim() == 4), None)
    channels = [int(first.shape[1])] if first is not None else [3, 1]
    for shape in [(count, pixels, pixels) for count in channels for pixels in TRIED_PIXELS]:
        try:
            with torch.no_grad():
                script(noise(shape))
        except FORWARD_ERRORS:
            continue
        return shape
    return None


def _as_operations(graph: Any, example: Tensor) -> fx.GraphModule:
    """The graph as torch.fx operations. Each is also carried out on `example`, so that branches can be decided."""
    root = nn.Module()
    written = fx.Graph()
    # Per value: what stands for it in the new graph, and what it is for the example.
    symbols: dict[str, Any] = {}
    values: dict[str, Any] = {}
    _self, *inputs = graph.inputs()
    if len(inputs) != 1:
        raise SSDKDError(
            f"the TorchScript network takes {len(inputs)} inputs: expected one, a batch of images",
            "trace a network that takes the images alone, or give the checkpoint that it was made from",
        )
    (images,) = inputs
    symbols[images.debugName()], values[images.debugName()] = written.placeholder("images"), example

    def define(name: str, symbol: Any, value: Any) -> None:
        symbols[name], values[name] = symbol, value

    def walk(nodes: Any) -> None:
        for node in nodes:
            inputs = [value.debugName() for value in node.inputs()]
            outputs = [value.debugName() for value in node.outputs()]
            kind = node.kind()
            if kind == "prim::Constant":
                constant = node.output().toIValue()
                symbol = constant
                if isinstance(constant, Tensor):
                    name = f"constant_{len(root.state_dict())}"
                    if constant.is_floating_point() and constant.dim():
                        root.register_parameter(name, nn.Parameter(constant.detach()))
                    else:
                        root.register_buffer(name, constant.detach())
                    symbol = written.get_attr(name)
                define(outputs[0], symbol, constant)
            elif kind in ("prim::ListConstruct", "prim::TupleConstruct"):
                make = list if kind == "prim::ListConstruct" else tuple
                define(outputs[0], make(symbols[name] for name in inputs), make(values[name] for name in inputs))
            elif kind in ("prim::ListUnpack", "prim::TupleUnpack"):
                for index, name in enumerate(outputs):
                    symbol = symbols[inputs[0]]
                    part = (
                        symbol[index]
                        if isinstance(symbol, list | tuple)
                        else written.call_function(operator.getitem, (symbol, index))
                    )
                    define(name, part, values[inputs[0]][index])
            elif kind == "prim::If":
                block = list(node.blocks())[0 if values[inputs[0]] else 1]
                walk(block.nodes())
                for name, result in zip(outputs, block.outputs(), strict=True):
                    define(name, symbols[result.debugName()], values[result.debugName()])
            elif kind == "aten::append" and isinstance(symbols[inputs[0]], list):
                for known in (symbols, values):
                    known[inputs[0]].append(known[inputs[1]])
                define(outputs[0], symbols[inputs[0]], values[inputs[0]])
            elif kind == "aten::warn":
                pass
            elif kind == "prim::RaiseException":
                raise _NotPlainError("a branch that refuses the image")
            elif kind.startswith("aten::") or kind in ("prim::NumToTensor", "prim::dtype", "prim::device"):
                operation, keywords = _operation(node, [values[name] for name in inputs])
                count = len(inputs) - len(keywords)
                named = dict(zip(keywords, inputs[count:], strict=True))
                try:
                    with torch.no_grad():
                        value = operation(
                            *(values[name] for name in inputs[:count]),
                            **{key: values[name] for key, name in named.items()},
                        )
                except FORWARD_ERRORS as error:
                    raise _NotPlainError(f"an instruction {kind} on numbers") from error
                symbol = value
                # What holds no image and no size is a plain number: it needs no operation.
                if any(_has_symbol(symbols[name]) for name in inputs):
                    arguments = tuple(symbols[name] for name in inputs[:count])
                    symbol = written.call_function(
                        operation, arguments, {key: symbols[name] for key, name in named.items()}
                    )
                if len(outputs) == 1:
                    define(outputs[0], symbol, value)
                    continue
                for index, name in enumerate(outputs):
                    is_node = isinstance(symbol, fx.Node)
                    part = written.call_function(operator.getitem, (symbol, index)) if is_node else symbol[index]
                    define(name, part, value[index])
            else:
                raise _NotPlainError(f"an instruction {kind}")

    walk(graph.nodes())
    (result,) = [value.debugName() for value in graph.outputs()]
    written.output(symbols[result])
    return fx.GraphModule(root, written)


def _operation(node: Any, arguments: Sequence[Any]) -> tuple[Callable[..., Any], list[str]]:
    """The operation of a node, and the names of those of its last arguments that are taken by name alone."""
    namespace, _, name = node.kind().partition("::")
    if not any(isinstance(argument, Tensor) for argument in arguments) and name in ON_NUMBERS:
        return ON_NUMBERS[name], []
    overload = node.schema().partition("(")[0].partition(".")[2] or "default"
    try:
        operation = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError as error:
        raise _NotPlainError(f"an instruction {node.kind()}") from error
    return operation, [argument.name for argument in operation._schema.arguments if argument.kwarg_only]


def _has_symbol(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_symbol, value))
    return isinstance(value, fx.Node)
