import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine.errors import SSDKDError
from engine.students import STUDENTS, build_student
from engine.teacher import Teacher, load_teacher
from engine.user_code import call_user_function
from engine.zoo import ZOO
from ssdkd_cli import runs

USERS_CODE = """
from torch import nn

def small(classes, channels):
    features = nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(8, classes))

def softmax(classes, channels):
    return nn.Sequential(small(classes, channels), nn.Softmax(1))
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
    again = runs.open_run(tmp_path, trust_pickle=":" in name)
    assert replace(again.card, known_logits=()) == card
    assert len(again.card.known_logits) == 4
    assert (again.card.mean, again.card.std, again.card.input_shape) == ((0.5,), (0.25,), (1, 16, 16))
    assert not any(module.training for module in again.module.modules())
    assert torch.equal(logits_of(again.module), logits)


def same_as(teacher: Teacher, folder: Path) -> nn.Module:
    """Saves a run of `--student same` for this teacher; returns its student."""
    student = build_student("same", teacher=teacher, seed=3)
    with torch.no_grad():
        for _ in range(3):
            student(torch.randn(4, *teacher.spec.input_shape, generator=torch.Generator().manual_seed(1)))
    runs.save_student(folder, student, runs.teacher_card(teacher.spec, "same"))
    return student


def assert_opens_as(student: nn.Module, teacher: Teacher, folder: Path) -> None:
    images = torch.randn(2, *teacher.spec.input_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(runs.open_run(folder, trust_pickle=True).module(images), student.eval()(images))


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize("stated", [None, "resnet8"])
def test_the_same_as_our_own_student_for_large_images(stated: str | None, has_file: bool, tmp_path: Path) -> None:
    """It has a stem of stride 4, and the names and shapes of the published network, which has none."""
    ours = STUDENTS["resnet8"].build(5, 1, 96)
    path = tmp_path / "teacher.safetensors"
    card = {"student": "resnet8", "input_shape": [1, 96, 96], "teacher_sha256": "0"}
    save_file(ours.state_dict(), path, {"ssdkd": json.dumps(card)})
    teacher = load_teacher(path, arch=stated, input_shape=(1, 96, 96))
    student = same_as(teacher, tmp_path)
    assert student.conv1.stride == (2, 2)
    if not has_file:
        path.unlink()
    assert_opens_as(student, teacher, tmp_path)


def test_the_same_as_a_published_network_for_large_images(tmp_path: Path) -> None:
    torch.save(ZOO["resnet8"](5, 1).state_dict(), tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", input_shape=(1, 96, 96))
    student = same_as(teacher, tmp_path)
    assert student.conv1.stride == (1, 1)
    (tmp_path / "teacher.pt").unlink()
    assert_opens_as(student, teacher, tmp_path)


@pytest.mark.parametrize("has_file", [True, False])
def test_the_same_as_a_users_network_with_a_softmax(
    has_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users.py").write_text(USERS_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    network = call_user_function("users:softmax", classes=4, channels=1)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", arch="users:softmax", input_shape=(1, 16, 16))
    student = same_as(teacher, tmp_path)
    if not has_file:
        (tmp_path / "teacher.pt").unlink()
    assert_opens_as(student, teacher, tmp_path)


@pytest.mark.parametrize("name", ["users:small", "same"])
def test_code_that_now_computes_something_else_is_noticed(
    name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    (tmp_path / "users.py").write_text(USERS_CODE)
    network = call_user_function("users:small", classes=4, channels=1)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    teacher = load_teacher(tmp_path / "teacher.pt", arch="users:small", input_shape=(1, 16, 16))
    runs.save_student(tmp_path, build_student(name, teacher=teacher), runs.teacher_card(teacher.spec, name))
    (tmp_path / "users.py").write_text(USERS_CODE.replace("nn.ReLU", "nn.Hardtanh"))
    monkeypatch.delitem(sys.modules, "users")
    with pytest.raises(SSDKDError, match=r"users:small is not the one that was distilled: it computes other logits"):
        runs.open_run(tmp_path, trust_pickle=True)


@pytest.mark.parametrize("name", ["resnet8", "same"])
def test_a_run_of_an_older_version_opens(name: str, teacher: Teacher, tmp_path: Path) -> None:
    student = build_student(name, teacher=teacher, seed=3)
    card = vars(runs.teacher_card(teacher.spec, name)).copy()
    del card["teacher_flags"], card["known_logits"]
    save_file(student.state_dict(), tmp_path / "student.safetensors", {"ssdkd": json.dumps(card)})
    assert torch.equal(logits_of(runs.open_run(tmp_path).module), logits_of(student))


def test_a_teacher_that_is_gone_and_has_no_name_is_asked_for(teacher: Teacher, tmp_path: Path) -> None:
    card = replace(runs.teacher_card(teacher.spec, "same"), teacher_arch="ClassOfTheUsers", teacher_path="gone.pt")
    runs.save_student(tmp_path, build_student("same", teacher=teacher), card)
    with pytest.raises(SSDKDError, match=r"its teacher gone\.pt is gone"):
        runs.open_run(tmp_path)


@pytest.mark.parametrize("where", ["student", "teacher"])
def test_code_that_a_run_names_does_not_run_by_itself(
    where: str, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    (tmp_path / "evil.py").write_text("from pathlib import Path; Path('ran').touch()")
    card = runs.teacher_card(teacher.spec, "evil:build" if where == "student" else "same")
    card = replace(card, teacher_flags=("--arch", "evil:build")) if where == "teacher" else card
    runs.save_student(tmp_path, build_student("resnet8", teacher=teacher), card)
    with pytest.raises(SSDKDError, match="evil:build, which would be imported") as caught:
        runs.open_run(tmp_path)
    assert "--trust-pickle" in caught.value.hint
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"classes": "x"},
        {"classes": -1},
        {"classes": 10**12},
        {"input_shape": [3, 10**6, 10**6]},
        {"std": [0.0]},
        {"input_shape": None},
        {"input_shape": [1, -28, 28]},
        {"known_logits": ["a"]},
        {"mean": []},
        {"mean": ["a"]},
    ],
)
def test_a_card_that_makes_no_sense_is_refused(change: dict[str, object], teacher: Teacher, tmp_path: Path) -> None:
    card = {**vars(runs.teacher_card(teacher.spec, "resnet8")), **change}
    student = build_student("resnet8", teacher=teacher)
    save_file(student.state_dict(), tmp_path / "student.safetensors", {"ssdkd": json.dumps(card)})
    with pytest.raises(SSDKDError, match="cannot be read as a student"):
        runs.open_run(tmp_path)


def test_a_student_of_ours_needs_no_code_of_its_teacher(teacher: Teacher, tmp_path: Path) -> None:
    card = replace(runs.teacher_card(teacher.spec, "resnet8"), teacher_flags=("--arch", "users:build"))
    student = build_student("resnet8", teacher=teacher, seed=3)
    runs.save_student(tmp_path, student, card)
    assert torch.equal(logits_of(runs.open_run(tmp_path).module), logits_of(student))


def test_known_logits_of_another_number_of_classes_do_not_fit(teacher: Teacher, tmp_path: Path) -> None:
    card = {**vars(runs.teacher_card(teacher.spec, "resnet8")), "known_logits": [1.0, 2.0]}
    student = build_student("resnet8", teacher=teacher)
    save_file(student.state_dict(), tmp_path / "student.safetensors", {"ssdkd": json.dumps(card)})
    with pytest.raises(SSDKDError, match="other logits"):
        runs.open_run(tmp_path)


def test_another_network_of_the_same_name_is_noticed(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    (tmp_path / "users.py").write_text(USERS_CODE)
    runs.save_student(
        tmp_path, build_student("resnet8", teacher=teacher), runs.teacher_card(teacher.spec, "users:small")
    )
    with pytest.raises(SSDKDError, match="do not fit the student users:small"):
        runs.open_run(tmp_path, trust_pickle=True)


def test_where_a_run_goes_by_itself() -> None:
    assert runs.default_folder(Path("models/teacher.v2.pt"), "resnet8") == Path("runs/teacher.v2-resnet8")
    assert runs.default_folder(Path("a.pt"), "my.nets:small") == Path("runs/a-my.nets.small")
    assert runs.default_folder(Path("a.pt"), "timm/resnet18").parent == Path("runs")


def some_samples() -> runs.Samples:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    logits = np.arange(10, dtype=np.float32).reshape(2, 5)
    return runs.Samples(images, logits, images + 1)


def test_samples_are_kept(tmp_path: Path) -> None:
    runs.save_samples(tmp_path, some_samples())
    read = runs.read_samples(tmp_path)
    for name, value in vars(some_samples()).items():
        assert np.array_equal(getattr(read, name), value), name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"held_out": np.uint8(1)}, r"expected images uint8 \[N, H, W, C\]"),
        ({"calibration": np.zeros((2, 4, 4, 3), np.float32)}, r"expected images uint8 \[N, H, W, C\], found float32"),
        ({"held_out_logits": np.zeros((3, 5), np.float32)}, r"float logits \[2, classes\], found float32 \[3, 5\]"),
        ({"held_out_logits": np.zeros((2, 5), np.complex64)}, r"float logits \[2, classes\], found complex64 \[2, 5\]"),
        ({"held_out_logits": np.zeros((2, 5), "M8[s]")}, r"expected float logits .* found datetime64"),
        ({"held_out_logits": np.full((2, 5), np.nan, np.float32)}, "the teacher's logits hold NaN"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    np.savez(tmp_path / runs.SAMPLES, **{**vars(some_samples()), **changed})
    with pytest.raises(SSDKDError, match=message):
        runs.read_samples(tmp_path)


def test_a_damaged_file_of_samples(tmp_path: Path) -> None:
    for content in (b"broken", b""):
        (tmp_path / runs.SAMPLES).write_bytes(content)
        with pytest.raises(SSDKDError, match=r"samples\.npz cannot be read"):
            runs.read_samples(tmp_path)
    with (tmp_path / runs.SAMPLES).open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(SSDKDError, match="not a zip file"):
        runs.read_samples(tmp_path)
    np.savez(tmp_path / runs.SAMPLES, **{**vars(some_samples()), "held_out_logits": np.array([["a"], ["b"]])})
    with pytest.raises(SSDKDError, match=r"samples\.npz cannot be read"):
        runs.read_samples(tmp_path)
