"""From the lines of episodes.jsonl to numbers, a table, a picture and a report."""

from atp_jax.analysis.games import summarise_games
from atp_jax.analysis.report import write_report
from atp_jax.analysis.tables import print_table
from atp_jax.analysis.tipping import summarise

__all__ = ["print_table", "summarise", "summarise_games", "write_report"]
