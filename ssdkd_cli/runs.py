"""A run's folder: what it is called, whether it may be written, and the student that can be taken out of it again."""

import dataclasses
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError
from ssdkd_cli import __version__
from ssdkd_cli.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.teacher import TeacherSpec

STUDENT, REPORT, METRICS, CONFIG = "student.safetensors", "report.json", "metrics.jsonl", "config.toml"
SAMPLES_PICTURE, SAMPLES = "samples.png", "samples.npz"
MARKS = (STUDENT, REPORT, METRICS, CONFIG)  # any of them makes a folder a run
CARD_KEY = "ssdkd"
SAME = "same"  # --student same: the teacher's own architecture


@dataclass(frozen=True)
class StudentCard:
    """What stands in student.safetensors beside the weights: enough to build the network again."""

    student: str  # as --student names it
    classes: int
    class_names: tuple[str, ...] | None
    input_shape: tuple[int, int, int]  # C, H, W
    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher_path: str
    teacher_sha256: str
    teacher_arch: str
    ssdkd_version: str


def teacher_card(spec: "TeacherSpec", student: str) -> StudentCard:
    """The card of a student of that name for this teacher."""
    return StudentCard(
        student=student,
        classes=spec.classes,
        class_names=spec.class_names,
        input_shape=spec.input_shape,
        mean=spec.preprocessing.mean,
        std=spec.preprocessing.std,
        teacher_path=str(Path(spec.path).resolve()),
        teacher_sha256=spec.sha256,
        teacher_arch=spec.arch,
        ssdkd_version=__version__,
    )


@dataclass(frozen=True)
class Run:
    """A student taken out of a run's folder; `module`: float32, CPU, eval."""

    folder: Path
    card: StudentCard
    module: "nn.Module"


def default_folder(teacher: Path, student: str) -> Path:
    """runs/<teacher>-<student>, without what a file name cannot hold."""
    name = f"{teacher.stem}-{student}".replace(":", ".").replace("/", ".")
    return Path("runs") / name


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises SSDKDError where `folder` holds another run and --overwrite was not given."""
    found = [name for name in MARKS if (folder / name).exists()]
    if found and not overwrite:
        raise SSDKDError(
            f"{folder} holds another run ({', '.join(found)})",
            "choose another folder with --out DIR, or add --overwrite",
        )


def clear(folder: Path) -> None:
    """Delete what an earlier run left in `folder`; files that ssdkd does not write stay."""
    for name in (*MARKS, "report.md", SAMPLES_PICTURE, SAMPLES):
        (folder / name).unlink(missing_ok=True)
    for path in (*folder.glob("model*.onnx"), *folder.glob("model*.rejected")):
        path.unlink()


def save_student(folder: Path, module: "nn.Module", card: StudentCard) -> None:
    """Write student.safetensors: the weights, and the card as its metadata."""
    from safetensors.torch import save

    weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    write_bytes(folder / STUDENT, save(weights, {"format": "pt", CARD_KEY: json.dumps(dataclasses.asdict(card))}))


def read_card(folder: Path) -> StudentCard:
    """The card of the student in `folder`.

    Raises:
        SSDKDError: no run there, or one whose student cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / STUDENT
    if not path.is_file():
        raise SSDKDError(f"{folder} is no run: it holds no {STUDENT}", "give the folder that `ssdkd compress` wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            values = json.loads((file.metadata() or {})[CARD_KEY])
        values |= {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return StudentCard(**values)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SSDKDError(
            f"{path} cannot be read as a student: {error}", "run `ssdkd compress` again, or copy the whole run folder"
        ) from None


def open_run(folder: Path, *, trust_pickle: bool = False) -> Run:
    """Build the student of a run again and load its weights; `trust_pickle` is for a teacher file that is needed.

    Raises:
        SSDKDError: no run there, or its network cannot be built or does not fit.
    """
    from safetensors.torch import load_file

    card = read_card(folder)
    weights = load_file(folder / STUDENT)
    module = _build(card, weights, trust_pickle).to("cpu").float().eval().requires_grad_(False)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise SSDKDError(
            f"{folder / STUDENT} does not fit the student {card.student}: {first}",
            "run ssdkd where the student's code is the one that was distilled",
        ) from None
    return Run(folder, card, module)


def _build(card: StudentCard, weights: "dict[str, Tensor]", trust_pickle: bool) -> "nn.Module":
    from engine.rebuild import rebuild_stated
    from engine.students import build_network
    from engine.teacher import load_teacher

    channels, height, width = card.input_shape
    if card.student != SAME:
        return build_network(card.student, classes=card.classes, channels=channels, pixels=min(height, width))
    try:
        return rebuild_stated(weights, card.teacher_arch, keeps_order=False, pixels=min(height, width)).module
    except SSDKDError:  # a network that has no name: it is taken from the teacher's file
        return load_teacher(Path(card.teacher_path), input_shape=card.input_shape, trust_pickle=trust_pickle).module


def save_samples(folder: Path, images: NDArray[np.uint8]) -> None:
    """Keep held-out synthetic samples, uint8 [N, H, W, C]: later exports of this run are proven on them."""
    content = io.BytesIO()
    np.savez_compressed(content, images=images)
    write_bytes(folder / SAMPLES, content.getvalue())


def read_samples(folder: Path) -> NDArray[np.uint8]:
    """The held-out synthetic samples of a run, uint8 [N, H, W, C].

    Raises:
        SSDKDError: the run has none; an interrupted one may not.
    """
    try:
        with (folder / SAMPLES).open("rb") as file, np.load(file) as arrays:
            return np.asarray(arrays["images"], dtype=np.uint8)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SSDKDError(
            f"{folder / SAMPLES} cannot be read: {error}",
            "an export is proven on these samples: run `ssdkd compress` again",
        ) from None
