"""What is said in tool use: the rules, the problems, what the tool gives back, and what came of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from atp_jax.answers import final_answer
from atp_jax.scenarios.problems import Problem
from atp_jax.scenarios.wording import fill
from atp_jax.settings import ToolSettings
from atp_jax.tools import Call, read_calls, schema


def rules(settings: ToolSettings) -> dict:
    """The fields that templates may show."""
    return {
        "cost_tool": settings.costs[0], "cost_plain": settings.costs[1], "reward_simple": settings.rewards[0],
        "reward_complex": settings.rewards[1], "wrong": settings.wrong, "max_calls": settings.max_calls,
    }  # fmt: skip


def system(wording: dict, convention: str, settings: ToolSettings, tool: bool = True) -> dict:
    """The system message; tool: whether there is one."""
    said, fields = wording["tool_use"], rules(settings)
    if not tool:
        return {"role": "system", "content": fill(said["system_direct"], **fields)}
    text = fill(said["system"], **fields)
    if convention == "fenced":
        text += " " + fill(said["fenced"], **fields)
    return {"role": "system", "content": text}


def offered(wording: dict, convention: str) -> tuple[dict, ...]:
    """The tools that the chat template is given."""
    said = wording["tool_use"]["tool"]
    return () if convention == "fenced" else (schema(fill(said["description"]), fill(said["code"])),)


def question(problem: Problem, wording: dict) -> dict:
    """A problem as it is asked."""
    return {"role": "user", "content": fill(wording["tool_use"]["question"], question=problem.question)}


def result(wording: dict, convention: str, text: str) -> dict:
    """What the tool gave back. Where the template knows no tools it is the user who says so."""
    role, how = ("user", "fenced") if convention == "fenced" else ("tool", "plain")
    template = wording["tool_use"]["result"][how if text.strip() else "nothing"]
    return {"role": role, "content": fill(template, result=text.rstrip("\n"))}


def feedback(
    wording: dict, settings: ToolSettings, correct: bool, said: str | None, used_tool: bool, reward: float, cost: float
) -> dict:
    """What an agent is told after a problem; said: the answer that was read, None if there was none."""
    how = "unparsed" if said is None else "right" if correct else "wrong"
    fields = rules(settings) | {"reward": reward, "cost": cost, "net": reward - cost}
    how_paid = fill(wording["tool_use"]["paid"]["tool" if used_tool else "plain"], **fields)
    return {"role": "user", "content": fill(wording["tool_use"]["feedback"][how], paid=how_paid, **fields)}


def neutral(wording: dict) -> dict:
    """What is said after a problem where nobody hears what came of it."""
    return {"role": "user", "content": fill(wording["tool_use"]["feedback"]["neutral"])}


@dataclass
class Attempt:
    """One problem as an agent works on it: answers, calls and results, until there is an answer that calls nothing."""

    problem: Problem | None  # None: whoever asks knows it
    max_calls: int
    tool: bool = True  # false: there is none, and nothing is run
    measured: bool = True  # false: experience
    messages: list[dict] = field(default_factory=list)  # what was said since the question
    turns: int = 0  # answers so far
    calls: int = 0  # of these answers, bad ones included
    bad: int = 0  # calls that could not be read
    ran: int = 0  # codes that were run
    done: bool = False
    said: str | None = None  # the final answer

    @property
    def used_tool(self) -> bool:
        return self.ran > 0

    def hear(self, text: str, tokens: Sequence[int], finish: str, convention: str) -> list[Call]:
        """Takes an answer; the calls to be served before the next. An answer that was cut off calls nothing."""
        self.turns += 1
        own = {"tokens": tuple(tokens)} if tokens else {}
        self.messages.append({"role": "assistant", "content": text, **own})
        calls = read_calls(text, convention) if self.tool and finish != "length" else []
        room = self.max_calls - self.calls
        if calls and room > 0:
            self.calls += min(len(calls), room)
            self.bad += sum(call.code is None for call in calls[:room])
            self.ran += sum(call.code is not None for call in calls[:room])
            return calls[:room]
        self.done = True
        self.said = None if calls else final_answer(text)
        return []

    @property
    def decision(self) -> str:
        """Whether the tool was used, and if not whether there was an answer at all."""
        return "comply" if self.used_tool else "unparsed" if self.said is None else "violate"
