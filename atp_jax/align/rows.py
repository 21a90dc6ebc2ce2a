"""How answers lie in the arrays that are trained on: a row is a prompt and, behind its one copy, G answers to it."""

from collections.abc import Sequence

import numpy as np

from atp_jax.generate.engine import bucket

INPUTS = ("prompts", "prompt_lengths", "answers", "lengths")  # the arguments of answer_logprobs, in order
# Buckets, in tokens: the larger the step, the fewer programs are compiled, and the more padding is computed.
PROMPT = {"steps": 4, "smallest": 64, "multiple": 32}  # 64, 96, 128, 160, 192, 224, 256, 320, ...
ANSWER = {"steps": 2, "smallest": 16}  # 16, 24, 32, 48, 64, 96, ...


def rows_of(answers: Sequence[tuple[Sequence[int], Sequence[int]]], group: int) -> dict[str, np.ndarray]:
    """(prompt ids, answer ids) of N x group answers, `group` after one another having the same prompt -> prompts int32
    [N, P], prompt_lengths int32 [N], answers int32 [N, group, C], lengths int32 [N, group]; P and C are buckets."""
    prompts = [prompt for prompt, _ in answers[::group]]
    assert all(list(prompt) == list(prompts[i // group]) for i, (prompt, _) in enumerate(answers))
    lengths = np.array([len(answer) for _, answer in answers], np.int32)
    asked, prompt_lengths = _padded(prompts, PROMPT)
    said, _ = _padded([answer for _, answer in answers], ANSWER)
    return {
        "prompts": asked, "prompt_lengths": prompt_lengths, "answers": said.reshape(len(prompts), group, -1),
        "lengths": lengths.reshape(-1, group),
    }  # fmt: skip


def counted(rows: dict[str, np.ndarray]) -> np.ndarray:
    """1 where a token of an answer stands: float32 [N, group, C]."""
    return (np.arange(rows["answers"].shape[2]) < rows["lengths"][..., None]).astype(np.float32)


def _padded(lines: Sequence[Sequence[int]], ladder: dict) -> tuple[np.ndarray, np.ndarray]:
    """Token ids padded on the right to a bucket, and their lengths."""
    lengths = np.array([len(line) for line in lines], np.int32)
    out = np.zeros((len(lines), bucket(int(lengths.max()), **ladder)), np.int32)
    for row, line in enumerate(lines):
        out[row, : len(line)] = line
    return out, lengths
