"""Peers in processes of their own: what is said to them and by them."""

import os
import sys

import pytest
import small_models

from atp_jax.benchmarks import generate, grpo
from atp_jax.benchmarks.peer import Peer
from atp_jax.benchmarks.random_model import random_model
from atp_jax.errors import UserError

SHAPE = str(small_models.FIXTURES / "qwen3")


@pytest.mark.parametrize("module", ["peer", "trl_grpo"])
def test_without_its_extra_a_peer_is_one_line(module, tmp_path, monkeypatch, capfd):
    """An installation without torch, to which a package that cannot be imported comes near enough."""
    for name in ("torch", "trl"):
        (tmp_path / f"{name}.py").write_text(f'raise ImportError("No module named {name!r}")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="No module named .*; it needs the extra `torch`$"):
        Peer(f"atp_jax.benchmarks.{module}", model=SHAPE, dtype="float32", random=True, device="cpu")
    assert "Traceback" not in capfd.readouterr().err


def test_a_peer_that_cannot_begin_is_an_error():
    with pytest.raises(UserError, match="the peer ended"):
        Peer("atp_jax.benchmarks.no_such_module")


@pytest.mark.parametrize(
    ("python", "said"),
    [
        ("/no/such/python", "/no/such/python cannot be run: No such file"),
        (sys.executable, "No module named 'tunix'; it needs --peer_python"),
    ],
)
def test_tunix_needs_a_python_that_has_it(python, said, capfd):
    with pytest.raises(UserError, match=said):
        Peer("atp_jax.benchmarks.tunix_peer", python, task="generate", model=SHAPE)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif("TUNIX_PYTHON" not in os.environ, reason="TUNIX_PYTHON names no Python that has google-tunix")
def test_tunix_does_the_same_work():
    """As many tokens as asked for, and as many steps of training as ours, with all weights and with an adapter."""
    python, model = os.environ["TUNIX_PYTHON"], random_model(SHAPE, "float32")
    with Peer("atp_jax.benchmarks.tunix_peer", python, task="generate", model=SHAPE) as peer:
        assert generate.measure(model, rows=2, prompt=5, new=3, repeats=2, peer=peer)["peer_s"] > 0
    asked = grpo.random_prompts(model, length=7, prompts=2, steps=3)
    for rank in (0, 2):
        with grpo.grpo_peer(SHAPE, "float32", False, python, asked=asked, group=2, new=3, rank=rank) as peer:
            result = grpo.measure(model, asked, group=2, new=3, rank=rank, peer=peer)
            assert result["peer_s"] > 0 and result["peer"]["google-tunix"]
            with pytest.raises(UserError, match="the peer ended"):
                peer.seconds()


@pytest.mark.torch
def test_transformers_answers_a_model_of_which_only_the_shape_is_there(tmp_path):
    """In alternation, as often as ours; what libraries print does not come between the answers."""
    pytest.importorskip("torch", reason="needs the extra `torch`")
    (tmp_path / "config.json").write_bytes((small_models.FIXTURES / "qwen3" / "config.json").read_bytes())
    model = random_model(str(tmp_path), "float32")
    with generate.transformers_peer(str(tmp_path), "float32", random=True) as peer:
        result = generate.measure(model, rows=2, prompt=5, new=3, repeats=2, peer=peer)
        assert result["peer_s"] > 0
        assert result["peer"] == peer.about and peer.about["dtype"] == "torch.float32"
        assert peer.seconds(prompts=[[3, 4], [5]], new=2, each=True) > 0
