"""report.json: a versioned schema, checked when written and when read.

What is not known is null. Paths of artifacts are relative to the run's folder. Percent is 0 to 100.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from engine.errors import SSDKDError
from engine.hashing import sha256_of
from exporters.metadata import NORMALISED
from ssdkd_cli.runs import STUDENT, again_command, export_command
from ssdkd_cli.words import escaped

SCHEMA_VERSION: Final = 1
NOT_RECOMMENDED = "No file is recommended: none for this target is verified here and passes every limit"
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
NO_FILES = "the run ended before its files were made: `ssdkd export RUN` makes them"
Said = Annotated[str, BeforeValidator(lambda value: escaped(value) if isinstance(value, str) else value)]


@dataclass(frozen=True, config=STRICT)
class Environment:
    """Where the run took place."""

    python: str
    torch: str
    ssdkd: str
    device: str
    cpu: str
    gpu: str | None


@dataclass(frozen=True, config=STRICT)
class Percentiles:
    """Latency of one batch, milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, config=STRICT)
class TeacherReport:
    """The network that was compressed. `size_bytes` is that of its file, latency that of the same network as ONNX.

    `accuracy_sha256` is of the labelled images that every accuracy of the report is of.
    """

    path: Said
    sha256: str
    format: str
    arch: str
    arch_evidence: str
    input_shape: tuple[int, int, int]  # C, H, W
    classes: int
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocessing_source: str
    batchnorm_layers: int
    parameters: int
    flops: int | None
    size_bytes: int
    accuracy: float | None
    accuracy_images: int | None
    latency_ms: Percentiles | None
    throughput_per_s: float | None
    accuracy_sha256: str | None = None


@dataclass(frozen=True, config=STRICT)
class StudentReport:
    """The float student. `size_bytes` is that of student.safetensors, `agreement` with the teacher.

    `inherited_parameters` began as the teacher's.
    """

    arch: str
    parameters: int
    flops: int | None
    size_bytes: int
    accuracy: float | None
    agreement: float
    inherited_parameters: int = 0


@dataclass(frozen=True, config=STRICT)
class DistillationReport:
    """What was spent, and the synthetic samples at the end.

    `matched_stages` is how many maps of the teacher the student was taught.
    """

    method: str
    samples: int
    held_out_samples: int
    rounds: int
    steps: int
    seconds: float
    images_seen: int
    seed: int
    class_histogram: Annotated[tuple[int, ...], Field(min_length=1)]
    settings: dict[str, Any]
    matched_stages: int = 0


@dataclass(frozen=True, config=STRICT)
class Artifact:
    """One exported file. `agreement` is with the float student; latency at batch 1, throughput at `batch`.

    `teacher_agreement` is with the teacher. `integer_share` is the percentage of multiply-accumulates in integers,
    `float_layers` those of an INT8 file that stayed in float32. `input_range` is what the file's own metadata says.
    `doubt` is what the proof of a verified file left open.
    """

    path: str
    sha256: str
    format: str
    precision: str
    precision_requested: str
    profile: str | None
    size_bytes: int
    runtime: str
    max_abs_error: float | None
    agreement: float | None
    accuracy: float | None
    latency_ms: Percentiles | None
    throughput_per_s: float | None
    batch: int | None
    verified: bool | None
    verified_reason: str
    notes: tuple[str, ...]
    teacher_agreement: float | None = None
    integer_share: float = 0.0
    float_layers: tuple[str, ...] = ()
    input_range: str = NORMALISED
    doubt: str | None = None


@dataclass(frozen=True, config=STRICT)
class Recommendation:
    """The artifact to deploy."""

    artifact: str
    why: str


@dataclass(frozen=True, config=STRICT)
class Gate:
    """A limit that the user or a named profile set, judged on one file; `value` is None where it could not be measured.

    `budget_of`: the profile that the limit comes from; None: it was typed.
    """

    name: str
    limit: float
    value: float | None
    passed: bool
    artifact: str | None = None
    budget_of: str | None = None


@dataclass(frozen=True, config=STRICT)
class Report:
    """report.json."""

    schema_version: Literal[1]
    created: str
    command: Said
    seconds_total: float
    environment: Environment
    teacher: TeacherReport
    student: StudentReport
    distillation: DistillationReport
    artifacts: tuple[Artifact, ...]
    recommendation: Recommendation | None
    gates: tuple[Gate, ...]
    warnings: tuple[Said, ...]


SCHEMA = TypeAdapter(Report)


def to_json(report: Report) -> str:
    """The text of report.json; what it says has passed the schema."""
    return SCHEMA.dump_json(report, indent=2).decode() + "\n"


def read_report(folder: Path) -> Report:
    """The report of a run.

    Raises:
        SSDKDError: no report there, or one that does not follow the schema.
    """
    hint = "give the folder of a finished run: ssdkd report runs/NAME"
    if not folder.exists():
        raise SSDKDError(f"there is no folder {folder}", hint)
    path = folder / "report.json"
    if not path.exists() and (folder / STUDENT).exists():
        raise SSDKDError(
            f"{folder} has a student and no report: the run was interrupted before its report",
            f"make files of the student with `{export_command(folder)}`; only a run that ends has a report: "
            f"`{again_command(folder)}` runs it again",
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SSDKDError(
            f"{path} cannot be read: {error.strerror if isinstance(error, OSError) else 'it is no text'}",
            hint,
        ) from None
    try:
        return SCHEMA.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SSDKDError(
            f"{path} is not a report of schema {SCHEMA_VERSION}: {where}: {first['msg']}",
            f"make the student's files elsewhere with `ssdkd export {folder} --out DIR`, or run `ssdkd compress` again",
        ) from None


def problem_of(item: Artifact, folder: Path) -> str | None:
    """Why what the report says of a file does not hold: it is gone, or another one stands there."""
    path = folder / item.path
    if not path.is_file():
        return f"{path} is gone"
    if sha256_of(path) == item.sha256:
        return None
    return f"{path} is not the file that the report describes: its sha256 is another"


def timed(report: Report) -> Artifact | None:
    """The file whose latency stands beside the teacher's: the first that was timed."""
    return next((item for item in report.artifacts if item.latency_ms), None)


def verdict(item: Artifact) -> str:
    """What the proof of a file came to, in a word or two."""
    if item.doubt:
        return "in doubt"
    return {True: "verified", False: "REJECTED", None: "not run here"}[item.verified]


def origin(gate: Gate) -> str:
    """Which profile set the limit, where nobody typed it."""
    return f" (budget of the profile {gate.budget_of})" if gate.budget_of else ""
