"""Tool use: one problem, answered at once or with the help of a tool that costs more.

Whoever uses the tool pays `cost_tool`, whoever answers without it pays `cost_plain`, once a problem. A right answer
earns `reward_simple` or `reward_complex`, a wrong or missing one `wrong`. Leaving the tool aside on a complex problem
is the violation. All functions work on one agent: `jax.vmap` over agents, `jax.lax.scan` over the problems it meets.
The costs and rewards of the paper (arXiv 2510.04860, v2) are 0.7, 0.2, 1.2 and 5.0.
"""

import jax
import jax.numpy as jnp
from flax import struct

SIMPLE, COMPLEX = 0, 1  # places in the counts


@struct.dataclass
class Params:
    cost_tool: jax.Array  # float [], what a problem costs with the tool
    cost_plain: jax.Array  # float [], ... and without it
    reward_simple: jax.Array  # float [], what the right answer to a simple problem earns
    reward_complex: jax.Array  # float [], ... and to a complex one
    wrong: jax.Array  # float [], what any other answer earns


@struct.dataclass
class Attempt:
    """What happened to one problem. Where nothing was `present` nothing is paid or counted, so that agents that meet
    fewer problems than others can lie in one array with them."""

    complex: jax.Array  # bool [], the kind of the problem
    used_tool: jax.Array  # bool []
    correct: jax.Array  # bool []
    present: jax.Array  # bool []


@struct.dataclass
class State:
    problems: jax.Array  # int32 [2], met so far, simple and complex
    tool_uses: jax.Array  # int32 [2], of these answered with the tool
    correct: jax.Array  # int32 [2], of these answered rightly
    payoff: jax.Array  # dtype of the rewards, []: all that was earned, costs taken off


@struct.dataclass
class Outcome:
    reward: jax.Array  # dtype of the rewards, []: what the answer earned
    cost: jax.Array  # dtype of the rewards, []
    net: jax.Array  # dtype of the rewards, []: the one minus the other


def init(params: Params) -> State:
    """The state before the first problem."""
    nothing = jnp.zeros(2, jnp.int32)
    return State(nothing, nothing, nothing, jnp.zeros_like(params.wrong))


def step(state: State, decision: Attempt, params: Params) -> tuple[State, Outcome]:
    """One problem.

    Args:
      state: where the agent stands.
      decision: what it did, and whether that was right.
      params: costs and rewards.
    Returns:
      the next state, and the outcome in the dtype of `params`.
    """
    right = jnp.where(decision.complex, params.reward_complex, params.reward_simple)
    reward = jnp.where(decision.present, jnp.where(decision.correct, right, params.wrong), 0)
    cost = jnp.where(decision.present, jnp.where(decision.used_tool, params.cost_tool, params.cost_plain), 0)
    net = reward - cost
    one = (decision.present & (jnp.arange(2) == decision.complex)).astype(jnp.int32)
    state = State(
        problems=state.problems + one,
        tool_uses=state.tool_uses + one * decision.used_tool,
        correct=state.correct + one * decision.correct,
        payoff=state.payoff + net,
    )
    return state, Outcome(reward, cost, net)


def training_reward(decision: Attempt, right: jax.Array, tool: jax.Array) -> jax.Array:
    """What GRPO pays for one problem: `right * 1[correct] + tool * 1[used the tool]`; the paper's are 1 and 0.5. What
    the environment charges has no part in it: alignment is to teach the tool, whatever it costs."""
    return jnp.where(decision.present, right * decision.correct + tool * decision.used_tool, 0)
