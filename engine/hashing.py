"""Which file it is."""

import hashlib
from pathlib import Path


def sha256_of(*paths: Path) -> str:
    """Hexadecimal SHA-256 of a file, or of several as if they were one."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on where the file before has ended
    return digest.hexdigest()
