"""Log-probabilities in chunks: the numbers and gradients of the plain computation, without its memory."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx

from atp_jax.align.logprobs import answer_logprobs
from atp_jax.align.rows import INPUTS, rows_of
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.models import lora as adapters
from atp_jax.models.decoder import abstract
from atp_jax.parallel import make_mesh

GROUP = 3


@pytest.fixture(scope="module")
def model():
    """A model, and two prompts with three answers each: of all lengths, one of them empty, one prompt of one token."""
    config, graphdef, params = small_models.load(small_models.FIXTURES / "qwen3")
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, config.vocab_size, length).tolist() for length in (9, 1)]
    said = [draw.integers(0, config.vocab_size, length).tolist() for length in (5, 0, 16, 1, 7, 3)]
    return config, graphdef, params, [(prompts[i // GROUP], answer) for i, answer in enumerate(said)]


def inputs(answers, group=GROUP):
    rows = rows_of(answers, group)
    return [rows[name] for name in INPUTS]


def plain(graphdef, params, answers, temperature, **worn):
    """Each answer behind a copy of its prompt, log-softmax of all logits at once: [N, G, C] log-probabilities and
    entropies, 0 beyond an answer's length."""
    rows = rows_of(answers, GROUP)
    shape = rows["answers"].shape
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in answers], np.int32)
    tokens = np.zeros((len(answers), lengths.max()), np.int32)
    for row, (prompt, answer) in enumerate(answers):
        tokens[row, : lengths[row]] = [*prompt, *answer]
    decoder = nnx.merge(graphdef, params)
    logs = jax.nn.log_softmax(decoder.head(decoder.hidden(tokens, lengths, **worn)) / temperature, -1)
    entropies = -(jnp.exp(logs) * logs).sum(-1)
    found = [[], []]
    for row, (prompt, answer) in enumerate(answers):
        places = np.arange(len(answer)) + len(prompt) - 1
        values = (logs[row, places, np.array(answer, np.int32)], entropies[row, places])
        for out, value in zip(found, values, strict=True):
            out.append(jnp.pad(value, (0, shape[2] - len(answer))))
    return tuple(jnp.stack(out).reshape(shape) for out in found)


@pytest.mark.parametrize(("chunk", "temperature"), [(1, 1.0), (5, 0.7), (48, 1.0), (128, 0.7)])
def test_values_and_gradients_equal_those_of_whole_rows(model, chunk, temperature):
    _, graphdef, params, answers = model
    weights = np.random.default_rng(1).normal(size=(2, GROUP, 16)).astype(np.float32)

    def chunked(params):
        found = answer_logprobs(params, None, *inputs(answers), temperature, graphdef=graphdef, chunk=chunk)
        return (found[0] * weights).sum(), found

    def at_once(params):
        found = plain(graphdef, params, answers, temperature)
        return (found[0] * weights).sum(), found

    (_, found), gradient = jax.jit(jax.value_and_grad(chunked, has_aux=True))(params)
    (_, expected), wanted = jax.jit(jax.value_and_grad(at_once, has_aux=True))(params)
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    chex.assert_trees_all_close(gradient, wanted, atol=2e-5)
    assert not np.any(np.where(rows_of(answers, GROUP)["sampled"] > 0, 0, found[0]))


def test_gradients_in_adapters_equal_those_of_whole_rows(model):
    """Two adapters in one batch: one prompt's answers wear the second, the other's none."""
    config, graphdef, params, answers = model
    mesh, draw = make_mesh(devices=jax.devices()[:1]), np.random.default_rng(2)
    lora = adapters.concat([adapters.init(config, rank, 4, ("query", "down"), rank, mesh) for rank in (2, 3)])
    lora = lora.replace(b={name: jnp.asarray(0.1 * draw.normal(size=b.shape), b.dtype) for name, b in lora.b.items()})
    adapter = np.array([1, -1])
    weights = draw.normal(size=(2, GROUP, 16)).astype(np.float32)

    def chunked(worn):
        worn = lora.replace(a=worn[0], b=worn[1])
        found = answer_logprobs(params, worn, *inputs(answers), 0.7, graphdef=graphdef, adapter=adapter, chunk=5)
        return (found[0] * weights).sum()

    def at_once(worn):
        worn = lora.replace(a=worn[0], b=worn[1])
        return (plain(graphdef, params, answers, 0.7, lora=worn, adapter=adapter.repeat(GROUP))[0] * weights).sum()

    found = jax.jit(jax.value_and_grad(chunked))((lora.a, lora.b))
    chex.assert_trees_all_close(found, jax.jit(jax.value_and_grad(at_once))((lora.a, lora.b)), atol=1e-5)
    for slope in jax.tree.leaves(found[1]):
        assert np.any(slope)


