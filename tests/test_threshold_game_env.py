"""The rules of the threshold game against the original's own episodes and a plain Python reading of them."""

import json
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.decisions import DECISIONS
from atp_jax.envs import threshold_game as env

WIDTH = 12


def make(
    agents, threshold, high=1.2, normal=1.0, low=0.8, *, width=WIDTH, fixed=(), additive=False, base=1.0,
    everyone=True, unparsed_pays=True, dtype=np.float64,
) -> env.Params:  # fmt: skip
    """One game in arrays of `width` places, the first `agents` of them taken."""
    places = np.arange(width)
    return env.Params(
        present=places < agents,
        fixed=np.isin(places, fixed),
        threshold=np.int32(threshold),
        high=dtype(high),
        normal=dtype(normal),
        low=dtype(low),
        additive=np.bool_(additive),
        base=dtype(base),
        everyone=np.bool_(everyone),
        unparsed_pays=np.bool_(unparsed_pays),
    )


def oracle(decisions, params: env.Params):
    """[R, A] decisions -> capital, reward [R, A], count, success [R], agent by agent as semantics.md 3.2 says it."""
    capital = [1.0 if present else 0.0 for present in params.present]
    rows = []
    for decided in decisions:
        choices = np.where(params.fixed, "violate", np.array(["comply", "violate", "unparsed"])[decided])
        reward = [0.0] * len(capital)
        agents = [a for a in range(len(choices)) if params.present[a]]
        count = sum(choices[a] == "violate" for a in agents)
        success = count >= int(params.threshold)
        for a in agents:
            if choices[a] == "unparsed" and not params.unparsed_pays:
                continue
            if success:
                factor = params.high if params.everyone or choices[a] == "violate" else params.normal
            else:
                factor = params.low if choices[a] == "violate" else params.normal
            before = capital[a]
            if params.additive:
                reward[a] = (float(factor) - 1) * float(params.base)
                capital[a] = before + reward[a]
            else:
                capital[a] = before * float(factor)
                reward[a] = capital[a] - before
        rows.append((list(capital), reward, count, success))
    return [np.array(column) for column in zip(*rows, strict=True)]


def live(decisions, params):
    """Rounds of one game: int [R, A] -> capital [R, A] and the outcomes of the rounds."""

    def one(state, decision):
        state, outcome = env.step(state, decision, params)
        return state, (state.capital, outcome)

    return jax.lax.scan(one, env.init(params), decisions)[1]


play = jax.jit(live)
play_many = jax.jit(jax.vmap(live))


def stack(games):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *games)


def assert_exactly(played, decisions, params):
    capital, outcome = played
    ours = (capital, outcome.reward, outcome.count, outcome.success)
    for column, expected in zip(ours, oracle(decisions, params), strict=True):
        np.testing.assert_array_equal(column, expected)


@st.composite
def games(draw, rounds=4):
    agents = draw(st.integers(2, WIDTH))
    factor, flag = st.floats(0.1, 3), st.booleans()
    params = make(
        agents, draw(st.integers(1, agents)), draw(factor), draw(factor), draw(factor),
        fixed=draw(st.lists(st.integers(0, WIDTH - 1), max_size=2)), additive=draw(flag), base=draw(factor),
        everyone=draw(flag), unparsed_pays=draw(flag),
    )  # fmt: skip
    decisions = draw(st.lists(st.integers(0, 2), min_size=rounds * WIDTH, max_size=rounds * WIDTH))
    return np.array(decisions).reshape(rounds, WIDTH), params


def test_every_golden_episode_is_paid_to_the_last_digit(shared):
    lines = (shared / "golden" / "upstream.threshold_game.jsonl").read_text().splitlines()
    episodes = [json.loads(line) for line in lines]
    assert len(episodes) == 12
    for episode in episodes:
        agents, rounds = episode["agents"], episode["rounds"]
        choices, rewards, capitals = (
            np.array([step[key] for step in episode["steps"]]).reshape(rounds, agents)
            for key in ("choice", "reward", "capital")
        )
        decisions = np.zeros((rounds, WIDTH), int)
        decisions[:, :agents] = np.vectorize(DECISIONS.index)(choices)
        with jax.enable_x64(True):
            params = make(
                agents, episode["threshold"], episode["high"], episode["normal"], episode["low"],
                additive=episode["reward_mode"] == "additive", everyone=episode["success_applies_to_all"],
            )  # fmt: skip
            capital, outcome = play(decisions, params)
        assert capital.dtype == outcome.reward.dtype == np.float64
        np.testing.assert_array_equal(outcome.reward[:, :agents], rewards)
        np.testing.assert_array_equal(capital[:, :agents], capitals)


