import io
import math
from typing import Any

import pytest
from rich.console import Console

from engine.distill import RoundMetrics
from ssdkd_cli import console, words


def metrics(number: int, **changes: Any) -> RoundMetrics:
    values: dict[str, Any] = {
        "round": number,
        "rounds": 40,
        "phase": "distill",
        "seconds": 10.0 * number,
        "seconds_left": 10.0 * (40 - number),
        "inversion_loss": 0.5,
        "prior_loss": 0.25,
        "spread_loss": 0.0625,
        "class_loss": 0.125,
        "adversarial_loss": -0.1,
        "distillation_loss": 1.5,
        "feature_loss": 0.9,
        "agreement": 61.25,
        "class_balance": 0.81,
        "images_per_second": 412.4,
        "images_seen": 21504,
        "steps": 84,
        "buffer_size": 2048,
    }
    names = set(RoundMetrics.__dataclass_fields__)
    return RoundMetrics(**{name: value for name, value in (values | changes).items() if name in names})


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_fits_the_terminal(width: int) -> None:
    terminal = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    terminal.print(console.round_view("resnet20 to resnet8", [metrics(number) for number in range(1, 11)]))
    lines = terminal.file.getvalue().splitlines()  # type: ignore[attr-defined]
    text = "\n".join(lines)
    assert len(lines) <= 12
    for part in (
        "round 10 of 40",
        "25 %",
        "5 min 0 s left",
        "61.2 %",
        "1.5",
        "0.0625",
        "0.125",
        "-0.1",
        "2,048",
        "0.81",
        "412 images/s",
    ):
        assert part in text


def test_what_is_not_there_yet_is_not_shown() -> None:
    first = metrics(1, phase="warm-up", steps=0, distillation_loss=math.nan, images_per_second=0.0)
    terminal = Console(width=80, file=io.StringIO(), color_system=None)
    terminal.print(console.round_view("a to b", [first]))
    assert "nan" not in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "nan" not in console.plain_round(first)
    unknown = metrics(1, phase="warm-up", steps=0, seconds_left=math.nan)
    terminal.print(console.round_view("a to b", [unknown]))
    assert "left" not in console.plain_round(unknown)
    assert "  0 %" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "nan" not in terminal.file.getvalue()  # type: ignore[attr-defined]


def test_without_a_terminal_there_is_a_line_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    with console.rounds("a to b") as show:
        for number in range(1, 11):
            show(metrics(number, seconds=2.0 * number))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines if "round" in line.split()[:1]] == ["1/40", "4/40", "7/40", "10/40"]
    assert "61.2 % agreement" in lines[-1]


def test_a_failed_stage_is_not_ticked(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stage("proof", "running") as done:
        done("the logits differ", good=False)
    assert capsys.readouterr().err.startswith("✗ proof")
    with pytest.raises(ValueError, match="stop"), console.stage("proof", "running"):
        raise ValueError("stop")
    assert capsys.readouterr().err == ""


def test_a_stage_of_many_rounds_tells_of_some(capsys: pytest.CaptureFixture[str]) -> None:
    with console.counted("samples", "512 samples") as (tick, done):
        tick("round 1")
        tick("round 2")
        done("512 samples, made")
    said = capsys.readouterr().err.splitlines()
    assert [" ".join(line.split()) for line in said] == ["512 samples, round 1", "✓ samples 512 samples, made"]


def test_sparkline() -> None:
    assert console.sparkline([]) == ""
    assert console.sparkline([0, 50, 100]) == "▁▅█"
    assert len(console.sparkline([10.0] * 1000)) == console.SPARK_WIDTH


def test_words() -> None:
    assert words.percent(None) == words.count(None) == words.size(None) == words.milliseconds(None) == "unknown"
    assert [words.count(value) for value in (0, 950, 81_123, 2_240_000, 5.61e9)] == [
        "0",
        "950",
        "81,123",
        "2.24 M",
        "5.61 G",
    ]
    assert [words.size(value) for value in (900, 99_000, 310_000)] == ["0.9 kB", "99.0 kB", "0.31 MB"]
    assert [words.duration(value) for value in (0.04, 9.96, 61, 3700)] == ["0.0 s", "10 s", "1 min 1 s", "1 h 1 min"]
    assert words.times(30, 2) == "15 times"
    compared = [words.compared(100, student, ("fewer", "more")) for student in (100, 104, 96, 50, 200)]
    assert compared == ["the same", "about the same", "about the same", "2.0 times fewer", "2.0 times more"]
    assert words.markdown_table(("a", "b"), [("1|2", "3")]) == ["| a    | b |", "|------|---|", "| 1\\|2 | 3 |"]
