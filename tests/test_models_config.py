"""Configurations in and out of `config.json`, every refusal, and the rotary embedding's own laws."""

import dataclasses
import json

import chex
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from hypothesis import given

from atp_jax.errors import UserError
from atp_jax.models.config import ARCHITECTURES, DecoderConfig
from atp_jax.models.rope import Rope, frequencies, rotate

PLAIN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}

number = st.floats(1.0, 100.0)
ropes = st.one_of(
    st.builds(Rope, theta=st.floats(2.0, 1e7)),
    st.builds(Rope, theta=st.floats(2.0, 1e7), type=st.just("linear"), factor=number),
    st.builds(
        Rope,
        theta=st.floats(2.0, 1e7),
        type=st.just("llama3"),
        factor=number,
        original=st.integers(1, 2**17),
        low_freq_factor=st.floats(0.1, 2.0),
        high_freq_factor=st.floats(2.5, 9.0),
    ),
    st.builds(
        Rope,
        theta=st.floats(2.0, 1e7),
        type=st.just("yarn"),
        factor=number,
        original=st.integers(1, 2**17),
        beta_fast=number,
        beta_slow=number,
        truncate=st.booleans(),
        attention_factor=number,
    ),
)


@st.composite
def configs(draw):
    architecture = draw(st.sampled_from(sorted(ARCHITECTURES)))
    kv_heads = draw(st.integers(1, 8))
    return DecoderConfig(
        architecture=architecture,
        vocab_size=draw(st.integers(1, 2**18)),
        hidden_size=draw(st.integers(1, 2**13)),
        intermediate_size=draw(st.integers(1, 2**15)),
        num_layers=draw(st.integers(1, 99)),
        num_heads=kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 128)),
        max_position_embeddings=draw(st.integers(1, 2**20)),
        rope=draw(ropes),
        rms_norm_eps=draw(st.floats(1e-9, 1e-3)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=architecture == "Qwen2ForCausalLM" or draw(st.booleans()),
        mlp_bias=architecture == "LlamaForCausalLM" and draw(st.booleans()),
        initializer_range=draw(st.floats(1e-3, 0.5)),
        bos_token_id=draw(st.none() | st.integers(0, 63)),
        eos_token_id=tuple(draw(st.lists(st.integers(0, 63), max_size=3))),
        pad_token_id=draw(st.none() | st.integers(0, 63)),
    )


@given(configs())
def test_a_configuration_survives_its_file(config):
    """Through JSON, in both spellings of the rope and in either one alone."""
    both = json.loads(json.dumps(config.to_dict()))
    new = {key: value for key, value in both.items() if key not in ("rope_theta", "rope_scaling")}
    old = {key: value for key, value in both.items() if key != "rope_parameters"}
    for content in (both, new, old):
        assert DecoderConfig.from_dict(content, "config.json") == config
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_what_we_write(architecture):
    rope = Rope.from_dict({"rope_scaling": LLAMA3, "rope_theta": 5e5}, "here")
    config = DecoderConfig(architecture, 64, 32, 40, 2, 4, 2, 16, 2**17, rope, 1e-5, True, True)
    kind = ARCHITECTURES[architecture]
    theirs = transformers.AutoConfig.for_model(**config.to_dict())
    assert theirs.model_type == kind and theirs.rope_parameters == LLAMA3 | {"rope_theta": 5e5}
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "tie_word_embeddings", "rms_norm_eps", "vocab_size"):
        assert getattr(theirs, key) == config.to_dict()[key]
    again = DecoderConfig.from_dict(json.loads(theirs.to_json_string()), "theirs")
    assert again == config


def test_where_theta_may_stand():
    """The top level, either object, and both: then inside wins, as in transformers. Nowhere is an error, not 10000."""
    read = lambda **rope: Rope.from_dict(rope, "c").theta  # noqa: E731
    assert read(rope_theta=5e5) == 5e5
    assert read(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}) == 1e6
    assert read(rope_theta=5e5, rope_scaling={"rope_theta": 1e6, "rope_type": "default"}) == 1e6
    assert read(rope_theta=5e5, rope_scaling=None, rope_parameters=None) == 5e5
    with pytest.raises(UserError, match="rope_theta"):
        read(rope_scaling={"type": "linear", "factor": 2.0})


