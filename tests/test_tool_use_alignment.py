"""Alignment on tool use: whole answers as ids of which some were said and some were given back, what is kept of them in
pairs and groups, what they are paid, and that a run that was cut off ends like one that was not."""

import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_models
import small_run
from hypothesis import given
from hypothesis import strategies as st
from test_generate import ONE
from tiny_tokenizers import qwen3_tokenizer
from transformers import AutoTokenizer

from atp_jax import alignment, experiment
from atp_jax.align.dpo import Dpo, layout, score
from atp_jax.align.grpo import Draw, Grpo
from atp_jax.align.pairs import Pair, collect, read_pairs, tokenise, write_pairs
from atp_jax.align.rows import rows_of
from atp_jax.align.trainable import partition
from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.lab import open_lab
from atp_jax.model import ORGANISM, Model
from atp_jax.models import lora as adapters
from atp_jax.policies.solver import Solver
from atp_jax.policies.types import Answer, Request, follow
from atp_jax.sandbox import Sandbox
from atp_jax.scenarios import tool_use as words
from atp_jax.scenarios.problems import Problem
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import DpoSettings, GrpoSettings, Settings, check_settings, default_config, read_settings
from atp_jax.testbeds import tool_use
from atp_jax.testbeds.types import Condition
from atp_jax.tools import Call, convention_of

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


# ---------------------------------------------------------------- whole answers


def test_the_template_is_one_of_the_conventions():
    assert convention_of(tokenizer()) == "tool_call"


