"""The engine: what it answers does not depend on batch, bucket, cache or interruption, and nothing compiles twice."""

import contextlib
import dataclasses
import gc
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from hypothesis import given
from hypothesis import strategies as st

from atp_jax import parallel
from atp_jax.errors import UserError
from atp_jax.generate import engine as engines
from atp_jax.generate import programs
from atp_jax.generate import sampling as samplers
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.generate.sizes import bucket, common_prefix
from atp_jax.generate.wanted import Next
from atp_jax.models import lora
from atp_jax.models.cache import KVCache

HERE = Path(__file__).resolve().parent
ONE = parallel.make_mesh(devices=jax.devices()[:1])
CONTEXT = 400


@pytest.fixture(scope="module")
def model():
    """(config, graphdef, params) of the stored small Qwen3, with a longer context."""
    config, graphdef, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)
    return dataclasses.replace(config, max_position_embeddings=CONTEXT), graphdef, params


@pytest.fixture
def new_engine(model):
    config, _, params = model
    return lambda stop=(): Engine(config, params, stop, ONE)


def text(seed, *lengths):
    """Prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, length).tolist() for length in lengths]


def streams(*rows, seed=5, round=1):
    return [(seed, 0, row, 0, round) for row in rows]


def assert_same(one, other):
    """The same tokens, and log-probabilities up to the rounding of differently shaped sums."""
    assert [a.tokens for a in one] == [b.tokens for b in other]
    assert [a.finish for a in one] == [b.finish for b in other]
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


MIXED = [
    Sampling(max_new_tokens=12),
    Sampling(temperature=0.7, max_new_tokens=9),
    Sampling(temperature=0.0, top_k=2, max_new_tokens=10),
    Sampling(temperature=1.3, top_k=5, max_new_tokens=11),
    Sampling(temperature=0.9, top_p=0.6, max_new_tokens=12),
]


def test_log_probs_are_those_of_the_whole_row_without_a_cache(model, new_engine):
    """Prompt and answer in one piece through Decoder.hidden and the head; every row its own settings."""
    _, graphdef, params = model
    prompts = text(0, 3, 20, 1, 37, 16)
    answers = new_engine().generate(prompts, MIXED, streams(*range(5)))
    assert [len(answer.tokens) for answer in answers] == [s.max_new_tokens for s in MIXED]

    rows = np.zeros((5, 64), np.int32)
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        row[: len(prompt) + len(answer.tokens)] = [*prompt, *answer.tokens]
    lengths = np.array([len(p) + len(a.tokens) for p, a in zip(prompts, answers, strict=True)], np.int32)
    logits = np.asarray(small_models.logits(graphdef, params, rows, lengths))
    for b, (prompt, answer, asked) in enumerate(zip(prompts, answers, MIXED, strict=True)):
        at = logits[b, len(prompt) - 1 : lengths[b] - 1]
        if asked.temperature == 0:
            assert answer.tokens == tuple(at.argmax(-1))
        else:
            n = len(at)
            cut = np.full(n, asked.top_k), np.full(n, asked.top_p, np.float32)
            at = np.asarray(samplers.truncate(at / np.float32(asked.temperature), *cut))
        expected = np.take_along_axis(jax.nn.log_softmax(at), np.array(answer.tokens)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(answer.logprobs, expected, atol=1e-5, rtol=0)


def test_a_row_is_answered_alone_as_in_any_batch_and_bucket(new_engine):
    """Alone; among others; with a neighbour so long that the cache and the pieces of prefill have other sizes."""
    prompts = text(1, 30, 7, 19, 300, 2)
    together = new_engine().generate(prompts, MIXED, streams(4, 3, 2, 1, 0))
    small = new_engine().generate(prompts[:3], MIXED[:3], streams(4, 3, 2))
    alone = [new_engine().generate([prompts[i]], MIXED[i], streams(4 - i))[0] for i in (0, 4)]
    assert_same(together[:3], small)
    assert_same([together[0], together[4]], alone)


def test_the_order_of_rows_and_what_others_ask_do_not_matter(new_engine):
    prompts = text(2, 12, 9, 25)
    asked = [MIXED[0], MIXED[3], MIXED[4]]
    answers = new_engine().generate(prompts, asked, streams(0, 1, 2))
    assert_same(new_engine().generate(prompts[::-1], asked[::-1], streams(2, 1, 0)), answers[::-1])
    # The same prompt under another episode, round or seed is answered differently.
    others = [streams(9), streams(0, round=2), streams(0, seed=6)]
    seen = {new_engine().generate(prompts[:1], asked[0], stream)[0].tokens for stream in others}
    assert len(seen | {answers[0].tokens}) == 4


@contextlib.contextmanager
def prefilled(monkeypatch):
    """Counts the prompt tokens that are read, by row."""
    counts = []

    def spy(weights, state, rows, tokens, count, **static):
        read = np.zeros(len(state.length) + 1, int)  # the last one: lines of no row
        read[np.asarray(rows)] = np.asarray(count)
        counts.append(read[:-1])
        return original(weights, state, rows, tokens, count, **static)

    original = engines.prefill_chunk
    with monkeypatch.context() as patch:
        patch.setattr(engines, "prefill_chunk", spy)
        yield counts


def test_rounds_that_reuse_a_prefix_answer_like_fresh_ones(new_engine, monkeypatch):
    """Appended, rewound, repeated, cut short, replaced: only what is new is read, and the answers are the same."""
    engine = new_engine()
    asked = Sampling(max_new_tokens=10)
    prompts = text(3, 40, 25, 8)
    answers = engine.generate(prompts, asked, streams(0, 1, 2))
    one, two, three = (p + list(a.tokens) + text(4, 23)[0] for p, a in zip(prompts, answers, strict=True))
    rounds = [
        ([one, two, three], [10 + 23, 10 + 23, 10 + 23]),
        ([one[:45] + text(6, 30)[0], two + text(7, 8)[0], three[:-4]], [30, 8, 1]),  # the first one rewound
        ([one[:45], two, three], [1, 1, 4]),  # prefixes of what is held: one token is read again
        (text(8, 20, 30, 9), [20, 30, 9]),
    ]
    for number, (prompts, new) in enumerate(rounds, 2):
        with prefilled(monkeypatch) as counts:
            answers = engine.generate(prompts, asked, streams(0, 1, 2, round=number))
        spared = np.array(new) - np.sum(counts, axis=0)  # a token or so, where texts begin alike by chance
        assert np.all(spared >= 0) and np.all(spared <= 1)
        assert_same(answers, new_engine().generate(prompts, asked, streams(0, 1, 2, round=number)))


def test_some_go_on_while_the_others_wait(new_engine, monkeypatch):
    """As agents that call a tool: they go on in their rows, the others keep theirs, and next round nothing is read
    twice. What does not begin with a row's prompt, or is asked in another order, is read anew and answered the same."""
    engine, asked = new_engine(), Sampling(max_new_tokens=10)
    prompts = text(3, 40, 25, 8, 30)
    answers = engine.generate(prompts, asked, streams(0, 1, 2, 3))
    longer = [p + list(a.tokens) + text(4, 9)[0] for p, a in zip(prompts, answers, strict=True)]

    def check(number, some, texts, read):
        with prefilled(monkeypatch) as counts:
            found = engine.generate(texts, asked, streams(*some, round=number))
        if read is not None:
            np.testing.assert_array_equal(np.sum(counts, axis=0), read)
        assert_same(found, new_engine().generate(texts, asked, streams(*some, round=number)))
        return found

    called = check(2, (1, 3), [longer[1], longer[3]], [0, 19, 0, 19])
    for row, answer in zip((1, 3), called, strict=True):
        longer[row] = longer[row] + list(answer.tokens) + text(5, 6)[0]
    check(3, (3,), [longer[3]], [0, 0, 0, 16])
    check(4, (0, 1, 2, 3), longer, [19, 16, 19, 1])
    check(5, (3, 0), [longer[3], longer[0]], None)
    check(6, (0, 1, 2, 3), longer, None)


