"""Packs of threshold games: reading them in the original's two schemas, and saying what is wrong with a bad one.

A *template* leaves the number of agents, the threshold and the payoffs open: a grid of cells fills them in. A
*question* has them filled in already, rules of its own, and is what alignment trains on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atp_jax.decisions import normalise
from atp_jax.errors import UserError
from atp_jax.scenarios.pack import choose, read_amount, read_filled, read_object, read_rows, read_text
from atp_jax.scenarios.wording import check_fields

SHIPPED = Path(__file__).with_name("threshold_game.json")
ALIGN, VALIDATION = (str(Path(__file__).with_name(f"threshold_game_{name}.json")) for name in ("align", "validation"))
PLACEHOLDERS = frozenset(
    ("n", "cooperation_threshold", "high_reward", "normal_reward", "low_reward")
    + ("delta_high", "delta_normal", "delta_low")
)
FEWEST, MOST = 2, 4096  # agents of a game


@dataclass(frozen=True)
class Rules:
    """What a question fixes and a cell of the grid fills in."""

    agents: int
    threshold: int  # how many must collude for a success
    high: float  # what capital is multiplied by after a success,
    normal: float  # ... for staying independent,
    low: float  # ... for a collusion that failed


@dataclass(frozen=True)
class Game:
    """One situation in words. Its texts are templates for `wording.fill`, those of a question without any field."""

    row: int  # place in the file, from 0
    environment: str
    collective: str  # the option that colludes: the violation
    independent: str  # the other: compliance
    system: str
    multiplicative: str  # what is asked each round when the payoffs multiply the capital
    additive: str  # ... and when they add to it; empty for a question
    fixed: Rules | None  # the rules of a question


def load_games(path: str = "", items: Sequence[int] = (), limit: int | None = None) -> tuple[Game, ...]:
    """Reads and checks a pack of threshold games in either of the original's schemas, told apart row by row.

    Args:
      path: a JSON list of rows; empty means the shipped templates.
      items: row numbers to use, from 0, in this order; empty means all.
      limit: at most so many of them.
    Raises UserError naming the file, and the row, key and placeholder where there is one.
    """
    source = Path(path) if path else SHIPPED
    return choose(read_rows(source, read_game), source, items, limit)


def read_game(row, number: int, where: str) -> Game:
    """One row of a pack, checked: a template if it has a "template", else a question."""
    where = f"{where}: row {number} (from 0)"
    return (_template if isinstance(row, dict) and "template" in row else _question)(row, number, where)


def check_rules(
    agents: int, threshold: int, high: float, normal: float, low: float, allow_pointless: bool = False
) -> list[str]:
    """What makes this another game than the paper's, one sentence each.

    Raises UserError for rules that make no game, and unless `allow_pointless` for those under which no success pays.
    """
    paid = f"payoffs high {high:g}, normal {normal:g}, low {low:g}"
    if not FEWEST <= agents <= MOST:
        raise UserError(f"a game of {agents} agents: {FEWEST} to {MOST} are expected")
    if not 1 <= threshold <= agents:
        raise UserError(f"a threshold of {threshold} in a game of {agents} agents: 1 to {agents} is expected")
    if not all(0 <= value < math.inf for value in (high, normal, low)):
        raise UserError(f"{paid}: finite numbers of at least 0 are expected")
    said = []
    if high <= normal:
        if not allow_pointless:
            raise UserError(f"{paid}: high is not above normal, so that colluding never pays; set game.allow_pointless")
        said.append(f"{paid}: high is not above normal, so that colluding never pays")
    if low >= normal:
        said.append(f"{paid}: low is not below normal, so that a collusion that fails costs nothing")
    return said


def _template(row: dict, number: int, where: str) -> Game:
    template = read_object(row, where, "template")
    texts = {}
    for key in ("system_prompt", "user_prompt_mult", "user_prompt_add"):
        texts[key] = read_text(template, key, where, "template.")
        check_fields(texts[key], PLACEHOLDERS, f"{where}: 'template.{key}'")
    return Game(
        row=number,
        environment=read_text(row, "environment", where),
        **_options(template, "collective_choice", where, "template."),
        system=texts["system_prompt"],
        multiplicative=texts["user_prompt_mult"],
        additive=texts["user_prompt_add"],
        fixed=None,
    )


def _question(row, number: int, where: str) -> Game:
    params = read_object(row, where)
    system, prompt = (_literal(read_filled(row, key, where)) for key in ("system_prompt", "user_prompt"))
    payoffs = {name: read_amount(params, f"{name}_reward", where) for name in ("high", "normal", "low")}
    counts = {
        name: _count(params, key, where) for name, key in (("agents", "n"), ("threshold", "cooperation_threshold"))
    }
    rules = Rules(**counts, **payoffs)
    try:
        # What is only worth a warning, or allowed by a setting, is not for the loader to judge.
        check_rules(**vars(rules), allow_pointless=True)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Game(
        row=number,
        environment=read_text(row, "environment", where),
        **_options(row, "cooperative_choice", where),
        system=system,
        multiplicative=prompt,
        additive="",
        fixed=rules,
    )


def _options(row: dict, collective: str, where: str, prefix: str = "") -> dict[str, str]:
    names = {
        "collective": read_text(row, collective, where, prefix),
        "independent": read_text(row, "independent_choice", where, prefix),
    }
    if normalise(names["collective"]) == normalise(names["independent"]):
        raise UserError(f"{where}: {prefix + collective!r} and {prefix + 'independent_choice'!r} are the same option")
    return names


def _count(params: dict, key: str, where: str) -> int:
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}: key 'params.{key}' is {value!r}; a whole number is expected")
    return value


def _literal(text: str) -> str:
    """A template that is filled to this text."""
    return text.replace("{", "{{").replace("}", "}}")
