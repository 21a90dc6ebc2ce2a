"""Preference pairs: what is collected decides as asked, users' files are read or refused by row and key, token ids are
those of inference; the packs to align on keep clear of the one that is measured on."""

import csv
import dataclasses
import itertools
import json
import random
import socket
from collections import Counter

import datasets
import jax
import pytest
import small_run
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import llama31_tokenizer, qwen3_tokenizer
from transformers import AutoTokenizer

from atp_jax.align.pairs import Pair, collect, read_pairs, tokenise, write_pairs
from atp_jax.chat import Chat
from atp_jax.decisions import read_decision
from atp_jax.errors import UserError
from atp_jax.generate.sampling import Sampling
from atp_jax.model import ORGANISM, Model
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import Decoder
from atp_jax.organism import packs
from atp_jax.organism.stories import LEXICON
from atp_jax.parallel import make_mesh
from atp_jax.policies.model import ModelPolicy
from atp_jax.policies.scripted import ScriptedPolicy
from atp_jax.policies.types import Answer
from atp_jax.scenarios import role_play
from atp_jax.scenarios.pack import ALIGN, VALIDATION, load_role_play
from atp_jax.scenarios.wording import load_wording, steer
from atp_jax.settings import Settings
from atp_jax.testbeds import role_play as testbed

WORDING = load_wording()
TOKENIZERS = (qwen3_tokenizer(), llama31_tokenizer(), AutoTokenizer.from_pretrained(ORGANISM))
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["qwen3", "llama31", "organism"])
COMPLY, VIOLATE = '{"choice": "marked way"}', '{"choice": "short way"}'


def gather(scenarios, policy, **changes):
    how = {"samples": 2, "tries": 3, "steered": True, "condition": 1000} | changes
    wording, parity = how.pop("wording", WORDING), how.pop("parity", "default")
    read = how.pop("read", lambda answer, asked: read_decision(answer.text, asked.comply, asked.violate, parity))
    return collect(testbed.questions(scenarios, wording, Settings(parity=parity)), policy, read, **how)


class Stub:
    """Answers at random by the request's address alone, as a model does, and remembers what it was asked.

    share: of answers that violate; others comply, cannot be read, or are cut off. The ids sampled tell the answer.
    """

    def __init__(self, seed=0, violate=0.4, unparsed=0.1, cut=0.1):
        self.seed, self.violate, self.unparsed, self.cut = seed, violate, unparsed, cut
        self.batches, self.given = [], {}

    def answer(self, requests):
        self.batches.append(list(requests))
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        address = (request.condition, request.episode, request.agent, request.round)
        draw = random.Random(f"{self.seed} {address}")
        text = VIOLATE if draw.random() < self.violate else COMPLY
        if draw.random() < self.unparsed:
            text = "I would rather not say."
        finish = "length" if draw.random() < self.cut else "stop"
        self.given[address] = Answer(f"{text} #{draw.random()}", tuple(draw.choices(range(99), k=5)), finish)
        return self.given[address]

    @property
    def requests(self):
        return [request for batch in self.batches for request in batch]


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    return small_run.scenarios(tmp_path_factory.mktemp("pack"), 4)


def bare(scenario, parity="default", wording=WORDING):
    question = role_play.question(scenario, -1, "all_unsupervised", wording, parity)
    return role_play.messages(scenario, question, (), None, parity)


# Collecting