def test_a_prompt_that_is_forgotten_is_read_again(new_engine, monkeypatch):
    engine, prompts = new_engine(), text(9, 21, 30)
    engine.prefill(prompts, Sampling())
    engine.forget()
    with prefilled(monkeypatch) as counts:
        engine.prefill(prompts, Sampling())
    np.testing.assert_array_equal(np.sum(counts, axis=0), [21, 30])


def test_recalling_prompts_goes_on_bit_for_bit(new_engine, monkeypatch):
    """An engine that answered three rounds and one that only read their prompts answer the fourth identically, though
    the answers of the first one made its cache grow on the way."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    asked = Sampling(max_new_tokens=50)
    lived, recalled = new_engine(), new_engine()
    prompts = text(10, 20, 33, 41)
    for number in (1, 2, 3):
        answers = lived.generate(prompts, asked, streams(0, 1, 2, round=number))
        recalled.prefill(prompts, asked)
        some = [prompts[row] + text(20 + number, 5)[0] for row in (0, 2)]  # the others wait
        lived.generate(some, asked, streams(0, 2, round=number, seed=7))
        recalled.prefill(some, asked)
        prompts = [p + list(a.tokens[:2]) + text(number, 3)[0] for p, a in zip(prompts, answers, strict=True)]
    caches = []
    for engine in (lived, recalled):
        engine.prefill(prompts, asked)
        caches.append(jax.device_get(engine._state.cache))
    one, other = (engine.generate(prompts, asked, streams(0, 1, 2, round=4)) for engine in (lived, recalled))
    assert one == other
    # What was answered has left no trace, not even in the size, which decides how sums are rounded.
    chex.assert_trees_all_equal_shapes(*caches)
    for row, prompt in enumerate(prompts):
        held = [
            [array[row, :, :, : len(prompt)] for array in cache.keys]
            + [array[row, :, : len(prompt)] for array in cache.values]
            for cache in caches
        ]
        chex.assert_trees_all_equal(*held)


def test_long_prompts_are_read_in_pieces(new_engine, monkeypatch):
    """Rows end in different pieces; the last piece of one is padding of another."""
    prompts, asked = text(15, 40, 5, 17), Sampling(max_new_tokens=10)
    at_once = new_engine().generate(prompts, asked, streams(0, 1, 2))
    monkeypatch.setattr(engines, "WIDEST", 16)
    with prefilled(monkeypatch) as counts:
        in_pieces = new_engine().generate(prompts, asked, streams(0, 1, 2))
    np.testing.assert_array_equal(counts, [[16, 5, 16], [16, 0, 1], [8, 0, 0]])
    assert_same(in_pieces, at_once)


def test_long_answers_in_chunks_equal_one_chunk(new_engine, monkeypatch):
    """The host looks several times and the cache grows in between; rows end in different chunks."""
    prompts, asked = text(11, 20, 41, 8), [Sampling(max_new_tokens=n) for n in (60, 20, 1)]
    at_once = new_engine().generate(prompts, asked, streams(0, 1, 2))
    monkeypatch.setattr(engines, "CHUNK", 16)
    assert_same(new_engine().generate(prompts, asked, streams(0, 1, 2)), at_once)
    assert [len(answer.tokens) for answer in at_once] == [60, 20, 1]


def test_answers_end_at_the_first_stop_id_of_the_list(new_engine):
    prompts, asked = text(12, 5, 18, 11), Sampling(max_new_tokens=30)
    free = new_engine().generate(prompts, asked, streams(0, 1, 2))
    assert {answer.finish for answer in free} == {"length"}
    stop = {free[0].tokens[7], free[1].tokens[0], free[1].tokens[12]}
    for answer, whole in zip(new_engine(stop).generate(prompts, asked, streams(0, 1, 2)), free, strict=True):
        end = next((i for i, token in enumerate(whole.tokens) if token in stop), None)
        assert answer.finish == ("length" if end is None else "stop")
        assert answer.tokens == (whole.tokens if end is None else whole.tokens[: end + 1])
        np.testing.assert_allclose(answer.logprobs, whole.logprobs[: len(answer.tokens)], atol=1e-5, rtol=0)
    # On its last allowed token an answer still ends by the stop id.
    last = Sampling(max_new_tokens=1)
    assert new_engine({free[1].tokens[0]}).generate(prompts[1:2], last, streams(1))[0].finish == "stop"


def test_answers_end_where_the_context_ends(new_engine):
    prompts = text(13, CONTEXT - 5, CONTEXT - 1, 10)
    answers = new_engine().generate(prompts, Sampling(max_new_tokens=20), streams(0, 1, 2))
    assert [(len(answer.tokens), answer.finish) for answer in answers] == [(5, "length"), (1, "length"), (20, "length")]


@contextlib.contextmanager
def batches(monkeypatch):
    """Collects (rows, cache positions) of every chunk that is decoded."""
    seen = []

    def spy(weights, state, *rest, **static):
        seen.append((len(state.length), state.cache.values[0].shape[2]))
        return original(weights, state, *rest, **static)

    original = engines.decode_chunk
    with monkeypatch.context() as patch:
        patch.setattr(engines, "decode_chunk", spy)
        yield seen


@contextlib.contextmanager
def sizes(monkeypatch):
    """Of every chunk that is decoded: rows, positions of their caches, and groups that share a prompt."""
    seen = []

    def spy(weights, state, *arguments, **static):
        groups = 0 if state.shared is None else len(state.shared.length)
        seen.append((len(state.length), state.cache.values[0].shape[2], groups))
        return original(weights, state, *arguments, **static)

    original = engines.decode_chunk
    with monkeypatch.context() as patch:
        patch.setattr(engines, "decode_chunk", spy)
        yield seen


def test_prompts_that_wait_for_a_free_row_are_answered_as_all_at_once(model, new_engine, monkeypatch):
    """Six prompts through three rows; through as many as fit a memory in which a row must give way when the others'
    caches grow, and comes back with what it had answered."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    config, _, params = model
    prompts = text(16, 20, 41, 8, 33, 20, 5)
    asked = [Sampling(max_new_tokens=new) for new in (3, 80, 12, 25, 60, 40)]  # their tails are long
    at_once = new_engine().generate(prompts, asked, streams(*range(6)))
    with batches(monkeypatch) as seen:
        assert_same(new_engine().generate(prompts, asked, streams(*range(6)), rows=3), at_once)
    assert {rows for rows, _ in seen} == {3}

    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    engine = Engine(config, params, (), ONE, memory=int(5 * 64 * position / engines.CACHES) + 1)
    with batches(monkeypatch) as seen:
        assert_same(engine.generate(prompts, asked, streams(*range(6))), at_once)
    most = {64: 5, 96: 3, 128: 2}
    assert all(rows <= most[size] for rows, size in seen) and {size for _, size in seen} == set(most), seen
    engine.prefill(prompts, asked)
    assert engine._state is None  # nothing is remembered of prompts that had to wait


