"""What a command answers: it is printed on stdout once the work is done, so that nothing else can stand there."""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssdkd_cli import console


@dataclass(frozen=True)
class Outcome:
    """`show` prints the result; `exit_code` is 0, or 3 where a verification failed."""

    show: Callable[[], None]
    exit_code: int = 0


def as_json(value: object) -> str:
    """Dataclasses, paths and tuples as indented JSON; NaN is no JSON and raises ValueError."""
    return json.dumps(value, indent=2, default=_plain, allow_nan=False, ensure_ascii=False)


def printed(json: bool, value: object, show: Callable[[], None], exit_code: int = 0) -> Outcome:
    """`value` as JSON where that was asked for, else what `show` prints."""
    return Outcome(functools.partial(console.print_json, as_json(value)) if json else show, exit_code)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
