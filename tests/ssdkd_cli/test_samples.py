from pathlib import Path

import numpy as np
from PIL import Image

from ssdkd_cli.samples import COLUMNS, GAP, INK, MARGIN, PAPER, chosen_classes, write_samples


def test_classes_are_spread_evenly() -> None:
    assert chosen_classes(4) == [0, 1, 2, 3]
    assert chosen_classes(10) == list(range(10))
    shown = chosen_classes(1000)
    assert (len(shown), shown[0], shown[-1]) == (10, 0, 999)
    assert len(set(np.diff(shown))) <= 2


def colours(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as sheet:
        return {tuple(colour) for colour in np.asarray(sheet).reshape(-1, 3).tolist()}  # type: ignore[misc]


def test_a_row_for_each_class(tmp_path: Path) -> None:
    images = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    images[:4] = (200, 10, 10)  # of class 0
    images[4:] = (10, 10, 200)  # of class 2; class 1 has none
    path = tmp_path / "samples.png"
    write_samples(path, images, np.array([0, 0, 0, 0, 2, 2]), ["red", "none", "blue"])
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    tile = 64  # small images are enlarged
    assert pixels.shape[0] == 2 * MARGIN + 3 * (tile + GAP) - GAP
    left = pixels.shape[1] - MARGIN - COLUMNS * (tile + GAP) + GAP
    rows, columns = (start + 32 + (tile + GAP) * np.arange(10) for start in (MARGIN, left))
    middles = pixels[rows[:3, None], columns[None, :COLUMNS]]  # [3, COLUMNS, 3]
    red = [tuple(colour) == (200, 10, 10) for colour in middles[0]]
    blue = [tuple(colour) == (10, 10, 200) for colour in middles[2]]
    assert (sum(red), sum(blue)) == (4, 2)
    assert len({tuple(colour) for colour in middles[1]}) == 1
    assert tuple(pixels[0, 0]) == PAPER
    assert INK in colours(path)  # the names


def test_any_channels_and_sizes(tmp_path: Path) -> None:
    for channels, height, width in ((1, 28, 28), (2, 16, 24), (4, 20, 20), (3, 300, 200)):
        images = np.full((2, height, width, channels), 77, dtype=np.uint8)
        write_samples(
            tmp_path / "samples.png", images, np.array([0, 1]), ["a", "a name that is cut because it is long"]
        )
        assert (77, 77, 77) in colours(tmp_path / "samples.png")
