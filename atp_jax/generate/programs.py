"""The programs that the engine runs: jit-compiled functions of a batch's state.

A state's rows are read (`prefill_chunk`), decoded (`decode_chunk`), and moved: to caches of another size (`resize`), to
other rows (`take`), together behind a prompt that groups share (`share`) and apart again (`spread`).
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx, struct

from atp_jax.generate.sampling import sample, stream_key, token_keys
from atp_jax.models.cache import KVCache, Shared, init_cache
from atp_jax.models.config import DecoderConfig
from atp_jax.models.lora import Lora
from atp_jax.parallel import named_sharding


class State(struct.PyTreeNode):
    """What a batch of B rows carries through prefill and decoding; S is the size of the cache.

        position   0 ...................... length .......................... S
        cache      | this row's own tokens  | rubbish, never attended to       |

    The last of the row's own tokens stands at length - 1, and `hidden` is what the model made of it: the next token
    is drawn from head(hidden). Where groups of rows share their prompts the cache holds only what comes behind these.
    """

    cache: KVCache
    hidden: jax.Array  # [B, H] in the parameters' dtype
    length: jax.Array  # int32 [B]
    shared: Shared | None = None


class Weights(struct.PyTreeNode):
    """What the rows of a batch are computed with."""

    params: nnx.State
    lora: Lora | None = None
    adapter: jax.Array | None = None  # int32 [B], which adapter a row wears, -1 none; None: all wear the one there is


class Asked(struct.PyTreeNode):
    """What was asked of each of B rows, and how far its answer is."""

    streams: jax.Array  # uint32 [B, 5]: seed, condition, episode, agent, round
    budget: jax.Array  # int32 [B], at most so many tokens, the stop token among them
    temperature: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # float32 [B]
    produced: jax.Array  # int32 [B], tokens of the answer drawn so far
    done: jax.Array  # bool [B], the answer is complete, or nothing was asked of this row
    stop: jax.Array  # int32 [E], ids that end an answer, the same for all rows; padded with -1


def pin(tree, mesh: jax.sharding.Mesh):
    """Inside jit: rows over the mesh's batch axes, heads of a cache over its tensor axis. The same on the way in and
    out of every step, so that donated memory is used again and no step is compiled for another placement."""
    cache = named_sharding(mesh, "batch", "kv_heads", "length", "head_dim")
    rows = named_sharding(mesh, "batch")
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, cache if x.ndim == 4 else rows), tree)


@functools.partial(jax.jit, static_argnames=("config", "rows", "size", "dtype", "mesh"))
def empty_state(config: DecoderConfig, rows: int, size: int, dtype, mesh) -> State:
    """A state whose rows hold nothing, with `size` cache positions each."""
    state = State(
        cache=init_cache(config, rows, size, dtype),
        hidden=jnp.zeros((rows, config.hidden_size), dtype),
        length=jnp.zeros(rows, jnp.int32),
    )
    return pin(state, mesh)


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def _resized(keys: jax.Array, values: jax.Array, *, size: int, mesh):
    def one(array, axis):
        kept = jax.lax.slice_in_dim(array, 0, min(size, array.shape[axis]), axis=axis)
        return jnp.pad(kept, [(0, size - kept.shape[i] if i == axis else 0) for i in range(4)])

    return pin((one(keys, 3), one(values, 2)), mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def _taken(arrays, source: jax.Array, *, mesh):
    return pin(jax.tree.map(lambda x: x[source], arrays), mesh)


def _moved(layers: Iterable[tuple[jax.Array, ...]], move: Callable, keep: bool) -> KVCache:
    """A cache made layer by layer. move: what there was of a layer -> its (keys, values). Unless that is kept it goes
    as the new cache comes: no more than one layer lies in memory twice."""
    made = []
    for old in layers:
        made.append(jax.block_until_ready(move(*old)))
        if not keep:
            for array in old:
                array.delete()
    keys, values = zip(*made, strict=True)
    return KVCache(keys, values)


def _layers(*held: KVCache) -> Iterable[tuple[jax.Array, ...]]:
    return zip(*(side for cache in held for side in (cache.keys, cache.values)), strict=True)


def resize(cache: KVCache, size: int, *, mesh) -> KVCache:
    """The same cache with `size` positions: zeros are added, or the last positions cut off. The old one is gone."""
    return _moved(_layers(cache), functools.partial(_resized, size=size, mesh=mesh), keep=False)


def take(state: State, source: jax.Array, *, mesh, keep: bool = False) -> State:
    """The state whose row b is row source[b] of this one, whose rows share nothing, and whose cache is gone afterwards,
    unless it is kept."""
    cache = _moved(_layers(state.cache), lambda *layer: _taken(layer, source, mesh=mesh), keep)
    hidden, length = _taken((state.hidden, state.length), source, mesh=mesh)
    return State(cache, hidden, length)


def share(prompts: State, source: jax.Array, size: int, *, config: DecoderConfig, mesh) -> State:
    """A state whose row b shares row source[b] of this one and has `size` positions of its own."""
    own = empty_state(config, len(source), size, prompts.hidden.dtype, mesh).cache
    begin = _taken((prompts.hidden, prompts.length), source, mesh=mesh)
    return State(own, *begin, Shared(prompts.cache, prompts.length))


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def _spread(keys, values, first_keys, first_values, first_length, source: jax.Array, *, size: int, mesh):
    """A layer's keys and values for the rows source [R] of groups, each with all that it holds in one piece."""
    groups = source // (len(keys) // len(first_keys))

    def one(own, first, axis):
        # Of its own part only the beginning is filled, the rest may lie behind the new cache's end.
        room = max(size + own.shape[axis] - first.shape[axis], 0)
        whole = jnp.pad(first[groups], [(0, room if i == axis else 0) for i in range(4)])
        behind = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis - 1))
        return jax.lax.slice_in_dim(behind(whole, own[source], first_length[groups]), 0, size, axis=axis)

    return pin((one(keys, first_keys, 3), one(values, first_values, 2)), mesh)


