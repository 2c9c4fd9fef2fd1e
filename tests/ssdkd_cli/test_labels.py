"""What is said of an accuracy or an agreement that no use can be made of, and who is blamed for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssdkd_cli import measuring
from ssdkd_cli.doubts import agreement_warnings, chance_warnings, learning_warnings, student_warnings


@pytest.mark.parametrize(("accuracy", "is_said"), [(32.0, True), (33.0, False), (100.0, False), (None, False)])
def test_an_accuracy_near_chance_asks_for_the_labels(accuracy: float | None, is_said: bool) -> None:
    said = chance_warnings(accuracy, 4, is_run=False)  # chance is 25
    assert bool(said) is is_said
    assert all("are the labels in the order of the network's classes" in sentence for sentence in said)


@pytest.mark.parametrize(
    ("accuracy", "of_teacher", "is_said"),
    [
        (24.0, 100.0, True),
        (74.0, 100.0, True),  # chance is 25, two thirds of the way up are 75
        (76.0, 100.0, False),
        (49.0, 60.0, False),  # of a teacher that is not good itself
        (None, 100.0, False),
    ],
)
def test_a_student_is_blamed_where_its_teacher_is_right(
    accuracy: float | None, of_teacher: float, is_said: bool
) -> None:
    said = student_warnings(accuracy, 4, of_teacher=of_teacher, is_run=True)
    assert bool(said) is is_said
    for sentence in said:
        assert f"the student has {accuracy} % accuracy, its teacher {of_teacher} % on the same images" in sentence
        assert "--time-limit" in sentence
        assert "labels" not in sentence


@pytest.mark.parametrize("of_teacher", [None, 26.0])
def test_where_the_teacher_is_no_measure_labels_and_student_may_be_to_blame(of_teacher: float | None) -> None:
    (sentence,) = student_warnings(24.0, 4, of_teacher=of_teacher, is_run=False)
    assert "are the labels in the order" in sentence
    assert sentence.endswith("it has learned too little")
    assert student_warnings(90.0, 4, of_teacher=of_teacher, is_run=False) == []


def test_of_a_run_the_flags_are_those_of_its_teacher() -> None:
    (of_run,), (of_file,) = chance_warnings(24.0, 4, is_run=True), chance_warnings(24.0, 4, is_run=False)
    assert "were --mean, --std and --input of `ssdkd compress` those of the training?" in of_run
    assert "are --mean, --std and --input those of the training?" in of_file
    (blamed,) = student_warnings(24.0, 4, of_teacher=None, is_run=True)
    assert blamed.endswith("If they were, and its teacher does better on these images, it has learned too little")


@pytest.mark.parametrize(("agreement", "is_said"), [(69.0, True), (71.0, False)])
def test_without_labels_the_agreement_is_looked_at(agreement: float, is_said: bool) -> None:
    said = agreement_warnings(agreement, 10)  # chance is 10, two thirds of the way up are 70
    assert [sentence.startswith(f"the student agrees with its teacher on {agreement} %") for sentence in said] == (
        [True] if is_said else []
    )


def test_what_a_run_learned_is_judged_by_labels_that_tell_something() -> None:
    def said(agreement: float, of_teacher: float | None, accuracy: float | None) -> list[str]:
        return learning_warnings(accuracy, agreement, 4, of_teacher=of_teacher)

    assert said(90.0, 95.0, 90.0) == []
    assert said(20.0, 95.0, 90.0) == []
    assert "the student has 30.0 % accuracy" in said(90.0, 95.0, 30.0)[0]
    assert "agrees with its teacher on 20.0 %" in said(20.0, None, None)[0]
    assert "agrees with its teacher on 20.0 %" in said(20.0, 26.0, 25.0)[0]  # labels in another order


@pytest.fixture
def folders(shared: Path, tmp_path: Path) -> Path:
    """The labelled images as a folder a class; the alphabet has the classes the other way round."""
    arrays = np.load(shared / "test.npz")
    for index, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        path = tmp_path / "images" / "dcba"[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "images"


def test_eval_of_a_run_takes_the_order_of_its_classes(
    ssdkd: Any, shared: Path, compressed: Path, folders: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("d\nc\nb\na\n")
    right = ssdkd("eval", compressed, "--data", shared / "test.npz", "--json")
    named = ssdkd("eval", compressed, "--data", folders, "--classes", tmp_path / "names.txt", "--json")
    assert [row["accuracy"] for row in named.json] == [row["accuracy"] for row in right.json]
    assert "is numbered in alphabetical order" not in named.err
    unnamed = ssdkd("eval", compressed, "--data", folders, "--json")
    assert "is numbered in alphabetical order (a, b, c, ...): its folders do not carry" in unnamed.err
    exported = ssdkd(
        *("export", compressed, "--eval-data", folders, "--classes", tmp_path / "names.txt"),
        *("--out", tmp_path / "out", "--json"),
    )
    assert exported.json[0]["accuracy"] == right.json[0]["accuracy"]
    wrong = ssdkd("eval", compressed, "--data", folders, "--classes", "5")
    assert (wrong.code, "--classes says 5" in wrong.err) == (1, True)


def test_compress_says_that_folders_were_numbered_by_the_alphabet(
    ssdkd: Any, shared: Path, folders: Path, tmp_path: Path
) -> None:
    ran = ssdkd(
        *("compress", shared / "teacher.pt", "--student", "resnet8", "--config", shared / "ssdkd.toml", "--json"),
        *("--eval-data", folders, "--out", tmp_path / "run"),
    )
    assert ran.code == 0, ran.err
    said = f"{folders} is numbered in alphabetical order (a, b, c, ...): the model's class names are not known"
    assert [said in sentence for sentence in ran.json["warnings"]].count(True) == 1
    assert ran.err.count(said) == 1


def test_a_run_s_own_student_is_blamed_on_the_images_of_its_report(
    ssdkd: Any, shared: Path, compressed: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    run = Path(shutil.copytree(compressed, tmp_path / "run"))
    report = json.loads((run / "report.json").read_text())
    report["teacher"]["accuracy"] = 100.0
    (run / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(measuring, "network_accuracy", lambda *_: 20.0)
    ran = ssdkd("eval", run, "--data", shared / "test.npz")
    assert ran.code == 0, ran.err
    assert "the student has 20.0 % accuracy, its teacher 100.0 % on the same images" in ran.err
    assert "are the labels" not in ran.err
