"""Answers read from a file: for tests, for comparison with other implementations, to see what an environment does."""

import collections
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from atp_jax.errors import UserError
from atp_jax.policies.types import Answer, Request

Address = tuple[int, int, int, int]  # episode, round, agent, turn


def _whole(row: dict, key: str, least: int, where: str, default: int | None = None) -> int:
    value = row.get(key, default)
    if value is None:
        raise UserError(f'{where}: key "{key}" is missing')
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f'{where}: "{key}" must be a whole number of at least {least}, not {value!r}')
    return value


def load_script(path: str | Path) -> dict[Address, Answer]:
    """Read JSON lines `{"episode": 0, "round": 1, "agent": 0, "answer": "..."}` (`agent` may be left out: 0, and
    so may `turn`, which counts the answers of a round that takes several, and `finish`: "length" for an answer that was
    cut off).

    Raises UserError with file and line for anything malformed, and for two answers to one question.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"policy.script: cannot read {path}: {error}") from error
    answers: dict[Address, Answer] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: must be an object with episode, round, agent and answer")
        address = (
            _whole(row, "episode", 0, where),
            _whole(row, "round", 0, where),
            _whole(row, "agent", 0, where, default=0),
            _whole(row, "turn", 0, where, default=0),
        )
        if not isinstance(row.get("answer"), str):
            raise UserError(f'{where}: "answer" must be a string')
        if address in answers:
            raise UserError(f"{where}: {_said(*address)} is answered twice")
        if row.get("finish", "stop") not in ("stop", "length"):
            raise UserError(f'{where}: "finish" must be "stop" or "length", not {row["finish"]!r}')
        answers[address] = Answer(row["answer"], finish=row.get("finish", "stop"))
    if not answers:
        raise UserError(f"policy.script: {path} holds no answers")
    return answers


class ScriptedPolicy:
    """Gives the answers of a script. Episodes count from 0 in the order they run, anew in every condition."""

    def __init__(self, path: str | Path):
        self.path = path
        self.answers = load_script(path)

    def require(self, episodes: int, rounds: int, agents: Sequence[int] = (0,), first: int = 1) -> None:
        """Raise UserError unless every answer that a condition of this size needs is there, in rounds of several
        answers the first of each. first: the number of the first round."""
        for address in itertools.product(range(episodes), range(first, rounds + 1), agents):
            self._answer(*address, 0)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return [self._answer(r.episode, r.round, r.agent, r.turn) for r in requests]

    def pursue(self, requests: Sequence[Request], follow: Callable[[Request, Answer], Sequence[Request]]) -> None:
        todo = collections.deque(requests)
        while todo:
            request = todo.popleft()
            todo.extend(follow(request, *self.answer([request])))

    def recall(self, requests: Sequence[Request]) -> None:
        """A script remembers nothing."""

    def foresee(self, script: Callable) -> None:
        """There is nothing to begin before it is asked."""

    def _answer(self, *address: int) -> Answer:
        try:
            return self.answers[address]
        except KeyError:
            raise UserError(f"{self.path}: no answer for {_said(*address)}") from None


def _said(episode: int, number: int, agent: int, turn: int) -> str:
    return f"episode {episode}, round {number}, agent {agent}" + (f", turn {turn}" if turn else "")