def test_a_batch_grows_when_its_longest_row_is_done(model, new_engine, monkeypatch):
    """Among short prompts that wait there is one long one: while it is answered few rows fit, then many short ones, and
    the cache is cut back before there are more rows."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    config, _, params = model
    prompts, asked = text(19, 300, *[10 + row for row in range(14)]), Sampling(max_new_tokens=20)
    at_once = new_engine().generate(prompts, asked, streams(*range(15)))
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    taken = []

    def spy(state, source, **static):
        taken.append((len(source), state.cache.keys[0].shape[3]))
        return take(state, source, **static)

    take = engines.take
    monkeypatch.setattr(engines, "take", spy)
    engine = Engine(config, params, (), ONE, memory=int(3 * 384 * position / engines.CACHES) + 1)
    with batches(monkeypatch) as seen:
        assert_same(engine.generate(prompts, asked, streams(*range(15))), at_once)
    assert seen[0] == (3, 384) and (12, 64) in seen, seen
    assert taken[0] == (12, 64), taken


def test_a_batch_shrinks_to_the_rows_that_are_left(new_engine, monkeypatch):
    """The tail is decoded in a smaller copy; what the next round continues is the whole batch, as it was."""
    monkeypatch.setattr(engines, "FEWEST", 4)
    monkeypatch.setattr(engines, "CHUNK", 16)
    prompts, asked = (
        text(17, 20, 41, 8, 33, 20, 5, 12, 27, 30, 9),
        [Sampling(max_new_tokens=70 if row == 3 else 6) for row in range(10)],
    )
    engine, whole = new_engine(), new_engine()
    with batches(monkeypatch) as seen:
        answers = engine.generate(prompts, asked, streams(*range(10)))
    assert [rows for rows, _ in seen] == [10, 1, 1, 1, 1]
    monkeypatch.setattr(engines, "FEWEST", 100)
    assert_same(whole.generate(prompts, asked, streams(*range(10))), answers)
    longer = [prompt + list(answer.tokens) + [1, 2] for prompt, answer in zip(prompts, answers, strict=True)]
    with prefilled(monkeypatch) as counts:
        again = engine.generate(longer, MIXED[0], streams(*range(10), round=2))
    np.testing.assert_array_equal(np.sum(counts, axis=0), [len(answer.tokens) + 2 for answer in answers])
    assert again == whole.generate(longer, MIXED[0], streams(*range(10), round=2))


def test_the_few_that_go_on_are_decoded_in_a_copy(new_engine, monkeypatch):
    """And those that wait find their rows as they left them."""
    monkeypatch.setattr(engines, "FEWEST", 4)
    prompts, asked = text(17, 20, 41, 8, 33, 20, 5, 12, 27, 30, 9), Sampling(max_new_tokens=6)
    engine, whole = new_engine(), new_engine()
    answers = engine.generate(prompts, asked, streams(*range(10)))
    longer = [prompt + list(answer.tokens) + [1, 2] for prompt, answer in zip(prompts, answers, strict=True)]
    with batches(monkeypatch) as seen:
        called = engine.generate([longer[2], longer[7]], asked, streams(2, 7, round=2))
    assert {rows for rows, _ in seen} == {2}
    assert_same(called, whole.generate([longer[2], longer[7]], asked, streams(2, 7, round=2)))
    with prefilled(monkeypatch) as counts:
        again = engine.generate(longer, asked, streams(*range(10), round=3))
    read = [1 if row in (2, 7) else len(answer.tokens) + 2 for row, answer in enumerate(answers)]
    np.testing.assert_array_equal(np.sum(counts, axis=0), read)
    assert_same(again, whole.generate(longer, asked, streams(*range(10), round=3)))


def lives(engine, rows=None, lockstep=False, rounds=4, together=1, many=1):
    """Answers [episode][round] of ten times `many` episodes whose prompts grow by their answers; `together` episodes
    wait for one another after each round, as the agents of a game do."""
    prompts = text(18, *(20, 41, 8, 33, 20, 5, 12, 27, 30, 9) * many)
    asked, count = Sampling(max_new_tokens=90), len(prompts)
    found = [[] for _ in prompts]

    def more(row):
        prompts[row] = prompts[row] + list(found[row][-1].tokens) + text(100 * row + len(found[row]), 6)[0]
        return Next(prompts[row], (5, 0, row, 0, len(found[row]) + 1), after=latest[row])

    latest = list(range(count))
    if lockstep:
        for number in range(1, rounds + 1):
            answers = engine.generate(prompts, asked, streams(*range(count), round=number), None, rows)
            for row, answer in enumerate(answers):
                found[row].append(answer)
                more(row)
        return found

    places = list(range(count))  # whose answer each place is

    def follow(place, answer):
        row = places[place]
        found[row].append(answer)
        group = range(row - row % together, row - row % together + together)
        if len(found[row]) == rounds or any(len(found[one]) < len(found[row]) for one in group):
            return []
        new = [more(one) for one in group]
        for one in group:
            latest[one] = len(places)
            places.append(one)
        return new

    everything = engine.generate(prompts, asked, streams(*range(count)), None, rows, follow)
    assert len(everything) == len(places) == rounds * count
    return found


@pytest.mark.parametrize("rows, together", [(None, 1), (4, 1), (10, 2), (3, 5)])
def test_what_follows_an_answer_is_answered_as_in_lockstep(new_engine, monkeypatch, rows, together):
    """Rounds whose answers differ much in length, each row on its own or in groups, with rows for all or for some."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    stop = {3, 11}
    expected = lives(new_engine(stop), lockstep=True)
    lengths = [len(answer.tokens) for row in expected for answer in row]
    assert min(lengths) < 10 and max(lengths) > 60
    for one, other in zip(lives(new_engine(stop), rows, together=together), expected, strict=True):
        assert_same(one, other)


