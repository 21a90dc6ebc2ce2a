"""The policy that is a language model."""

import collections
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import jax

from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.generate import reading
from atp_jax.generate.ahead import Ahead
from atp_jax.generate.engine import CHUNK
from atp_jax.generate.sampling import Sampling
from atp_jax.generate.wanted import Next, Sampled
from atp_jax.model import Model
from atp_jax.policies.types import Answer, Request, Script


class ModelPolicy:
    """Answers requests by sampling from a model.

    seed: of the run; with the address of a request (condition, episode, agent, round) it fixes the answer. thinking:
    passed to the chat template, unless None. rows: at most so many requests are answered at a time (None: all); the
    others wait until a row is free.

    While all requests are answered at a time and the same episodes come round after round, or some of them in the same
    order and going on from what they were asked before, what the model has read in one round is kept for the next.
    Their first round starts anew, so what is kept depends on the rounds of these episodes alone, and a run that was
    interrupted goes on as if it had not been.
    """

    turns = 1  # that an answer has

    def __init__(
        self, model: Model, sampling: Sampling, seed: int, thinking: bool | None = None, rows: int | None = None
    ):
        if rows is not None and rows < 1:
            raise UserError(f"policy.rows must be at least 1, not {rows}")
        self._chat, self._tokenizer = Chat(model.tokenizer, thinking), model.tokenizer
        self._context = model.config.max_position_embeddings
        self._engine = model.engine()
        self._sampling = sampling
        self._seed = seed
        self._rows = rows
        self._members: list[tuple[int, int, int]] = []  # whose prompts the engine remembers
        self._first = 0  # the round in which it began to
        self._ahead: Ahead | None = None
        self.spent = self._engine.spent  # seconds of answering, by phase

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order. UserError names the request whose prompt fills the model's context; where
        earlier turns of the same round filled it (what a tool printed), there is an empty answer that was cut off."""
        if prompts := self._scripted(requests):
            drawn = self._ahead.answer(prompts, [(self._seed, *request.stream) for request in requests])
            if drawn is not None:
                return list(map(self._answer, prompts, drawn))
        answers = [_NO_ROOM] * len(requests)
        if not (prompts := self._read(requests)):
            return answers
        fit = [requests[place] for place in prompts]
        streams = [(self._seed, *request.stream) for request in fit]
        drawn = self._engine.generate([*prompts.values()], self._sampling, streams, _adapters(fit), self._rows)
        for (place, prompt), sampled in zip(prompts.items(), drawn, strict=True):
            answers[place] = self._answer(prompt, sampled)
        return answers

    def pursue(self, requests: Sequence[Request], follow: Callable[[Request, Answer], Sequence[Request]]) -> None:
        """Answers these requests, and all that follow from the answers, each as soon as there is a row for it.

        follow: called with each request and its answer, once that is complete; what it gives back is asked next. A row
        keeps what the same agent has read and said in it. Nothing is remembered afterwards. UserError as in `answer`.
        """
        asked: list[Request] = []  # by their places in the engine
        prompts: list[list[int]] = []
        last: dict[tuple[int, int, int], int] = {}  # the latest place of each agent

        def enter(requests: Sequence[Request]) -> list[Next]:
            found, todo = [], collections.deque(requests)
            while todo:
                request = todo.popleft()
                if (prompt := self._prompt(request)) is None:
                    todo.extend(follow(request, _NO_ROOM))
                    continue
                member = request.condition, request.episode, request.agent
                stream = self._seed, *request.stream
                found.append(Next(prompt, stream, _worn(request), last.get(member)))
                last[member] = len(asked)
                asked.append(request)
                prompts.append(prompt)
            return found

        def ended(place: int, sampled: Sampled) -> list[Next]:
            request, prompt, asked[place], prompts[place] = asked[place], prompts[place], None, None
            return enter(follow(request, self._answer(prompt, sampled)))

        self._engine.forget()
        self._members, self._ahead = [], None
        if first := enter(requests):
            read, streams = [one.prompt for one in first], [one.stream for one in first]
            self._engine.generate(read, self._sampling, streams, _adapters(asked), self._rows, ended)

    def recall(self, requests: Sequence[Request]) -> None:
        """Reads what was asked, as `answer` would, without answering."""
        if (prompts := self._scripted(requests)) and self._ahead.recall(prompts):
            return
        if prompts := self._read(requests):
            worn = _adapters([requests[place] for place in prompts])
            self._engine.prefill([*prompts.values()], self._sampling, worn, self._rows)

    def foresee(self, script: Callable[[Chat], Script | None]) -> None:
        """The episodes of this script are asked next, from their first round on. If answers are short and all can be
        given at a time, each round is then begun before the host has read the one before, as long as all of them are
        what the script says (a chat template may trim an answer, and then they are not)."""
        self._engine.forget()
        self._members, self._ahead = [], None
        if self._sampling.max_new_tokens <= CHUNK and (found := script(self._chat)):
            self._ahead = Ahead(self._engine, found, self._sampling, self._spelled)

    @contextmanager
    def wearing(self, params, lora) -> Iterator[None]:
        """Other weights (of the same shapes) from now on. Nothing of what was read before is kept, and afterwards the
        memory of the cache is the training's."""
        self._engine.load(params, lora)
        self._members, self._ahead = [], None
        yield
        self._ahead = None
        self._engine.forget()

    def _scripted(self, requests: Sequence[Request]) -> list[list[int]]:
        """The prompts of the next round of the script that is followed; none, and it is followed no longer, where these
        are other requests or not all can be answered at a time."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return []
        asked = [(request.condition, request.round, request.turn, request.unaligned) for request in requests]
        if asked != [(ahead.script.condition, ahead.number + 1, 0, False)] * len(ahead.script.which):
            return []
        prompts = [self._prompt(request) for request in requests]
        if not ahead.number and not ahead.fits(prompts, self._rows):
            return []
        self._ahead = ahead
        return prompts

    @cached_property
    def _spelled(self) -> reading.Spelling:
        return jax.tree.map(self._engine.put_whole, reading.spelling(self._tokenizer, self._engine.config.vocab_size))

    def _read(self, requests: Sequence[Request]) -> dict[int, list[int]]:
        """The prompts that fit into the model's context, by the places of their requests. What the engine remembers is
        kept only if it is of these very episodes, and not of an earlier run of them."""
        self._ahead = None
        prompts = {
            place: prompt for place, request in enumerate(requests) if (prompt := self._prompt(request)) is not None
        }
        fit = [requests[place] for place in prompts]
        members = [(request.condition, request.episode, request.agent) for request in fit]
        known = iter(self._members)
        again = any(request.round <= self._first and not request.turn for request in fit)
        if again or not all(one in known for one in members):
            self._engine.forget()
            self._members, self._first = members, min(request.round for request in fit)
        return prompts

    def _prompt(self, request: Request) -> list[int] | None:
        """A request as ids; None where earlier turns of its round have filled the model's context."""
        ids = self._chat.encode(request.messages, request.tools)
        if len(ids) < self._context:
            return ids
        if request.turn:
            return None
        raise UserError(
            f"episode {request.episode}, agent {request.agent}, round {request.round}: the prompt has {len(ids)} "
            f"tokens, the model's context is {self._context}; a smaller evolve.window makes prompts shorter"
        )

    def _answer(self, prompt: list[int], sampled: Sampled) -> Answer:
        return Answer(
            self._chat.decode(sampled.tokens), sampled.tokens, sampled.finish, sum(sampled.logprobs), tuple(prompt),
            sampled.logprobs,
        )  # fmt: skip


_NO_ROOM = Answer("", finish="length", logprob=0.0)


def _adapters(requests: Sequence[Request]) -> list[int] | None:
    """What each agent wears, for the engine: nothing is said where all wear the same."""
    if not any(request.unaligned for request in requests):
        return None
    return [_worn(request) for request in requests]


def _worn(request: Request) -> int:
    return -1 if request.unaligned else 0
