"""What is seen: the show on stderr while a command works, its result on stdout. The only file that imports rich.

On a terminal the show is a live view; anywhere else it is plain lines, one every few seconds.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ssdkd_cli.words import duration

if TYPE_CHECKING:
    from engine.distill import RoundMetrics

ACCENT, GOOD, CAUTION, BAD, QUIET = "cyan", "green", "yellow", "bold red", "bright_black"
PLAIN_LINE_SECONDS = 5.0
FRAMES = 8  # a second
NAME_WIDTH = 10
PIPE_WIDTH = 140  # columns of a table that goes to a file or another program
SPARK_WIDTH = 40
MARKS: dict[bool | None, tuple[str, str]] = {True: ("✓", GOOD), False: ("✗", BAD), None: ("?", CAUTION)}
SPARKS = "▁▂▃▄▅▆▇█"

for _name in ("stdout", "stderr"):
    if getattr(sys, _name) is None:  # closed by who started us
        setattr(sys, _name, Path(os.devnull).open("w"))  # noqa: SIM115  open to the end

show = Console(stderr=True, highlight=False)
result = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


class Unbroken:
    """stderr that does not end what is shown on it: where it cannot be written, the work goes on unseen.

    Its reader may go away (`2>&1 | head`), its disk may be full.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write `text`, or send all that is still to come, from here and from libraries, to where nothing is kept."""
        try:
            return self.stream.write(text)
        except OSError:
            self.go_unseen()
            return len(text)

    def flush(self) -> None:
        """As `write`."""
        try:
            self.stream.flush()
        except OSError:
            self.go_unseen()

    def go_unseen(self) -> None:
        """Let the file descriptor lead nowhere."""
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


def line(mark: Text, text: Text | str, console: Console = show) -> None:
    """A mark and its text: beside each other on a terminal; elsewhere one unbroken line, so that it can be searched."""
    if console.is_terminal:
        beside = Table.grid(padding=(0, 1, 0, 0))
        beside.add_row(mark, text)
        console.print(beside)
    else:
        console.print(Text.assemble(mark, " ", text), soft_wrap=True)


def warn(text: str) -> None:
    """Something that the user should know and that does not stop the run."""
    line(Text("!", CAUTION), text)


def warn_all(sentences: Sequence[str]) -> list[str]:
    """Say each of them, and hand them back for the report."""
    for sentence in sentences:
        warn(sentence)
    return list(sentences)


def note(text: str) -> None:
    """Something worth knowing."""
    line(Text(" "), text)


def limit(text: str, passed: bool) -> None:
    """A limit that was set, what was found, and whether it holds."""
    line(Text(*MARKS[passed]), text)


def error(message: str, hint: str) -> None:
    """What is wrong, and what to type next."""
    line(Text("ERROR", BAD), message)
    if hint:
        line(Text("HINT ", ACCENT) if show.is_terminal else Text("HINT", ACCENT), hint)


@contextmanager
def stage(name: str, doing: str) -> Iterator[Callable[..., None]]:
    """A spinner while a stage works; the function that it yields, done(text, good=True), says what came of it.

    `good` is None where that is not decided.
    """
    with counted(name, doing) as (_, done):
        yield done


@contextmanager
def counted(name: str, doing: str) -> Iterator[tuple[Callable[[str], None], Callable[..., None]]]:
    """A stage of many rounds: yields tick(text), which tells of a round, and the `done` of a stage."""
    last, started = -PLAIN_LINE_SECONDS, time.perf_counter()
    outcome: tuple[str, bool | None] = (doing, True)
    view = Live(waiting(name, doing), console=show, transient=True, refresh_per_second=FRAMES)

    def tick(text: str) -> None:
        nonlocal last
        if show.is_terminal:
            view.update(waiting(name, f"{doing}, {text}"))
        elif time.perf_counter() - started - last >= PLAIN_LINE_SECONDS:
            last = time.perf_counter() - started
            note(f"{doing}, {text}")

    def done(text: str, good: bool | None = True) -> None:
        nonlocal outcome
        outcome = (text, good)

    if show.is_terminal:
        with view:
            yield tick, done
    else:
        yield tick, done
    finish(name, *outcome, started)


def waiting(name: str, doing: str) -> Spinner:
    """What a stage shows while it works."""
    return Spinner("dots", Text.assemble((f"{name:<{NAME_WIDTH}}", "bold"), (doing, QUIET)), style=ACCENT)


def finish(name: str, text: str, good: bool | None, started: float) -> None:
    """The line that a finished stage leaves; `started` is its time.perf_counter()."""
    seconds = time.perf_counter() - started
    spent = f"  {duration(seconds)}" if seconds >= 1 else ""
    line(Text.assemble(MARKS[good], (f" {name:<{NAME_WIDTH}}", "bold")), Text.assemble(text, (spent, QUIET)))


@contextmanager
def rounds(title: str) -> Iterator[Callable[["RoundMetrics"], None]]:
    """The view of a distillation; the function that it yields is given each round's metrics."""
    history: list[RoundMetrics] = []
    started = time.perf_counter()
    view = Live(waiting("distil", "the first samples"), console=show, transient=True, refresh_per_second=FRAMES)
    last_line_seconds = -PLAIN_LINE_SECONDS

    def draw(metrics: "RoundMetrics") -> None:
        nonlocal last_line_seconds
        history.append(metrics)
        if show.is_terminal:
            view.update(round_view(title, history))
        elif metrics.seconds - last_line_seconds >= PLAIN_LINE_SECONDS:
            last_line_seconds = metrics.seconds
            note(plain_round(metrics))

    if show.is_terminal:
        with view:
            yield draw
    else:
        yield draw
    last = history[-1]
    text = (
        f"{last.round:,} of {last.rounds:,} rounds, {last.steps:,} steps, {last.images_seen:,} images, "
        f"{last.agreement:.1f} % agreement with the teacher on the newest samples"
    )
    finish("distil", text, True, started)


