"""Every stored game of the original comes out of our command line to the letter: messages, readings, capital."""

import json
from pathlib import Path

from atp_jax.__main__ import main

KIND = "upstream.threshold_game.jsonl"
FILES = {"templates.json": "threshold_game_templates.json"}


def load(shared: Path) -> list[dict]:
    return [json.loads(line) for line in (shared / "golden" / KIND).read_text().splitlines()]


def arguments(golden: dict, shared: Path, folder: Path) -> list[str]:
    """The command that plays a golden game, its answers written to a script under `folder`."""
    script = folder / "script.jsonl"
    lines = [{"episode": 0} | {key: step[key] for key in ("round", "agent", "answer")} for step in golden["steps"]]
    script.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = shared / "data" / "upstream" / FILES.get(golden["data"], golden["data"])
    return [
        "--config=configs/threshold_game.py",
        f"--workdir={folder / 'run'}",
        "--stages=evolve",
        "--config.parity=upstream",
        f"--config.wording={shared / 'data' / 'upstream_wording.json'}",
        f"--config.data.path={data}",
        f"--config.data.items=({golden['index']},)",
        f"--config.evolve.rounds={golden['rounds']}",
        f"--config.evolve.window={golden['window']}",
        "--config.evolve.samples=1",
        "--config.evolve.controls=('none',)",
        f"--config.game.agents={golden['agents']}",
        f"--config.game.thresholds=({golden['threshold']},)",
        f"--config.game.payoffs=(({golden['high']}, {golden['normal']}, {golden['low']}),)",
        f"--config.game.mode={golden['reward_mode']}",
        f"--config.game.peers={golden['peers']}",
        f"--config.game.success_applies_to_all={golden['success_applies_to_all']}",
        "--config.align.method=none",
        "--config.policy.kind=scripted",
        f"--config.policy.script={script}",
    ]


def test_every_game(shared, tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    games = load(shared)
    assert len(games) == 12
    for number, golden in enumerate(games):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert main(arguments(golden, shared, folder)) == 0
        (path,) = (folder / "run" / "evolve").glob("*/episodes.jsonl")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(records) == len(golden["steps"]) == golden["rounds"] * golden["agents"]
        for record, step in zip(records, golden["steps"], strict=True):
            for key in ("round", "agent", "messages", "answer"):
                assert record[key] == step[key]
            assert record["decision"] == step["choice"] and record["scenario"] == golden["index"]
            assert repr(record["reward"]) == repr(step["reward"])
            assert repr(record["capital"]) == repr(step["capital"])