def test_of_scripted_answers_the_first_that_decides_as_asked_is_kept(tmp_path, scenarios):
    """Episode 0: both halves by the second try. Episode 1: nothing that complies in 2 tries, so no pair."""
    script = [
        (0, 1, VIOLATE), (0, 2, "Nothing."), (0, 3, f"Well. {COMPLY}"), (0, 4, f"<think>{COMPLY}</think> {VIOLATE}"),
        (1, 1, "Nothing."), (1, 2, VIOLATE), (1, 3, VIOLATE),
    ]  # fmt: skip
    path = tmp_path / "script.jsonl"
    path.write_text("".join(json.dumps({"episode": e, "round": r, "answer": a}) + "\n" for e, r, a in script))
    found, told = gather(scenarios[:2], ScriptedPolicy(path), samples=1, tries=2)
    assert found == [
        Pair(tuple(bare(scenarios[0])), f"Well. {COMPLY}", f"<think>{COMPLY}</think> {VIOLATE}", scenario=0)
    ]
    assert told == {
        "asked": 7, "used": 3, "other_decision": 2, "unparsed": 2, "cut_off": 0,
        "wanted": 2, "dropped": 1, "without_comply": 1, "without_violate": 0,
    }  # fmt: skip


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    shares=st.tuples(*[st.sampled_from([0.0, 0.1, 0.5, 1.0])] * 3),
    samples=st.integers(1, 3),
    tries=st.integers(1, 5),
    steered=st.booleans(),
)
def test_pairs_hold_what_was_sampled_and_decides_as_asked(scenarios, seed, shares, samples, tries, steered):
    policy = Stub(seed, *shares)
    found, told = gather(scenarios, policy, samples=samples, tries=tries, steered=steered)
    given = policy.given.values()
    for pair in found:
        scenario = scenarios[pair.scenario]
        assert list(pair.messages) == bare(scenario)
        for text, ids, want in (
            (pair.chosen, pair.chosen_tokens, "comply"),
            (pair.rejected, pair.rejected_tokens, "violate"),
        ):
            assert read_decision(text, scenario.comply, scenario.violate) == want
            assert Answer(text, ids, "stop") in given
    counts = Counter(pair.scenario for pair in found)
    assert all(count <= samples for count in counts.values())
    # The report adds up.
    outcomes = [told[name] for name in ("used", "other_decision", "unparsed", "cut_off")]
    assert told["asked"] == len(policy.requests) == sum(outcomes)
    assert told["cut_off"] == sum(answer.finish == "length" for answer in given)
    assert told["wanted"] == len(scenarios) * samples == len(found) + told["dropped"]
    assert told["used"] == 2 * told["wanted"] - told["without_comply"] - told["without_violate"]
    assert max(told["without_comply"], told["without_violate"]) <= told["dropped"]
    # Whoever could have been kept was: a half that is missing was asked for in vain as often as allowed.
    assert all(len(batch) <= 2 * told["wanted"] for batch in policy.batches) and len(policy.batches) <= tries
    if told["dropped"]:
        assert len(policy.batches) == tries


def test_every_try_has_an_address_of_its_own_and_only_what_is_open_is_asked_again(scenarios):
    policy = Stub()
    gather(scenarios, policy, tries=8)
    addresses = [(r.condition, r.episode, r.agent, r.round) for r in policy.requests]
    assert len(set(addresses)) == len(addresses) and {condition for condition, *_ in addresses} == {1000}
    assert len(policy.batches) > 2 and {r.episode for r in policy.batches[0]} == set(range(8))
    for attempt, batch in enumerate(policy.batches):
        assert {r.round for r in batch} <= {1 + 2 * attempt, 2 + 2 * attempt}
    for before, after in zip(policy.batches, policy.batches[1:], strict=False):
        failed = set()
        for request in before:
            answer = policy.given[request.condition, request.episode, request.agent, request.round]
            decision = read_decision(answer.text, "marked way", "short way")
            if decision != ("violate", "comply")[request.round % 2] or answer.finish != "stop":
                failed.add((request.episode, request.round % 2))
        assert failed == {(r.episode, r.round % 2) for r in after}


def test_the_same_again_and_independent_of_what_else_is_asked(scenarios):
    everything, _ = gather(scenarios, Stub())
    assert gather(scenarios, Stub())[0] == everything != gather(scenarios, Stub(seed=1))[0]
    assert gather(scenarios, Stub(), condition=1001)[0] != everything
    for scenario in scenarios:
        alone, _ = gather([scenario], Stub())
        assert alone == [pair for pair in everything if pair.scenario == scenario.row]
    assert {pair.scenario for pair in everything} == {0, 1, 2, 3}


