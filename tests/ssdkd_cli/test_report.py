import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import SSDKDError
from engine.task import Classification
from engine.teacher import load_teacher
from engine.zoo import ZOO
from ssdkd_cli.doubts import prior_warnings, run_warnings, size_warnings
from ssdkd_cli.report import NOT_RECOMMENDED, Percentiles, Report, read_report, to_json
from ssdkd_cli.report_page import to_markdown, write_report
from ssdkd_cli.summary import comparison, show_report

# DESIGN's keys: outside programs read them, so none may go or change its name.
KEYS = {
    "": "schema_version created command seconds_total environment teacher student distillation artifacts "
    "recommendation gates",
    "environment": "python torch ssdkd device cpu gpu",
    "teacher": "path sha256 arch parameters flops size_bytes accuracy accuracy_images latency_ms",
    "student": "arch parameters flops size_bytes accuracy agreement",
    "distillation": "method samples rounds steps seconds images_seen class_histogram settings",
    "artifacts": "path sha256 format precision precision_requested profile size_bytes runtime max_abs_error agreement "
    "accuracy latency_ms throughput_per_s batch verified verified_reason notes",
    "recommendation": "artifact why",
}


@pytest.fixture
def report(compressed: Path) -> Report:
    return read_report(compressed)


def test_the_keys_are_those_of_the_contract(compressed: Path) -> None:
    found = json.loads((compressed / "report.json").read_text())
    for part, keys in KEYS.items():
        value = found[part] if part else found
        value = value[0] if isinstance(value, list) else value
        assert set(keys.split()) <= set(value), part
    assert set(found["teacher"]["latency_ms"]) == {"p50", "p90", "p99"}
    assert found["schema_version"] == 1


def test_what_is_written_is_what_is_read(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report
    assert (tmp_path / "report.json").read_text() == to_json(report)
    assert (tmp_path / "report.md").read_text() == to_markdown(report)
    assert "3 of 3 rounds" in to_markdown(report)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda found: found.update(schema_version=2), "schema_version"),
        (lambda found: found.update(extra=1), "extra"),
        (lambda found: found["teacher"].pop("sha256"), "teacher.sha256"),
        (lambda found: found["distillation"].update(class_histogram=[]), "distillation.class_histogram"),
        (lambda found: found["student"].update(agreement="high"), "student.agreement"),
        (lambda found: found["artifacts"][0].update(bytes=1), "artifacts.0.bytes"),
    ],
)
def test_a_report_that_does_not_follow_the_schema_is_refused(
    change: Any, where: str, compressed: Path, tmp_path: Path
) -> None:
    found = json.loads((compressed / "report.json").read_text())
    change(found)
    (tmp_path / "report.json").write_text(json.dumps(found))
    with pytest.raises(SSDKDError, match=where):
        read_report(tmp_path)


def test_numbers_that_are_not_finite_are_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="finite number"):
        dataclasses.replace(report.student, agreement=float("nan"))


