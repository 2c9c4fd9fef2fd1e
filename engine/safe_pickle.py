"""Reading pickles without running what they ask for.

torch's weights-only reader, with inert stand-ins for the harmless extras that training programs leave in their files.
"""

import argparse
import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from engine.errors import SSDKDError, first_line
from engine.user_code import user_modules

# Bytes that no reader understands end in one of these; which one depends on where the damage is.
UNREADABLE = (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError)
UNREADABLE_ARCHIVE = (zipfile.BadZipFile, zlib.error, struct.error, *UNREADABLE)

ARCHIVE_MAGIC = b"PK\x03\x04"  # torch.save since 1.6: a zip archive
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6

# Configuration objects of training frameworks: read as plain dictionaries, their own code is never imported.
CONFIGURATION_PACKAGES = frozenset(
    {"addict", "easydict", "fvcore", "lightning", "lightning_fabric", "ml_collections", "mmcv", "mmengine", "omegaconf"}
    | {"pytorch_lightning", "yacs"}
)


class NumpyDtype:
    """Stands in for numpy.dtype: numbers only, and the pickled state that could reshape the type is ignored."""

    def __init__(self, code: str, *_ignored: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"numpy type {code!r} is no number")

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if len(state) > 1 and state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class NumpyArray:
    """Stands in for numpy.ndarray; `value` holds the numbers."""

    value: np.ndarray[tuple[int, ...], np.dtype[np.generic]]

    def __setstate__(self, state: tuple[int, tuple[int, ...], NumpyDtype, bool, bytes]) -> None:
        _version, shape, kind, fortran, data = state
        self.value = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")