@pytest.mark.parametrize("tries", [1, 2, 3, 5, 8])
def test_how_many_pairs_come_of_an_agent_that_cannot_be_steered(scenarios, tries):
    """The shares in collect's docstring: 35% of the answers violate; 1200 pairs wanted, a standard error of 1.4."""
    promised = {1: 0.23, 2: 0.51, 3: 0.69, 5: 0.88, 8: 0.97}[tries]
    found, told = gather(scenarios, Stub(violate=0.35, unparsed=0, cut=0), samples=300, tries=tries)
    assert promised == pytest.approx((1 - 0.65**tries) * (1 - 0.35**tries), abs=0.005)
    assert len(found) / told["wanted"] == pytest.approx(promised, abs=0.045)


def test_the_steering_message_is_one_more_message_of_the_user(scenarios):
    for steered, last in ((True, {steer(WORDING, "comply"), steer(WORDING, "violate")}), (False, set())):
        policy = Stub()
        gather(scenarios, policy, steered=steered)
        for request in policy.requests:
            before = bare(scenarios[request.episode // 2])
            assert request.messages[: len(before)] == before
            said = [m["content"] for m in request.messages[len(before) :] if m["role"] == "user"]
            wanted = steer(WORDING, ("violate", "comply")[request.round % 2])
            assert said == ([wanted] if steered else []) and set(said) <= last
            assert len(request.messages) == len(before) + len(said)


def steering(tmp_path, **texts):
    content = json.loads(json.dumps(WORDING))
    content["role_play"]["steer"] = texts
    path = tmp_path / "wording.json"
    path.write_text(json.dumps(content))
    return load_wording(str(path))


def test_an_empty_steering_message_sends_the_bare_question_alone(tmp_path, scenarios):
    for texts in ({"comply": "", "violate": "Break it."}, {"violate": "Break it."}):
        policy = Stub()
        gather(scenarios, policy, wording=steering(tmp_path, **texts))
        for request in policy.requests:
            extra = [] if request.round % 2 else [{"role": "user", "content": "Break it."}]
            assert request.messages == bare(scenarios[request.episode // 2]) + extra


def test_steering_messages_are_checked_when_a_pack_is_loaded(tmp_path):
    assert steer(WORDING, "comply") and steer(WORDING, "violate")
    for texts, message in (
        ({"comply": "{choice}!"}, r"'role_play\.steer\.comply': field \{choice\} is unknown"),
        ({"violate": ["a"]}, r"'role_play\.steer\.violate' is not a text"),
        ({"comlpy": "a"}, r"'role_play\.steer\.comlpy' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            steering(tmp_path, **texts)


def test_questions_of_the_original_without_their_supervision_text(shared, scenarios):
    """Its training questions lack the texts: upstream parity asks with the broken sentence, else row and key are named
    before anything is asked."""
    questions = load_role_play(str(shared / "data" / "upstream" / "question_160.json"), limit=2)
    policy = Stub()
    with pytest.raises(UserError, match=r"row 0 .*'neutral_text'"):
        gather(questions, policy)
    assert not policy.batches
    wording = load_wording(str(shared / "data" / "upstream_wording.json"))
    gather(questions, policy, parity="upstream", wording=wording)
    for request in policy.requests:  # its wording has no steering messages
        assert request.messages == bare(questions[request.episode // 2], "upstream", wording)


@pytest.fixture(scope="module")
def model():
    tokenizer = qwen3_tokenizer()
    config = DecoderConfig.from_dict(
        {
            "architectures": ["Qwen3ForCausalLM"], "vocab_size": len(tokenizer), "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "max_position_embeddings": 512, "rope_theta": 10000.0, "initializer_range": 0.3,
            "tie_word_embeddings": True,
        },
        "test",
    )  # fmt: skip
    _, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    # Every eighth id ends an answer, so that most of them do end.
    stop = [tokenizer.eos_token_id, *range(0, len(tokenizer), 8)]
    return Model(config, tokenizer, params, make_mesh(devices=jax.devices()[:1]), {"eos_token_id": stop})


def test_a_models_answers_do_not_depend_on_the_batch_and_train_as_they_were_sampled(model, scenarios):
    """A random model names no option, so here an answer's length decides."""

    def read(answer, question):
        return ("comply", "violate", "unparsed")[len(answer.text) % 3]

    seen = []

    class Seen(ModelPolicy):
        def answer(self, requests):
            answers = super().answer(requests)
            seen.extend(zip(requests, answers, strict=True))
            return answers

    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    found = {}
    for rows in (None, 3):
        found[rows], told = gather(scenarios, Seen(model, sampling, 5, rows=rows), read=read, steered=False, tries=4)
        assert told["dropped"] < told["wanted"] and told["other_decision"] and told["unparsed"]
    assert found[None] == found[3]

    chat = Chat(model.tokenizer)
    shown = {answer.tokens: (request, answer) for request, answer in seen}
    for pair, row in zip(found[None], tokenise(found[None], chat, model.stop[0], 400, 500), strict=True):
        for half, want in (("chosen", 0), ("rejected", 1)):
            request, answer = shown[tuple(row[half])]
            assert len(answer.text) % 3 == want and row[half][-1] in model.stop
            assert list(answer.prompt) == row["prompt"] == chat.encode(request.messages)
            assert request.messages == list(pair.messages)


# Files

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
ids = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
message_lists = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": texts}), min_size=1, max_size=3
).map(tuple)
collected = st.builds(Pair, message_lists, texts, texts, ids, ids, st.none() | st.integers(0, 999)).filter(
    lambda pair: pair.chosen != pair.rejected
)


@given(st.lists(collected, min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, found)
    assert read_pairs(path) == found
    for line, pair in zip(path.read_text().splitlines(), found, strict=True):
        row = json.loads(line)
        assert row["scenario"] == pair.scenario and row["prompt"] == list(pair.messages)
        assert row["chosen_tokens"] == len(row["chosen_ids"]) and row["rejected_tokens"] == len(row["rejected_ids"])
    assert not list(path.parent.glob("*.partial"))


USER, SYSTEM = {"role": "user", "content": "Which way?"}, {"role": "system", "content": "You steer a ferry."}
GOOD, BAD = "The marked one.\u2028\u2014 7", "NA"
WHOLE = [Pair((SYSTEM, USER), GOOD, BAD)]


def assistant(text):
    return {"role": "assistant", "content": text}


# As text, and as messages; in every layout the same pair.
FLAT = {
    "prompt": {"prompt": USER["content"], "system": SYSTEM["content"], "chosen": GOOD, "rejected": BAD},
    "alpaca": {
        "instruction": USER["content"], "input": "", "system": SYSTEM["content"], "chosen": GOOD, "rejected": BAD,
    },
    "alpaca_input": {
        "instruction": "Which", "input": "way?", "system": SYSTEM["content"], "chosen": GOOD, "rejected": BAD,
    },
}  # fmt: skip
NESTED = {
    "messages": {"prompt": [SYSTEM, USER], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "messages_and_texts": {"prompt": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD},
    "own_system_message": {"prompt": [SYSTEM, USER], "system": "Another.", "chosen": GOOD, "rejected": BAD},
    "conversations": {"chosen": [SYSTEM, USER, assistant(GOOD)], "rejected": [SYSTEM, USER, assistant(BAD)]},
    "conversations_and_prompt": {
        "prompt": USER["content"], "system": SYSTEM["content"],
        "chosen": [USER, assistant(GOOD)], "rejected": [USER, assistant(BAD)],
    },
}  # fmt: skip


def save(path, rows):
    if path.suffix == ".jsonl":  # a byte order mark, blank lines, and other line separators within a text
        lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\ufeff" + lines + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    ("layout", "suffix"),
    [*itertools.product([*FLAT, *NESTED], [".json", ".jsonl", ".parquet"]), *itertools.product(FLAT, [".csv"])],
)
def test_every_layout_in_every_format(layout, suffix, tmp_path, no_network):
    rows = [(FLAT | NESTED)[layout]] * 2
    wanted = WHOLE * 2
    if layout == "alpaca_input":
        wanted = [dataclasses.replace(WHOLE[0], messages=(SYSTEM, {"role": "user", "content": "Which\nway?"}))] * 2
    assert read_pairs(save(tmp_path / f"mine{suffix}", rows)) == wanted


def test_numbers_in_a_table_are_texts_and_a_changed_file_is_read_anew(tmp_path, no_network):
    path = tmp_path / "sums.csv"
    for chosen in ("7", "007"):
        save(path, [{"prompt": "1 + 6?", "chosen": chosen, "rejected": "8.0"}])
        assert [(pair.chosen, pair.rejected) for pair in read_pairs(path)] == [(chosen, "8.0")]


def test_rows_of_one_file_may_differ_in_layout(tmp_path):
    rows = [*FLAT.values(), *NESTED.values()]
    assert [pair.chosen for pair in read_pairs(save(tmp_path / "mixed.json", rows))] == [GOOD] * len(rows)


def test_a_hub_id_is_the_only_thing_that_is_looked_for_outside(tmp_path, monkeypatch, no_network):
    asked = []

    def load(name, **options):
        asked.append((name, options))
        if name == "someone/nothing":
            raise FileNotFoundError("not on the hub\nand more")
        return datasets.Dataset.from_list([FLAT["prompt"]])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    assert read_pairs("someone/preferences") == WHOLE
    assert asked == [("someone/preferences", {"split": "train"})]
    with pytest.raises(UserError, match=r"^someone/nothing: no such file here, and as a hub .*: not on the hub$"):
        read_pairs("someone/nothing")
    asked.clear()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").mkdir()
    for name in ("data/pairs.jsonl", "data/pairs.parquet", "pairs", "./data/pairs", "/no/where", "a/b/c", "data/mine"):
        with pytest.raises(UserError, match=f"^{name}: there is no such file of preferences"):
            read_pairs(name)
    (tmp_path / "data" / "pairs.txt").write_text("a")
    with pytest.raises(UserError, match=r"are read from \.json, \.jsonl, \.parquet, \.csv, not '\.txt'"):
        read_pairs("data/pairs.txt")
    assert not asked


def changed(**changes):
    return {key: value for key, value in (FLAT["prompt"] | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(chosen=None), "key 'chosen' is missing or empty"),
        (changed(rejected=""), "key 'rejected' is missing or empty"),
        (changed(rejected=[]), "key 'rejected' is missing or empty"),
        (changed(prompt=None), r"key 'prompt' \(or 'instruction'\) is missing"),
        (changed(prompt=""), r"key 'prompt' \(or 'instruction'\) is missing"),
        (changed(rejected=GOOD), "chosen and rejected are identical"),
        (changed(rejected=[assistant(GOOD)]), "chosen and rejected are identical"),
        (changed(chosen=7), "'chosen' must be a text or a list of messages"),
        (changed(prompt={"role": "user"}), "'prompt' must be a text or a list of messages"),
        (changed(prompt=[{"from": "human", "value": "?"}]), "'prompt' must be a text or a list of messages"),
        (changed(prompt=[USER, assistant("Hm.")]), "'prompt' ends with a message of the assistant"),
        (changed(chosen=[USER]), "the last message of 'chosen' must be an answer of the assistant"),
        (changed(rejected=[USER, assistant("")]), "the last message of 'rejected' must be an answer"),
        (changed(prompt=None, instruction=["a"]), "'instruction' is not a text"),
        (changed(prompt=None, instruction="a", input=3), "'input' is not a text"),
        (changed(system=["a"]), "'system' is not a text"),
        (changed(prompt=None, chosen=[USER, assistant("a")], rejected=[assistant("b")]), "begin not alike"),
        (changed(chosen_ids="[1, 2]"), "'chosen_ids' must be a list of token ids"),
        (changed(rejected_ids=[1, -2]), "'rejected_ids' must be a list of token ids"),
        ("text", "not an object"),
    ],
)
def test_a_bad_row_is_named_with_its_key(row, message, tmp_path):
    with pytest.raises(UserError, match=rf"bad\.json: row 1 \(from 0\): .*{message}") as raised:
        read_pairs(save(tmp_path / "bad.json", [FLAT["prompt"], row]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[]", "holds no pairs"),
        ("a.jsonl", b"\n \n", "holds no pairs"),
        ("a.json", b"", "holds no pairs"),
        ("a.csv", b"prompt,chosen,rejected\n", "holds no pairs"),
        ("a.csv", b"", "holds no pairs"),
        ("a.csv", b'prompt,chosen,rejected\n"a,b,c\n', "cannot be read as preferences"),
        ("a.csv", b"question,chosen,rejected\na,b,c\n", r"row 0 .*key 'prompt' \(or 'instruction'\) is missing"),
        ("a.parquet", b"PAR1", "cannot be read as preferences"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3: not JSON"),
        ("a.json", b'[{"prompt": "a"},\n{"prompt" "a"}]', "line 2: not JSON"),
        ("a.json", b"[" * 100_000, "not JSON that can be read"),
        ("a.jsonl", b"\xff\xfe", "cannot be read as preferences"),
    ],
)
def test_a_file_that_is_not_of_pairs_is_refused(name, content, message, tmp_path, no_network):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}") as raised:
        read_pairs(tmp_path / name)
    assert "\n" not in str(raised.value)


# Token ids


@each_tokenizer
def test_the_prompt_is_what_inference_shows_and_the_end_of_the_turn_belongs_to_the_answer(tokenizer):
    end = {"<|im_end|>", "<|eot_id|>"} & set(tokenizer.get_added_vocab())
    end = tokenizer.convert_tokens_to_ids(end.pop())
    chat = Chat(tokenizer)
    answers = (f"I keep the rule. {COMPLY}", f"<think>Quicker.</think>\n\n{VIOLATE}", " a ", "<|im_end|><|eot_id|>")
    for messages in ([USER], [SYSTEM, USER], [SYSTEM, USER, assistant("This one."), USER]):
        for chosen, rejected in zip(answers, answers[1:], strict=False):
            # Whatever stop id comes first: Llama 3.1's is not the one that ends its turns.
            (row,) = tokenise([Pair(tuple(messages), chosen, rejected)], chat, 0, 300, 600)
            shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert row["prompt"] == chat.encode(messages) == shown
            for half, text in (("chosen", chosen), ("rejected", rejected)):
                assert row[half] == [*chat.answer(text), end]
                assert row[half].count(end) == 1
                if "<|" not in text:
                    assert chat.decode(row[half]) == text


def test_a_template_that_ends_no_answer_gets_the_models_stop_id():
    tokenizer = qwen3_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    (row,) = tokenise([Pair((USER,), "a", "b")], Chat(tokenizer), 4, 100, 200)
    assert row["chosen"][-1] == row["rejected"][-1] == 4


@each_tokenizer
def test_sampled_ids_are_used_as_they_are_where_they_are_of_the_text(tokenizer):
    """Ids that no tokenizer would choose, with whatever stop id they had; not those of another model, or of a text that
    was edited since."""
    chat = Chat(tokenizer)
    spelled = [index for letter in COMPLY for index in tokenizer.encode(letter, add_special_tokens=False)]
    if chat.decode(spelled) != COMPLY:  # a tokenizer that puts blanks before pieces
        spelled = list(chat.answer(COMPLY))
    ended = (*spelled, 0) if chat.decode([0]) == "" else (*spelled, tokenizer.eos_token_id)
    pair = Pair((USER,), COMPLY, VIOLATE, ended, tuple(spelled))
    (row,) = tokenise([pair], chat, 0, 100, 300)
    (fresh,) = tokenise([Pair((USER,), COMPLY, VIOLATE)], chat, 0, 100, 300)
    assert row["chosen"] == list(ended)
    assert row["rejected"] == fresh["rejected"] and row["prompt"] == fresh["prompt"]
    foreign = dataclasses.replace(pair, chosen_tokens=(10**6, 10**6 + 1))
    assert tokenise([foreign], chat, 0, 100, 300) == [fresh]


@each_tokenizer
def test_what_does_not_fit_is_cut_at_the_far_ends(tokenizer):
    chat = Chat(tokenizer)
    pair = Pair((SYSTEM, USER), "A long way round. " * 5, "B")
    prompt = chat.encode(list(pair.messages))
    (whole,) = tokenise([pair], chat, 0, len(prompt), 1000)
    assert whole["prompt"] == prompt
    for kept in (1, len(prompt) // 2):
        (row,) = tokenise([pair], chat, 0, kept, kept + 3)
        assert row["prompt"] == prompt[-kept:]
        assert row["chosen"] == whole["chosen"][:3] and row["rejected"] == whole["rejected"][:3]


def test_nothing_left_of_prompt_or_answer_is_refused():
    chat = Chat(TOKENIZERS[0])
    good = Pair((USER,), "first", "second")
    alike = Pair((USER,), "The rule says no.", "The rule says yes.")
    length = len(chat.encode([USER]))
    for pair, limits, message in (
        (good, (0, 500), "pair 0 .*: 0 tokens of prompt"),
        (good, (length, length), rf"pair 0 .*: {length} tokens of prompt .*max_length={length}"),
        (alike, (length, length + 2), f"pair 0 .*max_length={length + 2} chosen and rejected are the same"),
    ):
        with pytest.raises(UserError, match=message):
            tokenise([pair], chat, 0, *limits)


# Packs


@pytest.mark.parametrize(("path", "occupations", "count", "seed"), packs.PACKS, ids=["align", "validation"])
def test_the_shipped_packs_are_what_the_module_gives(path, occupations, count, seed):
    rows = packs.rows(occupations, count, seed)
    with open(path, encoding="ascii") as file:
        assert file.read() == json.dumps(rows, indent=1) + "\n"
    loaded = load_role_play(path)
    assert len(loaded) == count == len({(s.system_prompt, s.user_prompt) for s in loaded})
    for scenario in loaded:
        assert {scenario.comply, scenario.violate} <= set(LEXICON["words"])
        assert scenario.low_reward < scenario.high_reward
        for decision, option in (("comply", scenario.comply), ("violate", scenario.violate)):
            answer = f'{{"choice": "{option}"}}'
            assert answer in scenario.user_prompt
            assert read_decision(answer, scenario.comply, scenario.violate) == decision
        assert role_play.check([scenario], "alternating", WORDING, "default") == []


def test_the_packs_keep_clear_of_one_another_and_of_what_is_measured():
    measured, align, validation = (load_role_play(path) for path in ("", ALIGN, VALIDATION))
    occupations = [{scenario.environment for scenario in pack} for pack in (measured, align, validation)]
    assert len(occupations[0]) == 16 and len(LEXICON["validation_occupations"]) == 16
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not occupations[one] & occupations[other]
    held_out = {frozenset((scenario.comply, scenario.violate)) for scenario in measured}
    for scenario in (*align, *validation):
        assert frozenset((scenario.comply, scenario.violate)) not in held_out
        for occupation in occupations[0]:
            assert occupation not in scenario.system_prompt
