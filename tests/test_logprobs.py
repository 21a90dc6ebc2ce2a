"""Log-probabilities in chunks: the numbers and gradients of the plain computation, without its memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx

from atp_jax.align.logprobs import token_logprobs
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.models import lora as adapters
from atp_jax.parallel import make_mesh

LENGTHS = np.array([13, 1, 9], np.int32)


@pytest.fixture(scope="module")
def model():
    config, graphdef, params = small_models.load(small_models.FIXTURES / "qwen3")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 13)).astype(np.int32)
    return config, graphdef, params, tokens


def plain(graphdef, params, tokens, temperature):
    """Log-softmax of all logits at once: [B, T] log-probabilities and entropies, unmasked from position 1 on."""
    logits = small_models.logits(graphdef, params, tokens, LENGTHS)[:, :-1] / temperature
    logs = jax.nn.log_softmax(logits, -1)
    chosen = jnp.take_along_axis(logs, jnp.asarray(tokens)[:, 1:, None], -1)[..., 0]
    return jnp.pad(chosen, ((0, 0), (1, 0))), jnp.pad(-(jnp.exp(logs) * logs).sum(-1), ((0, 0), (1, 0)))


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (5, 0.7), (12, 1.0), (128, 0.7)])
def test_values_and_gradients_equal_the_plain_ones(model, chunk, temperature):
    _, graphdef, params, tokens = model
    valid = (np.arange(13) < LENGTHS[:, None]) & (np.arange(13) > 0)
    weights = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32) * valid

    def chunked(params):
        found = token_logprobs(params, None, tokens, LENGTHS, temperature, graphdef=graphdef, chunk=chunk)
        return (found[0] * weights).sum(), found

    (_, (found, entropy)), gradient = jax.jit(jax.value_and_grad(chunked, has_aux=True))(params)
    expected, expected_entropy = plain(graphdef, params, tokens, temperature)
    np.testing.assert_allclose(found, np.where(valid, expected, 0), atol=1e-5)
    np.testing.assert_allclose(entropy, np.where(valid, expected_entropy, 0), atol=1e-5)
    wanted = jax.jit(jax.grad(lambda p: (plain(graphdef, p, tokens, temperature)[0] * weights).sum()))(params)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradients_in_adapters_equal_the_plain_ones(model):
    """Two adapters in one batch, a row that wears the first, one the second and one neither."""
    config, graphdef, params, tokens = model
    mesh, draw = make_mesh(devices=jax.devices()[:1]), np.random.default_rng(2)
    lora = adapters.concat([adapters.init(config, rank, 4, ("query", "down"), rank, mesh) for rank in (2, 3)])
    lora = lora.replace(b={name: jnp.asarray(0.1 * draw.normal(size=b.shape), b.dtype) for name, b in lora.b.items()})
    lengths, adapter = np.array([13, 7, 9], np.int32), jnp.array([1, -1, 0])
    weights = draw.normal(size=tokens.shape) * (np.arange(13) < lengths[:, None]) * (np.arange(13) > 0)

    def chunked(worn):
        worn = lora.replace(a=worn[0], b=worn[1])
        found = token_logprobs(params, worn, tokens, lengths, 0.7, graphdef=graphdef, adapter=adapter, chunk=5)
        return (found[0] * weights).sum()

    def at_once(worn):
        decoder = nnx.merge(graphdef, params)
        hidden = decoder.hidden(tokens, lengths, lora=lora.replace(a=worn[0], b=worn[1]), adapter=adapter)
        logs = jax.nn.log_softmax(decoder.head(hidden)[:, :-1] / 0.7, -1)
        return (jnp.take_along_axis(logs, tokens[:, 1:, None], -1)[..., 0] * weights[:, 1:]).sum()

    found = jax.jit(jax.value_and_grad(chunked))((lora.a, lora.b))
    chex.assert_trees_all_close(found, jax.jit(jax.value_and_grad(at_once))((lora.a, lora.b)), atol=1e-5)
    for slope in jax.tree.leaves(found[1]):
        assert np.any(slope)


def test_entropy_carries_no_gradient(model):
    _, graphdef, params, tokens = model
    gradient = jax.grad(lambda p: token_logprobs(p, None, tokens, LENGTHS, 1.0, graphdef=graphdef)[1].sum())(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_bfloat16_parameters_give_float32_numbers():
    config, graphdef, params = small_models.load(small_models.FIXTURES / "qwen3", "bfloat16")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, 13)).astype(np.int32)
    found, entropy = token_logprobs(params, None, tokens, LENGTHS, 1.0, graphdef=graphdef)
    assert found.dtype == entropy.dtype == jnp.float32
    logits = np.asarray(small_models.logits(graphdef, params, tokens, LENGTHS), np.float64)[:, :-1]
    whole = np.log(np.exp(logits).sum(-1))
    expected = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0] - whole
    np.testing.assert_allclose(found[0, 1:], expected[0], atol=1e-5)  # not the 1e-2 of a softmax in bfloat16


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_agrees_with_the_sampler(model, temperature):
    config, graphdef, params, _ = model
    engine = Engine(config, params, (), make_mesh(devices=jax.devices()[:1]))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    drawn = engine.generate(prompts, Sampling(temperature, max_new_tokens=8), [(0, 0, row, 0, 1) for row in range(2)])
    tokens, lengths = np.zeros((2, 13), np.int32), np.array([11, 13], np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, drawn, strict=True)):
        tokens[row, : lengths[row]] = [*prompt, *answer.tokens]
    found, _ = token_logprobs(params, None, tokens, lengths, temperature, graphdef=graphdef)
    for row, (prompt, answer) in enumerate(zip(prompts, drawn, strict=True)):
        np.testing.assert_allclose(found[row, len(prompt) : lengths[row]], answer.logprobs, atol=1e-5)


def test_all_logits_never_exist_at_once(model):
    """Neither forward nor backward has an array of [B, T, V] elements: the largest that touches V is a chunk's."""
    config, graphdef, params, _ = model
    rows, length, chunk = 2, 512, 4
    tokens = np.zeros((rows, length + 1), np.int32)

    def loss(params):
        found = token_logprobs(params, None, tokens, np.full(rows, length + 1), 1.0, graphdef=graphdef, chunk=chunk)
        return found[0].sum()

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (out.aval.shape for out in equation.outvars)
            for value in equation.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    if hasattr(inner, "jaxpr"):
                        inner = inner.jaxpr
                    if hasattr(inner, "eqns"):
                        yield from shapes(inner)

    def sizes(loss):
        found = shapes(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr)
        return [np.prod(shape) for shape in found if config.vocab_size in shape]

    def at_once(params):
        return small_models.logits(graphdef, params, tokens[:, :-1], np.full(rows, length)).sum()

    whole = rows * length * config.vocab_size
    assert max(sizes(at_once)) >= whole  # the search sees them where they are made
    found = sizes(loss)
    assert rows * chunk * config.vocab_size in found
    assert max(found) < whole / 4
