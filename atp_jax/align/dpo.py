"""Direct preference optimisation: a pair of answers to the same prompt, one better than the other.

What a batch holds is two rows a pair, chosen then rejected, so that both are in the same micro-batch.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atp_jax.align.logprobs import token_logprobs
from atp_jax.align.losses import preference_loss, preference_rewards
from atp_jax.align.trainable import join
from atp_jax.generate.engine import bucket
from atp_jax.model import Model
from atp_jax.models.decoder import abstract
from atp_jax.settings import DpoSettings

SHORTEST = 64  # tokens a row, the smallest bucket
REFERENCED = ("sigmoid", "robust", "hinge", "ipo")  # the losses that compare with a reference
SCORED_ROWS = 16  # rows scored together by the reference


class Dpo:
    """The method of align/loop.py that learns from tokenised pairs (align/pairs.py:tokenise)."""

    name = "dpo"
    iterations = 1

    def __init__(self, pairs: Sequence, given: Model, settings: DpoSettings, seed: int):
        self._settings, self._seed, self._pairs = settings, seed, len(pairs)
        self._graphdef, _ = abstract(given.config)
        self._rows = layout(pairs)
        self.steps = settings.epochs * -(-len(pairs) // settings.batch)
        self.optimiser = {
            "learning_rate": settings.learning_rate, "schedule": settings.schedule, "warmup": settings.warmup,
        }  # fmt: skip
        # The reference never changes: it scores every pair once, before the first step.
        referenced = settings.loss in REFERENCED
        self._rows["reference"] = score(given, self._rows) if referenced else np.zeros(2 * len(pairs), np.float32)

    def batch(self, step: int, params, lora) -> tuple[dict[str, np.ndarray], dict]:
        """The pairs of a step: each epoch goes through all of them once, in an order of its own."""
        size = self._settings.batch
        a_epoch = -(-self._pairs // size)
        epoch, place = divmod(step, a_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(self._pairs)
        chosen = order[place * size : (place + 1) * size]
        rows = np.stack([2 * chosen, 2 * chosen + 1], 1).reshape(-1)
        batch = {name: values[rows] for name, values in self._rows.items()}
        batch["weight"] = np.full(len(rows), 1 / len(chosen), np.float32)  # the last step of an epoch may have fewer
        if short := 2 * size - len(rows):
            batch = {name: np.concatenate([v, np.zeros((short, *v.shape[1:]), v.dtype)]) for name, v in batch.items()}
        return batch, {"epoch": epoch + 1, "pairs": len(chosen)}

    def loss(self, trainable, fixed, micro):
        """Sum over pairs of weight x loss, and the weighted sums of what is logged."""
        s = self._settings
        params, lora = join(trainable, fixed[0])
        logprobs, _ = token_logprobs(params, lora, micro["tokens"], micro["lengths"], 1.0, graphdef=self._graphdef)
        sums = (logprobs * micro["mask"]).sum(1)
        lengths = micro["mask"].sum(1)
        (chosen, rejected), (ref_chosen, ref_rejected), (chosen_length, rejected_length) = (
            (x[0::2], x[1::2]) for x in (sums, micro["reference"], lengths)
        )
        weight = micro["weight"][0::2]
        losses = preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, jnp.maximum(chosen_length, 1), jnp.maximum(rejected_length, 1),
            kind=s.loss, beta=s.beta, smoothing=s.smoothing, gamma=s.gamma,
        )  # fmt: skip
        good, bad = preference_rewards(chosen, rejected, ref_chosen, ref_rejected, beta=s.beta)
        measured = {
            "rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": good - bad,
            "rewards/accuracies": (good > bad).astype(jnp.float32), "logps/chosen": chosen, "logps/rejected": rejected,
        }  # fmt: skip
        # A pair of weight 0 fills the micro-batch: whatever it gives, it must not count (0 x inf is no 0).
        value = jnp.where(weight > 0, losses * weight, 0).sum()
        return value, ({name: (x * weight).sum() for name, x in measured.items()}, {})

    def measures(self, batch: dict, sums: dict, outputs: dict) -> dict:
        return sums


def layout(pairs: Sequence) -> dict[str, np.ndarray]:
    """Tokenised pairs as two rows each: tokens int32 [2P, T], lengths int32 [2P], mask float32 [2P, T]."""
    answers = [(pair["prompt"], answer) for pair in pairs for answer in (pair["chosen"], pair["rejected"])]
    return rows_of(answers)


def rows_of(answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, np.ndarray]:
    """(prompt ids, answer ids) a row -> tokens int32 [N, T], lengths int32 [N], mask float32 [N, T], T a bucket."""
    width = bucket(max(len(prompt) + len(answer) for prompt, answer in answers), steps=2, smallest=SHORTEST)
    tokens, mask = np.zeros((len(answers), width), np.int32), np.zeros((len(answers), width), np.float32)
    lengths = np.zeros(len(answers), np.int32)
    for row, (prompt, answer) in enumerate(answers):
        lengths[row] = end = len(prompt) + len(answer)
        tokens[row, :end] = [*prompt, *answer]
        mask[row, len(prompt) : end] = 1
    return {"tokens": tokens, "lengths": lengths, "mask": mask}


def score(model: Model, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Log-probability of each row's answer under a model: float32 [N]."""
    graphdef, _ = abstract(model.config)

    @jax.jit
    def sums(params, lora, tokens, lengths, mask):
        logprobs, _ = token_logprobs(params, lora, tokens, lengths, 1.0, graphdef=graphdef)
        return (logprobs * mask).sum(1)

    count, done = len(rows["lengths"]), []
    for begin in range(0, count, SCORED_ROWS):
        part = {n: v[begin : begin + SCORED_ROWS] for n, v in rows.items() if n in ("tokens", "lengths", "mask")}
        short = SCORED_ROWS - len(part["lengths"])
        part = {n: np.pad(v, ((0, short),) + ((0, 0),) * (v.ndim - 1)) for n, v in part.items()}
        done.append(np.asarray(sums(model.params, model.lora, **part)))
    return np.concatenate(done)[:count]
