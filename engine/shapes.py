"""Sizes of images, and how the command line writes them."""

from collections.abc import Sequence

from engine.errors import SSDKDError

Shape = tuple[int, int, int]  # C, H, W


def words(shape: Sequence[int]) -> str:
    """(3, 32, 32) -> "3x32x32", as --input takes it."""
    return "x".join(map(str, shape))


def each_channel(flag: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """The values of --mean or --std, one a channel; a single one is that of every channel.

    Raises SSDKDError for another number of them.
    """
    if len(values) not in (1, channels):
        shown = ",".join([f"{value:g}" for value in (values or (0.5,))[:1]] * channels)
        raise SSDKDError(
            f"{flag} has {len(values)} values, but the network takes {channels} channel{'s' * (channels > 1)}",
            f"give one value for all, or one a channel: {flag} {shown}",
        )
    return values if len(values) == channels else values * channels
