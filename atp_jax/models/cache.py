"""What rows remember: the keys and values of their positions, how new ones are written, and attention to them.

Shapes: B rows of a cache with S positions, R lines of new tokens, T tokens of a line, N query heads, KV key and value
heads, D head size. Rows are left-aligned; what lies behind a row's own positions is never seen.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from atp_jax.models.config import DecoderConfig
from atp_jax.parallel import named_sharding


class KVCache(struct.PyTreeNode):
    """Keys (rotated), a tuple with one array [B, KV, D, S] a layer, and values, [B, KV, S, D].

    Heads before positions and keys turned round, so that both products of attention read the cache as it lies. With
    keys as [B, KV, S, D] XLA on a CPU transposes them for the product, badly: 36 ms a layer for one query of 64 rows
    with S = 1,280, KV = 4, D = 32, instead of 2.7 ms (2 cores).

    One array a layer, not one for all: a donated array that is updated in place is never copied, which cannot be said
    of a stacked one that a scan over layers carries.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


class Shared(struct.PyTreeNode):
    """What the rows of a batch hold in common, group by group: row b of B begins with row b // (B / P) of P.

    The rows' own cache holds what comes behind that.
    """

    cache: KVCache
    length: jax.Array  # int32 [P]


def init_cache(config: DecoderConfig, batch: int, size: int, dtype=jnp.float32) -> KVCache:
    """An empty cache of `size` positions for `batch` rows."""
    rows = (batch, config.num_kv_heads)

    def zeros(*shape):
        return tuple(jnp.zeros(rows + shape, dtype) for _ in range(config.num_layers))

    return KVCache(zeros(config.head_dim, size), zeros(size, config.head_dim))


