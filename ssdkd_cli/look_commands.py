"""The commands that look: at a teacher's file, at the students there are, at this machine."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.readable import check_readable
from ssdkd_cli import console
from ssdkd_cli.options import ARCH, CLASSES, INPUT, JSON, MEAN, STD, TRUST_PICKLE
from ssdkd_cli.outcome import Outcome, printed
from ssdkd_cli.parsing import parse_path
from ssdkd_cli.words import SOURCES, count, network, shape, size

TEACHER = typer.Argument(
    parser=parse_path, metavar="TEACHER", help="The file of a trained network.", show_default=False
)
NOTHING_SMALLER = (
    "No student of `ssdkd students` has fewer parameters and fewer FLOPs than this teacher: quantize it as it is."
)


def inspect(
    teacher: Annotated[Path, TEACHER],
    arch: Annotated[str | None, ARCH] = None,
    input: Annotated[Any, INPUT] = None,
    mean: Annotated[Any, MEAN] = None,
    std: Annotated[Any, STD] = None,
    classes: Annotated[Any, CLASSES] = None,
    trust_pickle: Annotated[bool, TRUST_PICKLE] = False,
    json: Annotated[bool, JSON] = False,
) -> Outcome:
    """Show what is in a teacher's file, what is missing, and the compress command to type.

    Example: [bold]ssdkd inspect teacher.pt[/bold]
    """
    check_readable(teacher)
    from engine.inspection import inspect_teacher
    from engine.teacher import load_teacher
    from ssdkd_cli.stated import Stated

    stated = Stated(arch, input, mean, std, classes, trust_pickle).arguments()
    with console.stage("teacher", f"reading {teacher}") as done:
        loaded = load_teacher(teacher, **stated, allow_nonfinite=True)
        found = inspect_teacher(loaded)
        done(network(loaded.spec.arch))
    spec, images = found.spec, found.spec.preprocessing
    facts = {
        "format": spec.format,
        "architecture": f"{network(spec.arch)} ({spec.arch_evidence})",
        "parameters": f"{spec.parameters:,}",
        "FLOPs": f"{count(found.flops)}, one image",
        "layers": ", ".join(f"{number} {kind}" for kind, number in found.layers.items()),
        "BatchNorm": f"{spec.batchnorm_layers} usable layers",
        "input": shape(spec.input_shape),
        "mean, std": f"{list(images.mean)}, {list(images.std)} ({SOURCES[images.source]})",
        "classes": f"{spec.classes}" + (f": {', '.join(spec.class_names[:10])}" if spec.class_names else ""),
        "file": f"{size(spec.size_bytes)}, sha256 {spec.sha256}",
    }
    findings = [*spec.warnings, *found.findings, *([NOTHING_SMALLER] if found.student is None else [])]
    closing = found.command or "ssdkd compress refuses such a teacher: take an earlier checkpoint of the training"
    return printed(
        json, found, functools.partial(console.print_facts, spec.path, facts, findings=findings, closing=closing)
    )


def students(json: Annotated[bool, JSON] = False) -> Outcome:
    """List the students that ssdkd builds, with their sizes.

    Any name of torchvision's or timm's works too, and your own code as package.module:function.

    Example: [bold]ssdkd students[/bold]
    """
    import torch

    from engine.students import STUDENTS, StudentEntry

    def parameters(entry: StudentEntry, classes: int, pixels: int) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in entry.build(classes, 3, pixels).parameters())

    found = [(name, parameters(entry, 10, 32), parameters(entry, 1000, 224), entry) for name, entry in STUDENTS.items()]
    rows = [
        {"name": name, "parameters_32px": small, "parameters_224px": large, "summary": entry.summary}
        for name, small, large, entry in found
    ]
    table = [(name, count(small), count(large), entry.summary) for name, small, large, entry in found]
    head, caption = (
        ("student", "small", "large", ""),
        "parameters: small for 32 px, 10 classes; large for 224 px, 1,000",
    )
    return printed(json, rows, functools.partial(console.print_table, head, table, right=(1, 2), caption=caption))


def doctor(json: Annotated[bool, JSON] = False) -> Outcome:
    """Say what this machine can do: processor, GPU, runtimes, versions.

    Example: [bold]ssdkd doctor[/bold]
    """
    from ssdkd_cli.environment import doctor_facts, doctor_findings

    facts, findings = doctor_facts(), doctor_findings()
    text = functools.partial(console.print_facts, "this machine", facts, closing="\n  ".join(findings))
    return printed(json, {**facts, "findings": findings}, text)
