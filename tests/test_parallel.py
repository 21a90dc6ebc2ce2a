"""The mesh, its refusals, and a model on 8 devices: the same numbers as on one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import small_models
from flax import nnx

from atp_jax import parallel
from atp_jax.errors import UserError
from atp_jax.models import huggingface
from atp_jax.models.decoder import abstract

HERE = Path(__file__).resolve().parent


def fake_devices(count):
    """Enough of one device for what is refused before a mesh exists."""
    return [jax.devices()[0]] * count


def test_one_device_is_a_mesh_of_one():
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1} and mesh.axis_names == parallel.AXES
    params = abstract(huggingface.load_config(small_models.FIXTURES / "llama_linear"))[1]
    shardings = jax.tree.leaves(parallel.param_shardings(params, mesh))
    assert len(shardings) == len(jax.tree.leaves(params)) and all(s.is_fully_replicated for s in shardings)


@pytest.mark.parametrize(
    ("sizes", "devices", "said"),
    [
        ((3, 1, 1), 8, "data=3 x fsdp=1 x tensor=1 does not fit 8 device.*data=-1 .here 8., fsdp=1, tensor=1"),
        ((-1, 1, 3), 8, "what fits: data=-1 .here 8., fsdp=1, tensor=1"),
        ((2, 4, 2), 8, "what fits: data=-1 .here 1., fsdp=4, tensor=2"),
        ((4, 1, 1), 8, "does not fit 8"),
        ((1, 1, 2), 1, "does not fit 1 device.*data=-1 .here 1., fsdp=1, tensor=1"),
        ((-1, -1, 1), 8, "mesh.data and mesh.fsdp"),
        ((0, 1, 1), 8, "mesh.data must be"),
        ((1, -2, 1), 8, "mesh.fsdp must be"),
        ((1, 1, 2.0), 8, "mesh.tensor must be"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_some_that_do(sizes, devices, said):
    with pytest.raises(UserError, match=said):
        parallel.make_mesh(*sizes, devices=fake_devices(devices))


def test_every_parameter_of_the_decoder_has_a_rule():
    for name in small_models.NAMES:
        for _, variable in nnx.to_flat_state(abstract(huggingface.load_config(small_models.FIXTURES / name))[1]):
            axes = variable.get_metadata("axes")
            assert len(axes) == len(variable.shape) and all(axis in parallel.RULES for axis in axes)


EIGHT = """
import chex, jax, jax.numpy as jnp, numpy as np, pytest
import small_models
from atp_jax import parallel
from atp_jax.errors import UserError
from atp_jax.models import huggingface
from atp_jax.models.cache import init_cache
from atp_jax.models.decoder import abstract

assert jax.device_count() == 8
directory = small_models.FIXTURES / "qwen3"
tokens, lengths, expected = small_models.expected("qwen3")
tokens, lengths = np.tile(tokens, (3, 1))[:8], np.tile(lengths, 3)[:8]
_, _, alone = small_models.load(directory)
for sizes in ((-1, 1, 1), (2, -1, 2)):
    mesh = parallel.make_mesh(*sizes)
    config, graphdef, params = small_models.load(directory, mesh=mesh)
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(alone))
    query = params["layers"]["query"][...]
    whole, part = query.shape, query.addressable_shards[0].data.shape
    assert part == (whole[0], whole[1] // mesh.shape["fsdp"], whole[2] // mesh.shape["tensor"], whole[3]), part
    rows = parallel.batch_sharding(mesh)
    new, length = jax.device_put((tokens, lengths), rows)
    assert new.addressable_shards[0].data.shape[0] == 8 // (mesh.shape["data"] * mesh.shape["fsdp"])
    logits = small_models.logits(graphdef, params, new, length)
    chex.assert_trees_all_close(small_models.real(logits[:3], lengths[:3]), expected, atol=1e-4, rtol=0)

    where = parallel.named_sharding(mesh, "batch", "kv_heads", "length", "head_dim")
    cache = jax.device_put(init_cache(config, 8, 48), where)
    first, cache = small_models.extend(graphdef, params, new[:, :8], jnp.zeros_like(length), cache, mesh)
    second, cache = small_models.extend(graphdef, params, new[:, 8:], jnp.full_like(length, 8), cache, mesh)
    hidden = small_models.hidden(graphdef, params, new, jnp.full_like(length, 40))
    chex.assert_trees_all_close(jnp.concatenate([first, second], axis=1), hidden, atol=1e-5, rtol=0)

with pytest.raises(UserError, match="mesh.tensor=4 does not divide the model's kv_heads=2; what divides: 1, 2"):
    parallel.param_shardings(abstract(config)[1], parallel.make_mesh(tensor=4))
print("the same on 8 devices")
"""


def test_eight_devices_compute_what_one_does():
    """Weights read straight to their parts; whole rows and a cache; data alone, and all three axes together."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the same on 8 devices" in done.stdout, done.stderr


def test_caches_may_take_what_the_weights_leave():
    """Five sixths of each device less what lies on it, on all together; never below 0, and no bound where none is known
    (the CPU of these tests)."""

    def mesh(limit):
        device = SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit, "bytes_in_use": 7})
        return SimpleNamespace(local_devices=[device] * 2, size=4)

    held = {"one": jax.numpy.zeros((5, 5)), "two": jax.numpy.zeros(50, jax.numpy.bfloat16)}  # 100 bytes each
    assert parallel.spare_memory(held, mesh(600)) == 4 * (500 - 200)
    assert parallel.spare_memory((held, dict(held)), mesh(600)) == 4 * (500 - 200)  # the same arrays
    assert parallel.spare_memory(held, mesh(120)) == 0
    assert parallel.spare_memory(held, mesh(None)) is None
    assert parallel.spare_memory(held, parallel.make_mesh(devices=jax.devices()[:1])) is None
