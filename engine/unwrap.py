"""From what a checkpoint holds to the weights of one network: wrappers, prefixes, and the facts that stand beside."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from engine.errors import SSDKDError
from engine.safe_pickle import NumpyArray

State = dict[str, Tensor]

# Where training programs put the weights, the best first: an averaged network is what its owner evaluates.
WRAPPERS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema", "averaged_model", "swa_state_dict"),
    *("state_dict", "model_state_dict", "model_state", "model", "net_state_dict", "net", "network", "teacher"),
    *("backbone", "encoder", "params_ema", "params", "weights", "module", "student"),
)
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.", "encoder.", "teacher.", "student.")
# Optimizers keep tensors too (momenta), shaped like the weights.
NOT_WEIGHTS = re.compile(r"optim|sched|scaler|amp|rng|loops|callbacks|criterion|loss", re.IGNORECASE)
MAX_DEPTH = 4
MAX_PLAIN_NUMBERS = 16  # a mean or a size, not a layer


@dataclass(frozen=True)
class Weights:
    """The weights of one network, in the file's order and without wrapper prefixes; or the network itself."""

    state: State
    module: nn.Module | None
    metadata: dict[str, object]  # what stands beside the weights: epoch, classes, mean, the training arguments, ...
    notes: tuple[str, ...]


def unwrap(loaded: object, file_name: str) -> Weights:
    """Finds the network in whatever torch.load returned.

    Raises SSDKDError if there are no weights in it, or none that are dense real numbers.
    """
    found = list(_networks(loaded, (), 0))
    if not found:
        raise SSDKDError(
            f"{file_name} holds no network: expected a state dict (names with tensors), found {_describe(loaded)}",
            "save the network's weights with torch.save(model.state_dict(), 'network.pt') and give that file",
        )
    found.sort(key=lambda item: _rank(item[0]))
    path, network = found[0]
    notes = []
    others = [".".join(other) for other, _ in found[1:]]
    if others:
        notes.append(
            f"The file holds several networks; {'.'.join(path)!r} was taken, not {', '.join(map(repr, others[:4]))}."
        )
    metadata = metadata_beside(loaded)
    if isinstance(network, nn.Module):
        return Weights({}, bare_module(network), metadata, tuple(notes))
    state, prefix_notes = strip_prefixes({name: value for name, value in network.items() if isinstance(value, Tensor)})
    refuse_unusual(state, file_name)
    return Weights(state, None, metadata, (*notes, *prefix_notes))


def strip_prefixes(state: State) -> tuple[State, list[str]]:
    """Takes off the prefixes that all names share (`module.`, `model.`, ...), as often as there are any."""
    notes = []
    state = {name: value for name, value in state.items() if name != "n_averaged"}
    while True:
        for prefix in PREFIXES:
            inside = [name for name in state if name.startswith(prefix)]
            rest = [name for name in state if not name.startswith(prefix)]
            # A loss's or an augmentation's own tensors may stand beside: none of them is a layer's matrix.
            if (
                inside
                and all(state[name].dim() < 2 for name in rest)
                and any(state[name].dim() >= 2 for name in inside)
            ):
                if rest:
                    notes.append(f"Left out, for they do not belong to the network: {', '.join(rest[:4])}.")
                state = {name.removeprefix(prefix): state[name] for name in inside}
                break
        else:
            return state, notes


def refuse_unusual(state: State, file_name: str) -> None:
    """Raises SSDKDError for a tensor that holds anything else than dense real numbers."""
    for name, value in state.items():
        if kind := _unusual_kind(value):
            raise SSDKDError(
                f"the tensor {name} in {file_name} is {kind}: expected dense tensors of real numbers",
                "make it dense and real once its numbers are loaded (sparse ones with .to_dense()), "
                "save the weights again and give that file",
            )


def _unusual_kind(value: Tensor) -> str | None:
    """What a tensor is, in words, if it is something else than dense real numbers."""
    if value.is_meta:
        return "a shape without numbers, on the meta device"
    if value.is_nested:
        return "nested"
    if value.is_quantized:
        return "quantized"
    if value.layout != torch.strided:
        return str(value.layout).removeprefix("torch.").replace("_", " ")  # "sparse coo"
    return f"complex ({str(value.dtype).removeprefix('torch.')})" if value.is_complex() else None


def bare_module(module: nn.Module) -> nn.Module:
    """Takes a module out of DataParallel, DistributedDataParallel, torch.compile and AveragedModel."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        if isinstance(module, wrappers):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def metadata_beside(loaded: object) -> dict[str, object]:
    """The plain values in a checkpoint, with those of its training arguments (`args`, `hparams`, ...) one level up."""
    metadata: dict[str, object] = {}
    nested_names = ("args", "hparams", "hyper_parameters", "config", "cfg", "opt", "meta", "metadata", "ssdkd")
    for name, value in _items(loaded):
        if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.numel() > MAX_PLAIN_NUMBERS):
            continue
        if name in nested_names and (inner := dict(_items(plain(value)))):
            metadata = {**{key: plain(item) for key, item in inner.items()}, **metadata}
        else:
            metadata[name] = plain(value)
    return metadata


def plain(value: object) -> object:
    """Tensors and arrays as lists (unusual tensors as None), JSON in strings as its value; all else as it is."""
    if isinstance(value, NumpyArray):
        return value.value.tolist()
    if isinstance(value, Tensor):
        return None if _unusual_kind(value) else value.tolist()
    if isinstance(value, str) and value[:1] in "[{":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _networks(
    value: object, path: tuple[str, ...], depth: int
) -> Iterator[tuple[tuple[str, ...], nn.Module | dict[str, object]]]:
    """Every module and every state dict inside `value`, with the names that lead to it."""
    if isinstance(value, nn.Module):
        yield path, value
        return
    if depth > MAX_DEPTH or not isinstance(value, Mapping):
        return
    named = {str(name): inner for name, inner in value.items()}
    tensors = {name: inner for name, inner in named.items() if isinstance(inner, Tensor)}
    if sum(tensor.dim() >= 2 for tensor in tensors.values()) >= 1 and 2 * len(tensors) >= len(named):
        yield path, named
        return
    for name, inner in named.items():
        if not NOT_WEIGHTS.search(name):
            yield from _networks(inner, (*path, name), depth + 1)


def _rank(path: tuple[str, ...]) -> tuple[int, int]:
    names = [name for name in path if name in WRAPPERS]
    return (min((WRAPPERS.index(name) for name in names), default=len(WRAPPERS)), len(path))


def _items(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((str(name), inner) for name, inner in value.items())
    elif isinstance(value, Namespace | SimpleNamespace):
        yield from vars(value).items()


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        names = [str(name) for name in value][:6]
        return f"a dictionary with {', '.join(names)}" if names else "an empty dictionary"
    return f"a {type(value).__name__}"
