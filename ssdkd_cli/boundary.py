"""The one place where a known error becomes a sentence, a hint and an exit code.

What is not known keeps its traceback: it is a bug.
"""

import errno
import functools
import inspect
import os
from collections.abc import Callable

import typer

from engine.errors import SSDKDError
from ssdkd_cli import console
from ssdkd_cli.outcome import Outcome
from ssdkd_cli.process import interruptible, is_out_of_memory, printing, stdout_for_the_result

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
