"""The losses against independent float64 NumPy, their gradients, and what must never leak through a mask."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atp_jax.align import losses

B, T, G = 8, 6, 4
seeds = st.integers(0, 2**31 - 1)


def drawn(seed, spread=0.3):
    """logprobs, old, reference [B, T], gains [B], mask [B, T] with every row's length from 0 to T; float64 NumPy."""
    rng = np.random.default_rng(seed)
    logprobs = -rng.exponential(1.0, (B, T))
    old, reference = logprobs + spread * rng.normal(size=(2, B, T))
    mask = (np.arange(T) < rng.integers(0, T + 1, B)[:, None]).astype(float)
    mask[0] = 1  # one token at least
    return logprobs, old, reference, rng.normal(size=B), mask


def f32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


# ---------------------------------------------------------------- advantages


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [  # worked examples of the original's normalisation
        ([1, 1, 1, 0.1], [0.4999, 0.4999, 0.4999, -1.4997]),
        ([1, 1, 0.1, 0.1], [0.8659, 0.8659, -0.8659, -0.8659]),
        ([1, 0.1, 0, 0], [1.4926, -0.3603, -0.5662, -0.5662]),
        ([0.1, 0.1, 0.1, 0], [0.499, 0.499, 0.499, -1.497]),
    ],
)
def test_advantages_of_the_worked_examples(rewards, expected):
    np.testing.assert_allclose(losses.advantages(jnp.array(rewards), 4), expected, atol=5e-4)


@given(seeds, st.sampled_from(["group", "batch", "none"]))
@settings(max_examples=25)
def test_advantages_equal_numpy(seed, scale):
    rewards = np.random.default_rng(seed).normal(size=B)
    rows = rewards.reshape(-1, G)
    expected = rows - rows.mean(1, keepdims=True)
    if scale == "group":
        expected = expected / (np.sqrt((expected**2).sum(1, keepdims=True) / (G - 1)) + 1e-4)
    if scale == "batch":
        expected = expected / (np.sqrt(((rewards - rewards.mean()) ** 2).sum() / (B - 1)) + 1e-4)
    found = losses.advantages(jnp.asarray(rewards, jnp.float32), G, scale)
    np.testing.assert_allclose(found, expected.reshape(-1), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e6])
def test_equal_rewards_have_exactly_no_advantage(reward):
    for group in (3, 4):
        assert not np.any(losses.advantages(jnp.full(12, reward, jnp.float32), group))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_equal_rewards_beside_another_has_exactly_no_advantage(scale):
    """0.1 four times has a mean in float32 that may differ from 0.1: other groups' deviation must not blow that up."""
    found = np.asarray(losses.advantages(jnp.array([0.1, 0.1, 0.1, 1.0, 0.0, 0.1]), 3, scale))
    assert not np.any(found[:3]) and np.all(found[3:])


# ---------------------------------------------------------------- weights


