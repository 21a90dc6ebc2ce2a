"""Sizes from short ladders, so that few programs are compiled, and what of a row can stay."""

from collections.abc import Sequence

SMALLEST_CACHE = 64  # positions


def bucket(needed: int, *, steps: int, smallest: int, multiple: int = 1) -> int:
    """The smallest size >= needed on a ladder that has `steps` equal steps from each power of two to the next, rounded
    up to a multiple. E.g. steps=2: 64, 96, 128, 192, 256, 384, ..."""
    needed = max(needed, smallest)
    power = 2 ** (needed.bit_length() - 1)
    step = max(power // steps, 1)
    size = -(-needed // step) * step
    return -(-size // multiple) * multiple


def batch_rows(needed: int, shards: int) -> int:
    """Rows of a batch that holds so many and lies on so many parts of the mesh."""
    return bucket(needed, steps=4, smallest=1, multiple=shards)


def positions(needed: int) -> int:
    """Positions of a cache whose rows hold so many."""
    return bucket(needed, steps=2, smallest=SMALLEST_CACHE)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements are equal."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
