"""One decoder for Qwen2.5, Qwen3 and Llama 3.x.

Shapes: B rows, T tokens, S positions of a cache, H hidden size, N query heads, KV key and value heads, D head size,
M size of the MLP, L layers, V vocabulary. Rows are left-aligned, padded on the right, positions count from 0.
Norms, rotation, softmax and logits are computed in float32 whatever the parameters' dtype.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from atp_jax.models import cache as caches
from atp_jax.models.attention import ATTENDED, attend_behind, attend_causally
from atp_jax.models.cache import KVCache, Shared, dot
from atp_jax.models.config import DecoderConfig
from atp_jax.models.lora import Lora, delta
from atp_jax.models.rope import rotate
from atp_jax.parallel import named_sharding, row_shards


class Layers(nnx.Module):
    """The parameters of all layers, each with the leading axis L, and what one layer computes with its slice."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype):
        hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        size, inner = config.head_dim, config.intermediate_size
        normal, ones, zeros = _declare(config, rngs, dtype, layers=True)
        self.config = config
        self.input_norm = ones(norm=hidden)
        self.query = normal(embed=hidden, heads=heads, head_dim=size)
        self.key = normal(embed=hidden, kv_heads=kv_heads, head_dim=size)
        self.value = normal(embed=hidden, kv_heads=kv_heads, head_dim=size)
        self.output = normal(heads=heads, head_dim=size, embed=hidden)
        bias = config.attention_bias
        self.query_bias = zeros(heads=heads, head_dim=size) if bias else None
        self.key_bias = zeros(kv_heads=kv_heads, head_dim=size) if bias else None
        self.value_bias = zeros(kv_heads=kv_heads, head_dim=size) if bias else None
        self.output_bias = zeros(norm=hidden) if config.output_bias else None
        self.query_norm = ones(head_dim=size) if config.qk_norm else None
        self.key_norm = ones(head_dim=size) if config.qk_norm else None
        self.mlp_norm = ones(norm=hidden)
        self.gate = normal(embed=hidden, mlp=inner)
        self.up = normal(embed=hidden, mlp=inner)
        self.down = normal(mlp=inner, embed=hidden)
        self.gate_bias = zeros(mlp=inner) if config.mlp_bias else None
        self.up_bias = zeros(mlp=inner) if config.mlp_bias else None
        self.down_bias = zeros(norm=hidden) if config.mlp_bias else None

    def projections(self, x, positions, adapt=None):
        """x [B, T, H] -> query [B, T, N, D], key and value [B, T, KV, D]; query and key normed and rotated.

        adapt: what an adapter adds to a projection, (its name, its input) -> delta; None without one."""
        eps, rope = self.config.rms_norm_eps, self.config.rope
        x = _rms_norm(x, self.input_norm, eps)
        query = self._project(x, "query", adapt)
        key = self._project(x, "key", adapt)
        value = self._project(x, "value", adapt)
        if self.config.qk_norm:
            query, key = _rms_norm(query, self.query_norm, eps), _rms_norm(key, self.key_norm, eps)
        return rotate(query, positions, rope), rotate(key, positions, rope), value

    def finish(self, x, attended, adapt=None):
        """The rest of a layer: x [B, T, H] and what its heads attended [B, T, N, D] -> [B, T, H]."""
        x = x + self._project(attended, "output", adapt)
        y = _rms_norm(x, self.mlp_norm, self.config.rms_norm_eps)
        gate = self._project(y, "gate", adapt)
        up = self._project(y, "up", adapt)
        return x + self._project(jax.nn.silu(gate) * up, "down", adapt)

    def _project(self, x, name: str, adapt):
        """x [B, T, *in] -> [B, T, *out]. As one product of two matrices: of anything else XLA on a CPU makes copies for
        the gradient, turned round element by element, which take longer than the product."""
        weight, taken = getattr(self, name)[...], x.ndim - 2
        flat = x.reshape(x.shape[0] * x.shape[1], -1)
        y = dot("xi,io->xo", flat, weight.reshape(flat.shape[1], -1), x.dtype)
        y = y.reshape(*x.shape[:2], *weight.shape[taken:])
        bias = getattr(self, name + "_bias")
        y = y if bias is None else y + bias[...]
        return y if adapt is None else y + adapt(name, x)


