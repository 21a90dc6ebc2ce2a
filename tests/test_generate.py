"""The engine: what it answers does not depend on batch, bucket, cache or interruption, and nothing compiles twice."""

import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import small_models
from small_engines import CONTEXT, MIXED, assert_same, model, new_engine, prefilled, streams, text

from atp_jax.errors import UserError
from atp_jax.generate import engine as engines
from atp_jax.generate import sampling as samplers
from atp_jax.generate.sampling import Sampling

HERE = Path(__file__).resolve().parent


def test_log_probs_are_those_of_the_whole_row_without_a_cache():
    """Prompt and answer in one piece through Decoder.hidden and the head; every row its own settings."""
    _, graphdef, params = model()
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


def test_a_row_is_answered_alone_as_in_any_batch_and_bucket():
    """Alone; among others; with a neighbour so long that the cache and the pieces of prefill have other sizes."""
    prompts = text(1, 30, 7, 19, 300, 2)
    together = new_engine().generate(prompts, MIXED, streams(4, 3, 2, 1, 0))
    small = new_engine().generate(prompts[:3], MIXED[:3], streams(4, 3, 2))
    alone = [new_engine().generate([prompts[i]], MIXED[i], streams(4 - i))[0] for i in (0, 4)]
    assert_same(together[:3], small)
    assert_same([together[0], together[4]], alone)


def test_the_order_of_rows_and_what_others_ask_do_not_matter():
    prompts = text(2, 12, 9, 25)
    asked = [MIXED[0], MIXED[3], MIXED[4]]
    answers = new_engine().generate(prompts, asked, streams(0, 1, 2))
    assert_same(new_engine().generate(prompts[::-1], asked[::-1], streams(2, 1, 0)), answers[::-1])
    # The same prompt under another episode, round or seed is answered differently.
    others = [streams(9), streams(0, round=2), streams(0, seed=6)]
    seen = {new_engine().generate(prompts[:1], asked[0], stream)[0].tokens for stream in others}
    assert len(seen | {answers[0].tokens}) == 4


def test_rounds_that_reuse_a_prefix_answer_like_fresh_ones(monkeypatch):
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


def test_some_go_on_while_the_others_wait(monkeypatch):
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


def test_a_prompt_that_is_forgotten_is_read_again(monkeypatch):
    engine, prompts = new_engine(), text(9, 21, 30)
    engine.prefill(prompts, Sampling())
    engine.forget()
    with prefilled(monkeypatch) as counts:
        engine.prefill(prompts, Sampling())
    np.testing.assert_array_equal(np.sum(counts, axis=0), [21, 30])


def test_recalling_prompts_goes_on_bit_for_bit(monkeypatch):
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


def test_long_prompts_are_read_in_pieces(monkeypatch):
    """Rows end in different pieces; the last piece of one is padding of another."""
    prompts, asked = text(15, 40, 5, 17), Sampling(max_new_tokens=10)
    at_once = new_engine().generate(prompts, asked, streams(0, 1, 2))
    monkeypatch.setattr(engines, "WIDEST", 16)
    with prefilled(monkeypatch) as counts:
        in_pieces = new_engine().generate(prompts, asked, streams(0, 1, 2))
    np.testing.assert_array_equal(counts, [[16, 5, 16], [16, 0, 1], [8, 0, 0]])
    assert_same(in_pieces, at_once)


def test_long_answers_in_chunks_equal_one_chunk(monkeypatch):
    """The host looks several times and the cache grows in between; rows end in different chunks."""
    prompts, asked = text(11, 20, 41, 8), [Sampling(max_new_tokens=n) for n in (60, 20, 1)]
    at_once = new_engine().generate(prompts, asked, streams(0, 1, 2))
    monkeypatch.setattr(engines, "CHUNK", 16)
    assert_same(new_engine().generate(prompts, asked, streams(0, 1, 2)), at_once)
    assert [len(answer.tokens) for answer in at_once] == [60, 20, 1]


def test_answers_end_at_the_first_stop_id_of_the_list():
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


def test_answers_end_where_the_context_ends():
    prompts = text(13, CONTEXT - 5, CONTEXT - 1, 10)
    answers = new_engine().generate(prompts, Sampling(max_new_tokens=20), streams(0, 1, 2))
    assert [(len(answer.tokens), answer.finish) for answer in answers] == [(5, "length"), (1, "length"), (20, "length")]


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
def test_prompts_that_cannot_be_answered_are_named(prompts, message):
    with pytest.raises(UserError, match=message):
        new_engine().generate(prompts, Sampling(), streams(*range(len(prompts))))


def test_new_text_and_settings_of_the_same_buckets_compile_nothing():
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


def test_the_cache_is_updated_in_place():
    """Prefill and decoding give the memory of the state before to the state after."""
    engine = new_engine()
    engine.prefill(text(14, 10, 20), Sampling(max_new_tokens=8))
    before = engine._state
    engine.generate(text(14, 10, 20), Sampling(max_new_tokens=8), streams(0, 1))
    assert all(array.is_deleted() for array in jax.tree.leaves(before.cache))


EIGHT = """
import dataclasses
import jax
import small_models
import small_engines as t
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
