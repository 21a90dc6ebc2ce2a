"""The rules of the testbeds as pure functions of arrays: no text, no Python state."""

from atp_jax.envs import role_play, threshold_game, tool_use

__all__ = ["role_play", "threshold_game", "tool_use"]