class Configuration:
    """Stands in for dictionaries of other kinds (defaultdict, a framework's configuration): a plain one is made."""

    def __new__(cls, *_ignored: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        """The weights-only reader fills no other dictionaries."""
        return OrderedDict()


def _numpy_array(*_ignored: object) -> NumpyArray:
    return NumpyArray()


def _numpy_scalar(kind: NumpyDtype, data: bytes) -> object:
    return np.frombuffer(data, kind.dtype)[0].item()


def _path(*parts: str) -> str:
    return "/".join(parts)


_HARMLESS: tuple[tuple[Callable[..., object], str], ...] = (
    (argparse.Namespace, "argparse.Namespace"),
    (Configuration, "collections.defaultdict"),
    *((kind, f"builtins.{kind.__name__}") for kind in (bool, int, float, str, list, tuple, dict)),
    *((_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    (NumpyDtype, "numpy.dtype"),
    (NumpyArray, "numpy.ndarray"),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_numpy_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (torch.torch_version.TorchVersion, "torch.torch_version.TorchVersion"),
)  # fmt: skip


def safe_load(path: Path) -> object:
    """Reads a file of torch.save's, zip or legacy; runs no code of the file's. Tensors land on the CPU.

    Raises SSDKDError: the file wants to run code (names what), or it is damaged.
    """
    with path.open("rb") as file:
        return safe_load_stream(file, path)


def safe_load_stream(file: BinaryIO, path: Path) -> object:
    """`safe_load` for an open, seekable file; `path` is for the messages."""
    _check_archive(file, path)
    wanted = pickled_globals(file)
    stand_ins = [(Configuration, name) for name in wanted if name.partition(".")[0] in CONFIGURATION_PACKAGES]
    file.seek(0)
    try:
        # The reader warns about pickle protocols other than 2 and about legacy storages; both are its own affair.
        with warnings.catch_warnings(), torch.serialization.safe_globals([*_HARMLESS, *stand_ins]):
            warnings.simplefilter("ignore")
            loaded: object = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, wanted, str(error)) from error
    except UNREADABLE as error:
        raise damaged(path, error) from error
    return loaded


def trusted_load(path: Path) -> object:
    """Unpickles a file that the user trusts; its code runs, with the user's own packages before ours.

    Raises SSDKDError where a module that the pickle names is not importable, or the file is damaged.
    """
    with path.open("rb") as file:
        _check_archive(file, path)
    try:
        with warnings.catch_warnings(), user_modules():
            warnings.simplefilter("ignore")
            with path.open("rb") as file:
                is_torchs = file.read(len(LEGACY_MAGIC)).startswith((ARCHIVE_MAGIC, LEGACY_MAGIC))
                file.seek(0)
                loaded: object = torch.load(file, "cpu", weights_only=False) if is_torchs else pickle.load(file)
    except (ImportError, AttributeError) as error:
        raise SSDKDError(
            f"{path.name} pickles classes that cannot be imported here: {error}",
            "run ssdkd in the folder that holds the network's source, "
            "or save model.state_dict() and state --arch package.module:function",
        ) from error
    except (pickle.UnpicklingError, *UNREADABLE) as error:
        raise damaged(path, error) from error
    return loaded


def pickled_globals(file: BinaryIO) -> list[str]:
    """Names of the functions and classes that a pickle would import; its opcodes are read, not run.

    An archive must be a whole one.
    """
    names: list[str] = []
    if _is_archive(file):
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
            streams: list[BinaryIO] = [io.BytesIO(archive.read(name)) for name in members]
    else:
        streams = [file]
    for stream in streams:
        try:
            # A legacy file is several pickles in a row, then raw numbers, on which the disassembler stumbles.
            while True:
                strings: list[str] = []
                for opcode, argument, _ in pickletools.genops(stream):
                    if opcode.name == "GLOBAL":
                        names.append(str(argument).replace(" ", ".").replace("__builtin__.", "builtins."))
                    elif opcode.name == "STACK_GLOBAL":
                        names.append(".".join(strings[-2:]))
                    elif isinstance(argument, str):
                        strings.append(argument)
        except (*UNREADABLE, pickle.UnpicklingError):
            continue
    return list(dict.fromkeys(names))


def _is_archive(file: BinaryIO) -> bool:
    """Whether torch takes it for a zip archive; the file is left at its beginning."""
    file.seek(0)
    magic = file.read(len(ARCHIVE_MAGIC))
    file.seek(0)
    return magic == ARCHIVE_MAGIC


def _check_archive(file: BinaryIO, path: Path) -> None:
    """Compares an archive's members with their checksums, which torch does not read; other files pass.

    Raises SSDKDError: it is damaged.
    """
    if not _is_archive(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except UNREADABLE_ARCHIVE as error:
        raise damaged(path, error) from error
    if broken is not None:
        raise damaged(path, ValueError(f"the content of {broken} has another checksum than was written"))


def damaged(path: Path, error: BaseException) -> SSDKDError:
    """The error for a file that begins like a checkpoint but cannot be read to its end."""
    return SSDKDError(
        f"{path.name} is damaged or cut short: expected a complete checkpoint, but reading it failed"
        f" ({first_line(error)})",
        "copy or download the file again and compare its size and checksum with the original's",
    )


def _refusal(path: Path, wanted: list[str], reason: str) -> SSDKDError:
    """The error for a pickle that asks for more than weights; `reason` is what the weights-only reader says."""
    refused = re.findall(r"GLOBAL (\S+) (?:was not an allowed|whose module)", reason)
    known = {name for _, name in _HARMLESS}
    suspects = [
        name
        for name in wanted
        if name not in known
        and name.partition(".")[0] not in {"torch", "collections", "_codecs", *CONFIGURATION_PACKAGES}
    ]
    unsafe = list(dict.fromkeys([*suspects, *refused]))
    why = (reason.partition("WeightsUnpickler error:")[2].strip() or reason).splitlines()[0]
    if not unsafe and not why.startswith(("Unsupported operand", "Can only", "Trying to call")):
        return damaged(path, pickle.UnpicklingError(why))
    found = f"a call for {', '.join(unsafe[:4])}{', ...' if len(unsafe) > 4 else ''}" if unsafe else why
    return SSDKDError(
        f"{path.name} is a pickle that may run code when it is loaded: "
        f"expected weights alone, found {found}. Nothing was run",
        "save the weights alone with torch.save(model.state_dict(), ...), "
        "or add --trust-pickle if you trust whoever made the file",
    )
