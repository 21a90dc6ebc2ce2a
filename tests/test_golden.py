"""Every stored episode of the original comes out of our command line to the letter: messages, readings, rewards."""

import json
from pathlib import Path

from atp_jax.__main__ import main

KIND = "upstream.role_play.jsonl"


def load(shared: Path) -> list[dict]:
    return [json.loads(line) for line in (shared / "golden" / KIND).read_text().splitlines()]


def arguments(golden: dict, shared: Path, folder: Path) -> list[str]:
    """The command that plays a golden episode, its answers written to a script under `folder`."""
    script = folder / "script.jsonl"
    script.write_text(
        "".join(
            json.dumps({"episode": 0, "round": step["round"], "agent": 0, "answer": step["answer"]}) + "\n"
            for step in golden["steps"]
        )
    )
    return [
        "--config=configs/role_play.py",
        f"--workdir={folder / 'run'}",
        "--stages=evolve",
        "--config.parity=upstream",
        f"--config.wording={shared / 'data' / 'upstream_wording.json'}",
        f"--config.data.path={shared / 'data' / 'upstream' / golden['data']}",
        f"--config.data.items=({golden['index']},)",
        f"--config.evolve.rounds={golden['rounds']}",
        f"--config.evolve.window={golden['window']}",
        f"--config.evolve.supervision={golden['supervision']}",
        "--config.policy.kind=scripted",
        f"--config.policy.script={script}",
    ]


def assert_same(golden: dict, folder: Path) -> None:
    lines = (folder / "run" / "evolve" / "scripted" / "episodes.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == len(golden["steps"]) == golden["rounds"]
    for record, step in zip(records, golden["steps"], strict=True):
        assert record["round"] == step["round"]
        assert record["messages"] == step["messages"]
        assert record["answer"] == step["answer"]
        assert record["decision"] == step["choice"]
        assert repr(record["reward"]) == repr(step["reward"])
        assert record["scenario"] == golden["index"]


def test_every_episode(shared, tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    episodes = load(shared)
    assert len(episodes) == 24
    for number, golden in enumerate(episodes):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert main(arguments(golden, shared, folder)) == 0
        assert_same(golden, folder)


def test_an_episode_in_a_process_of_its_own(shared, tmp_path, run_cli):
    golden = max(load(shared), key=lambda episode: (episode["rounds"], episode["window"]))
    done = run_cli(*arguments(golden, shared, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_same(golden, tmp_path)
