"""DPO: where it starts, what each batch holds, and that every kind of loss learns its pairs."""

import types

import numpy as np
import pytest
import small_models
from small_engines import ONE

from atp_jax.align import loop
from atp_jax.align.dpo import Dpo, layout, score
from atp_jax.model import Model
from atp_jax.settings import PREFERENCE_LOSSES, AlignSettings, DpoSettings, LoraSettings


@pytest.fixture(scope="module")
def model():
    config, _, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)
    return Model(config, None, params, ONE, types.MappingProxyType({"eos_token_id": 1}))


def pairs(count):
    rng = np.random.default_rng(0)
    return [
        {"prompt": rng.integers(2, 60, 4).tolist(), "chosen": rng.integers(2, 60, 3 + row % 2).tolist(),
         "rejected": rng.integers(2, 60, 2 + row % 3).tolist()}
        for row in range(count)
    ]  # fmt: skip


def trained(model, tmp_path, rank=2, count=4, rows=8, **changes):
    own = {"epochs": 2, "batch": 4, "learning_rate": 3e-2, "schedule": "constant", "warmup": 0.0}
    settings = DpoSettings(**own | changes)
    align = AlignSettings(rows=rows, check_every=1000, save_every=1000, lora=LoraSettings(rank=rank))
    lines = []
    method = Dpo(pairs(count), model, settings, 0)
    out = loop.train(method, model, align, 0, tmp_path, {}, lambda *_: 0.0, lines.append)
    return out, [line for line in lines if "loss" in line]


@pytest.mark.parametrize("rank", [2, 0])
def test_the_first_loss_is_ln_2_and_the_pairs_are_learned(model, tmp_path, rank):
    """With an adapter and with all weights; the reference is the model as it was given."""
    _, lines = trained(model, tmp_path, rank, epochs=12, learning_rate=3e-2 if rank else 3e-3)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05 and lines[-1]["rewards/accuracies"] == pytest.approx(1)


@pytest.mark.parametrize("kind", PREFERENCE_LOSSES)
def test_every_kind_lowers_its_loss(model, tmp_path, kind):
    _, lines = trained(model, tmp_path, epochs=6, loss=kind, smoothing=0.1 if kind in ("sigmoid", "robust") else 0.0)
    assert all(np.isfinite(line["loss"]) for line in lines) and lines[-1]["loss"] < lines[0]["loss"]


def test_an_epoch_goes_through_every_pair_once_in_an_order_of_its_own(model):
    method = Dpo(pairs(7), model, DpoSettings(epochs=3, batch=3), seed=5)
    assert method.steps == 9
    answers = layout(pairs(7))["answers"]

    def numbers(epoch, method=method):
        found = []
        for step in range(3 * epoch, 3 * epoch + 3):
            batch, _ = method.batch(step, None, None)
            for row in np.flatnonzero(batch["weight"]):
                (place,) = (i for i in range(7) if np.array_equal(answers[i], batch["answers"][row]))
                found.append(place)
        return found

    orders = [numbers(epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(7)) for order in orders) and orders[0] != orders[1]
    assert numbers(1, Dpo(pairs(7), model, DpoSettings(epochs=3, batch=3), seed=5)) == orders[1]
    assert numbers(0, Dpo(pairs(7), model, DpoSettings(epochs=3, batch=3), seed=6)) != orders[0]


def test_a_short_last_batch_counts_its_pairs_alike(model, tmp_path):
    method = Dpo(pairs(5), model, DpoSettings(epochs=1, batch=4), seed=0)
    batch, logged = method.batch(1, None, None)
    assert logged["pairs"] == 1 and batch["weight"].tolist() == [1, 0, 0, 0]
    assert not batch["prompt_lengths"][1:].any() and not batch["lengths"][1:].any()


def test_how_a_batch_is_cut_up_changes_nothing(model, tmp_path):
    lines = [trained(model, tmp_path / str(rows), rows=rows, count=5, epochs=2)[1] for rows in (2, 8)]
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_scores_are_the_answers_log_probabilities(model):
    given = pairs(9)  # more than are scored together
    found = score(model, layout(given))
    for row, pair in enumerate(given):
        for column, answer in enumerate((pair["chosen"], pair["rejected"])):
            tokens = np.array([pair["prompt"] + answer], np.int32)
            logits = np.asarray(model.logits(tokens, np.array([tokens.size], np.int32)), np.float64)[0]
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            places = np.arange(len(pair["prompt"]), tokens.size)
            np.testing.assert_allclose(found[row, column], logs[places - 1, tokens[0, places]].sum(), atol=1e-4)
