"""Classes and labels: what --classes says, and how often a network is right on labelled images."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import SSDKDError
from exporters.evaluate import LabelledImages, accuracy, load_labelled
from exporters.runtimes import predictor
from ssdkd_cli import console
from ssdkd_cli.runs import StudentCard

if TYPE_CHECKING:
    from torch import nn


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
