"""Whole answers for a batch of prompts: prefill in buckets, decode in chunks, the cache kept from round to round.

Every array that reaches the device has a shape from a small ladder (rows, new tokens, cache positions), and everything
that differs between rows is an array, so new text, settings and seeds compile nothing new.

What is kept of a batch is its prompts. The keys and values of an answer are computed again when the next prompt, which
contains the answer, is appended. So the cache is a function of the sequence of prompts and of nothing else, and a run
that was interrupted rebuilds it bit for bit by prefilling the same prompts, without decoding a token. Where answers are
followed one by one (`generate(follow=)`) no such promise is made, and what was decoded is kept as well.
"""

import collections
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from atp_jax.compilations import make_room
from atp_jax.errors import UserError
from atp_jax.generate.programs import (
    Asked,
    State,
    Weights,
    decode_chunk,
    empty_state,
    prefill_chunk,
    resize,
    share,
    spread,
    take,
)
from atp_jax.generate.sampling import Sampling
from atp_jax.generate.sizes import batch_rows, bucket, common_prefix, positions
from atp_jax.generate.wanted import Next, Sampled, Wanted, per_row
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import abstract
from atp_jax.models.lora import Lora
from atp_jax.parallel import fetch, named_sharding, put, row_shards, sampling_layout, spare_memory

CHUNK = 64  # tokens decoded between two looks of the host
SHRINK, FEWEST = 4, 16  # a batch of more than 16 rows shrinks when only a quarter of them is left
# Tokens of all rows in one prefill step: bounds the memory of activations, which on a CPU should stay in its caches.
PREFILL_TOKENS = {"cpu": 2**12, "other": 2**14}
NARROWEST, WIDEST = 16, 1024  # new tokens of a row in one prefill step
SHARED = 128  # tokens from which on groups of rows share their prompt; copies of a shorter one are read as quickly
# Of the memory for caches, what a batch may fill: a quarter of its rows may be decoded on in a copy (SHRINK), and while
# a cache moves to another size one layer of it lies in memory twice.
CACHES = 0.75


