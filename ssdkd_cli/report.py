"""report.json: a versioned schema, checked when written and when read; report.md is made from it.

What is not known is null. Paths of artifacts are relative to the run's folder. Percent is 0 to 100.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from engine.checkpoints import sha256_of
from engine.errors import SSDKDError
from ssdkd_cli.files import write_text
from ssdkd_cli.runs import STUDENT
from ssdkd_cli.words import SOURCES, count, duration, escaped, markdown_table, percent, shape, size

SCHEMA_VERSION: Final = 1
NOT_RECOMMENDED = "No file is recommended: none is verified here and passes every limit"
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
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
    """The network that was compressed. `size_bytes` is that of its file, latency that of the same network as ONNX."""

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
    """What was spent, and the synthetic samples at the end."""

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


@dataclass(frozen=True, config=STRICT)
class Artifact:
    """One exported file. `agreement` is with the float student; latency at batch 1, throughput at `batch`.

    `teacher_agreement` is with the teacher. `integer_share` is the percentage of multiply-accumulates in integers,
    `float_layers` those of an INT8 file that stayed in float32.
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


@dataclass(frozen=True, config=STRICT)
class Recommendation:
    """The artifact to deploy."""

    artifact: str
    why: str


@dataclass(frozen=True, config=STRICT)
class Gate:
    """A limit that the user set, judged on one file; `value` is None where it could not be measured.

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


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.md into `folder`, each whole or not at all."""
    write_text(folder / "report.json", to_json(report))
    write_text(folder / "report.md", to_markdown(report))


def read_report(folder: Path) -> Report:
    """The report of a run.

    Raises:
        SSDKDError: no report there, or one that does not follow the schema.
    """
    path = folder / "report.json"
    if not path.exists() and (folder / STUDENT).exists():
        raise SSDKDError(
            f"{folder} has a student and no report: the run was interrupted before its report",
            f"make files of the student with `ssdkd export {folder}`",
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SSDKDError(
            f"{path} cannot be read: {error.strerror if isinstance(error, OSError) else 'it is no text'}",
            "give the folder of a finished run: ssdkd report runs/NAME",
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


def to_markdown(report: Report) -> str:
    """report.md: the same facts, for reading."""
    teacher, student, distillation = report.teacher, report.student, report.distillation
    artifact = next((item for item in report.artifacts if item.latency_ms), None)
    comparison = [
        ("architecture", teacher.arch, student.arch),
        ("accuracy", percent(teacher.accuracy), percent(student.accuracy)),
        ("agreement with the teacher", "", percent(student.agreement)),
        ("parameters", f"{teacher.parameters:,}", f"{student.parameters:,}"),
        ("FLOPs, one image", count(teacher.flops), count(student.flops)),
        ("file", size(teacher.size_bytes), size(student.size_bytes)),
        (
            "latency p50 / p90 / p99",
            percentiles(teacher.latency_ms),
            percentiles(artifact.latency_ms if artifact else None),
        ),
        (
            "images per second" + (f", batch {artifact.batch}" if artifact else ""),
            count(teacher.throughput_per_s),
            count(artifact.throughput_per_s if artifact else None),
        ),
    ]
    lines = [
        f"# {teacher.arch} to {student.arch}",
        "",
        f"`{report.command}`",
        "",
        f"{report.created}, {duration(report.seconds_total)}, {report.environment.device}, {report.environment.cpu}"
        + (f", {report.environment.gpu}" if report.environment.gpu else "")
        + f"; Python {report.environment.python}, PyTorch {report.environment.torch}, "
        f"ssdkd {report.environment.ssdkd}.",
        "",
        *markdown_table(("", "teacher", "student"), comparison),
        "",
        accuracy_sentence(teacher),
        f"Agreement is on {distillation.held_out_samples} synthetic samples that the student never learned from.",
        "Latency is of one image, teacher and student through the same runtime on this machine.",
        "",
        "## Artifacts",
        "",
        *markdown_table(
            (
                "file",
                "format",
                "precision",
                "size",
                "p50 ms",
                "images/s",
                "max error",
                "agrees with student",
                "agrees with teacher",
                "accuracy",
                "verified",
            ),
            [artifact_row(item) for item in report.artifacts],
        ),
        "",
        *(f"- `{item.path}`: {item.verified_reason}. {' '.join(item.notes)}".rstrip() for item in report.artifacts),
        "",
        f"Recommended: `{report.recommendation.artifact}`, {report.recommendation.why}."
        if report.recommendation
        else f"{NOT_RECOMMENDED}.",
        "",
        *gate_lines(report.gates),
        "## Distillation",
        "",
        f"{distillation.method}; {distillation.rounds} of {distillation.settings['rounds']} rounds, "
        f"{distillation.steps:,} steps, "
        f"{distillation.images_seen:,} images in {duration(distillation.seconds)}, seed {distillation.seed}. "
        f"{distillation.samples:,} synthetic samples; "
        f"classes hold {min(distillation.class_histogram):,} to {max(distillation.class_histogram):,} of them.",
        "",
        "![A row of synthetic samples for each class](samples.png)",
        "",
        "## Teacher",
        "",
        f"`{teacher.path}` ({teacher.format}), sha256 `{teacher.sha256}`. {teacher.arch}: {teacher.arch_evidence}. "
        f"Input {shape(teacher.input_shape)}, {teacher.classes} classes, {teacher.batchnorm_layers} BatchNorm layers; "
        f"mean {list(teacher.mean)}, std {list(teacher.std)} ({SOURCES[teacher.preprocessing_source]}).",
    ]
    if report.warnings:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in report.warnings)]
    return "\n".join(lines) + "\n"


def gate_lines(gates: tuple[Gate, ...]) -> list[str]:
    """The limits that were set, as a section; nothing where there are none."""
    if not gates:
        return []
    rows = [
        (
            f"--{gate.name.replace('_', '-')}{origin(gate)}",
            gate.artifact or "",
            f"{gate.limit:g}",
            "unknown" if gate.value is None else f"{gate.value:.4g}",
            "yes" if gate.passed else "NO",
        )
        for gate in gates
    ]
    return ["## Limits", "", *markdown_table(("limit", "file", "set to", "found", "passed"), rows), ""]


def origin(gate: Gate) -> str:
    """Which profile set the limit, where nobody typed it."""
    return f" (budget of the profile {gate.budget_of})" if gate.budget_of else ""


def artifact_row(artifact: Artifact) -> tuple[str, ...]:
    """The cells of an artifact in report.md's table."""
    return (
        artifact.path,
        artifact.format,
        artifact.precision,
        size(artifact.size_bytes),
        f"{artifact.latency_ms.p50:.3g}" if artifact.latency_ms else "unknown",
        count(artifact.throughput_per_s),
        f"{artifact.max_abs_error:.1e}" if artifact.max_abs_error is not None else "unknown",
        percent(artifact.agreement),
        percent(artifact.teacher_agreement),
        percent(artifact.accuracy),
        {True: "yes", False: "NO", None: "not here"}[artifact.verified],
    )


def percentiles(latency_ms: Percentiles | None) -> str:
    """The three of them, for a table."""
    return f"{latency_ms.p50:.3g} / {latency_ms.p90:.3g} / {latency_ms.p99:.3g} ms" if latency_ms else "unknown"


def accuracy_sentence(teacher: TeacherReport) -> str:
    """What the accuracy was measured on, or why there is none."""
    if teacher.accuracy_images is None:
        return "Accuracy is unknown: no labelled images were given (`--eval-data`)."
    return f"Accuracy is on {teacher.accuracy_images:,} labelled images, which nothing but the evaluation saw."
