"""An engine with the stored small Qwen3, what tests ask it, and what they watch while it answers."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import small_models

from atp_jax import parallel
from atp_jax.generate import engine as engines
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling

ONE = parallel.make_mesh(devices=jax.devices()[:1])
CONTEXT = 400


@functools.cache
def model():
    """(config, graphdef, params) of the stored small Qwen3, with a longer context."""
    config, graphdef, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)
    return dataclasses.replace(config, max_position_embeddings=CONTEXT), graphdef, params


def new_engine(stop=()):
    config, _, params = model()
    return Engine(config, params, stop, ONE)


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
