"""The decoder against what transformers computed (stored fixtures), against itself, and its attention in float64."""

import dataclasses

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx
from hypothesis import given

from atp_jax.models import attention
from atp_jax.models import cache as caches
from atp_jax.models.cache import init_cache
from atp_jax.models.decoder import Decoder, abstract

BIASES, QK_NORM, SCALED = "qwen2", "qwen3", "llama31"


@pytest.fixture(scope="module")
def models():
    return {name: small_models.load(small_models.FIXTURES / name) for name in small_models.NAMES}


@pytest.mark.parametrize("name", small_models.NAMES)
def test_logits_equal_what_transformers_computed(models, name):
    tokens, lengths, expected = small_models.expected(name)
    _, graphdef, params = models[name]
    logits = small_models.logits(graphdef, params, tokens, lengths)
    chex.assert_type(logits, jnp.float32)
    chex.assert_trees_all_close(small_models.real(logits, lengths), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3", {"theta": 20000.0}),
        ("qwen2", {"theta": 20000.0}),
        ("llama31", {"type": "default"}),
        ("llama31", {"factor": 2.0}),
        ("llama31", {"high_freq_factor": 2.0}),
        ("llama31", {"original": 64}),
        ("qwen2_yarn", {"attention_factor": 1.0}),
        ("qwen2_yarn", {"beta_slow": 0.1}),
        ("llama_linear", {"factor": 1.0}),
    ],
)
def test_the_fixtures_notice_a_wrong_rope(models, name, change):
    """A wrong frequency is the classic silent error: the comparison above would see each of these."""
    tokens, lengths, expected = small_models.expected(name)
    config, _, params = models[name]
    wrong = dataclasses.replace(config, rope=dataclasses.replace(config.rope, **change))
    logits = small_models.logits(abstract(wrong)[0], params, tokens, lengths)
    assert np.abs(small_models.real(logits, lengths) - expected).max() > 1e-3


@pytest.mark.parametrize("name", [BIASES, QK_NORM, SCALED])
def test_extending_a_cache_equals_the_whole_row(models, name):
    """Rows that grow by different counts (also by none), padded with rubbish: real positions as without a cache, also
    where only the last one of each is asked for."""
    tokens, lengths, _ = small_models.expected(name)
    config, graphdef, params = models[name]
    whole = np.asarray(small_models.hidden(graphdef, params, tokens, lengths))
    rng = np.random.default_rng(0)
    cache, start = init_cache(config, 3, 48), np.zeros(3, np.int32)
    got = np.full_like(whole, np.nan)
    while np.any(start < lengths):
        count = np.minimum(rng.integers(0, 9, 3), lengths - start).astype(np.int32)
        new = rng.integers(0, config.vocab_size, (3, 8), dtype=np.int32)
        for row in range(3):
            new[row, : count[row]] = tokens[row, start[row] : start[row] + count[row]]
        last, same = small_models.extend(graphdef, params, new, start, cache, asked=np.maximum(count, 1) - 1)
        out, cache = small_models.extend(graphdef, params, new, start, cache)
        chex.assert_trees_all_close(same, cache, atol=1e-6, rtol=0)
        for row in range(3):
            np.testing.assert_allclose(last[row, 0], out[row, max(count[row], 1) - 1], atol=1e-5, rtol=0)
            got[row, start[row] : start[row] + count[row]] = out[row, : count[row]]
        start = start + count
    chex.assert_trees_all_close(small_models.real(got, lengths), small_models.real(whole, lengths), atol=1e-5, rtol=0)


def test_decoding_token_by_token_equals_the_whole_row(models):
    tokens, _, _ = small_models.expected(QK_NORM)
    config, graphdef, params = models[QK_NORM]
    whole = small_models.hidden(graphdef, params, tokens, np.full(3, 40))
    cache, steps = init_cache(config, 3, 40), []
    for position in range(40):
        at = np.full(3, position, np.int32)
        out, cache = small_models.decode(graphdef, params, tokens[:, position], at, cache)
        steps.append(out)
    chex.assert_trees_all_close(jnp.stack(steps, axis=1), whole, atol=1e-5, rtol=0)
    full = np.full(3, 40, np.int32)  # there is no such position: nothing is written
    chex.assert_trees_all_equal(small_models.decode(graphdef, params, tokens[:, 0], full, cache)[1], cache)


