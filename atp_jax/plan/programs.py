"""The programs of a run, with shapes in place of arrays: what `experiment` would do, and nothing computed.

Everything that has a shape is made by the functions that make it in a run, so that a plan cannot drift from it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atp_jax.align.dpo import Dpo
from atp_jax.align.grpo import Draw, Grpo
from atp_jax.align.trainable import partition
from atp_jax.align.update import TrainState, make_optimiser, make_update, micro_batches
from atp_jax.generate import engine, programs, sizes
from atp_jax.model import Model
from atp_jax.models import lora as adapters
from atp_jax.models.cache import Shared
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import abstract
from atp_jax.parallel import named_sharding, param_shardings, row_shards
from atp_jax.plan.cost import Cost, cost
from atp_jax.policies.types import Answer
from atp_jax.settings import AlignSettings, LoraSettings


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and the shapes it is called with."""

    call: Callable
    arguments: tuple
    static: dict = dataclasses.field(default_factory=dict)

    def lower(self):
        return self.call.lower(*self.arguments, **self.static)

    def cost(self) -> Cost:
        return cost(self.call.trace(*self.arguments, **self.static).jaxpr)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Answering `rows` prompts together. positions: of a row's cache at its longest; tokens: of all rows in one step of
    prefill; weights, state: what lies in memory; apart: the state if no rows share their prompts."""

    rows: int
    positions: int
    tokens: int
    weights: Any
    state: Any
    apart: Any
    prefill: Program
    decode: Program


@dataclasses.dataclass(frozen=True)
class Training:
    """One update. answers: that it learns from; group: of these with one prompt; answer_tokens: theirs; held: what lies
    in memory between updates besides the model, by name. The micro-batches are as `align.rows` says, without it the
    smallest there are, one prompt a device."""

    answers: int
    group: int
    answer_tokens: int
    held: dict
    update: Program


def shaped(tree, shardings):
    """The shapes of a tree, placed."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def device_bytes(tree) -> int:
    """Of a tree of placed shapes, on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def whole_along_fsdp(tree):
    """The layout that is sampled from (parallel.sampling_layout)."""

    def whole(x):
        spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in x.sharding.spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(x.sharding.mesh, spec))

    return jax.tree.map(whole, tree)


def model(config: DecoderConfig, dtype, mesh, lora: LoraSettings | None = None) -> Model:
    """The model of a run as shapes, with an adapter like `lora`; None or rank 0: without one."""
    _, params = abstract(config, jnp.dtype(dtype))
    found = Model(config, None, shaped(params, param_shardings(params, mesh)), mesh)
    if lora is None or not lora.rank:
        return found
    # The shapes of an adapter are asked for on a device that is here: the mesh's may not be.
    here = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), mesh.axis_names)
    made = jax.eval_shape(lambda: adapters.init(config, lora.rank, lora.alpha, lora.targets, 0, here))
    return dataclasses.replace(found, lora=shaped(made, adapters.shardings(made, mesh)))


def sampling(given: Model, rows: int, prompt: int, new: int, group: int = 1) -> Sampling:
    """Answers of up to `new` tokens to `rows` prompts of `prompt` tokens, at their longest; `group` of them to each."""
    mesh = given.mesh
    given = dataclasses.replace(given, params=whole_along_fsdp(given.params), lora=whole_along_fsdp(given.lora))
    shards = row_shards(mesh)
    together = engine.shares(rows, group, prompt, new, prompt + new, shards=shards)
    groups, rows = rows // group, sizes.batch_rows(rows, shards)
    positions = sizes.positions(prompt + new)
    dtype = jnp.dtype(given.dtype)

    def empty(rows: int, positions: int) -> programs.State:
        asked_for = (given.config, rows, positions, dtype, mesh)
        shardings = programs.empty_state.lower(*asked_for).compile().output_shardings
        return shaped(jax.eval_shape(lambda: programs.empty_state(*asked_for)), shardings)

    read = state = apart = empty(rows, positions)
    if together:
        read, own = empty(groups, sizes.positions(prompt)), empty(rows, sizes.positions(new))
        state = own.replace(shared=Shared(read.cache, read.length))
    weights = programs.Weights(given.params, given.lora)
    whole, by_row = named_sharding(mesh), named_sharding(mesh, "batch")

    def row(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)

    graphdef, _ = abstract(given.config)
    static = {"graphdef": graphdef, "mesh": mesh}
    width = min(sizes.bucket(min(prompt, engine.WIDEST), steps=2, smallest=engine.NARROWEST), positions)
    lines = min(len(read.length) // shards, max(1, engine.PREFILL_TOKENS["other"] // width)) * shards
    prefill = Program(
        programs.prefill_chunk, (weights, read, row(lines), row(lines, width), row(lines)),
        static | {"past": 0},
    )  # fmt: skip
    asked = programs.Asked(
        streams=row(rows, 5, dtype=jnp.uint32), budget=row(rows), temperature=row(rows, dtype=jnp.float32),
        top_k=row(rows), top_p=row(rows, dtype=jnp.float32), produced=row(rows), done=row(rows, dtype=bool),
        stop=jax.ShapeDtypeStruct((4,), jnp.int32, sharding=whole),
    )  # fmt: skip
    few = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    decode = Program(programs.decode_chunk, (weights, state, asked, few), static | {"n": engine.CHUNK})
    return Sampling(rows, positions, lines * width, weights, state, apart, prefill, decode)


def grpo(given: Model, align: AlignSettings, new: int, prompt: int, reference=None) -> Training:
    """An update of GRPO whose prompts and answers are all as long as they may be. reference: the adapter that the
    reference wears, as `given.lora`."""
    settings = align.grpo
    count = settings.prompts * settings.group * settings.rounds
    answer = Answer("", (0,) * new, "length", 0.0, (0,) * prompt, (0.0,) * new)
    drawn = Draw([answer] * count, np.zeros((settings.prompts, settings.group, settings.rounds)), {})
    once = dataclasses.replace(settings, iterations=1)  # else the old policy would score the answers
    batch, _ = Grpo("grpo", lambda *_: drawn, given, once, new, align.rows).batch(0, None, None)
    if settings.iterations > 1:
        batch["old"] = np.zeros_like(batch["mask"])
    return _training(Grpo("grpo", None, given, settings, new, align.rows), batch, given, align, count, reference)


def dpo(given: Model, align: AlignSettings, reference=None) -> Training:
    """An update of DPO whose pairs are as long as they may be. reference: as in `grpo`."""
    prompt, answer = align.dpo.max_prompt, align.dpo.max_length - align.dpo.max_prompt
    pair = {"prompt": [0] * prompt, "chosen": [0] * answer, "rejected": [0] * answer}
    # The losses of pairs differ in a few scalars; this one does not have a reference score the pairs first.
    settings = dataclasses.replace(align.dpo, loss="simpo")
    method = Dpo([pair] * settings.batch, given, settings, 0)
    return _training(method, method.batch(0, None, None)[0], given, align, 2 * settings.batch, reference)


def _training(method, batch: dict, given: Model, align: AlignSettings, answers: int, reference) -> Training:
    mesh, shards = given.mesh, row_shards(given.mesh)
    together = max(shards, (align.rows or 0) // method.group // shards * shards)
    by_row, whole = named_sharding(mesh, "length", "batch"), named_sharding(mesh)
    cut = micro_batches(batch, together)
    batches = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row) for name, x in cut.items()}

    made, left = jax.eval_shape(lambda params, lora: partition(params, lora, align.train), given.params, given.lora)
    if given.lora is None:
        places = {path: v.get_value().sharding for path, v in nnx.to_flat_state(given.params)}

        def placed(state):
            return nnx.from_flat_state(
                [(path, v.replace(shaped(v.get_value(), places[path]))) for path, v in nnx.to_flat_state(state)]
            )

        trainable = {"params": placed(made["params"])}
        frozen = {"rest": placed(left["rest"]), "dtype": shaped(left["dtype"], whole)}
    else:
        trainable = {name: shaped(made[name], _shardings(getattr(given.lora, name))) for name in ("a", "b")}
        frozen = {"params": given.params, "lora": given.lora}
    optimiser = make_optimiser(
        **method.optimiser, steps=method.steps, weight_decay=align.weight_decay, max_grad_norm=align.max_grad_norm
    )
    moments = optax.tree.map_params(
        optimiser.transform,
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding),
        jax.eval_shape(optimiser.transform.init, trainable), trainable,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    )  # fmt: skip
    zero = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = TrainState(trainable, moments, zero, zero, zero)
    fixed = (frozen, (given.params, reference))
    update = Program(make_update(method.loss, optimiser).jitted(state), (state, fixed, batches))
    held = {"trained": trainable, "optimiser": moments}
    return Training(answers, method.group, int(batch["lengths"].sum()), held, update)


def _shardings(tree):
    return jax.tree.map(lambda x: x.sharding, tree)
