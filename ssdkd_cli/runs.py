"""A run's folder: what it is called, whether it may be written, and the student that can be taken out of it again."""

import contextlib
import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import SSDKDError
from exporters import FORMATS
from exporters.files import write_atomically
from ssdkd_cli import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.teacher import TeacherSpec

STUDENT, REPORT, METRICS, CONFIG = "student.safetensors", "report.json", "metrics.jsonl", "config.toml"
REPORT_TEXT, SAMPLES_PICTURE, SAMPLES = "report.md", "samples.png", "samples.npz"
MODEL = "model"  # exported files are called model.onnx, ...
EXPORTED = tuple(f"{MODEL}{format.suffix}{failed}" for format in FORMATS.values() for failed in ("", ".rejected"))
OUTPUTS = (STUDENT, REPORT, REPORT_TEXT, METRICS, CONFIG, SAMPLES_PICTURE, SAMPLES, *EXPORTED)
CARD_KEY = "ssdkd"
SAME = "same"  # --student same: the teacher's own architecture
KNOWN_LOGITS = 10
# Relative to the largest. Another processor's rounding gives 1e-5; other strides behind the same weights 5e-3 and more.
LOGITS_TOLERANCE = 1e-3


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
    teacher_flags: tuple[str, ...] = ()  # what load_teacher was told, as words of the command line
    known_logits: tuple[float, ...] = ()  # the student's own, see `known_logits`; older runs have none


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
        teacher_flags=spec.flags,
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


def check_free(folder: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raises SSDKDError where a run in `folder` would replace one of its `inputs`, or, without --overwrite, any."""
    found = [name for name in OUTPUTS if (folder / name).exists()]
    for path in inputs:
        if path.exists() and any(path.samefile(folder / name) for name in found):
            raise SSDKDError(
                f"{path} is needed for the run, and a run in {folder} would replace it",
                "choose another folder with --out DIR",
            )
    if found and not overwrite:
        what = "another run" if {STUDENT, REPORT} & set(found) else "files that a run would replace"
        raise SSDKDError(
            f"{folder} holds {what} ({', '.join(found)})",
            "choose another folder with --out DIR, or add --overwrite",
        )


def clear(folder: Path) -> None:
    """Delete what an earlier run left in `folder`; files that ssdkd does not write stay."""
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)


def save_student(folder: Path, module: "nn.Module", card: StudentCard) -> None:
    """Write student.safetensors: the weights, and the card with the student's known logits as its metadata."""
    from safetensors.torch import save

    weights = {name: value.detach().cpu().contiguous().clone() for name, value in module.state_dict().items()}
    card = dataclasses.replace(card, known_logits=known_logits(module, card.input_shape))
    write_atomically(folder / STUDENT, save(weights, {"format": "pt", CARD_KEY: json.dumps(dataclasses.asdict(card))}))


def known_logits(module: "nn.Module", input_shape: tuple[int, int, int]) -> tuple[float, ...]:
    """The first logits of one fixed image: networks that are wired otherwise give others, whatever their weights."""
    from engine.probing import noise
    from exporters.runtimes import predictor

    logits = predictor(module)(noise(input_shape).numpy())
    return tuple(float(f"{value:.6g}") for value in logits[0, :KNOWN_LOGITS])


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
        SSDKDError: no run there, or its network cannot be built, does not fit or computes something else.
    """
    from safetensors.torch import load_file

    card = read_card(folder)
    weights = load_file(folder / STUDENT)
    failed: SSDKDError | None = None
    for build in _builders(card, trust_pickle):
        try:
            return Run(folder, card, _checked(build(), weights, card))
        except SSDKDError as error:
            failed = failed or error
    assert failed is not None  # there is always a builder
    raise SSDKDError(f"{folder / STUDENT} cannot be built again as it was: {failed.message}", failed.hint)


def _builders(card: StudentCard, trust_pickle: bool) -> "list[Callable[[], nn.Module]]":
    """The ways to build a card's network, the surest first.

    For `same` that is the teacher's file, read as it was told then; without it the networks of the teacher's name.
    """
    from engine.rebuild import meanings
    from engine.students import build_network

    channels, pixels = card.input_shape[0], min(card.input_shape[1:])
    if card.student != SAME:
        return [partial(build_network, card.student, classes=card.classes, channels=channels, pixels=pixels)]
    builders: list[Callable[[], nn.Module]] = [partial(_of_teacher_file, card, trust_pickle)]
    with contextlib.suppress(SSDKDError):  # the class of a pickled network is no name
        builders += [partial(_of_architecture, meaning.build, card) for meaning in meanings(card.teacher_arch, pixels)]
    return builders


def _of_teacher_file(card: StudentCard, trust_pickle: bool) -> "nn.Module":
    from engine.teacher import load_teacher

    path, flags = Path(card.teacher_path), card.teacher_flags
    if not path.exists():
        raise SSDKDError(f"its teacher {path} is gone", "put the teacher's file back there")
    arch = flags[flags.index("--arch") + 1] if "--arch" in flags else None
    return load_teacher(path, arch=arch, input_shape=card.input_shape, trust_pickle=trust_pickle).module


def _of_architecture(build: "Callable[[int, int], nn.Module]", card: StudentCard) -> "nn.Module":
    from engine.probing import as_classifier

    module = build(card.classes, card.input_shape[0]).eval()
    return as_classifier(module, card.input_shape, card.teacher_arch)[0]  # as the teacher was


def _checked(module: "nn.Module", weights: "Mapping[str, Tensor]", card: StudentCard) -> "nn.Module":
    """The module with these weights. Raises SSDKDError where they do not fit, or it is not the network of the card."""
    name = card.teacher_arch if card.student == SAME else card.student
    hint = "run ssdkd where the student's code is the one that was distilled"
    module = module.to("cpu").float().eval().requires_grad_(False)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()[:200]
        raise SSDKDError(f"the weights do not fit the student {name}: {first}", hint) from None
    if card.known_logits:
        expected, found = np.array(card.known_logits), np.array(known_logits(module, card.input_shape))
        if not np.abs(found - expected).max() <= LOGITS_TOLERANCE * np.abs(expected).max():
            raise SSDKDError(f"the network {name} is not the one that was distilled: it computes other logits", hint)
    return module


def save_samples(folder: Path, images: NDArray[np.uint8]) -> None:
    """Keep held-out synthetic samples, uint8 [N, H, W, C]: later exports of this run are proven on them."""
    content = io.BytesIO()
    np.savez_compressed(content, images=images)
    write_atomically(folder / SAMPLES, content.getvalue())


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
