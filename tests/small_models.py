"""Small stored checkpoints (tests/fixtures) for whoever needs a model in a test, and one way to run them."""

import contextlib
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from atp_jax import parallel
from atp_jax.models import huggingface
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import Decoder, abstract

FIXTURES = Path(__file__).resolve().parent / "fixtures"
NAMES = ("qwen2", "qwen2_yarn", "qwen3", "llama31", "llama_linear")


def load(directory, dtype="float32", mesh=None):
    """(config, graphdef, params) of a model directory."""
    config = huggingface.load_config(directory)
    mesh = parallel.make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    return config, abstract(config, dtype)[0], huggingface.load_params(directory, config, dtype, mesh)


def drawn_qwen3(tokenizer, context: int):
    """(config, params) of a random Qwen3 of two layers for a tokenizer's vocabulary."""
    content = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": context, "rope_theta": 10000.0, "initializer_range": 0.3,
        "tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = DecoderConfig.from_dict(content, "test")
    return config, nnx.split(Decoder(config, rngs=nnx.Rngs(0)))[1]


@contextlib.contextmanager
def compilations():
    """Collects every tracing and compilation, of whatever function."""
    seen = []

    def listen(event, _, **about):
        if "/compile/" in event:
            seen.append((event, about))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@jax.jit(static_argnums=0)
def hidden(graphdef, params, tokens, lengths):
    """Hidden states [B, T, H] without a cache."""
    return nnx.merge(graphdef, params).hidden(tokens, lengths)


@jax.jit(static_argnums=0)
def logits(graphdef, params, tokens, lengths):
    """Logits [B, T, V] without a cache."""
    decoder = nnx.merge(graphdef, params)
    return decoder.head(decoder.hidden(tokens, lengths))


@jax.jit(static_argnums=(0, 5))
def extend(graphdef, params, tokens, start, cache, mesh=None, asked=None):
    """Hidden states [B, T, H] of what continues the cache (those asked for: [B, 1, H]), and the new cache."""
    return nnx.merge(graphdef, params).extend(tokens, start, cache, mesh=mesh, asked=asked)


@jax.jit(static_argnums=0)
def decode(graphdef, params, tokens, positions, cache):
    """Hidden states [B, H] of one more token a row, and the new cache."""
    return nnx.merge(graphdef, params).decode(tokens, positions, cache)


def real(array, lengths) -> np.ndarray:
    """The rows' real positions one after another: [B, T, ...] -> [sum of lengths, ...]."""
    return np.concatenate([np.asarray(row)[:length] for row, length in zip(array, lengths, strict=True)])


def expected(name: str):
    """tokens [3, T], lengths [3] and logits [sum of lengths, V] that transformers computed for a fixture."""
    with np.load(FIXTURES / name / "expected.npz") as stored:
        return stored["tokens"], stored["lengths"], stored["logits"]