def test_how_many_answers_share_a_prompt_changes_nothing(model):
    _, graphdef, params, answers = model
    together = answer_logprobs(params, None, *inputs(answers), 1.0, graphdef=graphdef)
    apart = answer_logprobs(params, None, *inputs(answers, 1), 1.0, graphdef=graphdef)
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, atol=1e-5)


def test_what_pads_prompts_and_answers_changes_nothing(model):
    _, graphdef, params, answers = model
    prompts, prompt_lengths, said, lengths = inputs(answers)
    found = answer_logprobs(params, None, prompts, prompt_lengths, said, lengths, 1.0, graphdef=graphdef)
    behind = np.arange(prompts.shape[1]) >= prompt_lengths[:, None]
    after = np.arange(said.shape[2]) >= lengths[..., None]
    other = np.pad(np.where(behind, 63, prompts), ((0, 0), (0, 32))), np.where(after, 62, said)
    again = answer_logprobs(params, None, other[0], prompt_lengths, other[1], lengths, 1.0, graphdef=graphdef)
    chex.assert_trees_all_close(found, again, atol=1e-5)


def test_entropy_carries_no_gradient(model):
    _, graphdef, params, answers = model
    gradient = jax.grad(lambda p: answer_logprobs(p, None, *inputs(answers), 1.0, graphdef=graphdef)[1].sum())(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_bfloat16_parameters_give_float32_numbers(model):
    """Their sum is that of a distribution to 1e-5, not to the 1e-2 of a softmax in bfloat16."""
    config, graphdef, params = small_models.load(small_models.FIXTURES / "qwen3", "bfloat16")
    every = [([3, 1, 4], [token]) for token in range(config.vocab_size)]
    found, entropy = answer_logprobs(params, None, *inputs(every, len(every)), 1.0, graphdef=graphdef)
    assert found.dtype == entropy.dtype == jnp.float32
    logs = np.asarray(found[0, :, 0], np.float64)
    assert np.exp(logs).sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(entropy[0, :, 0], -(np.exp(logs) * logs).sum(), atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_agrees_with_the_sampler(model, temperature):
    config, graphdef, params, _ = model
    engine = Engine(config, params, (), make_mesh(devices=jax.devices()[:1]))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    drawn = engine.generate(prompts, Sampling(temperature, max_new_tokens=8), [(0, 0, row, 0, 1) for row in range(2)])
    answers = [(prompt, answer.tokens) for prompt, answer in zip(prompts, drawn, strict=True)]
    found, _ = answer_logprobs(params, None, *inputs(answers, 1), temperature, graphdef=graphdef)
    for row, answer in enumerate(drawn):
        np.testing.assert_allclose(found[row, 0, : len(answer.tokens)], answer.logprobs, atol=1e-5)


def test_all_logits_never_exist_at_once(model):
    """Neither forward nor backward has an array of [B, G, C, V] elements: the largest that touches V is a chunk's."""
    config = dataclasses.replace(model[0], vocab_size=72)  # a size that nothing else has
    graphdef, params = abstract(config)
    rows, group, length, chunk = 2, 2, 256, 4
    given = rows_of([([1] * 70, [3] * length)] * rows * group, group)

    def loss(params):
        arguments = (given[name] for name in INPUTS)
        return answer_logprobs(params, None, *arguments, 1.0, graphdef=graphdef, chunk=chunk)[0].sum()

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
        tokens = given["answers"].reshape(rows * group, length)
        return small_models.logits(graphdef, params, tokens, np.full(rows * group, length)).sum()

    whole = rows * group * length * config.vocab_size
    assert max(sizes(at_once)) >= whole  # the search sees them where they are made
    found = sizes(loss)
    assert rows * chunk * config.vocab_size in found
    assert max(found) < whole / 4
