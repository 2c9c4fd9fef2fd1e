"""Classes and labels: what --classes says, and how often a network is right on labelled images."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import SSDKDError
from exporters.evaluate import LabelledImages, accuracy, load_labelled
from exporters.runtimes import predictor
from ssdkd_cli import console
from ssdkd_cli.runs import StudentCard
from ssdkd_cli.words import is_near_chance, percent

if TYPE_CHECKING:
    from torch import nn

LEAST_KEPT = 2 / 3  # of the teacher's own way from chance; chosen by us: half let 61 % pass, of three classes
TOO_LITTLE = "it has learned too little; take a larger --student, or a larger --effort or --time-limit than it had"


def read_classes(classes: int | Path | None) -> tuple[int | None, tuple[str, ...] | None]:
    """How many classes, and their names where a file gives them.

    Raises:
        SSDKDError: the file cannot be read, is no text, or names fewer than two classes or one twice.
    """
    if not isinstance(classes, Path):
        return classes, None
    hint = "give the number of classes, or a text file with one name a line"
    try:
        names = tuple(line.strip() for line in classes.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SSDKDError(f"--classes {classes} cannot be read: {reason}", hint) from None
    twice = sorted(name for name, number in Counter(names).items() if number > 1)
    if len(names) < 2 or twice:
        found = f"'{twice[0]}' twice" if twice else f"{len(names)} names"
        raise SSDKDError(f"--classes {classes}: expected two or more different names, found {found}", hint)
    return len(names), names


def check_number(number: int | None, model: Path, classes: int) -> None:
    """Raises SSDKDError where --classes says another number than the model has."""
    if number not in (None, classes):
        raise SSDKDError(
            f"--classes says {number}, but {model} has {classes} outputs", f"give --classes {classes}, or leave it out"
        )


def labelled_images(path: Path, card: StudentCard) -> LabelledImages:
    """The labelled images at `path`, as the network of this card takes them and numbers their classes.

    Raises SSDKDError as `exporters.evaluate.load_labelled` does.
    """
    return numbered_images(path, card.input_shape, card.classes, card.class_names)


def numbered_images(
    path: Path, input_shape: tuple[int, int, int], classes: int, class_names: tuple[str, ...] | None
) -> LabelledImages:
    """`exporters.evaluate.load_labelled`; what is doubtful is said."""
    labelled = load_labelled(path, input_shape=input_shape, classes=classes, class_names=class_names)
    if labelled.doubt:
        console.warn(labelled.doubt)
    return labelled


def network_accuracy(network: "nn.Module", card: StudentCard, labelled: LabelledImages) -> float:
    """The accuracy of a network where it lies, percent. Raises SSDKDError for logits that are not finite."""
    return accuracy(predictor(network), labelled, mean=card.mean, std=card.std)


def chance_warnings(accuracy: float | None, classes: int, *, is_run: bool) -> list[str]:
    """A sentence on an accuracy (percent) that is too near chance to be that of a trained network.

    `is_run`: of a run's student, whose preprocessing is its teacher's, as that was read then.
    """
    if accuracy is None or not is_near_chance(accuracy, classes):
        return []
    chance = percent(100 / classes)
    those = "were --mean, --std and --input of `ssdkd compress`" if is_run else "are --mean, --std and --input"
    return [
        f"{percent(accuracy)} accuracy is far below what a trained network reaches, chance is {chance}: are "
        "the labels in the order of the network's classes (folders are numbered alphabetically, unless --classes FILE "
        f"names the classes), and {those} those of the training?"
    ]


def student_warnings(accuracy: float | None, classes: int, *, of_teacher: float | None, is_run: bool) -> list[str]:
    """A sentence on a student's accuracy (percent) that is far below its teacher's on the same images.

    The images cannot be to blame there. Where the teacher's accuracy is not known, or near chance itself, they may be.
    `is_run`: as `chance_warnings` takes it.
    """
    if of_teacher is None or is_near_chance(of_teacher, classes):
        asked = "were, and its" if is_run else "are, and it is a student whose"
        blamed = f"If they {asked} teacher does better on these images, it has learned too little"
        return [f"{warning} {blamed}" for warning in chance_warnings(accuracy, classes, is_run=is_run)]
    chance = 100 / classes
    if accuracy is None or accuracy > chance + LEAST_KEPT * (of_teacher - chance):
        return []
    return [
        f"the student has {percent(accuracy)} accuracy, its teacher {percent(of_teacher)} on the same images, chance "
        f"is {percent(chance)}: {TOO_LITTLE}"
    ]


def agreement_warnings(agreement: float, classes: int) -> list[str]:
    """A sentence on a student that agrees with its teacher (percent, of held-out samples) too seldom to be used."""
    chance = 100 / classes
    if agreement > chance + LEAST_KEPT * (100 - chance):
        return []
    return [f"the student agrees with its teacher on {percent(agreement)} of held-out samples: {TOO_LITTLE}"]