def test_a_whole_answer_token_by_token():
    """Its ids are those that were said, each turn's with its stop token, and between them what the template and the
    tool add, found here by spelling the conversation out; log-probabilities stand at the ids that were said."""
    first, second, last = "Let me see. " + called("print(6 * 7)"), called("1 / 0"), "Answer: 40"
    teller = Teller(script(first, second, last))
    (answer,) = solver(teller).answer([asked()])
    results = ["42", "ZeroDivisionError: division by zero"]
    expected = []
    for text, result in itertools.zip_longest((first, second, last), results):
        expected += [(index, 1) for index in (*teller.ids(text), teller.end)]
        if result is not None:
            between = ["\n", "<|im_start|>", f"tool\n{result}", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"]
            for part in between:
                expected += [(index, 0) for index in teller.tokenizer.encode(part, add_special_tokens=False)]
    assert list(zip(answer.tokens, answer.sampled, strict=True)) == expected
    assert answer.left_out == 0 and answer.length == sum(mine for _, mine in expected)
    assert answer.prompt == tuple(teller.chat.encode(asked().messages, asked().tools))
    spelled = [teller.ids(text) for text in (first, second, last)]
    each = [-(1 + place) / 8 for ids in spelled for place in range(len(ids) + 1)]
    known = iter(each)
    assert list(answer.logprobs) == [next(known) if mine else 0.0 for mine in answer.sampled]
    assert answer.logprob == pytest.approx(sum(each))
    # The whole is what the template writes for the conversation, and nothing was asked twice.
    said = [*asked().messages, *answer.before, {"role": "assistant", "content": last}]
    written = teller.tokenizer.apply_chat_template(said, tools=list(asked().tools), tokenize=False)
    assert teller.tokenizer.decode([*answer.prompt, *answer.tokens]) + "\n" == written
    assert [len(batch) for batch in teller.asked] == [1, 1, 1]
    assert [request.turn for (request,) in teller.asked] == [0, 1, 2]
    assert len({request.stream for (request,) in teller.asked}) == 3


@pytest.mark.parametrize(
    ("said", "read", "used", "turns"),
    [
        ([called("print(40)"), "Answer: 40"], "comply", True, 2),
        ([called("print(41)"), "Answer: 41"], "wrong", True, 2),
        ([called("print(40)"), "Forty."], "unparsed", True, 2),
        (["Answer: 40"], "violate", False, 1),
        (["Answer: 41"], "wrong", False, 1),
        (["Forty."], "unparsed", False, 1),
        (["<tool_call>oops</tool_call>", "Answer: 40"], "violate", False, 2),
        ([called("print(1)"), called("print(2)"), called("print(3)"), called("print(4)")], "unparsed", True, 4),
        ([(called("print(40)"), "length")], "unparsed", False, 1),
        ([called("print(1)") + called("print(2)"), "Answer: 40.0"], "comply", True, 2),
    ],
)
def test_what_a_whole_answer_is(said, read, used, turns):
    """A call that cannot be read is no use of the tool; neither is one that was cut off."""
    teller = Teller(script(*said))
    (answer,) = solver(teller).answer([asked()])
    assert reading(answer) == read and len(teller.asked) == turns
    lives = tool_use.Alone(Condition(5, "c", "", "none"), PROBLEMS[:1], WORDING, SETTINGS, first=9)
    assert [(r.episode, r.round, r.tools) for r in lives.ask()] == [(9, 1, asked().tools)]
    (record,) = lives.tell([answer])
    assert (record["used_tool"], record["correct"]) == (used, read in ("comply", "violate"))
    assert record["decision"] == ("comply" if used else "unparsed" if read == "unparsed" else "violate")
    paid = {(True, True): 1.5, (True, False): 0.5, (False, True): 1.0, (False, False): 0.0}  # by hand
    assert tool_use.training_rewards([record], GrpoSettings()) == [paid[record["used_tool"], record["correct"]]]
    other = GrpoSettings(tool_rewards=(0.25, 3.0))
    assert tool_use.training_rewards([record], other) == [3.0 * used + 0.25 * record["correct"]]


def test_a_result_that_the_context_has_no_room_for_ends_the_answer():
    """What was said before it is the whole of it, cut off: nothing can be learned from behind the context's end."""
    teller = Teller(script(called("print('9' * 2000)"), "Answer: 40"))
    (alone,) = Teller(script(called("print('9' * 2000)"))).answer([asked()])
    answer, teller.answer = teller.answer, lambda requests: [
        Answer("", finish="length", logprob=0.0) if request.turn else answer([request])[0] for request in requests
    ]
    (whole,) = solver(teller).answer([asked()])
    assert (whole.prompt, whole.tokens, whole.logprob) == (alone.prompt, alone.tokens, alone.logprob)
    assert (whole.text, whole.finish, whole.left_out) == ("", "length", 0) and all(whole.sampled)
    assert reading(whole) == "unparsed"


def test_answers_of_unlike_lengths_go_side_by_side():
    """Each is what it is alone; who is through is asked no more."""
    turns = {0: ["Answer: 1"], 1: [called("print(2)"), "Answer: 2"], 2: [called("print(3)")] * 3 + ["Answer: 3"]}

    def tell(request):
        return turns[request.episode][request.turn], "stop"

    requests = [dataclasses.replace(asked(), episode=episode) for episode in (2, 0, 1)]
    together = Teller(tell)
    answers = solver(together).answer(requests)
    assert [len(batch) for batch in together.asked] == [3, 2, 1, 1]
    assert answers == [solver(Teller(tell)).answer([request])[0] for request in requests]
    assert solver(together).turns == 4 and solver(together, max_calls=1).turns == 2


def test_what_the_template_shows_otherwise_is_left_out():
    """Then nobody has answered to the whole: the first turn alone is kept, and no pair is made of it."""
    teller = Teller(script(called("print(40)"), "Answer: 40"), pushed=True)
    (answer,) = solver(teller).answer([asked()])
    assert answer.left_out == 1 and answer.text == "Answer: 40" and reading(answer) == "comply"
    assert list(answer.tokens) == [*teller.ids(called("print(40)")), teller.end] and set(answer.sampled) == {1}
    assert len(answer.logprobs) == len(answer.tokens)
    assert len(answer.before) == 2


token = st.integers(0, 9)
pieces = st.lists(token, min_size=1, max_size=4)


changes = st.none() | st.tuples(st.integers(0), token)


@given(pieces, st.lists(st.tuples(pieces, pieces), min_size=1, max_size=4), changes)
def test_turns_follow_one_another_or_end_where_they_do_not(prompt, parts, change):
    """parts: (what was said, what came between it and the next). One id of a later prompt may be another."""
    turns, shown = [], list(prompt)
    for said, between in parts:
        turns.append((list(shown), said))
        shown += [*said, *between]
    broken = len(turns)
    if change is not None and len(turns) > 1:
        place, new = change
        number = 1 + place % (len(turns) - 1)
        behind = len(turns[number - 1][0]) + len(turns[number - 1][1])  # what the turn before holds
        where = place % behind
        if turns[number][0][where] != new:
            turns[number][0][where] = new
            broken = number
    ids, sampled, held = follow(turns)
    assert held == broken
    expected = []
    for number, (said, between) in enumerate(parts[:held]):
        expected += [(x, 1) for x in said] + [(x, 0) for x in between if number + 1 < held]
    assert list(zip(ids, sampled, strict=True)) == expected


# ---------------------------------------------------------------- pairs


def telling(request):
    """Problem 0: right at once in the first try, with the tool in the second. Problem 1: wrong. Problem 2: cut off,
    then not to be read. Problem 3: right at once only."""
    row, attempt = request.episode, (request.round - 1) // 2
    if row == 0:
        if attempt == 0 or request.turn:
            return "Answer: 40", "stop"
        return called("print(0 + 40)"), "stop"
    return {
        1: ("Answer: 7", "stop"), 2: ("Hm", "stop" if attempt else "length"), 3: ("Answer: 43", "stop")
    }[row]  # fmt: skip


def gather(teller, steered=False):
    questions = tool_use.questions(PROBLEMS, WORDING, SETTINGS)
    return collect(
        questions, solver(teller), lambda answer, question: tool_use.read(answer, question, WORDING, SETTINGS),
        samples=1, tries=2, steered=steered, condition=1000,
    )  # fmt: skip


def test_pairs_are_right_answers_with_the_tool_and_without():
    teller = Teller(telling)
    (pair,), told = gather(teller)
    assert told == {
        "asked": 14, "used": 3, "other_decision": 3, "unparsed": 2, "cut_off": 2, "wrong": 4, "wanted": 4, "dropped": 3,
        "without_comply": 3, "without_violate": 2,
    }  # fmt: skip
    code = called("print(0 + 40)")
    assert (pair.scenario, pair.chosen, pair.rejected) == (0, "Answer: 40", "Answer: 40")
    assert pair.messages == tuple(tool_use.questions(PROBLEMS[:1], WORDING, SETTINGS)[0].messages)
    assert pair.chosen_tokens == pair.rejected_tokens == (*teller.ids("Answer: 40"), teller.end)
    assert pair.rejected_before == () and len(pair.tools) == 1
    assert pair.chosen_before == (
        {"role": "assistant", "content": code, "tokens": (*teller.ids(code), teller.end)},
        {"role": "tool", "content": "40"},
    )
    none, told = gather(Teller(telling, pushed=True))
    assert none == [] and told["rewritten"] == 1


def test_steering_stands_behind_the_problem_and_not_in_the_pair():
    teller = Teller(telling)
    (pair,), _ = gather(teller, steered=True)
    steered = {request.messages[2]["content"] for request in teller.asked[0]}
    assert steered == {"Use the tool for this problem.", "Answer this problem at once, without the tool."}
    assert len(pair.messages) == 2
    (plain,), _ = gather(Teller(telling))
    assert tokenise([pair], teller.chat, 0, 900, 2000) == tokenise([plain], teller.chat, 0, 900, 2000)


def test_pairs_come_back_from_their_file_and_are_trained_on_as_they_were_sampled(tmp_path):
    """The row's ids are the whole answer's own, its marks those of the sampler."""
    teller = Teller(telling)
    found, _ = gather(teller)
    write_pairs(tmp_path / "pairs.jsonl", found)
    assert read_pairs(tmp_path / "pairs.jsonl") == found
    line = json.loads((tmp_path / "pairs.jsonl").read_text())
    assert [message["role"] for message in line["chosen"]] == ["assistant", "tool", "assistant"]
    assert line["rejected"] == "Answer: 40" and line["tools"] == list(found[0].tools)
    again = Teller(lambda request: telling(dataclasses.replace(request, episode=0, round=3)))
    (whole,) = solver(again).answer([asked()])
    assert line["chosen_tokens"] == whole.length and line["rejected_tokens"] == len(line["rejected_ids"])
    (row,) = tokenise(found, teller.chat, 0, 900, 2000)
    assert row["prompt"] == list(whole.prompt)
    assert (row["chosen"], row["chosen_sampled"]) == (list(whole.tokens), list(whole.sampled))
    assert row["rejected"] == [*teller.ids("Answer: 40"), teller.end] and set(row["rejected_sampled"]) == {1}
    # Cut to a length, ids and marks are cut alike.
    room = whole.sampled.index(0) + 2
    (short,) = tokenise(found, teller.chat, 0, 900, len(whole.prompt) + room)
    assert short["chosen"] == row["chosen"][:room] and short["chosen_sampled"] == row["chosen_sampled"][:room]


def test_a_text_that_was_edited_is_tokenised_anew():
    teller = Teller(telling)
    (pair,), _ = gather(teller)
    call, result = pair.chosen_before
    edited = dataclasses.replace(pair, chosen_before=(call | {"content": "Let me run it. " + call["content"]}, result))
    (row,) = tokenise([edited], teller.chat, 0, 900, 2000)
    said = [edited.chosen_before[0]["content"], edited.chosen]
    marks = np.array(row["chosen_sampled"])
    runs = np.split(np.array(row["chosen"]), np.flatnonzero(np.diff(marks)) + 1)
    assert [teller.chat.decode(run) for run in runs[::2]] == said
    assert all(run[-1] == teller.end for run in runs[::2])
    assert teller.tokenizer.decode(runs[1]) == "\n<|im_start|>tool\n40<|im_end|>\n<|im_start|>assistant\n"


def test_pairs_of_the_users_may_hold_several_turns(tmp_path):
    said = [{"role": "assistant", "content": called("print(1)")}, {"role": "tool", "content": "1"}]
    last = {"role": "assistant", "content": "Answer: 1"}
    row = {"prompt": "One?", "chosen": [*said, last], "rejected": "Answer: 1"}
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row))
    assert read_pairs(path) == [Pair(({"role": "user", "content": "One?"},), "Answer: 1", "Answer: 1", (), (), None,
                                     tuple(said))]  # fmt: skip
    # A conversation that begins with the prompt itself is no answer of several turns.
    path.write_text(json.dumps(row | {"chosen": [{"role": "user", "content": "One?"}, last], "rejected": "2"}))
    assert read_pairs(path)[0].chosen_before == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tools": "python"}, "'tools' must be a list of schemas"),
        ({"chosen": [{"role": "assistant", "content": "a", "tokens": "x"}, {"role": "assistant", "content": "b"}]},
         "'tokens' must be a list of token ids"),
        ({"chosen": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "python"}}]},
                     {"role": "tool", "content": "1"}, {"role": "assistant", "content": "b"}]},
         "'chosen' has tool_calls: write a call into the content"),
        ({"chosen": [{"role": "assistant", "content": ""}, {"role": "assistant", "content": "b"}]},
         "a message of the assistant in 'chosen' is empty"),
        ({"chosen": "Answer: 1"}, "chosen and rejected are identical"),
    ],
)  # fmt: skip
def test_a_bad_pair_is_named(tmp_path, change, says):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "One?", "chosen": "1", "rejected": "Answer: 1"} | change))
    with pytest.raises(UserError, match=rf"mine.jsonl: row 0 \(from 0\): {says}"):
        read_pairs(path)


