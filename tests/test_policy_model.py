"""The model as a policy: addressed randomness, sampled ids kept, rounds recalled, batches, too long prompts."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
import small_models
import tiny_tokenizers

from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.generate import engine as engines
from atp_jax.generate.sampling import Sampling
from atp_jax.model import Model
from atp_jax.parallel import make_mesh
from atp_jax.policies.model import ModelPolicy
from atp_jax.policies.types import Request

SAMPLING = Sampling(temperature=0.9, max_new_tokens=10)
SEED = 3


@pytest.fixture(scope="module")
def model():
    tokenizer = tiny_tokenizers.qwen3_tokenizer()
    config, params = small_models.drawn_qwen3(tokenizer, 256)
    mesh = make_mesh(devices=jax.devices()[:1])
    # Special tokens end an answer, and so do two common ones, so that answers differ in length.
    return Model(config, tokenizer, params, mesh, {"eos_token_id": [tokenizer.eos_token_id, 40, 300]})


def requests(condition=0, round=1, episodes=range(3), told=None):
    """What is asked in a round; `told`: the answers of the rounds before, a list by round of answers by episode."""
    out = []
    for episode in episodes:
        messages = [{"role": "system", "content": "You run a small bakery."}]
        for number, answers in enumerate(told or [], 1):
            answer = answers[episode]
            messages += [
                {"role": "user", "content": f"Week {number}, shop {episode}?"},
                {"role": "assistant", "content": answer.text, "tokens": answer.tokens},
            ]
        messages.append({"role": "user", "content": f"Week {round}, shop {episode}?"})
        out.append(Request(condition, episode, 0, round, messages))
    return out


def live(policy, condition, rounds, told=()):
    """Answers by round, from the round after those told."""
    told = list(told)
    for number in range(len(told) + 1, rounds + 1):
        told.append(policy.answer(requests(condition, number, told=told)))
    return told


def test_an_answer_is_what_the_engine_draws_for_its_address(model):
    asked = requests(condition=2, round=4)
    answers = ModelPolicy(model, SAMPLING, SEED).answer(asked)
    prompts = [Chat(model.tokenizer).encode(request.messages) for request in asked]
    drawn = model.engine().generate(prompts, SAMPLING, [(SEED, 2, episode, 0, 4) for episode in range(3)])
    for answer, sampled in zip(answers, drawn, strict=True):
        assert (answer.tokens, answer.finish) == (sampled.tokens, sampled.finish)
        assert answer.text == model.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        assert answer.logprob == pytest.approx(sum(sampled.logprobs)) and answer.logprob < 0
        assert (answer.tokens[-1] in model.stop) == (answer.finish == "stop")
    assert len({answer.tokens for answer in answers}) == 3


def test_every_part_of_the_address_and_the_seed_matter(model):
    asked = requests()
    first = ModelPolicy(model, SAMPLING, SEED).answer(asked)[0].tokens
    others = [ModelPolicy(model, SAMPLING, SEED + 1).answer(asked)[0].tokens]
    for change in ({"condition": 1}, {"episode": 7}, {"agent": 1}, {"round": 2}):
        changed = [dataclasses.replace(asked[0], **change), *asked[1:]]
        others.append(ModelPolicy(model, SAMPLING, SEED).answer(changed)[0].tokens)
    assert first not in others and len(set(others)) == len(others)


def test_thinking_reaches_the_template(model, monkeypatch):
    prompts = []
    monkeypatch.setattr(engines.Engine, "prefill", lambda self, asked, *_: prompts.append(asked))
    for thinking in (None, True, False):
        ModelPolicy(model, SAMPLING, SEED, thinking).recall(requests())
    close = model.tokenizer.convert_tokens_to_ids("</think>")
    assert [sum(prompt.count(close) for prompt in asked) for asked in prompts] == [0, 0, 3]


def test_an_interrupted_run_goes_on_bit_for_bit(model):
    """Recalling two rounds and answering the third equals answering all three, log-probabilities included; another
    condition lived through before makes no difference, and neither does one that was begun and abandoned."""
    whole = live(ModelPolicy(model, SAMPLING, SEED), 1, 3)
    resumed, second, abandoned = (ModelPolicy(model, SAMPLING, SEED) for _ in range(3))
    for number in (1, 2):
        resumed.recall(requests(1, number, told=whole[: number - 1]))
    assert live(resumed, 1, 3, told=whole[:2]) == whole
    live(second, 0, 3)
    assert live(second, 1, 3) == whole
    live(abandoned, 1, 2)
    assert live(abandoned, 1, 3) == whole


def test_a_round_reads_only_what_is_new(model, monkeypatch):
    read = []
    original = engines.prefill_chunk

    def spy(weights, state, rows, tokens, count, **static):
        read.append(np.sum(count))
        return original(weights, state, rows, tokens, count, **static)

    monkeypatch.setattr(engines, "prefill_chunk", spy)
    policy, chat = ModelPolicy(model, SAMPLING, SEED), Chat(model.tokenizer)
    told = live(policy, 0, 1)
    asked = requests(round=2, told=told)
    read.clear()
    policy.answer(asked)
    old, new = ([chat.encode(request.messages) for request in round] for round in (requests(), asked))
    assert sum(read) == sum(len(n) - len(o) for n, o in zip(new, old, strict=True))
    read.clear()
    said = policy.answer(asked)[2]
    assert sum(read) == len(asked)  # the last token of each, as nothing is new
    read.clear()
    more = [
        *asked[2].messages, {"role": "assistant", "content": said.text, "tokens": said.tokens},
        {"role": "user", "content": "And then?"},
    ]  # fmt: skip
    policy.answer([dataclasses.replace(asked[2], messages=more, turn=1)])  # the others wait
    assert sum(read) == len(chat.encode(more)) - len(new[2])
    read.clear()
    policy.answer(asked)
    assert sum(read) == len(asked)
    read.clear()
    policy.answer(requests(round=2, episodes=[1, 0, 2], told=told))  # other episodes than those remembered
    assert sum(read) == sum(map(len, new))


def test_rows_that_do_not_fit_one_batch_get_the_same_answers(model):
    """Three episodes one at a time, over two rounds: nothing is kept, and nothing differs but rounding."""
    at_once, one_by_one = ModelPolicy(model, SAMPLING, SEED), ModelPolicy(model, SAMPLING, SEED, rows=1)
    told = live(at_once, 0, 2)
    one_by_one.recall(requests())
    for number in (1, 2):
        answers = one_by_one.answer(requests(round=number, told=told[: number - 1]))
        for one, other in zip(answers, told[number - 1], strict=True):
            assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_prompt_longer_than_the_context_names_its_request(model):
    asked = requests(round=2, condition=1)
    asked[1].messages[-1]["content"] = "loaf " * 300
    policy = ModelPolicy(model, SAMPLING, SEED)
    for ask in (policy.answer, policy.recall):
        with pytest.raises(UserError, match=r"episode 1, agent 0, round 2: the prompt has \d+ tokens, .* is 256"):
            ask(asked)
    with pytest.raises(UserError, match="policy.rows must be at least 1, not 0"):
        ModelPolicy(model, SAMPLING, SEED, rows=0)


def test_what_it_wore_for_a_while_leaves_no_cache_behind(model):
    """The update that follows a draw has that memory."""

    def caches():
        gc.collect()  # what other tests left
        return sum(x.nbytes for x in jax.live_arrays() if x.ndim == 4 and not x.is_deleted())

    policy, before = ModelPolicy(model, SAMPLING, SEED), caches()
    with policy.wearing(model.params, model.lora):
        policy.answer(requests())
        assert caches() > before
    assert caches() == before


def test_a_turn_that_the_context_has_no_room_for_is_cut_off_and_the_others_go_on(model):
    """What a tool printed may be longer than the model's context: no error of the run's, which would come again."""
    short, other = (dataclasses.replace(request, turn=1) for request in requests(episodes=range(2)))
    long = dataclasses.replace(other, messages=[*other.messages, {"role": "user", "content": "9 " * 300}])
    policy = ModelPolicy(model, SAMPLING, SEED)
    answers = policy.answer([short, long])
    assert (answers[1].text, answers[1].tokens, answers[1].finish) == ("", (), "length")
    assert answers[0] == ModelPolicy(model, SAMPLING, SEED).answer([short])[0]
    assert [answer.finish for answer in policy.answer([long])] == ["length"]
    policy.recall([short, long])
    policy.recall([long])
    with pytest.raises(UserError, match="episode 1, agent 0, round 1: the prompt has"):
        policy.answer([dataclasses.replace(long, turn=0)])


@pytest.mark.parametrize("rows", [None, 2])
def test_what_follows_is_asked_at_once_and_answered_as_round_by_round(model, rows):
    """Three episodes of three rounds; a turn for which the context has no room is passed on with its empty answer."""
    expected = live(ModelPolicy(model, SAMPLING, SEED), 0, 3)
    told = [[None] * 3 for _ in range(3)]  # by round and episode
    cut = []

    def follow(request, answer):
        if request.turn:
            cut.append((request.episode, answer.text, answer.finish))
            return []
        told[request.round - 1][request.episode] = answer
        if request.round < 3:
            return requests(0, request.round + 1, [request.episode], told[: request.round])
        long = [*request.messages, {"role": "user", "content": "9 " * 300}]
        return [dataclasses.replace(request, messages=long, turn=1)]

    ModelPolicy(model, SAMPLING, SEED, rows=rows).pursue(requests(), follow)
    for answers, others in zip(told, expected, strict=True):
        for one, other in zip(answers, others, strict=True):
            assert (one.tokens, one.finish, one.prompt) == (other.tokens, other.finish, other.prompt)
            assert one.text == other.text and one.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert sorted(cut) == [(episode, "", "length") for episode in range(3)]