@given(seeds)
@settings(max_examples=25)
def test_token_weights_are_what_they_say(seed):
    *_, mask = drawn(seed)
    lengths, answers = mask.sum(1), (mask.sum(1) > 0).sum()
    dapo, grpo, dr = (np.asarray(losses.token_weights(*f32(mask), kind, 10)) for kind in ("dapo", "grpo", "dr_grpo"))
    np.testing.assert_allclose(dapo, mask / mask.sum(), rtol=1e-6)
    np.testing.assert_allclose(grpo.sum(1), (lengths > 0) / answers, rtol=1e-6)
    np.testing.assert_allclose(dr, mask / (10 * answers), rtol=1e-6)
    order = np.random.default_rng(seed).permutation(B)
    wider = np.pad(mask, ((0, 3), (0, 4)))
    for kind, weights in (("dapo", dapo), ("grpo", grpo), ("dr_grpo", dr)):
        np.testing.assert_array_equal(losses.token_weights(*f32(mask[order]), kind, 10), weights[order])
        np.testing.assert_allclose(losses.token_weights(*f32(wider), kind, 10)[:B, :T], weights, rtol=1e-6)


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 99), st.sampled_from(["dapo", "grpo", "dr_grpo"]))
@settings(max_examples=40)
def test_token_weights_in_any_shape(rows, width, seed, kind):
    """Masks with holes and rows without a token, up to no token at all: alike inside an answer, 0 outside, finite."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((rows, width)) < rng.choice([0.0, 0.5, 1.0], (rows, 1))).astype(float)
    weights = np.asarray(losses.token_weights(*f32(mask), kind, width))
    chex.assert_tree_all_finite(weights)
    assert not np.any(weights[mask == 0]) and np.all(weights[mask > 0] > 0)
    for row, kept in zip(weights, mask > 0, strict=True):
        assert len(set(row[kept])) <= 1
    if np.any(mask) and kind != "dr_grpo":
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


# ---------------------------------------------------------------- policy gradient


def policy_numpy(logprobs, old, gains, mask, low, high, level, sampler=None, cap=None):
    loss = np.zeros((B, T))
    for row in range(B):
        apart = (logprobs - old)[row] * mask[row]
        if level == "sequence":
            apart = np.full(T, apart.sum() / max(mask[row].sum(), 1))
        for t in range(T):
            if mask[row, t]:
                ratio = np.exp(apart[t])
                kept = min(max(ratio, 1 - low), 1 + high)
                loss[row, t] = -min(ratio * gains[row], kept * gains[row])
                if cap is not None:
                    loss[row, t] *= min(np.exp(old[row, t] - sampler[row, t]), cap)
    return loss


@given(seeds, st.sampled_from(["token", "sequence"]), st.booleans())
@settings(max_examples=40)
def test_policy_loss_equals_numpy(seed, level, capped):
    logprobs, old, sampler, gains, mask = drawn(seed)
    sampler, cap = (sampler, 1.1) if capped else (None, None)
    expected = policy_numpy(logprobs, old, gains, mask, 0.2, 0.3, level, sampler, cap)
    found, *_ = losses.policy_loss(
        *f32(logprobs, old, gains, mask), clip_low=0.2, clip_high=0.3, level=level,
        sampler=None if sampler is None else f32(sampler)[0], cap=cap,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


@given(seeds, st.sampled_from(["token", "sequence"]), st.booleans())
@settings(max_examples=20)
def test_policy_gradients_equal_finite_differences(seed, level, capped):
    """In float64, away from the first step: clipped on either side or not, one ratio an answer or one a token."""
    logprobs, old, sampler, gains, mask = drawn(seed)
    sampler, cap = (sampler, 1.1) if capped else (None, None)
    apart = (logprobs - old) * mask
    if level == "sequence":
        apart = apart.sum(1, keepdims=True) / np.maximum(mask.sum(1, keepdims=True), 1)
    assume(min(np.abs(np.exp(apart) - edge).min() for edge in (0.8, 1.3)) > 1e-4)  # at the kinks there is no gradient
    with jax.enable_x64(True):

        def total(x):
            return losses.policy_loss(
                x, old, gains, mask, clip_low=0.2, clip_high=0.3, level=level, sampler=sampler, cap=cap
            )[0].sum()

        found = np.asarray(jax.grad(total)(jnp.asarray(logprobs)))
    assert found.dtype == np.float64
    for place in np.ndindex(B, T):
        step = np.zeros((B, T))
        step[place] = 1e-6
        up, down = (
            policy_numpy(logprobs + sign * step, old, gains, mask, 0.2, 0.3, level, sampler, cap).sum()
            for sign in (1, -1)
        )
        np.testing.assert_allclose(found[place], (up - down) / 2e-6, atol=1e-7)


@pytest.mark.parametrize("apart", [1e4, -1e4])
@pytest.mark.parametrize("gain", [1.0, -1.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss_stays_finite_however_far_apart(apart, gain, level):
    """The policy from the old one, and the old one from the sampler."""

    def total(x, old, sampler):
        return losses.policy_loss(
            x, old, jnp.array([gain]), jnp.ones((1, 2)), clip_low=0.2, clip_high=0.2, level=level,
            sampler=sampler, cap=2.0,
        )[0].sum()  # fmt: skip

    near, far = jnp.zeros((1, 2)), jnp.full((1, 2), apart)
    for arguments in ((far, near, near), (near, near, far), (near, far, near)):
        chex.assert_tree_all_finite(jax.value_and_grad(total, (0, 1))(*arguments))


def test_the_cap_is_a_weight_without_a_gradient():
    """min(exp(old - sampler), cap): nothing flows through it, not even where old is not yet stopped."""
    ones, old, sampler = jnp.ones((1, 3)), jnp.log(jnp.array([[0.5, 1.5, 9.0]])), jnp.zeros((1, 3))

    def total(old):
        return losses.policy_loss(
            jax.lax.stop_gradient(old), jax.lax.stop_gradient(old) if stopped else old, jnp.array([1.0]), ones,
            clip_low=0.2, clip_high=0.2, sampler=sampler, cap=2.0,
        )[0].sum()  # fmt: skip

    stopped = True
    np.testing.assert_allclose(total(old), -(0.5 + 1.5 + 2.0), rtol=1e-6)
    assert not np.any(jax.grad(total)(old))
    stopped = False  # what is left is the ratio's own gradient in old, times the weight
    np.testing.assert_allclose(jax.grad(total)(old), [[0.5, 1.5, 2.0]], rtol=1e-6)


def test_the_first_ratio_is_exactly_one_and_its_gradient_is_not_zero():
    logprobs, _, _, gains, mask = f32(*drawn(3))

    def total(x):
        loss, ratio, low, high = losses.policy_loss(
            x, jax.lax.stop_gradient(x), gains, mask, clip_low=0.2, clip_high=0.2
        )
        return loss.sum(), (ratio, low, high)

    (_, (ratio, low, high)), gradient = jax.value_and_grad(total, has_aux=True)(logprobs)
    np.testing.assert_array_equal(ratio[mask > 0], 1.0)
    assert not np.any(low) and not np.any(high)
    np.testing.assert_allclose(gradient, -gains[:, None] * mask, rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "gain", "counted", "slope"),
    [(1.5, 1.0, (0, 1), 0.0), (1.5, -1.0, (0, 0), 1.5), (0.5, -1.0, (1, 0), 0.0), (0.5, 1.0, (0, 0), -0.5)],
)
def test_clipping_stops_only_what_goes_too_far(ratio, gain, counted, slope):
    """A token that is already more likely than allowed is not pushed further, but may come back; and the reverse."""
    logprobs, ones = jnp.full((1, 1), np.log(ratio), jnp.float32), jnp.ones((1, 1))

    def loss(x):
        return losses.policy_loss(x, jnp.zeros((1, 1)), jnp.array([gain]), ones, clip_low=0.2, clip_high=0.2)

    _, _, low, high = loss(logprobs)
    assert (int(low[0, 0]), int(high[0, 0])) == counted
    np.testing.assert_allclose(jax.grad(lambda x: loss(x)[0].sum())(logprobs)[0, 0], slope, rtol=1e-6)


@given(seeds)
@settings(max_examples=25)
def test_the_steps_gradient_is_the_closed_form(seed):
    """-(1 / tokens) sum [A + beta (e^d - 1)] grad log p, d = reference - log p: ratio 1, mean over tokens."""
    logprobs, _, reference, gains, mask = drawn(seed)
    beta, args = 0.04, f32(*drawn(seed))

    def loss(x):
        per_token, *_ = losses.policy_loss(x, jax.lax.stop_gradient(x), args[3], args[4], clip_low=0.2, clip_high=0.2)
        weights = losses.token_weights(args[4], "dapo")
        return ((per_token + beta * losses.k3(x, args[2])) * weights).sum()

    expected = -(gains[:, None] + beta * np.expm1(reference - logprobs)) * mask / mask.sum()
    np.testing.assert_allclose(jax.grad(loss)(args[0]), expected, atol=1e-5)


@pytest.mark.parametrize("apart", [1e4, -1e4, 50.0, -50.0])
def test_k3_stays_finite_however_far_apart(apart):
    value, gradient = jax.value_and_grad(lambda x: losses.k3(x, jnp.float32(0.0)))(jnp.float32(apart))
    chex.assert_tree_all_finite((value, gradient))
    assert value > 0


@given(seeds)
@settings(max_examples=25)
def test_k3_equals_numpy_and_is_never_negative(seed):
    logprobs, _, reference, *_ = drawn(seed)
    found = losses.k3(*f32(logprobs, reference))
    apart = reference - logprobs
    np.testing.assert_allclose(found, np.exp(apart) - apart - 1, rtol=1e-3, atol=1e-6)
    assert (np.asarray(found) >= 0).all()


@given(seeds)
@settings(max_examples=10)
def test_k3_gradients_equal_the_closed_form(seed):
    logprobs, _, reference, *_ = drawn(seed, spread=3.0)
    x, fixed = f32(logprobs, reference)
    found = jax.grad(lambda x: losses.k3(x, fixed).sum())(x)
    np.testing.assert_allclose(found, -np.expm1(reference - logprobs), rtol=1e-4, atol=1e-5)


def test_rubbish_in_the_padding_reaches_neither_losses_nor_gradients():
    """Infinities and NaN where the mask is 0."""
    logprobs, old, sampler, gains, mask = drawn(9)
    assert np.any(mask == 0)

    def total(x, old, sampler, level):
        per_token, *_ = losses.policy_loss(
            x, old, *f32(gains, mask), clip_low=0.2, clip_high=0.2, level=level, sampler=sampler, cap=2.0
        )
        return (per_token + losses.sft_loss(x, *f32(mask))).sum()

    clean = f32(logprobs, old, sampler)
    for level in ("token", "sequence"):
        expected = jax.value_and_grad(total)(*clean, level)
        for rubbish in (np.nan, -np.inf):
            dirty = (jnp.where(mask > 0, array, rubbish) for array in clean)
            chex.assert_trees_all_equal(jax.value_and_grad(total)(*dirty, level), expected)


def test_what_the_mask_leaves_out_has_exactly_no_gradient():
    logprobs, old, reference, gains, mask = f32(*drawn(5))

    def loss(x, old, level):
        per_token, *_ = losses.policy_loss(
            x, old, gains, mask, clip_low=0.2, clip_high=0.2, level=level, sampler=reference, cap=2.0
        )
        return (per_token + losses.sft_loss(x, mask)).sum() + (losses.k3(x, reference) * mask).sum()

    for level in ("token", "sequence"):
        for around in (old, jax.lax.stop_gradient(logprobs) + 1e4 * (1 - mask)):  # whatever stands in the padding
            gradient = jax.grad(loss)(logprobs, around, level)
            assert not np.any(np.asarray(gradient)[np.asarray(mask) == 0])
            chex.assert_tree_all_finite(gradient)


# ---------------------------------------------------------------- preferences


def preference_numpy(c, r, rc, rr, nc, nr, kind, beta, e, gamma):
    def s(x):
        return -np.logaddexp(0.0, -x)

    h = (c - r) - (rc - rr)
    mc, mr = c / nc, r / nr
    if kind == "sigmoid":
        return -(1 - e) * s(beta * h) - e * s(-beta * h)
    if kind == "robust":
        return (-(1 - e) * s(beta * h) + e * s(-beta * h)) / (1 - 2 * e)
    if kind == "hinge":
        return np.maximum(0, 1 - beta * h)
    if kind == "ipo":
        return ((mc - mr) - (rc / nc - rr / nr) - 1 / (2 * beta)) ** 2
    if kind == "simpo":
        return -s(beta * (mc - mr) - gamma)
    odds = np.log(np.exp(mc) / (1 - np.exp(mc))) - np.log(np.exp(mr) / (1 - np.exp(mr)))
    return -mc - beta * s(odds)


KINDS = ("sigmoid", "robust", "hinge", "ipo", "simpo", "orpo")


@given(seeds, st.sampled_from(KINDS), st.floats(0.05, 2.0), st.floats(0.0, 0.4))
@settings(max_examples=60)
def test_preference_losses_and_gradients_equal_numpy(seed, kind, beta, e):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, (2, B)).astype(float)
    sums = -rng.exponential(1.0, (4, B)) * np.tile(lengths, (2, 1)) - 0.01
    arguments = (*sums, *lengths)
    expected = preference_numpy(*arguments, kind, beta, e, 0.5)

    def loss(chosen, rejected):
        return losses.preference_loss(
            chosen, rejected, *f32(*arguments[2:]), kind=kind, beta=beta, smoothing=e, gamma=0.5
        )

    np.testing.assert_allclose(loss(*f32(*sums[:2])), expected, rtol=2e-4, atol=2e-5)
    if kind == "hinge" and np.any(np.abs(1 - beta * ((sums[0] - sums[1]) - (sums[2] - sums[3]))) < 1e-2):
        return  # at the kink there is no gradient to compare
    found = jax.grad(lambda *x: loss(*x).sum(), (0, 1))(*f32(*sums[:2]))
    for place in (0, 1):
        step = np.zeros((4, 1))
        step[place] = 1e-5
        up, down = (preference_numpy(*(sums + sign * step), *lengths, kind, beta, e, 0.5) for sign in (1, -1))
        np.testing.assert_allclose(found[place], (up - down) / 2e-5, rtol=5e-3, atol=1e-3)


def test_the_first_dpo_loss_is_ln_2():
    chosen, rejected = jnp.array([-12.5, -3.25]), jnp.array([-20.0, -1.0])
    loss = losses.preference_loss(chosen, rejected, chosen, rejected, 1.0, 1.0, kind="sigmoid", beta=0.1)
    np.testing.assert_allclose(loss, np.log(2), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_certain_answers_give_finite_losses_and_gradients(kind):
    """An answer of probability 1 or of none that float32 could hold."""
    values = jnp.array([-1e-9, 0.0, -1e4])

    def total(chosen, rejected):
        return losses.preference_loss(chosen, rejected, values, values, 3.0, 3.0, kind=kind, beta=0.1).sum()

    chex.assert_tree_all_finite(jax.value_and_grad(total, (0, 1))(values, values[::-1]))


def test_orpo_near_certainty_equals_float64():
    """Where 1 - e^m is a small difference of large numbers, and where e^m vanishes."""
    chosen, rejected = np.array([-1e-4, -1e-3, -0.69, -0.70, -30.0]), np.array([-2.0, -1e-4, -0.70, -0.69, -1e-3])
    odds = (chosen - rejected) - (np.log(-np.expm1(chosen)) - np.log(-np.expm1(rejected)))
    zeros, ones = jnp.zeros(5), jnp.ones(5)

    def loss(chosen, rejected):
        return losses.preference_loss(chosen, rejected, zeros, zeros, ones, ones, kind="orpo", beta=0.5)

    np.testing.assert_allclose(loss(*f32(chosen, rejected)), -chosen + 0.5 * np.logaddexp(0, -odds), rtol=1e-5)
    found = jax.grad(lambda *x: loss(*x).sum(), (0, 1))(*f32(chosen, rejected))
    slope = -0.5 / (1 + np.exp(odds))  # of -beta log sigmoid; the odds' own is 1 / (1 - e^m)
    np.testing.assert_allclose(found[0], -1 + slope / -np.expm1(chosen), rtol=1e-4)
    np.testing.assert_allclose(found[1], -slope / -np.expm1(rejected), rtol=1e-4)


def test_rewards_for_the_log():
    found = losses.preference_rewards(*jnp.array([[-1.0], [-2.0], [-3.0], [-1.0]]), beta=0.5)
    np.testing.assert_allclose(found, [[1.0], [-0.5]])


def test_sft_is_the_negative_log_likelihood_of_the_answers():
    logprobs, *_, mask = f32(*drawn(7))
    np.testing.assert_array_equal(losses.sft_loss(logprobs, mask), np.where(mask > 0, -logprobs, 0))


def test_unknown_kinds_are_refused():
    logprobs, old, _, gains, mask = f32(*drawn(0))
    with pytest.raises(ValueError, match="scale"):
        losses.advantages(gains, 4, "rank")
    with pytest.raises(ValueError, match="aggregation"):
        losses.token_weights(mask, "mean")
    with pytest.raises(ValueError, match="level"):
        losses.policy_loss(logprobs, old, gains, mask, clip_low=0.2, clip_high=0.2, level="word")
    with pytest.raises(ValueError, match="kto"):
        losses.preference_loss(*[gains] * 6, kind="kto", beta=0.1)