def test_writing_past_the_end_of_a_cache_harms_nothing(models):
    """Padding that sticks out behind the cache is dropped; a clamped write would fall onto earlier positions."""
    tokens, _, _ = small_models.expected(BIASES)
    config, graphdef, params = models[BIASES]
    whole = small_models.hidden(graphdef, params, tokens[:, :24], np.full(3, 24))

    def first_20(cache):
        return [array[..., :20] for array in cache.keys] + [array[:, :, :20] for array in cache.values]

    cache = init_cache(config, 3, 24)
    _, cache = small_models.extend(graphdef, params, tokens[:, :20], np.zeros(3, np.int32), cache)
    before = first_20(cache)
    start = np.array([20, 20, 4], np.int32)  # positions 24 to 27 of the first two rows do not exist
    new = np.stack([tokens[0, 20:28], tokens[1, 20:28], tokens[2, 4:12]])
    out, cache = small_models.extend(graphdef, params, new, start, cache)
    chex.assert_trees_all_close(out[:2, :4], whole[:2, 20:], atol=1e-5, rtol=0)
    chex.assert_trees_all_close(out[2], whole[2, 4:12], atol=1e-5, rtol=0)
    after = first_20(cache)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[:2], after), jax.tree.map(lambda a: a[:2], before))
    chex.assert_trees_all_equal(small_models.extend(graphdef, params, new, np.full(3, 24), cache)[1], cache)


def test_padding_does_not_matter(models):
    """Neither its ids (also ids that do not exist) nor its amount, and what stands there comes out as 0."""
    tokens, lengths, _ = small_models.expected(QK_NORM)
    _, graphdef, params = models[QK_NORM]
    padding = np.arange(tokens.shape[1]) >= lengths[:, None]
    one = small_models.hidden(graphdef, params, tokens, lengths)
    other = small_models.hidden(graphdef, params, np.where(padding, 10**6, tokens), lengths)
    chex.assert_trees_all_equal(one, other)
    assert not np.any(np.asarray(one)[padding])
    wider = small_models.hidden(graphdef, params, np.pad(tokens, ((0, 0), (0, 10)), constant_values=-7), lengths)
    chex.assert_trees_all_close(wider[:, : tokens.shape[1]], one, atol=1e-5, rtol=0)


def test_remat_changes_memory_and_not_gradients(models):
    """Also the token after a row's end gets no gradient: padding trains nothing."""
    tokens, lengths, _ = small_models.expected(SCALED)
    _, graphdef, params = models[SCALED]

    def loss(params, remat):
        decoder = nnx.merge(graphdef, params)
        return jnp.sum(jnp.sin(decoder.hidden(tokens, lengths, remat=remat)))

    plain, again = (jax.jit(jax.grad(lambda p, r=remat: loss(p, r)))(params) for remat in (False, True))
    chex.assert_tree_all_finite(plain)
    chex.assert_trees_all_close(plain, again, rtol=1e-4, atol=1e-4)
    seen = {token for row, length in zip(tokens, lengths, strict=True) for token in row[:length].tolist()}
    touched = np.flatnonzero(np.abs(np.asarray(plain["embedding"][...])).sum(1))
    assert set(touched.tolist()) == seen


def test_bfloat16_stays_near_float32(models):
    tokens, lengths, expected = small_models.expected(QK_NORM)
    _, graphdef, params = small_models.load(small_models.FIXTURES / QK_NORM, "bfloat16")
    states = small_models.hidden(graphdef, params, tokens, lengths)
    logits = small_models.logits(graphdef, params, tokens, lengths)
    chex.assert_type([states, logits], [jnp.bfloat16, jnp.float32])
    assert np.abs(small_models.real(logits, lengths) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", [BIASES, "llama_linear"])
def test_a_fresh_decoder_has_the_declared_shapes_and_deviation(models, name):
    config, _, params = models[name]
    fresh = jax.jit(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))))()
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, params, abstract(config)[1])
    query, norm = fresh["layers"]["query"][...], fresh["layers"]["input_norm"][...]
    assert float(query.std()) == pytest.approx(config.initializer_range, rel=0.1)
    chex.assert_trees_all_equal(norm, jnp.ones_like(norm))