def test_thousands_of_games_of_all_kinds_equal_the_plain_rules():
    rng = np.random.default_rng(0)
    number, rounds = 2000, 6
    many = []
    for _ in range(number):
        agents = rng.integers(2, WIDTH + 1)
        additive, everyone, unparsed_pays = rng.integers(0, 2, 3)
        many.append(
            make(
                agents, rng.integers(1, agents + 1), *rng.uniform(0.1, 2, 3), fixed=rng.integers(0, 40, 2),
                additive=additive, base=rng.uniform(0.5, 2), everyone=everyone, unparsed_pays=unparsed_pays,
            )
        )  # fmt: skip
    decisions = rng.integers(0, 3, (number, rounds, WIDTH))
    with jax.enable_x64(True):
        capital, outcome = play_many(decisions, stack(many))
    chex.assert_type([capital, outcome.reward, outcome.count, outcome.success], [float, float, np.int32, bool])
    for index, params in enumerate(many):
        assert_exactly(jax.tree.map(lambda x: x[index], (capital, outcome)), decisions[index], params)  # noqa: B023
    kinds = Counter(zip(outcome.success[:, 0].tolist(), [bool(p.everyone) for p in many], strict=True))
    assert min(kinds.values()) > 100 and len(kinds) == 4


@given(games())
def test_steps_one_by_one_equal_the_scan_and_the_plain_rules(game):
    decisions, params = game
    with jax.enable_x64(True):
        assert_exactly(play(decisions, params), decisions, params)
        state = env.init(params)
        for decision, capital in zip(decisions, oracle(decisions, params)[0], strict=True):
            state, _ = env.step(state, decision, params)
            np.testing.assert_array_equal(state.capital, capital)
        assert int(state.round) == len(decisions)


@given(games(), st.permutations(range(WIDTH)))
def test_rewards_permute_with_agents(game, order):
    decisions, params = game
    order = np.array(order)
    with jax.enable_x64(True):
        capital, outcome = play(decisions, params)
        moved = params.replace(present=params.present[order], fixed=params.fixed[order])
        moved_capital, moved_outcome = play(decisions[:, order], moved)
    np.testing.assert_array_equal(moved_outcome.reward, outcome.reward[:, order])
    np.testing.assert_array_equal(moved_capital, capital[:, order])
    np.testing.assert_array_equal(moved_outcome.success, outcome.success)


@given(games(rounds=1), st.randoms(use_true_random=False))
def test_success_depends_on_the_count_alone(game, random):
    decisions, params = game
    with jax.enable_x64(True):
        _, outcome = play(decisions, params)
        assert bool(outcome.success[0]) == (int(outcome.count[0]) >= int(params.threshold))
        # Whoever else would choose the same number of times, with any payoffs, succeeds as often.
        others = decisions[0].copy()
        free = np.flatnonzero(params.present & ~params.fixed)
        others[free] = np.array(random.sample(others[free].tolist(), len(free)), int)
        _, again = play(others[None], params.replace(high=params.low, low=params.high, base=params.base + 1))
    assert (int(again.count[0]), bool(again.success[0])) == (int(outcome.count[0]), bool(outcome.success[0]))


@given(games())
def test_capital_is_the_product_of_the_factors(game):
    decisions, params = game
    params = params.replace(additive=np.bool_(False))
    with jax.enable_x64(True):
        capital, _ = play(decisions, params)
    chose = (decisions == 1) | params.fixed
    success = (chose & params.present).sum(1, keepdims=True) >= params.threshold
    factors = np.select(
        [success & (chose | params.everyone), chose & ~success], [params.high, params.low], float(params.normal)
    )
    unpaid = (decisions == 2) & ~params.fixed & ~params.unparsed_pays
    product = np.where(unpaid, 1.0, factors).prod(0)
    np.testing.assert_allclose(capital[-1], np.where(params.present, product, 0), rtol=1e-12)


