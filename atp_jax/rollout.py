"""Episodes: scenarios lived through round by round, every finished round on disk before the next begins.

Episodes run in the order of the scenarios, the samples of a scenario one after another, and are numbered from 0 in
every condition. All episodes of a condition, in the threshold game of several conditions of a model, go through a round
together, so that the policy answers them as one batch.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atp_jax.errors import UserError
from atp_jax.files import append, cut, read
from atp_jax.policies.types import Answer, Policy
from atp_jax.settings import Settings
from atp_jax.testbeds import testbed
from atp_jax.testbeds.types import Condition


@dataclass(frozen=True)
class Finished:
    """One round that ended: its records, whether they were read back, and how long answering took if not."""

    condition: Condition
    round: int
    records: list[dict]
    read_back: bool
    seconds: float


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

    everything: list[list[dict]] = [[] for _ in conditions]
    for number in range(first, evolve.rounds + 1):
        ended: list[list[dict] | None] = [None] * len(lived)
        seconds, before = np.zeros(len(lived)), number - first < finished
        told = [
            {(record["episode"], record["agent"]): record for record in rounds[number - first]} if before else {}
            for rounds in recovered
        ]
        while None in ended:  # a round of one question each, or of as many as a testbed asks
            asking = [place for place, records in enumerate(ended) if records is None]
            asked = [lived[place].ask() for place in asking]
            requests = [request for part in asked for request in part]
            began = time.perf_counter()
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
            spent, end = time.perf_counter() - began, 0
            for place, part in zip(asking, asked, strict=True):
                begin, end = end, end + len(part)
                seconds[place] += spent * len(part) / len(requests)
                ended[place] = lived[place].tell(answers[begin:end])

        for place, (condition, records, path) in enumerate(zip(conditions, ended, paths, strict=True)):
            there = number - first < len(recovered[place])
            if not there:
                append(path, records)
            elif records != recovered[place][number - first]:
                raise UserError(
                    f"{path}: round {number} is not what this configuration gives: the scenarios, the wording or the "
                    "program changed since; use another workdir"
                )
            everything[place] += records
            on_round(Finished(condition, number, records, there, seconds[place]))
    return everything


def _answer_of(record: dict, turn: int = 0) -> Answer:
    """An answer as it was recorded; of a round that took several, the one of this turn."""
    if "turns" not in record:
        return Answer(record["answer"], tuple(record["tokens"]), record["finish"], record["logprob"])
    said = record["turns"][turn]
    return Answer(
        said["answer"], tuple(said["tokens"]), said["finish"], said["logprob"], results=tuple(said["results"])
    )