def attend_at_once(query, key, value, last):
    """All scores in float64: query [B, T, N, D], key and value [B, S, KV, D], last [B, T] visible position."""
    each = query.shape[2] // key.shape[2]
    key, value = (np.repeat(array.astype(np.float64), each, axis=2) for array in (key, value))
    scores = np.einsum("btnd,bsnd->bnts", query, key) / np.sqrt(query.shape[3])
    scores = np.where(np.arange(key.shape[1]) <= last[:, None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), value).astype(np.float32)


def test_attention_in_blocks_equals_all_at_once():
    """Two blocks, the second not full; large scores, so that a missing maximum would overflow."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 150, n, 6)).astype(np.float32) for n in (4, 2, 2))
    got = attention.attend_causally(20 * query, key, value)
    expected = attend_at_once(20 * query, key, value, np.tile(np.arange(150), (2, 1)))
    chex.assert_trees_all_close(got, expected, atol=2e-5, rtol=0)


def test_gradients_of_attention_in_blocks_are_those_of_the_formula():
    """Against jax's own attention, which keeps all scores."""
    rng = np.random.default_rng(2)
    args = [rng.normal(size=(2, 150, n, 6)).astype(np.float32) for n in (4, 2, 2)]

    def gradients(attend):
        return jax.jit(jax.grad(lambda *arrays: jnp.sum(jnp.sin(attend(*arrays))), argnums=(0, 1, 2)))(*args)

    plain = gradients(lambda *arrays: jax.nn.dot_product_attention(*arrays, is_causal=True))
    chex.assert_trees_all_close(gradients(attention.attend_causally), plain, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("append", [caches.append_and_attend, caches.append_and_attend_at_once])
def test_attention_to_a_cache_equals_all_at_once(append):
    """What is new is written and seen, of rows in any order among others, in two blocks of queries; large scores here,
    too, and the longest row sees the last position of the cache. A line of no row changes nothing. Queries of some of
    the new tokens see what they see among all."""
    rng = np.random.default_rng(1)
    query, keys, values = (rng.normal(size=(2, t, n, 6)).astype(np.float32) for t, n in ((130, 4), (160, 2), (160, 2)))
    rows, start, query = np.array([3, 1, 4]), np.array([0, 30, 0], np.int32), np.stack([*60 * query, 0 * query[0]])
    positions = start[:2, None] + np.arange(130)
    new = [np.stack([array[0, :130], array[1, 30:], np.ones((130, 2, 6), np.float32)]) for array in (keys, values)]
    held = [np.zeros((4, 2, 6, 160), np.float32), np.zeros((4, 2, 160, 6), np.float32)]
    held[0][1, :, :, :30], held[1][1, :, :30] = keys[1, :30].transpose(1, 2, 0), values[1, :30].swapaxes(0, 1)
    before = [array.copy() for array in held]
    expected = attend_at_once(query[:2], keys, values, positions)
    for past in (None, 30, 64):
        program, asked = jax.jit(append, static_argnames="past"), np.array([129, 70, 0])
        few = np.take_along_axis(query, np.minimum(asked[:, None] + [0, 1], 129)[..., None, None], axis=1)
        some, *same = program(few, *new, *before, rows, start, asked, past=past)
        got, *held = program(query, *new, *before, rows, start, None, past=past)
        chex.assert_trees_all_close(got[:2], expected, atol=1e-4, rtol=0)
        chex.assert_trees_all_close((some[0, 0], some[1]), (expected[0, 129], expected[1, 70:72]), atol=1e-4, rtol=0)
        chex.assert_trees_all_equal(same, held)
        np.testing.assert_array_equal(held[0][1], keys[1].transpose(1, 2, 0))
        np.testing.assert_array_equal(held[1][3, :, :130], values[0, :130].swapaxes(0, 1))
        for now, then in zip(held, before, strict=True):
            np.testing.assert_array_equal(now[::2], then[::2])
    one = caches.attend(query[:2, 77], held[0][rows[:2]], held[1][rows[:2]], positions[:, 77])
    chex.assert_trees_all_close(one, expected[:, 77], atol=1e-4, rtol=0)


@given(st.integers(1, 50_000))
def test_blocks_cover_every_query_once_and_are_few(length):
    blocks = attention._blocks(length)
    assert [begin for begin, _ in blocks] == [0, *(end for _, end in blocks[:-1])] and blocks[-1][1] == length
    assert len(blocks) <= 16 and all(begin < end for begin, end in blocks)
