"""Low-rank adapters: what training adds to a frozen model, kept apart from it in sampling and training alike.

The delta of a projection W [*in, *out] is `(x @ A) * gain @ B` with A [*in, R] and B [R, *out]. Several adapters lie
side by side along the rank axis, so that rows of one batch may wear different ones (or none): a row takes only the
ranks of its own adapter.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from atp_jax.errors import UserError
from atp_jax.models.config import DecoderConfig
from atp_jax.parallel import named_sharding, put

# Target -> its logical axes in and out, those of the Decoder's parameter.
INTO, OUT = ("embed",), {"heads": ("heads", "head_dim"), "kv_heads": ("kv_heads", "head_dim")}
TARGETS = {
    "query": (INTO, OUT["heads"]),
    "key": (INTO, OUT["kv_heads"]),
    "value": (INTO, OUT["kv_heads"]),
    "output": (OUT["heads"], INTO),
    "gate": (INTO, ("mlp",)),
    "up": (INTO, ("mlp",)),
    "down": (("mlp",), INTO),
}


class Lora(struct.PyTreeNode):
    """One adapter, or K of them side by side. R is the sum of their ranks, L the number of layers.

    a: target -> float32 [L, *in, R]. b: target -> float32 [L, R, *out]. gain: float32 [R], alpha / rank of the adapter
    that each rank belongs to. owner: int32 [R], which adapter that is, 0 to K - 1.
    """

    a: dict[str, jax.Array]
    b: dict[str, jax.Array]
    gain: jax.Array
    owner: jax.Array

    def gains(self, adapter: jax.Array | None) -> jax.Array:
        """How much of each rank a row takes: [R] where every row wears everything (adapter None), else [B, 1, R] for
        int32 [B], -1 wearing nothing."""
        if adapter is None:
            return self.gain
        return jnp.where(self.owner == adapter[:, None], self.gain, 0)[:, None]


def delta(a: dict, b: dict, gains: jax.Array, target: str, x: jax.Array) -> jax.Array | float:
    """What one layer's adapter adds to a projection of x [B, T, *in]: [B, T, *out], computed in x's dtype; 0 for a
    projection that has none."""
    if target not in a:
        return 0.0
    into, out = a[target].astype(x.dtype), b[target].astype(x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    ranks = jnp.tensordot(x, into, axes=into.ndim - 1, precision=precision) * gains.astype(x.dtype)
    return jnp.tensordot(ranks, out, axes=1, precision=precision)


def sizes(config: DecoderConfig, target: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a target's axes in and out."""
    known = {
        "embed": config.hidden_size, "heads": config.num_heads, "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "mlp": config.intermediate_size,
    }  # fmt: skip
    into, out = TARGETS[target]
    return tuple(known[axis] for axis in into), tuple(known[axis] for axis in out)


def init(config: DecoderConfig, rank: int, alpha: float, targets: Sequence[str], seed: int, mesh) -> Lora:
    """A fresh adapter as PEFT makes it: A uniform in +-1/sqrt(fan in) (kaiming with a = sqrt 5), B zero, so it adds
    nothing yet. UserError for a rank below 1 or an unknown target."""
    if rank < 1:
        raise UserError(f"an adapter's rank must be at least 1, not {rank}")
    if unknown := [target for target in targets if target not in TARGETS]:
        raise UserError(f"an adapter has no target {unknown[0]!r}; there are {', '.join(TARGETS)}")
    key = jax.random.key(seed, impl="threefry2x32")
    a, b = {}, {}
    for number, target in enumerate(TARGETS):
        if target in targets:
            into, out = sizes(config, target)
            bound = 1 / math.sqrt(math.prod(into))
            shape = (config.num_layers, *into, rank)
            drawn = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound)
            a[target], b[target] = drawn, jnp.zeros((config.num_layers, rank, *out))
    return place(Lora(a, b, jnp.full(rank, alpha / rank, jnp.float32), jnp.zeros(rank, jnp.int32)), mesh)


def concat(adapters: Sequence[Lora]) -> Lora:
    """Adapters of the same targets side by side: row index k of a batch wears adapters[k]."""
    if len({frozenset(lora.a) for lora in adapters}) > 1:
        raise UserError("adapters with different targets cannot be worn in one batch")
    ranks = [len(lora.gain) for lora in adapters]
    owner = jnp.asarray(np.repeat(np.arange(len(adapters)), ranks), jnp.int32)
    a = {name: jnp.concatenate([lora.a[name] for lora in adapters], -1) for name in adapters[0].a}
    b = {name: jnp.concatenate([lora.b[name] for lora in adapters], 1) for name in adapters[0].b}
    return Lora(a, b, jnp.concatenate([lora.gain for lora in adapters]), owner)


def merge(params, lora: Lora):
    """The parameters of a Decoder with an adapter summed into them, in their own dtype."""

    def one(path, variable):
        target = path[-1]
        if path[0] != "layers" or target not in lora.a:
            return variable
        ranks, inner = lora.gain, lora.a[target].shape[1:-1]
        into = lora.a[target].reshape(len(lora.a[target]), -1, len(ranks)) * ranks
        out = lora.b[target].reshape(len(into), len(ranks), -1)
        added = jnp.einsum("lir,lro->lio", into, out, precision=jax.lax.Precision.HIGHEST)
        added = added.reshape(len(into), *inner, *lora.b[target].shape[2:])
        weight = variable[...]
        return variable.replace((weight.astype(jnp.float32) + added).astype(weight.dtype))

    return nnx.from_flat_state([(path, one(path, variable)) for path, variable in nnx.to_flat_state(params)])


def shardings(lora: Lora, mesh) -> Lora:
    """Where an adapter lies: A as its projection's inputs, B as its outputs, ranks everywhere."""
    whole = named_sharding(mesh, "rank")
    a = {name: named_sharding(mesh, "layers", *TARGETS[name][0], "rank") for name in lora.a}
    b = {name: named_sharding(mesh, "layers", "rank", *TARGETS[name][1]) for name in lora.b}
    return Lora(a, b, whole, whole)


def place(lora: Lora, mesh) -> Lora:
    """An adapter on the mesh."""
    return jax.tree.map(put, lora, shardings(lora, mesh))
