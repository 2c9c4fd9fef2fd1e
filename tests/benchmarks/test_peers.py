"""What can be tested without the rivals' code: a stand-in checkout whose synthesizer makes noise."""

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.peers import SCRIPTS, Stopwatch, follow_the_clock, peer_code, rate, run_peer
from benchmarks.race import DEMO
from engine.errors import SSDKDError
from engine.students import build_student

SYNTHESIZER = """
import torch

class FastMetaSynthesizer:
    def __init__(self, teacher, student, generator, *, synthesis_batch_size, img_size, reset_l0, **rest):
        self.batch, self.shape, self.reset_l0, self.student = synthesis_batch_size, img_size, reset_l0, student
        self.ep = 0

    def synthesize(self):
        self.ep += 1
        self.student.eval()
        print("chatter")
        assert torch.zeros(1).cuda().device.type == "cpu"

    def sample(self):
        return torch.randn(self.batch, *self.shape)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    package = tmp_path / "datafree"
    for folder in ("synthesis", "models"):
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").write_text("from . import criterions, synthesis, utils\n")
    (package / "synthesis" / "__init__.py").write_text(SYNTHESIZER)
    (package / "utils.py").write_text("def Normalizer(mean, std):\n    return mean, std\n")
    (package / "criterions.py").write_text("import torch\n\ndef KLDiv(T):\n    return torch.nn.MSELoss()\n")
    (package / "models" / "generator.py").write_text(
        "import torch\n\ndef Generator(**k):\n    return torch.nn.ReLU()\n"
    )
    return tmp_path


def test_a_rival_runs_to_its_limit_and_leaves_nothing_behind(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher = DEMO.teacher()
    student = build_student(DEMO.student, teacher=teacher, seed=0)
    before, cuda = next(student.parameters()).detach().clone(), torch.Tensor.cuda
    scored: list[bool] = []

    def evaluate(network: nn.Module) -> float:
        time.sleep(0.3)
        scored.append(network.training)
        assert network is student
        return 10.0 * len(scored)

    found = run_peer(
        "fast-2",
        checkout,
        spec=teacher.spec,
        teacher=teacher.module,
        student=student,
        evaluate=evaluate,
        seconds=1.5,
        every=0.5,
        seed=0,
        batch=8,
        student_share=20.0,
    )
    seconds = [point.seconds for point in found.points]
    assert seconds == sorted(seconds)
    assert 1.5 <= seconds[-1] < 3
    assert [point.accuracy for point in found.points] == [10.0 * (index + 1) for index in range(len(seconds))]
    assert scored == [False] * len(seconds)
    assert found.settings["student_steps"] > 0
    assert found.settings["steps"] == 2
    assert not torch.equal(next(student.parameters()), before)
    assert torch.Tensor.cuda is cuda
    assert "datafree" not in sys.modules
    assert str(checkout) not in sys.path
    assert capfd.readouterr().out == ""


def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    with (
        pytest.raises(SSDKDError, match="expected a clone of Fast-Datafree or NAYER"),
        peer_code(tmp_path, torch.device("cpu")),
    ):
        pass


def test_a_library_that_the_rival_needs_and_is_not_there(checkout: Path) -> None:
    (checkout / "datafree" / "__init__.py").write_text("import no_such_library")
    with pytest.raises(SSDKDError, match="no_such_library") as caught, peer_code(checkout, torch.device("cpu")):
        pass
    assert caught.value.hint == "pip install kornia termcolor xlsxwriter"
    assert str(checkout) not in sys.path


def test_the_stopwatch_stands_still_while_paused() -> None:
    clock = Stopwatch()
    with clock.paused():
        time.sleep(0.2)
    assert clock.seconds < 0.15


class Synthesizer:
    reset_l0 = 1
    ep = 0


def test_the_schedule_of_a_rival_ends_with_the_clock_and_its_reset_comes_once() -> None:
    script, synthesizer, seen = SCRIPTS["fast-5"], Synthesizer(), []
    for step in range(101):
        follow_the_clock(synthesizer, script, step / 100)
        synthesizer.ep += 1  # as synthesize() does
        seen.append(synthesizer.ep)
    assert seen == sorted(seen)
    assert seen.count(140) == 1
    assert seen[5] == 21  # the warm-up of 20 epochs ends with its share of the time
    assert 218 <= seen[-1] <= 222
    assert rate(script, script.warmup_share) == pytest.approx(0.2)
    assert rate(script, 1.0) == pytest.approx(2e-4)
