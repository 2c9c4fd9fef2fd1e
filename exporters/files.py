"""Files that are there whole or not at all."""

import os
from pathlib import Path

from engine.errors import SSDKDError


def check_utf8(path: Path) -> None:
    """Raises SSDKDError for a path that ONNX Runtime cannot open, because it is no UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise SSDKDError(
            f"{path} is no UTF-8: ONNX Runtime opens no such path", "give the file or folder another name"
        ) from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, or nothing at all: a temporary file in the same folder, then a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk may say so only here
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