def test_what_follows_is_answered_the_same_where_memory_is_short(model, new_engine, monkeypatch):
    """Twenty episodes, five of which wait for one another: batches grow and shrink, caches as well, rows give way."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    monkeypatch.setattr(engines, "FEWEST", 4)
    stop, config = {3, 11}, model[0]
    expected = lives(new_engine(stop), lockstep=True, rounds=3, many=2)
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    engine = Engine(config, model[2], stop, ONE, memory=int(20 * 96 * position / engines.CACHES) + 1)
    with batches(monkeypatch) as seen:
        found = lives(engine, rounds=3, together=5, many=2)
    assert len({rows for rows, _ in seen}) > 3 and len({size for _, size in seen}) > 2, seen
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_what_follows_waits_for_nobody_and_reads_only_what_is_new(new_engine, monkeypatch):
    """Of ten episodes with four rounds each: fewer steps than the longest answers of the rounds have together; a row
    reads the message after its last answer and nothing again: what was said was read when it was."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    monkeypatch.setattr(engines, "FEWEST", 100)  # no row moves
    steps = []

    def spy(*arguments, **static):
        out = original(*arguments, **static)
        steps.append(int(np.max(np.asarray(out[1]) - np.asarray(arguments[2].produced))))
        return out

    original = engines.decode_chunk
    monkeypatch.setattr(engines, "decode_chunk", spy)
    with prefilled(monkeypatch) as counts:
        found = lives(new_engine({3, 11}))
    in_turn = sum(max(len(row[number].tokens) for row in found) for number in range(4))
    assert sum(steps) < 0.8 * in_turn, (sum(steps), in_turn)
    first = [20, 41, 8, 33, 20, 5, 12, 27, 30, 9]
    for row, answers in enumerate(found):
        assert sum(count[row] for count in counts) == first[row] + 6 * len(answers[:-1])


