"""Episodes: scenarios lived through round by round, every finished round of an episode on disk before its next begins.

Episodes run in the order of the scenarios, the samples of a scenario one after another, and are numbered from 0 in
every condition. All episodes of a condition, in the threshold game of several conditions of a model, go through a round
together, so that the policy answers them as one batch (`run_conditions`), or each goes on as soon as it can, so that
nobody waits for the longest answer of a round (`run_freely`).
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atp_jax.errors import UserError
from atp_jax.files import append, cut, mend, read, read_lines, remove
from atp_jax.policies.types import Answer, Policy, Request
from atp_jax.settings import Settings
from atp_jax.testbeds import testbed
from atp_jax.testbeds.types import Condition, Lives


@dataclass(frozen=True)
class Finished:
    """One round that ended: its records, whether they were read back, and how long it took; None where rounds are lived
    through side by side, or begun ahead."""

    condition: Condition
    round: int
    records: list[dict]
    read_back: bool
    seconds: float | None


def recover(path: Path, addresses: Sequence[tuple[int, int]], first: int = 1) -> list[list[dict]]:
    """The complete rounds of an `episodes.jsonl`, each a list with a record for each address (episode, agent); first:
    the number of the first round.

    Whatever follows them (a round that was being written when the run was killed, a torn line) is cut off the file, so
    that the next round can be appended.
    """
    data = read(path) or b""
    rounds: list[list[dict]] = []
    kept, end, current = 0, 0, []
    while (newline := data.find(b"\n", end)) >= 0:
        try:
            record = json.loads(data[end:newline])
            address = (record["round"], record["episode"], record["agent"])
        except (ValueError, KeyError, TypeError):
            break
        if address != (len(rounds) + first, *addresses[len(current)]):
            break
        current.append(record)
        end = newline + 1
        if len(current) == len(addresses):
            rounds.append(current)
            kept, current = end, []
    cut(path, kept)
    return rounds


def run_conditions(
    conditions: Sequence[Condition],
    scenarios: Sequence,
    policy: Policy,
    wording: dict,
    settings: Settings,
    paths: Sequence[Path],
    on_round: Callable[[Finished], None],
) -> list[list[dict]]:
    """Live through all rounds of these conditions, round by round and answered together, or through those that the
    `paths`, one a condition, do not hold yet.

    Returns all records of each condition, those read back and those appended to its path, in the order of the file;
    calls `on_round` after each round. Rounds read back are gone through again with the answers recorded, so that the
    histories, the states and what the policy remembers are those of a run that was never interrupted; UserError if this
    does not give the records that the file holds.
    """
    evolve = settings.evolve
    episodes = [scenario for scenario in scenarios for _ in range(evolve.samples)]
    lived = [testbed(settings).Lives(condition, episodes, wording, settings) for condition in conditions]
    first = testbed(settings).FIRST
    recovered = [recover(path, lives.addresses, first) for path, lives in zip(paths, lived, strict=True)]
    # A round that only some of them finished is answered again for all: what is answered together stays together.
    finished = min(len(rounds) for rounds in recovered)

    if evolve.ahead and finished < evolve.rounds + 1 - first:  # role-play, whose conditions live one at a time
        policy.foresee(lived[0].script)
    everything: list[list[dict]] = [[] for _ in conditions]
    for number in range(first, evolve.rounds + 1):
        ended: list[list[dict] | None] = [None] * len(lived)
        seconds, before = np.zeros(len(lived)), number - first < finished
        told = [
            {(record["episode"], record["agent"]): record for record in rounds[number - first]} if before else {}
            for rounds in recovered
        ]
        while None in ended:  # a round of one question each, or of as many as a testbed asks
            began = time.perf_counter()
            asking = [place for place, records in enumerate(ended) if records is None]
            asked = [lived[place].ask() for place in asking]
            requests = [request for part in asked for request in part]
            if not before:
                answers = policy.answer(requests)
            else:
                answers = [
                    _answer_of(told[place][request.episode, request.agent], request.turn)
                    for place, part in zip(asking, asked, strict=True)
                    for request in part
                ]
                if finished < evolve.rounds + 1 - first:
                    policy.recall(requests)
            end = 0
            for place, part in zip(asking, asked, strict=True):
                begin, end = end, end + len(part)
                ended[place] = lived[place].tell(answers[begin:end])
            seconds[asking] += (time.perf_counter() - began) * np.array([*map(len, asked)]) / len(requests)

        for place, (condition, records, path) in enumerate(zip(conditions, ended, paths, strict=True)):
            there = number - first < len(recovered[place])
            if not there:
                append(path, records)
            else:
                _check_same(records, recovered[place][number - first], path)
            everything[place] += records
            # Of a round that was begun ahead a part lies in the one before.
            on_round(Finished(condition, number, records, there, None if evolve.ahead else seconds[place]))
    return everything


class _Life:
    """One episode that goes its own way, and what its agents answered of what they are asked."""

    def __init__(self, lives: Lives):
        self._lives = lives
        self._requests: list[Request] = []
        self._answers: dict[int, Answer] = {}

    def ask(self) -> list[Request]:
        self._requests, self._answers = self._lives.ask(), {}
        return self._requests

    def hear(self, request: Request, answer: Answer) -> list[dict] | None:
        """The records of the round, once this answer ends it; else None."""
        self._answers[request.agent] = answer
        return self._lives.tell([self._answers[one.agent] for one in self._requests]) if self.heard else None

    @property
    def heard(self) -> bool:
        """Whether all that were asked have answered."""
        return len(self._answers) == len(self._requests)

    def relive(self, told: dict[int, dict]) -> list[dict]:
        """A round with the answers recorded, by agent."""
        records = None
        while records is None:
            for request in self.ask():
                records = self.hear(request, _answer_of(told[request.agent], request.turn))
        return records


def run_freely(
    conditions: Sequence[Condition],
    scenarios: Sequence,
    policy: Policy,
    wording: dict,
    settings: Settings,
    paths: Sequence[Path],
    on_round: Callable[[Finished], None],
    check: Callable[[], None],
) -> list[list[dict]]:
    """What `run_conditions` does, with the same answers, but every episode goes on to its next round (and to what it is
    asked within a round) as soon as its agents have answered.

    What an episode's round leaves goes into a `journal.jsonl` beside each path at once (which is taken away in the
    end), and to the path when the round is over for all; then `check` may raise whatever ends the run. A run that was
    interrupted goes on from the journal: other rows are answered together then, so log-probabilities may differ in the
    last digits, and in bfloat16 answers as well.
    """
    evolve, bed = settings.evolve, testbed(settings)
    episodes = [scenario for scenario in scenarios for _ in range(evolve.samples)]
    numbers = range(bed.FIRST, evolve.rounds + 1)
    books, lives = {}, {}
    for condition, path in zip(conditions, paths, strict=True):
        own = [bed.Lives(condition, [scenario], wording, settings, row) for row, scenario in enumerate(episodes)]
        books[condition.index] = _Book(condition, path, [life.addresses for life in own], numbers, on_round)
        lives |= {(condition.index, row): _Life(life) for row, life in enumerate(own)}

    first = []
    for (index, row), life in lives.items():
        book, number = books[index], numbers.start
        while number in numbers and (told := book.told(row, number)):
            book.enter(row, life.relive(told))
            number += 1
        if number in numbers:
            first += life.ask()
    for book in books.values():
        book.close_rounds()

    def follow(request: Request, answer: Answer) -> list[Request]:
        life, book = lives[request.condition, request.episode], books[request.condition]
        records = life.hear(request, answer)
        if records is not None:
            book.enter(request.episode, records)
            book.close_rounds()
            check()
        over = records is not None and request.round == numbers[-1]
        return life.ask() if life.heard and not over else []

    policy.pursue(first, follow)
    for book in books.values():
        remove(book.journal)
    return [book.everything for book in books.values()]


class _Book:
    """What is on disk of a condition whose episodes go their own ways."""

    def __init__(self, condition: Condition, path: Path, addresses: list[list], numbers: range, on_round: Callable):
        self.journal = path.with_name("journal.jsonl")
        self.everything: list[dict] = []  # the records of all rounds that are over
        self._condition, self._path, self._on_round = condition, path, on_round
        self._addresses = addresses  # of each episode's records
        self._entered: dict[int, dict[int, list[dict]]] = {number: {} for number in numbers}  # by round and episode
        self._first = self._now = numbers.start  # the latter: the round that is not over for all
        self._recovered = recover(path, [one for part in addresses for one in part], numbers.start)
        mend(self.journal)
        read = [record for records in self._recovered for record in records] + read_lines(self.journal)
        self._told = {(record["round"], record["episode"], record["agent"]): record for record in read}

    def told(self, episode: int, number: int) -> dict[int, dict]:
        """What an episode's agents answered in a round before the run was interrupted; nothing if not all had."""
        found = {agent: self._told.get((number, episode, agent)) for _, agent in self._addresses[episode]}
        return {} if None in found.values() else found

    def enter(self, episode: int, records: list[dict]) -> None:
        """A round of an episode is over."""
        number = records[0]["round"]
        if told := self.told(episode, number):
            _check_same(records, list(told.values()), self._path.parent)
        else:
            append(self.journal, records)
        self._entered[number][episode] = records

    def close_rounds(self) -> None:
        """Writes down the rounds that are over for all episodes."""
        while len(self._entered.get(self._now, ())) == len(self._addresses):
            by_episode = self._entered[self._now]
            records = [record for episode in range(len(self._addresses)) for record in by_episode[episode]]
            there = self._now - self._first < len(self._recovered)
            if not there:
                append(self._path, records)
            self.everything += records
            self._on_round(Finished(self._condition, self._now, records, there, None))
            self._now += 1


def _check_same(records: list[dict], told: list[dict], path: Path) -> None:
    if records != told:
        raise UserError(
            f"{path}: round {records[0]['round']} is not what this configuration gives: the scenarios, the wording or "
            "the program changed since; use another workdir"
        )


def _answer_of(record: dict, turn: int = 0) -> Answer:
    """An answer as it was recorded; of a round that took several, the one of this turn."""
    if "turns" not in record:
        return Answer(record["answer"], tuple(record["tokens"]), record["finish"], record["logprob"])
    said = record["turns"][turn]
    return Answer(
        said["answer"], tuple(said["tokens"]), said["finish"], said["logprob"], results=tuple(said["results"])
    )
