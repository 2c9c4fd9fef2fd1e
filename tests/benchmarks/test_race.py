import time

from torch import nn

from benchmarks.race import DEMO, run_own

SMALL = {
    **{"warmup_rounds": 0, "inversion_batch": 16, "inversion_steps": 1, "student_batch": 16, "student_steps": 1},
    **{"samples": 32, "held_out": 2, "views": 2},
}


def test_the_clock_stands_still_while_the_student_is_scored() -> None:
    scored: list[nn.Module] = []

    def slow_score(student: nn.Module) -> float:
        time.sleep(0.4)
        scored.append(student)
        return 50.0 + len(scored)

    started = time.perf_counter()
    points, state = run_own(DEMO, slow_score, seconds=1.0, every=0.25, seed=0, changed=SMALL)
    wall = time.perf_counter() - started
    seconds = [point.seconds for point in points]
    assert seconds == sorted(seconds)
    assert len(points) >= 3
    assert 1.0 <= seconds[-1] <= wall - 0.4 * len(points)
    assert [point.accuracy for point in points] == [50.0 + number for number in range(1, len(points) + 1)]
    assert not scored[-1].training
    assert state.seconds == seconds[-1]
