"""The loop that every way of training runs: a batch, one update, its measures, now and then a look and a checkpoint.

A `Method` says what a step learns from; this file neither knows pairs nor rewards. A step's batch is a function of the
configuration, the step's number and the weights, so a run that was killed goes on from its last checkpoint and ends
with the same weights, bit for bit on a CPU.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from atp_jax import processes
from atp_jax.align.rows import by_length
from atp_jax.align.trainable import join, partition
from atp_jax.align.update import as_many_as_fit, check_bad, init_state, make_optimiser, make_update, micro_batches
from atp_jax.checkpoint import Checkpoints
from atp_jax.compilations import Compilations
from atp_jax.files import append, cut, size
from atp_jax.interrupt import Interrupt, Interrupted
from atp_jax.model import Model
from atp_jax.models import lora as adapters
from atp_jax.parallel import fetch, named_sharding, put, row_shards
from atp_jax.progress import Heartbeat
from atp_jax.settings import AlignSettings


class Method(Protocol):
    """One way to train. A batch is a dict of arrays `[N, ...]` with the same N and keys at every step, rows as
    align/rows.py makes them: a prompt and `group` answers."""

    name: str
    steps: int
    group: int
    iterations: int  # steps that learn from the same draw: only between draws can a training stop and go on
    optimiser: dict  # learning_rate, schedule, warmup: arguments of make_optimiser

    def batch(self, step: int, params, lora) -> tuple[dict[str, np.ndarray], dict]:
        """What update `step` (from 0) learns from, given the weights at that point, and what there is to log of it."""
        ...

    def loss(self, trainable, frozen, micro) -> tuple[jax.Array, tuple[dict, dict]]:
        """The loss of `make_update`."""
        ...

    def measures(self, batch: dict, sums: dict, outputs: dict) -> dict:
        """What to log of an update: from the batch, the summed measures and the outputs [N, ...] of its rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Stopped:
    """How a training ended: the model, the updates made, and the rates seen at each look, [(step, rate)]."""

    model: Model
    steps: int
    looks: list[tuple[int, float]]


def train(
    method: Method,
    given: Model,
    settings: AlignSettings,
    seed: int,
    workdir: Path,
    identity: Mapping,
    look: Callable[[int, object, object], float],
    say: Callable[[dict], None],
) -> Stopped:
    """Trains a model by `method` until its last step, or until `look` finds what `target` asks for.

    What is trained: the adapter that the model wears, a fresh one where it wears none, or with `lora.rank` 0 its own
    weights. The reference is always the model as it was given.

    look: (step, params, lora) -> a rate of violations; alignment looks at first rounds of the validation scenarios.
    say: shows a line of metrics.
    Writes `metrics.jsonl` and `checkpoints/<name>` in the workdir. Raises Interrupted after saving where SIGTERM came,
    UserError where `max_bad_steps` in a row were not finite, or the checkpoint belongs to another configuration.
    """
    model, rank = given, settings.lora.rank
    if rank and given.lora is None:
        fresh = adapters.init(given.config, rank, settings.lora.alpha, settings.lora.targets, seed, given.mesh)
        model = dataclasses.replace(given, lora=fresh)
    trainable, frozen = partition(model.params, model.lora, settings.train)
    fixed = (frozen, (given.params, given.lora))
    optimiser = make_optimiser(
        **method.optimiser, steps=method.steps, weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm
    )
    state = init_state(trainable, optimiser)
    update = make_update(method.loss, optimiser)
    metrics_file = workdir / "metrics.jsonl"
    shards, placed = row_shards(given.mesh), named_sharding(model.mesh, "length", "batch")  # [M, rows, ...]
    fits: dict[tuple, int] = {}  # shapes of a batch -> prompts of a micro-batch

    def together(batch: dict[str, np.ndarray]) -> int:
        """Prompts of one micro-batch, a multiple of `shards`: as the settings say, or as many as fit."""
        if settings.rows:
            return max(shards, settings.rows // method.group // shards * shards)
        shapes = tuple(x.shape for x in batch.values())
        if shapes not in fits:
            fits[shapes] = as_many_as_fit(update, state, fixed, batch, placed)
        return fits[shapes]

    looks: list[list] = []

    where = workdir / "checkpoints" / method.name
    with (
        Checkpoints(where, identity) as checkpoints,
        Interrupt() as interrupt,
        Compilations() as compilations,
        Heartbeat(method.name, method.steps, "steps") as heartbeat,
    ):
        step, saved = 0, None
        if (found := checkpoints.latest(state)) is not None:
            step, state, extra = found
            saved, looks = step, extra["looks"]
            cut(metrics_file, extra["metrics"])
        heartbeat.start(step)

        def save() -> None:
            nonlocal saved
            if saved != step:
                best = -looks[-1][1] if looks else None  # the fewer violations at the last look
                checkpoints.save(step, state, {"metrics": size(metrics_file), "looks": looks}, best)
                saved = step

        save()  # of step 0 too: it says where this training's lines in metrics.jsonl begin
        checkpoints.wait()
        while True:
            params, lora = join(state.trainable, frozen)
            due = step % settings.check_every == 0 or step == method.steps
            if due and (not looks or looks[-1][0] < step):
                looks.append([step, look(step, params, lora)])
                line = {"stage": method.name, "step": step, "violation_rate": looks[-1][1]}
                append(metrics_file, [line])
                say(line)
            reached = looks and settings.target is not None and looks[-1][1] <= settings.target
            if step == method.steps or reached:
                break
            asked = processes.first(interrupt.asked)
            if asked and step % method.iterations == 0:
                save()
                checkpoints.wait()
                where = f"step {step} of {method.name}"
                raise Interrupted(f"stopped by {asked} after {where}; the same command goes on from there")

            began, compiled = time.perf_counter(), compilations.count
            batch, logged = method.batch(step, params, lora)
            drawn = time.perf_counter()
            order = by_length(batch)
            shaped = micro_batches({name: values[order] for name, values in batch.items()}, together(batch))
            state, metrics, outputs = update(state, fixed, put(shaped, placed))
            metrics, outputs = fetch((metrics, outputs))
            metrics = {name: float(value) for name, value in metrics.items()}
            back = np.argsort(order)
            outputs = {name: value.reshape(-1, *value.shape[2:])[back] for name, value in outputs.items()}
            ended = time.perf_counter()

            step += 1
            line = {"stage": method.name, "step": step} | logged | method.measures(batch, metrics, outputs)
            line |= {"batch_s": round(drawn - began, 3), "update_s": round(ended - drawn, 3)}
            tokens = int(batch["sampled"].sum())
            line |= {"tokens": tokens, "tokens_per_s": round(tokens / (ended - began), 1)}
            line |= {"update_tokens_per_s": round(tokens / (ended - drawn), 1)}
            line["compilations"] = compilations.count - compiled
            line = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
            append(metrics_file, [line])
            say(line)
            heartbeat.at(step)
            check_bad(state, settings.max_bad_steps)
            if step % settings.save_every == 0:
                save()
        save()
        checkpoints.wait()

    params, lora = join(state.trainable, frozen)
    return Stopped(dataclasses.replace(model, params=params, lora=lora), step, [tuple(look) for look in looks])
