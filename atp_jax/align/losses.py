"""The losses, as pure functions of log-probabilities and masks.

Shapes: B rows, T positions, P pairs; a mask is float32 [B, T], 1 where a token of the answer counts. Nothing here
divides by what a batch happens to hold: `token_weights` makes one weight a token from the mask of the whole batch, and
the loss is the weighted sum, so that micro-batches, padding, order and devices cannot change it.
"""

import jax
import jax.numpy as jnp

WIDEST = 20.0  # log-ratios beyond this are clamped before they are exponentiated


def advantages(rewards: jax.Array, group: int, scale: str = "group", eps: float = 1e-4) -> jax.Array:
    """Rewards less the mean of their group: float32 [N] -> [N], groups of `group` consecutive members (GRPO).

    scale: "group" divides by the group's deviation (n - 1 in its denominator) + eps, "batch" by that of all rewards,
    "none" by nothing (Dr. GRPO). A group of equal rewards gives exact zeros.
    """
    grouped = rewards.reshape(-1, group)
    centred = grouped - grouped.mean(1, keepdims=True)
    # The mean of equal numbers can differ from them by a rounding, which a small deviation would blow up.
    centred = jnp.where(grouped.max(1, keepdims=True) == grouped.min(1, keepdims=True), 0.0, centred)
    if scale == "group":
        centred = centred / (grouped.std(1, ddof=1, keepdims=True) + eps)
    elif scale == "batch":
        centred = centred / (rewards.std(ddof=1) + eps)
    elif scale != "none":
        raise ValueError(f"scale must be group, batch or none, not {scale!r}")
    return centred.reshape(-1)


def token_weights(mask: jax.Array, aggregation: str = "dapo", longest: int | None = None) -> jax.Array:
    """The weight of every token, so that a loss is sum(weights * per_token): mask [B, T] of the whole batch -> [B, T].

    "dapo": every token of the batch alike, 1 / tokens. "grpo": every answer alike, 1 / (its length x answers).
    "dr_grpo": 1 / (longest x answers), `longest` the most tokens an answer could have. Rows without a token are no
    answers.
    """
    lengths = mask.sum(1, keepdims=True)
    answers = jnp.maximum((lengths > 0).sum(), 1)
    if aggregation == "dapo":
        return mask / jnp.maximum(mask.sum(), 1)
    if aggregation == "grpo":
        return mask / jnp.maximum(lengths, 1) / answers
    if aggregation == "dr_grpo":
        return mask / (longest * answers)
    raise ValueError(f"aggregation must be dapo, grpo or dr_grpo, not {aggregation!r}")


def policy_loss(
    logprobs: jax.Array,
    old: jax.Array,
    gains: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    level: str = "token",
    sampler: jax.Array | None = None,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The clipped surrogate, a token at a time: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A).

    logprobs, old [B, T]: of the policy that is trained and of the one that answered. gains [B]: the advantages A.
    level: "token" has r = exp(logprobs - old); "sequence" the exponential of its mean over the answer (GSPO). cap:
    with `sampler`, the log-probabilities the answers were drawn with, each token is weighted by
    min(exp(old - sampler), cap) (truncated importance sampling). -> per token [B, T], 0 outside the mask: loss, r, and
    whether clipping from below or from above took the gradient away.
    """
    gains = gains[:, None]
    apart = jnp.where(mask > 0, logprobs - old, 0.0)
    if level == "sequence":
        apart = jnp.broadcast_to(apart.sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1), apart.shape)
    elif level != "token":
        raise ValueError(f"level must be token or sequence, not {level!r}")
    ratio = jnp.exp(jnp.clip(apart, -WIDEST, WIDEST))
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * gains, clipped * gains)
    if cap is not None:
        drift = jnp.where(mask > 0, jax.lax.stop_gradient(old) - sampler, 0.0)
        loss = loss * jnp.minimum(jnp.exp(jnp.clip(drift, -WIDEST, WIDEST)), cap)
    low, high = (ratio < 1 - clip_low) & (gains < 0), (ratio > 1 + clip_high) & (gains > 0)
    return tuple(jnp.where(mask > 0, value, 0.0) for value in (loss, ratio, low, high))


def k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference), a token: e^d - d - 1 with d = reference - logprobs [B, T].

    d is clamped to +-20 before the exponential, so value and gradient stay finite."""
    apart = jnp.clip(reference - logprobs, -WIDEST, WIDEST)
    return jnp.expm1(apart) - apart


def preference_loss(
    chosen: jax.Array,
    rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    chosen_length: jax.Array,
    rejected_length: jax.Array,
    *,
    kind: str,
    beta: float,
    smoothing: float = 0.0,
    gamma: float = 0.5,
) -> jax.Array:
    """The loss of each pair, [P], from sums of log-probabilities over the answers' tokens [P] and their lengths [P].

    With h = (chosen - rejected) - (reference_chosen - reference_rejected) and s = log sigmoid:
    "sigmoid" (DPO; cDPO with smoothing e): -(1 - e) s(beta h) - e s(-beta h)
    "robust": (-(1 - e) s(beta h) + e s(-beta h)) / (1 - 2e)
    "hinge": max(0, 1 - beta h)
    "ipo": (h - 1 / (2 beta))^2, log-probabilities as means over the answer
    "simpo": -s(beta (mean chosen - mean rejected) - gamma), no reference
    "orpo": -mean chosen - beta s(log odds chosen - log odds rejected), odds of the mean log-probabilities, no reference
    """
    if kind in ("ipo", "simpo", "orpo"):
        chosen, reference_chosen = chosen / chosen_length, reference_chosen / chosen_length
        rejected, reference_rejected = rejected / rejected_length, reference_rejected / rejected_length
    margin = (chosen - rejected) - (reference_chosen - reference_rejected)
    log_sigmoid = jax.nn.log_sigmoid
    if kind == "sigmoid":
        return -(1 - smoothing) * log_sigmoid(beta * margin) - smoothing * log_sigmoid(-beta * margin)
    if kind == "robust":
        right, wrong = log_sigmoid(beta * margin), log_sigmoid(-beta * margin)
        return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)
    if kind == "hinge":
        return jax.nn.relu(1 - beta * margin)
    if kind == "ipo":
        return jnp.square(margin - 1 / (2 * beta))
    if kind == "simpo":
        return -log_sigmoid(beta * (chosen - rejected) - gamma)
    if kind == "orpo":
        odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return -chosen - beta * log_sigmoid(odds)
    raise ValueError(f"unknown preference loss {kind!r}")


def preference_rewards(
    chosen: jax.Array, rejected: jax.Array, reference_chosen: jax.Array, reference_rejected: jax.Array, *, beta: float
) -> tuple[jax.Array, jax.Array]:
    """DPO's implicit rewards of both answers, beta x (log-probability - reference), [P] each, for the log."""
    return beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)


def sft_loss(logprobs: jax.Array, mask: jax.Array) -> jax.Array:
    """Negative log-likelihood of each token of the answers, [B, T]; weighted by `token_weights` it is supervised
    fine-tuning."""
    return jnp.where(mask > 0, -logprobs, 0.0)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x) for x < 0, exact at both ends; x is kept from 0, where it would be -inf."""
    x = jnp.minimum(x, -1e-6)
    near = x > -0.6931472
    close = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    far = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    return jnp.where(near, close, far)
