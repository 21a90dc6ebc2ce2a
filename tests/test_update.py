"""The update: how a batch is cut, ordered, filled up and spread over devices changes nothing; clip, schedules, AdamW as
computed independently in float64; steps that are not finite change nothing."""

import math
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.align.update import check_bad, init_state, learning_rates, make_optimiser, make_update, micro_batches
from atp_jax.errors import UserError

HERE = Path(__file__).resolve().parent


def loss(trainable, fixed, micro):
    """Weighted least squares, and a term that is 0 whatever the weights are, but has a slope."""
    error = micro["x"] @ trainable["w"] + trainable["c"] + fixed - micro["y"]
    zero = trainable["c"] - jax.lax.stop_gradient(trainable["c"])
    value = (micro["weight"][:, None] * error**2).sum() + (micro["slope"][:, None] * zero).sum()
    return value, ({"rows": (micro["weight"] > 0).sum().astype(jnp.float32)}, {"error": error.sum(1)})


def weights():
    draw = np.random.default_rng(0)
    return {"w": draw.uniform(0.5, 1, (6, 4)).astype(np.float32), "c": np.full(4, 0.5, np.float32)}


def draw_batch(seed=1, rows=12):
    """Residuals of one sign, so that no gradient is a small difference of large numbers."""
    draw = np.random.default_rng(seed)
    return {
        "x": draw.uniform(0.5, 1, (rows, 6)).astype(np.float32),
        "y": draw.uniform(-2, -1, (rows, 4)).astype(np.float32),
        "weight": draw.uniform(0.5, 1, rows).astype(np.float32) / rows,
        "slope": np.zeros(rows, np.float32),
    }


def start(optimiser):
    return init_state(jax.tree.map(jnp.asarray, weights()), optimiser)


def step(update, state, batch, rows):
    return update(state, jnp.float32(0.25), micro_batches(batch, rows))


def after(rows, batch, steps=3):
    optimiser = make_optimiser(0.1, "constant", 10, weight_decay=0.01, max_grad_norm=1.0)
    update, state = make_update(loss, optimiser), start(optimiser)
    for _ in range(steps):
        state, metrics, outputs = step(update, state, batch, rows)
    return state, metrics, outputs["error"].reshape(-1)[: len(batch["weight"])]


@pytest.fixture(scope="module")
def whole():
    return after(12, draw_batch())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6])
def test_micro_batches_add_up_to_the_whole_batch(whole, rows):
    chex.assert_trees_all_close(after(rows, draw_batch()), whole, rtol=1e-6)


@pytest.mark.parametrize("rows", [5, 8, 32])
def test_rows_that_fill_up_change_nothing(whole, rows):
    """12 rows in micro-batches of 5, 8 or 32: the rest are rows of weight zero."""
    chex.assert_trees_all_close(after(rows, draw_batch()), whole, rtol=1e-6)


@pytest.mark.parametrize("rows", [3, 12])
def test_the_order_of_rows_changes_nothing(whole, rows):
    order = np.random.default_rng(3).permutation(12)
    state, metrics, errors = after(rows, {name: values[order] for name, values in draw_batch().items()})
    chex.assert_trees_all_close((state, metrics, errors[np.argsort(order)]), whole, rtol=1e-6)


