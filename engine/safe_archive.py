"""torch's zip archives, read once: what was checked is what is loaded.

Two readers can find different things in one zip file: where two members have one name, where names differ by upper and
lower case, or where a name is written twice. So torch gets an archive that is written anew from the checked members.
"""

import io
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from engine.errors import SSDKDError
from engine.safe_pickle import UNREADABLE_ARCHIVE, damaged

# ATen's only operations outside memory, by name; a test compares them with what torch registers.
FILE_OPERATIONS = ("from_file", "save")


def read_members(path: Path) -> dict[str, bytes]:
    """Full name -> content of each member.

    Raises:
        SSDKDError: damaged, or two members of one name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    except UNREADABLE_ARCHIVE as error:
        raise damaged(path, error) from error
    count = Counter(name.lower() for name, _ in members)
    repeated = next((name for name, _ in members if count[name.lower()] > 1), None)
    if repeated:
        raise needs_trust(path, "an archive", "members of different names", f"{repeated} more than once")
    return dict(members)


def without_folder(full_name: str) -> str:
    """The name of a member inside the one folder that torch puts into its archives."""
    return full_name.partition("/")[2] or full_name


def packed(members: Mapping[str, bytes]) -> io.BytesIO:
    """An archive of these members, as a file in memory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    file.seek(0)
    return file


def needs_trust(path: Path, kind: str, expected: str, found: str) -> SSDKDError:
    """The error for a file that would do more than compute, if it were loaded."""
    return SSDKDError(
        f"{path.name} is {kind} that may do more than compute when it is loaded: expected {expected}, found {found}."
        " Nothing was run",
        "give the checkpoint that it was exported from, or add --trust-pickle if you trust whoever made the file",
    )
