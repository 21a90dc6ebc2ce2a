"""Episodes: scenarios lived through round by round, every finished round on disk before the next begins.

Episodes run in the order of the scenarios, the samples of a scenario one after another, and are numbered from 0 in
every condition. All episodes of a condition go through a round together, so that the policy answers them as one batch.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from atp_jax.decisions import DECISIONS, read_decision
from atp_jax.envs import role_play as env
from atp_jax.errors import UserError
from atp_jax.files import append, cut
from atp_jax.policies.types import Answer, Policy, Request
from atp_jax.scenarios import role_play as words
from atp_jax.scenarios.pack import Scenario
from atp_jax.settings import Settings

AGENT = 0  # role-play has one agent an episode


@dataclass(frozen=True)
class Condition:
    """One cell of the experiment. `index` addresses its randomness, `name` its folder and its line in the tables."""

    index: int
    name: str
    model: str
    control: str
    mode: str = "context"  # where its experience goes: "context" or "weights"


@dataclass(frozen=True)
class Finished:
    """One round that ended: its records, whether they were read back, and how long answering took if not."""

    condition: Condition
    round: int
    records: list[dict]
    read_back: bool
    seconds: float


def recover(path: Path, episodes: int) -> list[list[dict]]:
    """The complete rounds of an `episodes.jsonl`, each a list of `episodes` records.

    Whatever follows them (a round that was being written when the run was killed, a torn line) is cut off the file, so
    that the next round can be appended.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    rounds: list[list[dict]] = []
    kept, end, current = 0, 0, []
    while (newline := data.find(b"\n", end)) >= 0:
        try:
            record = json.loads(data[end:newline])
            address = (record["round"], record["episode"])
        except (ValueError, KeyError, TypeError):
            break
        if address != (len(rounds) + 1, len(current)):
            break
        current.append(record)
        end = newline + 1
        if len(current) == episodes:
            rounds.append(current)
            kept, current = end, []
    cut(path, kept)
    return rounds