def test_a_template_that_rewrites_is_told():
    teller = Teller(telling)
    (pair,), _ = gather(teller)
    with pytest.raises(UserError, match=r"pair 0 \(from 0\): the chat template shows turn 1 of the chosen answer"):
        tokenise([pair], Chat(tokenizer(pushed=True)), 0, 900, 2000)


# ---------------------------------------------------------------- losses


@pytest.fixture(scope="module")
def model():
    config, _, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)
    return Model(config, None, params, ONE, types.MappingProxyType({"eos_token_id": 1}))


@pytest.fixture(scope="module")
def moved(model):
    """The same model with an adapter that changes it."""
    worn = adapters.init(model.config, 2, 4.0, ("query", "down"), 0, ONE)
    keys = jax.random.split(jax.random.key(0), len(worn.b))
    b = {name: 0.1 * jax.random.normal(key, x.shape) for key, (name, x) in zip(keys, worn.b.items(), strict=True)}
    return dataclasses.replace(model, lora=worn.replace(b=b))


def drawn(rng, length):
    """(ids, sampled, log-probabilities) of an answer: said, given back, said."""
    ids = rng.integers(2, 60, length)
    cut = sorted(rng.choice(np.arange(1, length), 2, replace=False))
    sampled = np.ones(length, int)
    sampled[cut[0] : cut[1]] = 0
    return ids.tolist(), sampled.tolist(), np.where(sampled, -0.5, 0.0).tolist()


