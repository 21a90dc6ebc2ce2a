"""Log-probabilities of answers under a model, for training; the logits of all positions never lie in memory at once."""

import jax
import jax.numpy as jnp
from flax import nnx

CHUNK = 128  # positions whose logits exist at a time: [B, CHUNK, V]


def answer_logprobs(
    params, lora, prompts, prompt_lengths, answers, lengths, temperature,
    *, graphdef, adapter=None, remat: bool = True, chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Log-probability of each answer's tokens given its prompt, and the entropy of the distribution each stands for.

    prompts int32 [B, P], answers int32 [B, G, C], prompt_lengths int32 [B], lengths int32 [B, G], lora, adapter as in
    Decoder.before_answers; temperature a scalar that divides the logits. -> float32 [B, G, C] both (entropy in nats), 0
    beyond an answer's length. Logits and their softmax are float32 whatever the parameters are. Differentiable in
    params and lora; the logits of `chunk` positions at a time are made, and made again for the gradient. Entropy
    carries no gradient.
    """
    decoder = nnx.merge(graphdef, params)
    hidden = decoder.before_answers(
        prompts, prompt_lengths, answers, lengths, remat=remat, lora=lora, adapter=adapter
    )  # fmt: skip
    rows, count = len(answers), answers.shape[1] * answers.shape[2]
    chunk, head = min(chunk, count), decoder.heads(rows)
    padding = -count % chunk

    def by_chunk(x):
        x = x.reshape(rows, count, *x.shape[3:])
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(rows, -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    def score(_, part):
        hidden, targets = part
        logits = head(hidden) / temperature
        whole = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - whole
        fixed = jax.lax.stop_gradient(logits - whole[..., None])
        return None, (chosen, -(jnp.exp(fixed) * fixed).sum(-1))

    step = jax.checkpoint(score, prevent_cse=False)
    _, (chosen, entropy) = jax.lax.scan(step, None, (by_chunk(hidden), by_chunk(answers)))
    valid = jnp.arange(answers.shape[2]) < lengths[..., None]

    def by_answer(x):
        return jnp.where(valid, x.swapaxes(0, 1).reshape(rows, -1)[:, :count].reshape(answers.shape), 0)

    return by_answer(chosen), by_answer(entropy)
