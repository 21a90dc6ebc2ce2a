"""The threshold game's report/: a page with its pictures and its tables, readable without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def files(results: Mapping, records: Mapping[str, Sequence[Mapping]]) -> dict[str, bytes]:
    return {}
