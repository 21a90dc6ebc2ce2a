"""The losses and their gradients against TRL's own code, run on tensors with its models replaced by stubs.

TRL computes its losses inside methods of trainers. They are called here unbound, on a namespace that holds the settings
they read; only the log-probabilities are ours. Not comparable so: the advantages, which TRL computes between sampling
and logging; cDPO in DPOTrainer, whose "sigmoid" takes no smoothing any more (CPOTrainer does); ORPO's likelihood term,
which counts the prompt too.
"""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atp_jax.align import losses

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
trl = pytest.importorskip("trl", reason="needs the extra `torch`")
pytestmark = pytest.mark.torch

B, T, PROMPT = 6, 9, 3
# What TRL asks of accelerate, for one process.
ALONE = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def answers(rng, rows):
    """Float64 log-probabilities [rows, T] and the mask of answers of 1 to T tokens."""
    mask = (np.arange(T) < rng.integers(1, T + 1, rows)[:, None]).astype(float)
    return -rng.exponential(1.0, (rows, T)), mask


def ours(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


# ---------------------------------------------------------------- GRPO


def trl_grpo(logprobs, old, reference, gains, mask, weights, **settings):
    """(loss, its gradient, metrics) of GRPOTrainer for one micro-batch that is the whole batch."""
    leaf = torch.tensor(logprobs, requires_grad=True)
    metrics = defaultdict(list)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros(B, T), None),
        _metrics={"train": metrics},
        _entropy_bonus_enabled=False,
        accelerator=ALONE,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        **settings,
    )
    inputs = {
        "prompt_ids": torch.zeros(B, PROMPT, dtype=torch.long),
        "prompt_mask": torch.ones(B, PROMPT, dtype=torch.long),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": torch.tensor(mask),
        "advantages": torch.tensor(gains),
        "old_per_token_logps": None if old is None else torch.tensor(old),
        "ref_per_token_logps": torch.tensor(reference),
        "num_items_in_batch": torch.tensor(mask.sum()),
        "importance_sampling_ratio": None if weights is None else torch.tensor(weights),
    }
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), leaf.grad.numpy(), {name: value[0] for name, value in metrics.items()}


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize("cap", [None, 1.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo"])
def test_grpo_equals_trl(aggregation, level, cap, first):
    """Loss, gradient, KL and shares of clipped tokens; clipping and the cap both at work."""
    rng = np.random.default_rng(0)
    logprobs, mask = answers(rng, B)
    old, reference, sampler = logprobs + 0.4 * rng.normal(size=(3, B, T))
    old = logprobs if first else old
    gains = np.array([1.5, -0.5, 0.0, 2.0, -1.0, -0.3])
    weights = None if cap is None else np.minimum(np.exp(old - sampler), cap)
    expected, slope, metrics = trl_grpo(
        logprobs, None if first else old, reference, gains, mask, weights, importance_sampling_level=level, beta=0.04,
        loss_type=aggregation, epsilon_low=0.2, epsilon_high=0.25, max_completion_length=20,
    )  # fmt: skip
    x, old, reference, sampler, gains, mask = ours(logprobs, old, reference, sampler, gains, mask)

    def total(x):
        before = jax.lax.stop_gradient(x) if first else old
        loss, _, low, high = losses.policy_loss(
            x, before, gains, mask, clip_low=0.2, clip_high=0.25, level=level, sampler=sampler, cap=cap
        )
        kl = losses.k3(x, reference)
        per_token = loss + 0.04 * kl
        return (per_token * losses.token_weights(mask, aggregation, 20)).sum(), (kl, low, high)

    (found, (kl, low, high)), gradient = jax.value_and_grad(total, has_aux=True)(x)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)
    np.testing.assert_allclose((kl * mask).sum() / mask.sum(), metrics["kl"], rtol=1e-5)
    assert np.any(slope)
    # TRL counts answers at the level of sequences, and tokens otherwise.
    counted = mask / mask.sum() if level == "token" else mask / mask.sum(1, keepdims=True) / B
    np.testing.assert_allclose((low * counted).sum(), metrics["clip_ratio/low_mean"], atol=1e-6)
    np.testing.assert_allclose((high * counted).sum(), metrics["clip_ratio/high_mean"], atol=1e-6)
    if not first and level == "token":
        assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0


def test_k3_equals_trl():
    """With advantages of zero, TRL's loss is its KL alone, token by token in the gradient."""
    rng = np.random.default_rng(1)
    logprobs, mask = answers(rng, B)
    reference = logprobs + 2 * rng.normal(size=(B, T))
    expected, slope, _ = trl_grpo(
        logprobs, None, reference, np.zeros(B), mask, None, importance_sampling_level="token", beta=1.0,
        loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2, max_completion_length=20,
    )  # fmt: skip
    x, reference, mask = ours(logprobs, reference, mask)
    found, gradient = jax.value_and_grad(lambda x: (losses.k3(x, reference) * mask).sum() / mask.sum())(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- preferences


def trl_dpo(logprobs, mask, reference, kind, beta, smoothing):
    """(loss, its gradient, metrics) of DPOTrainer; rows are the chosen answers, then the rejected ones."""
    leaf = torch.tensor(logprobs, requires_grad=True)
    of_answers = torch.tensor(mask)
    outputs = SimpleNamespace(
        log_probs=leaf * of_answers,  # the trainer's model is given labels and returns 0 outside them
        entropy=torch.zeros(B, T),
        mean_logits=torch.zeros(B, T),
        is_top1=torch.zeros(B, T, dtype=torch.bool),
    )
    metrics = defaultdict(list)
    trainer = SimpleNamespace(
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=ALONE,
        aux_loss_enabled=False,
        beta=beta,
        f_divergence_type="reverse_kl",
        label_smoothing=smoothing,
        ld_alpha=None,
        loss_types=[kind],
        loss_weights=[1.0],
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        use_weighting=False,
    )
    completion = torch.nn.functional.pad(of_answers, (1, 0))  # one token of prompt
    inputs = {
        "input_ids": torch.zeros(B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, T + 1),
        "completion_mask": completion,
        "ref_chosen_logps": torch.tensor(reference[: B // 2]),
        "ref_rejected_logps": torch.tensor(reference[B // 2 :]),
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.backward()
    return loss.item(), leaf.grad.numpy(), {name: value[0] for name, value in metrics.items() if name != "num_tokens"}


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize(
    ("kind", "smoothing"), [("sigmoid", 0.0), ("robust", 0.0), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_dpo_equals_trl(kind, smoothing, beta):
    """From per-token log-probabilities to the mean over pairs, with the logged rewards; answers of unequal lengths."""
    rng = np.random.default_rng(2)
    logprobs, mask = answers(rng, B)
    reference = (logprobs * mask).sum(1) + rng.normal(size=B)
    expected, slope, metrics = trl_dpo(logprobs, mask, reference, kind, beta, smoothing)
    x, mask, reference = ours(logprobs, mask, reference)
    lengths = mask.sum(1)
    assert np.any(lengths[: B // 2] != lengths[B // 2 :])

    def halves(array):
        return array[: B // 2], array[B // 2 :]

    def total(x):
        arguments = *halves((x * mask).sum(1)), *halves(reference)
        pairs = losses.preference_loss(*arguments, *halves(lengths), kind=kind, beta=beta, smoothing=smoothing)
        return pairs.mean(), losses.preference_rewards(*arguments, beta=beta)

    (found, (chosen, rejected)), gradient = jax.value_and_grad(total, has_aux=True)(x)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(gradient, slope, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(chosen.mean(), metrics["rewards/chosen"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(rejected.mean(), metrics["rewards/rejected"], rtol=1e-4, atol=1e-6)
    assert float((chosen > rejected).mean()) == pytest.approx(metrics["rewards/accuracies"])


def compare(kind, settings, theirs, means):
    """Values and gradients of pairs, ours without a reference against `theirs`, on sums or `means` of 2 x B answers."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 12, (2, B)).astype(float)
    sums = -rng.exponential(1.0, (2, B)) * lengths - 0.01
    leaf = torch.tensor(sums, requires_grad=True)
    expected = theirs(*(leaf / torch.tensor(lengths) if means else leaf))
    expected.sum().backward()
    x, counts = ours(sums, lengths)

    def pairs(x):
        return losses.preference_loss(*x, *jnp.zeros((2, B)), *counts, kind=kind, **settings)

    np.testing.assert_allclose(pairs(x), expected.detach(), rtol=2e-5)
    np.testing.assert_allclose(jax.grad(lambda x: pairs(x).sum())(x), leaf.grad, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("simpo", {"beta": 2.0, "gamma": 0.5}),
        ("simpo", {"beta": 0.1, "gamma": 1.6}),
        ("sigmoid", {"beta": 0.1, "smoothing": 0.2}),
    ],
)
def test_simpo_and_smoothed_sigmoid_equal_trl(kind, settings):
    """CPOTrainer: SimPO on means; its sigmoid, on sums, is cDPO with a reference of zero."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    trainer = SimpleNamespace(
        accelerator=ALONE, alpha=0.0, beta=settings["beta"], label_smoothing=settings.get("smoothing", 0.0),
        loss_type=kind, simpo_gamma=settings.get("gamma"),
    )  # fmt: skip
    compare(kind, settings, lambda *x: cpo.CPOTrainer.cpo_loss(trainer, *x)[0], means=kind == "simpo")


def test_orpo_equals_trl():
    """ORPOTrainer's odds ratio, less the chosen answer's mean log-probability."""
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = SimpleNamespace(accelerator=ALONE, beta=0.25)

    def theirs(chosen, rejected):
        return -chosen - orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]

    compare("orpo", {"beta": 0.25}, theirs, means=True)