class Engine:
    """Answers prompts with one model, as many at a time as fit, and remembers them for the next batch if all did.

    Row i of a batch takes over what it shares with row i of the batch before (the longest common prefix of their ids),
    if both batches fill the same bucket of rows; whether a row is still the same episode makes no difference to what
    is answered, only to how much of it is new. Fewer prompts, each of which goes on from a row's, are answered in these
    rows, and the others keep what they hold.

    Prompts that do not all fit wait for a free row: a row whose answer is complete leaves, the next prompt enters. So
    does a row that has to give way because the others' caches grew; it comes back with what it had answered.

    Batches follow one another in lockstep, or not: `generate` can be told at each complete answer what to answer next
    (`follow`), so that no row waits for the longest answer of a batch.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params,
        stop: Sequence[int],
        mesh: jax.sharding.Mesh,
        lora: Lora | None = None,
        memory: int | None = None,
    ):
        """params: the parameters of a Decoder of this config, on this mesh. stop: ids that end an answer. lora: the
        adapters that its rows can wear. memory: bytes that caches may take on all devices together; None: what the
        devices have beside the weights."""
        self.config = config
        self.stop = frozenset(stop)
        self.mesh = mesh
        graphdef, _ = abstract(config)
        self.static = {"graphdef": graphdef, "mesh": mesh}
        self._dtype = jax.tree.leaves(params)[0].dtype
        self._prompts: list[list[int]] = []  # what the rows of the state hold
        self._worn: list[int] = []  # and the adapters they wore
        self._state: State | None = None
        # Seconds of `generate`, "prefill" and "decode", and of changes of "layout" (parallel.py). Of rounds that are
        # begun ahead all but the first prompts is "decode".
        self.spent: collections.Counter = collections.Counter()
        self.load(params, lora)
        held = params, lora, self.params, self.lora  # in slices, and whole where sampling wants them whole
        self.memory = spare_memory(held, mesh) if memory is None else memory

    def forget(self) -> None:
        """The next batch starts anew; the memory of the cache is free until then."""
        self._state, self._prompts = None, []

    def load(self, params, lora: Lora | None) -> None:
        """Other weights of the same shapes from now on; nothing is remembered, nothing compiled anew."""
        (self.params, self.lora), seconds = sampling_layout((params, lora), self.mesh)
        self.spent["layout"] += seconds
        self.forget()

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        adapter: Sequence[int] | None = None,
        rows: int | None = None,
    ) -> list[int]:
        """What `generate` does before it draws anything, with the same shapes: remembers these prompts, if they fit.
        -> the row of each; none where they do not fit.

        Raises UserError for an empty prompt, ids outside the vocabulary, and a prompt that fills the model's context.
        """
        prompts = [list(prompt) for prompt in prompts]
        self.check(prompts)
        places = self._going_on(prompts, adapter)
        texts, worn = (list(self._prompts), list(self._worn)) if places else (prompts, [0] * len(prompts))
        places, budgets = places or list(range(len(prompts))), np.zeros(len(texts), np.int32)
        budgets[places] = self._budgets(prompts, sampling)
        for row, prompt, one in zip(places, prompts, adapter or [0] * len(prompts), strict=True):
            texts[row], worn[row] = prompt, one
        if not self._all_fit(texts, budgets, rows):
            self.forget()
            return []
        rows, size = self.rows(len(texts)), self._cache_size([len(text) for text in texts], budgets)
        state, old = self._take(rows, size)

        kept = np.zeros(len(texts), np.int32)
        for row, (before, now) in enumerate(zip(old, texts, strict=False)):
            if self._worn[row] == worn[row]:  # keys and values are those of the adapter they were made with
                kept[row] = common_prefix(before, now)
        # One token at least is new: its hidden state is what the answer starts from.
        kept[places] = np.minimum(kept[places], [len(prompt) - 1 for prompt in prompts])
        alike = list(zip(map(tuple, texts), worn, strict=True))
        if kept.any() or 2 * len(set(alike)) > len(texts):
            weights, lengths = self.weights(rows, None if adapter is None else worn), np.zeros(rows, np.int32)
            lengths[: len(texts)] = kept
            state = self._append(weights, state, lengths, dict(enumerate(texts)))
        else:
            state = None  # its memory is free for the rows that are computed
            state = self._read_once(alike, adapter is not None, budgets)
        self._state, self._prompts, self._worn = state, texts, worn
        return places

    def _read_once(self, alike: list[tuple[tuple[int, ...], int]], adapted: bool, budgets: np.ndarray) -> State:
        """Rows of which many start alike (a GRPO group, the agents of a game), each prompt computed once. alike: prompt
        and adapter of each. Groups of one size that follow one another share what was read, others get copies."""
        lengths, new = [len(text) for text, _ in alike], budgets.tolist()
        longest = max(lengths), max(new), max(map(sum, zip(lengths, new, strict=True)))
        group = math.gcd(*(len(list(run)) for _, run in itertools.groupby(alike)))
        together = shares(len(alike), group, *longest, shards=row_shards(self.mesh))
        heads = alike[::group] if together else list(dict.fromkeys(alike))
        rows, few, size = self.rows(len(alike)), self.rows(len(heads)), self._cache_size(lengths, new)
        place = {one: index for index, one in enumerate(heads)}
        source = np.zeros(rows, np.int32)
        source[: len(alike)] = np.arange(rows) // group if together else [place[one] for one in alike]
        nothing = empty_state(self.config, few, positions(longest[0]) if together else size, self._dtype, self.mesh)
        weights = self.weights(few, [one for _, one in heads] if adapted else None)
        filled = self._append(weights, nothing, np.zeros(few, np.int32), {i: text for i, (text, _) in enumerate(heads)})
        if together:
            own = self._cache_size([0], [max(new)])
            return share(filled, self.put(source), own, config=self.config, mesh=self.mesh)
        return take(filled, self.put(source), mesh=self.mesh)

    def hand_over(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> State:
        """A state whose rows have read these prompts, all of which fit, and share nothing. Nothing is remembered."""
        began = time.perf_counter()
        self.forget()
        if not self.prefill(prompts, sampling):
            raise ValueError("not all of these prompts fit")
        size = self._cache_size([len(prompt) for prompt in prompts], self._budgets(prompts, sampling))
        state, _ = self._take(self.rows(len(prompts)), size)
        self.spent["prefill"] += time.perf_counter() - began
        return state

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        streams,
        adapter: Sequence[int] | None = None,
        rows: int | None = None,
        follow: Callable[[int, Sampled], Iterable[Next]] | None = None,
    ) -> list[Sampled]:
        """Answers prompts (lists of token ids), any number of them.

        sampling: one Sampling, or one a prompt. streams: integers [prompts, 5], what the randomness of each is folded
        from (seed, condition, episode, agent, round). adapter: which of the adapters each wears, -1 none; None: all
        wear the one there is. rows: at most so many are answered at a time (None: as memory allows). An answer ends at
        a stop id, after max_new_tokens, or where the model's context ends. Raises UserError like `prefill`.

        follow: called with the place of each answer and the answer, as soon as the host sees that it is complete; what
        it gives back is answered as well, before anything that waits, with places counted on, `sampling` being one for
        all. What a row has read of the prompt before, and said, is kept for the one that goes on from it (one at most),
        unless the batch shrinks or others enter the row before that one is there. Nothing is remembered afterwards.
        """
        began = time.perf_counter()
        places = self.prefill(prompts, sampling, adapter, rows)
        jax.block_until_ready(self._state)
        self.spent["prefill"] += time.perf_counter() - began

        wanted = Wanted(prompts, per_row(sampling, prompts), streams, self._budgets(prompts, sampling), adapter)
        state, self._state = self._state, None  # donated from here on, ours again when the answers are complete
        remembered = state is not None and follow is None
        held, waiting = [], collections.deque(range(len(prompts)))
        if state is not None:
            held = [-1] * state.length.shape[0]
            for row in places:
                held[row] = waiting.popleft()
        while waiting or any(map(wanted.alive, held)):
            make_room()
            keep = remembered and self._state is None
            before, (state, held) = state, self._fit(state, held, waiting, wanted, rows, keep)
            if keep and state.length.shape != before.length.shape:
                self._state = before  # few rows are left, and decoded on in a copy
            state = self._admit(state, held, waiting, wanted)
            state, ended = self._decode(state, held, bool(waiting or follow), wanted)
            if follow is not None:
                new = [one for place in ended for one in follow(place, wanted.answer(place, self.stop))]
                waiting.extendleft(reversed(self._enlist(new, sampling, wanted)))
        if not remembered:
            self.forget()
        elif self._state is None:
            self._state = state
        return [wanted.answer(one, self.stop) for one in range(len(wanted.prompts))]

    def _enlist(self, new: list[Next], sampling: Sampling, wanted: Wanted) -> list[int]:
        """What follows becomes a part of what is wanted. -> the places"""
        prompts = [one.prompt for one in new]
        if new:
            self.check(prompts)
        budgets = self._budgets(prompts, sampling)
        return [wanted.add(one, int(budget), sampling) for one, budget in zip(new, budgets, strict=True)]

    def _fit(
        self, state: State | None, held: list[int], waiting: collections.deque, wanted: Wanted, rows, keep: bool
    ):
        """The state that the next chunk is decoded in, and what its rows hold (which prompt, -1 none). keep: the state
        that was given stays where the rows become others.

        The cache grows when a row needs it; rows for which there is no memory then give way and wait. The number of
        rows follows what is wanted and fits, where that is worth a copy: twice as many, or a quarter. Groups that share
        come apart there, and where others are to enter.
        """
        alive = sorted(filter(wanted.alive, held))
        size = self._cache_size(*zip(*(wanted.size(one) for one in (*alive, *waiting)), strict=True))
        limit = self._most(size, rows)
        most = min(limit, len(alive) + len(waiting))
        while most > 1 and self.rows(most) > limit:
            most -= 1
        for one in reversed(alive[most:]):
            waiting.appendleft(one)
            held[held.index(one)] = -1
        want, have = self.rows(most), len(held)
        if state is None:
            return empty_state(self.config, want, size, self._dtype, self.mesh), [-1] * want
        if want >= 2 * have or want < have > limit or (have > FEWEST and want * SHRINK <= have):
            places = [row for row, one in enumerate(held) if wanted.alive(one)]
            more = {wanted.after[one] for one in waiting}  # these go on from what rests in their row
            resting = [row for row, one in enumerate(held) if one in more and not wanted.alive(one)]
            places += resting[: want - len(places)]
            source = np.zeros(want, np.int32)
            source[: len(places)] = places
            held = [held[row] for row in places] + [-1] * (want - len(places))
            if state.shared is not None:
                return spread(state, self.put(source), size, mesh=self.mesh, keep=keep), held
            if waiting and size < state.cache.keys[0].shape[3]:  # first, for there may be no room for more rows so long
                state = state.replace(cache=resize(state.cache, size, mesh=self.mesh))
            state = take(state, self.put(source), mesh=self.mesh, keep=keep)
        if state.shared is not None and waiting:
            size = self._cache_size(*zip(*(wanted.size(one) for one in (*held, *waiting) if one >= 0), strict=True))
            return spread(state, self.put(np.arange(have, dtype=np.int32)), size, mesh=self.mesh), held
        if state.shared is not None:
            drawn = [len(wanted.tokens[one]) for one in alive]
            size = self._cache_size(drawn, [wanted.budgets[one] - done for one, done in zip(alive, drawn, strict=True)])
        if size > state.cache.keys[0].shape[3]:
            state = state.replace(cache=resize(state.cache, size, mesh=self.mesh))
        return state, held

    def _admit(self, state: State, held: list[int], waiting: collections.deque, wanted: Wanted) -> State:
        """Waiting prompts, and rows that gave way, enter the rows that are free."""
        began, entering = time.perf_counter(), {}
        lengths = np.array([wanted.size(one)[0] if one >= 0 else 0 for one in held], np.int32)
        free = [row for row, one in enumerate(held) if not wanted.alive(one)]
        resting = {held[row]: row for row in free if held[row] >= 0}
        chosen = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
        own = {one: resting.pop(wanted.after[one]) for one in chosen if wanted.after[one] in resting}
        taken = set(own.values())
        others = sorted((row for row in free if row not in taken), key=lambda row: held[row] in resting)
        others = iter(others)  # first those that hold nothing: what rests may be wanted yet
        for one in chosen:
            row = own[one] if one in own else next(others)
            lengths[row] = wanted.kept(one) if one in own else 0
            if wanted.after[one] is not None:
                wanted.prompts[wanted.after[one]] = ()  # a long run has many
            held[row], entering[row] = one, [*wanted.prompts[one], *wanted.tokens[one]]
        if entering:
            state = self._append(self.weights(len(held), wanted.worn(held)), state, lengths, entering)
            jax.block_until_ready(state)
            self.spent["prefill"] += time.perf_counter() - began
        return state

    def _decode(self, state: State, held: list[int], more: bool, wanted: Wanted) -> tuple[State, list[int]]:
        """One chunk -> the answers that it completed; what their rows hold rests there until others enter. It ends
        early when a quarter of the rows is free and there are more prompts, or when so few are left that the batch
        shrinks."""
        began, alive = time.perf_counter(), sum(map(wanted.alive, held))
        quarter, few = len(held) // SHRINK, 0
        if more:
            few = max(alive - max(quarter, 1), 0)
        elif len(held) > FEWEST and alive > quarter:
            few = quarter
        weights, asked = self.weights(len(held), wanted.worn(held)), self._ask(held, wanted)
        state, *drawn = decode_chunk(weights, state, asked, np.int32(few), CHUNK, **self.static)
        produced, done, tokens, log_probs = fetch(drawn)
        ended = []
        for row, one in enumerate(held):
            if wanted.alive(one):
                fresh = produced[row] - len(wanted.tokens[one])
                wanted.tokens[one] += tokens[row, :fresh].tolist()
                wanted.log_probs[one] += log_probs[row, :fresh].tolist()
                if done[row]:
                    ended.append(one)
        wanted.ended.update(ended)
        self.spent["decode"] += time.perf_counter() - began
        return state, ended

    def _append(self, weights: Weights, state: State, lengths: np.ndarray, entries: dict[int, list[int]]) -> State:
        """Brings rows to what they shall hold. lengths int32 [B]: so much of each row stays. entries: row -> its ids,
        of which those behind that length are read; the other rows stay as they are.

        Rows with about as many new tokens are read together, so that little is padded.
        """
        state, lengths = state.replace(length=self.put(lengths)), lengths.copy()
        shards, batch, size = row_shards(self.mesh), len(lengths), state.cache.keys[0].shape[3]
        while left := {row: len(ids) - int(lengths[row]) for row, ids in entries.items() if len(ids) > lengths[row]}:
            # Each device reads rows of its own, the longest first.
            order = sorted(left, key=lambda row: (-min(left[row], WIDEST), row))
            queues = [[row for row in order if row // (batch // shards) == shard] for shard in range(shards)]
            most = bucket(max(map(len, queues)), steps=1, smallest=1)
            while any(queues):
                longest = min(max(left[queue[0]] for queue in queues if queue), WIDEST)
                width = min(bucket(longest, steps=2, smallest=NARROWEST), size)
                lines = min(most, self._lines(width))
                group = [[*queue[:lines], *[batch] * (lines - len(queue))] for queue in queues]
                queues = [queue[lines:] for queue in queues]
                rows = np.array(group, np.int32).reshape(-1)
                tokens, count = np.zeros((len(rows), width), np.int32), np.zeros(len(rows), np.int32)
                past = 0  # the longest of them
                for line, row in enumerate(rows):
                    if row < batch:
                        begin = lengths[row]
                        count[line] = min(left[row], width)
                        tokens[line, : count[line]] = entries[row][begin : begin + count[line]]
                        past = max(past, int(begin))
                        lengths[row] += count[line]
                past = min(positions(past), size) if past else 0
                arrays = (self.put(array) for array in (rows, tokens, count))
                state = prefill_chunk(weights, state, *arrays, past=past, **self.static)
        return state

    def _going_on(self, prompts: list[list[int]], adapter: Sequence[int] | None) -> list[int]:
        """The row of each prompt, where fewer are asked than are remembered and each begins with what a row holds (the
        first of those that hold the same), in the order of the rows; else none, and all is read anew. So the agents
        that call a tool go on in their rows while the others wait for the round to end."""
        found: list[int] = []
        if self._state is None or len(prompts) >= len(self._prompts):
            return found
        worn = adapter or [0] * len(prompts)
        for row, before in enumerate(self._prompts):
            one = len(found)
            if one < len(prompts) and self._worn[row] == worn[one] and prompts[one][: len(before)] == before:
                found.append(row)
        return found if len(found) == len(prompts) else []

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """UserError for what `prefill` refuses."""
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

    def rows(self, needed: int) -> int:
        """Rows of a batch that holds so many: a bucket."""
        return batch_rows(needed, row_shards(self.mesh))

    def _cache_size(self, lengths, budgets) -> int:
        """Positions that rows of these lengths need until the host looks again, rounded up to a bucket."""
        needed = max(int(length) + min(int(budget), CHUNK) for length, budget in zip(lengths, budgets, strict=True))
        return positions(needed)

    def _most(self, size: int, rows: int | None) -> int:
        """How many rows with a cache of this size fit."""
        most = rows or 2**31
        if self.memory is not None:
            config = self.config
            position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(self._dtype).itemsize
            most = min(most, int(CACHES * self.memory) // (size * position))
        return max(most, 1)

    def _all_fit(self, prompts, budgets, rows: int | None) -> bool:
        """Whether all prompts can be answered at a time, also if all answers become as long as they may."""
        longest = max(len(prompt) + int(budget) for prompt, budget in zip(prompts, budgets, strict=True))
        return self.hold(len(prompts), longest, rows)

    def hold(self, answers: int, longest: int, rows: int | None) -> bool:
        """Whether so many rows of so many ids can be answered at a time. rows: no more than these."""
        needed = self.rows(answers)
        return (rows is None or needed <= rows) and needed <= self._most(positions(longest), None)

    def lines(self, rows: int, width: int) -> int:
        """Rows of so many that are read in one step with so many new tokens each, the same of each device."""
        shards = row_shards(self.mesh)
        return shards * min(rows // shards, self._lines(width))

    def _lines(self, width: int) -> int:
        """Of one device."""
        tokens = PREFILL_TOKENS.get(self.mesh.devices.flat[0].platform, PREFILL_TOKENS["other"])
        return 2 ** (max(tokens // width, 1).bit_length() - 1)

    def _take(self, rows: int, size: int) -> tuple[State, list[list[int]]]:
        """A state of this shape, and the prompts its rows hold. The cache never depends on what was answered: a longer
        answer made it grow, and the next round cuts it back."""
        state, old, self._state, self._prompts = self._state, self._prompts, None, []
        if state is None or state.length.shape[0] != rows:
            return empty_state(self.config, rows, size, self._dtype, self.mesh), []
        if state.shared is not None:
            return spread(state, self.put(np.arange(rows, dtype=np.int32)), size, mesh=self.mesh), old
        if state.cache.keys[0].shape[3] != size:
            state = state.replace(cache=resize(state.cache, size, mesh=self.mesh))
        return state, old

    def asked(self, rows: int, streams: Sequence[Sequence[int]], sampling: Sampling) -> Asked:
        """What is asked of the first rows, one a stream; of the others nothing."""
        count = len(streams)
        wanted = Wanted([[]] * count, [sampling] * count, streams, np.full(count, sampling.max_new_tokens), None)
        return self._ask([*range(count), *[-1] * (rows - count)], wanted)

    def _ask(self, held: list[int], wanted: Wanted) -> Asked:
        alive = [one for one in held if wanted.alive(one)]
        real = np.array([wanted.alive(one) for one in held])

        def by_row(values, dtype, *shape):
            values = np.asarray(values).reshape(-1, *shape)
            out = np.zeros((len(held), *values.shape[1:]), dtype)
            out[real] = values
            return self.put(out)

        stop = np.full(bucket(len(self.stop), steps=1, smallest=4), -1, np.int32)
        stop[: len(self.stop)] = sorted(self.stop)
        return Asked(
            streams=by_row([wanted.streams[one] for one in alive], np.uint32, 5),
            budget=by_row([wanted.budgets[one] for one in alive], np.int32),
            temperature=by_row([wanted.sampling[one].temperature for one in alive], np.float32),
            top_k=by_row([wanted.sampling[one].top_k for one in alive], np.int32),
            top_p=by_row([wanted.sampling[one].top_p for one in alive], np.float32),
            produced=by_row([len(wanted.tokens[one]) for one in alive], np.int32),
            done=self.put(~real),
            stop=self.put_whole(stop),
        )

    def weights(self, rows: int, adapter: Sequence[int] | None = None) -> Weights:
        if adapter is None:
            return Weights(self.params, self.lora)
        count = 0 if self.lora is None else int(self.lora.owner.max()) + 1
        if wrong := [index for index in adapter if not -1 <= index < count]:
            raise UserError(f"adapter {wrong[0]}: there are {count}, counted from 0; -1 is none")
        worn = np.full(rows, -1, np.int32)
        worn[: len(adapter)] = adapter
        return Weights(self.params, self.lora, self.put(worn))

    def put(self, rows: np.ndarray) -> jax.Array:
        """An array on the devices, to each its rows."""
        return put(rows, named_sharding(self.mesh, "batch"))

    def put_whole(self, values: np.ndarray) -> jax.Array:
        """An array on the devices, on each the whole."""
        return put(values, NamedSharding(self.mesh, PartitionSpec()))


def shares(rows: int, group: int, prompt: int, new: int, whole: int, *, shards: int) -> bool:
    """Whether groups of this size share their prompts while `rows` answers are drawn: where it pays, where batches have
    so many rows and groups, so that nothing is padded, and where it takes no more memory than copies. prompt, new,
    whole: tokens of the longest prompt, of the longest answer, and of both in one row, at most."""
    groups = rows // group
    padded = any(batch_rows(count, shards) != count for count in (rows, groups))
    apart = rows * positions(whole)
    return group > 1 and prompt >= SHARED and not padded and groups * positions(prompt) + rows * positions(new) <= apart
