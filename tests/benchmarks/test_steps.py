import json
from pathlib import Path

import pytest
import torch

from benchmarks import steps
from engine.device import choose_device
from engine.distill import teach


def test_each_row_has_medians_and_their_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "steps.json"
    words = ["--pairs", "demo", "resnet20-vgg8", "--batches", "4", "--turns", "3", "--turn-steps", "1"]
    steps.main([*words, "--threads", str(torch.get_num_threads()), "--out", str(out), "--profile"])
    result = json.loads(out.read_text())
    assert result["kind"] == "steps"
    assert [(row["pair"], row["batch"]) for row in result["rows"]] == [("demo", 4), ("resnet20-vgg8", 4)]
    for row in result["rows"]:
        assert row["ratio_to_bare"] == pytest.approx(row["engine_ms"] / row["bare_ms"])
        assert row["ratio_to_bare_without_teacher"] == pytest.approx(row["engine_ms"] / row["bare_without_teacher_ms"])
        low, high = row["engine_quartiles_ms"]
        assert 0 < low <= row["engine_ms"] <= high
        looks = 8 * 64 / (40 * 4)
        assert row["teacher_forwards_per_draw"] == looks
        with_teacher = row["engine_ms"] + looks * (row["bare_ms"] - row["bare_without_teacher_ms"])
        assert row["ratio_to_bare_with_those"] == pytest.approx(with_teacher / row["bare_ms"])
        assert row["ratio_with_maps_to_bare"] == pytest.approx(row["engine_with_maps_ms"] / row["bare_ms"])
    assert "Self CPU time total" in capsys.readouterr().out


def test_the_engines_step_is_its_own_on_a_full_buffer() -> None:
    pair = steps.build_pair("demo")
    state = steps.filled_state(pair, 4, 2, choose_device("cpu"))
    assert state.buffer.size == state.buffer.capacity == 3000
    before = state.buffer.discrepancies.clone()
    assert teach(state, steps.LATE).isfinite().all()
    assert (state.steps, state.images_seen) == (2, 8)
    assert (state.buffer.discrepancies != before).sum() > 0


def test_every_step_has_its_turn_in_every_round_and_the_first_ones_do_not_count() -> None:
    seen: list[str] = []
    turns = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    taken = steps.in_turns(turns, 3, torch.device("cpu"))
    assert {name: len(values) for name, values in taken.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(seen) == "abcbcacababcbca"