@pytest.mark.parametrize("most", [9, 11, 5, 7])
def test_a_bound_that_no_batch_has_is_kept_from_below(new_engine, monkeypatch, most):
    """Batches have 8, 10, 12, ... rows: of 9 allowed 8 are used, and all 11 are answered."""
    prompts, asked = text(31, *[10 + row for row in range(11)]), Sampling(max_new_tokens=7)
    whole = new_engine().generate(prompts, asked, streams(*range(11)))
    with batches(monkeypatch) as seen:
        assert_same(new_engine().generate(prompts, asked, streams(*range(11)), rows=most), whole)
        assert_same(new_engine().generate(prompts[:most], asked, streams(*range(most)), rows=most), whole[:most])
    assert max(rows for rows, _ in seen) == {9: 8, 11: 10, 5: 5, 7: 7}[most]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], [2] * CONTEXT], f"prompt 1 has {CONTEXT} tokens, the model's context only {CONTEXT}"),
        ([[1], []], "prompt 1 is empty"),
        ([[3, 64]], "prompt 0 has the token id 64, the model only 0 to 63"),
        ([[-1]], "prompt 0 has the token id -1"),
        ([], "no prompts"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(new_engine, prompts, message):
    with pytest.raises(UserError, match=message):
        new_engine().generate(prompts, Sampling(), streams(*range(len(prompts))))


def test_new_text_and_settings_of_the_same_buckets_compile_nothing(new_engine):
    """Also for another engine, other stop ids and a seed beyond 31 bits; a new bucket does compile."""

    def live(engine, seed, settings, lengths):
        prompts = text(seed, *lengths)
        for number in (1, 2):
            answers = engine.generate(prompts, settings, streams(*range(len(prompts)), seed=seed, round=number))
            prompts = [p + list(a.tokens) + text(seed, 20)[0] for p, a in zip(prompts, answers, strict=True)]

    jax.clear_caches()  # else there may be so many programs of other tests that room is made in between
    first, second, third = new_engine([3]), new_engine([4, 9]), new_engine()
    live(first, 1, Sampling(max_new_tokens=8), (20, 31, 25))
    with small_models.compilations() as seen:
        live(second, 2**32 - 1, MIXED[:3], (30, 18, 22))
        live(third, 7, Sampling(temperature=0.4, top_p=0.5, top_k=3, max_new_tokens=12), (17, 17, 26))
    assert not seen
    with small_models.compilations() as seen:
        live(third, 7, Sampling(), (200, 17, 24))
    assert seen


def test_the_cache_is_updated_in_place(new_engine):
    """Prefill and decoding give the memory of the state before to the state after."""
    engine = new_engine()
    engine.prefill(text(14, 10, 20), Sampling(max_new_tokens=8))
    before = engine._state
    engine.generate(text(14, 10, 20), Sampling(max_new_tokens=8), streams(0, 1))
    assert all(array.is_deleted() for array in jax.tree.leaves(before.cache))


GROUPS = [4 * [prompt] for prompt in text(21, 70, 131, 9)]
GROUPS[2] = GROUPS[0]  # two that happen to be the same


@pytest.mark.parametrize("short", [6, 70])
def test_groups_that_share_their_prompts_are_answered_as_rows_with_copies(new_engine, monkeypatch, short):
    """Round after round, with settings of their own; all members as long as one another, or two that go on alone, in
    rows that share nothing. The caches of answers grow with these, and none holds a prompt."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    monkeypatch.setattr(engines, "FEWEST", 4)
    first = sum(GROUPS, [])
    asked = [dataclasses.replace(MIXED[row % 5], max_new_tokens=70 if row in (3, 8) else short) for row in range(12)]
    found = {}
    for shared in (1, 10**6):
        monkeypatch.setattr(engines, "SHARED", shared)
        engine, prompts = new_engine(), first
        with sizes(monkeypatch) as seen:
            answers = engine.generate(prompts, asked, streams(*range(12)))
            prompts = [p + list(a.tokens) + [1, 2] for p, a in zip(prompts, answers, strict=True)]
            found[shared] = answers + engine.generate(prompts, MIXED[0], streams(*range(12), round=2))
        alone = [(2, 96, 0), (2, 128, 0), (2, 128, 0), (2, 192, 0), (12, 192, 0)]
        together = [*3 * [(12, 64, 3)], (12, 96, 3), (12, 256, 0)]
        assert shared > 1 or seen == [(12, 64, 3), *(together if short == 70 else alone)]
    assert_same(found[1], found[10**6])


@pytest.mark.parametrize("rest", [False, True])
def test_what_follows_is_answered_the_same_where_prompts_were_shared(new_engine, monkeypatch, rest):
    """Also where the rows with long prompts rest until the others have gone on: nothing of them is cut off."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    monkeypatch.setattr(engines, "FEWEST", 100)
    found, first = [], [prompt for prompt in text(23, 300, 30, 20) for _ in range(4)]

    def follow(place, answer):
        complete[place] = answer
        ready = [place] if place < 12 else []
        if rest:  # the short ones go on when all are complete, the long ones when the short ones are again
            ready = {12: range(4, 12), 20: range(4)}.get(len(complete), [])
        followed.extend(ready)
        return [Next(first[one] + list(complete[one].tokens) + [1, 2], (5, 0, one, 0, 2), after=one) for one in ready]

    stop, asked = set(range(16)), Sampling(max_new_tokens=40)
    for shared in (1, 10**6):
        monkeypatch.setattr(engines, "SHARED", shared)
        followed, complete = [], {}
        with sizes(monkeypatch) as seen:
            answers = new_engine(stop).generate(first, asked, streams(*range(12)), follow=follow)
        assert seen[0][2] == (3 if shared == 1 else 0) and seen[-1][2] == 0
        found.append(answers[:12] + [answers[12 + followed.index(place)] for place in range(12)])
    assert_same(*found)


def test_groups_wear_adapters(model):
    """The same prompt with an adapter and without one: two groups, each answered like its rows alone."""
    config, _, params = model
    worn = lora.init(config, 2, 4.0, ("query", "down"), 0, ONE)
    worn = worn.replace(b=jax.tree.map(lambda x: x + 0.3, worn.b))
    prompts, adapter = 8 * text(24, 140), [*4 * [0], *4 * [-1]]
    with pytest.MonkeyPatch.context() as patch, sizes(patch) as seen:
        both = Engine(config, params, (), ONE, worn).generate(prompts, MIXED[0], streams(*range(8)), adapter)
    assert seen == [(8, 64, 2)]
    for part, one in ((slice(0, 4), worn), (slice(4, 8), None)):
        rows = range(8)[part]
        alone = [Engine(config, params, (), ONE, one).generate(prompts[:1], MIXED[0], streams(row))[0] for row in rows]
        assert_same(both[part], alone)
    assert both[0].tokens != both[4].tokens


@pytest.mark.parametrize("case, expected", [
    ((16, 4, 140, 64, 204, 1), True),
    ((16, 4, 127, 64, 191, 1), False),  # too short to pay
    ((16, 1, 140, 64, 204, 1), False),
    ((36, 4, 140, 64, 204, 1), False),  # a batch would have 40 rows
    ((16, 4, 140, 64, 204, 8), False),  # 4 prompts for 8 devices
    ((64, 8, 140, 64, 204, 8), True),
    ((4, 2, 2000, 2000, 2048, 1), False),  # a short prompt with a long answer, and the other way round
])  # fmt: skip
def test_prompts_are_shared_where_that_takes_no_more_memory_and_nothing_is_padded(case, expected):
    *numbers, shards = case
    assert engines.shares(*numbers, shards=shards) == expected


def test_a_cache_that_moves_lies_in_memory_twice_for_one_layer_alone(monkeypatch):
    """While it grows, and while its rows are taken; and not at all where the old one goes on."""
    layers, rows, size = 6, 4, 64

    def filled():
        keys, values = (
            tuple(jnp.full((rows, 2, *shape), index, jnp.float32) for index in range(layers))
            for shape in ((8, size), (size, 8))
        )
        return programs.State(KVCache(keys, values), jnp.zeros((rows, 16)), jnp.zeros(rows, jnp.int32))

    def lying():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays() if x.ndim == 4)

    def watched(name):
        original = getattr(programs, name)

        def spy(*arguments, **static):
            out = original(*arguments, **static)
            most.append(lying() - others)
            return out

        monkeypatch.setattr(programs, name, spy)

    watched("_resized")
    watched("_taken")
    others, layer = lying(), 2 * rows * 2 * 8 * size * 4
    most, state = [], filled()
    grown = programs.resize(state.cache, 96, mesh=ONE)
    assert max(most) == layer * (1.5 * layers + 1)
    chex.assert_trees_all_equal(grown.values[3][:, :, :size], jnp.full((rows, 2, size, 8), 3.0))
    chex.assert_shape(grown.keys, (rows, 2, 8, 96))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.cache))
    del grown
    most, state = [], filled()
    taken = programs.take(state, jnp.array([2, 0]), mesh=ONE)
    assert max(most) == layer * (layers + 0.5) and all(x.is_deleted() for x in jax.tree.leaves(state.cache))
    del taken
    most, state = [], filled()
    programs.take(state, jnp.array([2, 0]), mesh=ONE, keep=True)
    assert max(most) == layer * 1.5 * layers and not any(x.is_deleted() for x in jax.tree.leaves(state.cache))


