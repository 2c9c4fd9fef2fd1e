import dataclasses
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from engine.errors import SSDKDError
from exporters.to_onnx import OPSET
from profiles import GENERIC, Batches, DeviceProfile, Quantization, load_profile, profile_names

NAMES = ("arm64", "datacenter-gpu", "generic", "jetson-orin", "rtx", "x86-avx2", "x86-vnni")
U8S8 = Quantization("uint8", False, True, False, True)
U8S8_REDUCED = Quantization("uint8", False, True, True, True)
S8S8 = Quantization("int8", False, True, False, True)
SYMMETRIC = Quantization("int8", True, True, False, False)
OWN = """
name = "kiosk"
summary = "our kiosks"
runtime = "onnxruntime"
export = ["onnx"]
precision = "int8"
precisions = ["fp32", "int8"]
opset = 18
built_on_device = false
latency_budget_ms = 50

[quantization]
activations = "uint8"
symmetric_activations = false
per_channel = true
reduce_range = true
int32_bias = true

[batches]
smallest = 1
usual = 4
largest = 8

[sources]
opset = "chosen by us"
latency_budget_ms = "chosen by us: 20 frames a second, 1000 / 20"
quantization.activations = "measured by us"
quantization.symmetric_activations = "measured by us"
quantization.per_channel = "measured by us"
quantization.reduce_range = "measured by us"
quantization.int32_bias = "measured by us"
batches.smallest = "chosen by us"
batches.usual = "chosen by us"
batches.largest = "chosen by us"
"""


def written(path: Path, *changes: tuple[str, str]) -> str:
    """The path of OWN with each `old` replaced by its `new`."""
    text = OWN
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return str(path)


