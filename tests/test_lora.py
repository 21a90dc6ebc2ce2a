"""Adapters: what they add is what NumPy says, each row wears its own, and other models' adapters are refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_models
from flax import nnx
from small_engines import ONE, assert_same, streams, text

from atp_jax.errors import UserError
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.models import lora as adapters
from atp_jax.models import peft
from atp_jax.models.lora import TARGETS

LENGTHS = np.array([9, 4], np.int32)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request):
    """(config, graphdef, params, tokens) with grouped heads; Qwen2.5 has biases, Qwen3 normed queries and keys."""
    config, graphdef, params = small_models.load(small_models.FIXTURES / request.param, mesh=ONE)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9)).astype(np.int32)
    return config, graphdef, params, tokens


def drawn(config, seed, rank=3, alpha=6.0, targets=tuple(TARGETS), mesh=ONE):
    """An adapter that has learned something: B is random too."""
    lora = adapters.init(config, rank, alpha, targets, seed, mesh)
    rng = np.random.default_rng(seed)
    b = {name: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32) for name, x in lora.b.items()}
    return adapters.place(lora.replace(b=b), mesh)


@jax.jit(static_argnums=0)
def logits(graphdef, params, tokens, lora, adapter=None):
    decoder = nnx.merge(graphdef, params)
    return decoder.head(decoder.hidden(tokens, LENGTHS, lora=lora, adapter=adapter))


def real(array):
    return small_models.real(array, LENGTHS)


def test_a_fresh_adapter_adds_nothing_and_is_drawn_as_peft_draws_it(model):
    config, graphdef, params, tokens = model
    fresh = adapters.init(config, 4, 8.0, tuple(TARGETS), 0, ONE)
    np.testing.assert_array_equal(logits(graphdef, params, tokens, fresh), logits(graphdef, params, tokens, None))
    np.testing.assert_array_equal(fresh.gain, np.full(4, 2.0))
    for name, a in fresh.a.items():
        bound = 1 / np.sqrt(np.prod(adapters.sizes(config, name)[0]))
        assert np.abs(a).max() <= bound and np.std(a) == pytest.approx(bound / np.sqrt(3), rel=0.15)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_adds_gain_times_a_times_b(model, target):
    """The logits are those of weights W + gain A B, multiplied out in float64 by NumPy."""
    config, graphdef, params, tokens = model
    lora = drawn(config, 1, targets=(target,))
    flat = dict(nnx.to_flat_state(params))
    weight = flat["layers", target]
    a, b = np.asarray(lora.a[target], np.float64), np.asarray(lora.b[target], np.float64)
    added = np.stack([2.0 * x.reshape(-1, 3) @ y.reshape(3, -1) for x, y in zip(a, b, strict=True)])
    summed = np.asarray(weight[...], np.float64) + added.reshape(weight.shape)
    flat["layers", target] = weight.replace(jnp.asarray(summed, jnp.float32))
    expected = logits(graphdef, nnx.from_flat_state(flat), tokens, None)
    found = logits(graphdef, params, tokens, lora)
    np.testing.assert_allclose(real(found), real(expected), atol=2e-5)
    assert np.abs(real(found) - real(logits(graphdef, params, tokens, None))).max() > 1e-2


def test_merged_weights_give_the_same_logits(model):
    config, graphdef, params, tokens = model
    lora = drawn(config, 2)
    merged = logits(graphdef, adapters.merge(params, lora), tokens, None)
    np.testing.assert_allclose(real(merged), real(logits(graphdef, params, tokens, lora)), atol=5e-5)


def test_each_row_wears_its_own_adapter(model):
    config, graphdef, params, tokens = model
    one, two = drawn(config, 3), drawn(config, 4, rank=2, alpha=2.0)
    both = adapters.concat([one, two])
    for rows, alone in (((0, 1), (one, two)), ((1, -1), (two, None)), ((-1, 0), (None, one))):
        found = logits(graphdef, params, tokens, both, jnp.array(rows, jnp.int32))
        for row, lora in enumerate(alone):
            expected = logits(graphdef, params, tokens, lora)[row]
            np.testing.assert_allclose(found[row, : LENGTHS[row]], expected[: LENGTHS[row]], atol=1e-5)


def test_a_batch_of_mixed_adapters_answers_as_each_alone(model):
    config, _, params, _ = model
    one, two = drawn(config, 3), drawn(config, 4)
    prompts, how = text(0, 7, 9, 5), Sampling(max_new_tokens=6)
    mixed = Engine(config, params, (), ONE, adapters.concat([one, two]))
    found = mixed.generate(prompts, how, streams(0, 1, 2), adapter=[1, -1, 0])
    for row, lora in enumerate((two, None, one)):
        alone = Engine(config, params, (), ONE, lora).generate([prompts[row]], how, streams(row))
        assert_same(found[row : row + 1], alone)
    # The next round, with the same prompts but adapters changed: nothing of the wrong adapter's cache is used.
    longer = [prompt + [3, 4] for prompt in prompts]
    found = mixed.generate(longer, how, streams(0, 1, 2, round=2), adapter=[0, -1, 1])
    for row, lora in enumerate((one, None, two)):
        alone = Engine(config, params, (), ONE, lora).generate([longer[row]], how, streams(row, round=2))
        assert_same(found[row : row + 1], alone)
    with pytest.raises(UserError, match="adapter 2: there are 2"):
        mixed.generate(prompts, how, streams(0, 1, 2), adapter=[0, 1, 2])


def test_other_adapters_and_indices_compile_nothing(model):
    config, _, params, _ = model
    prompts, how = text(1, 7, 9), Sampling(max_new_tokens=3)
    engine = Engine(config, params, (), ONE, adapters.concat([drawn(config, 3), drawn(config, 4)]))
    engine.generate(prompts, how, streams(0, 1), adapter=[0, 1])
    other = adapters.concat([drawn(config, 5), drawn(config, 6)])
    with small_models.compilations() as seen:
        engine.generate(prompts, how, streams(0, 1), adapter=[-1, 0])
        engine.load(params, other)
        engine.generate(prompts, how, streams(0, 1), adapter=[1, 1])
    assert not seen


def test_gradients_reach_the_adapter_and_equal_finite_differences(model):
    config, graphdef, params, tokens = model
    lora = drawn(config, 7)
    weights = np.random.default_rng(1).normal(size=(2, 9, config.hidden_size)).astype(np.float32)

    @jax.jit
    def loss(a, b):
        worn = lora.replace(a=a, b=b)
        hidden = nnx.merge(graphdef, params).hidden(tokens, LENGTHS, remat=True, lora=worn)
        return (hidden * weights).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))(lora.a, lora.b)
    rng = np.random.default_rng(2)
    for place, target in ((0, "query"), (1, "down")):
        direction = rng.normal(size=(lora.a, lora.b)[place][target].shape).astype(np.float32)
        direction /= np.linalg.norm(direction)

        def along(size, place=place, target=target, direction=direction):
            parts = [dict(lora.a), dict(lora.b)]
            parts[place][target] = parts[place][target] + size * direction
            return float(loss(*parts))

        slope = (along(1e-2) - along(-1e-2)) / 2e-2
        assert slope == pytest.approx(float((gradient[place][target] * direction).sum()), rel=2e-2, abs=2e-2)


def test_peft_directories_survive_the_round_trip(model, tmp_path):
    config, *_ = model
    lora = drawn(config, 8, targets=("query", "output", "down"))
    peft.save(tmp_path / "a", config, lora, "some/base")
    again = peft.load(tmp_path / "a", config, ONE)
    jax.tree.map(np.testing.assert_array_equal, again, lora)
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["down_proj", "o_proj", "q_proj"] and said["r"] == 3 and said["lora_alpha"] == 6
    assert said["base_model_name_or_path"] == "some/base" and said["peft_type"] == "LORA"


def test_rank_stabilised_adapters_have_their_own_gain(model, tmp_path):
    config, *_ = model
    peft.save(tmp_path, config, drawn(config, 8, rank=4, alpha=8.0), "base")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    np.testing.assert_allclose(peft.load(tmp_path, config, ONE).gain, 4.0)


def test_what_cannot_be_worn_is_refused(model, tmp_path):
    config, *_ = model
    good = tmp_path / "good"
    peft.save(good, config, drawn(config, 9), "base")
    said, tensors = json.loads((good / "adapter_config.json").read_text()), safetensors.numpy.load_file(
        good / "adapter_model.safetensors")

    def refused(name, match, changes=None, change_tensors=None, model_config=config):
        place = tmp_path / name
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps(said | (changes or {})))
        safetensors.numpy.save_file(change_tensors or tensors, place / "adapter_model.safetensors")
        with pytest.raises(UserError, match=match) as caught:
            peft.load(place, model_config, ONE)
        assert "\n" not in str(caught.value)

    for option, value in (("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]),
                          ("rank_pattern", {"q_proj": 2}), ("fan_in_fan_out", True)):  # fmt: skip
        refused(option, option, {option: value})
    refused("ia3", "is not LORA", {"peft_type": "IA3"})
    refused("r", "r='three'", {"r": "three"})
    refused("other", "for another model", model_config=dataclasses.replace(config, intermediate_size=41))
    first = next(iter(tensors))
    refused("missing", "is missing", change_tensors={k: v for k, v in tensors.items() if k != first})
    head = {"base_model.model.lm_head.lora_A.weight": np.zeros((3, 4), np.float32)}
    refused("head", "lm_head", change_tensors=tensors | head)
    refused("none", "no tensor of an adapter|belongs to nothing", change_tensors=head)

    (good / "adapter_model.safetensors").rename(good / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        peft.load(good, config, ONE)
    with pytest.raises(UserError, match="adapter_config.json"):
        peft.load(tmp_path, config, ONE)
    with pytest.raises(UserError, match="rank must be at least 1"):
        adapters.init(config, 0, 1.0, ("query",), 0, ONE)
    with pytest.raises(UserError, match="no target 'head'"):
        adapters.init(config, 1, 1.0, ("head",), 0, ONE)
    with pytest.raises(UserError, match="one by one"):
        peft.save(tmp_path / "two", config, adapters.concat([drawn(config, 1), drawn(config, 2)]), "base")
    with pytest.raises(UserError, match="different targets"):
        adapters.concat([drawn(config, 1), drawn(config, 2, targets=("query",))])