@given(st.integers(1, 9), st.integers(1, 12))
def test_micro_batches_keep_every_row_in_order_and_fill_up_with_zeros(count, rows):
    batch = {"ids": np.arange(1, 1 + 3 * count, dtype=np.int32).reshape(count, 3), "weight": np.ones(count, np.float32)}
    cut = micro_batches(batch, rows)
    assert cut["ids"].shape == (-(-count // rows), rows, 3) and cut["ids"].dtype == np.int32
    flat = {name: values.reshape(-1, *values.shape[2:]) for name, values in cut.items()}
    for name, values in batch.items():
        np.testing.assert_array_equal(flat[name][:count], values)
        assert not flat[name][count:].any()


def gradient(w, c, batch):
    """Of `loss` without a slope, in float64."""
    x, y, weight = (batch[name].astype(np.float64) for name in ("x", "y", "weight"))
    error = 2 * weight[:, None] * (x @ w + c + 0.25 - y)
    return {"w": x.T @ error, "c": error.sum(0)}


@pytest.mark.parametrize("most", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_adamw_equals_an_independent_one_in_float64(schedule, most):
    steps, rate, decay, (b1, b2), eps = 8, 0.05, 0.1, (0.8, 0.95), 1e-6
    optimiser = make_optimiser(rate, schedule, steps, 0.25, decay, most, (b1, b2), eps)
    update, state = make_update(loss, optimiser), start(optimiser)
    own = {name: values.astype(np.float64) for name, values in weights().items()}
    m, v = ({name: np.zeros_like(values) for name, values in own.items()} for _ in range(2))
    for t in range(steps):
        batch = draw_batch(seed=t)
        g = gradient(own["w"], own["c"], batch)
        norm = math.sqrt(sum((values**2).sum() for values in g.values()))
        scale = min(1, most / norm) if most else 1
        left = (steps - t) / 6 if schedule == "linear" else (1 + math.cos(math.pi * (t - 2) / 6)) / 2
        lr = rate * (t / 2 if t < 2 else left)
        for name in own:
            m[name] = b1 * m[name] + (1 - b1) * g[name] * scale
            v[name] = b2 * v[name] + (1 - b2) * (g[name] * scale) ** 2
            ahead = m[name] / (1 - b1 ** (t + 1)) / (np.sqrt(v[name] / (1 - b2 ** (t + 1))) + eps)
            own[name] -= lr * (ahead + decay * own[name])
        state, metrics, _ = step(update, state, batch, 4)
        chex.assert_trees_all_close(state.trainable, jax.tree.map(np.float32, own), rtol=5e-6)
        np.testing.assert_allclose(metrics["learning_rate"], lr, rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm_clipped"], norm * scale, rtol=1e-5)
    assert (scale < 1) == (most == 1.0)  # the three cases: off, acting, too high to act


def test_clipping_keeps_the_direction_and_lowers_the_norm_that_is_applied():
    """The first moment is (1 - b1) times the gradient that was applied, so it tells what that was."""
    found = {}
    for most in (0.0, 0.5):
        optimiser = make_optimiser(0.1, "constant", 10, max_grad_norm=most)
        state, metrics, _ = step(make_update(loss, optimiser), start(optimiser), draw_batch(), 12)
        found[most] = jax.tree.map(lambda x: x / 0.1, state.optimiser[0].mu), metrics
    (free, before), (clipped, log) = found[0.0], found[0.5]
    norm = float(np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(free))))
    assert norm > 5 and before["grad_norm"] == before["grad_norm_clipped"] == log["grad_norm"]
    np.testing.assert_allclose(before["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(log["grad_norm_clipped"], 0.5, rtol=1e-6)
    chex.assert_trees_all_close(clipped, jax.tree.map(lambda x: x * 0.5 / norm, free), rtol=1e-5)


def test_schedules_are_their_closed_forms():
    lr, steps = 3e-4, 240
    t = np.arange(steps + 1)
    rates = {
        (name, w): learning_rates(lr, name, steps, w) for name in ("linear", "cosine", "constant") for w in (0, 0.1)
    }
    found = {case: np.array([float(rate(jnp.int32(i))) for i in t]) for case, rate in rates.items()}
    rising = np.minimum(t / 24, 1)
    late = np.maximum(t - 24, 0) / 216
    expected = {
        ("linear", 0): (steps - t) / steps,
        ("linear", 0.1): rising * (1 - late),
        ("cosine", 0): (1 + np.cos(np.pi * t / steps)) / 2,
        ("cosine", 0.1): rising * (1 + np.cos(np.pi * late)) / 2,
        ("constant", 0): np.ones(steps + 1),
        ("constant", 0.1): rising,
    }
    for case, values in expected.items():
        np.testing.assert_allclose(found[case], lr * values, rtol=1e-5, atol=lr * 1e-7, err_msg=str(case))
    assert found["linear", 0][0] == np.float32(lr) and found["cosine", 0.1][0] == 0


def test_the_first_update_of_a_warm_up_moves_nothing_but_the_moments():
    optimiser = make_optimiser(0.1, "cosine", 10, warmup=0.1)
    update, state = make_update(loss, optimiser), start(optimiser)
    state, metrics, _ = step(update, state, draw_batch(), 12)
    assert metrics["learning_rate"] == 0 and state.step == 1
    chex.assert_trees_all_equal(state.trainable, weights())
    state, metrics, _ = step(update, state, draw_batch(), 12)
    assert metrics["learning_rate"] == np.float32(0.1) and (state.trainable["w"] != weights()["w"]).all()


NAN = {"x": np.where(np.arange(12)[:, None] == 7, np.nan, draw_batch()["x"]).astype(np.float32)}  # in one row of all
INFINITE = {"slope": np.full(12, 3e38, np.float32)}  # the sum of slopes, while the loss stays as it is


@pytest.mark.parametrize("rows", [1, 4, 12])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(rows):
    """Good and bad steps in turn end as the good ones alone."""
    optimiser = make_optimiser(0.1, "linear", 10, weight_decay=0.01)
    update = make_update(loss, optimiser)
    state, only = start(optimiser), start(optimiser)
    row = []
    for t, bad in enumerate((INFINITE, NAN, {}, NAN, INFINITE, {}, INFINITE)):
        kept = jax.device_get(state)
        state, metrics, _ = step(update, state, draw_batch(t) | bad, rows)
        if bad:
            assert np.isfinite(metrics["loss"]) == (bad is INFINITE)
            assert not np.isfinite(metrics["grad_norm"]) and metrics["grad_norm_clipped"] == 0
            chex.assert_trees_all_equal((state.trainable, state.optimiser), (kept.trainable, kept.optimiser))
        else:
            only, expected, _ = step(update, only, draw_batch(t), rows)
            chex.assert_trees_all_equal((state.trainable, state.optimiser), (only.trainable, only.optimiser))
            assert metrics["learning_rate"] == expected["learning_rate"]  # counts the updates applied
        row.append((int(metrics["bad"]), int(metrics["skipped"])))
        assert (state.step, state.bad, state.skipped) == (t + 1, *row[-1])
    assert row == [(1, 1), (2, 2), (0, 2), (1, 3), (2, 4), (0, 4), (1, 5)]


def test_too_many_in_a_row_end_in_one_line_and_a_good_one_starts_anew():
    optimiser = make_optimiser(0.1, "constant", 10)
    update, state = make_update(loss, optimiser), start(optimiser)
    for batch in (NAN, NAN, {}, NAN, NAN):
        state, _, _ = step(update, state, draw_batch() | batch, 12)
        check_bad(state, 3)
    state, _, _ = step(update, state, draw_batch() | NAN, 12)
    with pytest.raises(
        UserError, match=r"^3 updates in a row had a loss or gradient not finite .*max_bad_steps=3"
    ) as stop:
        check_bad(state, 3)
    assert "\n" not in str(stop.value) and state.skipped == 5


def test_the_state_is_donated_all_of_it():
    optimiser = make_optimiser(0.1, "linear", 10)
    update, state = make_update(loss, optimiser), start(optimiser)
    for _ in range(2):
        old, places = state, {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.ndim}
        state, _, _ = jax.block_until_ready(step(update, state, draw_batch(), 12))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        assert places == {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.ndim}


def test_new_data_of_the_same_shape_compile_nothing():
    optimiser = make_optimiser(0.1, "cosine", 10, warmup=0.1)
    update, state = make_update(loss, optimiser), start(optimiser)
    with small_models.compilations() as seen:
        state, _, _ = step(update, state, draw_batch(), 4)
    assert seen
    with small_models.compilations() as seen:
        for seed, batch in enumerate(({}, NAN, {})):
            state, _, _ = step(update, state, draw_batch(seed) | batch, 4)
    assert not seen


EIGHT = """
import sys
from pathlib import Path

import chex, jax, jax.numpy as jnp, numpy as np
import small_models
from atp_jax.align.logprobs import answer_logprobs
from atp_jax.align.rows import INPUTS, rows_of
from atp_jax.align.trainable import join, partition
from atp_jax.align.update import init_state, make_optimiser, make_update, micro_batches
from atp_jax.checkpoint import Checkpoints
from atp_jax.models import lora as adapters
from atp_jax.parallel import make_mesh, named_sharding

assert jax.device_count() == 8
draw = np.random.default_rng(0)
prompts = draw.integers(0, 64, (14, 3)).tolist()
answers = [(prompts[i // 2], draw.integers(0, 64, draw.integers(2, 10)).tolist()) for i in range(28)]
batch = rows_of(answers, 2)
mask = batch["sampled"]
batch["weight"] = mask / mask.sum()
optimiser = make_optimiser(1e-3, "constant", 10, max_grad_norm=0.1)
lies = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]

def train(mesh, rows, rank, train=()):
    config, graphdef, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=mesh)
    lora = None
    if rank:
        lora = adapters.init(config, rank, 8, ("query", "down"), 0, mesh)
        lora = lora.replace(b=jax.tree.map(lambda x: x + 0.02, lora.b))  # zero would hide the gradient of A

    def loss(trainable, frozen, micro):
        params, lora = join(trainable, frozen)
        logprobs, _ = answer_logprobs(params, lora, *(micro[name] for name in INPUTS), 1.0, graphdef=graphdef)
        return -(logprobs * micro["weight"]).sum(), ({}, {"sums": logprobs.sum(2)})

    trainable, frozen = partition(params, lora, train)
    state = init_state(trainable, optimiser)
    update, placed = make_update(loss, optimiser), lies(state)
    assert lies(state.trainable) == lies(state.optimiser[0].mu)
    shaped = jax.device_put(micro_batches(batch, rows), named_sharding(mesh, "length", "batch"))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    assert shaped["answers"].addressable_shards[0].data.shape == (16 // rows, rows // shards, 2, 16)
    state, metrics, outputs = update(state, frozen, shaped)
    assert lies(state) == placed
    first = jax.device_get((state.optimiser[0].mu, metrics, outputs["sums"].reshape(-1, 2)[:14]))
    with Checkpoints(Path(sys.argv[1]) / "-".join(map(str, (*mesh.devices.shape, rank)))) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        _, again, _ = checkpoints.latest(init_state(jax.tree.map(jnp.copy, state.trainable), optimiser))
    assert lies(again) == placed
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(state))
    with small_models.compilations() as seen:
        state, metrics, _ = update(state, frozen, shaped)
        again, same, _ = update(again, frozen, shaped)
    assert not seen, seen
    chex.assert_trees_all_equal(jax.device_get((again, same)), jax.device_get((state, metrics)))
    return first

def close(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.ravel(x - y)) / max(np.linalg.norm(np.ravel(y)), 1e-30)
        assert error < 1e-6, (error, x, y)

alone = make_mesh(devices=jax.devices()[:1])
for rank, train_only, meshes in ((2, (), [((8, 1, 1), 8), ((2, 2, 2), 16)]), (0, ("layers.query",), [((1, 8, 1), 16)])):
    expected = train(alone, 4, rank, train_only)
    assert expected[1]["grad_norm"] > 0.1 and abs(expected[1]["grad_norm_clipped"] - 0.1) < 1e-6
    for sizes, rows in meshes:
        close(train(make_mesh(*sizes), rows, rank, train_only), expected)
print("the same on 8 devices")
"""


@pytest.mark.slow
def test_devices_change_nothing_and_the_state_stays_where_it_lies(tmp_path):
    """Gradients (as first moments), metrics and outputs of a decoder over data, fsdp, and all three axes; 14 prompts
    with two answers each in micro-batches of 4, 8 and 16; a state that went through a checkpoint goes on as the one
    that did not."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, str(tmp_path)], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and "the same on 8 devices" in done.stdout, done.stderr
