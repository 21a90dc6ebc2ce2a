"""Alignment on tool use: whole answers as ids of which some were said and some were given back, what is kept of them
in pairs. What is learned from them: tests/test_tool_use_training.py."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_tellers import PROBLEMS, SETTINGS, WORDING, Teller, asked, called, reading, script, solver, tokenizer

from atp_jax.align.pairs import Pair, collect, read_pairs, tokenise, write_pairs
from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.policies.types import Answer, follow
from atp_jax.settings import GrpoSettings
from atp_jax.testbeds import tool_use
from atp_jax.testbeds.types import Condition
from atp_jax.tools import convention_of

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
