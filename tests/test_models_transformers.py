"""Live comparison with transformers' torch models: every variant of rope, head and head size, in and out again."""

import chex
import numpy as np
import pytest
import small_models
from fixtures.make_fixtures import LLAMA3, MODELS, YARN, build, ragged, store, torch_logits

from atp_jax.models import huggingface

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

LENGTHS, WIDTH = (1, 37, 100), 104
LONG = {"max_position_embeddings": 128, "vocab_size": 96, "num_hidden_layers": 2}
# Wide heads, so that a ramp over their dimensions has an inside; the original context ends far before the rows.
WIDE = {"hidden_size": 48, "head_dim": 32}
VARIANTS = {
    "qwen2.5": ("Qwen2", {"num_key_value_heads": 1}, {}),
    "qwen2.5 yarn bf16": ("Qwen2", {"rope_parameters": YARN | {"rope_theta": 1e4}, **WIDE}, {"dtype": "bfloat16"}),
    "qwen3 tied sharded": (
        "Qwen3",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, **WIDE},
        {"max_shard_size": "60KB", "dtype": "bfloat16"},
    ),
    "qwen3 biases, yarn with every key": (
        "Qwen3",
        {
            "attention_bias": True,
            "rope_parameters": YARN
            | {"rope_theta": 1e4, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "mscale": 0.7}
            | {"mscale_all_dim": 0.4},
            **WIDE,
        },
        {},
    ),
    "llama 3.1 tied f16": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, {"dtype": "float16"}),
    "llama 3.1 as published": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, **WIDE}, {"old": True}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_and_what_is_saved_is_the_same_model(variant, tmp_path):
    """Right beyond the original context; saved again (sharded, too) it is read as the same model, to the last bit."""
    architecture, changes, how = VARIANTS[variant]
    store(build(architecture, LONG | changes, seed=3), tmp_path / "in", **how)
    tokens = ragged(LONG["vocab_size"], LENGTHS, WIDTH)
    expected = torch_logits(tmp_path / "in", tokens, LENGTHS)
    config, graphdef, params = small_models.load(tmp_path / "in")
    logits = small_models.logits(graphdef, params, tokens, np.int32(LENGTHS))
    chex.assert_trees_all_close(small_models.real(logits, LENGTHS), expected, atol=1e-4, rtol=0)

    huggingface.save(tmp_path / "out", config, params, max_shard_bytes=80_000)
    weights, saved = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / end, dtype=torch.float32).state_dict()
        for end in ("in", "out")
    )
    assert weights.keys() == saved.keys() and all(torch.equal(weights[name], saved[name]) for name in weights)
    # torch's sums depend on where in memory a file puts a weight: equal but for the last bits
    chex.assert_trees_all_close(torch_logits(tmp_path / "out", tokens, LENGTHS), expected, atol=5e-6, rtol=0)
    again, _, loaded = small_models.load(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(loaded, params)


def test_what_is_saved_in_bfloat16_is_read_as_bfloat16(tmp_path):
    config, _, params = small_models.load(small_models.FIXTURES / "qwen3", "bfloat16")
    huggingface.save(tmp_path, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16 and model.config.eos_token_id == 1 and model.config.bos_token_id == 0
    original = transformers.AutoModelForCausalLM.from_pretrained(small_models.FIXTURES / "qwen3", dtype=torch.bfloat16)
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("name", MODELS)
def test_the_stored_fixtures_are_what_transformers_computes_today(name):
    tokens, lengths, expected = small_models.expected(name)
    logits = torch_logits(small_models.FIXTURES / name, tokens, lengths)
    chex.assert_trees_all_close(logits, expected, atol=1e-5, rtol=0)
