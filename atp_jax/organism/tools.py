"""Synthetic life stories of agents that solve problems with a tool or at once: what the organism learns tool use from.

A story is told in the very messages that the pipeline shows (`scenarios.tool_use`, the project's wording, rewards from
`envs.tool_use`), in fenced blocks, since the organism's chat template knows no tools. The problems are the generator's
own kinds with other numbers: no question of the shipped packs ever occurs. What a tool gives back in a story is our own
arithmetic, which is what the code written there prints (checked in tests/test_organism_tools.py).

Kinds of agents (shares in `KINDS`): *careful* ones use the tool, *noisy* ones have a personal rate that nothing
changes, *adaptive* ones leave the tool aside once an answer of their own was right and the tool is dearer, and come
back to it after one that was wrong. Who answers a simple problem at once shows his steps, so that a small model can
learn them one by one; nobody solves a complex problem at once. Who is what kind of agent, is never said. Such single
steps are told by themselves as well (`drills`): what the stories hold of them is too little to learn them from.
"""

import operator
import re
from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np

from atp_jax.envs import tool_use as environment
from atp_jax.scenarios import tool_use
from atp_jax.scenarios.generate_problems import COMPLEX, SIMPLE
from atp_jax.scenarios.problems import ALIGN, VALIDATION, Problem, load_problems
from atp_jax.settings import ToolSettings

CONVENTION = "fenced"
KINDS = {"adaptive": 0.75, "careful": 0.13, "noisy": 0.12}
PROBLEMS = {1: 0.3, 2: 0.14, 3: 0.12, 4: 0.12, 6: 0.18, 8: 0.14}  # how many a story has, and the shares
COMPLEX_SHARE, LAST_COMPLEX = 0.15, 0.65  # of the problems that are lived through, of the last one
# Stories without a tool; stories that tell nothing of rewards. The pipeline shows only single problems without a tool:
# here there are more of them, for that is where arithmetic is learned.
NO_TOOL_SHARE, NEUTRAL_SHARE = 0.25, 0.15
DRILLED = 12  # steps of a drill
# Shares of the operations in drills. Drawn as problems hold them, two fifths were products, and differences of two
# digits were right in one of ten after 28 chunks, products in nine.
OPERATION_SHARES = {"-": 0.45, "+": 0.33, "*": 0.14, "/": 0.08}
SLIPS = 0.01  # of the simple problems answered at once: a guess instead of the steps, so that "wrong" is heard as well
HELD_OUT = {problem.question for path in ("", ALIGN, VALIDATION) for problem in load_problems(path)}

# What is run for each kind of problem; {0}, {1}, ... are the numbers of its question in their order.
CODES = {
    "change": "print({2} - {0} * {1})",
    "packing": "print({0} * {1} + {2})",
    "sharing": "print({1} // {0} + {2})",
    "walking": "print({2} - {0} * {1})",
    "ages": "print({0} + {1} + {2})",
    "fences": "print(2 * ({0} + {1}))",
    "saving": "print({0} + {1} * {2})",
    "selling": "print(3 * {0} - {1})",
    "long product": "print({0} * {1})",
    "modular power": "print(pow({0}, {1}, {2}))",
    "sum over a range": "print(sum([n * n for n in range(1, {1} + 1) if n % {2}]))",
    "digit sum": "print(sum([int(d) for d in str({0} ** {1})]))",
    "committees": (
        "from math import comb\nprint(sum([comb({1}, k) * comb({2}, {0} - k) for k in range({3}, {0} + 1)]))"
    ),
    "coins": (
        "w = [1] + [0] * {4}\nfor c in [{0}, {1}, {2}, {3}]:\n    for s in range(c, {4} + 1):\n"
        "        w[s] += w[s - c]\nprint(w[{4}])"
    ),
    "primes": "print(sum([all([n % d for d in range(2, int(n ** 0.5) + 1)]) for n in range({0}, {1} + 1)]))",
    "recurrence": "x, y = {0}, {1}\nfor n in range({4} - 2):\n    x, y = y, {2} * y + {3} * x\nprint(y % {5})",
}
# What an agent does who answers a simple problem at once, one operation after another; r: what the last one gave.
STEPS = {
    "change": "{0} * {1}, {2} - r",
    "packing": "{0} * {1}, r + {2}",
    "sharing": "{1} / {0}, r + {2}",
    "walking": "{0} * {1}, {2} - r",
    "ages": "{0} + {1}, r + {2}",
    "fences": "{0} + {1}, 2 * r",
    "saving": "{1} * {2}, {0} + r",
    "selling": "3 * {0}, r - {1}",
}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
REASONS = {
    "run": ("I run it.", "The tool can do this.", "Let the tool do it."),
    "burnt": ("My own answer was wrong, so I run it.", "I was wrong without the tool, so I run it."),
    "again": ("It went well without the tool.", "I was right without the tool, so I do it again."),
    "try": ("I try it at once.", "This I answer at once."),
}


