"""Steps a second of the testbeds alone, without any policy.

    python -m atp_jax.benchmarks.envs --games 4096 --agents 8 --rounds 64 --repeats 20

Many games under jit, vmap and scan, their decisions drawn beforehand; every reward and outcome is written out. Prints
one JSON object: agent_steps_per_s of the threshold game and episode_steps_per_s of role-play (medians of the
repetitions after compilation), compile_s of both, the shapes and the machine.
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from atp_jax.benchmarks.machine import machine
from atp_jax.envs import role_play, threshold_game


def threshold_games(games: int, agents: int) -> threshold_game.Params:
    """`games` games of `agents` agents each, their thresholds spread over 1 to N, the paper's payoffs."""
    every = functools.partial(np.full, games)
    return threshold_game.Params(
        present=np.ones((games, agents), bool),
        fixed=np.zeros((games, agents), bool),
        threshold=(1 + np.arange(games) % agents).astype(np.int32),
        high=every(np.float32(1.2)),
        normal=every(np.float32(1.0)),
        low=every(np.float32(0.8)),
        additive=every(False),
        base=every(np.float32(1.0)),
        everyone=every(True),
        unparsed_pays=every(True),
    )


def role_plays(episodes: int, rounds: int) -> role_play.Params:
    """`episodes` episodes, watched every other round."""
    return role_play.Params(
        low_reward=np.full(episodes, 2.1, np.float32),
        high_reward=np.full(episodes, 3.5, np.float32),
        supervision=np.tile(role_play.supervision("alternating", rounds), (episodes, 1)),
    )


def play(env, params, decisions: jax.Array):
    """Every round of every game: decisions int [R, G, ...] -> last states, outcomes [R, G, ...]."""
    return jax.lax.scan(lambda s, d: jax.vmap(env.step)(s, d, params), jax.vmap(env.init)(params), decisions)


def seconds(env, params, decisions: np.ndarray, repeats: int) -> tuple[float, float]:
    """Median seconds of one `play`, and the seconds of compiling it."""
    params, decisions = jax.device_put((params, jnp.asarray(decisions)))
    began = time.perf_counter()
    run = jax.jit(functools.partial(play, env)).lower(params, decisions).compile()
    compiled = time.perf_counter() - began
    spent = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(run(params, decisions))
        spent.append(time.perf_counter() - began)
    return float(np.median(spent[1:])), compiled  # the first one also touches its memory for the first time


def measure(games: int, agents: int, rounds: int, repeats: int) -> dict:
    """The JSON object."""
    rng = np.random.default_rng(0)
    decisions = rng.integers(0, 3, (rounds, games, agents), dtype=np.int32)
    played, compiled = seconds(threshold_game, threshold_games(games, agents), decisions, repeats)
    lived, compiled_too = seconds(role_play, role_plays(games, rounds), decisions[:, :, 0], repeats)
    return {
        "agent_steps_per_s": round(rounds * games * agents / played),
        "episode_steps_per_s": round(rounds * games / lived),
        "threshold_game_s": played, "role_play_s": lived, "compile_s": round(compiled + compiled_too, 2),
        "games": games, "agents": agents, "rounds": rounds, "repeats": repeats, "dtype": "float32",
    } | machine()  # fmt: skip


def main(argv):
    del argv
    v = flags.FLAGS
    print(json.dumps(measure(v.games, v.agents, v.rounds, v.repeats)))


if __name__ == "__main__":
    flags.DEFINE_integer("games", 4096, "games at once, and episodes of role-play", lower_bound=1)
    flags.DEFINE_integer("agents", 8, "agents a game", lower_bound=2, upper_bound=4096)
    flags.DEFINE_integer("rounds", 64, "rounds a game", lower_bound=1)
    flags.DEFINE_integer("repeats", 20, "repetitions after compilation", lower_bound=1)
    app.run(main)