def test_markdown_says_unknown_and_never_guesses(report: Report) -> None:
    blind = dataclasses.replace(
        report,
        teacher=dataclasses.replace(report.teacher, accuracy=None, accuracy_images=None, latency_ms=None, flops=None),
        student=dataclasses.replace(report.student, accuracy=None),
    )
    text = to_markdown(blind)
    row = next(line for line in text.splitlines() if line.startswith("| accuracy"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["unknown", "unknown"]
    assert "no labelled images were given" in text
    assert "None" not in text
    names = [name for name, *_ in comparison(blind)]
    assert "accuracy" not in names  # nothing to compare
    assert "agreement" in names


def test_a_teacher_that_is_a_bare_graph_has_no_name(report: Report) -> None:
    bare = dataclasses.replace(report, teacher=dataclasses.replace(report.teacher, arch="graph"))
    lines = to_markdown(bare).splitlines()
    assert lines[0] == f"# bare graph to {report.student.arch}"
    row = next(line for line in lines if line.startswith("| architecture"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["bare graph", report.student.arch]
    assert comparison(bare)[0][1] == "bare graph"


def test_each_agreement_has_its_column(report: Report) -> None:
    (artifact,) = report.artifacts
    changed = dataclasses.replace(artifact, agreement=99.5, teacher_agreement=61.5)
    text = to_markdown(dataclasses.replace(report, artifacts=(changed,)))
    head, _, row = text.partition("## Artifacts")[2].strip().splitlines()[:3]
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (head, row)), strict=True))
    assert (cells["agrees with student"], cells["agrees with teacher"]) == ("99.5 %", "61.5 %")


def test_the_comparison_says_what_was_gained_and_lost(report: Report) -> None:
    (artifact,) = report.artifacts
    teacher = dataclasses.replace(
        report.teacher,
        parameters=4000,
        size_bytes=1000,
        accuracy=80.0,
        latency_ms=Percentiles(p50=1.0, p90=1.0, p99=1.0),
    )
    student = dataclasses.replace(report.student, parameters=1000, size_bytes=250, accuracy=60.0)
    slower = dataclasses.replace(artifact, latency_ms=Percentiles(p50=2.0, p90=2.0, p99=2.0))
    rows = {
        name: gain
        for name, *_, gain in comparison(
            dataclasses.replace(report, teacher=teacher, student=student, artifacts=(slower,))
        )
    }
    assert rows["accuracy"] == "75.0 % of the teacher's"
    assert rows["parameters"] == "4.0 times fewer"
    assert rows["file"] == ""  # of two formats
    assert rows["latency p50"] == "2.0 times slower"


@pytest.mark.parametrize("of_teacher", [27.0, 0.0, None])
def test_of_a_teacher_near_chance_nothing_is_kept(report: Report, of_teacher: float | None) -> None:
    teacher = dataclasses.replace(report.teacher, accuracy=of_teacher)  # of 4 classes
    student = dataclasses.replace(report.student, accuracy=26.0)
    gains = {name: gain for name, *_, gain in comparison(dataclasses.replace(report, teacher=teacher, student=student))}
    assert gains["accuracy"] == ""


def test_what_was_doubtful_stands_below_the_table(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    show_report(Path("run"), dataclasses.replace(report, warnings=("it has learned too little",)))
    lines = capsys.readouterr().out.splitlines()
    (said,) = (number for number, line in enumerate(lines) if line == "! it has learned too little")
    assert lines[said - 1].startswith("✓ model.onnx")
    show_report(Path("run"), dataclasses.replace(report, warnings=()))
    assert "!" not in capsys.readouterr().out


def test_where_nothing_is_recommended_it_is_said(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    show_report(Path("run"), dataclasses.replace(report, recommendation=None))
    assert NOT_RECOMMENDED in capsys.readouterr().out
    show_report(Path("run"), report)
    assert NOT_RECOMMENDED not in capsys.readouterr().out


def test_mean_and_std_are_not_said_to_be_of_a_flag(report: Report) -> None:
    assert report.teacher.preprocessing_source == "flag"  # of the config file, in truth
    assert "mean [0.5], std [0.5] (as stated)" in to_markdown(report)


def test_report_writes_it_again(ssdkd: Any, compressed: Path) -> None:
    (compressed / "report.md").unlink()
    ran = ssdkd("report", compressed, "--json")
    assert ran.code == 0, ran.err
    assert ran.json == json.loads((compressed / "report.json").read_text())
    assert (compressed / "report.md").exists()
    shown = ssdkd("report", compressed)
    assert "agreement" in shown.out
    assert "verified" in shown.out


def test_a_collapsed_or_unbalanced_prior_is_said() -> None:
    assert prior_warnings([50, 60, 55, 70]) == []
    assert prior_warnings([0, 3, 2, 1]) == []  # too few samples to say
    (collapsed,) = prior_warnings([0, 500, 0, 300])
    assert "2 of 4 classes" in collapsed
    (unbalanced,) = prior_warnings([500, 40, 300, 200])
    assert "500 of the largest class, 40 of the smallest" in unbalanced


def state_of_two_samples() -> Any:
    """As much of a state as the warnings read."""
    called = types.SimpleNamespace(refusal=None)
    return types.SimpleNamespace(
        buffer=types.SimpleNamespace(size=2, classes=torch.tensor([0, 1])),
        task=Classification(2),
        hurried=False,
        round=150,
        settings=types.SimpleNamespace(rounds=150, alter=False, looking_share=0.5),
        inverter=types.SimpleNamespace(inner_step={False: called, True: called}),
        gradients={False: types.SimpleNamespace(refusal=None)},
        stages=types.SimpleNamespace(pairs=()),
    )


def test_a_run_that_the_clock_hurried_says_so() -> None:
    state = state_of_two_samples()
    assert run_warnings(state) == []
    state.hurried = True
    assert ["time limit" in warning for warning in run_warnings(state)] == [True]


def test_a_student_that_has_more_is_warned_of_once(shared: Path) -> None:
    teacher = load_teacher(shared / "teacher.pt", input_shape=(1, 16, 16), mean=(0.5,), std=(0.5,))
    (warning,) = size_warnings(ZOO["resnet20"](4, 1), teacher)
    assert warning.startswith("the student has more parameters than the teacher, 269,044 against 74,612")
    assert ", and more FLOPs than the teacher, " in warning
    assert warning.count("ssdkd export") == 1
    assert size_warnings(ZOO["resnet8"](4, 1), teacher) == []


def test_a_run_that_the_time_limit_ended_says_after_how_many_rounds() -> None:
    state = state_of_two_samples()
    state.round, state.seconds = 15, 60.0
    (warning,) = run_warnings(state)
    assert warning.startswith(
        "distilling ended at its time limit after 15 of 150 rounds, which take about 10 min 0 s here"
    )
    assert "--time-limit" in warning


def test_a_gpu_that_cannot_record_a_step_is_said() -> None:
    state = state_of_two_samples()
    state.gradients[False].refusal = "it cannot be recorded: it reads a value"
    (warning,) = run_warnings(state)
    assert warning.startswith("teaching is slower than it could be on this GPU")
    assert warning.endswith("it reads a value")


def test_a_report_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(SSDKDError, match="it is no text"):
        read_report(tmp_path)
