"""The commands for a finished run, or for a single file: export, eval, bench, report."""

import functools
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.readable import check_readable
from ssdkd_cli import console
from ssdkd_cli.boundary import VERIFICATION_FAILED
from ssdkd_cli.options import (
    ARCH,
    CLASSES,
    DEVICE,
    EMBED_PREPROCESSING,
    EVAL_DATA,
    EXPORT,
    FP16_IO,
    INPUT,
    JSON,
    MAX_DROP,
    MAX_LATENCY,
    MAX_SIZE,
    MEAN,
    MIN_AGREEMENT,
    NO_FALLBACK,
    OVERWRITE,
    PRECISION,
    PROFILE,
    QAT,
    SEED,
    STD,
    TRUST_PICKLE,
)
from ssdkd_cli.outcome import Outcome, printed
from ssdkd_cli.parsing import parse_path
from ssdkd_cli.words import milliseconds, percent, size

if TYPE_CHECKING:
    from ssdkd_cli.report import Artifact


def _path(metavar: str, help: str) -> Any:
    return typer.Argument(parser=parse_path, metavar=metavar, help=help, show_default=False)


MODEL = _path("MODEL", "The folder of a run, an .onnx file, or a TensorRT plan.")
SCORED = _path("MODEL", "The folder of a run, an .onnx file, or a teacher's file.")
RUN = _path("RUN", "The folder of a finished run.")
DATA = typer.Option(
    parser=parse_path,
    metavar="DIR",
    help="Labelled images: a folder a class, numbered alphabetically unless the class names are known, or an .npz.",
    rich_help_panel="Input",
)


def export(
    source: Annotated[
        Path,
        typer.Argument(
            parser=parse_path,
            metavar="RUN|TEACHER",
            help="The folder of a run, or a teacher's file to convert as it is.",
            show_default=False,
        ),
    ],
    export: Annotated[list[str], EXPORT] = [],  # noqa: B006  Typer copies it
    precision: Annotated[list[str], PRECISION] = [],  # noqa: B006
    profile: Annotated[str | None, PROFILE] = None,
    qat: Annotated[Any, QAT] = "auto",
    no_fallback: Annotated[bool, NO_FALLBACK] = False,
    fp16_io: Annotated[bool, FP16_IO] = False,
    embed_preprocessing: Annotated[bool, EMBED_PREPROCESSING] = False,
    eval_data: Annotated[Path | None, EVAL_DATA] = None,
    max_drop: Annotated[float | None, MAX_DROP] = None,
    max_latency_ms: Annotated[float | None, MAX_LATENCY] = None,
    max_size_mb: Annotated[float | None, MAX_SIZE] = None,
    min_agreement: Annotated[float | None, MIN_AGREEMENT] = None,
    out: Annotated[
        Any,
        typer.Option(
            parser=parse_path,
            metavar="DIR",
            help="Where the file goes. Default: the run's folder, or runs/<teacher>.",
            rich_help_panel="Result",
        ),
    ] = None,
    overwrite: Annotated[bool, OVERWRITE] = False,
    arch: Annotated[str | None, ARCH] = None,
    input: Annotated[Any, INPUT] = None,
    mean: Annotated[Any, MEAN] = None,
    std: Annotated[Any, STD] = None,
    classes: Annotated[Any, CLASSES] = None,
    trust_pickle: Annotated[bool, TRUST_PICKLE] = False,
    device: Annotated[str, DEVICE] = "auto",
    seed: Annotated[int, SEED] = 0,
    json: Annotated[bool, JSON] = False,
) -> Outcome:
    """Export the student of a run again, or a teacher as it is, and prove the file.

    In integers, without any data: [bold]ssdkd export teacher.pt --precision int8[/bold]

    A file that normalises by itself: [bold]ssdkd export runs/demo --embed-preprocessing --out deploy[/bold]
    """
    if not source.is_dir():
        check_readable(source)
    from engine.device import choose_device
    from engine.errors import SSDKDError
    from ssdkd_cli import again, material
    from ssdkd_cli.files import new_folder
    from ssdkd_cli.gates import Limits, check_limits, gate_line, has_failed, with_budget
    from ssdkd_cli.labels import check_number, read_classes
    from ssdkd_cli.report import verdict
    from ssdkd_cli.stated import Stated
    from ssdkd_cli.target import resolve_target

    precision = precision or ([] if profile or "trt" in export else ["fp32"])
    target = resolve_target(
        formats=export, precisions=precision, profile=profile, qat=qat, fallback=not no_fallback, half_io=fp16_io
    )
    limits = with_budget(Limits(max_drop, max_latency_ms, max_size_mb, min_agreement), target)
    compute = choose_device(device)
    check_limits(limits, target, has_labels=eval_data is not None)
    folder = out or (source if source.is_dir() else Path("runs") / source.stem)
    stated = Stated(arch, input, mean, std, classes, trust_pickle)
    if stated.flags and source.is_dir():
        raise SSDKDError(
            f"{stated.flags}: of a teacher's file; {source} is a folder, and a run knows its own",
            "leave it out, or give the teacher's file itself",
        )
    with new_folder(folder):
        target = again.beside_what_is_there(target, source, folder)
        again.check_place(source, target, folder, overwrite=overwrite, eval_data=eval_data)
        if source.is_dir():
            number, names = read_classes(classes)
            taken = material.from_run(
                source, trust_pickle=trust_pickle, embed_preprocessing=embed_preprocessing, class_names=names
            )
            check_number(number, source, taken.subject.card.classes)
        else:
            taken = material.from_teacher(
                source,
                stated,
                needs_samples="int8" in target.precisions,
                seed=seed,
                compute=compute,
                embed_preprocessing=embed_preprocessing,
            )
        exported = again.export(
            taken,
            target,
            folder,
            limits=limits,
            eval_data=eval_data,
            compute=compute,
            seed=seed,
        )
    rows = [
        (
            item.path,
            size(item.size_bytes),
            milliseconds(item.latency_ms.p50 if item.latency_ms else None),
            *([percent(item.accuracy)] if eval_data else []),
            verdict(item),
            item.verified_reason,
        )
        for item in exported.artifacts
    ]
    head = ("file", "size", "p50", *(["accuracy"] if eval_data else []), "", "")
    caption = f"the teacher's accuracy: {percent(exported.teacher_accuracy)}" if eval_data else ""
    show = functools.partial(console.print_table, head, rows, right=range(1, len(head) - 2), caption=caption)
    for gate in exported.gates:
        console.limit(gate_line(gate), gate.passed)
    failed = has_failed(exported.artifacts, exported.gates)
    return printed(json, exported.artifacts, show, VERIFICATION_FAILED if failed else 0)


