"""Group-relative policy optimisation: of several answers to the same prompt, what paid more than its group's mean is
made more likely (semantics: TRL's, mended where its numbers depend on the micro-batch).

What a step learns from is drawn by a function that is given the current weights: alignment draws with the rewards of
the rule, evolution in the weights with those that the environment pays.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atp_jax.align.logprobs import answer_logprobs
from atp_jax.align.losses import advantages, k3, policy_loss, token_weights
from atp_jax.align.rows import INPUTS, rows_of
from atp_jax.align.trainable import join
from atp_jax.model import Model
from atp_jax.models.decoder import abstract
from atp_jax.parallel import fetch, row_shards
from atp_jax.policies.types import Answer
from atp_jax.settings import GrpoSettings


@dataclasses.dataclass(frozen=True)
class Draw:
    """Answers to learn from: `rewards` is [P, G, R], P prompts, G members of each group, R rounds an episode, and
    `answers` has one entry for each in that order; `measured` is what there is to log of them."""

    answers: Sequence[Answer]
    rewards: np.ndarray
    measured: dict


class Grpo:
    """The method of align/loop.py that learns from groups of answers."""

    def __init__(
        self,
        name: str,
        draw: Callable[[int, object, object], Draw],
        given: Model,
        settings: GrpoSettings,
        longest: int,
        rows: int | None,
    ):
        """draw: (number of the draw from 0, params, lora) -> Draw. longest: tokens an answer can have, what `dr_grpo`
        divides by. rows: of a micro-batch; so many answers at most, over the devices, share a copy of their prompt
        (None: a whole group)."""
        self.name, self.steps, self.iterations = name, settings.steps, settings.iterations
        # Members of a group have one prompt in common; from the second round on each has a history of its own.
        members = settings.group if settings.rounds == 1 else 1
        most = max(1, rows // row_shards(given.mesh)) if rows else members
        self.group = max(size for size in range(1, members + 1) if members % size == 0 and size <= most)
        self.optimiser = {
            "learning_rate": settings.learning_rate, "schedule": settings.schedule, "warmup": settings.warmup,
        }  # fmt: skip
        self._draw, self._settings, self._longest = draw, settings, longest
        self._graphdef, _ = abstract(given.config, mesh=given.mesh)
        self._score = jax.jit(lambda params, lora, *inputs: self._logprobs(params, lora, inputs)[0])
        self._drawn = None

    def batch(self, step: int, params, lora) -> tuple[dict[str, np.ndarray], dict]:
        """Rows of the step's draw; with `iterations` n, every n steps learn from the same."""
        if step % self.iterations == 0:
            self._drawn = self._learnable(self._draw(step // self.iterations, params, lora), params, lora)
        return self._drawn

    def loss(self, trainable, fixed, micro):
        """Sum of token weight x (policy loss + kl x k3), and sums over the answers' tokens of what is logged."""
        s = self._settings
        frozen, reference = fixed
        params, lora = join(trainable, frozen)
        inputs = [micro[name] for name in INPUTS]
        logprobs, entropy = self._logprobs(params, lora, inputs)
        mask = _by_answer(micro["mask"])
        # With one update a draw the old policy is the one that is trained: the ratio is 1, its gradient is not 0.
        old = _by_answer(micro["old"]) if self.iterations > 1 else jax.lax.stop_gradient(logprobs)
        per_token, ratio, low, high = policy_loss(
            logprobs, old, micro["advantages"].reshape(-1), mask, clip_low=s.clip_low, clip_high=s.clip_high,
            level=s.level, sampler=_by_answer(micro["sampler"]), cap=s.cap,
        )  # fmt: skip
        sums = {"entropy": entropy, "ratio": ratio, "clip_ratio/low": low, "clip_ratio/high": high}
        if s.kl:
            reference_logprobs, _ = jax.lax.stop_gradient(self._logprobs(*reference, inputs))
            divergence = k3(logprobs, reference_logprobs)
            per_token = per_token + s.kl * divergence
            sums["kl"] = divergence
        sums = {name: (value * mask).sum() for name, value in sums.items()} | {"tokens": mask.sum()}
        value = (per_token * _by_answer(micro["weights"])).sum()
        return value, (sums, {"logprobs": logprobs.reshape(micro["mask"].shape)})

    def measures(self, batch: dict, sums: dict, outputs: dict) -> dict:
        """Means a token, and how far the trainer's log-probabilities are from the sampler's."""
        tokens = max(sums.pop("tokens"), 1.0)
        over_tokens = ("entropy", "ratio", "clip_ratio/low", "clip_ratio/high", "kl")
        found = {name: value / tokens if name in over_tokens else value for name, value in sums.items()}
        counted = batch["mask"] > 0
        apart = np.abs(outputs["logprobs"] - batch["sampler"])[counted]
        if apart.size:
            found |= {
                "sampler_difference/mean": float(apart.mean()), "sampler_difference/max": float(apart.max()),
                "sampler_difference/p99": float(np.quantile(apart, 0.99)),
            }  # fmt: skip
        return found

    def _logprobs(self, params, lora, inputs):
        """Log-probabilities and entropies, an answer a row: float32 [N G, C] both."""
        found = answer_logprobs(params, lora, *inputs, self._settings.temperature, graphdef=self._graphdef)
        return tuple(_by_answer(x) for x in found)

    def _learnable(self, drawn: Draw, params, lora) -> tuple[dict[str, np.ndarray], dict]:
        s = self._settings
        prompts, group, rounds = drawn.rewards.shape
        # What each answer is compared by, within its group: the whole episode's return, or its own round's reward.
        credited = drawn.rewards.sum(2, keepdims=True) if s.credit == "trajectory" else drawn.rewards
        by_group = credited.transpose(0, 2, 1).reshape(-1)
        gains = np.asarray(advantages(jnp.asarray(by_group, jnp.float32), group, scale=s.scale))
        gains = np.broadcast_to(gains.reshape(prompts, -1, group).transpose(0, 2, 1), drawn.rewards.shape)
        spread = drawn.rewards.sum(2).std(1)
        kept = np.zeros(prompts, bool)
        kept[np.argsort(-spread, kind="stable")[: max(1, round(s.keep * prompts))]] = True

        rows = rows_of([(answer.prompt, answer.tokens, answer.sampled) for answer in drawn.answers], self.group)
        answers = rows["lengths"].shape
        mask = rows["sampled"] * np.repeat(kept, group * rounds).reshape(answers)[..., None].astype(np.float32)
        rows["mask"] = mask
        rows["advantages"] = gains.reshape(answers).astype(np.float32)
        rows["weights"] = np.asarray(token_weights(_by_answer(mask), s.aggregation, self._longest)).reshape(mask.shape)
        rows["sampler"] = np.zeros(mask.shape, np.float32)
        for place, answer in zip(np.ndindex(answers), drawn.answers, strict=True):
            rows["sampler"][place][: len(answer.tokens)] = answer.logprobs
        if self.iterations > 1:
            rows["old"] = fetch(self._score(params, lora, *(rows[name] for name in INPUTS))).reshape(mask.shape)
        lengths = np.array([answer.length for answer in drawn.answers])
        cut = np.array([answer.finish == "length" for answer in drawn.answers])
        returns = drawn.rewards.sum(2)
        logged = {
            "reward": float(returns.mean()), "reward_std": float(returns.std(1, ddof=1).mean()),
            "frac_reward_zero_std": float((returns.max(1) == returns.min(1)).mean()), "groups_kept": int(kept.sum()),
            "completions/mean_length": float(lengths.mean()), "completions/min_length": int(lengths.min()),
            "completions/max_length": int(lengths.max()), "completions/clipped_ratio": float(cut.mean()),
        }  # fmt: skip
        return rows, logged | drawn.measured


def _by_answer(x):
    """[N, G, C] -> [N G, C]"""
    return x.reshape(-1, x.shape[-1])
