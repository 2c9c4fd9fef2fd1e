"""Texts that are there whole or not at all, and the folder that a run may write to."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import SSDKDError
from exporters.files import check_utf8, write_atomically

# Files that were not proven, were not whole, and the teacher's own ONNX file, which is timed.
LEFT_BEHIND = re.compile(
    r"\.unproven-model\..+|\.teacher-\w+"
    r"|\.(\.unproven-)?(student|samples|report|config|model|build_model|tensorrt_timing)\..+\.\d+\.part"
)


def write_text(path: Path, content: str) -> None:
    """`write_atomically` of UTF-8; what is no text, in a file's name, is escaped."""
    write_atomically(path, content.encode(errors="backslashreplace"))


def check_writable(folder: Path) -> None:
    """Make `folder` and try to write in it.

    Raises:
        SSDKDError: `folder` is a file or a broken link, or its name no UTF-8; or nowhere is room for temporary files.
        OSError: it cannot be made or written; the error boundary has the sentence for it.
    """
    check_utf8(folder)
    if folder.exists() and not folder.is_dir():
        raise SSDKDError(f"--out {folder} is a file: expected a folder", "choose another with --out DIR")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError):
        raise SSDKDError(f"{folder} cannot be made", "choose another folder with --out DIR") from None
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise SSDKDError(
            f"temporary files cannot be written: {error.strerror}", "set TMPDIR to a folder that you may write"
        ) from None
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"1" * 4096)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """The folder, tried for writing and locked; what fails inside takes it and new parents away again where empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with _taken_away(new):
        check_writable(folder)
    with locked(folder), _taken_away(new):  # not before: another process may have it, as new
        _sweep(folder)
        yield


@contextlib.contextmanager
def _taken_away(folders: Sequence[Path]) -> Iterator[None]:
    """What fails inside takes the folders away, where they are empty: each stands in the next one."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds something
            for folder in folders:
                folder.rmdir()
        raise


def _sweep(folder: Path) -> None:
    """Delete what a process that was killed was still writing into `folder`."""
    for path in folder.iterdir():
        if LEFT_BEHIND.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone. The lock ends with the process, whatever ends it, and leaves no file.

    Windows and some network disks have no such locks: nothing is locked there.

    Raises:
        SSDKDError: another process has it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with contextlib.ExitStack() as stack:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SSDKDError(
                f"another ssdkd is writing {folder}",
                "wait until it is done; compress and export write elsewhere with --out DIR",
            ) from None
        except OSError:
            pass  # this disk has no locks
        yield


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises SSDKDError where the disk of `folder` has less than `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise SSDKDError(
            f"the disk of {folder} has {free_bytes / 1e6:,.1f} MB free; "
            f"the run needs about {needed_bytes / 1e6:,.1f} MB",
            "free some space, or choose another disk with --out DIR",
        )


def check_file_size(largest_bytes: int) -> None:
    """Raises SSDKDError where this process may not write a file of so many bytes (`ulimit -f`)."""
    if sys.platform == "win32":
        return
    import resource

    limit_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit_bytes != resource.RLIM_INFINITY and limit_bytes < largest_bytes:
        raise SSDKDError(
            f"a file may have {limit_bytes / 1e6:,.1f} MB here; the run writes one of {largest_bytes / 1e6:,.1f} MB",
            "raise the limit on the size of a file: ulimit -f unlimited",
        )
