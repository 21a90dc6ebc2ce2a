"""What the testbeds have in common: a condition, the lives that are lived in it, and what is recorded of a round."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import jax

from atp_jax.decisions import DECISIONS, read_decision
from atp_jax.errors import UserError
from atp_jax.policies.types import Answer, Request
from atp_jax.settings import GrpoSettings, Settings


@dataclass(frozen=True)
class Condition:
    """One cell of the experiment. `index` addresses its randomness, `name` its folder and its line in the tables."""

    index: int
    name: str
    model: str
    control: str
    mode: str = "context"  # where its experience goes: "context" or "weights"
    cell: object = None  # the testbed's own part: the rules of a threshold game
    setting: dict = field(default_factory=dict)  # what these rules are called in the results


class Lives(Protocol):
    """Episodes of one condition that are lived through together."""

    addresses: list[tuple[int, int]]  # (episode, agent) of the records of a round, in their order

    def ask(self) -> list[Request]:
        """What each agent that is asked is shown next."""
        ...

    def tell(self, answers: Sequence[Answer]) -> list[dict] | None:
        """The records of the round, one for each address, after the environment paid for the answers; None while the
        round goes on and there is more to ask."""
        ...


@dataclass(frozen=True)
class Question:
    """What alignment trains on: a first round as one agent sees it, and how to get either decision out of it."""

    row: int  # of the scenario
    messages: list[dict]
    comply: str  # the options
    violate: str
    steering: dict[str, str]  # decision -> what is said after the question to get it; empty: nothing
    tools: tuple[dict, ...] = ()  # that may be called
    answer: str = ""  # the right one, where there is one


def at_once(policy, wording: dict, settings: Settings):
    """`answering` of a testbed whose questions take one turn."""
    return policy


def read_option(answer: Answer, question: Question, wording: dict, settings: Settings) -> str:
    """`read` of a testbed whose answers name an option."""
    return read_decision(answer.text, question.comply, question.violate, settings.parity, settings.testbed)


def by_decision(records: Sequence[dict], grpo: GrpoSettings) -> list[float]:
    """`training_rewards` of a testbed where the decision is all that counts."""
    return [grpo.rewards[DECISIONS.index(record["decision"])] for record in records]


@contextmanager
def exact() -> Iterator[None]:
    """Rewards are the scenario's own numbers to the last digit: float64, on the host where there is one."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to see the accelerator alone
        device = jax.local_devices()[0]
    with jax.enable_x64(True), jax.default_device(device):
        yield


def record(
    request: Request, scenario: int, environment: str, answer: Answer, decision: str, other: str, reward: float, **own
) -> dict:
    """One line of `episodes.jsonl`; `other` is what the other parity reads in the same answer, `own` the testbed's
    fields."""
    if answer.logprob is not None and not math.isfinite(answer.logprob):
        raise UserError(
            f"episode {request.episode}, round {request.round}: the model's log-probability is {answer.logprob}; "
            "its weights or its dtype are at fault"
        )
    return {
        "episode": request.episode, "scenario": scenario, "environment": environment, "agent": request.agent,
        "round": request.round,
        "messages": [{"role": m["role"], "content": m["content"]} for m in request.messages],
        "answer": answer.text, "decision": decision, "other_decision": other, "reward": reward,
        "tokens": list(answer.tokens), "finish": answer.finish, "logprob": answer.logprob, **own,
    }  # fmt: skip
