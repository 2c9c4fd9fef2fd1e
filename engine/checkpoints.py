"""A teacher's file, of whatever format, as weights, a module, or an exported graph.

The content decides what it is, never the suffix.
"""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors

from engine.errors import SSDKDError
from engine.graphs import Graph
from engine.onnx_graph import read_onnx
from engine.readable import ACCEPTED, check_readable
from engine.safe_pickle import ARCHIVE_MAGIC, LEGACY_MAGIC, UNREADABLE_ARCHIVE, damaged, safe_load, trusted_load
from engine.shapes import Shape
from engine.torch_export import read_export
from engine.torchscript import read_torchscript
from engine.unwrap import State, Weights, metadata_beside, plain, refuse_unusual, strip_prefixes, unwrap

MOST_UNPACKED_BYTES, MOST_UNPACKED_TIMES = 64_000_000, 10  # of an archive: torch itself compresses nothing

# What people pass by mistake, by the first bytes: (offset, bytes, what it is, what to do).
STRANGERS = (
    (0, b"version https://git-lfs", "a git-lfs pointer, not the weights", "run `git lfs pull` in its repository"),
    (0, b"\x89HDF\r\n", "an HDF5 file, as Keras writes them", "convert it to ONNX (tf2onnx) and give that file"),
    (4, b"TFL3", "a TensorFlow Lite model", "give the float network that it was made from, as ONNX"),
    (0, b"GGUF", "a GGUF file", "give the PyTorch checkpoint that it was made from"),
    (0, b"ptrt", "a TensorRT engine", "give the network that it was built from: its weights cannot be read back"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it and give the checkpoint inside"),
    (0, b"\x93NUMPY", "a NumPy array", "give the whole checkpoint, not one array"),
    (0, b"7z\xbc\xaf", "a 7z archive", "unpack it and give the checkpoint inside"),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it and give the checkpoint inside"),
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: weights, a module, or a graph and what the exporter left of its layers' weights."""

    format: str  # "state_dict", "safetensors", "pickle", "torch.export", "torchscript", "onnx"
    weights: Weights
    graph: Graph | None  # what an exporter wrote; `weights.state` is then what it left of the layers
    keeps_order: bool  # whether the state lies in the file in the order in which the network was built


def read_checkpoint(path: Path, *, trust_pickle: bool = False, input_shape: Shape | None = None) -> Checkpoint:
    """Reads `path`; runs no code of the file's unless `trust_pickle`.

    `input_shape`: C, H, W, for formats that do not say which images they take.

    Raises SSDKDError: no such file, no checkpoint, damaged, or it needs --trust-pickle.
    """
    check_readable(path)
    kind = detect_format(path)
    return READERS[kind](path, trust_pickle, input_shape)


def detect_format(path: Path) -> str:
    """One of READERS' names, from the file's content.

    Raises SSDKDError for what is no checkpoint.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(ARCHIVE_MAGIC):
        return _zip_format(path)
    for offset, magic, what, hint in STRANGERS:
        if head[offset:].startswith(magic):
            raise SSDKDError(f"{path.name} is {what}: expected {ACCEPTED}", hint)
    if head.startswith(LEGACY_MAGIC):
        return "legacy"
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{":
        if header_bytes + 8 > size:
            raise damaged(path, ValueError(f"its header wants {header_bytes + 8:,} bytes, the file has {size:,}"))
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "legacy"  # a pickle; whether it is torch's is for the safe reader to say
    if _is_text(head):
        kind = "an HTML page" if b"<html" in head.lower() or b"<!doctype" in head.lower() else "text"
        raise SSDKDError(
            f"{path.name} is {kind}, not a network: expected {ACCEPTED}",
            "download the file itself, not the page that shows it"
            if kind != "text"
            else "give the file that holds the network's weights",
        )
    if head[:1] == b"\x08":  # ONNX has no magic number: field 1 of ModelProto, ir_version, comes first
        return "onnx"
    raise SSDKDError(
        f"{path.name} is no checkpoint that ssdkd knows: expected {ACCEPTED}, found bytes {head[:4].hex(' ')}",
        "save the network's weights with torch.save(model.state_dict(), 'network.pt') and give that file",
    )


def _zip_format(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked_bytes = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise damaged(path, ValueError("the archive's table of contents at its end is missing")) from error
    except UNREADABLE_ARCHIVE as error:
        raise damaged(path, error) from error
    if unpacked_bytes > max(MOST_UNPACKED_BYTES, MOST_UNPACKED_TIMES * path.stat().st_size):
        raise SSDKDError(
            f"{path.name} would unpack to {unpacked_bytes:,} bytes from {path.stat().st_size:,}: expected weights, "
            "which no archive makes so much smaller",
            "save the network's weights with torch.save(model.state_dict(), 'network.pt') and give that file",
        )
    members = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        return "torchscript"
    if "archive_format" in members or "serialized_exported_program.json" in members | set(names):
        return "torch.export"
    if "data.pkl" in members:
        return "zip"
    raise SSDKDError(
        f"{path.name} is a zip archive without a network: "
        f"expected {ACCEPTED}, found {', '.join(names[:3]) or 'nothing'}",
        "if it is a packed folder, unpack it and give the checkpoint inside",
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:
            return False
        text = head[: error.start].decode("utf-8")
    return all(character.isprintable() or character.isspace() for character in text)


def _read_pickle(path: Path, trust_pickle: bool, _shape: Shape | None) -> Checkpoint:
    loaded = trusted_load(path) if trust_pickle else safe_load(path)
    weights = unwrap(loaded, path.name)
    return Checkpoint("pickle" if weights.module is not None else "state_dict", weights, None, keeps_order=True)


def _read_safetensors(path: Path, _trust_pickle: bool, _shape: Shape | None) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state: State = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            header = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise damaged(path, error) from error
    metadata = _facts(header)
    stripped, notes = strip_prefixes(state)
    refuse_unusual(stripped, path.name)
    # The format sorts its tensors by type and name.
    return Checkpoint("safetensors", Weights(stripped, None, metadata, tuple(notes)), None, keeps_order=False)


def _read_export(path: Path, trust_pickle: bool, _shape: Shape | None) -> Checkpoint:
    state, graph = read_export(path, trust_pickle=trust_pickle)
    return _of_graph("torch.export", state, graph, {}, [])


def _read_torchscript(path: Path, trust_pickle: bool, shape: Shape | None) -> Checkpoint:
    state, graph, notes = read_torchscript(path, shape, trust_pickle=trust_pickle)
    return _of_graph("torchscript", state, graph, {}, notes)


def _read_onnx(path: Path, _trust_pickle: bool, _shape: Shape | None) -> Checkpoint:
    state, graph, metadata = read_onnx(path)
    return _of_graph("onnx", state, graph, _facts(metadata), [])


def _facts(texts: Mapping[str, str]) -> dict[str, object]:
    """Metadata that a format keeps as texts; ours is JSON."""
    return metadata_beside({name.removeprefix("ssdkd."): plain(text) for name, text in texts.items()})


def _of_graph(kind: str, state: State, graph: Graph, metadata: dict[str, object], notes: list[str]) -> Checkpoint:
    stripped, _ = strip_prefixes(state)
    return Checkpoint(kind, Weights(stripped, None, metadata, tuple(notes)), graph, keeps_order=True)


READERS: dict[str, Callable[[Path, bool, Shape | None], Checkpoint]] = {
    "zip": _read_pickle,
    "legacy": _read_pickle,
    "safetensors": _read_safetensors,
    "torch.export": _read_export,
    "torchscript": _read_torchscript,
    "onnx": _read_onnx,
}
