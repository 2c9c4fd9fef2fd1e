"""The `ssdkd` command and its subcommands.

Exit codes: 0 done; 1 a known error; 2 wrong usage; 3 a verification failed or a limit does not hold; 130 interrupted.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, TextIO, cast

import typer

from engine.errors import SSDKDError
from engine.processors import share_processors
from ssdkd_cli import __version__, compress, console, look_commands, profile_commands, run_commands
from ssdkd_cli.boundary import KNOWN_ERROR, within_boundary
from ssdkd_cli.outcome import Outcome
from ssdkd_cli.process import printing

app = typer.Typer(
    name="ssdkd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` default to those of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # this process is ours
        share_processors(os.environ)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # what a test or a notebook put there may have no encoding
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    with contextlib.redirect_stderr(cast(TextIO, console.Unbroken(sys.stderr))):
        try:
            return run(words)
        except SSDKDError as error:  # from --config, which is read before a command starts, or of --help
            console.error(error.message, error.hint)
            return KNOWN_ERROR
        finally:
            if arguments is None:  # all is saved: a second Ctrl-C would only interrupt Python's own end
                signal.signal(signal.SIGINT, signal.SIG_IGN)


def run(words: list[str]) -> int:
    """The exit code of one command."""
    with printing():
        try:
            app(args=words, prog_name="ssdkd", obj=words)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ssdkd {__version__}")
        raise typer.Exit


@app.callback()
def ssdkd(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Make a vision network small enough for an edge device, without the data it was trained on.

    See it work in about three minutes: [bold]ssdkd demo[/bold]

    The main job: [bold]ssdkd compress teacher.pt --student mobilenetv2[/bold]
    """


GROUPS: dict[str, dict[str, Callable[..., Outcome]]] = {
    "Compress": {"compress": compress.compress, "demo": compress.demo},
    "Look": {"inspect": look_commands.inspect, "students": look_commands.students, "doctor": look_commands.doctor},
    "Work with a finished run": {
        "export": run_commands.export,
        "eval": run_commands.evaluate,
        "bench": run_commands.bench,
        "report": run_commands.report,
    },
}

for _group, _commands in GROUPS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_group)(within_boundary(_command))
app.add_typer(profile_commands.app, name="profiles", rich_help_panel="Look")

if __name__ == "__main__":
    sys.exit(main())
