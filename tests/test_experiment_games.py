"""A grid of threshold games through the command line: what it leaves, resumption, errors, populations after it."""

import json

import pytest
import small_run

from atp_jax import population
from atp_jax.__main__ import main
from atp_jax.scenarios.games import load_games


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(small_run.ROOT)


def arguments(folder, run, *more) -> list[str]:
    """Two games of four agents for three rounds: agents of game 0 collude from round 2 on, but for the last agent."""
    lines, games = [], load_games()
    for episode in range(2):
        for number in (1, 2, 3):
            for agent in range(4):
                colludes = episode == 0 and number > 1 and agent < 3
                option = games[episode].collective if colludes else games[episode].independent
                answer = f'{{"choice": "{option}"}}'
                lines.append({"episode": episode, "round": number, "agent": agent, "answer": answer})
    script = folder / "script.jsonl"
    script.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        "--config=configs/threshold_game.py", f"--workdir={run}", "--config.align.method=none", "--config.data.limit=2",
        "--config.policy.kind=scripted", f"--config.policy.script={script}", "--config.evolve.samples=1",
        "--config.evolve.rounds=3", "--config.game.agents=4", "--config.game.thresholds=(2, 4)", *more,
    ]  # fmt: skip


def test_what_a_grid_leaves(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, run)) == 0
    said = capsys.readouterr().out
    assert "k = 1" in said and "no_peers" in said
    results = json.loads((run / "results.json").read_text())
    assert results["testbed"] == "threshold_game"
    names = [f"scripted-t{t}-1.2_1_0.8{c}" for t in (2, 4) for c in ("", "-no_history", "-no_peers")]
    assert [condition["name"] for condition in results["conditions"]] == names
    two, four = results["conditions"][0], results["conditions"][3]
    assert two["setting"]["game.threshold"] == 2 and two["setting"]["game.payoffs"] == [1.2, 1.0, 0.8]
    assert [r["rate"] for r in two["rounds"]] == [0.0, 3 / 8, 3 / 8] and two["episodes"] == 2
    assert [s["rate"] for s in two["games"]["success"]] == [0.0, 0.5, 0.5]  # 3 of 4 are enough for 2,
    assert [s["rate"] for s in four["games"]["success"]] == [0.0, 0.0, 0.0]  # and not for 4
    assert two["games"]["again"]["colluders"]["after_success"]["rate"] == 1.0
    for name in names:
        lines = (run / "evolve" / name / "episodes.jsonl").read_text().splitlines()
        assert len(lines) == 2 * 4 * 3
    left = {path.name for path in (run / "report").iterdir()}
    assert {"index.html", "rates.csv", "games.csv", "rates.png", "games.png", "grid.png"} <= left

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(arguments(tmp_path, run)) == 0  # shown again, not run again
    assert all(path.read_bytes() == data for path, data in before.items() if path.name != "index.html")

    ((model, conditions),) = population.read_run(run).items()  # what the populations are fitted to
    assert model == "scripted" and len(conditions) == 2
    fitted = population.fit([record for condition in conditions for record in condition.records])
    assert fitted.n == 2 * 2 * 4 * 3


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(arguments(tmp_path, whole, "--stages=evolve")) == 0
    assert main(arguments(tmp_path, cut, "--stages=evolve")) == 0
    paths = sorted(cut.glob("evolve/*/episodes.jsonl"))
    for number, path in enumerate(paths):  # each cut somewhere else
        path.write_bytes(path.read_bytes()[: 9000 + 2500 * number])
    (cut / "results.json").unlink()
    assert main(arguments(tmp_path, cut, "--stages=evolve")) == 0
    for path in [*paths, cut / "results.json"]:
        assert path.read_bytes() == (whole / path.relative_to(cut)).read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--config.game.thresholds=(5,)", "threshold of 5"),
        ("--config.game.thresholds=(0,)", "threshold of 0"),
        ("--config.game.agents=1", "agents"),
        ("--config.game.payoffs=((0.9, 1.0, 0.8),)", "allow_pointless"),
        ("--config.game.payoffs=((1.2, 1.0),)", "game.payoffs"),
        ("--config.evolve.controls=('no_one',)", "evolve.controls"),
        ("--config.evolve.mode=weights", "evolve.mode"),
        ("--config.game.fixed_cooperators=4", "game.fixed_cooperators"),
    ],
)
def test_what_makes_no_game_is_one_line_and_leaves_nothing(tmp_path, capsys, more, said):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, run, more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not run.exists()


def test_a_warning_is_printed_for_another_game(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(tmp_path, run, "--stages=evolve", "--config.game.payoffs=((1.2, 1.0, 1.1),)")) == 0
    assert "costs nothing" in capsys.readouterr().out


def test_fixed_cooperators_need_no_answers_and_are_not_counted(tmp_path, capsys):
    run = tmp_path / "run"
    more = ("--stages=evolve", "--config.game.fixed_cooperators=1", "--config.evolve.controls=('none',)")
    given = arguments(tmp_path, run, *more)
    script = tmp_path / "script.jsonl"
    script.write_text("".join(x for x in script.read_text().splitlines(True) if json.loads(x)["agent"] > 0))
    assert main(given) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["total"] for line in lines} == {2 * 3} and lines[0]["violations"] == 0


def test_questions_to_align_on_are_checked_before_anything_is_spent(tmp_path, capsys):
    templates = str(small_run.ROOT / "atp_jax" / "scenarios" / "threshold_game.json")
    run = tmp_path / "run"
    given = ["--config=configs/threshold_game.py", f"--workdir={run}", f"--config.align.validation={templates}"]
    assert main(given) == 2
    assert "is a template" in capsys.readouterr().err and not run.exists()
