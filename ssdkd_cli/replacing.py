"""The folder of a run that is to take the place of another: nothing is lost before the new one is there."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from engine.errors import SSDKDError
from ssdkd_cli.report import read_report
from ssdkd_cli.runs import CONFIG, METRICS, OUTPUTS, REPORT, STUDENT

PREVIOUS = ".ssdkd-previous"  # in a run's folder while there is no new student: the run that it is to replace
MOVING = ".ssdkd-moving"  # the same on its way there or back: what is in it and what is beside it are one run
BEGINNING = (CONFIG, METRICS)  # all that a run writes before its student
OTHER_OUT = "choose another folder with --out DIR"


def check_inputs(folder: Path, inputs: Iterable[Path]) -> None:
    """Raises SSDKDError where a run in `folder` would replace one of its `inputs`."""
    replaced = [place / name for place in (folder, folder / PREVIOUS, folder / MOVING) for name in OUTPUTS]
    for path in inputs:
        if path.exists() and any(output.exists() and path.samefile(output) for output in replaced):
            raise SSDKDError(f"{path} is needed for the run, and a run in {folder} would replace it", OTHER_OUT)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises SSDKDError where a run in `folder` would replace another or, without --overwrite, any file."""
    found = found_in(folder)
    for name in found:
        if (folder / name).is_dir():
            raise SSDKDError(f"{folder / name} is a folder: a run writes a file of that name", OTHER_OUT)
    if found and not overwrite:
        what = "another run" if {STUDENT, REPORT} & set(found) else "files that a run would replace"
        raise SSDKDError(
            f"{folder} holds {what} ({', '.join(found)})",
            "choose another folder with --out DIR, or add --overwrite",
        )


def found_in(folder: Path) -> list[str]:
    """The names of what a run, or an export, left in `folder`."""
    return [name for name in OUTPUTS if (folder / name).exists()]


def clear(folder: Path) -> None:
    """Delete what a run left in `folder`; files that ssdkd does not write stay."""
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)


def set_aside(folder: Path) -> None:
    """Move what an earlier run left in `folder` into PREVIOUS, where it waits for the new run to succeed.

    A finished run that waits there already is worth more than one that was interrupted, which is deleted.
    """
    if is_finished(folder) or not is_finished(folder / PREVIOUS):
        clear(folder / PREVIOUS)
        with contextlib.suppress(FileNotFoundError):
            (folder / PREVIOUS).rename(folder / MOVING)  # a user's file may be in it
        (folder / MOVING).mkdir(exist_ok=True)
        move(folder, folder / MOVING)
        (folder / MOVING).rename(folder / PREVIOUS)
    clear(folder)


def is_finished(folder: Path) -> bool:
    """Whether a run in `folder` came to its files; one with a report that cannot be read may have."""
    path = folder / REPORT
    try:
        return path.exists() and bool(read_report(folder).artifacts)
    except SSDKDError:
        return True


def recover(folder: Path) -> None:
    """Undo `set_aside` where it was cut short, or where only the beginning of a run came after it."""
    if (folder / PREVIOUS).exists() and set(found_in(folder)) <= {*BEGINNING}:
        for name in BEGINNING:
            (folder / name).unlink(missing_ok=True)
        (folder / PREVIOUS).rename(folder / MOVING)
    move(folder / MOVING, folder)
    remove_folder(folder / MOVING)


def drop_previous(folder: Path) -> None:
    """Delete what `set_aside` has moved."""
    clear(folder / PREVIOUS)
    remove_folder(folder / PREVIOUS)


def move(source: Path, target: Path) -> None:
    """Move what a run left in `source`."""
    for name in OUTPUTS:
        with contextlib.suppress(FileNotFoundError):
            (source / name).replace(target / name)


def remove_folder(folder: Path) -> None:
    """Remove `folder`, if it is there and empty: a user's file may be in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()
