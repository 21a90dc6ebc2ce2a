"""Whole answers for a batch of prompts: prefill in buckets, decode in chunks, the cache kept from round to round.

Every array that reaches the device has a shape from a small ladder (rows, new tokens, cache positions), and everything
that differs between rows is an array, so new text, settings and seeds compile nothing new.

What is kept of a round is its prompts. The keys and values of an answer are computed again when the next prompt, which
contains the answer, is appended. So the cache is a function of the sequence of prompts and of nothing else, and a run
that was interrupted rebuilds it bit for bit by prefilling the same prompts, without decoding a token.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec

from atp_jax.errors import UserError
from atp_jax.generate.sampling import Sampling, sample, stream_key, token_keys
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import KVCache, abstract, init_cache
from atp_jax.models.lora import Lora
from atp_jax.parallel import fetch, named_sharding, put, row_shards

CHUNK = 64  # tokens decoded between two looks of the host
PREFILL_TOKENS = 2**14  # at most so many tokens of all rows in one prefill step,
PREFILL_SCORES = 2**29  # and so many attention scores (float32, so 2 GiB): bounds the memory of activations
NARROWEST, WIDEST = 16, 1024  # new tokens of a row in one prefill step
SMALLEST_CACHE = 64  # positions


class State(struct.PyTreeNode):
    """What a batch of B rows carries through prefill and decoding; S is the size of the cache.

        position   0 ...................... length .......................... S
        cache      | this row's own tokens  | rubbish, never attended to       |

    The last of the row's own tokens stands at length - 1, and `hidden` is what the model made of it: the next token
    is drawn from head(hidden).
    """

    cache: KVCache
    hidden: jax.Array  # [B, H] in the parameters' dtype
    length: jax.Array  # int32 [B]
    produced: jax.Array  # int32 [B], tokens of the answer drawn so far
    done: jax.Array  # bool [B], the answer is complete (rows that only fill the bucket are done from the start)


class Weights(struct.PyTreeNode):
    """What the rows of a batch are computed with."""

    params: nnx.State
    lora: Lora | None = None
    adapter: jax.Array | None = None  # int32 [B], which adapter a row wears, -1 none; None: all wear the one there is


class Asked(struct.PyTreeNode):
    """What was asked of each of B rows, and stays while it is answered."""

    streams: jax.Array  # uint32 [B, 5]: seed, condition, episode, agent, round
    budget: jax.Array  # int32 [B], at most so many tokens, the stop token among them
    temperature: jax.Array  # float32 [B]
    top_k: jax.Array  # int32 [B]
    top_p: jax.Array  # float32 [B]
    stop: jax.Array  # int32 [E], ids that end an answer, the same for all rows; padded with -1


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One answer: token ids (the stop token, if any, is the last), the log-probability each was drawn with, and why it
    ended: "stop" or "length"."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str


def pin(tree, mesh: jax.sharding.Mesh):
    """Inside jit: rows over the mesh's batch axes, heads of a cache over its tensor axis. The same on the way in and
    out of every step, so that donated memory is used again and no step is compiled for another placement."""
    cache = named_sharding(mesh, "batch", "kv_heads", "length", "head_dim")
    rows = named_sharding(mesh, "batch")
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, cache if x.ndim == 4 else rows), tree)


@functools.partial(jax.jit, static_argnames=("config", "rows", "size", "dtype", "mesh"))
def empty_state(config: DecoderConfig, rows: int, size: int, dtype, mesh) -> State:
    """A state whose rows hold nothing, with `size` cache positions each."""
    state = State(
        cache=init_cache(config, rows, size, dtype),
        hidden=jnp.zeros((rows, config.hidden_size), dtype),
        length=jnp.zeros(rows, jnp.int32),
        produced=jnp.zeros(rows, jnp.int32),
        done=jnp.ones(rows, bool),
    )
    return pin(state, mesh)


@functools.partial(jax.jit, static_argnames=("size", "mesh"))
def resize(cache: KVCache, size: int, mesh) -> KVCache:
    """The same cache with `size` positions: zeros are added, or the last positions cut off."""

    def one(array):
        kept = array[:, :, :size]
        return jnp.pad(kept, ((0, 0), (0, 0), (0, size - kept.shape[2]), (0, 0)))

    return pin(jax.tree.map(one, cache), mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def spread(state: State, source: jax.Array, *, mesh) -> State:
    """The state whose row b is row source[b] of this one."""
    return pin(jax.tree.map(lambda x: x[source], state), mesh)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="state")
def prefill_chunk(weights: Weights, state: State, tokens: jax.Array, count: jax.Array, *, graphdef, mesh) -> State:
    """Appends to every row b the first count[b] of tokens [B, T]; a row with count 0 stays as it is.

    Only the last new position's hidden state is kept: logits of a prompt are never computed.
    """
    decoder = nnx.merge(graphdef, weights.params)
    hidden, cache = decoder.extend(tokens, state.length, state.cache, lora=weights.lora, adapter=weights.adapter)
    last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(count[:, None] > 0, last, state.hidden)
    return pin(state.replace(cache=cache, hidden=hidden, length=state.length + count), mesh)


@functools.partial(jax.jit, static_argnames=("n", "graphdef", "mesh"), donate_argnames="state")
def decode_chunk(weights: Weights, state: State, asked: Asked, n: int, *, graphdef, mesh):
    """Draws up to n tokens for every row that is not done, and stops early when all are.

    -> state, tokens int32 [B, n], log-probabilities float32 [B, n]. A row's tokens are the first ones of its line, as
    many as its `produced` has grown; the cache must have room for them.
    """
    decoder = nnx.merge(graphdef, weights.params)
    layers = None
    if mesh.devices.flat[0].platform == "cpu":
        # Else the loop's body copies every layer's weights out of the stacked array for each token. Elsewhere weights
        # are too large to lie in memory twice.
        layers = jax.lax.optimization_barrier(decoder.apart(weights.lora))
    keys = jax.vmap(stream_key)(asked.streams)

    def unfinished(carry):
        step, state, _, _ = carry
        return (step < n) & ~jnp.all(state.done)

    def draw_one(carry):
        step, state, tokens, log_probs = carry
        token, log_prob = sample(
            decoder.head(state.hidden), token_keys(keys, state.produced), asked.temperature, asked.top_k, asked.top_p
        )
        produced = state.produced + ~state.done
        done = state.done | jnp.any(token[:, None] == asked.stop, axis=-1) | (produced >= asked.budget)
        # A row that is done writes behind its end, which nobody attends to.
        hidden, cache = decoder.extend(
            token[:, None], state.length, state.cache, lora=weights.lora, adapter=weights.adapter, layers=layers
        )
        state = pin(State(cache, hidden[:, 0], state.length + ~state.done, produced, done), mesh)
        return step + 1, state, tokens.at[:, step].set(token), log_probs.at[:, step].set(log_prob)

    rows = state.length.shape[0]
    carry = (0, state, jnp.zeros((rows, n), jnp.int32), jnp.zeros((rows, n), jnp.float32))
    _, state, tokens, log_probs = jax.lax.while_loop(unfinished, draw_one, carry)
    return state, tokens, log_probs


class Engine:
    """Answers batches of prompts with one model, and remembers the last batch's prompts for the next.

    Row i of a batch takes over what it shares with row i of the batch before (the longest common prefix of their ids),
    if both batches fill the same bucket of rows; whether a row is still the same episode makes no difference to what
    is answered, only to how much of it is new.
    """

    def __init__(
        self, config: DecoderConfig, params, stop: Sequence[int], mesh: jax.sharding.Mesh, lora: Lora | None = None
    ):
        """params: the parameters of a Decoder of this config, on this mesh. stop: ids that end an answer. lora: the
        adapters that its rows can wear."""
        self.config = config
        self.params, self.lora = params, lora
        self.stop = frozenset(stop)
        self.mesh = mesh
        graphdef, _ = abstract(config)
        self._static = {"graphdef": graphdef, "mesh": mesh}
        self._dtype = jax.tree.leaves(params)[0].dtype
        self._prompts: list[list[int]] = []  # what the rows of the state hold
        self._worn: list[int] = []  # and the adapters they wore
        self._state: State | None = None

    def forget(self) -> None:
        """The next batch starts anew."""
        self._prompts = []

    def load(self, params, lora: Lora | None) -> None:
        """Other weights of the same shapes from now on; nothing is remembered, nothing compiled anew."""
        self.params, self.lora = params, lora
        self.forget()

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        adapter: Sequence[int] | None = None,
    ) -> None:
        """What `generate` does before it draws anything, with the same shapes: remembers these prompts.

        Raises UserError for an empty prompt, ids outside the vocabulary, and a prompt that fills the model's context.
        """
        prompts = [list(prompt) for prompt in prompts]
        self._check(prompts)
        rows = bucket(len(prompts), steps=4, smallest=1, multiple=row_shards(self.mesh))
        size = self._cache_size([len(prompt) for prompt in prompts], self._budgets(prompts, sampling))
        worn = list(adapter) if adapter is not None else [0] * len(prompts)
        state, old = self._take(rows, size)

        kept = np.zeros(rows, np.int32)
        for row, (before, now) in enumerate(zip(old, prompts, strict=False)):
            # One token at least is new: its hidden state is what the answer starts from.
            same = self._worn[row] == worn[row]  # keys and values are those of the adapter they were made with
            kept[row] = min(common_prefix(before, now), len(now) - 1) if same else 0
        alike = list(dict.fromkeys((tuple(prompt), one) for prompt, one in zip(prompts, worn, strict=True)))
        if kept.any() or 2 * len(alike) > len(prompts):
            state = self._append(state, prompts, adapter, kept)
        else:
            # Rows that start alike (a GRPO group, the agents of a game) are computed once and copied.
            state = None  # its memory is free for the rows that are computed
            few = bucket(len(alike), steps=4, smallest=1, multiple=row_shards(self.mesh))
            apart, worn_apart = [list(prompt) for prompt, _ in alike], [one for _, one in alike]
            nothing = empty_state(self.config, few, size, self._dtype, self.mesh)
            filled = self._append(nothing, apart, None if adapter is None else worn_apart, np.zeros(few, np.int32))
            place = {one: index for index, one in enumerate(alike)}
            source = np.zeros(rows, np.int32)
            source[: len(prompts)] = [place[tuple(prompt), one] for prompt, one in zip(prompts, worn, strict=True)]
            state = spread(filled, self._put(source), mesh=self.mesh)
        self._state, self._prompts, self._worn = state, prompts, worn

    def _append(self, state: State, prompts, adapter: Sequence[int] | None, kept: np.ndarray) -> State:
        """Brings the rows of a state, of which the first kept[row] tokens stay, to these prompts."""
        rows, size = len(kept), state.cache.keys[0].shape[2]
        weights = self._weights(rows, adapter)
        new = np.zeros(rows, np.int32)
        new[: len(prompts)] = [len(prompt) for prompt in prompts]
        new -= kept
        state = state.replace(length=self._put(kept))
        widest = self._prefill_width(rows, size)
        for begin in range(0, int(new.max()), widest):
            width = bucket(min(int(new.max()) - begin, widest), steps=1, smallest=NARROWEST)
            count = np.clip(new - begin, 0, width)
            tokens = np.zeros((rows, width), np.int32)
            for row, prompt in enumerate(prompts):
                at = kept[row] + begin
                tokens[row, : count[row]] = prompt[at : at + count[row]]
            state = prefill_chunk(weights, state, self._put(tokens), self._put(count), **self._static)
        return state

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        streams,
        adapter: Sequence[int] | None = None,
    ) -> list[Sampled]:
        """Answers prompts (lists of token ids), row by row.

        sampling: one Sampling, or one a row. streams: integers [rows, 5], what the randomness of each row is folded
        from (seed, condition, episode, agent, round). adapter: which of the adapters each row wears, -1 none; None: all
        rows wear the one there is. An answer ends at a stop id, after max_new_tokens, or where the
        model's context ends. Raises UserError like `prefill`.
        """
        self.prefill(prompts, sampling, adapter)
        count, rows = len(prompts), self._state.length.shape[0]
        lengths, budgets = np.array([len(prompt) for prompt in prompts]), self._budgets(prompts, sampling)
        asked, weights = self._ask(rows, sampling, budgets, streams), self._weights(rows, adapter)
        idle = np.arange(rows) >= count
        state, self._state = self._state, None  # donated from here on, ours again when the answers are complete
        state = state.replace(produced=self._put(np.zeros(rows, np.int32)), done=self._put(idle))

        tokens, log_probs = [[] for _ in prompts], [[] for _ in prompts]
        produced, active = np.zeros(count, np.int32), np.ones(count, bool)
        while active.any():
            size = self._cache_size((lengths + produced)[active], (budgets - produced)[active])
            if size > state.cache.keys[0].shape[2]:
                state = state.replace(cache=resize(state.cache, size, self.mesh))
            state, *drawn = decode_chunk(weights, state, asked, CHUNK, **self._static)
            now, done, chunk, chunk_log_probs = fetch((state.produced, state.done, *drawn))
            for row in np.flatnonzero(active):
                fresh = now[row] - produced[row]
                tokens[row] += chunk[row, :fresh].tolist()
                log_probs[row] += chunk_log_probs[row, :fresh].tolist()
            produced, active = now[:count], ~done[:count]
        self._state = state
        return [
            Sampled(tuple(ids), tuple(logs), "stop" if ids[-1] in self.stop else "length")
            for ids, logs in zip(tokens, log_probs, strict=True)
        ]

    def _check(self, prompts: list[list[int]]) -> None:
        vocabulary, context = self.config.vocab_size, self.config.max_position_embeddings
        if not prompts:
            raise UserError("no prompts to answer")
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {row} is empty")
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                wrong = next(token for token in prompt if not 0 <= token < vocabulary)
                raise UserError(f"prompt {row} has the token id {wrong}, the model only 0 to {vocabulary - 1}")
            if len(prompt) >= context:
                raise UserError(f"prompt {row} has {len(prompt)} tokens, the model's context only {context}")

    def _budgets(self, prompts, sampling) -> np.ndarray:
        """How many tokens each answer may have, int32 [rows]: as asked, or what the context has left."""
        context = self.config.max_position_embeddings
        return np.array(
            [min(s.max_new_tokens, context - len(p)) for p, s in zip(prompts, per_row(sampling, prompts), strict=True)],
            np.int32,
        )

    def _cache_size(self, lengths, budgets) -> int:
        """Positions that rows of these lengths need until the host looks again, rounded up to a bucket."""
        needed = max(int(length) + min(int(budget), CHUNK) for length, budget in zip(lengths, budgets, strict=True))
        return bucket(needed, steps=2, smallest=SMALLEST_CACHE)

    def _prefill_width(self, rows: int, size: int) -> int:
        """How many new tokens of each row one prefill step takes: a power of two that keeps activations bounded."""
        rows = rows // row_shards(self.mesh)
        most = min(PREFILL_TOKENS // rows, PREFILL_SCORES // (rows * size * self.config.num_heads))
        return min(WIDEST, max(NARROWEST, 2 ** (max(most, 1).bit_length() - 1)))

    def _take(self, rows: int, size: int) -> tuple[State, list[list[int]]]:
        """A state of this shape, and the prompts its rows hold. The cache never depends on what was answered: a longer
        answer made it grow, and the next round cuts it back."""
        state, old, self._state, self._prompts = self._state, self._prompts, None, []
        if state is None or state.length.shape[0] != rows:
            return empty_state(self.config, rows, size, self._dtype, self.mesh), []
        if state.cache.keys[0].shape[2] != size:
            state = state.replace(cache=resize(state.cache, size, self.mesh))
        return state, old

    def _ask(self, rows: int, sampling, budgets: np.ndarray, streams) -> Asked:
        def padded(values, dtype):
            values = np.asarray(values)
            out = np.zeros((rows, *values.shape[1:]), dtype)
            out[: len(values)] = values
            return self._put(out)

        each = per_row(sampling, budgets)
        stop = np.full(bucket(len(self.stop), steps=1, smallest=4), -1, np.int32)
        stop[: len(self.stop)] = sorted(self.stop)
        return Asked(
            streams=padded(streams, np.uint32),
            budget=padded(budgets, np.int32),
            temperature=padded([s.temperature for s in each], np.float32),
            top_k=padded([s.top_k for s in each], np.int32),
            top_p=padded([s.top_p for s in each], np.float32),
            stop=put(stop, NamedSharding(self.mesh, PartitionSpec())),
        )

    def _weights(self, rows: int, adapter: Sequence[int] | None) -> Weights:
        if adapter is None:
            return Weights(self.params, self.lora)
        count = 0 if self.lora is None else int(self.lora.owner.max()) + 1
        if wrong := [index for index in adapter if not -1 <= index < count]:
            raise UserError(f"adapter {wrong[0]}: there are {count}, counted from 0; -1 is none")
        worn = np.full(rows, -1, np.int32)
        worn[: len(adapter)] = adapter
        return Weights(self.params, self.lora, self._put(worn))

    def _put(self, rows: np.ndarray) -> jax.Array:
        return put(rows, named_sharding(self.mesh, "batch"))


def per_row(sampling: Sampling | Sequence[Sampling], rows: Sequence) -> list[Sampling]:
    """One Sampling a row."""
    return [sampling] * len(rows) if isinstance(sampling, Sampling) else list(sampling)


def bucket(needed: int, *, steps: int, smallest: int, multiple: int = 1) -> int:
    """The smallest size >= needed on a ladder that has `steps` equal steps from each power of two to the next, rounded
    up to a multiple. E.g. steps=2: 64, 96, 128, 192, 256, 384, ..."""
    needed = max(needed, smallest)
    power = 2 ** (needed.bit_length() - 1)
    step = max(power // steps, 1)
    size = -(-needed // step) * step
    return -(-size // multiple) * multiple


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading elements are equal."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
