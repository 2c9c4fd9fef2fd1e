"""What an ONNX file says of itself, written by the exporter and read back by `eval` and `bench`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engine.errors import SSDKDError
from engine.shapes import each_channel

PREFIX = "ssdkd."

NORMALISED = "normalised"  # images in 0...1, minus the mean, over the standard deviation
UNIT = "0...1"  # the file normalises by itself (--embed-preprocessing)


@dataclass(frozen=True)
class Description:
    """What a model file takes and gives, as its own metadata says.

    `mean` and `std`, one value a channel, are the network's; `input_range` says whether the caller or the file
    itself applies them. None: the file does not say.
    """

    input_range: str | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    class_names: tuple[str, ...] | None


def metadata_for(
    *,
    input_shape: tuple[int, int, int],
    classes: int,
    class_names: tuple[str, ...] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    embed_preprocessing: bool,
    teacher_sha256: str,
) -> dict[str, str]:
    """Return the metadata of a model file: keys with the prefix `ssdkd.`, values that are JSON or plain words.

    `mean` and `std` are the teacher's, also where the file applies them itself; `input_range` says which.
    """
    values = {
        "input_shape": json.dumps(input_shape),
        "classes": str(classes),
        "input_range": input_range(embed_preprocessing=embed_preprocessing),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "teacher_sha256": teacher_sha256,
        "ssdkd_version": ssdkd_version(),
    }
    if class_names is not None:
        values["class_names"] = json.dumps(class_names, ensure_ascii=False)
    return {PREFIX + name: value for name, value in values.items()}


def input_range(*, embed_preprocessing: bool) -> str:
    """What a model file takes, in one word."""
    return UNIT if embed_preprocessing else NORMALISED


def describe(metadata: Mapping[str, str]) -> Description:
    """Read back what `metadata_for` wrote; every field is None for a file that is not ours.

    Raises SSDKDError where the metadata is ours and cannot be read.
    """
    values = {name.removeprefix(PREFIX): value for name, value in metadata.items() if name.startswith(PREFIX)}
    try:
        class_names = _list_of(values["class_names"]) if "class_names" in values else None
        mean = tuple(float(value) for value in _list_of(values["mean"])) if "mean" in values else None
        std = tuple(float(value) for value in _list_of(values["std"])) if "std" in values else None
        if not all(map(math.isfinite, (*(mean or ()), *(std or ())))) or any(value <= 0 for value in std or ()):
            raise ValueError(f"mean {mean} and std {std} cannot normalise an image")
    except (ValueError, TypeError, RecursionError) as error:
        raise SSDKDError(
            f"the model's ssdkd metadata cannot be read: {error}",
            "export it again: ssdkd export RUN --export onnx",
        ) from error
    return Description(
        input_range=values.get("input_range"),
        mean=mean,
        std=std,
        class_names=None if class_names is None else tuple(map(str, class_names)),
    )


def _list_of(text: str) -> list[Any]:
    value = json.loads(text)
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {text}")
    return value


def preprocessing_of(
    description: Description,
    *,
    channels: int,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std), one value a channel, to apply to images in 0...1: zeros and ones if the file does it itself.

    What the caller states wins over what the file says. Raises SSDKDError where neither says, where they do not fit
    the channels, and for values that are stated for a file that normalises by itself.
    """
    if description.input_range == UNIT:
        stated = [flag for flag, values in (("--mean", mean), ("--std", std)) if values is not None]
        if stated:
            raise SSDKDError(
                f"{' and '.join(stated)} would normalise twice: the model file does it itself (--embed-preprocessing)",
                f"leave {' and '.join(stated)} out",
            )
        return (0.0,) * channels, (1.0,) * channels
    mean = description.mean if mean is None else each_channel("--mean", mean, channels)
    std = description.std if std is None else each_channel("--std", std, channels)
    if mean is None or std is None:
        half = ",".join(["0.5"] * channels)
        means, stds = ("0.485,0.456,0.406", "0.229,0.224,0.225") if channels == 3 else (half, half)
        raise SSDKDError(
            "the model file does not say how its images are normalised (it was not written by ssdkd)",
            f"state it with --mean and --std, for example --mean {means} --std {stds}",
        )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise SSDKDError(
                f"the model file says {len(values)} values of {name}, but takes {channels} channels",
                f"state it: --{name} {','.join(['0.5'] * channels)}",
            )
    return mean, std


def ssdkd_version() -> str:
    """Return the installed version of ssdkd, or "unknown"."""
    try:
        return version("ssdkd")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