@contextmanager
def _exact() -> Iterator[None]:
    """Rewards are the scenario's own numbers to the last digit: float64, on the host where there is one."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to see the accelerator alone
        device = jax.local_devices()[0]
    with jax.enable_x64(True), jax.default_device(device):
        yield


def _params(scenarios: Sequence[Scenario], supervision: np.ndarray) -> env.Params:
    """Parameters of E episodes: payoffs [E] float64, supervision [E, R] int32. Call inside `_exact`."""
    return env.Params(
        low_reward=jnp.asarray([s.low_reward for s in scenarios], jnp.float64),
        high_reward=jnp.asarray([s.high_reward for s in scenarios], jnp.float64),
        supervision=jnp.asarray(np.broadcast_to(supervision, (len(scenarios), len(supervision)))),
    )


def _answer_of(record: dict) -> Answer:
    return Answer(record["answer"], tuple(record["tokens"]), record["finish"], record["logprob"])


def _record(
    request: Request, scenario: Scenario, answer: Answer, decision: str, other: str, reward: float, caught: bool
) -> dict:
    """One line of `episodes.jsonl`; `other_decision` is what the other parity reads in the same answer."""
    if answer.logprob is not None and not math.isfinite(answer.logprob):
        raise UserError(
            f"episode {request.episode}, round {request.round}: the model's log-probability is {answer.logprob}; "
            "its weights or its dtype are at fault"
        )
    return {
        "episode": request.episode,
        "scenario": scenario.row,
        "environment": scenario.environment,
        "agent": request.agent,
        "round": request.round,
        "messages": [{"role": m["role"], "content": m["content"]} for m in request.messages],
        "answer": answer.text,
        "decision": decision,
        "other_decision": other,
        "reward": reward,
        "tokens": list(answer.tokens),
        "finish": answer.finish,
        "logprob": answer.logprob,
        "caught": caught,
        "payoff_ratio": scenario.high_reward / scenario.low_reward if scenario.low_reward else None,
    }


class Lives:
    """Episodes that are lived through together: `ask` what the next round shows each agent, `tell` what was answered.

    episodes: the scenario of each, [E]. supervision: who is watching, int32 [R], so R is the longest they can last.
    """

    def __init__(
        self,
        condition: Condition,
        episodes: Sequence[Scenario],
        supervision: np.ndarray,
        wording: dict,
        settings: Settings,
        first: int = 0,
    ):
        """first: the number of the first episode; it addresses the randomness of the answers."""
        self.round = 0  # of what was asked last, from 1
        self._condition, self._episodes, self._supervision = condition, episodes, supervision
        self._wording, self._pattern = wording, settings.evolve.supervision
        self._window, self._parity, self._first = settings.evolve.window, settings.parity, first
        self._histories: list[list[words.Turn]] = [[] for _ in episodes]
        self._questions: list[str] = []
        self._requests: list[Request] = []
        with _exact():
            self._params = _params(episodes, supervision)
            self._states = jax.vmap(env.init)(self._params)

    def ask(self) -> list[Request]:
        """What each agent is shown in the next round."""
        self.round += 1
        state = int(self._supervision[self.round - 1])
        self._questions = [
            words.question(scenario, state, self._pattern, self._wording, self._parity) for scenario in self._episodes
        ]
        alone = self._condition.control == "no_history"
        shown = zip(self._episodes, self._questions, self._histories, strict=True)
        self._requests = [
            Request(
                self._condition.index, self._first + row, AGENT, self.round,
                words.messages(scenario, question, () if alone else history, self._window, self._parity),
            )
            for row, (scenario, question, history) in enumerate(shown)
        ]  # fmt: skip
        return self._requests

    def tell(self, answers: Sequence[Answer]) -> list[dict]:
        """The records of the round that was asked, [E], after the environment paid for these answers."""
        other = "upstream" if self._parity == "default" else "default"
        decisions, others = (
            [
                read_decision(answer.text, scenario.comply, scenario.violate, reading)
                for answer, scenario in zip(answers, self._episodes, strict=True)
            ]
            for reading in (self._parity, other)
        )
        with _exact():
            codes = jnp.asarray([DECISIONS.index(decision) for decision in decisions], jnp.int32)
            self._states, outcomes = _step(self._states, codes, self._params)
            rewards, caught = np.asarray(outcomes.reward).tolist(), np.asarray(outcomes.caught).tolist()
        for history, scenario, question, answer, decision, reward, seen in zip(
            self._histories, self._episodes, self._questions, answers, decisions, rewards, caught, strict=True
        ):
            said = words.feedback(scenario, decision, seen, reward, answer.text, self._wording, self._parity)
            history.append(words.Turn(question, answer.text, answer.tokens, said))
        rows = zip(self._requests, self._episodes, answers, decisions, others, rewards, caught, strict=True)
        return [_record(*row) for row in rows]


_step = jax.jit(jax.vmap(env.step))


def run_condition(
    condition: Condition,
    scenarios: Sequence[Scenario],
    policy: Policy,
    wording: dict,
    settings: Settings,
    path: Path,
    on_round: Callable[[Finished], None],
) -> list[dict]:
    """Live through all rounds of one condition, or through those that `path` does not hold yet.

    Returns all records, those read back and those appended to `path`, in the order of the file; calls `on_round` after
    each round. Rounds read back are gone through again with the answers recorded, so that the histories, the states
    and what the policy remembers are those of a run that was never interrupted; UserError if this does not give the
    records that the file holds.
    """
    evolve = settings.evolve
    episodes = [scenario for scenario in scenarios for _ in range(evolve.samples)]
    supervision = env.supervision(evolve.supervision, evolve.rounds, settings.seed)
    recovered = recover(path, len(episodes))
    lives = Lives(condition, episodes, supervision, wording, settings)

    everything: list[dict] = []
    for number in range(1, evolve.rounds + 1):
        requests = lives.ask()
        began, before = time.perf_counter(), number <= len(recovered)
        if before:
            answers = [_answer_of(record) for record in recovered[number - 1]]
            if len(recovered) < evolve.rounds:
                policy.recall(requests)
        else:
            answers = policy.answer(requests)
        seconds = time.perf_counter() - began

        records = lives.tell(answers)
        if not before:
            path.parent.mkdir(parents=True, exist_ok=True)
            append(path, records)
        elif records != recovered[number - 1]:
            raise UserError(
                f"{path}: round {number} is not what this configuration gives: the scenarios, the wording or the "
                "program changed since; use another workdir"
            )
        everything += records
        on_round(Finished(condition, number, records, before, seconds))
    return everything
