"""Direct preference optimisation: a pair of answers to the same prompt, one better than the other.

A row is a pair: its prompt once, and behind it chosen and rejected.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atp_jax.align.logprobs import answer_logprobs
from atp_jax.align.losses import preference_loss, preference_rewards
from atp_jax.align.rows import INPUTS, rows_of
from atp_jax.align.trainable import join
from atp_jax.model import Model
from atp_jax.models.decoder import abstract
from atp_jax.parallel import fetch
from atp_jax.settings import DpoSettings

REFERENCED = ("sigmoid", "robust", "hinge", "ipo")  # the losses that compare with a reference
SCORED = 16  # answers scored together


class Dpo:
    """The method of align/loop.py that learns from tokenised pairs (align/pairs.py:tokenise)."""

    name = "dpo"
    iterations = 1
    group = 2

    def __init__(self, pairs: Sequence, given: Model, settings: DpoSettings, seed: int):
        self._settings, self._seed, self._pairs = settings, seed, len(pairs)
        self._graphdef, _ = abstract(given.config, mesh=given.mesh)
        self._rows = layout(pairs)
        self.steps = settings.epochs * -(-len(pairs) // settings.batch)
        self.optimiser = {
            "learning_rate": settings.learning_rate, "schedule": settings.schedule, "warmup": settings.warmup,
        }  # fmt: skip
        # The reference never changes: it scores every pair once, before the first step.
        referenced = settings.loss in REFERENCED
        self._rows["reference"] = score(given, self._rows) if referenced else np.zeros((len(pairs), 2), np.float32)

    def batch(self, step: int, params, lora) -> tuple[dict[str, np.ndarray], dict]:
        """The pairs of a step: each epoch goes through all of them once, in an order of its own."""
        size = self._settings.batch
        a_epoch = -(-self._pairs // size)
        epoch, place = divmod(step, a_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(self._pairs)
        chosen = order[place * size : (place + 1) * size]
        batch = {name: values[chosen] for name, values in self._rows.items()}
        batch["weight"] = np.full(len(chosen), 1 / len(chosen), np.float32)  # the last step of an epoch may have fewer
        if short := size - len(chosen):
            batch = {name: np.concatenate([v, np.zeros((short, *v.shape[1:]), v.dtype)]) for name, v in batch.items()}
        return batch, {"epoch": epoch + 1, "pairs": len(chosen)}

    def loss(self, trainable, fixed, micro):
        """Sum over pairs of weight x loss, and the weighted sums of what is logged."""
        s = self._settings
        params, lora = join(trainable, fixed[0])
        logprobs, _ = answer_logprobs(params, lora, *(micro[name] for name in INPUTS), 1.0, graphdef=self._graphdef)
        sampled = micro["sampled"]
        (chosen, rejected), (ref_chosen, ref_rejected), (chosen_length, rejected_length) = (
            x.T for x in ((logprobs * sampled).sum(2), micro["reference"], sampled.sum(2))
        )
        weight = micro["weight"]
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
    """Tokenised pairs as rows (align/rows.py): answer 0 is the chosen one, answer 1 the rejected."""
    halves = [(pair, half) for pair in pairs for half in ("chosen", "rejected")]
    return rows_of([(pair["prompt"], pair[half], pair.get(f"{half}_sampled", ())) for pair, half in halves], 2)


def score(model: Model, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Log-probability of what was sampled of each answer of each row, under a model: float32 [N, G]."""
    graphdef, _ = abstract(model.config, mesh=model.mesh)

    @jax.jit
    def sums(params, lora, sampled, *inputs):
        return (answer_logprobs(params, lora, *inputs, 1.0, graphdef=graphdef)[0] * sampled).sum(2)

    count, done = len(rows["prompts"]), []
    size = max(1, SCORED // rows["answers"].shape[1])
    for begin in range(0, count, size):
        part = [rows[name][begin : begin + size] for name in ("sampled", *INPUTS)]
        short = size - len(part[0])
        done.append(
            fetch(
                sums(model.params, model.lora, *(np.pad(v, ((0, short),) + ((0, 0),) * (v.ndim - 1)) for v in part))
            )
        )
    return np.concatenate(done)[:count]
