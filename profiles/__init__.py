"""What a device can run and how: data, one TOML file a device, every number with the source that it comes from."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from engine.errors import SSDKDError

GENERIC: Final = "generic"  # the profile of no device: what runs anywhere

Precision = Literal["fp32", "fp16", "int8"]
Text = Annotated[str, Field(pattern=r"\S")]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Images = Annotated[int, Field(ge=1, le=4096)]

_FOLDER = Path(__file__).parent
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_OPSET = 18  # torch's exporter writes this one, and its converter to others is unreliable
_EXAMPLE = f"`ssdkd profiles show {GENERIC}` shows every key with a value"


@dataclass(frozen=True, config=_STRICT)
class Quantization:
    """The INT8 scheme that the device runs fast and right. Weights are always int8 and symmetric.

    `per_channel`: a scale of the weights for each output channel. `reduce_range`: weights of 7 bits, for x86 without
    VNNI, where the sums of products of uint8 and int8 saturate. `int32_bias`: the bias as INT32 behind a
    DequantizeLinear, as ONNX Runtime writes it and TensorRT's parser refuses it.
    """

    activations: Literal["uint8", "int8"]
    symmetric_activations: bool
    per_channel: bool
    reduce_range: bool
    int32_bias: bool


@dataclass(frozen=True, config=_STRICT)
class Batches:
    """Images at once: TensorRT's optimization profile. `usual` is also the batch of the throughput benchmark."""

    smallest: Images
    usual: Images
    largest: Images


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DeviceProfile:
    """A device as the exporters need to know it; None is no limit.

    `precisions` are those that it can run, `precision` the one to take where none is asked for. `built_on_device`: the
    plan is built there, of the ONNX file. `latency_budget_ms` is of one image; on a `machine` of that kind, as Python's
    platform.machine() calls it, it is a limit of what is measured. `sources` says for each dotted key
    (`batches.usual`) where its value comes from.
    """

    name: Text
    summary: Text
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    export: Annotated[tuple[Literal["onnx", "trt"], ...], Field(min_length=1)]
    precision: Precision
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)]
    quantization: Quantization
    opset: int
    batches: Batches
    built_on_device: bool
    machine: Text | None = None
    workspace_mb: Count | None = None
    latency_budget_ms: Annotated[float, Field(gt=0)] | None = None
    memory_budget_mb: Count | None = None
    sources: dict[str, Text]


_SCHEMA = TypeAdapter(DeviceProfile)
_PARTS: dict[str, type[Any]] = {"quantization": Quantization, "batches": Batches}


def profile_names() -> tuple[str, ...]:
    """The profiles that come with ssdkd, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_profile(name_or_path: str) -> DeviceProfile:
    """The profile of that name, else the one in the .toml file at that path.

    Raises:
        SSDKDError: no such name or file, not TOML, an unknown or missing key, a value of another type, a number or a
            decision on quantization without its source, or values that contradict each other.
    """
    path = _find(name_or_path)
    try:
        content = json.dumps(_read(path), default=str)
        profile = _SCHEMA.validate_json(content, strict=True)  # strict JSON: "18" is no number
    except RecursionError:
        raise _too_deep(path) from None
    except ValidationError as error:
        raise _as_sentence(path, error) from None
    _check_sources(path, profile)
    _check_agreement(path, profile)
    return profile


def _find(name_or_path: str) -> Path:
    names = profile_names()
    if name_or_path in names:
        return _FOLDER / f"{name_or_path}.toml"
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return path
    raise SSDKDError(
        f"there is no device profile '{name_or_path}': expected {', '.join(names)}, or a .toml file of your own",
        _did_you_mean(name_or_path, names, "`ssdkd profiles` says what each is for"),
    )


def _read(path: Path) -> dict[str, Any]:
    """Return the tables of the file; the sources by dotted keys, however the file nests them."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SSDKDError(
            f"{path} cannot be read: {error.strerror}", "check the path; `ssdkd profiles` lists those that need none"
        ) from None
    except ValueError as error:  # tomllib's own, no text, a number of thousands of digits
        raise SSDKDError(f"{path} is not TOML: {error}", _EXAMPLE) from None
    sources = data.get("sources")
    return {**data, "sources": dict(_dotted(sources))} if isinstance(sources, dict) else data


