"""Words that were typed as values; what is none of them is wrong usage, exit code 2."""

import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path

import typer

from engine.config import EFFORTS
from exporters import FORMATS, PRECISIONS

QAT_CHOICES = ("auto", "on", "off")
LARGEST = 1e6  # no constant of images in 0...1 or 0...255 is larger
LARGEST_PIXEL = 255


def parse_shape(text: str) -> tuple[int, int, int]:
    """'3x32x32' -> (3, 32, 32): channels, height, width. Raises typer.BadParameter."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})x(\d{1,6})", text.strip().lower())
    shape = tuple(int(number) for number in found.groups()) if found else ()
    if len(shape) != 3 or min(shape) < 1:
        raise typer.BadParameter(f"expected channels x height x width, for example 3x32x32; found {text!r}")
    return shape[0], shape[1], shape[2]


def parse_numbers(text: str) -> tuple[float, ...]:
    """'0.49,0.48,0.45' -> (0.49, 0.48, 0.45): one number a channel. Raises typer.BadParameter."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(abs(number) <= LARGEST for number in numbers):  # NaN is not, either
        raise typer.BadParameter(f"expected one number a channel, for example 0.49,0.48,0.45; found {text!r}")
    return numbers


def parse_spread(text: str) -> tuple[float, ...]:
    """As `parse_numbers`, and each number is above zero: images are divided by it."""
    numbers = parse_numbers(text)
    if min(numbers) < 1 / LARGEST:
        raise typer.BadParameter(f"expected numbers above 0, {1 / LARGEST:g} or more; found {text!r}")
    return numbers


def in_unit(context: typer.Context, mean: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """The mean itself. Raises typer.BadParameter for one of images in 0...255, with what to type instead.

    A callback of --mean, for which --std has been read already.
    """
    if mean is None or max(mean) <= 1:
        return mean
    found = f"expected numbers up to 1, as images are in 0...1 here; found {max(mean):g}"
    if max(mean) > LARGEST_PIXEL:
        raise typer.BadParameter(found)
    hint = f"--mean {_joined(value / LARGEST_PIXEL for value in mean)}"
    std = context.params.get("std")
    if std and max(std) >= 1:  # below, it is of images in 0...1 already
        hint += f" --std {_joined(value / LARGEST_PIXEL for value in std)}"
    raise typer.BadParameter(f"{found}. If it is of images in 0...255, divide by 255: {hint}")


def _joined(numbers: Iterable[float]) -> str:
    return ",".join(f"{number:.3g}" for number in numbers)


def parse_duration(text: str) -> float:
    """'90s', '10m', '1h30m' -> seconds. Raises typer.BadParameter."""
    found = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", text.strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if hours + minutes + seconds == 0:
        raise typer.BadParameter(f"expected a time such as 90s, 10m or 1h30m; found {text!r}")
    return 3600.0 * hours + 60.0 * minutes + seconds


def parse_path(text: str) -> Path:
    """A path. Raises typer.BadParameter for no text: an unset variable of a script would mean the current folder."""
    if not text.strip():
        raise typer.BadParameter("expected a path; found nothing")
    return Path(text)


def parse_effort(text: str) -> str:
    """One of `EFFORTS`. Raises typer.BadParameter."""
    if text not in EFFORTS:
        raise typer.BadParameter(f"expected one of {', '.join(EFFORTS)}; found {text!r}")
    return text


def parse_qat(text: str) -> str:
    """'auto', 'on' or 'off'. Raises typer.BadParameter."""
    if text not in QAT_CHOICES:
        raise typer.BadParameter(f"expected one of {', '.join(QAT_CHOICES)}; found {text!r}")
    return text


def parse_classes(text: str) -> int | Path:
    """A number of classes, or the path of a labels file (one name a line). Raises typer.BadParameter."""
    if not re.fullmatch(r"-?\d+", text.strip()):
        return Path(text)
    if len(text) > 9 or int(text) < 2:
        raise typer.BadParameter(f"expected at least 2 classes, 9 digits at most, or a labels file; found {text!r}")
    return int(text)


def finite(value: float | None) -> float | None:
    """The number itself. Raises typer.BadParameter for infinity, which is no limit."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number; found {value}")
    return value


def not_too_large(seed: int) -> int:
    """The seed itself. Raises typer.BadParameter where it has more bits than PyTorch takes."""
    if seed >= 2**63:
        raise typer.BadParameter(f"expected a number below 2^63; found {seed}")
    return seed


def known_precisions(names: list[str]) -> list[str]:
    """Each precision once, in the order in which they were first given. Raises typer.BadParameter."""
    return _known(names, PRECISIONS)


def known_formats(names: list[str]) -> list[str]:
    """Each export format once, in the order in which they were first given. Raises typer.BadParameter."""
    return _known(names, FORMATS)


def _known(names: list[str], known: Collection[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}; found {name!r}")
    return list(dict.fromkeys(names))