def plain_logprobs(model, prompt, ids):
    """Log-probability of each of an answer's ids, float64 [T], from the logits of the whole row."""
    tokens = np.array([[*prompt, *ids]], np.int32)
    logits = np.asarray(model.logits(tokens, np.array([tokens.size], np.int32)), np.float64)[0]
    logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
        -1, keepdims=True
    )
    places = np.arange(len(prompt), tokens.size)
    return logs[places - 1, tokens[0, places]]


def test_rows_mark_what_was_sampled():
    rows = rows_of([([1, 2], [3, 4, 5], [1, 0, 1]), ([1, 2], [6], ())], 2)
    assert rows["sampled"].shape == rows["answers"].shape and rows["sampled"].dtype == np.float32
    np.testing.assert_array_equal(rows["sampled"][0, :, :4], [[1, 0, 1, 0], [1, 0, 0, 0]])
    assert rows["lengths"].tolist() == [[3, 1]] and not rows["sampled"][0, :, 4:].any()


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "simpo"])
def test_preferences_count_what_was_said_alone(model, moved, kind):
    """Losses by NumPy in float64 from whole rows' logits, with sums and lengths over the marked ids."""
    rng = np.random.default_rng(1)
    pairs, values = [], []
    for _ in range(3):
        prompt = rng.integers(2, 60, 4).tolist()
        (chosen, marks, _), rejected = drawn(rng, 9), rng.integers(2, 60, 5).tolist()
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_sampled": marks,
                      "rejected_sampled": [1] * 5})  # fmt: skip
        (c, r), (ref_c, ref_r) = (
            [(plain_logprobs(m, prompt, ids) * mark).sum() for ids, mark in ((chosen, marks), (rejected, 1))]
            for m in (moved, model)
        )
        n, k = sum(marks), 5
        values.append({
            "sigmoid": np.log1p(np.exp(-0.1 * (c - r - ref_c + ref_r))),
            "ipo": ((c - ref_c) / n - (r - ref_r) / k - 5.0) ** 2,
            "simpo": np.log1p(np.exp(-(0.1 * (c / n - r / k) - 0.5))),
        }[kind])  # fmt: skip
        np.testing.assert_allclose(score(moved, layout(pairs[-1:])), [[c, r]], atol=1e-4)
    method = Dpo(pairs, model, DpoSettings(loss=kind, batch=3, epochs=1, beta=0.1), 0)
    batch, _ = method.batch(0, None, None)
    trainable, frozen = partition(moved.params, moved.lora)
    value, _ = method.loss(trainable, (frozen, (model.params, model.lora)), batch)
    assert float(value) == pytest.approx(np.mean(values), rel=1e-4)