def _dotted(table: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _too_deep(path: Path) -> SSDKDError:
    return SSDKDError(f"{path}: expected values, or tables of them; found deeper nesting than can be read", _EXAMPLE)


def _as_sentence(path: Path, error: ValidationError) -> SSDKDError:
    """Return what is wrong first: a misspelt key rather than the right one that is missing."""
    problems = error.errors(include_url=False)
    if problems[0]["type"] == "json_invalid":  # we wrote it, and pydantic's parser ends at 200 levels
        return _too_deep(path)
    problem = next((item for item in problems if item["type"] == "unexpected_keyword_argument"), problems[0])
    parts = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    key = ".".join(parts)
    if problem["type"] == "unexpected_keyword_argument":
        known = _keys_of(_PARTS.get(parts[0], DeviceProfile))
        return SSDKDError(
            f"{path}: unknown key '{key}'", _did_you_mean(parts[-1], known, f"known keys: {', '.join(known)}")
        )
    if problem["type"] == "missing":
        return SSDKDError(f"{path}: the key '{key}' is missing", f"add it; {_EXAMPLE}")
    expected = problem["msg"].replace("Input should be", "expected").replace("an object", "a table")
    if problem["type"] == "string_pattern_mismatch":
        expected = "expected some words"
    return SSDKDError(f"{path}: {key}: {expected}; found {problem['input']!r}", _EXAMPLE)


def _check_sources(path: Path, profile: DeviceProfile) -> None:
    """Each number and each decision on quantization has a source, and no source is of a key that does not exist."""
    leaves = [f"{part}.{key}" for part, kind in _PARTS.items() for key in _keys_of(kind)]
    budgets = ("workspace_mb", "latency_budget_ms", "memory_budget_mb")
    needed = ["opset", *leaves, *(key for key in budgets if getattr(profile, key) is not None)]
    known = [key for key in _keys_of(DeviceProfile) if key not in (*_PARTS, "sources")] + leaves
    for key in profile.sources:
        if key not in known:
            hint = _did_you_mean(key, known, f"known keys: {', '.join(known)}")
            raise SSDKDError(f"{path}: [sources] names '{key}', which is no key of a profile", hint)
    for key in needed:
        if key not in profile.sources:
            raise SSDKDError(
                f"{path}: '{key}' has no source",
                f'add to [sources]: {key} = "a document and its address, measured by us: ..., or chosen by us: ..."',
            )


def _check_agreement(path: Path, profile: DeviceProfile) -> None:
    """No value contradicts another, or asks for what no exporter writes."""
    batches, scheme, tensorrt = profile.batches, profile.quantization, profile.runtime != "onnxruntime"
    sizes = (batches.smallest, batches.usual, batches.largest)
    problems = (
        (
            sorted(sizes) != list(sizes),
            f"batches: expected smallest <= usual <= largest; found {', '.join(map(str, sizes))}",
            "put the three in order",
        ),
        (
            profile.precision not in profile.precisions,
            f"precision: expected one of its precisions, {', '.join(profile.precisions)}; found {profile.precision}",
            "add it to precisions, or choose another",
        ),
        (
            profile.opset != _OPSET,
            f"opset: expected {_OPSET}, the one that the exporter writes; found {profile.opset}",
            f"opset = {_OPSET}",
        ),
        (
            ("trt" in profile.export) != tensorrt,
            f"export: {', '.join(profile.export)} does not fit the runtime {profile.runtime}",
            'export = ["onnx", "trt"]' if tensorrt else 'export = ["onnx"]',
        ),
        (
            tensorrt and (scheme.activations, scheme.symmetric_activations, scheme.int32_bias) != ("int8", True, False),
            "quantization: TensorRT takes symmetric int8 activations and no INT32 bias",
            'activations = "int8", symmetric_activations = true, int32_bias = false',
        ),
        (
            not tensorrt and (profile.workspace_mb is not None or profile.built_on_device),
            "workspace_mb and built_on_device are of TensorRT plans; the runtime is onnxruntime",
            "leave workspace_mb out, and built_on_device = false",
        ),
    )
    for wrong, message, hint in problems:
        if wrong:
            raise SSDKDError(f"{path}: {message}", hint)


def _keys_of(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    names = list(known)
    near = difflib.get_close_matches(word.lower(), names, n=1)
    near += [name for name in names if len(word) > 2 and word.lower() in name]  # gpu, orin
    return f"did you mean '{near[0]}'?" if near else otherwise
