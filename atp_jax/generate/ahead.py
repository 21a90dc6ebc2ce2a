"""Whole rounds on the device, each begun before the host has seen to the one before.

Where it is known beforehand what an episode is told after each decision (`policies.types.Script`), a round is one
program: append what is asked, draw the answers, read what they decided, and make of that what the next round appends.
So the host needs only begin the next round, and renders, reads, pays and records this one while the device goes on.

The device's reading is a guess that nothing relies on: what it made to be appended is compared with the prompts that
the host makes of the same round, and where they differ the round is drawn again behind the right ones, by the same
program. So the cache is a function of the sequence of prompts here too, and a run that was interrupted rebuilds it bit
for bit by reading the same prompts.
"""

import functools
import logging
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atp_jax.compilations import make_room
from atp_jax.generate import reading
from atp_jax.generate.engine import Engine
from atp_jax.generate.programs import Asked, State, Weights, decode_chunk, pin, prefill_chunk, resize
from atp_jax.generate.sampling import Sampling
from atp_jax.generate.sizes import bucket, positions
from atp_jax.generate.wanted import Sampled, sampled
from atp_jax.parallel import fetch, row_shards
from atp_jax.policies.types import Script

_log = logging.getLogger(__name__)

PIECE = 128  # new tokens of a row that are read in one step, at most


class Scripted(struct.PyTreeNode):
    """A script on the device, for B rows."""

    segments: jax.Array  # int32 [S, T], what is said after an answer; segment 0 is empty
    lengths: jax.Array  # int32 [S]
    which: jax.Array  # int32 [B, R, 3], the segment after a round's answer, by what this decided
    named: jax.Array  # uint8 [B, 2, K], the options (`reading.options`)
    spelled: reading.Spelling
    rewind: jax.Array  # int32 [], so many last ids of a prompt are not there any more once it is answered


class New(struct.PyTreeNode):
    """What is appended to each of B rows: the first `count` of tokens [B, W], from position `base` on."""

    tokens: jax.Array
    count: jax.Array
    base: jax.Array


class Drawn(struct.PyTreeNode):
    """The answers of B rows: the first `count` of tokens int32 [B, n], each drawn with its log-probability [B, n]."""

    tokens: jax.Array
    count: jax.Array
    log_probs: jax.Array


@functools.partial(jax.jit, static_argnames=("n", "piece", "lines", "graphdef", "mesh"), donate_argnames="state")
def live_round(
    weights: Weights, state: State, asked: Asked, script: Scripted, new: New, number, *, n: int, piece: int, lines: int,
    graphdef, mesh,
) -> tuple[State, Drawn, New]:  # fmt: skip
    """One round of all rows: what is asked is appended, and answered -> also what the next round will append.

    number int32 []: of the round, from 1. n: tokens of an answer at most. piece, lines: so many tokens of so many rows
    are read in one step.
    """
    state = _append(weights, state.replace(length=new.base), new, piece, lines, graphdef=graphdef, mesh=mesh)
    prompts = state.length
    state, count, _, tokens, log_probs = decode_chunk(
        weights, state, asked, jnp.int32(0), n, graphdef=graphdef, mesh=mesh
    )
    decided = reading.read(tokens, count, script.named, script.spelled)
    segment = script.which[jnp.arange(len(decided)), number - 1, decided]
    # The answer without a special token at its end, and behind it the segment.
    end = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    said = count - ((count > 0) & (script.spelled.count[end] == 0))
    at = jnp.arange(new.tokens.shape[1]) - said[:, None]
    answer = jnp.pad(tokens, ((0, 0), (0, at.shape[1] - n)))
    behind = jnp.take_along_axis(script.segments[segment], at, axis=1, mode="clip")
    following = New(
        jnp.where(at < 0, answer, behind), said + script.lengths[segment], jnp.maximum(prompts - script.rewind, 0)
    )
    return state, *pin((Drawn(tokens, count, log_probs), following), mesh)


