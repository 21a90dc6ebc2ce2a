"""What the engine is made of: caches that move, sizes, prefixes."""

import gc

import chex
import jax
import jax.numpy as jnp
from hypothesis import given
from hypothesis import strategies as st
from small_engines import ONE

from atp_jax.generate import programs
from atp_jax.generate.sizes import bucket, common_prefix
from atp_jax.models.cache import KVCache


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
