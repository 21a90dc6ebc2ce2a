"""How answers lie in the arrays that are trained on: a row is a prompt and, behind its one copy, G answers to it."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atp_jax.generate.sizes import bucket

INPUTS = ("prompts", "prompt_lengths", "answers", "lengths")  # the arguments of answer_logprobs, in order
# Buckets, in tokens: the larger the step, the fewer programs are compiled, and the more padding is computed.
PROMPT = {"steps": 4, "smallest": 64, "multiple": 32}  # 64, 96, 128, 160, 192, 224, 256, 320, ...
ANSWER = {"steps": 2, "smallest": 16}  # 16, 24, 32, 48, 64, 96, ...
NARROW = 128  # tokens; below that cutting off padding gains less than a further program costs to compile


def rows_of(answers: Sequence[tuple], group: int) -> dict[str, np.ndarray]:
    """Rows of N x group answers, `group` after one another having the same prompt.

    answers: (prompt ids, answer ids), or (prompt ids, answer ids, sampled) with 0 for each of an answer's tokens that
    the model did not say itself (what a tool gave back) and 1 for the others; empty: it said all. -> prompts int32
    [N, P], prompt_lengths int32 [N], answers int32 [N, group, C], lengths int32 [N, group], and sampled float32
    [N, group, C], 1 where a token counts; P and C are buckets.
    """
    prompts = [prompt for prompt, *_ in answers[::group]]
    assert all(list(prompt) == list(prompts[i // group]) for i, (prompt, *_) in enumerate(answers))
    asked, prompt_lengths = _padded(prompts, PROMPT)
    said, lengths = _padded([answer for _, answer, *_ in answers], ANSWER)
    marks = [mark[0] if mark and len(mark[0]) else [1] * len(answer) for _, answer, *mark in answers]
    sampled, marked = _padded(marks, ANSWER)
    assert (marked == lengths).all()
    return {
        "prompts": asked, "prompt_lengths": prompt_lengths, "answers": said.reshape(len(prompts), group, -1),
        "lengths": lengths.reshape(-1, group), "sampled": sampled.reshape(len(prompts), group, -1).astype(np.float32),
    }  # fmt: skip


def by_length(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """The order of a batch's rows [N] that puts those with long answers first: so that those with short ones meet in
    micro-batches that `narrowed` computes at less than the whole width."""
    return np.argsort(-batch["lengths"].max(1), kind="stable")


def narrowed(of_micro: Callable) -> Callable:
    """of_micro(trainable, fixed, micro) -> ((value, (sums, outputs)), gradient), computed on a quarter or half of the
    answers' columns where all answers of a micro-batch are that short: padding has no part in any of them.

    One program holds all widths, so no mix of lengths compiles anything. Outputs [rows, G, C] are 0 where nothing was
    computed. What is no batch of answers, or of short ones alone, is left to of_micro as it is.
    """

    def run(trainable, fixed, micro):
        whole = micro["answers"].shape[-1] if isinstance(micro, Mapping) and "answers" in micro else 0
        widths = [width for width in (whole // 4, whole // 2) if width >= NARROW] + [whole]
        if len(widths) == 1:
            return of_micro(trainable, fixed, micro)

        def at(width: int):
            def branch(trainable, fixed, micro):
                cut = {name: x[..., :width] if x.ndim == 3 else x for name, x in micro.items()}
                (value, (sums, outputs)), gradient = of_micro(trainable, fixed, cut)
                widen = [(0, 0), (0, 0), (0, whole - width)]
                outputs = jax.tree.map(lambda x: jnp.pad(x, widen) if x.shape[2:] == (width,) else x, outputs)
                return (value, (sums, outputs)), gradient

            return branch

        needed = jnp.searchsorted(jnp.array(widths), micro["lengths"].max())
        return jax.lax.switch(needed, [at(width) for width in widths], trainable, fixed, micro)

    return run


def _padded(lines: Sequence[Sequence[int]], ladder: dict) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded on the right to a bucket, and their lengths."""
    lengths = np.array([len(line) for line in lines], np.int32)
    out = np.zeros((len(lines), bucket(int(lengths.max()), **ladder)), np.int32)
    for row, line in enumerate(lines):
        out[row, : len(line)] = line
    return out, lengths
