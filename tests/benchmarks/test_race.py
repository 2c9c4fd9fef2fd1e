import types

import pytest
from torch import nn

from benchmarks.race import DEMO, run_own
from benchmarks.settings import of_equal_cost
from engine import distill as loop
from engine import state as beginning

SMALL = {
    **{"warmup_rounds": 0, "inversion_batch": 16, "inversion_steps": 1, "student_batch": 16, "student_steps": 1},
    **{"samples": 32, "held_out": 2, "views": 2},
}


def test_the_clock_stands_still_while_the_student_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    scored: list[nn.Module] = []

    def perf_counter() -> float:  # a round looks twice
        nonlocal now
        now += 0.1
        return now

    def slow_score(student: nn.Module) -> float:
        nonlocal now
        now += 1000
        scored.append(student)
        return 50.0 + len(scored)

    for module in (loop, beginning):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=perf_counter))
    points, state = run_own(DEMO, slow_score, seconds=2.0, every=0.5, seed=0, changed=SMALL)
    assert [point.seconds for point in points] == pytest.approx([0.5, 1.0, 1.5, 2.0], abs=0.3)
    assert [point.accuracy for point in points] == [51.0, 52.0, 53.0, 54.0]
    assert state.seconds == points[-1].seconds
    assert not scored[-1].training


@pytest.mark.parametrize(
    ("changed", "rounds"),
    [
        ({}, 50),
        ({"gamma": 2.0}, 50),
        ({"student_steps": 20}, 66),
        ({"inversion_steps": 5}, 67),
        ({"feature_weight": 0.0}, 50),
        ({"alter": False}, 50),
        ({"feature_weight": 0.0, "alter": False}, 56),
        ({"looking_share": 1.0}, 45),
    ],
)
def test_what_costs_more_a_round_has_fewer_of_them(changed: dict[str, float], rounds: int) -> None:
    assert of_equal_cost(changed, rounds=50, task="demo") == rounds
