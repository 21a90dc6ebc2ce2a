"""One update: gradients of micro-batches summed in a scan, clipped, and applied unless they are not finite.

The loss of a micro-batch is a *sum* whose weights already hold the one denominator of the whole batch
(align/losses.py:token_weights), so nothing is divided here, and how the batch is cut up cannot change the step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from atp_jax.align.rows import narrowed
from atp_jax.errors import UserError
from atp_jax.parallel import put, row_shards, spare_memory

# Tokens of one micro-batch on each device that does not say what memory it has, a CPU: what its caches hold.
TOKENS = 2**12


class TrainState(struct.PyTreeNode):
    """What an update changes. step: updates attempted; bad: how many of the last were skipped in a row; skipped: how
    many altogether; all int32. The optimiser's own count, which the schedule reads, is of the updates applied."""

    trainable: Any
    optimiser: Any
    step: jax.Array
    bad: jax.Array
    skipped: jax.Array


def learning_rates(learning_rate: float, schedule: str, steps: int, warmup: float) -> optax.Schedule:
    """Update (from 0) -> learning rate. The first ceil(warmup x steps) updates rise from 0; then "constant", or to 0 at
    `steps`: "linear", lr (T - t) / T without warm-up, or "cosine", lr (1 + cos(pi t / T)) / 2."""
    rising = int(np.ceil(warmup * steps))
    left = max(steps - rising, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, left),
        "cosine": optax.cosine_decay_schedule(learning_rate, left),
    }[schedule]
    if not rising:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, rising), after], [rising])


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """AdamW behind a clip of the gradient's global norm, and the schedule it follows."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    max_grad_norm: float


def make_optimiser(
    learning_rate: float,
    schedule: str,
    steps: int,
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimiser:
    """steps: of the whole training. warmup: share of them. max_grad_norm: 0 is off."""
    rates = learning_rates(learning_rate, schedule, steps, warmup)
    adamw = optax.adamw(rates, b1=betas[0], b2=betas[1], eps=eps, weight_decay=weight_decay)
    return Optimiser(adamw, rates, max_grad_norm)


def init_state(trainable: Any, optimiser: Optimiser) -> TrainState:
    """The state before the first update. `trainable` is donated by it: keep no other use of its arrays.

    The optimiser's moments lie as what they belong to, scalars on every device of the mesh.
    """
    home = jax.tree.leaves(trainable)[0].sharding
    everywhere = NamedSharding(home.mesh, PartitionSpec()) if isinstance(home, NamedSharding) else home
    zero = [jnp.zeros((), jnp.int32) for _ in range(3)]  # three arrays: one cannot be donated thrice
    state = TrainState(trainable, optimiser.transform.init(trainable), *zero)
    # Committed to where it lies, as what an update returns: else the second update would be compiled again.
    return jax.tree.map(lambda x: put(x, x.sharding if x.ndim else everywhere), state)


def make_update(loss: Callable, optimiser: Optimiser) -> Callable:
    """The jitted update (state, fixed, batch) -> (state, metrics, outputs). The state is donated, and the new one lies
    on the mesh as it did.

    batch: a pytree of [M, rows, ...], M micro-batches. loss: (trainable, fixed, micro) -> (the sum of weighted losses
    of a micro-batch, (dict of sums, dict of arrays a row [rows, ...])). metrics: scalars: loss and the sums over the
    whole batch, grad_norm as computed and grad_norm_clipped as applied (0 where skipped), learning_rate, skipped, bad.
    outputs: the arrays a row, [M, rows, ...]. A step whose loss or gradient is not finite changes nothing but the
    counters.
    """
    value_and_grad = narrowed(jax.value_and_grad(loss, has_aux=True))

    def update(state: TrainState, fixed, batch):
        def add(total, micro):
            (value, (sums, outputs)), gradient = value_and_grad(state.trainable, fixed, micro)
            return jax.tree.map(jnp.add, total, (value, sums, gradient)), outputs

        first = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(lambda: value_and_grad(state.trainable, fixed, first))
        (value, (sums, _)), gradient = shapes
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (value, sums, gradient))
        (value, sums, gradient), outputs = jax.lax.scan(add, nothing, batch)

        norm = optax.tree.norm(gradient)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        scale = 1.0
        if optimiser.max_grad_norm:
            scale = jnp.minimum(1.0, optimiser.max_grad_norm / jnp.maximum(norm, 1e-12))
        gradient = jax.tree.map(lambda g: jnp.where(good, g * scale, 0.0), gradient)
        updates, moved = optimiser.transform.update(gradient, state.optimiser, state.trainable)
        trainable, kept = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (optax.apply_updates(state.trainable, updates), moved),
            (state.trainable, state.optimiser),
        )
        bad = jnp.where(good, 0, state.bad + 1)
        skipped = state.skipped + ~good
        rate = optimiser.schedule(state.step - state.skipped)
        metrics = {
            "loss": value, "grad_norm": norm, "grad_norm_clipped": optax.tree.norm(gradient), "learning_rate": rate,
            "skipped": skipped, "bad": bad, **sums,
        }  # fmt: skip
        return TrainState(trainable, kept, state.step + 1, bad, skipped), metrics, outputs

    compiled = None

    def jitted(state: TrainState):
        # Left to itself the compiler lays the new state out anew: the second update would be another program, with
        # other roundings than the first one of a run that was resumed, and slices of `fsdp` would become whole.
        nonlocal compiled
        if compiled is None:
            lies = jax.tree.map(lambda x: x.sharding, state)
            compiled = jax.jit(update, donate_argnums=0, out_shardings=(lies, None, None))
        return compiled

    def call(state: TrainState, fixed, batch):
        return jitted(state)(state, fixed, batch)

    call.jitted = jitted  # what a plan compiles, with shapes in place of arrays
    return call


def as_many_as_fit(update: Callable, state: TrainState, fixed, batch: dict[str, np.ndarray], placed) -> int:
    """Prompts of one micro-batch, a multiple of the devices they are spread over; all micro-batches are about alike.

    The update is compiled for one prompt a device; what its temporary memory holds beside the sum of the gradients is
    what a prompt costs. It is at most that, so as many prompts as the devices' spare memory holds of it do fit. batch:
    arrays [N, ...] with their final shapes. placed: the sharding of [M, rows, ...].
    """
    shards = row_shards(placed.mesh)
    most = -(-len(batch["prompts"]) // shards)
    free = spare_memory((state, fixed), placed.mesh)
    if free is None:
        count = TOKENS // (batch["prompts"].shape[1] + batch["answers"][0].size)
    else:
        one = {
            name: jax.ShapeDtypeStruct((1, shards, *x.shape[1:]), x.dtype, sharding=placed) for name, x in batch.items()
        }
        needed = update.jitted(state).lower(state, fixed, one).compile().memory_analysis().temp_size_in_bytes
        summed = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.trainable))
        count = (free // placed.mesh.size - summed) // max(needed - summed, 1)
    times = -(-most // max(count, 1))
    return shards * -(-most // times)


def check_bad(state: TrainState, most: int) -> None:
    """UserError when so many updates in a row had to be skipped."""
    if int(state.bad) >= most:
        raise UserError(
            f"{int(state.bad)} updates in a row had a loss or gradient not finite (align.max_bad_steps={most}): "
            "a smaller learning rate or float32 may help; the last checkpoint is good"
        )


def micro_batches(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """[N, ...] -> [M, rows, ...], filled up with rows of zeros, whose weights are zero like everything else in them."""

    def cut(x):
        x = np.concatenate([x, np.zeros((-len(x) % rows, *x.shape[1:]), x.dtype)])
        return x.reshape(-1, rows, *x.shape[1:])

    return {name: cut(values) for name, values in batch.items()}
