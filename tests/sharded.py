"""What a mesh must not change, computed on one: logits, sampled tokens, losses and updated weights.

    python tests/sharded.py OUT '["qwen3"]' '[[-1, 1, 1]]' [COORDINATOR PROCESSES PROCESS_ID]

Writes OUT-<place of the mesh>.npz from process 0; a mesh of null is the first device alone.
"""

import json
import sys
import tempfile
import types
from pathlib import Path

import jax
import numpy as np
import small_models

from atp_jax import parallel, processes
from atp_jax.align import loop
from atp_jax.align.dpo import Dpo
from atp_jax.align.grpo import Draw, Grpo
from atp_jax.generate.sampling import Sampling
from atp_jax.model import Model
from atp_jax.policies.types import Answer
from atp_jax.settings import AlignSettings, DpoSettings, GrpoSettings, LoraSettings


def measured(name: str, mesh) -> dict[str, np.ndarray]:
    """Everything on one mesh, by name, whole."""
    config, _, params = small_models.load(small_models.FIXTURES / name, mesh=mesh)
    model = Model(config, None, params, mesh, types.MappingProxyType({"eos_token_id": 1}))
    tokens, lengths, _ = small_models.expected(name)
    # Eight rows, which every mesh divides.
    tokens, lengths = np.tile(tokens, (3, 1))[:8], np.tile(lengths, 3)[:8]
    found = {"logits": small_models.real(parallel.fetch(model.logits(tokens, lengths)), lengths)}

    draw = np.random.default_rng(0)
    prompts = [draw.integers(2, 60, 3 + row).tolist() for row in range(5)]
    streams = [(0, 0, row, 0, 1) for row in range(5)]
    drawn = model.engine().generate(prompts, Sampling(max_new_tokens=12), streams)
    found["tokens"] = np.array([(*one.tokens, *[-1] * (12 - len(one.tokens))) for one in drawn])
    found["sampled_logprobs"] = np.concatenate([one.logprobs for one in drawn])

    for rank in (2, 0):
        for method in (dpo(model, draw_pairs()), grpo(model)):
            for key, value in trained(model, method, rank).items():
                found[f"{method.name} {'full' if rank == 0 else 'lora'} {key}"] = value
    return found


def draw_pairs() -> list[dict]:
    draw = np.random.default_rng(1)
    return [
        {"prompt": draw.integers(2, 60, 4).tolist(), "chosen": draw.integers(2, 60, 3 + row % 2).tolist(),
         "rejected": draw.integers(2, 60, 2 + row % 3).tolist()}
        for row in range(6)
    ]  # fmt: skip


def dpo(model, pairs) -> Dpo:
    return Dpo(pairs, model, DpoSettings(epochs=1, batch=3, learning_rate=1e-3, schedule="constant", warmup=0.0), 0)


def grpo(model) -> Grpo:
    """Two steps of two prompts x four answers of at most three tokens, rewarded by a rule of their ids."""
    engine, asked = model.engine(), [prompt for prompt in ([5, 6, 7], [8, 9]) for _ in range(4)]

    def draw(number, params, lora):
        engine.load(params, lora)
        streams = [(1, 0, number * 8 + row, 0, 1) for row in range(8)]
        answers = [
            Answer("", one.tokens, one.finish, sum(one.logprobs), tuple(prompt), one.logprobs)
            for prompt, one in zip(asked, engine.generate(asked, Sampling(max_new_tokens=3), streams), strict=True)
        ]
        return Draw(answers, np.array([sum(one.tokens) % 5 / 4 for one in answers]).reshape(2, 4, 1), {})

    settings = GrpoSettings(steps=2, prompts=2, group=4, learning_rate=1e-3, schedule="constant", kl=0.1)
    return Grpo("grpo", draw, model, settings, 3, 8)


def trained(model, method, rank: int) -> dict[str, np.ndarray]:
    """Losses of a training's steps, and its weights at the end."""
    align = AlignSettings(rows=8, check_every=1000, save_every=1000, lora=LoraSettings(rank=rank))
    lines: list[dict] = []
    folder = processes.share(lambda: tempfile.mkdtemp().encode()).decode()
    done = loop.train(method, model, align, 0, Path(folder), {}, lambda *_: 0.0, lines.append)
    weights = parallel.fetch((done.model.lora.a, done.model.lora.b) if rank else done.model.params)
    losses = np.array([line["loss"] for line in lines if "loss" in line])
    return {"losses": losses, "weights": np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(weights)])}


if __name__ == "__main__":
    out, names, meshes = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    if sys.argv[4:]:
        processes.connect(processes.find(*sys.argv[4:], {}))
    for place, sizes in enumerate(meshes):
        mesh = parallel.make_mesh(devices=jax.devices()[:1]) if sizes is None else parallel.make_mesh(*sizes)
        found = {f"{name} {key}": value for name in names for key, value in measured(name, mesh).items()}
        if processes.leads():
            np.savez(f"{out}-{place}.npz", **found)
    sys.exit(processes.end(0, ""))
