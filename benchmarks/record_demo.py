"""The picture of the demo in README: runs it on a terminal of its own and keeps some moments of the screen as one SVG.

    pip install pyte && python -m benchmarks.record_demo [--out docs/demo.svg]

Nothing is drawn by hand: each frame is the screen as a terminal emulator has it at that moment of the run.
"""

import argparse
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, ROWS = 104, 30
FRAMES, FRAME_SECONDS, LAST_SECONDS = 9, 1.2, 8.0
COLOURS = {"brown": "yellow", "brightblack": "bright_black", "default": None}  # pyte's names to rich's


def screens(command: list[str]) -> list[list[Text]]:
    """Run the command on a pseudo-terminal; one screen a second, and at last the final one."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execv(command[0], command)
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    taken, last = [], time.monotonic()
    while True:
        try:
            if select.select([terminal], [], [], 1.0)[0]:
                stream.feed(os.read(terminal, 65536))
        except OSError:  # the other end is closed
            break
        if time.monotonic() - last >= 1:
            last = time.monotonic()
            taken.append(lines(screen))
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"the demo ended with status {os.waitstatus_to_exitcode(status)}")
    return [*taken, lines(screen)]


def lines(screen: pyte.Screen) -> list[Text]:
    """The screen with its colours."""
    shown = []
    for row in range(screen.lines):
        line = Text()
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            style = Style(color=colour(cell.fg), bold=cell.bold)
            line.append(cell.data, style)
        line.rstrip()
        shown.append(line)
    return shown


def colour(name: str) -> str | None:
    """rich's name for pyte's, which is a word or six hexadecimal digits."""
    return f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else COLOURS.get(name, name)


def svg(frames: list[list[Text]], title: str) -> str:
    """The frames one after the other, again and again; where nothing moves, the last is seen."""
    seconds = FRAME_SECONDS * (len(frames) - 1) + LAST_SECONDS
    pictures, rules, box = [], [], ""
    for number, frame in enumerate(frames):
        console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w"))  # noqa: SIM115
        for line in frame:
            console.print(line, no_wrap=True, crop=True)
        picture = console.export_svg(title=title, unique_id=f"frame{number}")
        found = re.search(r'viewBox="([^"]+)"', picture)
        assert found
        box = found[1]  # the same for all
        begin, end = 100 * FRAME_SECONDS * number / seconds, 100 * FRAME_SECONDS * (number + 1) / seconds
        is_last = number == len(frames) - 1
        visible = f"0%{{opacity:0}}{begin:.2f}%{{opacity:1}}" + ("" if is_last else f"{end:.2f}%{{opacity:0}}")
        rules.append(
            f"@keyframes show{number}{{{visible}100%{{opacity:{int(is_last)}}}}}"
            f"#shot{number}{{opacity:{int(is_last)};animation:show{number} {seconds}s step-end infinite}}"
        )
        pictures.append(f'<g id="shot{number}">{picture}</g>')
    style = f"<style>{''.join(rules)}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{style}{"".join(pictures)}</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "demo.svg")
    arguments = parser.parse_args()
    program = Path(sys.executable).with_name("ssdkd")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        taken = screens([str(program), "demo"])
    chosen = [taken[(len(taken) - 1) * number // (FRAMES - 1)] for number in range(1, FRAMES)]
    arguments.out.write_text(svg(chosen, "ssdkd demo"), encoding="utf-8")


if __name__ == "__main__":
    main()
