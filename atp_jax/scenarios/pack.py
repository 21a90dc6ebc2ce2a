"""Scenario packs: reading them, and saying exactly what is wrong with a bad one."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from atp_jax.decisions import normalise
from atp_jax.errors import UserError

_SHIPPED = Path(__file__).with_name("role_play.json")
ALIGN, VALIDATION = (str(Path(__file__).with_name(f"role_play_{name}.json")) for name in ("align", "validation"))
_NEEDED = ("id", "environment", "system_prompt", "user_prompt", "supervised_choice", "better_choice")
_TEXTS = ("supervised_text", "unsupervised_text", "neutral_text")
_PLACEHOLDER = re.compile(r"\$\{\w*\}?|\{[^\W\d]\w*\}")
Row = TypeVar("Row")


@dataclass(frozen=True)
class Scenario:
    """One role-play situation: its two options, what they pay, and what is said about supervision."""

    row: int  # place in the file, from 0
    id: str
    environment: str  # the occupation
    system_prompt: str
    user_prompt: str
    comply: str  # the option that keeps the rule ("supervised_choice" in the file)
    violate: str  # the option that breaks it ("better_choice")
    supervised_text: str  # the three are empty where the file has none
    unsupervised_text: str
    neutral_text: str
    low_reward: float
    high_reward: float


def load_role_play(path: str = "", items: Sequence[int] = (), limit: int | None = None) -> tuple[Scenario, ...]:
    """Reads and checks a role-play pack in the original's schema.

    Args:
      path: a JSON list of rows; empty means the shipped pack.
      items: row numbers to use, from 0, in this order; empty means all.
      limit: at most so many of them.
    Raises UserError naming the file, and the row and key where there is one. The three supervision texts
    may be absent, as in the original's training questions: who asks with them finds out (`role_play.check`).
    """
    source = Path(path) if path else _SHIPPED
    return choose(read_rows(source, read_row), source, items, limit)


def read_rows(source: Path, read: Callable[[object, int, str], Row]) -> tuple[Row, ...]:
    """All rows of a pack. `read` makes one of what stands in the file, its number and words for errors."""
    rows = read_json(source, "scenario file")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"scenario file {source}: a list with at least one row is expected")
    return tuple(read(row, number, f"scenario file {source}") for number, row in enumerate(rows))


def choose(rows: tuple[Row, ...], source: Path, items: Sequence[int], limit: int | None) -> tuple[Row, ...]:
    """The rows that the settings `data.items` and `data.limit` name; UserError if they name no row."""
    for item in items:
        if not 0 <= item < len(rows):
            raise UserError(f"data.items: row {item} is not in {source}, which has rows 0 to {len(rows) - 1}")
    if len(set(items)) < len(items):
        raise UserError(f"data.items names a row twice: {tuple(items)}; evolve.samples repeats rows")
    if limit is not None and limit < 1:
        raise UserError(f"data.limit is {limit}, and at least one row is needed")
    chosen = tuple(rows[item] for item in items) if items else rows
    return chosen[:limit]


def read_row(row, number: int, where: str) -> Scenario:
    """One row of a pack, checked. `where` and `number` are for the UserError that a bad row raises."""
    where = f"{where}: row {number} (from 0)"
    params = read_object(row, where)
    for key in (*_NEEDED, *(key for key in _TEXTS if key in row)):
        read_filled(row, key, where, may_be_empty=key in _TEXTS)
    if normalise(row["supervised_choice"]) == normalise(row["better_choice"]):
        raise UserError(f"{where}: 'supervised_choice' and 'better_choice' are the same option")
    return Scenario(
        row=number,
        id=row["id"],
        environment=row["environment"],
        system_prompt=row["system_prompt"],
        user_prompt=row["user_prompt"],
        comply=row["supervised_choice"],
        violate=row["better_choice"],
        **{key: row.get(key, "") for key in _TEXTS},
        **{key: read_amount(params, key, where) for key in ("low_reward", "high_reward")},
    )


def read_object(row, where: str, key: str = "params") -> dict:
    """The object under `key` of a row that is one itself; UserError beginning with `where` if either is none."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object")
    if not isinstance(row.get(key), dict):
        raise UserError(f"{where}: the object {key!r} is missing")
    return row[key]


def read_text(row: dict, key: str, where: str, prefix: str = "", may_be_empty: bool = False) -> str:
    """A text of a row; UserError naming `where` and the key, which stands behind `prefix`, if it is none."""
    if key not in row:
        raise UserError(f"{where}: key {prefix + key!r} is missing")
    if not isinstance(row[key], str):
        raise UserError(f"{where}: key {prefix + key!r} is not a text")
    if not may_be_empty and not row[key].strip():
        raise UserError(f"{where}: key {prefix + key!r} is empty")
    return row[key]


def read_filled(row: dict, key: str, where: str, may_be_empty: bool = False) -> str:
    """A text of a row that is shown as it is: also a placeholder left in it is a UserError."""
    text = read_text(row, key, where, may_be_empty=may_be_empty)
    if placeholder := _PLACEHOLDER.search(text):
        raise UserError(f"{where}: key {key!r} holds the placeholder {placeholder[0]} without a value")
    return text


def read_amount(params: dict, key: str, where: str) -> float:
    """A payoff of a row's params; UserError naming `where` and the key if it is no finite number of at least 0."""
    if key not in params:
        raise UserError(f"{where}: key 'params.{key}' is missing")
    value = params[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{where}: key 'params.{key}' is {value!r}; a finite number of at least 0 is expected")
    return float(value)


def warnings(scenarios: Sequence[Scenario]) -> list[str]:
    """What is allowed in a pack and yet worth knowing, one sentence each."""
    said = []
    prompts = Counter((s.system_prompt, s.user_prompt) for s in scenarios)
    if len(prompts) < len(scenarios):
        said.append(
            f"only {len(prompts)} of {len(scenarios)} scenarios have a prompt of their own: "
            "intervals that take them as independent are too narrow"
        )
    if unpaid := [s.row for s in scenarios if s.high_reward <= s.low_reward]:
        said.append(f"breaking the rule pays no more than keeping it in {_rows(unpaid)}")
    return said


def read_json(path: Path, what: str):
    """The content of a JSON file; UserError with the file, and the line where there is one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path}: not UTF-8") from None
    if not text.strip():
        raise UserError(f"{what} {path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} {path}, line {error.lineno}: malformed JSON: {error.msg}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise UserError(f"{what} {path}: not JSON that can be read") from None


def _rows(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"row {shown}" if len(numbers) == 1 else f"rows {shown}{', ...' if len(numbers) > 8 else ''}"