def append_and_attend(query, key, value, keys, values, rows, start, asked, *, past: int | None = None):
    """Writes new keys and values behind what the rows hold, and attends to both.

    query [R, Q, N, D], key and value [R, T, KV, D], keys [B, KV, D, S], values [B, KV, S, D], rows and start int32 [R],
    past: as in `Decoder.extend`. asked int32 [R]: query q of line r is that of its new token asked[r] + q; None: there
    is one for each. -> what was attended [R, Q, N, D], keys, values.

    Row by row and head by head: the scores of a block of queries stay in a processor's cache, no row looks further than
    its group must, and XLA computes two heads at a time. 32 rows of 96 new tokens behind 1,184, KV 4, G 2, D 32, on 2
    cores: 35 ms a layer in blocks of 64 queries; with all heads of a row at once 83 ms.
    """
    (_, length, heads, dim), (batch, kv_heads, _, size), width = query.shape, keys.shape, key.shape[1]
    past = size if past is None else past
    blocks = [(begin, min(begin + 128, length)) for begin in range(0, length, 128)]
    fits = min(width, size)  # what of the new can lie in the cache at all

    def one_row(line, carry):
        attended, keys, values = carry
        row, first = rows[line], start[line]
        at = first if asked is None else first + asked[line]
        keys = _put_in(keys, key[line].transpose(1, 2, 0)[:, :, :fits], row, first, 2)
        values = _put_in(values, value[line].swapaxes(0, 1)[:, :fits], row, first, 1)
        held_keys = jax.lax.dynamic_index_in_dim(keys, row, keepdims=False)
        held_values = jax.lax.dynamic_index_in_dim(values, row, keepdims=False)
        mine = attended[line].reshape(length, kv_heads, heads // kv_heads, dim).transpose(1, 2, 0, 3)
        done = []
        for head in range(kv_heads):
            parts = []
            for begin, end in blocks:
                seen = min(past + (end if asked is None else width), size)
                allowed = jnp.arange(seen) <= at + jnp.arange(begin, end)[:, None]
                parts.append(
                    _attend_head(mine[head, :, begin:end], held_keys[head, :, :seen], held_values[head, :seen], allowed)
                )
            done.append(jnp.concatenate(parts, axis=1))
        mine = jnp.stack(done).transpose(2, 0, 1, 3).reshape(length, heads, dim)
        return attended.at[line].set(mine), keys, values

    return jax.lax.fori_loop(0, jnp.sum(rows < batch), one_row, (query, keys, values))


def append_and_attend_at_once(query, key, value, keys, values, rows, start, asked, *, past: int | None = None):
    """The same as `append_and_attend` with all lines and heads in one product: what an accelerator wants, for which a
    product for each row and head is too small. The lines' rows are copied out of the cache."""
    (lines, length, heads, dim), (_, kv_heads, _, size), width = query.shape, keys.shape, key.shape[1]
    seen = min((size if past is None else past) + width, size)
    positions = start[:, None] + jnp.arange(width)
    keys = keys.at[rows[:, None], :, :, positions].set(key.astype(keys.dtype), mode="drop")
    values = values.at[rows[:, None], :, positions].set(value.astype(values.dtype), mode="drop")
    held_keys = keys[:, :, :, :seen].at[rows].get(mode="clip")
    held_values = values[:, :, :seen].at[rows].get(mode="clip")
    query = query.reshape(lines, length, kv_heads, heads // kv_heads, dim)
    last_seen = positions if asked is None else (start + asked)[:, None] + jnp.arange(length)
    done = []
    for begin in range(0, length, 128):  # bounds the memory of the scores
        block, allowed = query[:, begin : begin + 128], last_seen[:, begin : begin + 128, None]
        scores = dot("rtkgd,rkds->rkgts", block, held_keys, jnp.float32) * dim**-0.5
        scores = jnp.where((jnp.arange(seen) <= allowed)[:, None, None], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        attended = dot("rkgts,rksd->rtkgd", weights.astype(values.dtype), held_values, jnp.float32)
        total = weights.sum(-1, keepdims=True).transpose(0, 3, 1, 2, 4)
        done.append((attended / total).astype(values.dtype).reshape(lines, -1, heads, dim))
    return jnp.concatenate(done, axis=1), keys, values


def _attend_head(query, keys, values, allowed):
    """query [G, T, D], keys [D, S], values [S, D], allowed [T, S] -> [G, T, D]: one head of one row."""
    group, length, size = query.shape
    scores = dot("xd,ds->xs", query.reshape(group * length, size), keys, jnp.float32).reshape(group, length, -1)
    scores = jnp.where(allowed, scores * size**-0.5, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    merged = weights.astype(values.dtype).reshape(group * length, -1)
    attended = dot("xs,sd->xd", merged, values, jnp.float32).reshape(query.shape)
    return (attended / weights.sum(-1, keepdims=True)).astype(values.dtype)


def _put_in(cache, new, row, first, axis: int):
    """cache [B, ...] with `new` in this row, from position `first` of this axis of `new` on; what would pass the end is
    dropped (dynamic_update_slice alone would move it back onto positions that are valid)."""
    width, size = new.shape[axis], cache.shape[axis + 1]
    at = jnp.minimum(first, size - width)
    late = jnp.minimum(first - at, width)  # so many of the positions written to stay as they are
    begin = [0] * cache.ndim
    begin[0], begin[axis + 1] = row, at
    old = jax.lax.dynamic_slice(cache, begin, (1, *new.shape))[0]
    moved = jax.lax.dynamic_slice_in_dim(jnp.concatenate([new, new], axis), width - late, width, axis)
    places = jnp.arange(width).reshape([-1 if i == axis else 1 for i in range(new.ndim)])
    return jax.lax.dynamic_update_slice(cache, jnp.where(places >= late, moved, old)[None].astype(cache.dtype), begin)


def appender(batch: int, past: int | None, mesh):
    """What appends on this mesh's devices (None: one device): `append_and_attend` on CPUs, else all at once. Rows lie
    over the batch axes of the mesh, heads over its tensor axis, and each device goes through the lines of its own rows.
    batch: rows altogether."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    append = functools.partial(append_and_attend if platform == "cpu" else append_and_attend_at_once, past=past)
    if mesh is None:
        return append

    def local(query, key, value, keys, values, rows, *places):
        mine = jnp.where(rows < batch, rows % len(keys), len(keys))
        return append(query, key, value, keys, values, mine, *places)

    lines, cache, row = (
        named_sharding(mesh, *axes).spec
        for axes in (("batch", "length", "kv_heads"), ("batch", "kv_heads"), ("batch",))
    )
    return jax.shard_map(
        local, mesh=mesh, in_specs=(lines, lines, lines, cache, cache, row, row, row), out_specs=(lines, cache, cache)
    )


def write(keys, values, key, value, positions):
    """One more position a row: key and value [B, KV, D] at positions [B], not written where that is not below S."""
    # Row by row, so that each device writes its own rows where they lie: with `at[every row, position]` each would
    # gather the new keys and values of all rows, in every layer of every token.
    put_key = jax.vmap(lambda row, new, at: row.at[:, :, at].set(new, mode="drop"))
    put_value = jax.vmap(lambda row, new, at: row.at[:, at].set(new, mode="drop"))
    return put_key(keys, key, positions), put_value(values, value, positions)


def attend(query, keys, values, positions):
    """One query a row sees the positions up to its own, as in decoding: query [B, N, D], positions [B] -> [B, N, D]."""
    return _merged([_seen(query, keys, values, positions + 1)], values.dtype)


def attend_in_groups(query, keys, values, positions, shared: Shared, layer: int):
    """The same where groups of rows hold the first part of what they see in common: positions [B] are those in the
    rows' own cache, layer is that of keys and values. The queries of a group are one product with what it shares, which
    is read once; the two parts of the softmax are merged in float32, each scaled by its largest score (FlashDecoding's
    way)."""
    rows, heads, dim = query.shape
    held_keys, held_values = shared.cache.keys[layer], shared.cache.values[layer]
    groups, kv_heads = held_keys.shape[:2]
    # [P, heads of the group's rows that read the same key head, D], as if they were one row's
    together = query.reshape(groups, -1, kv_heads, heads // kv_heads, dim).swapaxes(1, 2).reshape(groups, -1, dim)
    first = [
        x.reshape(groups, kv_heads, rows // groups, heads // kv_heads, -1).swapaxes(1, 2).reshape(rows, heads, -1)
        for x in _seen(together, held_keys, held_values, shared.length)
    ]
    return _merged([first, _seen(query, keys, values, positions + 1)], values.dtype)


def _seen(query, keys, values, count):
    """What queries [B, N, D] see of the first count [B] positions: the weighted values [B, N, D], the largest score and
    the sum of weights, both [B, N, 1], all float32."""
    rows, heads, dim = query.shape
    query = query.reshape(rows, keys.shape[1], -1, dim)
    scores = dot("bkgd,bkds->bkgs", query, keys, jnp.float32) * dim**-0.5
    scores = jnp.where((jnp.arange(keys.shape[3]) < count[:, None])[:, None, None], scores, -jnp.inf)
    most = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - most)
    attended = dot("bkgs,bksd->bkgd", weights.astype(values.dtype), values, jnp.float32)
    return [x.reshape(rows, heads, -1) for x in (attended, most, weights.sum(-1, keepdims=True))]


def _merged(parts, dtype):
    """One softmax of several parts, each as `_seen` gives it. -> [B, N, D]"""
    if len(parts) == 1:
        (attended, _, total), = parts
        return (attended / total).astype(dtype)
    most = functools.reduce(jnp.maximum, (part[1] for part in parts))
    scales = [jnp.exp(part[1] - most) for part in parts]
    attended, total = (sum(part[i] * scale for part, scale in zip(parts, scales, strict=True)) for i in (0, 2))
    return (attended / total).astype(dtype)


def dot(spec: str, a, b, dtype):
    """einsum with float32 accumulation; float32 means float32 also where the hardware would rather use TF32 or bf16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=dtype)
