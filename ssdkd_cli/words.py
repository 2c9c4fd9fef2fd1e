"""Numbers as people read them: the same words in report.md and on the terminal. Unknown is `unknown`, never a guess."""

from collections.abc import Sequence

UNKNOWN = "unknown"
# Of mean and std.
SOURCES = {
    "flag": "as stated",
    "file": "from the file",
    "timm": "timm's",
    "default": "assumed",
    "mean": "mean as stated, std assumed",
    "std": "std as stated, mean assumed",
}
NEAR_CHANCE = 0.1  # of the way from chance to all right
SAME = 1.05  # numbers that differ by less are called about the same


def escaped(text: str) -> str:
    """The text with escapes for what is no UTF-8, as a file's name may be."""
    return text.encode(errors="backslashreplace").decode()


def network(arch: str) -> str:
    """The name of an architecture; a network which is nothing but its graph has none."""
    return "bare graph" if arch == "graph" else arch


def percent(value: float | None) -> str:
    """88.34 -> '88.3 %'."""
    return UNKNOWN if value is None else f"{value:.1f} %"


def is_near_chance(accuracy: float, classes: int) -> bool:
    """Whether an accuracy (percent) is too near chance to be that of a trained network on labels in its own order."""
    chance = 100 / classes
    return accuracy <= chance + NEAR_CHANCE * (100 - chance)


def count(value: float | None) -> str:
    """Up to a million in full, beyond that '41.2 M', '5.6 G'."""
    if value is None:
        return UNKNOWN
    for limit, letter in ((1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{value / limit:.3g} {letter}"
    return f"{value:,.0f}"


def size(value_bytes: float | None) -> str:
    """Bytes as '0.31 MB' or '74 kB'."""
    if value_bytes is None:
        return UNKNOWN
    return f"{value_bytes / 1e6:,.2f} MB" if value_bytes >= 1e5 else f"{value_bytes / 1e3:,.1f} kB"


def milliseconds(value_ms: float | None) -> str:
    """0.4372 -> '0.437 ms'."""
    return UNKNOWN if value_ms is None else f"{value_ms:.3g} ms"


def duration(seconds: float) -> str:
    """Seconds as '42 s', '3 min 12 s' or '1 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shape(values: Sequence[int]) -> str:
    """(3, 32, 32) -> '3x32x32', as --input takes it."""
    return "x".join(str(value) for value in values)


def times(larger: float, smaller: float) -> str:
    """How many times one is the other: '3.5 times'."""
    ratio = larger / smaller
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def compared(teacher: float, student: float, change: tuple[str, str]) -> str:
    """'3.5 times fewer', 'about the same', 'the same'; `change`: what a smaller number is called, and a larger one."""
    larger, smaller = max(teacher, student), min(teacher, student)
    if larger < SAME * smaller:
        return "the same" if larger == smaller else "about the same"
    return f"{times(larger, smaller)} {change[student > teacher]}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, padded so that it reads well as plain text too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
