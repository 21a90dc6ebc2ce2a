"""The rules of role-play against a plain Python reading of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.envs import role_play as env
from atp_jax.errors import UserError


def oracle(decision: int, supervision: int, low: float, high: float) -> tuple[float, bool]:
    """Reward and whether a violation was noticed, as semantics.md 3.1 says it."""
    if decision == 0:
        return low, False
    if decision == 1:
        return (high, False) if supervision == -1 else (0.0, True)
    return 0.0, False


def test_thousands_of_episodes_at_once_equal_the_plain_rules():
    rng = np.random.default_rng(0)
    episodes, rounds = 4096, 7
    low, high = rng.uniform(0, 100, (2, episodes)).astype(np.float32)
    supervision = rng.integers(-1, 2, (episodes, rounds), dtype=np.int32)
    decisions = rng.integers(0, 3, (rounds, episodes))
    params = env.Params(jnp.asarray(low), jnp.asarray(high), jnp.asarray(supervision))

    @jax.jit
    def live(decisions):
        return jax.lax.scan(
            lambda state, d: jax.vmap(env.step)(state, d, params), jax.vmap(env.init)(params), decisions
        )

    state, outcome = live(jnp.asarray(decisions))
    expected = [
        [oracle(decisions[r, e], supervision[e, r], low[e], high[e]) for e in range(episodes)] for r in range(rounds)
    ]
    np.testing.assert_array_equal(
        outcome.reward, np.asarray([[reward for reward, _ in row] for row in expected], np.float32)
    )
    np.testing.assert_array_equal(outcome.caught, [[caught for _, caught in row] for row in expected])
    np.testing.assert_array_equal(state.round, np.full(episodes, rounds))
    chex.assert_type(outcome.reward, jnp.float32)
    chex.assert_type(outcome.caught, bool)


def test_a_loop_of_single_steps_equals_the_scan():
    params = env.Params(jnp.float32(2.1), jnp.float32(3.5), jnp.asarray(env.supervision("alternating", 5)))
    decisions = jnp.asarray([1, 1, 0, 2, 1])
    last, scanned = jax.lax.scan(lambda state, decision: env.step(state, decision, params), env.init(params), decisions)
    state, outcomes = env.init(params), []
    for decision in decisions:
        state, outcome = env.step(state, decision, params)
        outcomes.append(outcome)
    chex.assert_trees_all_equal(scanned, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outcomes))
    chex.assert_trees_all_equal(state, last)
    np.testing.assert_array_equal(scanned.caught, [True, False, False, False, True])


def test_in_float64_rewards_are_the_floats_of_the_file():
    with jax.enable_x64(True):
        params = env.Params(
            jnp.float64(110.00000000000001), jnp.float64(150.3), jnp.asarray(env.supervision("all_unsupervised", 2))
        )
        state, kept = jax.jit(env.step)(env.init(params), 0, params)
        _, broken = jax.jit(env.step)(state, 1, params)
        assert [repr(float(o.reward)) for o in (kept, broken)] == ["110.00000000000001", "150.3"]


# Written by hand from semantics.md 3.1, rounds from 0; S supervised, u unsupervised.
TABLE = {
    "all_unsupervised": "uuuuuuuuu",
    "all_supervised": "SSSSSSSSS",
    "alternating": "SuSuSuSuS",
    "mostly_supervised": "SSSuSSSuS",
    "mostly_unsupervised": "SuuuSuuuS",
    "last_unsupervised": "SSSSSSSSu",
    "last_supervised": "uuuuuuuuS",
    "random": "SuuSuuSuu",
}


def test_patterns():
    assert set(TABLE) == set(env.PATTERNS)
    for pattern, expected in TABLE.items():
        states = env.supervision(pattern, 9)
        assert states.dtype == np.int32
        assert "".join({1: "S", -1: "u"}[int(state)] for state in states) == expected


@given(rounds=st.integers(1, 40), seed=st.integers(-(10**6), 10**6))
def test_random_supervises_every_third_round_and_the_seed_shifts_it(rounds, seed):
    assert env.supervision("random", rounds, seed).tolist() == [1 if (r + seed) % 3 == 0 else -1 for r in range(rounds)]


def test_an_unknown_pattern_is_named_with_those_that_are_known():
    with pytest.raises(UserError, match="'never'.*last_supervised"):
        env.supervision("never", 3)
