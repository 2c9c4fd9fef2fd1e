"""Train and eval mode of a module, and whether it learns, for as long as something is asked of it."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Within the context the module, if there is one, is in eval mode; then each part in the mode it had itself."""
    training = [part for part in module.modules() if part.training] if module is not None else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Within the context no parameter of the module, if there is one, learns; then those do again that did."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad] if module is not None else []
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
