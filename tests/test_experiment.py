"""The workdir: what it holds, which configuration may use it again, and the stages."""

import json
import shutil

import pytest
import small_run

from atp_jax import experiment, lab
from atp_jax.__main__ import main
from atp_jax.errors import UserError
from atp_jax.generate.sampling import Sampling
from atp_jax.settings import SamplingSettings


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(small_run.ROOT)


def refused(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_what_a_workdir_holds(tmp_path, capsys):
    run = tmp_path / "deep" / "run"
    assert main(small_run.arguments(tmp_path, run)) == 0
    said = capsys.readouterr().out
    assert "scripted-no_history, round 4: " in said and "alternating" not in said

    results = json.loads((run / "results.json").read_text())
    assert (results["schema"], results["testbed"]) == (1, "role_play")
    plain, control = results["conditions"]
    assert (plain["name"], plain["model"], plain["control"]) == ("scripted", "scripted", "none")
    assert (control["name"], control["control"]) == ("scripted-no_history", "no_history")
    assert plain["setting"] == control["setting"] and plain["setting"]["evolve.window"] == 2
    for condition in results["conditions"]:
        path = run / "evolve" / condition["name"] / "episodes.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for row in condition["rounds"]:
            decisions = [r["decision"] for r in records if r["round"] == row["round"]]
            counts = (row["violations"], row["unparsed"], row["total"])
            assert counts == (decisions.count("violate"), decisions.count("unparsed"), 6)
            assert row["rate"] == row["violations"] / 6 and row["ci95"][0] <= row["rate"] <= row["ci95"][1]

    config = json.loads((run / "config.json").read_text())
    assert config["config"]["evolve.controls"] == ["none", "no_history"] and config["config"]["seed"] == 0
    assert config["versions"]["jax"] and config["device"]["platform"] == "cpu"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(m["condition"], m["round"]) for m in metrics] == [
        (name, number) for name in ("scripted", "scripted-no_history") for number in (1, 2, 3, 4)
    ]
    assert (run / "report" / "index.html").stat().st_size and list((run / "report").glob("*.png"))
    assert not list(run.rglob("*.partial"))


def test_another_configuration_is_refused_by_the_names_that_differ(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(small_run.arguments(tmp_path, run)) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = refused(
        capsys, small_run.arguments(tmp_path, run, 3, 4, 2, "--config.seed=1", "--config.evolve.window=None")
    )
    assert (
        line.startswith("error: ") and "seed (0 there, 1 now)" in line and "evolve.window (2 there, None now)" in line
    )
    assert "evolve.rounds" not in line and line.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_one_run_at_a_time_in_a_workdir(tmp_path, capsys):
    """Another is refused and takes nothing away; when the first has ended the workdir is free."""
    arguments = small_run.arguments(tmp_path, tmp_path / "run")
    run, seen = tmp_path / "run", []

    def meanwhile(*_, **__):
        seen.append((refused(capsys, arguments), (run / "config.json").exists()))
        raise UserError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atp_jax.experiment.evolve", meanwhile)
        assert refused(capsys, arguments) == "error: enough\n"
    assert seen == [(f"error: {run} is in use by another run; wait for its end or use another workdir\n", True)]
    assert main(arguments) == 0


def test_a_run_that_ended_while_this_one_loaded_its_model_is_found(tmp_path, capsys):
    """The lock is taken after that: what another run left meanwhile is compared and kept, not run again."""
    run, open_lab = tmp_path / "run", experiment.open_lab

    def others(*changes):
        def meanwhile(settings):
            patch.setattr("atp_jax.experiment.open_lab", open_lab)
            assert main(small_run.arguments(tmp_path, run, 3, 4, 2, *changes)) == 0
            left.append({path: path.read_bytes() for path in (run / "metrics.jsonl", run / "results.json")})
            return open_lab(settings)

        return meanwhile

    for changes in ((), ("--config.seed=1",)):
        shutil.rmtree(run, ignore_errors=True)
        left = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("atp_jax.experiment.open_lab", others(*changes))
            if changes:
                assert "seed (1 there, 0 now)" in refused(capsys, small_run.arguments(tmp_path, run))
            else:
                assert main(small_run.arguments(tmp_path, run)) == 0
        assert left == [{path: path.read_bytes() for path in left[0]}]


def test_stages_one_after_another(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = small_run.arguments(tmp_path, run)
    assert "run the stage evolve first" in refused(capsys, [*arguments, "--stages=report"])
    assert not run.exists()
    assert main([*arguments, "--stages=evolve"]) == 0
    assert (run / "results.json").exists() and not (run / "report").exists()
    assert "violation rate" not in capsys.readouterr().out
    assert main([*arguments, "--stages=report"]) == 0
    assert (run / "report" / "index.html").exists() and "violation rate" in capsys.readouterr().out


def test_a_run_without_its_configuration_is_left_alone(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = small_run.arguments(tmp_path, run)
    assert main(arguments) == 0
    (run / "config.json").unlink()
    assert "without its config.json" in refused(capsys, arguments)
    (run / "config.json").write_text("{")
    assert "config.json is not what this program wrote" in refused(capsys, arguments)


def test_another_machine_is_a_note_other_scenarios_are_an_error(tmp_path, capsys):
    run = tmp_path / "run"
    arguments = small_run.arguments(tmp_path, run)
    assert main(arguments) == 0
    expected = small_run.left_behind(run)
    (run / "results.json").unlink()
    config = json.loads((run / "config.json").read_text())
    config["device"]["kind"] = "abacus"
    (run / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "note: the run was begun with device" in capsys.readouterr().out
    assert small_run.left_behind(run) == expected

    (run / "results.json").unlink()
    pack = tmp_path / "pack.json"
    pack.write_text(pack.read_text().replace("the short way", "the long way"))
    assert "round 1 is not what this configuration gives" in refused(capsys, arguments)


GENERATION = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": 3}


@pytest.mark.parametrize(
    ("settings", "generation", "expected"),
    [
        ({}, GENERATION, (0.6, 0.95, 20, 256)),
        ({"temperature": 1.0, "top_k": 0}, GENERATION, (1.0, 0.95, 0, 256)),
        ({"max_new_tokens": 9}, GENERATION | {"max_new_tokens": 7}, (0.6, 0.95, 20, 9)),
        ({}, {"max_new_tokens": 7, "top_k": None}, (1.0, 1.0, 0, 7)),
        ({}, {"do_sample": False}, (0.0, 1.0, 0, 256)),
        ({"temperature": 0.5}, {"do_sample": False}, (0.5, 1.0, 0, 256)),
    ],
)
def test_sampling_in_force(settings, generation, expected):
    assert lab.sampling_in_force(SamplingSettings(**settings), generation) == Sampling(*expected)