def spread(state: State, source: jax.Array, size: int, *, mesh, keep: bool = False) -> State:
    """`take` for a state whose groups share their prompts -> rows that share nothing, with `size` positions."""
    length = state.shared.length
    cache = _moved(
        _layers(state.cache, state.shared.cache),
        lambda *layer: _spread(*layer, length, source, size=size, mesh=mesh), keep,
    )  # fmt: skip
    return State(cache, *_taken((state.hidden, state.length), source, mesh=mesh))


@functools.partial(jax.jit, static_argnames=("past", "graphdef", "mesh"), donate_argnames="state")
def prefill_chunk(
    weights: Weights, state: State, rows: jax.Array, tokens: jax.Array, count: jax.Array, *, past: int, graphdef, mesh
) -> State:
    """Appends to row rows[r] the first count[r] of tokens [R, T], for each of R lines; the other rows stay as they are.
    The rows share nothing. Lines of no row, rows[r] = B, come last. past: no row is longer before.

    Only the last new position's hidden state is kept: logits of a prompt are never computed.
    """
    decoder = nnx.merge(graphdef, weights.params)
    start, adapter = state.length.at[rows].get(mode="fill", fill_value=0), weights.adapter
    adapter = None if adapter is None else adapter.at[rows].get(mode="fill", fill_value=-1)
    last, cache = decoder.extend(
        tokens, start, state.cache, rows=rows, past=past, asked=jnp.maximum(count, 1) - 1, mesh=mesh,
        lora=weights.lora, adapter=adapter,
    )  # fmt: skip
    hidden, length = state.hidden.at[rows].set(last[:, 0], mode="drop"), state.length.at[rows].add(count, mode="drop")
    return pin(State(cache, hidden, length), mesh)


@functools.partial(jax.jit, static_argnames=("n", "graphdef", "mesh"), donate_argnames="state")
def decode_chunk(weights: Weights, state: State, asked: Asked, few: jax.Array, n: int, *, graphdef, mesh):
    """Draws up to n tokens for every row that is not done, and stops early when no more than `few` rows are left.

    -> state, produced and done as in Asked, tokens int32 [B, n], log-probabilities float32 [B, n]. A row's tokens are
    the first ones of its line, as many as its `produced` has grown; the cache must have room for them.
    """
    decoder = nnx.merge(graphdef, weights.params)
    layers = None
    if mesh.devices.flat[0].platform == "cpu":
        # Else the loop's body copies every layer's weights out of the stacked array for each token. Elsewhere weights
        # are too large to lie in memory twice.
        layers = jax.lax.optimization_barrier(decoder.apart(weights.lora))
    keys = jax.vmap(stream_key)(asked.streams)

    def unfinished(carry):
        step, _, _, done, _, _ = carry
        return (step < n) & (jnp.sum(~done) > few)

    def draw_one(carry):
        step, state, produced, done, tokens, log_probs = carry
        token, log_prob = sample(
            decoder.head(state.hidden), token_keys(keys, produced), asked.temperature, asked.top_k, asked.top_p
        )
        # A row that is done writes behind its end, which nobody attends to.
        hidden, cache = decoder.decode(
            token, state.length, state.cache, shared=state.shared, lora=weights.lora, adapter=weights.adapter,
            layers=layers,
        )  # fmt: skip
        state = pin(State(cache, hidden, state.length + ~done, state.shared), mesh)
        produced = produced + ~done
        done = done | jnp.any(token[:, None] == asked.stop, axis=-1) | (produced >= asked.budget)
        tokens, log_probs = tokens.at[:, step].set(token), log_probs.at[:, step].set(log_prob)
        return step + 1, state, produced, done, tokens, log_probs

    rows = state.length.shape[0]
    drawn = jnp.zeros((rows, n), jnp.int32), jnp.zeros((rows, n), jnp.float32)
    _, *rest = jax.lax.while_loop(unfinished, draw_one, (0, state, asked.produced, asked.done, *drawn))
    return rest
