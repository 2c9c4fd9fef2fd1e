"""The plan of a sidecar is of no importance here but for its bytes; real ones are in test_to_tensorrt.py."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from engine.errors import SSDKDError
from exporters.tensorrt_sidecar import (
    Binding,
    Sidecar,
    check_precision,
    check_sidecar,
    precision_notes,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)

SIDECAR = Sidecar(
    schema_version=1,
    flavour="tensorrt",
    version="10.3.0",
    compute_capability="8.7",
    gpu="Orin",
    precision="fp16",
    input=Binding("images", "float", (1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8)),
    output=Binding("logits", "float", (1, 5), (4, 5), (8, 5)),
    workspace_mb=None,
    timing_cache=None,
    onnx_sha256=hashlib.sha256(b"onnx").hexdigest(),
    onnx_bytes=4,
    onnx_metadata={"ssdkd.classes": "5"},
    plan_sha256=hashlib.sha256(b"plan").hexdigest(),
    plan_bytes=4,
    weight_bytes={"fp16": 2000},
    computed_weights={"fp16": 900, "fp32": 100},
    layers={"stem": "fp32", "head": "fp16"},
    weights_in_plan={"fp16": {"fp16": 700, "not found": 200}, "fp32": {"fp32": 100}},
    engine_tensors={"fp16": 20, "fp32": 4},
    build_seconds=1.5,
    built_on="2026-01-01T00:00:00+00:00",
    platform="Linux aarch64",
    ssdkd_version="0.1.0",
    warnings=("a word",),
)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan with its sidecar and its ONNX file beside it."""
    path = tmp_path / "model.fp16.engine"
    path.write_bytes(b"plan")
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    write_sidecar(path, SIDECAR)
    return path


def test_what_was_written_is_read(plan: Path) -> None:
    assert sidecar_path(plan).name == "model.fp16.engine.json"
    assert read_sidecar(plan) == SIDECAR
    assert check_sidecar(plan, None) is None
    assert check_sidecar(plan, plan.with_name("model.onnx")) is None


def test_plan_from_another_onnx_file(plan: Path) -> None:
    other = plan.with_name("other.onnx")
    other.write_bytes(b"another")
    problem = str(check_sidecar(plan, other))
    assert problem.startswith("model.fp16.engine was made from another ONNX file than other.onnx: sha256 ")
    assert SIDECAR.onnx_sha256 in problem
    assert hashlib.sha256(b"another").hexdigest() in problem


def test_another_plan_than_the_sidecar_describes(plan: Path) -> None:
    plan.write_bytes(b"plan, changed")
    assert "is not the plan that its sidecar describes" in str(check_sidecar(plan, None))


def test_files_that_are_not_there(plan: Path) -> None:
    assert check_sidecar(plan, plan.with_name("no.onnx")) == f"{plan.with_name('no.onnx')} is not there"
    sidecar_path(plan).unlink()
    assert check_sidecar(plan, None) == f"{plan} has no sidecar: model.fp16.engine.json is not there"
    plan.unlink()
    assert check_sidecar(plan, None) == f"{plan} is not there"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is no sidecar of a plan: JSONDecodeError"),
        ("[1, 2]", "is no sidecar of a plan: TypeError"),
        ("{}", "is no sidecar of a plan: KeyError: 'schema_version'"),
        ('{"schema_version": 1}', "is no sidecar of a plan: KeyError: 'flavour'"),
        ('{"schema_version": 2}', "expected schema_version 1, found 2"),
        ("\xff", "is no sidecar of a plan"),
    ],
)
def test_unreadable_sidecar(content: str, message: str, plan: Path) -> None:
    sidecar_path(plan).write_bytes(content.encode("latin-1"))
    assert message in str(check_sidecar(plan, None))
    with pytest.raises(SSDKDError, match=message):
        read_sidecar(plan)


def test_a_missing_key_and_one_too_many(plan: Path) -> None:
    text = sidecar_path(plan).read_text()
    for changed in (text.replace('"gpu"', '"gpus"'), text.replace('"opt"', '"best"')):
        sidecar_path(plan).write_text(changed)
        assert "is no sidecar of a plan" in str(check_sidecar(plan, None))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"engine_tensors": None}, None),
        ({"weights_in_plan": {"fp16": {"not found": 900}}}, None),
        (
            {"computed_weights": {"fp16": 400, "fp32": 600}},
            "fp16 was asked for, and 600 of the graph's 1,000 weights compute in fp32: stem",
        ),
        (
            {"computed_weights": {"fp16": 900, "int8": 100}, "layers": {"stem": "int8", "head": "fp16"}},
            "fp16 was asked for, and 100 of the graph's 1,000 weights compute in int8: stem",
        ),
        ({"computed_weights": {}}, "fp16 was asked for, and the graph has no convolution or matrix product"),
        (
            {"weights_in_plan": {"fp16": {"fp32": 800, "not found": 100}}},
            "fp16 was asked for, and the plan holds these weights otherwise: fp32 800, not found 100",
        ),
        ({"engine_tensors": {"fp32": 9}}, "fp16 was asked for, and the tensors of the engine are fp32 9"),
        (
            {"engine_tensors": {"fp16": 9, "int8": 1}},
            "fp16 was asked for, and the tensors of the engine are fp16 9, int8 1",
        ),
        (
            {"precision": "fp32"},
            "fp32 was asked for, and 900 of the graph's 1,000 weights compute in fp16: head",
        ),
    ],
)
def test_precision_is_judged_by_graph_plan_and_engine(changes: dict[str, object], problem: str | None) -> None:
    found = check_precision(dataclasses.replace(SIDECAR, **changes))
    assert found is None if problem is None else str(found).startswith(problem)


def test_notes_say_what_the_check_rests_on() -> None:
    assert precision_notes(SIDECAR) == (
        "the strongly typed network computes fp16 900, fp32 100 of its weights; "
        "the plan holds of those that are fp16: fp16 700, not found 200",
        "the engine inspector counts tensors: fp16 20, fp32 4",
    )
    without = precision_notes(dataclasses.replace(SIDECAR, engine_tensors=None, weights_in_plan={}))
    assert "those that are fp16: none" in without[0]
    assert without[1].startswith("the engine was not inspected")
