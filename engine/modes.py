"""Train and eval mode of a module, for as long as something is asked of it."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Within the context the module, if there is one, is in eval mode; then all of it in the mode it had itself."""
    if module is None:
        yield
        return
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