def round_view(title: str, history: Sequence["RoundMetrics"]) -> RenderableType:
    """The live picture after the last round of `history`."""
    metrics = history[-1]
    whole = metrics.seconds + metrics.seconds_left
    share = metrics.seconds / whole if whole > 0 else 0.0  # while the time that is left is not known
    bar = Table.grid(padding=(0, 2))
    bar.add_row(
        Text(f"round {metrics.round} of {metrics.rounds}", "bold"),
        ProgressBar(total=1.0, completed=share, width=SPARK_WIDTH, complete_style=ACCENT, finished_style=ACCENT),
        Text(f"{100 * share:3.0f} %"),
        Text(time_left(metrics), QUIET),
    )
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style=QUIET, justify="right")
    facts.add_column()
    agreements = sparkline([past.agreement for past in history])
    facts.add_row(
        "agreement", Text.assemble((f"{metrics.agreement:.1f} %", f"bold {ACCENT}"), "   ", (agreements, ACCENT))
    )
    facts.add_row("student loss", f"{metrics.distillation_loss:.3g}" if metrics.steps else Text("waits", QUIET))
    facts.add_row("image loss", image_losses(metrics))
    facts.add_row("samples", named(("", f"{metrics.buffer_size:,}"), ("class balance", f"{metrics.class_balance:.2f}")))
    facts.add_row("speed", f"{metrics.images_per_second:,.0f} images/s" if metrics.steps else Text("waits", QUIET))
    phase = {"warm-up": "the first samples", "distill": "distilling"}[metrics.phase]
    head = Text.assemble((title, "bold"), (f"   {phase}", QUIET))
    return Padding(Group(head, Text(), bar, Text(), facts), (1, 2))


def time_left(metrics: "RoundMetrics") -> str:
    """'3 min 2 s left', or nothing where it is over or not known yet."""
    return f"{duration(metrics.seconds_left)} left" if metrics.seconds_left > 0 else ""


def image_losses(metrics: "RoundMetrics") -> Text:
    """The loss of the synthetic images and its parts."""
    return named(
        ("", f"{metrics.inversion_loss:.3g}"),
        ("prior", f"{metrics.prior_loss:.3g}"),
        ("spread", f"{metrics.spread_loss:.3g}"),
        ("class", f"{metrics.class_loss:.3g}"),
        ("adversarial", f"{metrics.adversarial_loss:.3g}"),
    )


def named(*parts: tuple[str, str]) -> Text:
    """Values with their names before them, the names quiet."""
    text = Text()
    for name, value in parts:
        text.append(f"   {name} " if name else "", QUIET)
        text.append(value)
    return text


def sparkline(values: Sequence[float]) -> str:
    """Percent over time as up to `SPARK_WIDTH` bars, each the mean of its share of the values."""
    width = min(SPARK_WIDTH, len(values))
    bars = []
    for index in range(width):
        part = values[index * len(values) // width : (index + 1) * len(values) // width]
        bars.append(SPARKS[min(len(SPARKS) - 1, int(sum(part) / len(part) / 100 * len(SPARKS)))])
    return "".join(bars)


def plain_round(metrics: "RoundMetrics") -> str:
    """One round as one line."""
    phase = "warm-up  " if metrics.phase == "warm-up" else ""
    agreement, student, speed = "", "", ""
    if metrics.steps:  # before the student's first there is nothing to say of it
        agreement = f"agreement {metrics.agreement:.1f} %  "
        student = f"student loss {metrics.distillation_loss:.3g}  "
        speed = f"{metrics.images_per_second:,.0f} images/s  "
    return (
        f"round {metrics.round}/{metrics.rounds}  {phase}{agreement}{student}"
        f"image loss {image_losses(metrics).plain}  balance {metrics.class_balance:.2f}  "
        f"{speed}{time_left(metrics)}"
    ).rstrip()


def print_json(text: str) -> None:
    """JSON on stdout, as it is."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), caption: str = ""
) -> None:
    """A table on stdout; the columns in `right` are numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    result.print(table)
    if caption:
        result.print(Text(caption, QUIET))


def print_facts(title: str, facts: Mapping[str, str], *, findings: Sequence[str] = (), closing: str = "") -> None:
    """Names and values on stdout, then what is suspicious, then the next command."""
    result.print(Text(title, "bold"), soft_wrap=True)
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        line(Text(f"  {name:<{width}} ", QUIET), value, result)
    print_warnings(findings)
    if closing:
        result.print(Text.assemble("\n  ", (closing, ACCENT)), soft_wrap=True)


def print_comparison(rows: Sequence[tuple[str, str, str, str]], artifacts: Sequence[tuple[bool | None, str]]) -> None:
    """The end of a run on stdout: (name, teacher, student, what was gained) a row, then one line an artifact."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    table.add_column("", style=QUIET)
    table.add_column("teacher", justify="right")
    table.add_column("student", justify="right", style="bold")
    table.add_column("", style=ACCENT)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    result.print()
    result.print(table)
    for verified, text in artifacts:
        line(Text.assemble(MARKS[verified]), text, result)


def print_warnings(sentences: Sequence[str]) -> None:
    """What was doubtful, below a result."""
    for sentence in sentences:
        line(Text("!", CAUTION), sentence, result)


def print_advice(text: str) -> None:
    """What to take of what came out."""
    line(Text("→", ACCENT), text, result)


def print_closing(folder: str, files: Sequence[str]) -> None:
    """Where the run is, and what to open first."""
    result.print(Text.assemble("  ", (folder, ACCENT), (f"  {'  '.join(files)}", QUIET)), soft_wrap=True)
