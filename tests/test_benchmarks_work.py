"""What benchmarks take for a device's work, counted independently, and what they take for its rates."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
import small_models
from flax import nnx

from atp_jax.benchmarks import machine
from atp_jax.benchmarks.work import must_read, prefill_flops, update_flops
from atp_jax.errors import UserError
from atp_jax.model import load_model
from atp_jax.models.cache import KVCache, init_cache
from atp_jax.models.decoder import abstract
from atp_jax.plan.cost import cost

UNTIED = "llama31"  # so that the gradient of the embedding is no product


def test_what_must_be_read():
    """The organism is tied: all weights for every token, and keys and values of 4 layers of 2 heads of 48."""
    model = load_model()
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert must_read(model, rows=3, length=10, new=2) == 4 * (2 * weights + 3 * (10 + 11) * 2 * 4 * 2 * 48)


def read(decoder, tokens, cache: KVCache):
    """Hidden states of tokens behind a cache, one after another, each in a cache that holds exactly what it sees, so
    that no product has a term too many; and the last cache."""
    states = []
    for token in tokens:
        keys = tuple(jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, 1)]) for x in cache.keys)
        values = tuple(jnp.pad(x, [(0, 0), (0, 0), (0, 1), (0, 0)]) for x in cache.values)
        at = jnp.array([values[0].shape[2] - 1])
        hidden, cache = decoder.decode(jnp.array([token]), at, KVCache(keys, values))
        states.append(hidden)
    return states, cache


def flops(function, *arguments) -> float:
    return cost(jax.make_jaxpr(function)(*arguments)).flops


@pytest.mark.parametrize("name", ["qwen3", "qwen2", UNTIED])
def test_flops_of_prefill_are_those_of_reading_token_by_token(name):
    """All layers but the last; of that one keys and values of all tokens, and all of the last token."""
    config, _, _ = small_models.load(small_models.FIXTURES / name)
    fewer = dataclasses.replace(config, num_layers=config.num_layers - 1)

    def reading(config, tokens, behind):
        graphdef, params = abstract(config)
        cache = init_cache(config, 1, behind)
        return flops(lambda params: read(nnx.merge(graphdef, params), range(tokens), cache)[0], params)

    last = reading(config, 1, 6) - reading(fewer, 1, 6)
    keys_and_values = 6 * 2 * 2 * config.hidden_size * config.num_kv_heads * config.head_dim
    assert prefill_flops(config, rows=3, length=7) == 3 * (reading(fewer, 7, 0) + last + keys_and_values) > 0


@pytest.mark.parametrize("whole", [True, False])
def test_flops_of_an_update_are_those_of_its_gradient_token_by_token(whole):
    """Two prompts with two answers each. Where an adapter is trained the gradient goes through all layers down to the
    embedding, which stands in for it: that of the embedding itself is no product."""
    config, graphdef, params = small_models.load(small_models.FIXTURES / UNTIED)
    prompts, answers = ([3, 4, 5], [6, 7, 8, 9, 10]), ([11, 12, 13, 14], [15, 16, 17, 18])

    def score(params):
        decoder, total = nnx.merge(graphdef, params), 0.0
        for prompt in prompts:
            states, cache = read(decoder, prompt[:-1], init_cache(config, 1, 0))
            for answer in answers:
                behind, _ = read(decoder, [prompt[-1], *answer[:-1]], cache)
                total += sum(decoder.head(hidden).sum() for hidden in behind)
            total += sum(hidden.sum() for hidden in states)
        return total

    def score_of_embedding(embedding, params):
        flat = dict(nnx.to_flat_state(params))
        flat["embedding",] = flat["embedding",].replace(embedding)
        return score(nnx.from_flat_state(list(flat.items())))

    reference = flops(score, params)
    if whole:
        trained = flops(jax.grad(score), params)
    else:
        trained = flops(jax.grad(score_of_embedding), params["embedding"][...], params)
    assert update_flops(config, [3, 5], group=2, new=4, whole=whole) == reference + trained


def test_rates_are_the_work_over_the_best_of_its_times(monkeypatch):
    """Copying reads and writes; a product of [N, N] multiplies and adds N^3 times. The first call, which compiles, and
    the slower ones do not count."""
    now, took = [0.0], []

    def tick():
        if len(took) % 2:  # a call ends; the first of them would be the fastest
            now[0] += {0: 0.125, 7: 0.5}.get(len(took) // 2 % 11, 2.0)
        took.append(now[0])
        return now[0]

    monkeypatch.setattr(machine, "time", types.SimpleNamespace(perf_counter=tick))
    assert machine.bandwidth(2**10) == 2 * 2**10 / 0.5
    assert machine.product_rate("bfloat16", 16) == 2 * 16**3 / 0.5
    assert len(took) == 2 * 2 * 11
    assert machine.rates("float32") is None  # of a CPU
    with pytest.raises(UserError, match="not 'int8'"):
        machine.rates("int8")
