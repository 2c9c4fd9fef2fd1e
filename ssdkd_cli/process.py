"""The process that a command runs in: its streams, the signals that end it, its memory."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from engine.errors import SSDKDError

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