def leaves(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def test_the_profiles_of_the_package() -> None:
    assert profile_names() == NAMES
    assert GENERIC in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_number_and_every_decision_has_a_source(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    values = dataclasses.asdict(profile)
    sources = values.pop("sources")
    numbers = {key for key, value in leaves(values).items() if isinstance(value, int | float)} - {"built_on_device"}
    decisions = {f"quantization.{field.name}" for field in dataclasses.fields(Quantization)}
    assert {"opset", "batches.smallest", "batches.usual", "batches.largest"} <= numbers
    assert set(sources) >= numbers | decisions | {"precision", "precisions"}
    for key, source in sources.items():
        assert "https://" in source or source.startswith(("chosen by us", "measured by us")), key


@pytest.mark.parametrize("name", NAMES)
def test_a_file_begins_with_what_the_device_is_and_names_public_places_alone(name: str) -> None:
    text = Path(__file__).parents[2].joinpath("profiles", f"{name}.toml").read_text()
    assert text.startswith("# ")
    assert "shared/" not in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert all(re.match(r"https://[\w.-]+\.\w+/", address) for address in re.findall(r"\w+://\S+", text))


@pytest.mark.parametrize(
    ("name", "runtime", "precision", "quantization", "batches", "built_on_device"),
    [
        ("arm64", "onnxruntime", "int8", S8S8, Batches(1, 8, 32), False),
        ("datacenter-gpu", "tensorrt", "fp16", SYMMETRIC, Batches(1, 64, 256), False),
        ("generic", "onnxruntime", "fp32", U8S8_REDUCED, Batches(1, 32, 64), False),
        ("jetson-orin", "tensorrt", "fp16", SYMMETRIC, Batches(1, 1, 8), True),
        ("rtx", "tensorrt_rtx", "fp16", SYMMETRIC, Batches(1, 8, 64), False),
        ("x86-avx2", "onnxruntime", "int8", U8S8_REDUCED, Batches(1, 32, 64), False),
        ("x86-vnni", "onnxruntime", "int8", U8S8, Batches(1, 32, 64), False),
    ],
)
def test_what_each_device_runs(
    name: str, runtime: str, precision: str, quantization: Quantization, batches: Batches, built_on_device: bool
) -> None:
    profile = load_profile(name)
    assert (profile.runtime, profile.precision, profile.built_on_device) == (runtime, precision, built_on_device)
    assert profile.quantization == quantization
    assert profile.batches == batches
    assert profile.export == (("onnx",) if runtime == "onnxruntime" else ("onnx", "trt"))
    assert (profile.workspace_mb is None) == (runtime == "onnxruntime")
    assert (profile.latency_budget_ms is None) == (profile.memory_budget_mb is None) == (name == "generic")
    assert profile.workspace_mb is None or profile.workspace_mb <= (profile.memory_budget_mb or 0)


def test_the_opset_is_the_exporter_s() -> None:
    assert {load_profile(name).opset for name in NAMES} == {OPSET}


def test_a_profile_cannot_be_changed() -> None:
    profile = load_profile("rtx")
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.opset = 17  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.batches.usual = 2  # type: ignore[misc]


def test_a_file_of_one_s_own(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path / "kiosk.toml"))
    assert profile == DeviceProfile(
        name="kiosk",
        summary="our kiosks",
        runtime="onnxruntime",
        export=("onnx",),
        precision="int8",
        precisions=("fp32", "int8"),
        quantization=U8S8_REDUCED,
        opset=18,
        batches=Batches(1, 4, 8),
        built_on_device=False,
        latency_budget_ms=50.0,
        sources=profile.sources,
    )
    assert profile.sources["batches.usual"] == "chosen by us"
    assert (profile.workspace_mb, profile.memory_budget_mb) == (None, None)


def test_sources_by_quoted_keys_and_a_file_of_any_name(tmp_path: Path) -> None:
    path = written(tmp_path / "kiosk", ("batches.usual =", '"batches.usual" ='), ("opset = 18", "opset = 18"))
    assert load_profile(path).sources["batches.usual"] == "chosen by us"


def test_a_name_of_ours_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "rtx")
    assert load_profile("rtx").runtime == "tensorrt_rtx"
    assert load_profile("./rtx").name == "kiosk"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("jetson", "did you mean 'jetson-orin'?"),
        ("Orin", "did you mean 'jetson-orin'?"),
        ("gpu", "did you mean 'datacenter-gpu'?"),
        ("x86_vnni", "did you mean 'x86-vnni'?"),
        ("toaster", "`ssdkd profiles` says what each is for"),
        ("", "`ssdkd profiles` says what each is for"),
    ],
)
def test_a_name_that_does_not_exist(name: str, hint: str) -> None:
    with pytest.raises(SSDKDError) as caught:
        load_profile(name)
    assert caught.value.message == (
        f"there is no device profile '{name}': expected {', '.join(NAMES)}, or a .toml file of your own"
    )
    assert caught.value.hint == hint


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    for path, reason in ((tmp_path / "missing.toml", "No such file or directory"), (folder, "Is a directory")):
        with pytest.raises(SSDKDError, match=reason) as caught:
            load_profile(str(path))
        assert caught.value.message.startswith(f"{path} cannot be read")
        assert "ssdkd profiles" in caught.value.hint


@pytest.mark.parametrize("content", [b"name = kiosk", b"\xff\xfe\x00", b"opset = " + b"1" * 5000])
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(SSDKDError) as caught:
        load_profile(str(path))
    assert caught.value.message.startswith(f"{path} is not TOML: ")
    assert "ssdkd profiles show generic" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        "x = " + "[" * 5000,
        "x = " + "[" * 300 + "]" * 300,
        "batches" + ".a" * 5000 + " = 1",
        "sources.a" + ".a" * 5000 + " = 1",
    ],
)
def test_a_file_that_is_nested_too_deeply(tmp_path: Path, content: str) -> None:
    path = tmp_path / "deep.toml"
    path.write_text(content)
    with pytest.raises(SSDKDError) as caught:
        load_profile(str(path))
    assert caught.value.message == f"{path}: expected values, or tables of them; found deeper nesting than can be read"
    assert caught.value.hint == EXAMPLE


