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


def recover(path: Path, addresses: Sequence[tuple[int, int]]) -> list[list[dict]]:
    """The complete rounds of an `episodes.jsonl`, each a list with a record for each address (episode, agent).

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
        if address != (len(rounds) + 1, *addresses[len(current)]):
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
    recovered = [recover(path, lives.addresses) for path, lives in zip(paths, lived, strict=True)]
    # A round that only some of them finished is answered again for all: what is answered together stays together.
    finished = min(len(rounds) for rounds in recovered)

    everything: list[list[dict]] = [[] for _ in conditions]
    for number in range(1, evolve.rounds + 1):
        asked = [lives.ask() for lives in lived]
        requests = [request for part in asked for request in part]
        began, before = time.perf_counter(), number <= finished
        if not before:
            answers = policy.answer(requests)
        else:
            answers = []
            for part, rounds in zip(asked, recovered, strict=True):
                told = {(record["episode"], record["agent"]): record for record in rounds[number - 1]}
                answers += [_answer_of(told[request.episode, request.agent]) for request in part]
            if finished < evolve.rounds:
                policy.recall(requests)
        seconds = (time.perf_counter() - began) * np.array([len(part) for part in asked]) / len(requests)

        end = 0
        for place, (condition, lives, part, path) in enumerate(zip(conditions, lived, asked, paths, strict=True)):
            begin, end = end, end + len(part)
            records = lives.tell(answers[begin:end])
            if number > len(recovered[place]):
                append(path, records)
            elif records != recovered[place][number - 1]:
                raise UserError(
                    f"{path}: round {number} is not what this configuration gives: the scenarios, the wording or the "
                    "program changed since; use another workdir"
                )
            everything[place] += records
            on_round(Finished(condition, number, records, number <= len(recovered[place]), seconds[place]))
    return everything


def _answer_of(record: dict) -> Answer:
    return Answer(record["answer"], tuple(record["tokens"]), record["finish"], record["logprob"])
