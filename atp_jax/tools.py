"""How a model calls the tool: what it is offered, and what stands in its answer.

There are three conventions. Where the chat template has one for tools it is used: the template is given the tool's
schema and lays out the results. Qwen's is `tool_call` (a JSON object with name and arguments between two tags), that
of Llama 3.1 is `json` (an answer that is a JSON object with name and parameters). For any other template it is
`fenced`: the messages themselves say that a fenced block of Python is run, and results come as messages of the user.
"""

import json
import re
from dataclasses import dataclass

from jinja2 import TemplateError

from atp_jax.decisions import spoken

CONVENTIONS = ("tool_call", "json", "fenced")
NAME = "python"
_TAGGED = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """One call of the tool: the code, or why it could not be read."""

    code: str | None
    error: str = ""


def schema(description: str, code: str) -> dict:
    """The tool as chat templates take it. description: of the tool; code: of its one argument."""
    argument = {"code": {"type": "string", "description": code}}
    parameters = {"type": "object", "properties": argument, "required": ["code"]}
    return {"type": "function", "function": {"name": NAME, "description": description, "parameters": parameters}}


def convention_of(tokenizer) -> str:
    """How this tokenizer's chat template wants tools to be called."""
    conversation = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "what came back"},
    ]  # fmt: skip

    def shown(tools) -> str:
        return tokenizer.apply_chat_template(conversation, tools=tools, add_generation_prompt=True, tokenize=False)

    try:
        offered = shown([schema("what it does", "the argument")])
        if "the argument" not in offered or "what came back" not in offered or "the argument" in shown(None):
            return "fenced"
    except (TemplateError, ValueError, TypeError, KeyError):
        return "fenced"
    if "<tool_call>" in offered:
        return "tool_call"
    return "json" if '"parameters"' in tokenizer.get_chat_template() else "fenced"


def read_calls(text: str, convention: str) -> list[Call]:
    """The calls in an answer, in order, thoughts aside; none if it makes none. Never raises on any text."""
    said = spoken(text) or ""
    if convention == "tool_call":
        return [_tagged(match[1], bool(match[2])) for match in _TAGGED.finditer(said)]
    if convention == "json":
        return _bare(said.strip())
    return _fenced(said)


def _tagged(content: str, closed: bool) -> Call:
    if not closed:
        return Call(None, "the call has no </tool_call>")
    try:
        call = json.loads(content)
    except (ValueError, RecursionError):
        return Call(None, "the call is not valid JSON")
    return _read(call, "arguments")


def _bare(said: str) -> list[Call]:
    """A call is the whole answer, or there is none; what only looks like one is a bad one."""
    if not said.startswith("{"):
        return []
    try:
        call = json.loads(said)
    except (ValueError, RecursionError):
        return [Call(None, "the call is not valid JSON")] if '"name"' in said else []
    return [_read(call, "parameters")] if "name" in call else []


def _fenced(said: str) -> list[Call]:
    """The blocks between a line "```python" and a line "```"; one that is never closed is no call."""
    found, block = [], None
    for line in said.split("\n"):
        mark = line.strip().lower()
        if block is None:
            block = [] if mark in ("```python", "```py") else None
        elif mark == "```":
            found.append(Call("\n".join(block)))
            block = None
        else:
            block.append(line)
    return found


def _read(call: object, arguments: str) -> Call:
    if not isinstance(call, dict) or call.get("name") != NAME:
        return Call(None, f'there is only the tool "{NAME}"')
    given = call.get(arguments)
    if isinstance(given, str):  # some write the arguments as a text that holds JSON
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return Call(None, f'"{arguments}" is not valid JSON')
    if not isinstance(given, dict) or not isinstance(given.get("code"), str):
        return Call(None, f'"{arguments}" must be an object with a text "code"')
    return Call(given["code"])
