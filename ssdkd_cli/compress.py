"""`ssdkd compress` and `ssdkd demo`: the same run with other defaults."""

import functools
import shlex
from pathlib import Path

import typer

from engine.readable import check_readable
from ssdkd_cli import console
from ssdkd_cli.boundary import VERIFICATION_FAILED
from ssdkd_cli.options import Options, command_taking_options
from ssdkd_cli.outcome import Outcome

ASSETS = Path(__file__).parent / "assets"
DEMO_TEACHER = ASSETS / "demo_teacher.pt"

DEMO_DEFAULTS = {  # as they would be typed
    "student": "wrn10_1",
    "effort": "quick",
    "time_limit": "135s",
    "samples": "3000",
    "input": "1x28x28",
    "mean": "0.5",
    "std": "0.5",
    "classes": str(ASSETS / "demo_classes.txt"),
    "eval_data": str(ASSETS / "demo_test.npz"),
    "out": "runs/demo",
}


def run_compress(context: typer.Context, options: Options) -> Outcome:
    """Distil a teacher into a small student without data, export it, prove the files and report.

    The whole main job: [bold]ssdkd compress teacher.pt --student mobilenetv2[/bold]

    A look at it in a minute: [bold]ssdkd compress teacher.pt --student resnet8 --effort smoke[/bold]
    """
    check_readable(options.teacher)
    from ssdkd_cli import pipeline, report
    from ssdkd_cli.gates import gate_line, has_failed
    from ssdkd_cli.summary import show_report

    finished = pipeline.compress(options, command=shlex.join(["ssdkd", *context.obj]))
    failed = has_failed(finished.report.artifacts, finished.report.gates)
    if options.json:  # else they stand below the table
        for gate in finished.report.gates:
            console.limit(gate_line(gate), gate.passed)
    show = (
        functools.partial(console.print_json, report.to_json(finished.report))
        if options.json
        else functools.partial(show_report, finished.folder, finished.report)
    )
    return Outcome(show, VERIFICATION_FAILED if failed else 0)


def run_demo(context: typer.Context, options: Options) -> Outcome:
    """Run the whole pipeline on a small teacher that ships with ssdkd: no download, no GPU, about three minutes.

    Just look: [bold]ssdkd demo[/bold]

    Another student, on a GPU: [bold]ssdkd demo --student mobilenetv2 --device cuda[/bold]

    All rounds, not those of two minutes: [bold]ssdkd demo --time-limit 1h[/bold]
    """
    return run_compress(context, options)


compress = command_taking_options(run_compress)
demo = command_taking_options(run_demo, defaults=DEMO_DEFAULTS, teacher=DEMO_TEACHER)
