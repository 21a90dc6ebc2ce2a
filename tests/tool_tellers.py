"""What the tests of alignment on tool use share: problems, a policy that says what it is told to, and its answers."""

import dataclasses
import json

from tiny_tokenizers import qwen3_tokenizer

from atp_jax.chat import Chat
from atp_jax.policies.solver import Solver
from atp_jax.policies.types import Answer, Request
from atp_jax.sandbox import Sandbox
from atp_jax.scenarios.problems import Problem
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import Settings
from atp_jax.testbeds import tool_use

# ChatML that offers tools as Qwen does; `pushed` makes it show every past answer otherwise than it was said.
TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if loop.first and tools %}{{ tools | tojson + ' in <tool_call></tool_call>. ' }}{% endif %}
{{- PUSHED + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
WORDING = load_wording("", "tool_use") | {"convention": "tool_call"}
SETTINGS = Settings(testbed="tool_use")
PROBLEMS = tuple(Problem(row, "sum", bool(row % 2), f"What is {row} + 40?", str(row + 40)) for row in range(4))


def tokenizer(pushed=False):
    made = qwen3_tokenizer()
    made.chat_template = TEMPLATE.replace("PUSHED", "('> ' if m.role == 'assistant' else '')" if pushed else "''")
    return made


def called(code):
    return "<tool_call>\n" + json.dumps({"name": "python", "arguments": {"code": code}}) + "\n</tool_call>"


class Teller:
    """Says what a function of the request tells it to, character by character, as no tokenizer would cut it."""

    turns = 1

    def __init__(self, tell, pushed=False):
        self.tokenizer, self.tell, self.asked = tokenizer(pushed), tell, []
        self.chat = Chat(self.tokenizer)
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ids(self, text):
        """An added token is itself, everything else is spelled."""
        ids, added = [], sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        while text:
            known = next((token for token in added if text.startswith(token)), text[0])
            ids += self.tokenizer.encode(known, add_special_tokens=False)
            text = text[len(known) :]
        return ids

    def answer(self, requests):
        self.asked.append(list(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        text, finish = self.tell(request)
        ids = (*self.ids(text), *([self.end] if finish == "stop" else []))
        logprobs = tuple(-float(1 + place) / 8 for place in range(len(ids)))
        prompt = tuple(self.chat.encode(request.messages, request.tools))
        return Answer(text, ids, finish, sum(logprobs), prompt, logprobs)


def solver(teller, **changes):
    tool = dataclasses.replace(SETTINGS.tool, **changes)
    return Solver(teller, WORDING, "tool_call", tool, Sandbox())


def script(*said):
    """Turn by turn, whoever asks; a text, or (text, "length")."""
    turns = [text if isinstance(text, tuple) else (text, "stop") for text in said]
    return lambda request: turns[min(request.turn, len(turns) - 1)]


def asked(tools=None):
    (question,) = tool_use.questions(PROBLEMS[:1], WORDING, SETTINGS)
    return Request(7, 3, 0, 1, question.messages, tools=question.tools if tools is None else tools)


def reading(answer, problem=PROBLEMS[0]):
    (question,) = tool_use.questions([problem], WORDING, SETTINGS)
    return tool_use.read(answer, question, WORDING, SETTINGS)