def test_groups_learn_from_what_was_said_alone(model, moved):
    """Value and gradient are those of the formula spelled out token by token over whole rows: the advantage of the
    whole answer at every id that was said, nothing at what was given back."""
    rng = np.random.default_rng(2)
    prompt, said = rng.integers(2, 60, 5).tolist(), [drawn(rng, length) for length in (7, 4, 9, 6)]
    answers = [
        Answer("", tuple(ids), "stop", -1.0, tuple(prompt), tuple(logs), sampled=tuple(marks))
        for ids, marks, logs in said
    ]
    paid = np.array([1.5, 0.0, 1.0, 0.5]).reshape(1, 4, 1)
    settings = GrpoSettings(prompts=1, group=4, kl=0.2, scale="none")
    method = Grpo("t", lambda *_: Draw(answers, paid, {}), model, settings, 12, 4)
    batch, logged = method.batch(0, moved.params, moved.lora)
    counts = [sum(marks) for _, marks, _ in said]
    assert logged["completions/mean_length"] == np.mean(counts) and logged["completions/max_length"] == max(counts)
    for place, (ids, marks, logs) in enumerate(said):
        np.testing.assert_array_equal(batch["mask"][0, place, : len(ids)], marks)
        np.testing.assert_array_equal(batch["sampler"][0, place, : len(ids)], logs)
        np.testing.assert_allclose(batch["weights"][0, place, : len(ids)], np.array(marks) / sum(counts), rtol=1e-6)
    gains = paid.reshape(-1) - paid.mean()
    np.testing.assert_allclose(batch["advantages"][0], gains, atol=1e-6)

    trainable, frozen = partition(moved.params, moved.lora)
    fixed = (frozen, (model.params, model.lora))
    (value, (sums, _)), gradient = jax.value_and_grad(method.loss, has_aux=True)(trainable, fixed, batch)
    expected = 0.0
    for (ids, marks, _), gain in zip(said, gains, strict=True):
        now, before = plain_logprobs(moved, prompt, ids), plain_logprobs(model, prompt, ids)
        divergence = np.exp(before - now) - (before - now) - 1
        expected += sum((-gain + 0.2 * divergence[t]) / sum(counts) for t in range(len(ids)) if marks[t])
    assert float(value) == pytest.approx(expected, rel=1e-4)
    assert float(sums["tokens"]) == sum(counts)

    def plain(trainable):
        """-gain x log-probability has the gradient of the surrogate where the ratio is 1."""
        from atp_jax.align.trainable import join

        params, lora = join(trainable, frozen)
        graphdef = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)[1]
        total = 0.0
        for (ids, marks, _), gain in zip(said, gains, strict=True):
            tokens = np.array([[*prompt, *ids]], np.int32)
            where = np.arange(len(prompt), tokens.size)
            logs = []
            for p, worn in ((params, lora), (model.params, None)):
                decoder = small_models.nnx.merge(graphdef, p)
                hidden = decoder.hidden(tokens, np.array([tokens.size], np.int32), lora=worn)
                logs.append(jax.nn.log_softmax(decoder.head(hidden)[0])[where - 1, tokens[0, where]])
            now, before = logs
            divergence = jax.numpy.exp(before - now) - (before - now) - 1
            total += ((-gain * now + 0.2 * divergence) * np.array(marks)).sum() / sum(counts)
        return total

    for name, found in jax.tree.leaves_with_path(jax.grad(plain)(trainable)):
        (other,) = (x for path, x in jax.tree.leaves_with_path(gradient) if path == name)
        np.testing.assert_allclose(other, found, atol=2e-6, rtol=1e-3)


