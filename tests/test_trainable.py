"""What is trained and what is left as it lies."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx

from atp_jax.align.trainable import join, partition
from atp_jax.align.update import init_state, make_optimiser, make_update
from atp_jax.errors import UserError
from atp_jax.models import lora as adapters
from atp_jax.parallel import make_mesh


def load(dtype="float32"):
    return small_models.load(small_models.FIXTURES / "qwen3", dtype=dtype)


@pytest.fixture
def lora():
    config, _, _ = load()
    return adapters.init(config, 4, 8, ("query", "down"), 0, make_mesh(devices=jax.devices()[:1]))


def paths(state) -> set[str]:
    return {".".join(path) for path, _ in nnx.to_flat_state(state)}


def test_an_adapter_is_trained_alone(lora):
    _, _, params = load("bfloat16")
    trainable, frozen = partition(params, lora)
    chex.assert_trees_all_equal(trainable, {"a": lora.a, "b": lora.b})
    kept, joined = join(jax.tree.map(lambda x: x + 1, trainable), frozen)
    assert kept is params
    chex.assert_trees_all_equal(joined.a, jax.tree.map(lambda x: x + 1, lora.a))
    assert joined.gain is lora.gain and joined.owner is lora.owner


def test_gradients_reach_a_and_b_and_nothing_else(lora):
    trainable, frozen = partition(load()[2], lora)

    def loss(trainable):
        params, joined = join(trainable, frozen)
        numbers = jax.tree.leaves((params, joined.a, joined.b, joined.gain))
        return sum((x.astype(jnp.float32) ** 2).sum() for x in numbers)

    gradient = jax.grad(loss)(trainable)
    chex.assert_trees_all_close(gradient, jax.tree.map(lambda x: 2 * x, trainable))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_are_trained_as_a_float32_copy_and_joined_in_their_own_dtype(dtype):
    _, _, params = load(dtype)
    trainable, frozen = partition(params, None)
    assert {x.dtype for x in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert paths(trainable["params"]) == paths(params) and not jax.tree.leaves(frozen["rest"])
    joined, lora = join(trainable, frozen)
    assert lora is None
    chex.assert_trees_all_equal_shapes_and_dtypes(joined, params)
    chex.assert_trees_all_equal(joined, params)
    jax.tree.map(lambda x: x.delete(), trainable)  # as the update does, which is given them
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (("norm",), {"norm"}),
        (("layers.query",), {"layers.query"}),
        (("layers.query", "embedding"), {"layers.query", "embedding"}),
        (("layers",), None),
    ],
)
def test_names_choose_weights_by_the_beginning_of_their_path(train, expected):
    _, _, params = load("bfloat16")
    trainable, frozen = partition(params, None, train)
    expected = {path for path in paths(params) if path.startswith("layers.")} if expected is None else expected
    assert paths(trainable["params"]) == expected
    assert paths(frozen["rest"]) == paths(params) - expected
    joined, _ = join(trainable, frozen)
    assert [path for path, _ in nnx.to_flat_state(joined)] == [path for path, _ in nnx.to_flat_state(params)]
    chex.assert_trees_all_equal(joined, params)
    chex.assert_trees_all_equal_structs(joined, params)  # the decoder's graph takes it


def test_a_name_that_nothing_begins_with_is_refused_with_those_there_are():
    with pytest.raises(
        UserError, match="align.train: no parameter begins with 'layers.que'; there are embedding, layers"
    ):
        partition(load()[2], None, ("norm", "layers.que"))


def test_small_updates_of_a_bfloat16_model_add_up():
    """One step of 1e-4 is less than bfloat16 can tell apart at 1, fifty of them are not."""
    _, _, params = load("bfloat16")
    params["norm"][...] = jnp.ones_like(params["norm"][...])
    trainable, frozen = partition(params, None, ("norm",))
    optimiser = make_optimiser(1e-4, "constant", 50)

    def loss(trainable, frozen, micro):
        joined, _ = join(trainable, frozen)
        assert joined["norm"][...].dtype == jnp.bfloat16
        return joined["norm"][...].astype(jnp.float32).sum() * micro.sum(), ({}, {})

    update, state = make_update(loss, optimiser), init_state(trainable, optimiser)
    seen = []
    for _ in range(50):
        state, _, _ = update(state, frozen, jnp.ones((1, 2)))
        seen.append(float(join(state.trainable, frozen)[0]["norm"][...][0]))
    assert seen[0] == 1.0
    np.testing.assert_allclose(state.trainable["params"]["norm"][...], 1 - 50e-4, rtol=1e-6)
    np.testing.assert_allclose(seen[-1], 1 - 50e-4, atol=0.002)
    assert seen[-1] < 1.0