def _append(weights: Weights, state: State, new: New, piece: int, lines: int, *, graphdef, mesh) -> State:
    """Reads what is new piece by piece, of each piece only the rows that reach so far, `lines` of them in a step."""
    rows, shards, size = len(new.count), row_shards(mesh), state.cache.keys[0].shape[3]
    own, each = rows // shards, lines // shards
    longest_first = jnp.argsort(-new.count.reshape(shards, own), axis=1) + own * jnp.arange(shards)[:, None]

    def read(index, state):
        begin = index * piece
        count = jnp.clip(new.count - begin, 0, piece)
        tokens = jax.lax.dynamic_slice_in_dim(new.tokens, begin, piece, axis=1)
        order = jnp.where(count[longest_first] > 0, longest_first, rows)
        order = jnp.pad(order, ((0, 0), (0, -own % each)), constant_values=rows)

        def group(index, state):
            chosen = jax.lax.dynamic_slice_in_dim(order, index * each, each, axis=1).reshape(-1)
            one = (x.at[chosen].get(mode="fill", fill_value=0) for x in (tokens, count))
            return prefill_chunk(weights, state, chosen, *one, past=size, graphdef=graphdef, mesh=mesh)

        groups = -(-jnp.max(jnp.sum(order < rows, axis=1)) // each)
        return jax.lax.fori_loop(0, groups, group, state)

    return jax.lax.fori_loop(0, -(-jnp.max(new.count) // piece), read, state)


class Ahead:
    """The rounds of a script's episodes, in order: `answer` each, or `recall` those that were answered before."""

    def __init__(self, engine: Engine, script: Script, sampling: Sampling, spelled: reading.Spelling):
        """spelled: the vocabulary of the engine's model, on its devices."""
        self.script = script
        self.number = 0  # the last round that was answered or recalled
        self._engine, self._sampling, self._rewind = engine, sampling, script.rewind
        self._episodes, self._rounds = len(script.which), script.which.shape[1]
        longest = max(map(len, script.segments))
        self._most = sampling.max_new_tokens + longest  # ids from one prompt to the next
        self._piece = min(bucket(self._most, steps=4, smallest=16), PIECE)
        self._width = -(-self._most // self._piece) * self._piece
        self._rows = engine.rows(self._episodes)
        self._scripted = self._on_devices(script, spelled, longest)
        self._prompts: list[list[int]] = []  # of that round
        self._state: State | None = None
        # The next round, where it is begun: what was appended, streams of the answers, these, and what follows them.
        self._begun: tuple[New, list[tuple[int, ...]], Drawn, New] | None = None
        self._foresees = True  # until it was wrong once: what is drawn twice costs more than is won

    def fits(self, prompts: Sequence[Sequence[int]], rows: int | None) -> bool:
        """Whether all rounds of episodes that begin so can be answered at a time, within the model's context."""
        end = max(map(len, prompts)) + (self._rounds - 1) * self._most + self._sampling.max_new_tokens
        return end <= self._engine.config.max_position_embeddings and self._engine.hold(self._episodes, end, rows)

    def answer(self, prompts: list[list[int]], streams: Sequence[Sequence[int]]) -> list[Sampled] | None:
        """The answers of the next round; None where its prompts are not the last ones with no more ids behind them than
        answers and script can leave there. UserError like `Engine.prefill`."""
        if (new := self._told(prompts)) is None:
            return None
        began, streams = time.perf_counter(), list(map(tuple, streams))
        if self._begun is not None and not (_same(self._begun[0], new, self._episodes) and self._begun[1] == streams):
            _log.warning("round %d is not what was foreseen: no other is begun ahead of the host", self.number + 1)
            self._begun, self._foresees = None, False
        if self._begun is None:
            self._begin(new, streams)
        drawn, following = fetch(self._begun[2:])
        self._prompts, self.number, self._begun = prompts, self.number + 1, None
        if self._foresees and self.number < self._rounds:
            self._begin(following, [(*stream[:-1], stream[-1] + 1) for stream in streams])
        if self.number == self._rounds:
            self._state = None
        self._engine.spent["decode"] += time.perf_counter() - began
        rows = zip(drawn.tokens.tolist(), drawn.log_probs.tolist(), drawn.count[: len(prompts)].tolist(), strict=False)
        return [sampled(ids[:count], each[:count], self._engine.stop) for ids, each, count in rows]

    def recall(self, prompts: list[list[int]]) -> bool:
        """Reads what a round asked, as `answer` would, without answering. False where `answer` would have said None."""
        if (new := self._told(prompts)) is None:
            return False
        if self.number:  # else they have been read
            self._begin(new, [])
        self._prompts, self.number, self._begun = prompts, self.number + 1, None
        return True

    def _told(self, prompts: list[list[int]]) -> New | None:
        """What these prompts have behind the last ones, as `answer` says. Those of the first round are read here."""
        self._engine.check(prompts)
        if not self.number:
            self._state = self._engine.hand_over(prompts, self._sampling)
            parts, bases = [[]] * len(prompts), [len(prompt) for prompt in prompts]
        else:
            bases = [len(prompt) - self._rewind for prompt in self._prompts]
            parts = [prompt[base:] for prompt, base in zip(prompts, bases, strict=True)]
            before = zip(prompts, self._prompts, bases, strict=True)
            if not all(prompt[:base] == old[:base] for prompt, old, base in before):
                return None
            if not all(0 < len(part) <= self._most for part in parts):
                return None
        tokens = np.zeros((self._rows, self._width), np.int32)
        for row, part in enumerate(parts):
            tokens[row, : len(part)] = part
        none = [0] * (self._rows - len(prompts))
        return New(tokens, np.array([*map(len, parts), *none], np.int32), np.array([*bases, *none], np.int32))

    def _begin(self, new: New, streams: Sequence[Sequence[int]]) -> None:
        """Begins the next round. streams: of its answers; without them nothing is drawn."""
        make_room()
        engine, n, state = self._engine, self._sampling.max_new_tokens, self._state
        size = positions(int((new.base + new.count).max()) + n)
        if size != state.cache.keys[0].shape[3]:
            state = state.replace(cache=resize(state.cache, size, mesh=engine.mesh))
        self._state, *made = live_round(
            engine.weights(self._rows), state, engine.asked(self._rows, streams, self._sampling), self._scripted,
            jax.tree.map(engine.put, new), np.int32(self.number + 1),
            n=n, piece=self._piece, lines=engine.lines(self._rows, self._piece), **engine.static,
        )  # fmt: skip
        self._begun = new, list(streams), *made

    def _on_devices(self, script: Script, spelled: reading.Spelling, longest: int) -> Scripted:
        segments = [[], *script.segments]
        tokens = np.zeros((bucket(len(segments), steps=2, smallest=4), bucket(longest, steps=2, smallest=4)), np.int32)
        for row, segment in enumerate(segments):
            tokens[row, : len(segment)] = segment
        lengths = np.pad(np.array([*map(len, segments)], np.int32), (0, len(tokens) - len(segments)))
        named = reading.options(script.options)
        free = (0, self._rows - self._episodes)
        which = np.pad(script.which + 1, (free, (0, 0), (0, 0)))
        letters = bucket(named.shape[2], steps=1, smallest=8) - named.shape[2]
        named = np.pad(named, (free, (0, 0), (0, letters)))
        put, whole = self._engine.put, self._engine.put_whole
        return Scripted(whole(tokens), whole(lengths), put(which), put(named), spelled, whole(np.int32(script.rewind)))


def _same(one: New, other: New, rows: int) -> bool:
    """Whether the same is appended to the first rows."""

    def told(new: New):
        real = np.arange(new.tokens.shape[1]) < new.count[:, None]
        return [x[:rows] for x in (np.where(real, new.tokens, 0), new.count, new.base)]

    return all(map(np.array_equal, told(one), told(other)))