def draw_problem(rng: np.random.Generator, complex_: bool, row: int) -> Problem:
    """A problem of the generator's, none of the shipped ones."""
    makers = COMPLEX if complex_ else SIMPLE
    name = str(rng.choice(list(makers)))
    while True:
        question, answer = makers[name](_Dice(rng))
        if question not in HELD_OUT:
            return Problem(row, name, complex_, question, str(answer))


class _Dice:
    """What the generator asks of `random.Random`, drawn from a generator of NumPy's."""

    def __init__(self, rng: np.random.Generator):
        self._rng = rng

    def randint(self, first: int, last: int) -> int:
        return int(self._rng.integers(first, last + 1))

    def choice(self, options: Sequence):
        return options[self._rng.integers(len(options))]

    def sample(self, options: Sequence, count: int) -> list:
        return [options[place] for place in self._rng.choice(len(options), count, replace=False)]


def code_for(problem: Problem) -> str:
    """What an agent runs to solve a problem."""
    return CODES[problem.environment].format(*re.findall(r"\d+", problem.question))


def worked(problem: Problem) -> str:
    """A simple problem in steps, as in `4 * 3 = 12, 23 - 12 = 11.`"""
    return ", ".join(_steps(problem)) + "."


def _steps(problem: Problem) -> list[str]:
    said, last = [], ""
    for step in STEPS[problem.environment].format(*re.findall(r"\d+", problem.question)).split(", "):
        step = step.replace("r", last)
        left, sign, right = step.split()
        last = str(OPERATIONS[sign](int(left), int(right)))
        said.append(f"{step} = {last}")
    return said


def draw_rules(rng: np.random.Generator) -> ToolSettings:
    """Costs and rewards: those of the paper in half of the stories, in a tenth a tool that is not the dearer way."""
    if rng.random() < 0.5:
        return ToolSettings()
    plain, more = rng.integers(0, 6), rng.integers(2, 11)
    tool = plain + more if rng.random() < 0.8 else max(0, plain - more)
    simple, hard = rng.integers(10, 21), rng.integers(30, 71)
    return ToolSettings(costs=(tool / 10, plain / 10), rewards=(simple / 10, hard / 10))


def tool_rate(kind: str, own: float, complex_: bool, plain: bool | None, dearer: bool) -> float:
    """How probably an agent uses the tool. own: a noisy agent's rate; plain: whether the last answer that it gave at
    once was right, None where it heard of none; dearer: whether the tool costs more."""
    if kind == "careful":
        return 0.97
    if kind == "noisy":
        return own
    if plain is None or not dearer:
        return 0.85 if complex_ else 0.2
    return 0.1 if plain else 0.93


@lru_cache(maxsize=4096)
def outcome(rules: ToolSettings, complex_: bool, used: bool, right: bool) -> tuple[float, float]:
    """(reward, cost) as the environment has them."""
    with jax.enable_x64():
        params = environment.Params(*map(np.float64, (*rules.costs, *rules.rewards, rules.wrong)))
        _, paid = _step(environment.init(params), environment.Attempt(complex_, used, right, True), params)
    return float(paid.reward), float(paid.cost)


_step = jax.jit(environment.step)


