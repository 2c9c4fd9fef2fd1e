"""The files of a report: report.json, and report.md made from it."""

from pathlib import Path

from ssdkd_cli.files import write_text
from ssdkd_cli.report import (
    NOT_RECOMMENDED,
    Artifact,
    Gate,
    Percentiles,
    Report,
    TeacherReport,
    origin,
    timed,
    to_json,
    verdict,
)
from ssdkd_cli.words import SOURCES, count, duration, markdown_table, network, percent, shape, size


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.md into `folder`, each whole or not at all."""
    write_text(folder / "report.json", to_json(report))
    write_text(folder / "report.md", to_markdown(report))


def to_markdown(report: Report) -> str:
    """report.md: the same facts, for reading."""
    teacher, student, distillation = report.teacher, report.student, report.distillation
    artifact = timed(report)
    comparison = [
        ("architecture", network(teacher.arch), network(student.arch)),
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
        f"# {network(teacher.arch)} to {network(student.arch)}",
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
        "Latency is of one image, teacher and student through the same runtime.",
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
        *(f"- `{item.path}`: {'; '.join((item.verified_reason, *item.notes))}." for item in report.artifacts),
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
        f"`{teacher.path}` ({teacher.format}), sha256 `{teacher.sha256}`. "
        f"{network(teacher.arch)}: {teacher.arch_evidence}. "
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
        verdict(artifact),
    )


def percentiles(latency_ms: Percentiles | None) -> str:
    """The three of them, for a table."""
    return f"{latency_ms.p50:.3g} / {latency_ms.p90:.3g} / {latency_ms.p99:.3g} ms" if latency_ms else "unknown"


def accuracy_sentence(teacher: TeacherReport) -> str:
    """What the accuracy was measured on, or why there is none."""
    if teacher.accuracy_images is None:
        return "Accuracy is unknown: no labelled images were given (`--eval-data`)."
    return f"Accuracy is on {teacher.accuracy_images:,} labelled images, which nothing but the evaluation saw."