class Decoder(nnx.Module):
    """Token ids in, hidden states or logits out. `nnx.split` it once; inside `jit` merge and call.

    Every parameter carries the names of its logical axes (`axes`), from which `parallel.param_shardings` follows.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, mesh=None):
        normal, ones, _ = _declare(config, rngs, dtype, layers=False)
        self.config, self.mesh = config, mesh
        self.embedding = normal(vocab=config.vocab_size, embed=config.hidden_size)
        self.layers = Layers(config, rngs=rngs, dtype=dtype)
        self.norm = ones(norm=config.hidden_size)
        untied = not config.tie_word_embeddings
        self.lm_head = normal(vocab=config.vocab_size, embed=config.hidden_size) if untied else None

    def hidden(self, tokens, lengths, *, remat: bool = False, lora: Lora | None = None, adapter=None):
        """Hidden states of whole rows, without a cache, for training and scoring.

        tokens int32 [B, T] padded on the right, lengths int32 [B] -> [B, T, H] after the last norm, 0 beyond a row's
        length. remat: keep only each layer's input and what its heads attended for the backward pass, and compute the
        rest again; else keep what every product gave as well, and compute only what lies between products again.
        lora, adapter: what the rows wear, see `_adapt`.
        """
        positions = jnp.arange(tokens.shape[1])[None]
        x = self._through(tokens, positions, attend_causally, remat, lora, adapter)
        return jnp.where((positions < lengths[:, None])[..., None], x, 0)

    def before_answers(
        self, prompts, prompt_lengths, answers, lengths, *, remat: bool = False, lora: Lora | None = None, adapter=None
    ):
        """Hidden states that predict each token of G answers to the same prompt, which is computed once for all.

        prompts int32 [B, P] and answers int32 [B, G, C] padded on the right, prompt_lengths int32 [B] (at least 1),
        lengths int32 [B, G] -> [B, G, C, H]: what stands before answer token c, after the last norm; 0 beyond an
        answer's length. Every answer starts with the prompt's last token, and sees the prompt before that and itself.
        remat, lora, adapter: as in `hidden`.
        """
        (rows, group, count), width = answers.shape, prompts.shape[1]
        before = jnp.maximum(prompt_lengths - 1, 0)
        last = jnp.take_along_axis(prompts, before[:, None], axis=1)
        inputs = jnp.concatenate([jnp.broadcast_to(last[:, None], (rows, group, 1)), answers[:, :, :-1]], axis=2)
        tokens = jnp.concatenate([prompts, inputs.reshape(rows, -1)], axis=1)
        places = [
            jnp.broadcast_to(jnp.arange(width), prompts.shape),
            before[:, None] + jnp.tile(jnp.arange(count), group),
        ]

        def attend(query, key, value):
            asked = attend_causally(query[:, :width], key[:, :width], value[:, :width])
            return jnp.concatenate([asked, attend_behind(query, key, value, width, before, group)], axis=1)

        x = self._through(tokens, jnp.concatenate(places, axis=1), attend, remat, lora, adapter)
        x = x[:, width:].reshape(rows, group, count, -1)
        return jnp.where((jnp.arange(count) < lengths[..., None])[..., None], x, 0)

    def apart(self, lora: Lora | None = None) -> list:
        """Each layer's own weights, and its part of an adapter: what `extend` cuts out of the stacked ones."""
        graph, stacked = nnx.split(self.layers)
        worn = None if lora is None else (lora.a, lora.b)
        cut = [jax.tree.map(lambda leaf, i=index: leaf[i], (stacked, worn)) for index in range(self.config.num_layers)]
        return [(nnx.merge(graph, params), worn) for params, worn in cut]

    def extend(
        self, tokens, start, cache: KVCache, *, rows=None, past=None, asked=None, mesh=None, lora=None, adapter=None
    ):
        """Hidden states of new tokens that continue what the cache holds: a prompt, or what is appended to it.

        tokens int32 [R, T], start int32 [R], rows int32 [R]: token t of line r belongs to row rows[r] of the cache and
        has position start[r] + t. Its key and value are written there (a position past the cache's end is not written
        anywhere) and it attends to all positions up to its own. -> ([R, T, H] after the last norm, the cache). What
        padding behind a row's own tokens leaves in the cache lies beyond the row's length: it is seen by no real token
        and is overwritten by later ones.
        rows: each at most once; lines of no row (as large as the cache's B) come last and their states mean nothing;
        None: all rows in order. past: no row starts behind it (None: the cache's size), so that less is looked at.
        asked int32 [R]: the hidden state of this new token alone is wanted, [R, 1, H]; of the others the last layer
        computes only keys and values. None: all are wanted. mesh: over which the cache lies; line r then belongs to a
        row of the r-th of its parts. lora, adapter [R]: what the lines wear, see `_adapt`.
        """
        if rows is None:
            rows = jnp.arange(len(tokens), dtype=jnp.int32)
        append = caches.appender(len(cache.keys[0]), past, mesh)
        positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
        x, keys, values = self._embed(tokens), [], []
        for index, (one, worn) in enumerate(self.apart(lora)):
            adapt = _adapt(lora, adapter, worn)
            query, *new = one.projections(x, positions, adapt)
            here = None  # queries for all new tokens
            if asked is not None and index == self.config.num_layers - 1:
                x, at = (jnp.take_along_axis(y, asked[:, None, None], axis=1) for y in (x, positions[..., None]))
                here, (query, _, _) = asked, one.projections(x, at[..., 0], adapt)
            attended, key, value = append(query, *new, cache.keys[index], cache.values[index], rows, start, here)
            keys.append(key)
            values.append(value)
            x = one.finish(x, attended, adapt)
        return _rms_norm(x, self.norm, self.config.rms_norm_eps), KVCache(tuple(keys), tuple(values))

    def decode(
        self, tokens, positions, cache: KVCache, *, shared: Shared | None = None, lora=None, adapter=None, layers=None
    ):
        """Hidden states of one new token a row: tokens, positions int32 [B] -> ([B, H] after the last norm, the cache).

        The same as `extend` with one token, for all rows at once. shared: what stands before the rows' own cache.
        layers: `apart(lora)`, where it was made before.
        """
        at, own = positions[:, None], positions
        if shared is not None:
            own = positions - jnp.repeat(shared.length, len(positions) // len(shared.length))
        x, keys, values = self._embed(tokens[:, None]), [], []
        for index, (one, worn) in enumerate(layers or self.apart(lora)):
            adapt = _adapt(lora, adapter, worn)
            query, key, value = one.projections(x, at, adapt)
            held = caches.write(cache.keys[index], cache.values[index], key[:, 0], value[:, 0], own)
            keys.append(held[0])
            values.append(held[1])
            if shared is None:
                attended = caches.attend(query[:, 0], *held, own)
            else:
                attended = caches.attend_in_groups(query[:, 0], *held, own, shared, index)
            x = one.finish(x, attended[:, None], adapt)
        return _rms_norm(x, self.norm, self.config.rms_norm_eps)[:, 0], KVCache(tuple(keys), tuple(values))

    def head(self, hidden):
        """Logits float32 [..., V] of hidden states [..., H], accumulated in float32."""
        return self.heads(1)(hidden)

    def heads(self, rows: int):
        """`head` for hidden states [rows, ...], to be used again and again.

        Each device takes the head whole, once, and gathers the gradient of its own rows, which the devices add up once:
        it is a copy for each of the parts that rows are divided into, which lies with that part. With one for all the
        compiler fetches it and adds its gradient up anew in each step of a scan that uses it.
        """
        weight = (self.embedding if self.lm_head is None else self.lm_head)[...]
        parts = 1 if self.mesh is None or rows % row_shards(self.mesh) else row_shards(self.mesh)
        copies = jnp.broadcast_to(weight, (parts, *weight.shape))
        if parts > 1:
            copies = jax.lax.with_sharding_constraint(copies, named_sharding(self.mesh, "batch", "vocab", "length"))

        def logits(hidden):
            found = dot("pxh,pvh->pxv", hidden.reshape(parts, -1, hidden.shape[-1]), copies, jnp.float32)
            return found.reshape(*hidden.shape[:-1], -1)

        return logits

    def _through(self, tokens, positions, attend, remat: bool, lora: Lora | None, adapter):
        """All layers over whole rows: tokens, positions [B, T] -> [B, T, H] after the last norm. attend: (query, key,
        value) of all heads -> what they attended."""
        graph, stacked = nnx.split(self.layers)

        def layer(x, slices):
            (params, worn), x = slices, self._by_rows(x)
            one, adapt = nnx.merge(graph, params), _adapt(lora, adapter, worn)
            query, key, value = one.projections(x, positions, adapt)
            return one.finish(x, attend(query, key, value), adapt), None

        policies = jax.checkpoint_policies
        keep = policies.save_only_these_names(ATTENDED)
        if not remat:
            keep = policies.save_from_both_policies(keep, policies.dots_with_no_batch_dims_saveable)
        step = jax.checkpoint(layer, prevent_cse=False, policy=keep)
        x, _ = jax.lax.scan(step, self._embed(tokens), (stacked, None if lora is None else (lora.a, lora.b)))
        return _rms_norm(x, self.norm, self.config.rms_norm_eps)

    def _by_rows(self, x):
        """x [B, ...], each row whole on the device that its place in the batch says. Where `fsdp` divides parameters
        the compiler would else follow their slices, divide x by its features and have every device compute all rows."""
        if self.mesh is None or len(x) % row_shards(self.mesh):
            return x
        return jax.lax.with_sharding_constraint(x, named_sharding(self.mesh, "batch"))

    def _embed(self, tokens):
        # Clipped, so that padding of any value is harmless; whoever takes ids from outside checks them.
        return self.embedding[...].at[tokens].get(mode="clip")


def abstract(config: DecoderConfig, dtype=jnp.float32, mesh=None):
    """(graphdef, parameters as shapes and dtypes) of a decoder, computing and allocating nothing.

    mesh: on which whole rows are computed, if it is known: each device then computes those that lie on it."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh)))


def _declare(config: DecoderConfig, rngs: nnx.Rngs, dtype, *, layers: bool):
    """Makers of parameters: `normal(vocab=V, embed=H)` is one of shape [V, H] with these logical axes.

    With `layers` each gets a leading axis "layers". Initial values: normal with the configuration's deviation, 1, 0.
    """

    def make(init, sizes):
        sizes = {"layers": config.num_layers, **sizes} if layers else sizes
        return nnx.Param(init(tuple(sizes.values())), axes=tuple(sizes))

    def normal(shape):
        # float32 first: the values do not depend on the dtype they are stored in
        return (config.initializer_range * jax.random.normal(rngs.params(), shape)).astype(dtype)

    inits = (normal, functools.partial(jnp.ones, dtype=dtype), functools.partial(jnp.zeros, dtype=dtype))
    return tuple(lambda init=init, **sizes: make(init, sizes) for init in inits)


def _adapt(lora: Lora | None, adapter, worn):
    """What adds the adapters' part to a layer's projections. worn: this layer's (a, b). adapter: int32 [B], which of
    the adapters a row wears, -1 none; None: all rows wear the one there is."""
    return None if lora is None else functools.partial(delta, *worn, lora.gains(adapter))


def _rms_norm(x, scale, eps: float):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale[...].astype(jnp.float32)).astype(x.dtype)
