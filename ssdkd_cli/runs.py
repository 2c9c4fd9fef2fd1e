"""A run's folder: what it is called, what is in it, and the student that can be taken out of it again."""

import contextlib
import dataclasses
import io
import json
import shlex
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engine.errors import SSDKDError
from exporters import FORMATS
from exporters.files import write_atomically
from ssdkd_cli import __version__
from ssdkd_cli.words import escaped

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.teacher import TeacherSpec

Classes = Annotated[int, Field(gt=0, le=10**6)]
Side = Annotated[int, Field(gt=0, le=4096)]  # of an image, or its channels
Spread = Annotated[float, Field(gt=0)]
STUDENT, REPORT, METRICS, CONFIG = "student.safetensors", "report.json", "metrics.jsonl", "config.toml"
REPORT_TEXT, SAMPLES_PICTURE, SAMPLES = "report.md", "samples.png", "samples.npz"
MODEL = "model"  # exported files are called model.onnx, model.int8.onnx, ...
TIMING_CACHE = "tensorrt_timing.cache"
EXPORTED = (
    *(
        name
        for format in FORMATS.values()
        for precision in ("", ".fp16", ".int8")
        for file in (f"{MODEL}{precision}{format.suffix}",)
        for name in (file, f"{file}.rejected", f"{file}.json", f"{file}.rejected.json", f"build_{file}.sh")
    ),
    TIMING_CACHE,
)
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
    classes: Classes
    class_names: tuple[str, ...] | None
    input_shape: tuple[Side, Side, Side]  # C, H, W
    mean: tuple[float, ...]
    std: tuple[Spread, ...]
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
        teacher_path=escaped(str(Path(spec.path).resolve())),
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


@dataclass(frozen=True)
class Samples:
    """Synthetic images that later stages work on, uint8 [N, H, W, C].

    `held_out`: never learned from; files are proven on them, and compared with the teacher's logits, float32
    [N, classes]. `calibration`: of the replay buffer; what needs ranges or some more training takes these.
    """

    held_out: NDArray[np.uint8]
    held_out_logits: NDArray[np.float32]
    calibration: NDArray[np.uint8]


def default_folder(teacher: Path, student: str) -> Path:
    """runs/<teacher>-<student>, without what a file name cannot hold."""
    name = f"{teacher.stem}-{student}".replace(":", ".").replace("/", ".")
    return Path("runs") / name


def export_command(folder: Path) -> str:
    """What to type for a file of the student in `folder`; a run that was interrupted may have left one there."""
    overwrite = ["--overwrite"] if (folder / f"{MODEL}.onnx").exists() else []
    return shlex.join(["ssdkd", "export", str(folder), *overwrite])


def again_command(folder: Path) -> str:
    """What to type for the run in `folder` once more, from its beginning, in a folder beside it."""
    return shlex.join(["ssdkd", "compress", "--config", str(folder / CONFIG), "--out", f"{folder}-again"])


