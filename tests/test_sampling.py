"""The sampler against an independent float64 definition, against transformers' warpers, and by its draws' counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atp_jax.errors import UserError
from atp_jax.generate import sampling
from atp_jax.generate.sampling import Sampling

VOCABULARY = 13
ROWS = 4
# Compiled once for all examples of a property.
SAMPLE = jax.jit(sampling.sample)
TRUNCATE = jax.jit(sampling.truncate)


def reference_log_probs(logits, temperature, top_k, top_p):
    """float64 [V] log-probabilities, -inf where cut off; written from the definition, one token after the other.

    Also the smallest distance of a partial sum to top_p, where float32 may rightly decide otherwise.
    """
    logits = np.asarray(logits, np.float64)
    if temperature > 0:
        logits = logits / temperature
    else:
        top_k, top_p = 0, 1.0
    kept = list(range(len(logits)))
    if 0 < top_k < len(logits):
        kth = sorted(logits, reverse=True)[top_k - 1]
        kept = [i for i in kept if logits[i] >= kth]
    margin = np.inf
    if top_p < 1:
        weights = {i: np.exp(logits[i] - logits.max()) for i in kept}
        total, mass, nucleus = sum(weights.values()), 0.0, []
        for i in sorted(kept, key=lambda i: (-logits[i], i)):
            if nucleus and mass >= top_p:
                break
            nucleus.append(i)
            mass += weights[i] / total
            margin = min(margin, abs(mass - top_p))
        kept = nucleus
    out = np.full(len(logits), -np.inf)
    out[kept] = logits[kept] - scipy.special.logsumexp(logits[kept])
    return out, margin


def keys_of(episodes, position=0, seed=3):
    streams = jnp.asarray([(seed, 0, episode, 0, 1) for episode in episodes], jnp.uint32)
    return sampling.token_keys(jax.vmap(sampling.stream_key)(streams), jnp.full(len(episodes), position))


KEYS = keys_of(range(ROWS))

rows_of_logits = hnp.arrays(
    np.float32,
    (ROWS, VOCABULARY),
    # Halves make ties common, which is where cut-offs go wrong; no two others are so near that float32 cannot tell.
    elements=st.one_of(st.integers(-3000, 3000).map(lambda i: i / 100), st.integers(-6, 6).map(lambda i: i / 2)),
)
per_row = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.3, 0.6, 1.0, 1.7]),
        st.sampled_from([0, 1, 2, 5, VOCABULARY, 50]),
        st.sampled_from([1.0, 0.95, 0.513, 0.11, 1e-6]),
    ),
    min_size=ROWS,
    max_size=ROWS,
)


@settings(max_examples=200)
@given(rows_of_logits, per_row)
def test_support_and_log_probs_equal_the_float64_definition(logits, asked):
    temperature, top_k, top_p = (np.array(part) for part in zip(*asked, strict=True))
    expected = [reference_log_probs(logits[b], *asked[b]) for b in range(ROWS)]
    assume(all(margin > 1e-5 for _, margin in expected))

    scaled = logits / np.where(temperature > 0, temperature, 1)[:, None]
    sampled_from = np.asarray(TRUNCATE(scaled.astype(np.float32), top_k.astype(np.int32), top_p.astype(np.float32)))
    tokens, log_probs = SAMPLE(logits, KEYS, temperature.astype(np.float32), top_k, top_p.astype(np.float32))
    for b in range(ROWS):
        if temperature[b] > 0:
            np.testing.assert_array_equal(np.isfinite(sampled_from[b]), np.isfinite(expected[b][0]))
        else:
            assert tokens[b] == np.argmax(logits[b])
        np.testing.assert_allclose(log_probs[b], expected[b][0][tokens[b]], rtol=1e-5, atol=1e-5)


@settings(max_examples=50)
@given(rows_of_logits, per_row)
def test_a_rows_draw_does_not_depend_on_its_neighbours_settings(logits, asked):
    """Alone a plain row goes the short way, beside a row with top-p the long one: the same bits."""
    temperature, top_k, top_p = (np.array(part) for part in zip(*asked, strict=True))
    temperature[0], top_k[0], top_p[0] = 0.9, 0, 1.0
    mixed = SAMPLE(logits, KEYS, temperature.astype(np.float32), top_k, top_p.astype(np.float32))
    plain = SAMPLE(logits, KEYS, np.full(ROWS, 0.9, np.float32), np.zeros_like(top_k), np.ones(ROWS, np.float32))
    assert mixed[0][0] == plain[0][0] and mixed[1][0] == plain[1][0]


@pytest.mark.parametrize("asked", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 3, 1.0), (1.4, 0, 0.8), (0.7, 5, 0.9)])
def test_draws_follow_the_distribution(asked):
    """Chi-square over 20,000 episodes; wrong order of the steps, a missing temperature or an off-by-one cut fail it."""
    logits = np.array([2.0, -1.0, 0.5, 1.5, 0.0, -2.5, 1.0, 0.9], np.float32)
    count = 20_000
    tokens, _ = SAMPLE(
        np.tile(logits, (count, 1)),
        keys_of(range(count)),
        np.full(count, asked[0], np.float32),
        np.full(count, asked[1], np.int32),
        np.full(count, asked[2], np.float32),
    )
    expected = np.exp(reference_log_probs(logits, *asked)[0]) * count
    counts = np.bincount(tokens, minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


@pytest.mark.parametrize("part", range(6))
def test_every_part_of_the_key_gives_an_independent_draw(part):
    """Neighbours in each of (seed, condition, episode, agent, round, position) are unrelated, and each part matters."""
    count, vocabulary = 4_000, 5
    streams = np.zeros((2, count, 6), np.uint32)
    streams[:, :, 2] = np.arange(count)  # 4,000 episodes ...
    streams[1, :, part] += 7_001  # ... against their neighbours in one part, beyond the episodes' own range
    keys = jax.vmap(lambda s: sampling.token_key(*s))(streams.reshape(-1, 6))
    ones = np.ones(2 * count, np.float32)
    tokens, _ = SAMPLE(np.zeros((2 * count, vocabulary), np.float32), keys, ones, np.zeros(2 * count, np.int32), ones)
    table = np.zeros((vocabulary, vocabulary))
    np.add.at(table, tuple(np.asarray(tokens).reshape(2, count)), 1)
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_keys_of_rows_are_the_keys_of_their_tokens():
    streams = np.array([(5, 1, 2, 0, 1), (5, 1, 2, 3, 6), (2**32 - 1, 0, 9, 0, 2)], np.uint32)
    positions = np.array([0, 7, 31], np.int32)
    rows = sampling.token_keys(jax.vmap(sampling.stream_key)(streams), positions)
    single = [sampling.token_key(*map(int, s), position=p) for s, p in zip(streams, positions, strict=True)]
    np.testing.assert_array_equal(jax.random.key_data(rows), [jax.random.key_data(key) for key in single])


def test_top_p_of_equal_tokens_keeps_the_smallest_set():
    kept = np.isfinite(TRUNCATE(jnp.zeros((1, 8)), jnp.array([0]), jnp.array([0.45])))
    np.testing.assert_array_equal(kept[0], [True] * 4 + [False] * 4)


def test_a_row_that_asks_for_everything_keeps_a_large_vocabulary_whole():
    """The float32 sum of 50,000 probabilities passes 1 before the tail: beside a top-p row nothing may be lost."""
    logits = np.random.default_rng(0).normal(size=(2, 50_000)).astype(np.float32) * 6
    kept = np.isfinite(TRUNCATE(logits, jnp.array([0, 0]), jnp.array([1.0, 0.9])))
    assert kept[0].all() and not kept[1].all()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", np.inf), ("top_p", 0),("top_p", 1.1), ("top_k", -1), ("max_new_tokens", 0)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=f"sampling.{name} must .* not {value}"):
        Sampling(**{name: value})


@pytest.mark.torch
def test_support_equals_transformers_warpers():
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(1).normal(size=(40, 301)).astype(np.float32) * 3
    for temperature, top_k, top_p in [(0.6, 20, 0.95), (0.7, 50, 0.9), (1.0, 0, 0.5), (1.3, 7, 1.0)]:
        theirs = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        theirs = TopKLogitsWarper(top_k)(None, theirs) if top_k else theirs
        theirs = (TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs).numpy()
        ours = TRUNCATE(logits / np.float32(temperature), jnp.full(40, top_k), jnp.full(40, top_p, jnp.float32))
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))


@settings(deadline=None)
@given(hnp.arrays(np.float32, (ROWS, VOCABULARY), elements=st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 2.0, 2.5])))
def test_the_first_of_the_largest_is_taken(values):
    """Ties, zeros of both signs and tokens that were cut off, as NumPy's argmax."""
    np.testing.assert_array_equal(sampling.first_largest(jnp.asarray(values)), np.argmax(values, axis=-1))
