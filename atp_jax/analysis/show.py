"""What is shown of a run: a table on the terminal and the folder report/, each testbed with its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from atp_jax.analysis import games_report, games_tables, report, tables, tools_report
from atp_jax.analysis.tables import points, points_span, style
from atp_jax.analysis.tipping import against_controls
from atp_jax.files import replacing

PLAIN_WIDTH = 100  # columns where no terminal says how many it has
_OWN_TABLES = {"threshold_game": games_tables, "tool_use": tools_report}
_OWN_REPORTS = {"threshold_game": games_report, "tool_use": tools_report}


def print_table(results: Mapping, console: Console | None = None) -> None:
    """Print results.json as one table, then one line per control, then what was probed. Plain text, 100 columns, when
    not on a terminal."""
    if console is None:
        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(_OWN_TABLES.get(results["testbed"], tables).results_table(results, console.width))
    for effect in against_controls(results["conditions"]):
        line = Text("\n change of ").append(effect["condition"], "bold").append(" minus change of ")
        line.append(effect["control"], "bold").append(": ").append(f"{points(effect)} points", style(effect))
        console.print(line.append(f" {points_span(effect['ci95'])}"))
    if results.get("probe"):
        console.print()
        console.print(tables.probe_table(results["probe"]))


def write_report(workdir: Path, results: Mapping, records: Mapping[str, Sequence[Mapping]]) -> None:
    """Write report/index.html, its pictures and its CSV tables, each as a whole or not at all.

    results: the content of results.json. records: condition name -> its lines of episodes.jsonl. The same arguments
    give the same bytes. Everything that a model, a scenario or a setting says is escaped. Raises OSError where the
    folder cannot be written.
    """
    folder = Path(workdir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in _OWN_REPORTS.get(results["testbed"], report).files(results, records).items():
        with replacing(folder / name) as partial:
            partial.write_bytes(data)