def how_far(folder: Path) -> str:
    """A sentence on a run that has a student and no report: how far it had come, by its metrics."""
    said = f"{folder} is an interrupted run"
    try:
        last = json.loads((folder / METRICS).read_text(encoding="utf-8").splitlines()[-1])
        return (
            f"{said}: it ended after round {last['round']} of {last['rounds']}, at {last['agreement']:.1f} % agreement"
        )
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return f"{said}: how far its student had come is not known"


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
    from pydantic import TypeAdapter, ValidationError
    from safetensors import SafetensorError, safe_open

    path = folder / STUDENT
    if not path.is_file():
        raise SSDKDError(f"{folder} is no run: it holds no {STUDENT}", "give the folder that `ssdkd compress` wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            content = (file.metadata() or {})[CARD_KEY]
        card = TypeAdapter(StudentCard).validate_json(content)
        if len(card.mean) != card.input_shape[0] or len(card.std) != card.input_shape[0]:
            raise ValueError("mean and std have not one value a channel")
        return card
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except KeyError:
        reason = "it does not say what network it is"
    except (SafetensorError, ValueError) as error:
        reason = str(error)
    raise SSDKDError(
        f"{path} cannot be read as a student: {reason}", "run `ssdkd compress` again, or copy the whole run folder"
    )


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
    names = _stated(card, "--arch") if card.student == SAME else (card.student,)
    code = [name for name in names if ":" in name]
    if code and not trust_pickle:
        raise SSDKDError(
            f"the network of this run is code, {code[0]}, which would be imported and run",
            "add --trust-pickle if you know that code",
        )
    if card.student != SAME:
        return [partial(build_network, card.student, classes=card.classes, channels=channels, pixels=pixels)]
    builders: list[Callable[[], nn.Module]] = [partial(_of_teacher_file, card, trust_pickle)]
    with contextlib.suppress(SSDKDError):  # the class of a pickled network is no name
        builders += [partial(_of_architecture, meaning.build, card) for meaning in meanings(card.teacher_arch, pixels)]
    return builders


def _stated(card: StudentCard, flag: str) -> tuple[str, ...]:
    """What load_teacher was told with `flag`, if it was."""
    flags = card.teacher_flags
    return flags[flags.index(flag) + 1 :][:1] if flag in flags else ()


def _of_teacher_file(card: StudentCard, trust_pickle: bool) -> "nn.Module":
    from engine.teacher import load_teacher

    path = Path(card.teacher_path)
    if not path.exists():
        raise SSDKDError(f"its teacher {path} is gone", "put the teacher's file back there")
    arch = next(iter(_stated(card, "--arch")), None)
    return load_teacher(path, arch=arch, input_shape=card.input_shape, trust_pickle=trust_pickle).module


def _of_architecture(build: "Callable[[int, int], nn.Module]", card: StudentCard) -> "nn.Module":
    from engine.probing import as_classifier

    module = build(card.classes, card.input_shape[0]).eval()
    return as_classifier(module, card.input_shape, card.teacher_arch)[0]  # as the teacher was


def _checked(module: "nn.Module", weights: "Mapping[str, Tensor]", card: StudentCard) -> "nn.Module":
    """The module with these weights. Raises SSDKDError where they do not fit, or it is not the network of the card."""
    from engine.layers import with_versions

    name = card.teacher_arch if card.student == SAME else card.student
    hint = "run ssdkd where the student's code is the one that was distilled"
    module = module.to("cpu").float().eval().requires_grad_(False)
    try:
        module.load_state_dict(with_versions(module, weights))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()[:200]
        raise SSDKDError(f"the weights do not fit the student {name}: {first}", hint) from None
    if card.known_logits:
        expected, found = np.array(card.known_logits), np.array(known_logits(module, card.input_shape))
        if (
            expected.shape != found.shape
            or not np.abs(found - expected).max() <= LOGITS_TOLERANCE * np.abs(expected).max()
        ):
            raise SSDKDError(
                f"the network {name} is not the one that was distilled: it computes other logits",
                f"its weights may have been replaced: copy the whole run folder again; or {hint}",
            )
    return module


def save_samples(folder: Path, samples: Samples) -> None:
    """Keep them for later exports of this run."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **vars(samples))
    write_atomically(folder / SAMPLES, content.getvalue())


def read_samples(folder: Path) -> Samples:
    """The synthetic samples of a run.

    Raises:
        SSDKDError: the run has none; an interrupted one may not.
    """
    names = [field.name for field in dataclasses.fields(Samples)]
    try:
        with (folder / SAMPLES).open("rb") as file, np.lib.npyio.NpzFile(file) as arrays:
            missing = [name for name in names if name not in arrays]
            if missing:
                raise ValueError(f"it holds no {', '.join(missing)}; an earlier ssdkd wrote it")
            samples = Samples(*(np.asarray(arrays[name]) for name in names))
        for images in (samples.held_out, samples.calibration):
            if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
                raise ValueError(f"expected images uint8 [N, H, W, C], found {images.dtype} {list(images.shape)}")
        logits, number = samples.held_out_logits, len(samples.held_out)
        if logits.dtype.kind != "f" or logits.ndim != 2 or len(logits) != number:
            raise ValueError(f"expected float logits [{number}, classes], found {logits.dtype} {list(logits.shape)}")
        if not np.isfinite(logits).all():
            raise ValueError("the teacher's logits hold NaN or infinity")
        return samples
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise SSDKDError(
            f"{folder / SAMPLES} cannot be read: {error or 'it is empty'}",
            "an export is proven on these samples: run `ssdkd compress` again",
        ) from None