def test_an_answer_that_was_not_said_has_no_part_in_the_sum(model):
    """Of two tools that give back different ids only what the model says after them differs in the loss."""
    pairs = [
        {"prompt": [5, 6], "chosen": [7, 8, *back, 9], "rejected": [10], "chosen_sampled": [1, 1, 0, 0, 0, 0],
         "rejected_sampled": [1]}
        for back in ([20, 21, 22], [30, 31, 32])
    ]  # fmt: skip
    found = score(model, layout(pairs))
    np.testing.assert_array_equal(found[0], found[1])


# ---------------------------------------------------------------- settings and runs


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"align.grpo.rounds": 2}, "align.grpo.rounds must be 1 in tool use"),
        ({"align.grpo.tool_rewards": (1.0,)}, "align.grpo.tool_rewards must be two numbers"),
        ({"evolve.mode": "weights"}, "evolve.mode must be 'context' in tool use"),
    ],
)
def test_settings_that_do_not_fit(change, says):
    config = default_config()
    config.testbed, config.align.method = "tool_use", "grpo"
    config.evolve.controls = ("none",)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=says):
        check_settings(read_settings(config))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """The smallest run that aligns on tool use by both methods: few words, and a random model to which every eighth id
    is the end of an answer."""
    data = tmp_path_factory.mktemp("data")
    organism = AutoTokenizer.from_pretrained(ORGANISM)
    config, params = small_models.drawn_qwen3(organism, 512)
    stop = [organism.eos_token_id, *range(0, len(organism), 8)]
    Model(config, organism, params, ONE, types.MappingProxyType({"eos_token_id": stop})).save(data / "model")
    few = WORDING["tool_use"] | {"system": "Rules.", "fenced": "Run it."}
    (data / "words.json").write_text(json.dumps({"tool_use": few}))
    rows = [
        {"kind": kind, "environment": "sum", "question": f"What is {n} + {len(kind)}?", "answer": "1"}
        for n in range(3)
        for kind in ("simple", "complex")
    ]
    (data / "problems.json").write_text(json.dumps(rows))
    config = default_config()
    config.testbed, config.stages = "tool_use", ("pairs", "dpo", "grpo")
    config.policy.model, config.wording = str(data / "model"), str(data / "words.json")
    config.tool.max_calls, config.policy.rows = 1, 4
    config.sampling.max_new_tokens, config.sampling.temperature = 12, 1.0
    align = config.align
    align.method, align.path, align.validation = "dpo+grpo", str(data / "problems.json"), str(data / "problems.json")
    align.rows, align.check_every, align.check_samples, align.save_every = 4, 2, 1, 1
    align.pairs.steer, align.pairs.tries = False, 12
    align.dpo.epochs, align.dpo.batch, align.dpo.learning_rate, align.dpo.schedule = 1, 2, 1e-3, "constant"
    align.grpo.steps, align.grpo.prompts, align.grpo.group, align.grpo.learning_rate = 3, 2, 2, 1e-3
    return check_settings(read_settings(config))


