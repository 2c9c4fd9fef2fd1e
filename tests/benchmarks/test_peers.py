import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import names, peers
from benchmarks.peer_code import METHODS, Script, checkout_modules, running_on
from benchmarks.peers import Clock, PeerRun, run_peer, shrunk
from engine.errors import SSDKDError
from engine.students import build_student
from engine.teacher import Teacher, load_teacher
from ssdkd_cli.compress import DEMO_TEACHER

CPU = torch.device("cpu")
CHECKOUT = {  # what the driver calls of a checkout, in few words of our own
    "datafree/__init__.py": "from . import criterions, synthesis, utils\n",
    "datafree/criterions.py": "import torch\n\ndef KLDiv(T): return torch.nn.MSELoss()\n",
    "datafree/utils.py": "def Normalizer(mean, std): return None\n",
    "datafree/models/generator.py": """
import torch

class Generator(torch.nn.Linear):
    def __init__(self, nz, ngf, img_size, nc): super().__init__(nz, ngf)
""",
    "datafree/synthesis/__init__.py": "from .fast_meta import FastMetaSynthesizer\n",
    "datafree/synthesis/fast_meta.py": """
import torch

class FastMetaSynthesizer:
    def __init__(self, teacher, student, generator, *, img_size, sample_batch_size, **options):
        self.shape, self.ep = (sample_batch_size, *img_size), 0
        torch.zeros(1).cuda(), generator.cuda()

    def synthesize(self):
        self.ep += 1

    def sample(self):
        return torch.rand(self.shape)
""",
}


