import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from profiles import load_profile, profile_names

ROOT = Path(__file__).parents[2]


def test_profiles_lists_what_each_device_runs(ssdkd: Any) -> None:
    ran = ssdkd("profiles")
    assert ran.code == 0, ran.err
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.split()}
    assert set(profile_names()) <= set(rows)
    assert rows["jetson-orin"][1:8] == ["tensorrt", "fp16", "1/1/8", "33.3", "ms", "1024", "MB"]
    assert rows["generic"][1:6] == ["onnxruntime", "fp32", "1/32/64", "none", "none"]
    assert ran.err == ""


def test_profiles_list_is_profiles(ssdkd: Any) -> None:
    assert ssdkd("profiles", "list") == ssdkd("profiles")
    assert ssdkd("profiles", "list", "--json") == ssdkd("profiles", "--json")


def test_profiles_as_json(ssdkd: Any) -> None:
    found = ssdkd("profiles", "--json").json
    assert [profile["name"] for profile in found] == list(profile_names())
    assert found == json.loads(json.dumps([dataclasses.asdict(load_profile(name)) for name in profile_names()]))


@pytest.mark.parametrize("name", profile_names())
def test_show_says_each_value_with_its_source(ssdkd: Any, name: str) -> None:
    ran = ssdkd("profiles", "show", name)
    assert ran.code == 0, ran.err
    profile = load_profile(name)
    title, *lines = ran.out.splitlines()
    assert title == f"{name}: {profile.summary}"
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert shown["opset"] == f"18 ({profile.sources['opset']})"
    assert shown["batches.largest"] == f"{profile.batches.largest} ({profile.sources['batches.largest']})"
    assert shown["quantization.activations"].startswith(profile.quantization.activations)
    assert shown["quantization.per_channel"].startswith("true (")
    assert shown["export"] == ", ".join(profile.export)
    for key, source in profile.sources.items():
        assert shown[key].endswith(f"({source})")
    assert shown["latency_budget_ms"].split()[0] == str(profile.latency_budget_ms or "none")


def test_show_as_json(ssdkd: Any) -> None:
    shown = ssdkd("profiles", "show", "x86-vnni", "--json").json
    assert (shown["precision"], shown["quantization"]["activations"]) == ("int8", "uint8")
    assert shown["sources"]["precision"].startswith("measured by us")
    assert ssdkd("profiles", "--json", "show", "x86-vnni").json == shown


def test_show_a_file_of_one_s_own(ssdkd: Any, tmp_path: Path) -> None:
    path = tmp_path / "kiosk.toml"
    text = (ROOT / "profiles/generic.toml").read_text().replace('name = "generic"', 'name = "kiosk"')
    path.write_text(text)
    assert ssdkd("profiles", "show", path, "--json").json["name"] == "kiosk"
    path.write_text(text.replace("usual = 32", "usal = 32"))
    ran = ssdkd("profiles", "show", path)
    assert (ran.code, ran.out) == (1, "")
    assert f"ERROR {path}: unknown key 'batches.usal'" in ran.err
    assert "HINT did you mean 'usual'?" in ran.err


def test_show_what_does_not_exist(ssdkd: Any) -> None:
    ran = ssdkd("profiles", "show", "orin")
    assert (ran.code, ran.out) == (1, "")
    assert "there is no device profile 'orin'" in ran.err
    assert "did you mean 'jetson-orin'?" in ran.err
    assert ssdkd("profiles", "show").code == 2
    assert ssdkd("profiles", "orin").code == 2


def test_show_has_help_with_an_example(ssdkd: Any) -> None:
    ran = ssdkd("profiles", "show", "--help")
    assert ran.code == 0
    described = ran.out.partition("╭")[0].partition("Usage:")[2].partition("\n")[2]
    assert "ssdkd profiles show jetson-orin" in described


def test_profiles_load_neither_torch_nor_onnx() -> None:
    code = (
        "import sys; from ssdkd_cli.main import main; main(['profiles']); print(sorted(sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert "'profiles'" in ran.stderr
    for heavy in ("torch", "onnx", "onnxruntime", "numpy", "timm"):
        assert f"'{heavy}'" not in ran.stderr
