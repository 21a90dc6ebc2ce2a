"""The testbeds: each ties its environment to its words, and says what its conditions are.

A testbed is a module with the same names: `ALIGN`, `VALIDATION` (its packs to align on), `TOGETHER` (whether all
conditions of a model are answered as one batch), `FIRST` (the number of the first round), `load`, `scenarios`, `notes`,
`conditions`, `asked`, `Lives`, `Alone` (lives of one agent that are aligned and looked at), `questions`, `summarise`.
Tool use cannot be aligned on yet, so it has no `Alone` and no `questions`.
"""

from types import ModuleType

from atp_jax.settings import Settings
from atp_jax.testbeds import role_play, threshold_game, tool_use

_ALL = {"role_play": role_play, "threshold_game": threshold_game, "tool_use": tool_use}


def testbed(settings: Settings) -> ModuleType:
    """The module of the testbed that the settings name."""
    return _ALL[settings.testbed]