@given(st.integers(1, 10**6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 16, 64]), st.sampled_from([1, 2, 6]))
def test_buckets_are_wide_enough_and_few(needed, steps, smallest, multiple):
    size = bucket(needed, steps=steps, smallest=smallest, multiple=multiple)
    assert size >= max(needed, smallest) and size % multiple == 0
    assert size < max(needed, smallest) * (1 + 1 / steps) + multiple
    assert bucket(size, steps=steps, smallest=smallest, multiple=multiple) == size or multiple > 1
    octave = {bucket(n, steps=steps, smallest=1) for n in range(1025, 2049)}
    assert len(octave) == steps


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_prefix_is_common_and_the_longest(one, other):
    n = common_prefix(one, other)
    assert one[:n] == other[:n] and (n == min(len(one), len(other)) or one[n] != other[n])


EIGHT = """
import dataclasses
import jax
import small_models
import test_generate as t
from atp_jax import parallel
from atp_jax.generate import engine as engines
from atp_jax.generate.engine import Engine

assert jax.device_count() == 8
answers = {}
for name, sizes in {"one": None, "data": (8, 1, 1), "all": (2, 2, 2)}.items():
    mesh = t.ONE if sizes is None else parallel.make_mesh(*sizes)
    config, _, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=mesh)
    config = dataclasses.replace(config, max_position_embeddings=t.CONTEXT)
    engine = Engine(config, params, [5], mesh)
    prompts = t.text(20, *range(3, 14))  # 11 rows: the mesh pads them to a multiple of its rows
    first = engine.generate(prompts, (t.MIXED * 3)[:11], t.streams(*range(11)))
    prompts = [p + list(a.tokens) + [7, 8] for p, a in zip(prompts, first, strict=True)]
    answers[name] = first + engine.generate(prompts, (t.MIXED * 3)[:11], t.streams(*range(11), round=2))
    engines.SHARED = 1
    groups = [prompt for prompt in t.text(22, *range(101, 109)) for _ in range(2)]
    drawn = engine.generate(groups, (t.MIXED * 4)[:16], t.streams(*range(16), round=3))
    assert len(engine._state.shared.length) == 8
    for cache in (engine._state.cache, engine._state.shared.cache):
        assert cache.keys[0].sharding.is_equivalent_to(
            parallel.named_sharding(mesh, "batch", "kv_heads", "length", "head_dim"), 4
        )
    groups = [p + list(a.tokens) + [7] for p, a in zip(groups, drawn, strict=True)]
    answers[name] += drawn + engine.generate(groups, t.MIXED[0], t.streams(*range(16), round=4))
    assert engine._state.shared is None
t.assert_same(answers["data"], answers["one"])
t.assert_same(answers["all"], answers["one"])
print("the same on 8 devices")
"""


def test_eight_devices_draw_the_same_tokens_as_one():
    """Rows over 8 devices, and rows, weights and heads over 2 x 2 x 2; two rounds with the cache kept; pairs of rows
    that share a prompt, and then go on."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    done = subprocess.run([sys.executable, "-c", EIGHT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the same on 8 devices" in done.stdout, done.stderr