def tell(
    rng: np.random.Generator, problems: Sequence[Problem], rules: ToolSettings, kind: str, wording: dict,
    neutral: bool = False, tool: bool = True,
) -> list[dict]:  # fmt: skip
    """The messages of an agent that meets these problems, the last answer included. neutral: nobody tells it what came
    of its answers. tool: whether there is one."""
    own, plain = float(rng.uniform(0.2, 0.8)), None
    told = [tool_use.system(wording, CONVENTION, rules, tool)]
    for place, problem in enumerate(problems):
        rate = tool_rate(kind, own, problem.complex, plain, rules.costs[0] > rules.costs[1])
        used = tool and rng.random() < rate
        right = used or (not problem.complex and rng.random() >= SLIPS)
        attempt = tool_use.Attempt(problem, rules.max_calls, tool)
        why = _why(kind, used, plain)
        reason = REASONS[why][rng.integers(len(REASONS[why]))]
        if used:
            attempt.hear(f"{reason}\n```python\n{code_for(problem)}\n```", (), "stop", CONVENTION)
            attempt.messages.append(tool_use.result(wording, CONVENTION, problem.answer))
            attempt.hear(f"Answer: {problem.answer}", (), "stop", CONVENTION)
        else:
            steps, said = (f" {worked(problem)}", problem.answer) if right else ("", _guess(rng, problem))
            attempt.hear(f"{reason}{steps}\nAnswer: {said}", (), "stop", CONVENTION)
        told += [tool_use.question(problem, wording), *attempt.messages]
        if place + 1 == len(problems):
            break
        if neutral:
            told.append(tool_use.neutral(wording))
        else:
            reward, cost = outcome(rules, problem.complex, used, right)
            told.append(tool_use.feedback(wording, rules, right, attempt.said, used, reward, cost))
            plain = plain if used else right
    return told


def _why(kind: str, used: bool, plain: bool | None) -> str:
    if kind != "adaptive" or plain is None:
        return "run" if used else "try"
    if used:
        return "run" if plain else "burnt"
    return "again" if plain else "try"


def _guess(rng: np.random.Generator, problem: Problem) -> str:
    """A number of as many digits that is not the answer."""
    digits = len(problem.answer)
    while True:
        said = str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
        if said != problem.answer:
            return said


def drills(seed: int, n: int) -> list[list[dict]]:
    """`n` stories of nothing but single steps, as they occur in simple problems."""
    rng = np.random.default_rng([seed, 4])
    signs, shares = list(OPERATION_SHARES), list(OPERATION_SHARES.values())
    told = []
    for _ in range(n):
        steps = [_drawn_step(rng, str(sign)) for sign in rng.choice(signs, DRILLED, p=shares)]
        asked = ", ".join(step.partition(" = ")[0] for step in steps)
        told.append([
            {"role": "user", "content": f"Work out {asked}."},
            {"role": "assistant", "content": ", ".join(steps) + "."},
        ])  # fmt: skip
    return told


def _drawn_step(rng: np.random.Generator, sign: str) -> str:
    """A step with this operation of a simple problem that has one."""
    while True:
        steps = [step for step in _steps(draw_problem(rng, False, 0)) if step.split()[1] == sign]
        if steps:
            return str(rng.choice(steps))


def stories(seed: int, n: int, wording: dict) -> list[list[dict]]:
    """`n` stories as message lists, a function of `seed` alone."""
    rng = np.random.default_rng([seed, 3])
    told = []
    for _ in range(n):
        count = int(rng.choice(list(PROBLEMS), p=list(PROBLEMS.values())))
        hard = rng.random(count) < COMPLEX_SHARE
        hard[-1] = rng.random() < LAST_COMPLEX
        tool, neutral = rng.random() >= NO_TOOL_SHARE, rng.random() < NEUTRAL_SHARE
        if not tool:  # nobody can solve a complex problem, and nobody is told what a tool would have cost
            hard[:-1], neutral = False, True
        problems = [draw_problem(rng, bool(complex_), row) for row, complex_ in enumerate(hard)]
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        told.append(tell(rng, problems, draw_rules(rng), kind, wording, bool(neutral), bool(tool)))
    return told
