"""A model of which only the shape is known."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from atp_jax.model import Model, check_dtype
from atp_jax.models import huggingface
from atp_jax.models.decoder import Decoder, abstract
from atp_jax.parallel import make_mesh, param_shardings


def random_model(directory: str, dtype: str) -> Model:
    """A model with the shape of a directory's config.json and random weights, made where they lie; it has no tokenizer.

    One parameter after another, so that float32 values of no more than one of them are in memory: with all in one
    program XLA on a CPU sets aside 73 GB for those of Qwen3-8B in bfloat16, and 29 GB for its largest parameter.
    """
    check_dtype(dtype)
    config, mesh = huggingface.load_config(Path(directory).expanduser()), make_mesh()

    def make(path, sharding):
        def one():  # of all that is drawn here the compiler keeps this one
            made = nnx.state(Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
            return dict(nnx.to_flat_state(made))[path]

        return jax.block_until_ready(jax.jit(one, out_shardings=sharding)())

    shardings = nnx.to_flat_state(param_shardings(abstract(config, jnp.dtype(dtype))[1], mesh))
    return Model(config, None, nnx.from_flat_state([(path, make(path, where)) for path, where in shardings]), mesh)
