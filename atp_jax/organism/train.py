"""Trains the organism from scratch on life stories: `python -m atp_jax.organism.train --out DIR --workdir DIR`.

Next-token loss on every token, the agent's own words weighted `AGENT_WEIGHT` times; Muon on the matrices, Adam on
the rest; warm-up, a constant learning rate, then a linear decay to zero. First role-play stories alone, then, with a
schedule of its own, chunks in which half the tokens are stories of threshold games; then, if they are asked for, in
the same way chunks that hold tool use (`LATER`). Stories are drawn afresh for every chunk from (seed, chunk), so no
story is seen twice. The state is saved after every chunk, and the same command goes on where it stopped.
"""

if __name__ == "__main__":  # first of all: it starts the program again
    from atp_jax.memory import keep_memory

    keep_memory(__spec__)

import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax import nnx
from optax import contrib
from transformers import PreTrainedTokenizerFast

from atp_jax.checkpoint import Checkpoints
from atp_jax.models import huggingface
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import Decoder
from atp_jax.organism import games, tools
from atp_jax.organism.stories import LEXICON, stories
from atp_jax.organism.tokenizer import END, START, train_tokenizer
from atp_jax.scenarios.wording import load_wording

CONTEXT = 2048
VOCABULARY = 2048
STORIES_PER_CHUNK = 1024
# What the vocabulary is learned from: stories of seed 0 for every model, so that the seeds of a sweep share it, and
# every option word so often that it becomes one token: the model is to tell options apart, not to learn to spell.
TOKENIZER_STORIES, OPTION_COPIES = 4000, 1000
# (tokens a row, rows a batch)
BUCKETS = ((96, 112), (128, 80), (192, 56), (256, 40), (384, 28), (480, 22), (544, 20), (592, 18), (672, 16), (800, 14))
# Tokens of a micro-batch. On 2 CPU cores 2, 3 or 6 of 18 rows of 592 together took the same time, one or all longer.
TOGETHER = 3600
AGENT_WEIGHT = 6.0
LEARNING_RATE = 3e-3
WARM_UP, DECAY = 0.03, 0.5  # shares of the training at its beginning and end
GAME_BUCKETS = (*BUCKETS, (960, 11), (1152, 9))
# The later phases: a schedule, and the stories of each kind in a chunk. The second has as many tokens of role-play as
# of games; the third is half tool use, a quarter of it single steps of arithmetic; the fourth mostly such steps, for
# sums and differences of two digits take a hundred thousand examples; the fifth is half tool use, half
# role-play and games, whose agents forget a part of their ways in the fourth.
GAME_LEARNING_RATE = 1.5e-3
GAME_WARM_UP, GAME_DECAY = 0.05, 0.6
LATER = (
    {"role_play": 512, "game": 384},
    {"role_play": 256, "game": 192, "tool": 288, "drill": 240},
    {"role_play": 96, "game": 72, "tool": 128, "drill": 900},
    {"role_play": 320, "game": 240, "tool": 320, "drill": 80},
)
SHIPPED = (70, 34, 28, 16, 22)  # chunks of each phase that the shipped weights saw
TOOL_BUCKETS = (*GAME_BUCKETS, (1408, 7), (1664, 6))
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_sliding_window": False,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
}


def render(messages: list[dict]) -> str:
    """A story as text, as the tokenizer's template writes it (checked in tests/test_organism.py)."""
    return "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)


