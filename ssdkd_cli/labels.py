"""--classes: a number, or a file with one class name a line."""

from pathlib import Path

from engine.errors import SSDKDError


def read_classes(classes: int | Path | None) -> tuple[int | None, tuple[str, ...] | None]:
    """How many classes, and their names where a file gives them.

    Raises:
        SSDKDError: the file cannot be read, is no text, or names fewer than two classes or one twice.
    """
    if not isinstance(classes, Path):
        return classes, None
    hint = "give the number of classes, or a text file with one name a line"
    try:
        names = tuple(line.strip() for line in classes.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SSDKDError(f"--classes {classes} cannot be read: {reason}", hint) from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or twice:
        found = f"'{twice[0]}' twice" if twice else f"{len(names)} names"
        raise SSDKDError(f"--classes {classes}: expected two or more different names, found {found}", hint)
    return len(names), names