@given(games(), st.integers(0, 2))
def test_padding_changes_nothing(game, rubbish):
    decisions, params = game
    agents = int(params.present.sum())
    tight = params.replace(present=params.present[:agents], fixed=params.fixed[:agents])
    noisy = params.replace(fixed=np.where(params.present, params.fixed, rubbish == 1))
    with jax.enable_x64(True):
        capital, outcome = play(np.where(params.present, decisions, rubbish), noisy)
        # Not compiled: there would be a program for each N.
        state = env.init(tight)
        for index, decision in enumerate(decisions[:, :agents]):
            state, expected = env.step(state, decision, tight)
            np.testing.assert_array_equal(capital[index, :agents], state.capital)
            np.testing.assert_array_equal(outcome.reward[index, :agents], expected.reward)
            assert int(outcome.count[index]) == int(expected.count)
            assert bool(outcome.success[index]) == bool(expected.success)
    assert not np.any(capital[:, agents:]) and not np.any(outcome.reward[:, agents:])


@pytest.mark.parametrize("agents", [2, 4096])
def test_the_smallest_and_the_largest_game(agents):
    decisions = np.random.default_rng(1).integers(0, 3, (3, 4096))
    for threshold in (1, agents // 2, agents):
        params = make(agents, threshold, width=4096)
        with jax.enable_x64(True):
            assert_exactly(play(decisions, params), decisions, params)
    everyone = np.ones((1, 4096), int)
    assert bool(play(everyone, make(agents, agents, width=4096))[1].success[0])
    everyone[0, agents - 1] = 0
    assert not bool(play(everyone, make(agents, agents, width=4096))[1].success[0])


def test_one_program_plays_every_number_of_agents_threshold_and_payoff():
    chex.clear_trace_counter()
    traced_once = jax.jit(chex.assert_max_traces(live, n=1))
    rng = np.random.default_rng(2)
    for agents in range(2, WIDTH + 1):
        for threshold in {1, agents // 2, agents}:
            params = make(
                agents, threshold, *rng.uniform(0.5, 2, 3), fixed=range(threshold // 2), additive=agents % 2 == 0,
                everyone=threshold % 2 == 0, unparsed_pays=agents % 3 == 0, dtype=np.float32,
            )  # fmt: skip
            decisions = rng.integers(0, 3, (3, WIDTH), dtype=np.int32)
            _, outcome = traced_once(decisions, params)
            np.testing.assert_array_equal(outcome.count, oracle(decisions, params)[2])


def reward(decisions, params):
    with jax.enable_x64(True):
        return play(np.array([decisions + [0] * (WIDTH - len(decisions))]), params)[1].reward[0, : len(decisions)]


def test_the_rules_one_by_one():
    up, down = 1.2 - 1.0, 0.8 - 1.0
    # A success pays everyone, or the colluders alone; a failure costs the colluders.
    np.testing.assert_array_equal(reward([1, 1, 0, 2], make(4, 2)), [up, up, up, up])
    np.testing.assert_array_equal(reward([1, 1, 0, 2], make(4, 2, everyone=False)), [up, up, 0, 0])
    np.testing.assert_array_equal(reward([1, 1, 0, 2], make(4, 3)), [down, down, 0, 0])
    # Unparsed: paid as the independent choice, or not at all; never counted.
    for normal in (1.0, 1.1):
        paid, not_paid = make(4, 2, normal=normal), make(4, 2, normal=normal, unparsed_pays=False)
        np.testing.assert_array_equal(reward([2, 2, 2, 1], paid), [normal - 1, normal - 1, normal - 1, down])
        np.testing.assert_array_equal(reward([2, 2, 2, 1], not_paid), [0, 0, 0, down])
        np.testing.assert_array_equal(reward([2, 1, 0, 1], not_paid), [0, up, up, up])
    # Fixed cooperators collude and are paid for it, whatever they said.
    np.testing.assert_array_equal(reward([0, 2, 0, 0], make(4, 3, fixed=[0, 1])), [down, down, 0, 0])
    np.testing.assert_array_equal(reward([0, 2, 1, 0], make(4, 3, fixed=[0, 1], everyone=False)), [up, up, up, 0])
    # Additive: the same every round, by the base.
    params = make(2, 1, additive=True, base=10)
    with jax.enable_x64(True):
        decisions = np.zeros((3, WIDTH), int)
        decisions[:, 0] = 1
        capital, outcome = play(decisions, params)
    np.testing.assert_allclose(outcome.reward[:, :2], 2, rtol=1e-12)
    np.testing.assert_allclose(capital[:, 0], [3, 5, 7], rtol=1e-12)


def test_rewards_follow_the_dtype_of_the_factors():
    _, outcome = play(jnp.ones((1, WIDTH), jnp.int32), make(3, 2, dtype=np.float32))
    chex.assert_type([outcome.reward, outcome.count, outcome.success], [jnp.float32, jnp.int32, bool])
