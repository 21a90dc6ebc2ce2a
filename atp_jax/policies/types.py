"""What a policy is asked, what it answers, and what it must be able to do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from atp_jax.chat import Chat


@dataclass(frozen=True)
class Request:
    """One agent's turn in one round.

    `condition`, `episode` and `agent` count from 0, `round` from 1; together with the seed of the run they
    address the randomness of the answer. `messages` are `{"role", "content"}`; an assistant message may also carry
    `"tokens"`, the ids it was sampled as, so that it need not be tokenised again. An `unaligned` agent wears no
    adapter, whatever the others wear.

    Where a round takes several answers (a tool is called, or there are several problems), `turn` counts them from 0.
    `tools` are the schemas of what may be called, for the chat template.
    """

    condition: int
    episode: int
    agent: int
    round: int
    messages: list[dict]
    unaligned: bool = False
    turn: int = 0
    tools: tuple[dict, ...] = ()

    @property
    def stream(self) -> tuple[int, int, int, int]:
        """What, with the seed of the run, addresses the randomness of the answer."""
        return self.condition, self.episode, self.agent, self.round + (self.turn << 16)


@dataclass(frozen=True)
class Script:
    """What E episodes of R rounds are asked after each answer, where that follows from what it decides alone.

    The next prompt is the one before without its last `rewind` ids, the answer as it was sampled but for a special
    token at its end, and a segment. which: int32 [E, R, 3], the place of that segment in `segments`, by the number of
    the round and by the decision (in the order of `decisions.DECISIONS`); -1 where nothing follows. options: what an
    episode calls to comply and to violate.
    """

    condition: int
    segments: tuple[tuple[int, ...], ...]
    which: np.ndarray
    options: tuple[tuple[str, str], ...]
    rewind: int


@dataclass(frozen=True)
class Answer:
    """What came back: the text without special tokens, the ids sampled (stop token included), why it ended, and the
    log-probability of the whole answer (None where the policy has none).

    A policy that can be trained on its answers also says which ids it was shown and each sampled id's log-probability.
    An answer that was read back may say what the tool `results` were that it called for.

    An answer may have taken several turns (`policies/solver.py`). Then text and finish are those of its last turn,
    `before` holds the messages that came first (what was said, with its ids, and what the tool gave back), `tokens` is
    everything from the first sampled id to the last, and `sampled` says which of them the policy said itself: 0 or 1 a
    token, empty where all were. `left_out`: so many turns at its end are not in `tokens`.
    """

    text: str
    tokens: tuple[int, ...] = ()
    finish: str = "stop"
    logprob: float | None = None
    prompt: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    results: tuple[str, ...] | None = None
    sampled: tuple[int, ...] = ()
    before: tuple[dict, ...] = ()
    left_out: int = 0

    @property
    def length(self) -> int:
        """Tokens that the policy said itself."""
        return sum(self.sampled) if self.sampled else len(self.tokens)


def follow(turns: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[int], list[int], int]:
    """Turns as one answer: of (prompt ids, answer ids) of each, all that follows the first prompt, 1 for what was
    answered and 0 for what stands between, and how many turns this holds.

    It ends before the first turn whose prompt does not begin with what came before: a chat template may show an earlier
    turn otherwise than it was said, and then nobody has ever answered to the whole.
    """
    begin = list(turns[0][0])
    ids: list[int] = []
    sampled: list[int] = []
    for held, (prompt, answer) in enumerate(turns):
        if list(prompt[: len(begin) + len(ids)]) != begin + ids:
            return ids, sampled, held
        between = list(prompt[len(begin) + len(ids) :])
        ids += [*between, *answer]
        sampled += [0] * len(between) + [1] * len(answer)
    return ids, sampled, len(turns)


class Policy(Protocol):
    """Whatever answers messages. What it remembers from round to round never passes from one condition to the next."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in the order of the requests."""
        ...

    def pursue(self, requests: Sequence[Request], follow: Callable[[Request, Answer], Sequence[Request]]) -> None:
        """Answers the requests and all that follow from them, in any order: `follow` takes each request and its answer,
        and gives back what is asked next."""
        ...

    def recall(self, requests: Sequence[Request]) -> None:
        """Rebuild what would be remembered had `requests` been answered: a run that was interrupted calls this once for
        each round that was finished before, in order, and then goes on with `answer`."""
        ...

    def foresee(self, script: Callable[[Chat], Script | None]) -> None:
        """Be ready for the episodes of a script, which are asked next from their first round on. script: makes it, if
        there is one, for whoever puts messages into ids like this."""
        ...
