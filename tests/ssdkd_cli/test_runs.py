import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.errors import SSDKDError
from engine.students import build_student
from engine.teacher import Teacher, load_teacher
from ssdkd_cli import runs

USERS_CODE = """
from torch import nn

def small(classes, channels):
    features = nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(8, classes))
"""


@pytest.fixture
def teacher(shared: Path) -> Teacher:
    return load_teacher(shared / "teacher.pt", input_shape=(1, 16, 16), mean=(0.5,), std=(0.25,))


def logits_of(module: nn.Module) -> Any:
    with torch.no_grad():
        return module.eval()(torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "name", ["resnet8", "vgg8", "same", "shufflenet_v2_x0_5", "mobilenetv3_small_050", "users:small"]
)
def test_a_student_is_built_again_without_the_teacher(
    name: str, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users.py").write_text(USERS_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    student = build_student(name, teacher=teacher, seed=3)
    logits = logits_of(student)
    card = runs.teacher_card(teacher.spec, name)
    card = runs.StudentCard(**{**vars(card), "teacher_path": "gone.pt"})
    runs.save_student(tmp_path, student, card)
    again = runs.open_run(tmp_path)
    assert again.card == card
    assert (again.card.mean, again.card.std, again.card.input_shape) == ((0.5,), (0.25,), (1, 16, 16))
    assert not any(module.training for module in again.module.modules())
    assert torch.equal(logits_of(again.module), logits)


def test_another_network_of_the_same_name_is_noticed(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    (tmp_path / "users.py").write_text(USERS_CODE)
    runs.save_student(
        tmp_path, build_student("resnet8", teacher=teacher), runs.teacher_card(teacher.spec, "users:small")
    )
    with pytest.raises(SSDKDError, match="does not fit the student users:small"):
        runs.open_run(tmp_path)


def test_where_a_run_goes_by_itself() -> None:
    assert runs.default_folder(Path("models/teacher.v2.pt"), "resnet8") == Path("runs/teacher.v2-resnet8")
    assert runs.default_folder(Path("a.pt"), "my.nets:small") == Path("runs/a-my.nets.small")
    assert runs.default_folder(Path("a.pt"), "timm/resnet18").parent == Path("runs")


def test_samples_are_kept(tmp_path: Path) -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    runs.save_samples(tmp_path, images)
    assert np.array_equal(runs.read_samples(tmp_path), images)
    (tmp_path / runs.SAMPLES).write_bytes(b"broken")
    with pytest.raises(SSDKDError, match=r"samples\.npz cannot be read"):
        runs.read_samples(tmp_path)
