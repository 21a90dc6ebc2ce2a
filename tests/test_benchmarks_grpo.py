"""The benchmark of a GRPO step, alone and beside TRL; how fast they are depends on the machine."""

import os
import select
import subprocess
import sys

import jax
import numpy as np
import pytest
import small_models

from atp_jax.benchmarks import grpo
from atp_jax.benchmarks.machine import Rates
from atp_jax.benchmarks.peer import spelled_ids
from atp_jax.benchmarks.random_model import random_model
from atp_jax.benchmarks.work import update_flops
from atp_jax.errors import UserError
from atp_jax.generate.engine import Engine
from atp_jax.model import load_model
from atp_jax.scenarios.pack import ALIGN, load_role_play

SHAPE = str(small_models.FIXTURES / "qwen3")


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("bfloat16", 2)])
def test_it_measures_both_halves_of_a_step(dtype, rank):
    """Of a model that is only a shape; the share of the update is of what the device reaches."""
    model = random_model(SHAPE, dtype)
    asked = grpo.random_prompts(model, length=9, prompts=2, steps=2)
    assert np.shape(asked) == (2, 2, 9) and asked[0] != asked[1]
    result = grpo.measure(model, asked, group=2, new=3, rank=rank, reached=Rates(1.0, 1e4))
    assert (result["prompts"], result["group"], result["prompt"], result["new"]) == (2, 2, 9, 3)
    assert (result["steps"], result["rank"], result["dtype"]) == (2, rank, dtype)
    assert result["generate_s"] > result["prefill_s"] > 0 and result["generate_s"] > result["decode_s"] > 0
    # Medians of a single step.
    assert result["step_s"] == pytest.approx(result["generate_s"] + result["update_s"], abs=2e-4)
    assert result["tokens_per_s"] == pytest.approx(2 * 2 * 3 / result["step_s"], rel=0.05)
    needed = update_flops(model.config, [9, 9], group=2, new=3, whole=not rank) / 1e4 / jax.device_count()
    assert result["update_mfu"] == pytest.approx(needed / result["update_s"], rel=0.2)
    assert {"device", "devices", "cores", "jax", "jaxlib", "numpy"} <= result.keys()
    assert "peak_gb" not in result  # a CPU does not say


def test_scenarios_come_in_turn():
    model, most = load_model(), len(load_role_play(ALIGN))
    first, second = grpo.scenario_prompts(model, "", prompts=most - 1, steps=2)
    assert second[0] not in first and second[1:] == first[:-1]
    with pytest.raises(UserError, match="--prompts=1000"):
        grpo.scenario_prompts(model, "", prompts=1000, steps=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_model_is_the_decoder_s_own(dtype):
    """Its shape and dtype, norms of 1, weights with the configuration's deviation; and nothing of the directory but
    config.json is read."""
    model = random_model(SHAPE, dtype)
    assert model.dtype == dtype and model.tokenizer is None and model.config.initializer_range == 0.2
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}
    assert {str(leaf.dtype) for leaf in leaves.values()} == {dtype}
    for path, leaf in leaves.items():
        values = np.asarray(leaf, np.float32)
        if "norm" in path:
            assert (values == 1).all()
        else:
            assert values.std() == pytest.approx(0.2, rel=0.1) and abs(values.mean()) < 0.02, path


@pytest.mark.parametrize("eos", [0, 2])
def test_prompts_reach_peers_as_the_same_ids(eos):
    """Also where the end token is among them, whose number is within other numbers."""
    tokenizer = spelled_ids(500, eos)
    prompts = [[0, 2, 20, 22, 202, 499], [2], np.random.default_rng(0).integers(0, 500, 1000).tolist()]
    assert tokenizer(text=tokenizer.batch_decode(prompts))["input_ids"] == prompts
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == eos


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps=1"], "--steps must be at least 2"),
        (["--prompt=5", "--data=x"], "give one of the two"),
        (["--random"], "--random has no tokenizer"),
        (["--against=tunix"], "--against=tunix and --peer_python"),
        (["--peer_python=x"], "go together"),
        (["--against=tunix", "--peer_python=x", "--dtype=bfloat16"], "a stored model in float32"),
    ],
)
def test_errors_are_one_line(arguments, said, request):
    command = [sys.executable, "-m", "atp_jax.benchmarks.grpo", *arguments]
    done = subprocess.run(command, cwd=request.config.rootpath, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line


def test_what_trl_cannot_do_is_refused():
    with pytest.raises(UserError, match="float32 on a CPU"):
        grpo.grpo_peer(SHAPE, "bfloat16", True, asked=[], group=2, new=1, rank=2)
    with pytest.raises(UserError, match="needs --rank"):
        grpo.grpo_peer(SHAPE, "float32", True, asked=[], group=2, new=1, rank=0)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_trl_makes_each_step_after_ours(rank, monkeypatch):
    """As many steps as ours, in turn, and none that was not asked for; after the last one it has ended."""
    pytest.importorskip("trl", reason="needs the extra `torch`")
    model, random = (random_model(SHAPE, "float32"), True) if rank else (load_model(), False)
    asked = grpo.random_prompts(model, length=7, prompts=2, steps=3)
    made = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *a, **k: made.append("ours") or generate(*a, **k))
    path = SHAPE if random else str(grpo.ORGANISM)
    with grpo.grpo_peer(path, "float32", random, asked=asked, group=2, new=3, rank=rank) as peer:
        seconds = peer.seconds

        def one() -> float:
            took = seconds()
            made.append("theirs")
            if len(made) == 2:  # it is warm now, and would soon have made another step
                assert not select.select([peer._process.stdout], [], [], 3)[0]
            return took

        monkeypatch.setattr(peer, "seconds", one)
        result = grpo.measure(model, asked, group=2, new=3, rank=rank, peer=peer)
        assert made == ["ours", "theirs"] * 3
        assert result["peer_s"] > 0 and result["ratio"] == pytest.approx(result["peer_s"] / result["step_s"], rel=0.05)
        assert {"torch", "transformers", "trl", "peft"} <= result["peer"].keys()
        with pytest.raises(UserError, match="the peer ended"):
            seconds()
