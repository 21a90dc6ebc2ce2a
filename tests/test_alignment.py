"""The stages that train, on the shipped organism through the command line's own path: what they leave, and that a run
that was cut off ends like one that was not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import small_run

from atp_jax import alignment, experiment, settings
from atp_jax.align import loop
from atp_jax.errors import UserError
from atp_jax.interrupt import Interrupted
from atp_jax.model import load_model
from atp_jax.rollout import Condition
from atp_jax.scenarios.pack import ALIGN, VALIDATION


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """The smallest run that goes through every stage and both ways to evolve."""
    data = tmp_path_factory.mktemp("data")
    for path, name in ((ALIGN, "align.json"), (VALIDATION, "validation.json")):
        (data / name).write_text(json.dumps(json.loads(Path(path).read_text())[:4]))
    config = settings.default_config()
    config.sampling.max_new_tokens = 32
    config.data.limit, config.evolve.samples, config.evolve.rounds = 2, 2, 2
    config.evolve.mode, config.evolve.probe = "both", (0, 1)
    config.evolve.weights.updates, config.evolve.weights.measure_every = 2, 1
    config.evolve.weights.prompts, config.evolve.weights.group = 2, 2
    align = config.align
    align.method, align.path, align.validation = "dpo+grpo", str(data / "align.json"), str(data / "validation.json")
    align.rows, align.check_every, align.check_samples, align.save_every = 4, 2, 1, 1
    align.pairs.steer, align.pairs.tries = False, 12
    align.dpo.epochs, align.dpo.batch, align.dpo.learning_rate, align.dpo.schedule = 2, 2, 1e-3, "constant"
    align.grpo.steps, align.grpo.prompts, align.grpo.group, align.grpo.learning_rate = 3, 2, 2, 1e-3
    return settings.check_settings(settings.read_settings(config))


@pytest.fixture(scope="module")
def finished(chosen, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    experiment.run(chosen, workdir)
    return workdir


def adapter(workdir, name):
    return safetensors.numpy.load_file(workdir / "models" / name / "adapter_model.safetensors")


def test_results_hold_base_dpo_and_grpo_side_by_side(finished):
    results = json.loads((finished / "results.json").read_text())
    names = [condition["name"] for condition in results["conditions"]]
    assert names == ["base", "base-weights", "dpo", "dpo-weights", "grpo", "grpo-weights"]
    measured = {c["name"]: [r["round"] for r in c["rounds"]] for c in results["conditions"]}
    assert measured["dpo"] == [1, 2] and measured["dpo-weights"] == [1, 2, 3]
    cells = {(cell["model"], cell["history"], cell["rounds"]) for cell in results["probe"]}
    assert cells == {
        (model, history, length)
        for model in ("base", "dpo", "grpo")
        for history, length in (("none", 0), ("paid", 1), ("caught", 1), ("kept", 1))
    }
    for cell in results["probe"]:
        for how in ("sampled", "greedy", "scored"):
            low, high = cell[how]["ci95"]
            assert 0 <= low <= cell[how]["rate"] <= high <= 1
    assert "dpo-weights" in (finished / "report" / "index.html").read_text()


def test_aligned_models_are_adapters_that_the_model_can_wear(finished):
    worn = load_model("", adapter=finished / "models" / "dpo")
    assert all(np.any(np.asarray(b)) for b in worn.lora.b.values())
    dpo, grpo = (adapter(finished, name) for name in ("dpo", "grpo"))
    assert any(not np.array_equal(dpo[name], grpo[name]) for name in dpo)


def test_pairs_hold_the_bare_prompt_and_decide_as_they_should(finished):
    pairs = [json.loads(line) for line in (finished / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    for pair in pairs:
        assert [message["role"] for message in pair["prompt"]] == ["system", "user"]
        assert pair["chosen"] != pair["rejected"]


def test_metrics_tell_what_a_practitioner_looks_for(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    dpo = [line for line in lines if line["stage"] == "dpo" and "loss" in line]
    assert dpo[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert {"rewards/margins", "rewards/accuracies", "grad_norm", "grad_norm_clipped", "learning_rate"} <= dpo[0].keys()
    grpo = [line for line in lines if line["stage"] == "grpo" and "loss" in line]
    assert [line["step"] for line in grpo] == [1, 2, 3]
    assert grpo[0]["ratio"] == pytest.approx(1, abs=1e-6) and abs(grpo[0]["kl"]) < 1e-6
    assert grpo[0]["sampler_difference/max"] < 1e-4
    assert {
        "reward", "reward_std", "frac_reward_zero_std", "entropy", "clip_ratio/low", "clip_ratio/high",
        "completions/mean_length", "completions/clipped_ratio", "share_unparsed", "sampler_difference/p99",
    } <= grpo[0].keys()  # fmt: skip
    looks = [line["step"] for line in lines if line["stage"] == "grpo" and "violation_rate" in line]
    assert looks == [0, 2, 3]


def test_the_same_again_changes_nothing(chosen, finished, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    experiment.run(chosen, finished)
    assert "holds the finished run" in capsys.readouterr().out
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert before.keys() == after.keys()
    assert all(before[path] == after[path] for path in before)


def test_a_run_that_was_cut_off_everywhere_ends_the_same(chosen, finished, tmp_path):
    """Cut off after every third line of metrics and started again, until it is through."""
    workdir = tmp_path / "run"
    starts = small_run.cut_off_until(workdir / "results.json", lambda: experiment.run(chosen, workdir))
    assert starts > 4
    for name in ("dpo", "grpo", "dpo-weights"):
        ours, theirs = adapter(workdir, name), adapter(finished, name)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    for path in finished.glob("evolve/*/*.jsonl"):
        assert (workdir / path.relative_to(finished)).read_bytes() == path.read_bytes()
    assert json.loads((workdir / "results.json").read_text()) == json.loads((finished / "results.json").read_text())

    def lines(directory):
        kept = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        timings = ("seconds", "batch_s", "update_s", "tokens", "tokens_per_s", "update_tokens_per_s", "compilations")
        return [{k: v for k, v in line.items() if k not in timings} for line in kept if line["stage"] != "evolve"]

    assert lines(workdir) == lines(finished)


def test_asked_to_stop_it_saves_and_says_how_to_go_on(chosen, tmp_path, monkeypatch):
    class Asked:
        asked = True

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(loop, "Interrupt", Asked)
    with pytest.raises(Interrupted, match="goes on"):
        experiment.run(dataclasses.replace(chosen, stages=("grpo",)), tmp_path / "run")


def test_what_is_missing_or_does_not_fit_is_one_line(chosen, tmp_path):
    with pytest.raises(UserError, match="run the stage pairs first"):
        experiment.run(dataclasses.replace(chosen, stages=("dpo",)), tmp_path / "a")
    with pytest.raises(UserError, match="run the stage dpo first"):
        evolve = dataclasses.replace(chosen.evolve, models=("dpo",))
        experiment.run(dataclasses.replace(chosen, stages=("evolve",), evolve=evolve), tmp_path / "b")
    grpo = dataclasses.replace(chosen.align.grpo, prompts=5)
    with pytest.raises(UserError, match="5 scenarios .* only 4"):
        align = dataclasses.replace(chosen.align, grpo=grpo)
        experiment.run(dataclasses.replace(chosen, stages=("grpo",), align=align), tmp_path / "c")
    assert not list(tmp_path.glob("*/models"))


def test_rewards_are_the_decisions_or_what_the_environment_pays(chosen):
    from atp_jax.lab import open_lab
    from atp_jax.scenarios.pack import load_role_play

    scenarios, lab = load_role_play(chosen.align.path), open_lab(chosen)
    grpo = dataclasses.replace(chosen.align.grpo, rewards=(1.0, 0.1, 0.0))
    for paid in (False, True):
        drawn = alignment.Episodes(chosen, lab, scenarios, grpo, paid=paid, index=7)(0, lab.model.params, None)
        assert drawn.rewards.shape == (2, 2, 1) and len(drawn.answers) == 4
        if not paid:
            assert set(drawn.rewards.reshape(-1)) <= {1.0, 0.1, 0.0}
        else:
            shares = {1.0, 0.0} | {s.low_reward / s.high_reward for s in scenarios}
            assert all(min(abs(value - share) for share in shares) < 1e-12 for value in drawn.rewards.reshape(-1))


def test_no_two_conditions_share_their_randomness(chosen):
    many = dataclasses.replace(chosen.evolve, controls=("none", "no_history"), mode="both")
    cells = experiment.conditions(dataclasses.replace(chosen, evolve=many))
    assert all(isinstance(cell, Condition) for cell in cells)
    indices = [cell.index for cell in cells]
    assert len(set(indices)) == len(indices)
    # What measures an evolution in the weights takes the indices that follow its condition's own.
    weights = sorted(cell.index for cell in cells if cell.mode == "weights")
    assert min(np.diff(weights)) > 1000 and max(i for i in indices if i not in weights) < alignment.PAIRS_CONDITION