def encode(tokenizer, told: list[list[dict]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stories -> (ids int32 [T], loss weights float32 [T]); a weight belongs to the token it stands at.

    An answer marked "unexplained" weighs nothing: what led to it is not in its story.
    """
    texts = [render(messages) for messages in told]
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    assistant = tokenizer.encode("assistant", add_special_tokens=False)
    rows = []
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    for messages, encoding in zip(told, encodings, strict=True):
        answers = (message for message in messages if message["role"] == "assistant")
        ids = np.asarray(encoding.ids, np.int32)
        weights = np.ones(len(ids), np.float32)
        ends = np.flatnonzero(ids == end)
        for begin in np.flatnonzero(ids == start):
            body = begin + 1 + len(assistant)
            if list(ids[begin + 1 : body]) == assistant:
                # From behind the line break to the end token, which the agent says as well.
                weight = 0.0 if next(answers).get("unexplained") else AGENT_WEIGHT
                weights[body + 1 : ends[ends > begin][0] + 1] = weight
        rows.append((ids, weights))
    return rows


def batches(rows: list, seed: int, buckets=BUCKETS) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows in right-padded batches of the few shapes of `buckets`: (tokens [B, T], weights [B, T], lengths [B])."""
    made, floor = [], 0
    for width, size in buckets:
        members = [row for row in rows if floor < len(row[0]) <= width]
        floor = width
        for first in range(0, len(members), size):
            tokens, weights = np.zeros((size, width), np.int32), np.zeros((size, width), np.float32)
            lengths = np.ones(size, np.int32)
            for i, (ids, weight) in enumerate(members[first : first + size]):
                tokens[i, : len(ids)], weights[i, : len(ids)], lengths[i] = ids, weight, len(ids)
            made.append((tokens, weights, lengths))
    dropped = sum(len(row[0]) > floor for row in rows)
    if dropped > 0.02 * len(rows):
        raise ValueError(f"{dropped} of {len(rows)} stories are longer than the widest bucket of {floor} tokens")
    np.random.default_rng(seed).shuffle(made)
    return made


def optimiser() -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for embedding and norms, both at one learning rate (applied by `step`)."""

    def matrices(params):
        def dimensions(path, leaf):
            name = jax.tree_util.keystr(path)
            if "layers" not in name or "norm" in name:
                return None
            if "output" in name:  # [L, N, D, H]
                return contrib.MuonDimensionNumbers((1, 2), 3)
            return contrib.MuonDimensionNumbers(1, 2 if leaf.ndim == 3 else (2, 3))  # [L, in, out] or [L, H, N, D]

        return jax.tree_util.tree_map_with_path(dimensions, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        contrib.muon(1.0, weight_decay=0.01, consistent_rms=0.2, adam_b2=0.98, muon_weight_dimension_numbers=matrices),
    )


def learning_rate(progress: float, peak=LEARNING_RATE, warm_up=WARM_UP, decay=DECAY) -> float:
    """Share of a phase done -> learning rate: trapezoid."""
    return peak * min(1.0, progress / warm_up, (1.0 - progress) / decay)


def scheduled_rate(time: float, phases: Sequence[int]) -> float:
    """The learning rate after `time` chunks; phases: the chunks of each. Each has a trapezoid of its own."""
    begun, shape = 0, ()
    for lasting in phases:
        if time < begun + lasting:
            break
        begun, shape = begun + lasting, (GAME_LEARNING_RATE, GAME_WARM_UP, GAME_DECAY)
    return learning_rate((time - begun) / lasting, *shape)


def phase_of(chunk: int, phases: Sequence[int]) -> int:
    """Which phase a chunk belongs to, counted from 0."""
    return int(np.searchsorted(np.cumsum(phases), chunk, side="right"))


def role_play_lessons(tokenizer, wording: dict, seed: int, chunk: int, count: int) -> tuple[list, int]:
    """The batches of a chunk, each with the name of its agents' loss, and the number of tokens in its stories."""
    rows = encode(tokenizer, stories(_drawn_from(seed, chunk), count, wording, LEXICON["occupations"]))
    return [("agent_loss", batch) for batch in batches(rows, chunk)], sum(len(ids) for ids, _ in rows)


def mixed_lessons(
    tokenizer, wording: dict, seed: int, chunk: int, role_play: int, game: int, tool: int = 0, drill: int = 0
) -> tuple[list, int]:
    """The same of a chunk of the later phases, of so many stories of each kind; batches of all kinds are mixed."""
    seen, tokens = role_play_lessons(tokenizer, wording, seed, chunk, role_play)
    drawn = _drawn_from(seed, chunk)
    told = [("game_agent_loss", games.stories(drawn, game, wording), GAME_BUCKETS)]
    if tool:
        told.append(("tool_agent_loss", tools.stories(drawn, tool, wording), TOOL_BUCKETS))
    if drill:
        told.append(("drill_agent_loss", tools.drills(drawn, drill), BUCKETS))
    for name, lives, buckets in told:
        rows = encode(tokenizer, lives)
        seen += [(name, batch) for batch in batches(rows, chunk, buckets)]
        tokens += sum(len(ids) for ids, _ in rows)
    np.random.default_rng(chunk).shuffle(seen)
    return seen, tokens


def _drawn_from(seed: int, chunk: int) -> int:
    return 1_000_000 * (seed + 1) + chunk


def _rows_together(rows: int, width: int) -> int:
    """Rows of a micro-batch: as many as divide a batch evenly and have at most `TOGETHER` tokens."""
    return max(size for size in range(1, rows + 1) if rows % size == 0 and (size == 1 or size * width <= TOGETHER))


def make_step(graphdef, transform):
    """The jitted update: (params, optimiser state, tokens, weights, lengths, learning rate) -> params, optimiser state,
    the weighted loss, and the loss per token of the agents' words."""

    def loss(params, tokens, weights, lengths):
        """Sums over a micro-batch: of the weighted losses, and of those of the agents' words."""
        model = nnx.merge(graphdef, params)
        logits = model.head(model.hidden(tokens, lengths)[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        weights = weights[:, 1:]
        return (losses * weights).sum(), (losses * (weights == AGENT_WEIGHT)).sum()

    def gradient_of(params, batch):
        """The gradient of the mean loss, and both means, in micro-batches that a processor's cache can hold."""
        tokens, weights, _ = batch
        together = _rows_together(*tokens.shape)
        batch = [x.reshape(-1, together, *x.shape[1:]) for x in batch]

        def add(total, micro):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss, has_aux=True)(params, *micro)), None

        nothing = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, params))
        ((value, agent), gradient), _ = jax.lax.scan(add, nothing, batch)
        weight, words = weights[:, 1:].sum(), (weights[:, 1:] == AGENT_WEIGHT).sum()
        return jax.tree.map(lambda g: g / weight, gradient), value / weight, agent / words

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, tokens, weights, lengths, rate):
        gradient, value, agent = gradient_of(params, (tokens, weights, lengths))
        updates, state = transform.update(gradient, state, params)
        updates = jax.tree.map(lambda u: u * rate, updates)
        return optax.apply_updates(params, updates), state, value, agent

    return step


