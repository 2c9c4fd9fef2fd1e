"""Hooks on modules, for as long as something is looked at."""

import contextlib
from collections.abc import Iterator, Sequence

from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Within the context the hooks of these handles stay; then they are removed."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
