"""samples.png: what the student learned from, a row of synthetic images for each class."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from exporters.files import write_atomically

ROWS = 10  # classes shown
COLUMNS = 10  # samples of each
SMALLEST_TILE_PIXELS = 64  # small images are enlarged by a whole factor to at least this
LARGEST_TILE_PIXELS = 160
GAP, MARGIN, FONT_PIXELS = 6, 28, 15
PAPER, INK, EMPTY = (255, 255, 255), (52, 58, 64), (241, 243, 245)


def write_samples(path: Path, images: NDArray[np.uint8], classes: NDArray[np.int64], names: Sequence[str]) -> None:
    """Write the grid as a PNG.

    Args:
        path: of the PNG.
        images: [N, H, W, C], C from 1 to 4 (the first three are shown, the first alone where there are two).
        classes: [N], the class that the teacher sees in each.
        names: a name a class.
    """
    shown = chosen_classes(len(names))
    tile_height, tile_width = _tile_size(images.shape[1], images.shape[2])
    font = ImageFont.load_default(FONT_PIXELS)
    labels = [_shortened(names[index]) for index in shown]
    label_width = int(max(font.getlength(label) for label in labels)) + 2 * GAP
    width = 2 * MARGIN + label_width + COLUMNS * (tile_width + GAP) - GAP
    height = 2 * MARGIN + len(shown) * (tile_height + GAP) - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (index, label) in enumerate(zip(shown, labels, strict=True)):
        top = MARGIN + row * (tile_height + GAP)
        middle = top + tile_height / 2
        draw.text((MARGIN + label_width - 2 * GAP, middle), label, fill=INK, font=font, anchor="rm")
        found = images[np.flatnonzero(classes == index)[:COLUMNS]]
        for column in range(COLUMNS):
            left = MARGIN + label_width + column * (tile_width + GAP)
            if column < len(found):
                sheet.paste(_tile(found[column], (tile_width, tile_height)), (left, top))
            else:
                draw.rectangle((left, top, left + tile_width - 1, top + tile_height - 1), fill=EMPTY)
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    write_atomically(path, content.getvalue())


def chosen_classes(classes: int) -> list[int]:
    """Up to `ROWS` class numbers, evenly spread over all of them."""
    return [int(index) for index in np.linspace(0, classes - 1, min(classes, ROWS)).round()]


def _tile_size(height: int, width: int) -> tuple[int, int]:
    larger = max(height, width)
    scale: float = max(1, -(-SMALLEST_TILE_PIXELS // larger))
    if larger > LARGEST_TILE_PIXELS:
        scale = LARGEST_TILE_PIXELS / larger
    return round(height * scale), round(width * scale)


def _tile(image: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    channels = image.shape[2]
    tile = Image.fromarray(image[:, :, :3] if channels >= 3 else image[:, :, 0])
    larger = size[0] >= tile.width
    return tile.convert("RGB").resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
