"""The testbeds: each ties its environment to its words, and says what its conditions are.

A testbed is a module with the same names: `ALIGN`, `VALIDATION` (its packs to align on), `TOGETHER` (whether all
conditions of a model are answered as one batch), `FIRST` (the number of the first round), `load`, `scenarios`, `notes`,
`conditions`, `asked`, `Lives`, `summarise`; and for alignment `align_on` (what a file holds to align on), `questions`,
`Alone` (lives of one agent that are aligned and looked at), `answering` (what makes whole answers of a policy's turns),
`read` (which half of a pair an answer can be) and `training_rewards` (what GRPO pays for the records of a round).
"""

from types import ModuleType

from atp_jax.settings import Settings
from atp_jax.testbeds import role_play, threshold_game, tool_use

_ALL = {"role_play": role_play, "threshold_game": threshold_game, "tool_use": tool_use}


def testbed(settings: Settings) -> ModuleType:
    """The module of the testbed that the settings name."""
    return _ALL[settings.testbed]
