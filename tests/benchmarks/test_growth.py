import pytest

from benchmarks import growth
from benchmarks.growth import Case, measure
from engine.state import State


def test_a_case_is_measured_with_full_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    full: list[tuple[int, int]] = []
    fill = growth.fill

    def filled(state: State) -> None:
        fill(state)
        full.append((state.buffer.size, state.held_out.size))

    monkeypatch.setattr(growth, "fill", filled)
    case = Case(samples=70, classes=3, pixels=16, teacher="resnet8")
    row = measure(case, "cpu")
    assert (row["samples"], row["classes"], row["pixels"], row["batch"]) == (70, 3, 16, 64)
    assert row["teacher_parameters"] > 70_000
    assert row["seconds_per_1000_images"] == 1000 * row["seconds_per_round"] / (40 * 64)
    assert 0 < row["seconds_per_round"] < 60
    assert row["peak_memory_mb"] > 100
    assert full == [(70, 1024)]
