"""How a batch of answers is cut up: those of alike length together, no more columns computed than they need, as many
prompts at a time as there is memory for."""

import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from small_engines import ONE

from atp_jax.align import rows as layout
from atp_jax.align import update as updates
from atp_jax.align.grpo import Draw, Grpo
from atp_jax.align.trainable import partition
from atp_jax.model import Model
from atp_jax.parallel import named_sharding
from atp_jax.policies.types import Answer
from atp_jax.settings import GrpoSettings

LENGTHS = (60, 14, 3, 16, 20, 1, 7, 40)  # of four groups of two: 64, 16, 32 and 64 columns
PLACED = named_sharding(ONE, "length", "batch")


@pytest.fixture(scope="module")
def learned():
    """(method, its state's maker, what is fixed, a batch) of GRPO with a small model."""
    config, _, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)
    model = Model(config, None, params, ONE, types.MappingProxyType({"eos_token_id": 1}))
    random = np.random.default_rng(0)
    answers = [
        Answer("", tuple(random.integers(2, 60, length)), "stop", 0.0, (5, 6, 7 + row // 2), (-1.0,) * length)
        for row, length in enumerate(LENGTHS)
    ]
    rewards = random.random((4, 2, 1))
    settings = GrpoSettings(steps=1, prompts=4, group=2, kl=0.0)
    method = Grpo("t", lambda *_: Draw(answers, rewards, {}), model, settings, 64, None)
    trainable, frozen = partition(model.params, None, ())
    batch, _ = method.batch(0, params, None)

    def start(optimiser):
        return updates.init_state(jax.tree.map(jnp.copy, trainable), optimiser)

    return method, start, (frozen, (params, None)), batch


def one_update(learned, batch, rows):
    """(first moments, metrics, outputs) of one update, and the programs that it compiled."""
    method, start, fixed, _ = learned
    optimiser = updates.make_optimiser(1e-3, "constant", 10)
    update, state = updates.make_update(method.loss, optimiser), start(optimiser)
    state, metrics, outputs = update(state, fixed, updates.micro_batches(batch, rows))
    return jax.device_get(
        (state.optimiser[0].mu, metrics, outputs["logprobs"].reshape(-1, *outputs["logprobs"].shape[2:]))
    )


def sorted_(batch):
    order = layout.by_length(batch)
    return {name: values[order] for name, values in batch.items()}, order


def test_the_longest_come_first_and_those_alike_stay_in_order(learned):
    *_, batch = learned
    assert batch["answers"].shape == (4, 2, 64)
    assert layout.by_length(batch).tolist() == [0, 3, 2, 1]
    assert layout.by_length({"lengths": np.array([[3, 1], [1, 3], [5, 0]])}).tolist() == [2, 0, 1]


@pytest.mark.parametrize("rows", [1, 2])
def test_less_columns_give_the_same_update(learned, monkeypatch, rows):
    *_, batch = learned
    batch, _ = sorted_(batch)
    whole = one_update(learned, batch, rows)
    monkeypatch.setattr(layout, "NARROW", 16)
    chex.assert_trees_all_close(one_update(learned, batch, rows), whole, rtol=2e-5, atol=1e-7)
    assert np.abs(whole[2]).max() > 0


def test_columns_that_no_answer_needs_are_not_computed(learned, monkeypatch):
    """What is not finite there goes unnoticed; computed, it would make the step a bad one."""
    *_, batch = learned
    batch, order = sorted_(batch)
    assert order[3] == 1  # answers of 3 and 16 tokens
    poisoned = batch | {"weights": batch["weights"].copy()}
    poisoned["weights"][3, :, 16:] = np.nan
    monkeypatch.setattr(layout, "NARROW", 16)
    chex.assert_trees_all_equal(one_update(learned, poisoned, 1), one_update(learned, batch, 1))
    poisoned["weights"][3, :, 15:] = np.nan
    assert one_update(learned, poisoned, 1)[1]["skipped"] == 1


def test_no_mix_of_lengths_compiles(learned, monkeypatch):
    method, start, fixed, batch = learned
    monkeypatch.setattr(layout, "NARROW", 16)
    optimiser = updates.make_optimiser(1e-3, "constant", 10)
    update, state = updates.make_update(method.loss, optimiser), start(optimiser)
    state, *_ = update(state, fixed, updates.micro_batches(batch, 1))
    with small_models.compilations() as seen:
        for most in (64, 16, 1, 30):
            mixed = batch | {"lengths": np.minimum(batch["lengths"], most)}
            state, *_ = update(state, fixed, updates.micro_batches(mixed, 1))
    assert not seen


def test_as_many_prompts_as_fit(learned, monkeypatch):
    """The memory that the compiled update takes for them is there; on a device that does not say what it has, a CPU,
    as many tokens as its caches hold."""
    method, start, fixed, batch = learned
    batch = {name: np.concatenate([values] * 4) for name, values in batch.items()}  # 16 prompts
    optimiser = updates.make_optimiser(1e-3, "constant", 10)
    update, state = updates.make_update(method.loss, optimiser), start(optimiser)

    def takes(rows):
        shapes = {
            name: jax.ShapeDtypeStruct((1, rows, *x.shape[1:]), x.dtype, sharding=PLACED) for name, x in batch.items()
        }
        return update.jitted(state).lower(state, fixed, shapes).compile().memory_analysis().temp_size_in_bytes

    for free in (0, takes(1), takes(3), takes(8), 10**12):
        monkeypatch.setattr(updates, "spare_memory", lambda held, mesh, free=free: free)
        rows = updates.as_many_as_fit(update, state, fixed, batch, PLACED)
        assert rows == 1 or takes(rows) <= free
        found = {0: 1, 10**12: 16}.get(free)
        assert rows == found if found else 1 <= rows < 16
    assert takes(8) > 2 * takes(1)

    monkeypatch.setattr(updates, "spare_memory", lambda held, mesh: None)
    width = batch["prompts"].shape[1] + batch["answers"][0].size
    for tokens, expected in ((1, 1), (6 * width, 6), (7 * width, 6), (8 * width, 8), (10**9, 16)):
        monkeypatch.setattr(updates, "TOKENS", tokens)  # 16 in 3 parts of at most 7 are parts of 6
        assert updates.as_many_as_fit(update, state, fixed, batch, PLACED) == expected
