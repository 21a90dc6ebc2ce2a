"""How answers lie in the arrays that are trained on: a row is a prompt and, behind its one copy, G answers to it."""

from collections.abc import Sequence

import numpy as np

from atp_jax.generate.engine import bucket

INPUTS = ("prompts", "prompt_lengths", "answers", "lengths")  # the arguments of answer_logprobs, in order
# Buckets, in tokens: the larger the step, the fewer programs are compiled, and the more padding is computed.
PROMPT = {"steps": 4, "smallest": 64, "multiple": 32}  # 64, 96, 128, 160, 192, 224, 256, 320, ...
ANSWER = {"steps": 2, "smallest": 16}  # 16, 24, 32, 48, 64, 96, ...


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


def _padded(lines: Sequence[Sequence[int]], ladder: dict) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded on the right to a bucket, and their lengths."""
    lengths = np.array([len(line) for line in lines], np.int32)
    out = np.zeros((len(lines), bucket(int(lengths.max()), **ladder)), np.int32)
    for row, line in enumerate(lines):
        out[row, : len(line)] = line
    return out, lengths