def test_what_a_file_may_leave_out():
    """Missing keys mean what they mean to transformers: head size, key heads, biases, Qwen3's own head size."""
    config = DecoderConfig.from_dict({k: v for k, v in PLAIN.items() if k != "num_key_value_heads"}, "c")
    assert (config.head_dim, config.num_kv_heads, config.attention_bias, config.qk_norm) == (8, 4, False, False)
    qwen = {**PLAIN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert DecoderConfig.from_dict(qwen, "c").head_dim == 128 and DecoderConfig.from_dict(qwen, "c").qk_norm
    older = {**PLAIN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    older = DecoderConfig.from_dict(older, "c")
    assert older.attention_bias and not older.output_bias
    unnamed = {k: v for k, v in PLAIN.items() if k != "architectures"}
    assert DecoderConfig.from_dict(unnamed, "c").architecture == "LlamaForCausalLM"
    assert DecoderConfig.from_dict({**PLAIN, "eos_token_id": [1, 2]}, "c").eos_token_id == (1, 2)


SLIDING = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM.*Qwen2ForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({"architectures": None, "model_type": None}, "unknown architecture"),
        ({"model_type": "mistral"}, "contradict"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size.*many"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "num_attention_heads 3.*num_key_value_heads 2"),
        ({"head_dim": 7}, "head_dim.*7"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_key_value_heads": None}, "num_key_value"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        (SLIDING | {"sliding_window": 8, "max_window_layers": 1}, "sliding"),
        (SLIDING | {"max_window_layers": 1}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "unknown rope type 'dynamic'.*yarn"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "unknown rope type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "factor"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 0.5}}, "high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "flat"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(change, said):
    with pytest.raises(UserError, match=f"^models/x/config.json: .*{said}") as raised:
        DecoderConfig.from_dict(PLAIN | change, "models/x/config.json")
    assert "\n" not in str(raised.value)


def test_a_window_that_no_layer_uses_is_no_obstacle():
    """Qwen2.5's published files: a window is given, but no layer is far enough up to slide."""
    for content in (SLIDING | {"max_window_layers": 2}, SLIDING | {"use_sliding_window": False}):
        assert DecoderConfig.from_dict(PLAIN | content, "c").num_layers == 2


def test_llama3_frequencies_follow_the_published_rule():
    """Dimension by dimension, as Llama 3.1's own description has it, for its real numbers."""
    rope = Rope.from_dict({"rope_scaling": LLAMA3, "rope_theta": 5e5}, "c")
    expected = []
    for i in range(64):
        frequency = 5e5 ** (-2 * i / 128)
        wavelength = 2 * np.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 8.0
        elif wavelength > 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8.0 + smooth * frequency
        expected.append(frequency)
    chex.assert_trees_all_close(frequencies(rope, 128), np.float32(expected), rtol=1e-6)


def test_yarn_keeps_fast_dimensions_and_slows_the_slow_ones():
    """Qwen2.5's numbers: 4 times the context; dimensions that turn often are kept, the slowest divided by 4."""
    rope = Rope.from_dict({"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0},
                           "max_position_embeddings": 32768}, "c")  # fmt: skip
    ratio = frequencies(rope, 128) / frequencies(Rope(1e6), 128)
    turns = 32768 * frequencies(Rope(1e6), 128) / (2 * np.pi)
    assert np.all(np.diff(ratio) <= 1e-6)
    chex.assert_trees_all_close(ratio[turns > 40], np.ones_like(ratio[turns > 40]), rtol=1e-6)
    chex.assert_trees_all_close(ratio[turns < 0.8], np.full_like(ratio[turns < 0.8], 0.25), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1.0)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_a_score_depends_on_the_distance_alone(first, second, shift):
    """<R(p) q, R(s) k> = <R(p + n) q, R(s + n) k>, lengths are kept, and position 0 is the identity."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    rope = Rope(100.0)

    def at(x, position):
        return rotate(x, jnp.array([[position]]), rope)

    here = jnp.vdot(at(query, first), at(key, second))
    there = jnp.vdot(at(query, first + shift), at(key, second + shift))
    chex.assert_trees_all_close(here, there, atol=2e-4)
    chex.assert_trees_all_close(jnp.linalg.norm(at(query, first)), jnp.linalg.norm(query), rtol=1e-5)
    chex.assert_trees_all_close(at(key, 0), key, rtol=1e-6)