EXAMPLE = "`ssdkd profiles show generic` shows every key with a value"
SCHEME = 'activations = "int8", symmetric_activations = true, int32_bias = false'
TENSORRT = ('runtime = "onnxruntime"\nexport = ["onnx"]', 'runtime = "tensorrt"\nexport = ["onnx", "trt"]')


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        # unknown and missing keys
        ([("precision = ", "precison = ")], "unknown key 'precison'", "did you mean 'precision'?"),
        ([("reduce_range = t", "reduced_range = t")], "unknown key 'quantization.reduced_range'", "'reduce_range'?"),
        ([("[batches]", "[zzz]\n[batches]")], "unknown key 'zzz'", "known keys: name, summary, runtime,"),
        ([("opset = 18\n", "")], "the key 'opset' is missing", "add it; " + EXAMPLE),
        ([("usual = 4\n", "")], "the key 'batches.usual' is missing", "add it; " + EXAMPLE),
        # wrong types
        ([("opset = 18", 'opset = "18"')], "opset: expected a valid integer; found '18'", EXAMPLE),
        ([("opset = 18", "opset = true")], "opset: expected a valid integer; found True", EXAMPLE),
        ([("usual = 4", "usual = 4.5")], "batches.usual: expected a valid integer", EXAMPLE),
        ([("smallest = 1", "smallest = 0")], "batches.smallest: expected greater than or equal to 1; found 0", EXAMPLE),
        ([("= false\nlat", '= "no"\nlat')], "built_on_device: expected a valid boolean; found 'no'", EXAMPLE),
        ([('"fp32", "int8"', '"fp64"')], "precisions: expected 'fp32', 'fp16' or 'int8'; found 'fp64'", EXAMPLE),
        ([('["fp32", "int8"]', '"int8"')], "precisions: expected a valid array; found 'int8'", EXAMPLE),
        ([('"our kiosks"', '" "')], "summary: expected some words; found ' '", EXAMPLE),
        ([("= 50", "= nan")], "latency_budget_ms: expected", EXAMPLE),
        ([("= 50", "= -50")], "latency_budget_ms: expected greater than 0; found -50", EXAMPLE),
        ([("= 50", "= 1979-05-27")], "latency_budget_ms: expected a valid number; found '1979-05-27'", EXAMPLE),
        # sources
        ([('opset = "chosen by us"\n', "")], "'opset' has no source", 'add to [sources]: opset = "'),
        ([('batches.usual = "chosen by us"\n', "")], "'batches.usual' has no source", "batches.usual ="),
        ([("= 50\n", "= 50\nmemory_budget_mb = 9\n")], "'memory_budget_mb' has no source", "measured by us: ..."),
        ([('batches.usual = "chosen by us"', 'batches.usual = ""')], "sources.batches.usual: expected some", EXAMPLE),
        ([('batches.usual = "c', 'batches.ususal = "c')], "which is no key of a profile", "mean 'batches.usual'?"),
        # contradictions
        ([("smallest = 1", "smallest = 5")], "found 5, 4, 8", "put the three in order"),
        ([("largest = 8", "largest = 3")], "batches: expected smallest <= usual <= largest; found 1, 4, 3", "order"),
        ([('n = "int8"', 'n = "fp16"')], "expected one of its precisions, fp32, int8; found fp16", "precisions"),
        (
            [("opset = 18", "opset = 17")],
            "opset: expected 18, the one that the exporter writes; found 17",
            "opset = 18",
        ),
        ([('["onnx"]', '["onnx", "trt"]')], "onnx, trt does not fit the runtime onnxruntime", 'export = ["onnx"]'),
        ([('"onnxruntime"', '"tensorrt"')], "onnx does not fit the runtime tensorrt", 'export = ["onnx", "trt"]'),
        ([TENSORRT], "TensorRT takes symmetric int8 activations and no INT32 bias", SCHEME),
        ([("= false\nlat", "= true\nlat")], "built_on_device are of TensorRT plans", "built_on_device = false"),
    ],
)
def test_a_wrong_file(tmp_path: Path, changes: list[tuple[str, str]], message: str, hint: str) -> None:
    path = written(tmp_path / "kiosk.toml", *changes)
    with pytest.raises(SSDKDError) as caught:
        load_profile(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_sources_that_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "kiosk.toml"
    path.write_text('sources = "the internet"\n' + OWN.partition("[sources]")[0])
    with pytest.raises(SSDKDError, match="sources: expected") as caught:
        load_profile(str(path))
    assert caught.value.hint == EXAMPLE


def test_the_page_on_profiles_shows_a_file_that_loads_and_every_key(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/profiles.md").read_text()
    keys = {field.name for kind in (DeviceProfile, Quantization, Batches) for field in dataclasses.fields(kind)}
    assert all(f"`{key}`" in page or f"`[{key}]`" in page for key in keys)
    path = tmp_path / "kiosk.toml"
    path.write_text(textwrap.dedent(page.rpartition("say why.\n")[2]))
    assert load_profile(str(path)).batches == Batches(1, 1, 1)