@pytest.fixture
def lengths_decide(monkeypatch):
    """A random model knows no format: here the length of what it says decides whether it calls the tool, what is run,
    and what it answers."""
    def calls(text, convention):
        return [Call(f"print({len(text)} * 11)")] if len(text) % 3 else []

    monkeypatch.setattr(words, "read_calls", calls)
    monkeypatch.setattr(words, "final_answer", lambda text: str(len(text) % 2))


def through(chosen, workdir):
    experiment.run(chosen, workdir)
    return workdir


def adapter(workdir, name):
    return safetensors.numpy.load_file(workdir / "models" / name / "adapter_model.safetensors")


def told(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timings = ("batch_s", "update_s", "tokens_per_s", "update_tokens_per_s", "compilations")
    return [{name: value for name, value in line.items() if name not in timings} for line in lines]


@pytest.mark.slow
def test_a_run_through_both_ways_and_one_that_was_cut_off_everywhere(chosen, tmp_path, lengths_decide):
    """Cut off after every third line of metrics and started again, until it is through: the same pairs, weights and
    metrics. The model's own sampled answers, with the sandbox's own results between them."""
    whole = through(chosen, tmp_path / "whole")
    pairs = read_pairs(whole / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        roles = [message["role"] for message in pair.chosen_before]
        assert roles and roles == ["assistant", "user"] * (len(roles) // 2) and not pair.rejected_before
        for said, given_back in zip(pair.chosen_before[::2], pair.chosen_before[1::2], strict=True):
            assert given_back["content"] == f"The code printed: {11 * len(said['content'])}"
    lines = told(whole)
    assert lines[0]["stage"] == "pairs" and lines[0]["used"] >= 2 * len(pairs) and lines[0]["wrong"]
    dpo, grpo = ([line for line in lines if line["stage"] == name and "loss" in line] for name in ("dpo", "grpo"))
    assert dpo[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert grpo[0]["ratio"] == pytest.approx(1, abs=1e-6) and abs(grpo[0]["kl"]) < 1e-6
    # Ids of all turns, each at its place: the trainer finds the log-probabilities that the sampler had.
    assert all(line["turns_left_out"] == 0 for line in grpo) and grpo[0]["sampler_difference/max"] < 1e-4
    assert any(line["share_comply"] > 0 for line in grpo)
    assert all(line["tokens"] == round(4 * line["completions/mean_length"]) for line in grpo)

    cut = tmp_path / "cut"
    starts = small_run.cut_off_until(cut / "models" / "grpo", lambda: through(chosen, cut))
    assert starts > 2
    assert (cut / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    for name in ("dpo", "grpo"):
        ours, theirs = adapter(cut, name), adapter(whole, name)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert told(cut) == lines


def test_groups_are_paid_as_the_paper_paid(chosen, lengths_decide):
    """Each reward by hand from what was said: 1 for the right answer, 0.5 for the tool."""
    lab = open_lab(chosen)
    grpo = dataclasses.replace(chosen.align.grpo, prompts=3, group=4)
    draw = alignment.Episodes(chosen, lab, alignment.align_pack(chosen), grpo, paid=False, index=7)
    found = draw(0, lab.model.params, None)
    assert found.rewards.shape == (3, 4, 1) and draw.longest == 2 * 12
    for answer, reward in zip(found.answers, found.rewards.reshape(-1), strict=True):
        calls = len(answer.text) % 3 and answer.finish == "stop"  # a second call is never served
        right = len(answer.text) % 2 == 1 and not calls
        assert reward == 1.0 * right + 0.5 * bool(answer.before)
        assert answer.length <= 2 * 12 and len(answer.tokens) == len(answer.sampled) == len(answer.logprobs)
    assert any(answer.before for answer in found.answers)


def test_problems_of_both_kinds_are_aligned_on_and_complex_ones_looked_at(chosen):
    pack = alignment.align_pack(chosen)
    assert [problem.complex for problem in pack] == [False, True] * 3
    assert [problem.complex for problem in tool_use.load(chosen.align.validation)] == [True] * 3
    wording = load_wording("", "tool_use")
    alignment.check_packs(chosen, wording)
    missing = dataclasses.replace(chosen, align=dataclasses.replace(chosen.align, path="nowhere.json"))
    with pytest.raises(UserError, match="nowhere.json"):
        alignment.check_packs(missing, wording)
