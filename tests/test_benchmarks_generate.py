"""The benchmarks of generation and role-play say what they measured; how fast that is depends on the machine."""

import jax
import pytest

from atp_jax.benchmarks import generate, role_play
from atp_jax.benchmarks.machine import Rates
from atp_jax.benchmarks.work import must_read, prefill_flops
from atp_jax.errors import UserError
from atp_jax.model import load_model
from atp_jax.policies.model import ModelPolicy


def test_the_test_model_is_what_the_benchmarks_are_about(tmp_path):
    """Its size, and a tokenizer that is the organism's for all text and has a spelling for every id."""
    generate.make_test_model(tmp_path / "model")
    model, organism = load_model(tmp_path / "model"), load_model()
    layer = 256 * (8 + 4 + 4 + 8) * 32 + 3 * 256 * 768 + 2 * 256 + 2 * 32  # attention, MLP, norms
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 4096 * 256 + 8 * layer + 256
    assert len(model.tokenizer) == model.config.vocab_size == 4096
    text = "Choose one of the two routes."
    assert model.tokenizer.encode(text) == organism.tokenizer.encode(text)
    assert model.decode([4000]) == "<unused4000>"
    with pytest.raises(UserError, match="exists already"):
        generate.make_test_model(tmp_path / "model")


def test_both_measure_every_phase():
    model = load_model()
    result = generate.measure(model, rows=2, prompt=20, new=3, repeats=1)
    assert result["seconds"] > 0 and result["prefill_s"] > 0 and result["decode_s"] > 0
    assert (result["batch"], result["prompt"], result["new"]) == (2, 20, 3)
    assert not {"roofline", "prefill_mfu", "peak_gb", "peer_s"} & result.keys()
    for how, unused in (("lockstep", "foresee"), ("freely", "answer"), ("ahead", "pursue")):
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(ModelPolicy, unused)  # another is what is measured
            result = role_play.measure(model, "", items=2, rounds=2, new=3, how=how, peer=None, each=False)
        assert result["how"] == how
        assert [one["round"] for one in result["by_round"]] == [1, 2]
        for one in result["by_round"]:
            assert one["prefill_s"] > 0 and one["decode_s"] > 0 or (how == "ahead" and one["round"] > 1)
            assert one["seconds"] == pytest.approx(one["prefill_s"] + one["decode_s"] + one["host_s"], abs=2e-3)
    with pytest.raises(UserError, match="--items=1000"):
        role_play.measure(model, "", items=1000, rounds=1, new=1, how="lockstep", peer=None, each=False)


def test_shares_are_of_what_the_device_reaches():
    """Of rates so low that rounding does not matter."""
    model, reached = load_model(), Rates(bandwidth=1e3, flops=2e4)
    result = generate.measure(model, rows=8, prompt=200, new=16, repeats=1, reached=reached)
    devices = jax.device_count()
    decoding = must_read(model, rows=8, length=200, new=16) / 1e3 / devices
    assert result["roofline"] == pytest.approx(decoding / result["decode_s"], rel=0.05)
    prefill = prefill_flops(model.config, rows=8, length=200) / 2e4 / devices
    assert result["prefill_mfu"] == pytest.approx(prefill / result["prefill_s"], rel=0.05)


def test_batches_are_positive_integers():
    assert generate.batch_sizes(["1", "16"]) == [1, 16]
    for wrong in ("x", "0", "-1", "1.5", ""):
        with pytest.raises(UserError, match=f"positive integers with commas between them, not '{wrong}'"):
            generate.batch_sizes(["1", wrong])
