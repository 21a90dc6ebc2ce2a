"""The policy that works on a question in several turns: it may call the tool, and answers at last.

What alignment learns from is the whole of such an answer: its turns one behind the other as ids, with the tool's
results between them, of which the policy said nothing itself.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager

from atp_jax import processes
from atp_jax.policies.types import Answer, Request, follow
from atp_jax.sandbox import Sandbox
from atp_jax.scenarios import tool_use as words
from atp_jax.settings import ToolSettings
from atp_jax.tools import Call


def serve(sandbox: Sandbox, call: Call) -> str:
    """What the tool gives back. Of several processes the first runs the code: what takes too long in one might not in
    another, and all must go on with the same words."""
    if call.code is None:
        return f"Error: {call.error}"
    return processes.share(lambda: sandbox.run(call.code).text.encode()).decode()


class Solver:
    """Works on each request until there is an answer that calls nothing, and gives back whole answers.

    policy: what answers each turn. convention: how the tool is called. turns: how many an answer has at most.
    """

    def __init__(self, policy, wording: dict, convention: str, tool: ToolSettings, sandbox: Sandbox):
        self._policy, self._wording, self._convention = policy, wording, convention
        self._calls, self._sandbox = tool.max_calls, sandbox
        self.turns = tool.max_calls + 1

    def wearing(self, params, lora) -> AbstractContextManager[None]:
        """Other weights from now on."""
        return self._policy.wearing(params, lora)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One whole answer a request, in order. Those that are still at work are asked together."""
        attempts = [words.Attempt(None, self._calls) for _ in requests]
        said: list[list[Answer]] = [[] for _ in requests]
        asked = dict(enumerate(requests))
        while asked:
            answers = self._policy.answer(list(asked.values()))
            for place, answer in zip(list(asked), answers, strict=True):
                attempt, first = attempts[place], requests[place]
                said[place].append(answer)
                calls = attempt.hear(answer.text, answer.tokens, answer.finish, self._convention)
                if attempt.done:
                    del asked[place]
                    continue
                results = [serve(self._sandbox, call) for call in calls]
                attempt.messages += [words.result(self._wording, self._convention, text) for text in results]
                messages = [*first.messages, *attempt.messages]
                asked[place] = dataclasses.replace(first, messages=messages, turn=first.turn + len(said[place]))
        return [_whole(turns, attempt.messages[:-1]) for turns, attempt in zip(said, attempts, strict=True)]


def _whole(turns: Sequence[Answer], before: Sequence[dict]) -> Answer:
    last, turns = turns[-1], [turn for turn in turns if turn.tokens] or turns[:1]  # a prompt too long has no answer
    ids, sampled, held = follow([(turn.prompt, turn.tokens) for turn in turns])
    known = iter([logprob for turn in turns[:held] for logprob in turn.logprobs])
    logprobs = tuple(next(known, 0.0) if mine else 0.0 for mine in sampled)
    sums = [turn.logprob for turn in turns]
    return dataclasses.replace(
        last, tokens=tuple(ids), logprob=None if None in sums else sum(sums), prompt=turns[0].prompt,
        logprobs=logprobs, sampled=tuple(sampled), before=tuple(before), left_out=len(turns) - held,
    )  # fmt: skip
