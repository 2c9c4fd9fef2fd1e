"""The end of a run as a small table: teacher beside student, and what was gained."""

from collections.abc import Callable
from pathlib import Path

from ssdkd_cli import console, runs
from ssdkd_cli.gates import gate_line
from ssdkd_cli.report import NOT_RECOMMENDED, Artifact, Report, timed, verdict
from ssdkd_cli.words import compared, count, is_near_chance, milliseconds, network, percent, size

Words = Callable[[float | None], str]
Row = tuple[str, str, str, str]  # name, teacher, student, gain


def show_report(folder: Path, report: Report) -> None:
    """Print the table, the artifacts, the limits, what was doubtful, what is recommended, and where everything is."""
    lines = [(None if item.doubt else item.verified, artifact_line(item)) for item in report.artifacts]
    lines += [(gate.passed, gate_line(gate)) for gate in report.gates]
    console.print_comparison(comparison(report), lines)
    console.print_warnings(report.warnings)
    if report.recommendation and len(report.artifacts) > 1:
        console.print_advice(f"{report.recommendation.artifact} is {report.recommendation.why}")
    elif report.artifacts and not report.recommendation:
        console.print_advice(NOT_RECOMMENDED)
    console.print_closing(f"{folder}/", (runs.REPORT, runs.REPORT_TEXT, runs.SAMPLES_PICTURE))


def comparison(report: Report) -> list[Row]:
    """The rows of the table; what is unknown for both is left out."""
    teacher, student = report.teacher, report.student
    artifact = timed(report)
    latency = artifact.latency_ms if artifact else None
    batch = artifact.batch if artifact else None
    kept, of_teacher, of_student = "", teacher.accuracy, student.accuracy
    if of_teacher is not None and of_student is not None and not is_near_chance(of_teacher, teacher.classes):
        kept = f"{100 * of_student / of_teacher:.1f} % of the teacher's"
    rows = [
        ("", network(teacher.arch), network(student.arch), ""),
        ("accuracy", percent(teacher.accuracy), percent(student.accuracy), kept),
        ("agreement", "", percent(student.agreement), "on held-out synthetic samples"),
        _row("parameters", teacher.parameters, student.parameters, count, ("fewer", "more")),
        _row("FLOPs", teacher.flops, student.flops, count, ("fewer", "more")),
        ("file", size(teacher.size_bytes), size(student.size_bytes), ""),  # of two formats: not to be compared
        _row(
            "latency p50",
            teacher.latency_ms.p50 if teacher.latency_ms else None,
            latency.p50 if latency else None,
            milliseconds,
            ("faster", "slower"),
        ),
        _row(
            f"images/s, batch {batch}" if batch else "images/s",
            teacher.throughput_per_s,
            artifact.throughput_per_s if artifact else None,
            count,
            ("fewer", "more"),
        ),
    ]
    return [row for row in rows if row[1:3] != (percent(None), percent(None))]


def artifact_line(item: Artifact) -> str:
    """'model.onnx, 0.31 MB, verified: max abs error ...'."""
    return f"{item.path}, {size(item.size_bytes)}, {verdict(item)}: {item.verified_reason}"


def _row(name: str, teacher: float | None, student: float | None, words: Words, change: tuple[str, str]) -> Row:
    """`change`: what to call a student whose number is smaller, and one whose number is larger."""
    if not teacher or not student:
        return name, words(teacher), words(student), ""
    return name, words(teacher), words(student), compared(teacher, student, change)