def evaluate(
    model: Annotated[Path, SCORED],
    data: Annotated[Path, DATA],
    arch: Annotated[str | None, ARCH] = None,
    input: Annotated[Any, INPUT] = None,
    mean: Annotated[Any, MEAN] = None,
    std: Annotated[Any, STD] = None,
    classes: Annotated[Any, CLASSES] = None,
    trust_pickle: Annotated[bool, TRUST_PICKLE] = False,
    json: Annotated[bool, JSON] = False,
) -> Outcome:
    """Measure the accuracy of a run's student and files, of an .onnx file, or of a teacher's, on labelled images.

    Example: [bold]ssdkd eval runs/demo --data images/[/bold]

    Before a long run: [bold]ssdkd eval teacher.pt --data images/[/bold]
    """
    from ssdkd_cli import measuring
    from ssdkd_cli.stated import Stated

    scores = measuring.evaluate(model, data, Stated(arch, input, mean, std, classes, trust_pickle))
    rows = [(item.path, percent(item.accuracy), f"{item.images:,}") for item in scores]
    return printed(
        json, scores, functools.partial(console.print_table, ("model", "accuracy", "images"), rows, right=(1, 2))
    )


def bench(
    model: Annotated[Path, MODEL],
    input: Annotated[Any, INPUT] = None,
    json: Annotated[bool, JSON] = False,
) -> Outcome:
    """Measure the latency of a run's files, or of one file, here: ONNX on the CPU, TensorRT plans on the GPU.

    Example: [bold]ssdkd bench runs/demo[/bold]
    """
    from ssdkd_cli import measuring

    timings = measuring.bench(model, input_shape=input)
    rows = [
        (
            Path(item.path).name,
            *(milliseconds(value) for value in (item.latency_ms.p50, item.latency_ms.p90, item.latency_ms.p99)),
            f"{item.throughput_per_s:,.0f}",
            str(item.batch),
        )
        for item in timings
    ]
    runtimes = dict.fromkeys(f"latency at batch {item.latency_batch}, {item.runtime}" for item in timings)
    caption = f"{model}, {'; '.join(runtimes)}"
    head = ("model", "p50", "p90", "p99", "images/s", "at batch")
    return printed(
        json, timings, functools.partial(console.print_table, head, rows, right=range(1, 6), caption=caption)
    )


def report(run: Annotated[Path, RUN], json: Annotated[bool, JSON] = False) -> Outcome:
    """Write report.json and report.md of a run again, and show the result.

    Example: [bold]ssdkd report runs/demo[/bold]
    """
    from ssdkd_cli.files import locked
    from ssdkd_cli.report import problem_of, read_report, to_json
    from ssdkd_cli.report_page import write_report
    from ssdkd_cli.summary import show_report

    try:
        with locked(run):  # a run or an export may be writing another
            found = read_report(run)
            write_report(found, run)
    except OSError as error:
        found = read_report(run)
        console.warn(f"{run} cannot be written ({error.strerror}): its report is shown as it is")
    for item in found.artifacts:
        if problem := problem_of(item, run):
            console.warn(f"{problem}; `{_export_again(item, run)}` writes it anew")
    if json:
        return Outcome(functools.partial(console.print_json, to_json(found)))
    return Outcome(functools.partial(show_report, run, found))


def _export_again(item: "Artifact", run: Path) -> str:
    """The command that makes a file of a run anew."""
    from exporters.metadata import UNIT
    from ssdkd_cli.precisions import HALF_IO

    profile = ["--profile", item.profile] if item.profile else []
    embedded = ["--embed-preprocessing"] if item.input_range == UNIT else []
    half_io = ["--fp16-io"] if HALF_IO in item.notes else []
    wanted = ["--export", item.format, "--precision", item.precision, *profile, *embedded, *half_io]
    return shlex.join(["ssdkd", "export", str(run), *wanted, "--overwrite"])
