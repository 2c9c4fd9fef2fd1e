"""Sizes of images, and how the command line writes them."""

from collections.abc import Sequence

Shape = tuple[int, int, int]  # C, H, W


def words(shape: Sequence[int]) -> str:
    """(3, 32, 32) -> "3x32x32", as --input takes it."""
    return "x".join(map(str, shape))
