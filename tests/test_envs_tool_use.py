"""The accounting of tool use: a table worked out by hand, a plain Python reading of the rules, what always holds."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.envs import tool_use as env
from atp_jax.testbeds.types import exact

PAPER = (0.7, 0.2, 1.2, 5.0, 0.0)  # cost with the tool, without, reward simple, complex, of a wrong answer


def params(numbers=PAPER, dtype=jnp.float32) -> env.Params:
    return env.Params(*(jnp.asarray(number, dtype) for number in numbers))


def attempt(complex_, used, correct, present=True) -> env.Attempt:
    return env.Attempt(*(jnp.asarray(value, bool) for value in (complex_, used, correct, present)))


# complex, tool, correct -> reward, cost, net; the paper's numbers, then others with a punished mistake.
BY_HAND = [
    (PAPER, False, False, True, 1.2, 0.2, 1.0),
    (PAPER, False, True, True, 1.2, 0.7, 0.5),
    (PAPER, False, False, False, 0.0, 0.2, -0.2),
    (PAPER, False, True, False, 0.0, 0.7, -0.7),
    (PAPER, True, False, True, 5.0, 0.2, 4.8),
    (PAPER, True, True, True, 5.0, 0.7, 4.3),
    (PAPER, True, False, False, 0.0, 0.2, -0.2),
    (PAPER, True, True, False, 0.0, 0.7, -0.7),
    ((2.0, 0.0, 1.0, 3.0, -1.0), True, True, True, 3.0, 2.0, 1.0),
    ((2.0, 0.0, 1.0, 3.0, -1.0), True, False, False, -1.0, 0.0, -1.0),
    ((2.0, 0.0, 1.0, 3.0, -1.0), False, True, False, -1.0, 2.0, -3.0),
]


@pytest.mark.parametrize(("numbers", "complex_", "used", "correct", "reward", "cost", "net"), BY_HAND)
def test_the_table_worked_out_by_hand(numbers, complex_, used, correct, reward, cost, net):
    """To the last digit in float64, which is what the testbed pays in."""
    with exact():
        rules = params(numbers, jnp.float64)
        state, outcome = jax.jit(env.step)(env.init(rules), attempt(complex_, used, correct), rules)
        assert (float(outcome.reward), float(outcome.cost)) == (reward, cost)
        assert float(outcome.net) == reward - cost and float(outcome.net) == pytest.approx(net, abs=1e-12)
        assert outcome.net.dtype == jnp.float64 and float(state.payoff) == float(outcome.net)
    here = [0, 1] if complex_ else [1, 0]
    assert state.problems.tolist() == here
    assert state.tool_uses.tolist() == [used * n for n in here]
    assert state.correct.tolist() == [correct * n for n in here]


def test_a_round_of_the_papers_story():
    """Three simple problems answered at once, one of them wrongly, then a complex one with the tool."""
    rules = params()
    met = [(False, False, True), (False, False, False), (False, False, True), (True, True, True)]
    state = env.init(rules)
    for kind in met:
        state, _ = env.step(state, attempt(*kind), rules)
    assert state.problems.tolist() == [3, 1]
    assert state.tool_uses.tolist() == [0, 1]
    assert state.correct.tolist() == [2, 1]
    assert float(state.payoff) == pytest.approx(1.0 - 0.2 + 1.0 + 4.3)


def test_thousands_of_agents_at_once_equal_the_plain_rules():
    rng = np.random.default_rng(0)
    agents, problems = 2048, 9
    numbers = rng.uniform(-2, 6, (5, agents)).astype(np.float32)
    rules = env.Params(*map(jnp.asarray, numbers))
    flags = rng.integers(0, 2, (4, problems, agents)).astype(bool)

    @jax.jit
    def live(attempts):
        return jax.lax.scan(
            lambda state, one: jax.vmap(env.step)(state, one, rules), jax.vmap(env.init)(rules), attempts
        )

    state, outcome = live(env.Attempt(*map(jnp.asarray, flags)))
    for agent in rng.choice(agents, 64, replace=False):
        cost_tool, cost_plain, simple, complex_, wrong = numbers[:, agent]
        counts, payoff = np.zeros((3, 2), int), np.float32(0)
        for problem in range(problems):
            kind, used, correct, present = flags[:, problem, agent]
            reward = ((complex_ if kind else simple) if correct else wrong) if present else np.float32(0)
            cost = (cost_tool if used else cost_plain) if present else np.float32(0)
            assert outcome.reward[problem, agent] == reward and outcome.cost[problem, agent] == cost
            payoff += reward - cost
            if present:
                counts[:, int(kind)] += (1, used, correct)
        np.testing.assert_array_equal([state.problems[agent], state.tool_uses[agent], state.correct[agent]], counts)
        np.testing.assert_allclose(state.payoff[agent], payoff, rtol=1e-5, atol=1e-5)
    chex.assert_type([outcome.net, state.problems], [jnp.float32, jnp.int32])


numbers = st.tuples(*[st.floats(-10, 10, width=32)] * 5)
flags = st.tuples(*[st.booleans()] * 4)
step = jax.jit(env.step)


@given(numbers, st.lists(flags, max_size=6), flags)
def test_what_must_hold_whatever_happened_before(numbers, before, last):
    rules = params(numbers)
    state = env.init(rules)
    for one in before:
        state, _ = step(state, attempt(*one), rules)
    after, outcome = step(state, attempt(*last), rules)
    complex_, used, correct, present = last
    # Counts: nothing is used or right that was not met, and one problem moves one count by one.
    assert np.all(after.tool_uses <= after.problems) and np.all(after.correct <= after.problems)
    assert (after.problems - state.problems).tolist() == [present and not complex_, present and complex_]
    # What an outcome is does not depend on what was before.
    _, alone = step(env.init(rules), attempt(*last), rules)
    chex.assert_trees_all_equal(alone, outcome)
    # A problem that nobody met changes nothing.
    if not present:
        chex.assert_trees_all_equal(after, state)
        assert float(outcome.net) == 0
    # The tool changes the cost alone, the answer the reward alone.
    _, other = step(state, attempt(complex_, not used, correct, present), rules)
    assert float(other.reward) == float(outcome.reward)
    _, other = step(state, attempt(complex_, used, not correct, present), rules)
    assert float(other.cost) == float(outcome.cost)


@pytest.mark.parametrize(
    ("used", "correct", "reward"), [(False, False, 0.0), (False, True, 1.0), (True, False, 0.5), (True, True, 1.5)]
)
def test_what_grpo_pays(used, correct, reward):
    """The paper's 1[correct] + 0.5 * 1[tool], for simple and complex problems alike."""
    for complex_ in (False, True):
        assert float(env.training_reward(attempt(complex_, used, correct), 1.0, 0.5)) == reward
    assert float(env.training_reward(attempt(True, used, correct, present=False), 1.0, 0.5)) == 0.0
