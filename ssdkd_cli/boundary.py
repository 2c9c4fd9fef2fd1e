"""The one place where a known error becomes a sentence, a hint and an exit code.

What is not known keeps its traceback: it is a bug.
"""

import contextlib
import ctypes
import errno
import functools
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from engine.errors import SSDKDError
from ssdkd_cli import console
from ssdkd_cli.outcome import Outcome

KNOWN_ERROR, VERIFICATION_FAILED, INTERRUPTED = 1, 3, 130

WITH_OUT = " with --out DIR"  # said to commands that have it
OTHER_DISK = f"free some space, or choose another disk{WITH_OUT}"
OTHER_FOLDER = f"choose a folder that you may write{WITH_OUT}"
NO_FOLDER = f"a part of the path is a file or a broken link: choose another folder{WITH_OUT}"
DISK_HINTS = {
    errno.ENOSPC: OTHER_DISK,
    errno.EDQUOT: OTHER_DISK,
    errno.EIO: OTHER_DISK,
    errno.EROFS: OTHER_FOLDER,
    errno.EACCES: OTHER_FOLDER,
    errno.EPERM: OTHER_FOLDER,
    errno.ENOTDIR: NO_FOLDER,
    errno.EEXIST: NO_FOLDER,
    errno.ELOOP: f"a link of the path leads back to itself: choose another folder{WITH_OUT}",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.EFBIG: f"raise the limit on the size of a file (`ulimit -f`), or choose another disk{WITH_OUT}",
}

NO_LIBRARY = "cannot open shared object file"  # how the dynamic loader says it, in an OSError without a number

# How PyTorch, CUDA and the C++ library say it where the exception's type does not.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "bad_alloc",
    "out of memory",
    "failed to map segment",
    "Cannot allocate memory",
    "ALLOC_FAILED",
)
ENDING = ("SIGTERM", "SIGHUP")  # what `docker stop`, a batch system and a closed terminal send; Windows has one of them


def within_boundary(command: Callable[..., Outcome]) -> Callable[..., None]:
    """The command as Typer is to call it: its signature, its errors made sentences."""
    has_out = "out" in inspect.signature(command).parameters

    @functools.wraps(command)
    def guarded(*args: object, **options: object) -> None:
        raise typer.Exit(exit_code_of(functools.partial(command, *args, **options), has_out=has_out))

    return guarded


def exit_code_of(command: Callable[[], Outcome], *, has_out: bool = False) -> int:
    """Run a command, print its result on stdout or its error on stderr, and return the exit code.

    `has_out`: the command has --out, which hints may name.
    """
    try:
        with interruptible(), stdout_for_the_result():
            outcome = command()
        with printing():
            outcome.show()
        return outcome.exit_code
    except SSDKDError as error:
        console.error(error.message, error.hint)
    except KeyboardInterrupt as interrupt:
        console.warn(str(interrupt) or "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        pass  # who read the result has enough of it
    except OSError as error:
        if NO_LIBRARY in str(error):
            console.error(f"a library is missing: {error}", "install it, or the package that needs it once more")
            return KNOWN_ERROR
        if error.errno is None or (error.errno not in DISK_HINTS and not error.filename):
            raise
        where = f": {error.filename}" if error.filename else ""
        hint = DISK_HINTS.get(error.errno, "check that path")
        console.error(f"{os.strerror(error.errno)}{where}", hint if has_out else hint.replace(WITH_OUT, ""))
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_out_of_memory(error):
            raise
        console.error("out of memory", "close what else uses the memory, or take a machine that has more")
    return KNOWN_ERROR


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """What is inside prints on stdout. Raises SSDKDError where that fails, BrokenPipeError where nobody reads it."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            raise
        # Python flushes stdout once more at its end: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise SSDKDError(
            f"the result cannot be printed: {error.strerror}", "send stdout to a file or a disk that can be written"
        ) from None


@contextlib.contextmanager
def stdout_for_the_result() -> Iterator[None]:
    """Within the context all that is written to stdout goes to stderr: users' own code and libraries print, too.

    By Python, and by C code, which writes to the file descriptor behind it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        with contextlib.suppress(OSError):  # one of the two is closed: there is nothing to keep apart
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
            stack.callback(flush_stdout)
        yield


def flush_stdout() -> None:
    """Write out what Python and C have buffered, while it still goes to stderr."""
    if sys.__stdout__ is not None:
        sys.__stdout__.flush()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows has no such handle, and buffers nothing
        ctypes.CDLL(None).fflush(None)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the context a signal that ends the process is a Ctrl-C: what was learned is saved."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    numbers = [number for name in ENDING if (number := getattr(signal, name, None))]
    taken = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # `nohup` ignores a hangup
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the context Ctrl-C and the signals that are one wait; the first of them comes at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    numbers = [number for name in ("SIGINT", *ENDING) if (number := getattr(signal, name, None))]
    handlers = {number: handler for number in numbers if callable(handler := signal.getsignal(number))}
    waiting: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, _frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in waiting[:1]:
        signal.raise_signal(number)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is Python's, PyTorch's or CUDA's way to say that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | ImportError) and any(words in str(error) for words in OUT_OF_MEMORY)
