"""Answers, and what is asked for and made of them so far: what the host knows of a batch."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from atp_jax.generate.sampling import Sampling
from atp_jax.generate.sizes import common_prefix


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One answer: token ids (the stop token, if any, is the last), the log-probability each was drawn with, and why it
    ended: "stop" or "length"."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str


def sampled(tokens: Sequence[int], logprobs: Sequence[float], stop: frozenset[int]) -> Sampled:
    """An answer that is complete, of which `stop` are the ids that end one."""
    return Sampled(tuple(tokens), tuple(logprobs), "stop" if tokens[-1] in stop else "length")


@dataclasses.dataclass(frozen=True)
class Next:
    """A prompt that is answered because another answer is complete: its ids, its stream and its adapter as `generate`
    takes them, and the place of the earlier prompt that it goes on from, None where it begins anew."""

    prompt: list[int]
    stream: tuple[int, ...]
    adapter: int = 0
    after: int | None = None


class Wanted:
    """The answers that are being made: what was asked of each, and what it has so far."""

    def __init__(self, prompts, sampling: list[Sampling], streams, budgets: np.ndarray, adapter: Sequence[int] | None):
        self.prompts, self.sampling, self.streams, self.budgets = [*prompts], sampling, [*streams], budgets.tolist()
        self.adapter = None if adapter is None else [*adapter]
        self.after: list[int | None] = [None] * len(prompts)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.log_probs: list[list[float]] = [[] for _ in prompts]
        self.ended: set[int] = set()

    def add(self, new: Next, budget: int, sampling: Sampling) -> int:
        """One more -> its place."""
        self.prompts.append(new.prompt)
        self.sampling.append(sampling)
        self.streams.append(new.stream)
        self.budgets.append(budget)
        if self.adapter is not None:
            self.adapter.append(new.adapter)
        self.after.append(new.after)
        self.tokens.append([])
        self.log_probs.append([])
        return len(self.prompts) - 1

    def alive(self, one: int) -> bool:
        """Whether what a row holds (-1 nothing) is not complete yet."""
        return one >= 0 and one not in self.ended

    def answer(self, one: int, stop: frozenset[int]) -> Sampled:
        """An answer that is complete."""
        return sampled(self.tokens[one], self.log_probs[one], stop)

    def size(self, one: int) -> tuple[int, int]:
        """Tokens that its row holds, and that it may still get."""
        drawn = len(self.tokens[one])
        return len(self.prompts[one]) + drawn, self.budgets[one] - drawn

    def kept(self, one: int) -> int:
        """How much of the prompt that it goes on from, and of the answer to that, begins its own. The last token is
        read again: its hidden state is what the answer starts from."""
        after, prompt = self.after[one], self.prompts[one]
        if self.adapter is not None and self.adapter[after] != self.adapter[one]:
            return 0
        return min(common_prefix([*self.prompts[after], *self.tokens[after]], prompt), len(prompt) - 1)

    def worn(self, held: list[int]) -> list[int] | None:
        """The adapter of each row."""
        return None if self.adapter is None else [self.adapter[one] if one >= 0 else -1 for one in held]


def per_row(sampling: Sampling | Sequence[Sampling], rows: Sequence) -> list[Sampling]:
    """One Sampling a row."""
    return [sampling] * len(rows) if isinstance(sampling, Sampling) else list(sampling)