class Ticks:
    """A clock that moves on by a hundredth of a second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, int, bool]] = []  # of the synthesizer: its number, `ep_start`, whether it resets

    def perf_counter(self) -> float:
        self.now += 0.01
        return self.now


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in CHECKOUT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    ticks = Ticks()
    synthesize = peers._synthesize

    def slow(script: Script, synthesizer: Any, **plan: int) -> None:
        ticks.now += 0.2
        synthesize(script, synthesizer, **plan)
        ticks.calls.append((synthesizer.ep, synthesizer.ep_start, bool(synthesizer.reset_l0)))

    monkeypatch.setattr(peers, "_synthesize", slow)
    monkeypatch.setattr(peers, "time", ticks)
    return ticks


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(DEMO_TEACHER)


def run(checkout: Path, teacher: Teacher, ticks: Ticks, *, seconds: float = 4.0, every: float = 1.0) -> PeerRun:
    def evaluate(network: nn.Module) -> float:
        assert not network.training
        ticks.now += 1000.0
        return 50.0

    return run_peer(
        "fast-2",
        checkout,
        teacher=teacher.module,
        student=build_student("wrn10_1", teacher=teacher, seed=0),
        spec=teacher.spec,
        evaluate=evaluate,
        seconds=seconds,
        every=every,
        seed=0,
        device=CPU,
        batch=4,
        synthesis_batch=4,
    )


def test_the_clock_stands_still_while_it_is_stopped(ticks: Ticks) -> None:
    clock = Clock(CPU)
    with clock.stopped():
        ticks.now += 100.0
    ticks.now += 1.0
    assert clock.seconds() == pytest.approx(1.0, abs=0.1)


def test_a_run_has_a_curve_without_the_time_of_its_evaluations_and_ends_at_the_limit(
    checkout: Path, teacher: Teacher, ticks: Ticks
) -> None:
    finished = run(checkout, teacher, ticks)
    assert [point.seconds for point in finished.points] == pytest.approx([1.0, 2.0, 3.0, 4.0], abs=0.15)
    assert {point.accuracy for point in finished.points} == {50.0}
    made = finished.settings["made"]
    assert made["student_steps"] > 20
    assert made["images"] == 4 * made["epochs"]
    assert finished.settings["script"]["batch"] == 4


def test_a_run_leaves_the_teacher_as_it_was(checkout: Path, teacher: Teacher, ticks: Ticks) -> None:
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    run(checkout, teacher, ticks, seconds=1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert not any(layer._forward_hooks for layer in teacher.module.modules())


def test_what_falls_due_in_their_script_falls_due_at_the_same_share_of_a_short_run(
    checkout: Path, teacher: Teacher, ticks: Ticks
) -> None:
    made = run(checkout, teacher, ticks, seconds=12.0).settings["made"]
    epochs, warmup = made["epochs"], made["warmup"]
    assert [call for call, _, _ in ticks.calls] == list(range(1, epochs + 1))
    # Theirs resets in the 120th call after `ep_start`, of 200; its adversarial term starts at `ep_start`.
    due = warmup + round(120 / 200 * (epochs - warmup))
    assert [(call, start) for call, start, resets in ticks.calls if resets] == [(due, due - 120)]
    assert {start for call, start, resets in ticks.calls if call > 2 and not resets} == {warmup}


def test_a_script_is_shrunk_with_its_share_of_warmup_and_never_grown() -> None:
    assert shrunk(METHODS["fast-2"], 1e6) == (220, 20)
    assert shrunk(METHODS["fast-2"], 55.9) == (55, 5)
    assert shrunk(METHODS["nayer"], 3) == (3, 1)  # where in doubt, the student begins earlier
    assert shrunk(METHODS["nayer"], 40) == (40, 20)
    assert shrunk(METHODS["nayer"], 0.3) == (2, 1)


def test_what_is_patched_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    def patched() -> list[object]:
        return [nn.Module.cuda, torch.Tensor.cuda, torch.utils.data.DataLoader, Image.fromarray, sys.stdout]

    def fail() -> None:
        with running_on(CPU):
            inside.extend(patched())
            print("theirs")
            raise KeyError

    before: list[object] = patched()
    inside: list[object] = []
    with pytest.raises(KeyError):
        fail()
    assert not any(now is then for now, then in zip(inside, before, strict=True))
    assert all(now is then for now, then in zip(patched(), before, strict=True))
    assert capsys.readouterr().out == ""


def test_their_code_runs_where_it_is_told_to() -> None:
    images = torch.utils.data.TensorDataset(torch.zeros(1))
    pixels = torch.arange(6, dtype=torch.uint8).view(2, 3, 1).numpy()
    with running_on(CPU):
        assert torch.zeros(1).cuda(0, non_blocking=True).device == CPU
        assert nn.Conv2d(3, 4, 3).cuda().weight.is_contiguous(memory_format=torch.channels_last)
        assert Image.fromarray(pixels).getpixel((2, 1)) == 5
        assert torch.utils.data.DataLoader(images, num_workers=4, pin_memory=True).num_workers == 0


def test_a_checkout_is_forgotten_on_exit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = types.ModuleType("datafree")
    monkeypatch.setitem(sys.modules, "datafree", earlier)
    path = list(sys.path)
    with checkout_modules(checkout, "fast_meta") as (package, generators):
        assert Path(package.__file__).is_relative_to(checkout)
        assert generators.Generator(nz=2, ngf=3, img_size=4, nc=1).out_features == 3
    assert sys.modules["datafree"] is earlier
    assert "datafree.synthesis" not in sys.modules
    assert sys.path == path


def test_another_folder_is_refused_in_a_sentence(tmp_path: Path, teacher: Teacher, ticks: Ticks) -> None:
    with pytest.raises(SSDKDError, match=r"is no checkout of that method's repository: .*fast_meta\.py") as caught:
        run(tmp_path, teacher, ticks)
    assert caught.value.hint is not None
    assert "git clone zju-vipa/Fast-Datafree" in caught.value.hint


def test_a_missing_package_is_named(checkout: Path) -> None:
    (checkout / "datafree" / "utils.py").write_text("import no_such_package\n")
    with (
        pytest.raises(SSDKDError, match="imports no_such_package, which is not installed"),
        checkout_modules(checkout, "fast_meta"),
    ):
        pass


def test_nayer_has_words_for_cifar_10_alone(checkout: Path, teacher: Teacher) -> None:
    with pytest.raises(SSDKDError, match="label embeddings are of CIFAR-10"):
        run_peer(
            "nayer",
            checkout,
            teacher=teacher.module,
            student=nn.Identity(),
            spec=teacher.spec,
            evaluate=lambda _: 0.0,
            seconds=1.0,
            every=1.0,
            seed=0,
            device=CPU,
        )


def test_the_commit_is_that_of_a_clone_alone(tmp_path: Path) -> None:
    peer = tmp_path / "peer"
    peer.mkdir()
    assert peers.commit_of(peer) == ""
    identity = "-c", "user.name=a", "-c", "user.email=a@b"
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    assert peers.commit_of(tmp_path) == ""  # nothing committed
    words = *identity, "commit", "-q", "--allow-empty", "-m", "first"
    subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert peers.commit_of(peer) == ""  # a copy within another clone
    assert re.fullmatch("[0-9a-f]{40}", peers.commit_of(tmp_path))


def test_the_tables_know_the_peers_by_their_names() -> None:
    assert set(METHODS) == set(names.PEERS)
