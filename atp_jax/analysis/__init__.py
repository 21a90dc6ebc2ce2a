"""From the lines of episodes.jsonl to numbers, a table, pictures and a report."""

from atp_jax.analysis.games import summarise_games
from atp_jax.analysis.show import print_table, write_report
from atp_jax.analysis.tipping import summarise
from atp_jax.analysis.tools import summarise_tools

__all__ = ["print_table", "summarise", "summarise_games", "summarise_tools", "write_report"]
