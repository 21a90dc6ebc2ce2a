"""Log-probabilities of tokens under a model, for training, without the logits of all positions ever lying in memory."""

import jax
import jax.numpy as jnp
from flax import nnx

CHUNK = 128  # positions whose logits exist at a time: [B, CHUNK, V]


def token_logprobs(
    params, lora, tokens, lengths, temperature, *, graphdef, adapter=None, remat: bool = True, chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token given what stands before it, and the entropy of the distribution it stands for.

    tokens int32 [B, T] padded on the right, lengths int32 [B], temperature a scalar that divides the logits; lora,
    adapter as in Decoder.hidden. -> float32 [B, T] both (entropy in nats), 0 at the first position and beyond a row's
    length. Logits and their softmax are float32 whatever the parameters are. Differentiable in params and lora; the
    logits of `chunk` positions at a time are made, and made again for the gradient. Entropy carries no gradient.
    """
    decoder = nnx.merge(graphdef, params)
    hidden = decoder.hidden(tokens, lengths, remat=remat, lora=lora, adapter=adapter)[:, :-1]
    targets, count = tokens[:, 1:], tokens.shape[1] - 1
    chunk = min(chunk, count)
    padding = -count % chunk

    def by_chunk(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(len(x), -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def score(_, part):
        hidden, targets = part
        logits = decoder.head(hidden) / temperature
        whole = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - whole
        fixed = jax.lax.stop_gradient(logits - whole[..., None])
        return None, (chosen, -(jnp.exp(fixed) * fixed).sum(-1))

    step = jax.checkpoint(score, prevent_cse=False)
    _, (chosen, entropy) = jax.lax.scan(step, None, (by_chunk(hidden), by_chunk(targets)))
    valid = jnp.arange(1, tokens.shape[1]) < lengths[:, None]

    def by_row(x):
        x = x.swapaxes(0, 1).reshape(len(tokens), -1)[:, :count]
        return jnp.pad(jnp.where(valid, x, 0), ((0, 0), (1, 0)))

    return by_row(chosen), by_row(entropy)
