import platform

import pytest

from engine.errors import SSDKDError
from exporters.precision import Scheme
from exporters.to_tensorrt import Flavour
from profiles import load_profile
from ssdkd_cli import environment
from ssdkd_cli import target as target_module
from ssdkd_cli.target import Target, resolve_target

RTX = Flavour("tensorrt_rtx", "TensorRT for RTX", "1.7")
FULL = Flavour("tensorrt", "TensorRT", "11.4")


def target(**changed: object) -> Target:
    values: dict[str, object] = {"formats": (), "precisions": (), "profile": None, "qat": "auto", "fallback": True}
    return resolve_target(**{**values, **changed})  # type: ignore[arg-type]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Flavour]:
    """The flavours of TensorRT that there seem to be; a test fills it."""
    flavours: list[Flavour] = []

    def find(wanted: str | None = None) -> Flavour:
        for flavour in flavours:
            if wanted in (None, flavour.name):
                return flavour
        raise SSDKDError(f"{wanted} is not installed", "pip install it")

    monkeypatch.setattr(target_module, "find_flavour", find)
    return flavours


def test_by_itself_it_is_onnx_with_every_precision_to_compare() -> None:
    found = target()
    assert (found.formats, found.asked) == (("onnx",), ())
    assert found.precisions == ("fp32", "fp16", "int8")
    assert not found.is_named


def test_a_precision_that_is_typed_is_made_with_float32_beside_it_and_nothing_more() -> None:
    assert target(precisions=["int8"]).precisions == ("fp32", "int8")
    assert target(precisions=["fp32"]).precisions == ("fp32",)
    assert target(precisions=["int8"]).asked == ("int8",)
    assert target(precisions=["int8", "fp16"]).tried == ()


def test_a_profile_sets_what_is_not_typed() -> None:
    found = target(profile="x86-vnni")
    assert (found.asked, found.is_named, found.formats) == (("int8",), True, ("onnx",))
    assert found.scheme.activations == "uint8"
    assert not found.scheme.symmetric_activations
    assert "fp32" in found.tried
    assert target(profile="x86-vnni", precisions=["fp32"]).asked == ("fp32",)  # what is typed wins


def test_a_budget_is_a_limit_on_a_machine_of_that_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(environment, "cpu_profile", lambda: ("x86-avx2", "AVX2, no VNNI"))
    budget = target(profile="x86-avx2").latency_budget_ms
    assert budget == load_profile("x86-avx2").latency_budget_ms
    assert budget is not None
    assert target(profile="x86-vnni").latency_budget_ms is None
    assert target(profile="arm64").latency_budget_ms is None
    assert target(profile="jetson-orin").latency_budget_ms is None
    assert target().latency_budget_ms is None


def test_seven_bits_for_x86_without_vnni() -> None:
    assert target(profile="x86-avx2").scheme.reduce_range


def test_a_jetson_builds_its_plan_itself() -> None:
    found = target(profile="jetson-orin")
    assert "trt" in found.formats
    assert found.flavour is None
    assert found.scheme == Scheme("int8", True, True, False, False)
    assert found.tried == ()  # nothing of it can be measured here


def test_tensorrt_takes_the_profile_of_what_is_installed(installed: list[Flavour]) -> None:
    installed.append(RTX)
    found = target(formats=["trt"])
    assert (found.flavour, found.profile.name, found.asked) == (RTX, "rtx", ("fp16",))
    installed[:] = [FULL]
    assert target(formats=["trt"]).profile.name == "datacenter-gpu"
    assert target(formats=["trt"], precisions=["fp32"]).asked == ("fp32",)


def test_a_profile_wants_its_own_flavour(installed: list[Flavour]) -> None:
    installed.append(RTX)
    with pytest.raises(SSDKDError, match="tensorrt is not installed"):
        target(profile="datacenter-gpu")


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"profile": ""}, "there is no device profile ''", "ssdkd profiles"),
        ({"profile": "", "formats": ["trt"]}, "there is no device profile ''", "ssdkd profiles"),
        ({"profile": "x86-vni"}, "there is no device profile 'x86-vni'", "x86-vnni"),
        ({"qat": "on", "precisions": ["fp16"]}, "--qat on is for an INT8 file", "--precision int8"),
        ({"qat": "on"}, "--qat on is for an INT8 file, and none is asked for", "--precision int8"),
        ({"fallback": False}, "--no-fallback is for an INT8 file", "--precision int8"),
        ({"half_io": True, "precisions": ["int8"]}, "--fp16-io is for an FP16 file", "--precision fp16"),
        ({"formats": ["trt"], "profile": "x86-vnni"}, "x86-vnni is of a device without TensorRT", "--profile rtx"),
    ],
)
def test_what_does_not_exist_or_fit_stops_before_anything_else(
    changed: dict[str, object], message: str, hint: str
) -> None:
    with pytest.raises(SSDKDError, match=message) as caught:
        target(**changed)
    assert hint in caught.value.hint
