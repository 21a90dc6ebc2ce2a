"""What is trained and what is not: an adapter, or the model's own weights, all of them or some.

What is trained is kept in float32 whatever the model computes in, so that small updates are not rounded away; `join`
casts it to the model's dtype inside the jitted step.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from atp_jax.errors import UserError
from atp_jax.models.lora import Lora


def partition(params, lora: Lora | None, train: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """(trainable, frozen): with an adapter its A and B alone, else the parameters that `train` names (empty: all).

    A name is the beginning of a parameter's path, as in "layers", "layers.query", "norm". The trainable part is a copy
    in float32, so that the step may donate it. UserError for a name that nothing begins with.
    """
    if lora is not None:
        return {"a": _master(lora.a), "b": _master(lora.b)}, {"params": params, "lora": lora}
    flat = [(".".join(map(str, path)), path, variable) for path, variable in nnx.to_flat_state(params)]
    for name in train:
        if not any(_within(path, name) for path, _, _ in flat):
            known = ", ".join(path for path, _, _ in flat)
            raise UserError(f"align.train: no parameter begins with {name!r}; there are {known}")
    chosen = [not train or any(_within(path, name) for name in train) for path, _, _ in flat]
    trained = nnx.from_flat_state([(p, v) for (_, p, v), mine in zip(flat, chosen, strict=True) if mine])
    rest = nnx.from_flat_state([(p, v) for (_, p, v), mine in zip(flat, chosen, strict=True) if not mine])
    dtype = jnp.zeros((), jax.tree.leaves(params)[0].dtype)  # an array, because a dtype is no leaf of a tree
    return {"params": _master(trained)}, {"rest": rest, "dtype": dtype}


def join(trainable: dict, frozen: dict):
    """(params, lora) as the decoder takes them."""
    if "lora" in frozen:
        return frozen["params"], frozen["lora"].replace(a=trainable["a"], b=trainable["b"])
    trained = jax.tree.map(lambda x: x.astype(frozen["dtype"].dtype), trainable["params"])
    return nnx.merge_state(trained, frozen["rest"]), None


def _master(tree):
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), tree)


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(name + ".")
