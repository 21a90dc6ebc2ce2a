"""Attention over whole rows, for training and scoring: blocks of queries whose scores are never kept.

Shapes: B rows, T positions, N query heads, KV key and value heads, D head size. Inside, X counts queries: the positions
of all query heads that read the same key head, [B, KV, X, D] with X = T N / KV and the heads of a position together,
so that a block of positions is one slice and its scores one product.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from atp_jax.models.cache import dot

ATTENDED = "attended"  # the name of what a rematerialised layer keeps of its attention
NEVER = -1e30  # the score of what may not be seen: exp gives 0, and nothing is ever inf - inf


@jax.custom_vjp
def attend(query, key, value, allowed):
    """softmax(q k^T / sqrt(D)) v, softmax in float32, divided by its sum at the end, where the array is smallest.

    query [B, KV, X, D], key and value [B, KV, S, D], allowed bool, broadcast to [B, X, S] -> [B, KV, X, D]. Every query
    must be allowed at least one key. The backward pass keeps the logarithm of the softmax's denominator and computes
    the scores again (FlashAttention, arXiv 2205.14135), so that it needs neither their maximum nor their sum.
    """
    return _forward(query, key, value, allowed)[0]


def _forward(query, key, value, allowed):
    scores = _scores(query, key, allowed)
    most = scores.max(-1)
    weights = jnp.exp(scores - most[..., None])
    total = weights.sum(-1)
    attended = dot("bkxs,bksd->bkxd", weights.astype(value.dtype), value, jnp.float32) / total[..., None]
    kept = (attended.astype(value.dtype), most + jnp.log(total))
    attended, lse = (checkpoint_name(x, ATTENDED) for x in kept)
    return attended, (query, key, value, allowed, attended, lse)


def _backward(kept, d_attended):
    query, key, value, allowed, attended, lse = kept
    weights = jnp.exp(_scores(query, key, allowed) - lse[..., None])
    d_value = dot("bkxs,bkxd->bksd", weights.astype(value.dtype), d_attended, value.dtype)
    shared = (attended.astype(jnp.float32) * d_attended.astype(jnp.float32)).sum(-1)
    d_scores = weights * (dot("bkxd,bksd->bkxs", d_attended, value, jnp.float32) - shared[..., None])
    d_scores = (d_scores * query.shape[-1] ** -0.5).astype(query.dtype)
    d_query = dot("bkxs,bksd->bkxd", d_scores, key, query.dtype)
    d_key = dot("bkxs,bkxd->bksd", d_scores, query, key.dtype)
    return d_query, d_key, d_value, None


attend.defvjp(_forward, _backward)


def attend_causally(query, key, value):
    """Each position attends to itself and to all before it. query [B, T, N, D], key and value [B, T, KV, D] ->
    [B, T, N, D]. A block of queries at a time, only against the keys up to its end: half of the scores are never made.
    """
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    query, key, value = _by_head(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    done = []
    for begin, end in _blocks(key.shape[2]):
        allowed = jnp.arange(end) <= jnp.repeat(jnp.arange(begin, end), group)[:, None]
        block = query[:, :, begin * group : end * group]
        done.append(attend(block, key[:, :, :end], value[:, :, :end], allowed[None]))
    return _by_position(jnp.concatenate(done, axis=2), heads)


def attend_behind(query, key, value, width: int, before, group: int):
    """The answers' part of `Decoder.before_answers`: each sees its prompt and, of its own, itself and what is before.

    query [B, width + G C, N, D], key and value [B, width + G C, KV, D]: a row's prompt, padded to `width`, then its G
    answers. before int32 [B]: how much of the prompt they see. -> [B, G C, N, D].
    """
    (rows, length, heads, size), kv_heads = query.shape, key.shape[2]
    together, count = heads // kv_heads, (length - width) // group

    def each(x):  # [B, width + G C, ...] -> an answer a row
        return x[:, width:].reshape(rows * group, count, *x.shape[2:])

    prompt = [jnp.repeat(x[:, :width].swapaxes(1, 2), group, axis=0) for x in (key, value)]
    own = [each(x).swapaxes(1, 2) for x in (key, value)]
    seen = jnp.repeat(jnp.arange(width) < before[:, None], group, axis=0)[:, None]
    asking = _by_head(each(query), kv_heads)
    done = []
    for begin, end in _blocks(count):
        causal = jnp.arange(end) <= jnp.repeat(jnp.arange(begin, end), together)[:, None]
        shape = (rows * group, len(causal))
        allowed = [jnp.broadcast_to(seen, (*shape, width)), jnp.broadcast_to(causal, (*shape, end))]
        both = [jnp.concatenate([p, x[:, :, :end]], axis=2) for p, x in zip(prompt, own, strict=True)]
        done.append(attend(asking[:, :, begin * together : end * together], *both, jnp.concatenate(allowed, axis=2)))
    return _by_position(jnp.concatenate(done, axis=2), heads).reshape(rows, group * count, heads, size)


def _scores(query, key, allowed):
    """float32 [B, KV, X, S], NEVER where not allowed."""
    scores = dot("bkxd,bksd->bkxs", query, key, jnp.float32) * query.shape[-1] ** -0.5
    return jnp.where(allowed[:, None], scores, NEVER)


def _blocks(length: int) -> list[tuple[int, int]]:
    """(begin, end) of the blocks of positions attended at a time: 128 long, longer where it would be over 16."""
    size = max(128, -(-length // 16))
    return [(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _by_head(query, kv_heads: int):
    """[B, T, N, D] -> [B, KV, X, D]: query head n reads key head n // (N / KV)."""
    rows, length, heads, size = query.shape
    by_head = query.reshape(rows, length, kv_heads, heads // kv_heads, size).swapaxes(1, 2)
    return by_head.reshape(rows, kv_heads, -1, size)


def _by_position(attended, heads: int):
    """[B, KV, X, D] -> [B, T, N, D]"""
    rows, kv_heads, _, size = attended.shape
    by_head = attended.reshape(rows, kv_heads, -1, heads // kv_heads, size)
    return by_head.swapaxes(1, 2).reshape(rows, -1, heads, size)
