"""What a benchmark's work needs of a device at the least: bytes to read, multiplications and additions to compute.

`plan.cost` counts a program as it is, with padding, masked scores and what is computed again for the gradient. Here is
what no program can do without, so that the share of a device's rate says how much of it goes into the work. In the
products with weights: 2 a weight and token; another 2 for the gradient of activations; another 2 for that of weights,
where these are trained. In attention: 2 for a score and 2 for its value, for each head, its size and each position
seen; twice that again for the gradient, since both factors of each product have one. The adapter's own products, under
a hundredth, are left out; that an update needs of a prompt's last layer only keys and values is not looked at.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from atp_jax.errors import UserError
from atp_jax.model import Model
from atp_jax.models.config import DecoderConfig


def check_whole(answers: Sequence, new: int) -> None:
    """UserError where an answer has not `new` tokens: nothing stops one but the end of the model's context."""
    if short := [len(answer.tokens) for answer in answers if len(answer.tokens) != new]:
        raise UserError(f"--new={new}, but the model's context ends an answer after {short[0]} tokens: ask for fewer")


def must_read(model: Model, rows: int, length: int, new: int) -> int:
    """Bytes that decoding `new` tokens behind `length` has to read: the weights (of an untied embedding nothing) and
    the filled part of the cache, once a token."""
    config, width = model.config, jnp.dtype(model.dtype).itemsize
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return width * (new * weights + position * rows * sum(range(length, length + new)))


def prefill_flops(config: DecoderConfig, rows: int, length: int) -> int:
    """Of reading prompts of `length` tokens, without logits: of the last layer only keys and values are wanted of all
    tokens, the rest of the last one."""
    layers, others = config.num_layers, length - 1
    keys_and_values = 2 * config.num_kv_heads * config.head_dim * config.hidden_size
    whole = 2 * length * _layer_weights(config) + _attention(config, 0, length)
    spared = 2 * others * (_layer_weights(config) // layers - keys_and_values)
    return rows * (whole - spared - _attention(config, 0, others) // layers)


def update_flops(config: DecoderConfig, prompts: Sequence[int], group: int, new: int, *, whole: bool) -> int:
    """Of an update of GRPO: prompts of so many tokens, each with `group` answers of `new` tokens behind its one copy.
    The reference scores them too. whole: the weights are trained, else an adapter.

    An answer's tokens are predicted from the prompt's last token and its own but the last; logits are of these alone.
    """
    answers = len(prompts) * group * new
    tokens = sum(prompts) - len(prompts) + answers
    weights = 2 * (tokens * _layer_weights(config) + answers * config.vocab_size * config.hidden_size)
    attention = sum(
        _attention(config, 0, prompt - 1) + group * _attention(config, prompt - 1, prompt - 1 + new)
        for prompt in prompts
    )
    # Policy, reference and gradient.
    return (1 + 1 + (2 if whole else 1)) * weights + (1 + 1 + 2) * attention


def _layer_weights(config: DecoderConfig) -> int:
    """Weights of all layers that a token is multiplied with."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim * config.hidden_size
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def _attention(config: DecoderConfig, begin: int, end: int) -> int:
    """Of all layers, at positions begin to end - 1 of a row, each seeing itself and all before."""
    return 4 * config.num_layers * config.num_heads * config.head_dim * sum(range(begin + 1, end + 1))
