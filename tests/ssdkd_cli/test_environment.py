import importlib.metadata
import sys
from pathlib import Path

import onnxruntime
import pytest

from engine import processors
from engine.errors import SSDKDError
from exporters import tensorrt_runtime, to_tensorrt
from exporters.to_tensorrt import Flavour
from ssdkd_cli import environment
from ssdkd_cli.environment import _import_of, cpu_name, cpu_profile, doctor_facts, doctor_findings, profile_warnings


def test_cores_are_those_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("200000 100000\n")
    monkeypatch.setattr(processors, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processors.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert cpu_name().endswith(", 2 cores")


@pytest.mark.parametrize(("source", "said"), [("raise RuntimeError('truncated')", "truncated"), ("1 / 0", "division")])
def test_a_damaged_package_is_said_and_no_traceback(
    source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert _import_of("damaged_package").startswith(f"cannot be imported: {said}")


@pytest.mark.parametrize(
    ("line", "fitting", "is_warned"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", "x86-vnni (VNNI)", False),
        ("flags\t\t: fpu avx2 avx_vnni", "x86-vnni (VNNI)", False),
        ("flags\t\t: fpu avx2 fma", "x86-avx2 (AVX2, no VNNI)", True),
        ("Features\t: fp asimd asimddp", "arm64 (ARM with dot products)", False),
        ("flags\t\t: fpu sse2", None, False),
    ],
)
def test_the_profile_that_fits_this_machine(
    line: str, fitting: str | None, is_warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "cpuinfo")
    said = [finding for finding in doctor_findings() if "its processor fits" in finding]
    assert said == ([f"its processor fits --profile {fitting}"] if fitting else [])
    assert ["no VNNI" in warning for warning in profile_warnings("x86-vnni")] == [True] * is_warned
    assert profile_warnings("x86-avx2") == []


@pytest.mark.parametrize(
    ("problem", "why", "said"),
    [
        (None, None, ["builds plans of Some Library, and proves and measures them on the GPU"]),
        (None, "no GPU", ["builds plans of Some Library, and cannot run them: no GPU"]),
        ("it cannot build here", None, ["it cannot build here: do this"]),
        (environment.ABSENT, None, []),
    ],
)
def test_what_becomes_of_plans_here(
    problem: str | None, why: str | None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_flavour: Flavour) -> None:
        if problem:
            raise SSDKDError(problem, "do this")

    absent = ("tensorrt", "tensorrt_rtx") if problem == environment.ABSENT else ("tensorrt",)
    monkeypatch.setattr(environment, "_import_of", lambda name: environment.ABSENT if name in absent else "1.0")
    monkeypatch.setattr(to_tensorrt, "find_flavour", lambda name: Flavour(name, "Some Library", "1.0"))
    monkeypatch.setattr(to_tensorrt, "check_builder", check)
    monkeypatch.setattr(tensorrt_runtime, "why_plans_do_not_run", lambda _flavour: why)
    findings = doctor_findings()
    proves = findings.index("exports to ONNX, and proves and measures the file in ONNX Runtime on the CPU")
    assert findings[proves + 1 :] == said


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_a_doctor_survives_a_damaged_package(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    monkeypatch.setattr(environment, "_plan_findings", lambda: pytest.fail("it needs that package"))
    assert doctor_findings()[-1] == f"exports nothing: {package} cannot be imported; install ssdkd once more"
    providers = doctor_facts()["onnxruntime_providers"]
    assert providers.startswith(environment.BROKEN) is (package == "onnxruntime")


def test_a_machine_that_does_not_say_fits_no_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "gone")
    assert cpu_profile() is None


def test_a_package_under_another_name_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":  # where onnxruntime-gpu brought it
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor_facts()["onnxruntime"] == onnxruntime.__version__
