"""The command line: what it takes, and that what the user can mend is status 2, one line, and nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

import atp_jax
from atp_jax import __main__ as cli
from atp_jax import experiment
from atp_jax.errors import UserError


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(small_run.ROOT)


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that must be refused."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n"), said
    return said


def parse(tmp_path, *arguments: str, config="configs/role_play.py"):
    return cli.parse([f"--config={config}", f"--workdir={tmp_path / 'run'}", *arguments])[0]


# ---------------------------------------------------------------- what it takes


def test_overrides(tmp_path):
    chosen = parse(
        tmp_path,
        "--config.evolve.rounds=3",
        "--config.evolve.window",
        "2",
        "--config.data.items=(3, 5)",
        "--config.evolve.controls=('none', 'no_history')",
        "--config.sampling.temperature=1",
        "--config.sampling.thinking=false",
        "--config.data.path=a pack.json",
        "--config.policy.rows=4",
        "--stages=report,evolve",
    )
    assert (chosen.evolve.rounds, chosen.evolve.window, chosen.data.items) == (3, 2, (3, 5))
    assert chosen.evolve.controls == ("none", "no_history")
    assert chosen.sampling.temperature == 1.0 and chosen.sampling.thinking is False
    assert chosen.data.path == "a pack.json" and chosen.policy.rows == 4
    assert chosen.stages == ("evolve", "report")


@pytest.mark.parametrize("nothing", ["None", "null"])
def test_what_may_be_null_can_be_made_null(tmp_path, nothing):
    assert parse(tmp_path).evolve.window == 5 and parse(tmp_path).sampling.max_new_tokens == 256
    chosen = parse(tmp_path, f"--config.evolve.window={nothing}", f"--config.sampling.max_new_tokens={nothing}")
    assert chosen.evolve.window is None and chosen.sampling.max_new_tokens is None


def test_a_single_item_needs_no_comma_and_the_last_word_wins(tmp_path):
    assert parse(tmp_path, "--config.data.items=3").data.items == (3,)
    assert parse(tmp_path, "--config.seed=3", "--config.seed=4").seed == 4
    assert parse(tmp_path, "--config.data.items=(3, 5)", "--config.data.items=7").data.items == (7,)
    assert parse(tmp_path, "--config.evolve.controls=no_history").evolve.controls == ("no_history",)
    assert cli.parse(["--config=configs/quickstart.py", "--workdir=a", "--workdir=b"])[1] == Path("b")


def test_every_setting_can_be_overridden_though_the_config_names_one(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg='nothing'):\n"
        "    return ConfigDict({'evolve': {'rounds': 2}, 'wording': arg})\n"
    )
    chosen = parse(tmp_path, "--config.sampling.top_k=7", "--config.evolve.rounds=9", config=config)
    assert (chosen.sampling.top_k, chosen.evolve.rounds, chosen.wording) == (7, 9, "nothing")
    assert parse(tmp_path, config=f"{config}:some:thing").wording == "some:thing"


@pytest.mark.parametrize(
    ("arg", "model", "sampling"),
    [
        ("qwen3_8b", "Qwen/Qwen3-8B", (0.6, 0.95, 20)),
        ("llama31_8b", "meta-llama/Llama-3.1-8B-Instruct", (0.7, 0.9, 50)),
    ],
)
def test_the_papers_settings(tmp_path, arg, model, sampling):
    chosen = parse(tmp_path, config=f"configs/role_play.py:{arg}")
    assert (chosen.policy.model, chosen.policy.dtype) == (model, "bfloat16")
    assert (chosen.sampling.temperature, chosen.sampling.top_p, chosen.sampling.top_k) == sampling
    assert chosen.sampling.max_new_tokens == 32768
    evolve = chosen.evolve
    assert (evolve.rounds, evolve.window, evolve.samples, evolve.supervision) == (6, 5, 1, "all_unsupervised")


def test_help_is_no_error(capsys):
    assert cli.main(["--help"]) == 0
    assert "--workdir" in capsys.readouterr().out


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, atp_jax; sys.exit(any(name in sys.modules for name in ('jax', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert atp_jax.read_decision('{"choice": "B"}', "a", "b") == "violate"
    assert atp_jax.envs.role_play.init and callable(atp_jax.load_model)


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--config=FILE is missing"),
        (["--config=configs/role_play.py"], "--workdir=DIRECTORY is missing"),
        (["--workdir=W"], "--config=FILE is missing"),
        (["--config=configs/none.py", "--workdir=W"], "no file configs/none.py"),
        (["--config=configs", "--workdir=W"], "no file configs"),
        (["--config=configs/role_play.py:qwen9", "--workdir=W"], "'qwen9'"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.evolve.round=3"], "nearest is evolve.rounds"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.evolve=3"], "evolve is a group"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.evolve.rounds=three"], "config.evolve.rounds"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.evolve.rounds"], "config.evolve.rounds"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.evolve.rounds=0"], "evolve.rounds"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.sampling.temperature=nan"], "temperature"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.data.items=(3,"], "config.data.items"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.data.items=x"], "data.items"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.testbed=tool_user"], "testbed must be one of"),
        (["--config=configs/role_play.py", "--workdir=W", "--stages=dpo,evolve"], "run the stage pairs first"),
        (["--config=configs/role_play.py", "--workdir=W", "--stages="], "stages"),
        (["--config=configs/role_play.py", "--workdir=W", "--stage=evolve"], "stage"),
        (["--config=configs/role_play.py", "--workdir=W", "evolve"], "'evolve' means nothing here"),
        (["--config=configs/role_play.py", "--workdir=W", "--config.parity=upstream"], "wording"),
    ],
)
def test_bad_flags(capsys, tmp_path, arguments, said):
    workdir = tmp_path / "run"
    arguments = [argument.replace("--workdir=W", f"--workdir={workdir}") for argument in arguments]
    assert said in refused(capsys, *arguments)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:", "SyntaxError"),
        ("", "no function get_config"),
        ("def get_config(arg=''): return 3", "must be a ConfigDict"),
        ("def get_config(arg=''): return {'evolve': {'ronds': 3}}", "nearest is evolve.rounds"),
        ("def get_config(arg=''): return {}['x']", "KeyError: 'x'"),
        ("def get_config(arg=''): raise ValueError('two\\nlines')", "two lines"),
    ],
)
def test_bad_config_files(capsys, tmp_path, text, said):
    config = tmp_path / "config.py"
    config.write_text(text)
    assert said in refused(capsys, f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def with_pack(text: str):
    def change(folder: Path) -> list[str]:
        (folder / "bad.json").write_text(text)
        return [f"--config.data.path={folder / 'bad.json'}"]

    return change


def with_row(**changes):
    return with_pack(json.dumps([small_run.row(0), small_run.row(1, **changes), small_run.row(2)]))


def with_script(text: str):
    def change(folder: Path) -> list[str]:
        (folder / "bad.jsonl").write_text(text)
        return [f"--config.policy.script={folder / 'bad.jsonl'}"]

    return change


def with_wording(question: str):
    def change(folder: Path) -> list[str]:
        keys = ("comply", "violate_unseen", "violate_caught", "unparsed")
        pack = {"name": "bad", "role_play": {"question": question, "feedback": dict.fromkeys(keys, "Noted.")}}
        (folder / "wording.json").write_text(json.dumps(pack))
        return [f"--config.wording={folder / 'wording.json'}"]

    return change


BAD_INPUT = {
    "missing pack": (lambda folder: [f"--config.data.path={folder / 'none.json'}"], ["none.json"]),
    "pack is a folder": (lambda folder: [f"--config.data.path={folder}"], []),
    "empty pack": (with_pack(""), ["bad.json", "empty"]),
    "no rows": (with_pack("[]"), ["bad.json"]),
    "malformed JSON": (with_pack('[\n{"id": 1,\n}]'), ["bad.json", "line 3"]),
    "row without a key": (with_row(user_prompt=None), ["row 1", "user_prompt"]),
    "equal options": (with_row(better_choice=" Marked way"), ["row 1", "same option"]),
    "NaN payoff": (with_row(params={"low_reward": float("nan"), "high_reward": 2}), ["row 1", "low_reward"]),
    "negative payoff": (with_row(params={"low_reward": 1, "high_reward": -2}), ["row 1", "high_reward"]),
    "placeholder without a value": (with_row(user_prompt="It pays ${low_reward}."), ["row 1", "low_reward"]),
    "no text for the pattern": (with_row(supervised_text=None), ["row 1", "supervised_text"]),
    "row number beyond the pack": (lambda folder: ["--config.data.items=(0, 3)"], ["row 3"]),
    "missing script": (lambda folder: [f"--config.policy.script={folder / 'none.jsonl'}"], ["none.jsonl"]),
    "empty script": (with_script("\n"), ["bad.jsonl", "no answers"]),
    "script line no JSON": (with_script('{"episode": 0, "round": 1, "answer": ""}\n{"epi'), ["bad.jsonl, line 2"]),
    "script line no object": (with_script("3"), ["line 1"]),
    "script line without a round": (with_script('{"episode": 0, "answer": ""}'), ["line 1", '"round"']),
    "script line of round -1": (with_script('{"episode": 0, "round": -1, "answer": ""}'), ["line 1", '"round"']),
    "script line without a text": (with_script('{"episode": 0, "round": 1, "answer": 3}'), ["line 1", '"answer"']),
    "script answers twice": (with_script('{"episode": 0, "round": 1, "answer": ""}\n' * 2), ["line 2", "twice"]),
    "script lacks an answer": (
        with_script('{"episode": 0, "round": 1, "answer": ""}\n{"episode": 1, "round": 1, "answer": ""}'),
        ["bad.jsonl", "episode 0, round 2, agent 0"],
    ),
    "missing wording": (lambda folder: [f"--config.wording={folder / 'none.json'}"], ["none.json"]),
    "wording with an unknown field": (with_wording("{question} {weather}"), ["wording.json", "weather"]),
    "wording that reaches into an object": (with_wording("{question.__class__}"), ["wording.json"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(capsys, tmp_path, name):
    change, said = BAD_INPUT[name]
    line = refused(capsys, *small_run.arguments(tmp_path, tmp_path / "run"), *change(tmp_path))
    for part in said:
        assert part in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["row without a key", "script lacks an answer"])
def test_bad_input_in_a_process_of_its_own(run_cli, tmp_path, name):
    change, said = BAD_INPUT[name]
    done = run_cli(*small_run.arguments(tmp_path, tmp_path / "run"), *change(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(part in done.stderr for part in said)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere/run"):
        assert "error: cannot write" in refused(capsys, *small_run.arguments(tmp_path, workdir))
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_that_is_full_at_the_first_round_leaves_nothing(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "episodes.jsonl")

    monkeypatch.setattr("atp_jax.rollout.append", full)
    line = refused(capsys, *small_run.arguments(tmp_path, tmp_path / "new" / "run"))
    assert "cannot write episodes.jsonl: No space left" in line
    assert not (tmp_path / "new").exists()


def test_an_error_within_round_one_leaves_nothing_and_later_keeps_what_is_finished(capsys, tmp_path, monkeypatch):
    whole = experiment.ScriptedPolicy.answer

    def fails_in(number):
        def answer(self, requests):
            if requests[0].round == number:
                raise UserError("the prompt is too long")
            return whole(self, requests)

        return answer

    arguments, workdir = small_run.arguments(tmp_path, tmp_path / "run"), tmp_path / "run"
    monkeypatch.setattr(experiment.ScriptedPolicy, "answer", fails_in(1))
    refused(capsys, *arguments)
    assert not workdir.exists()
    monkeypatch.setattr(experiment.ScriptedPolicy, "answer", fails_in(3))
    refused(capsys, *arguments)
    assert len((workdir / "evolve" / "scripted" / "episodes.jsonl").read_text().splitlines()) == 2 * 6
    assert (workdir / "config.json").exists() and not (workdir / "results.json").exists()