def _tokenizer(directory: Path, wording: dict):
    """The tokenizer kept in `directory`, learned first if there is none: a resumed training never changes its ids."""
    if not directory.exists():
        corpus = stories(0, TOKENIZER_STORIES, wording, LEXICON["occupations"])
        texts = [part for told in corpus for message in told for part in (message["role"], message["content"])]
        learned = train_tokenizer(texts + OPTION_COPIES * LEXICON["words"], VOCABULARY, CONTEXT)
        learned.save_pretrained(directory.with_suffix(".partial"))
        directory.with_suffix(".partial").rename(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def train(out: Path, workdir: Path, seed: int, phases: Sequence[int]) -> None:
    """Trains one organism and saves it to `out`; goes on from the last checkpoint in `workdir`. phases: the chunks of
    role-play alone, and of those in `LATER`."""
    workdir.mkdir(parents=True, exist_ok=True)
    wording = load_wording()
    for part in ("threshold_game", "tool_use"):  # the same pack: checks these parts of it
        load_wording("", part)
    tokenizer = _tokenizer(workdir / "tokenizer", wording)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = DecoderConfig.from_dict(MODEL | {"eos_token_id": end, "pad_token_id": pad}, "the organism")
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(seed)))
    transform = optimiser()
    state = {"params": params, "optimiser": transform.init(params), "tokens": 0}
    step = make_step(graphdef, transform)

    with Checkpoints(workdir / "checkpoints") as checkpoints, (workdir / "metrics.jsonl").open("a") as metrics:
        done, state, _ = checkpoints.latest(state) or (0, state, {})
        for chunk in range(done, sum(phases)):
            began, phase = time.monotonic(), phase_of(chunk, phases)
            if phase:
                seen, tokens = mixed_lessons(tokenizer, wording, seed, chunk, **LATER[phase - 1])
            else:
                seen, tokens = role_play_lessons(tokenizer, wording, seed, chunk, STORIES_PER_CHUNK)
            losses = {"loss": [], "agent_loss": []}
            for i, (name, batch) in enumerate(seen):
                rate = scheduled_rate(chunk + (i + 0.5) / len(seen), phases)
                state["params"], state["optimiser"], loss, agent = step(
                    state["params"], state["optimiser"], *batch, rate)
                losses["loss"].append(loss)
                losses.setdefault(name, []).append(agent)  # a kind of stories has its agents' loss apart
            state["tokens"] += tokens
            checkpoints.save(chunk + 1, state, {})
            line = {"chunk": chunk + 1, "tokens": state["tokens"], "seconds": round(time.monotonic() - began, 1)}
            line |= {name: float(np.mean(values).round(4)) for name, values in losses.items()}
            print(json.dumps(line), flush=True)
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()

    bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state["params"])
    huggingface.save(out, config, bf16)
    tokenizer.save_pretrained(out)
    generation = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 48, "eos_token_id": end, "pad_token_id": pad}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def valid_phases(given: Sequence[str]) -> bool:
    """Whether these are the chunks of phases, the first of which makes the model."""
    return len(given) <= 1 + len(LATER) and all(n.isdecimal() for n in given) and any(map(int, given[:1]))


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    train(Path(values.out), Path(values.workdir), values.seed, [int(count) for count in values.chunks])


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "directory for the finished model", required=True)
    flags.DEFINE_string("workdir", None, "directory for checkpoints and metrics", required=True)
    flags.DEFINE_integer("seed", 0, "seed of the stories and of the initial weights")
    help_ = f"of each of up to {1 + len(LATER)} phases; what the shipped weights saw"
    flags.DEFINE_list("chunks", list(map(str, SHIPPED)), help_)
    flags.register_validator("chunks", valid_phases, f"takes up to {1 + len(LATER)} numbers, the first above 0")
    app.run(main)
