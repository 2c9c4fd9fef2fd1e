"""The exception that users see: a sentence that says what is wrong, and the next command to type."""


class SSDKDError(Exception):
    """A known error: `message` says the thing, what was expected and what was found; `hint` what to type next.

    The command line prints both without a traceback and exits with 1. Anything else that is raised is a bug.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class NonFiniteLossError(SSDKDError):
    """A loss became NaN or infinite."""


class OutOfMemoryError(SSDKDError):
    """The device ran out of memory; the hint names a smaller batch."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
