"""Episodes that go their own ways leave what those in lockstep leave, in whatever order they are answered and however
often they are interrupted."""

import json
import random
import zlib

import pytest
import small_run

from atp_jax import testbeds
from atp_jax.__main__ import main
from atp_jax.errors import UserError
from atp_jax.policies.scripted import ScriptedPolicy
from atp_jax.policies.types import Answer
from atp_jax.rollout import run_conditions, run_freely
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import read_settings

CODE = "I run it.\n```python\nprint(41 + 1)\n```"
CHANGES = {
    "role_play": {"evolve": {"rounds": 4, "window": 2, "samples": 2, "controls": ("none", "no_history")}},
    "threshold_game": {"evolve": {"rounds": 3}, "game": {"agents": 4, "thresholds": (2, 4), "fixed_cooperators": 1}},
    "tool_use": {"evolve": {"rounds": 2, "window": None}, "tool": {"problems": 2, "max_calls": 2}},
}


class Interruption(Exception):
    pass


class Player:
    """Answers by the address of a request; freely, one of those that wait, drawn by `seed`, until `patience` ends."""

    def __init__(self, options, seed=0, patience=10**9):
        self._options, self._draw, self._patience, self.asked = options, random.Random(seed), patience, []

    def _answer(self, request) -> Answer:
        self.asked.append((request.condition, request.round, request.turn, request.episode, request.agent))
        said = self._options(request.episode)
        text = said[zlib.crc32(repr(request.stream).encode()) % len(said)]
        return Answer(text, (request.episode, request.round), "stop", -request.agent / 3)

    def answer(self, requests):
        return [self._answer(request) for request in requests]

    def recall(self, requests):
        pass

    def pursue(self, requests, follow):
        waiting = list(requests)
        while waiting:
            if not self._patience:
                raise Interruption
            self._patience -= 1
            request = waiting.pop(self._draw.randrange(len(waiting)))
            waiting += follow(request, self._answer(request))


class World:
    """A testbed's shipped scenarios, the first two of them, in a folder."""

    def __init__(self, name, folder):
        self.settings = read_settings({"testbed": name, "data": {"limit": 2}} | CHANGES[name])
        self.bed, self.wording, self.folder = testbeds.testbed(self.settings), load_wording("", name), folder
        self.scenarios = self.bed.scenarios(self.settings)
        self.conditions = self.bed.conditions(self.settings, "base", 0)
        self.rounds = []

    def options(self, episode):
        if self.settings.testbed == "tool_use":
            return [CODE, "Answer: 42", "I do not know.", CODE.replace("41", "0 / ")]
        scenario = self.scenarios[episode // self.settings.evolve.samples]
        if self.settings.testbed == "role_play":
            choices = scenario.comply, scenario.violate
        else:
            choices = scenario.independent, scenario.collective
        return [*(json.dumps({"choice": choice}) for choice in choices), "well"]

    def paths(self, run):
        return [self.folder / run / condition.name / "episodes.jsonl" for condition in self.conditions]

    def live(self, run, player, check=None):
        """Freely, if there is a `check`; -> records"""
        what = self.conditions, self.scenarios, player, self.wording, self.settings, self.paths(run), self.rounds.append
        return run_freely(*what, check) if check else run_conditions(*what)


@pytest.fixture(params=CHANGES)
def world(request, tmp_path):
    return World(request.param, tmp_path)


def test_the_same_records_and_files_as_in_lockstep(world):
    expected = world.live("lockstep", Player(world.options))
    ended = [(finished.condition.name, finished.round) for finished in world.rounds]
    for seed in range(3):
        world.rounds.clear()
        player = Player(world.options, seed)
        assert world.live(str(seed), player, lambda: None) == expected
        for path, whole in zip(world.paths(str(seed)), world.paths("lockstep"), strict=True):
            assert path.read_bytes() == whole.read_bytes()
            assert [left.name for left in path.parent.iterdir()] == ["episodes.jsonl"]
        assert sorted((finished.condition.name, finished.round) for finished in world.rounds) == sorted(ended)
        assert len(set(player.asked)) == len(player.asked)
    rounds = [number for _, number, *_ in player.asked]
    assert rounds != sorted(rounds)  # somebody was ahead of others


def test_interrupted_anywhere_it_goes_on(world):
    """No round of an episode that was over is asked again, and every round is reported."""
    whole = Player(world.options)
    expected = world.live("lockstep", whole)
    journals = [path.with_name("journal.jsonl") for path in world.paths("run")]
    reported, patience, over = set(), 1, set()
    for starts in range(1, 200):
        world.rounds.clear()
        player = Player(world.options, starts, patience)
        try:
            found = world.live("run", player, lambda: None)
            break
        except Interruption:
            reported |= {(one.condition.name, one.round) for one in world.rounds}
            patience = patience + 1 if starts < 6 else len(whole.asked) // 3
        finally:
            assert not over & {(index, number, episode) for index, number, _, episode, _ in player.asked}
        for journal, condition in zip(journals, world.conditions, strict=True):
            lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
            over |= {(condition.index, one["round"], one["episode"]) for one in map(json.loads, lines)}
        if lines and starts % 2:  # a kill may tear the line that is being written, and leave others of its round
            agents = [one for one in map(json.loads, lines) if one["episode"] == json.loads(lines[-1])["episode"]]
            over.discard((condition.index, agents[-1]["round"], agents[-1]["episode"]))
            journals[-1].write_text("".join(lines)[:-40])
    assert starts > 6 and found == expected
    for path, lockstep in zip(world.paths("run"), world.paths("lockstep"), strict=True):
        assert path.read_bytes() == lockstep.read_bytes()
    assert {(one.condition.name, one.round) for one in world.rounds} >= reported
    assert len(over) > len(world.scenarios)


def test_what_ends_the_run_is_raised_when_a_round_of_an_episode_is_on_disk(world):
    def check():
        journals = [path.with_name("journal.jsonl") for path in world.paths("run")]
        assert any(journal.exists() and journal.read_bytes() for journal in journals)
        raise Interruption

    with pytest.raises(Interruption):
        world.live("run", Player(world.options), check)
    assert world.live("run", Player(world.options), lambda: None) == world.live("lockstep", Player(world.options))


def test_another_configuration_is_noticed(world):
    with pytest.raises(Interruption):
        world.live("run", Player(world.options, patience=20), lambda: None)
    journal = next(path for path in world.folder.rglob("journal.jsonl") if path.read_bytes())
    first = json.loads(journal.read_text().splitlines()[0])
    journal.write_text(journal.read_text().replace(f'"reward": {json.dumps(first["reward"])}', '"reward": 77.5', 1))
    with pytest.raises(UserError, match=f"round {first['round']} is not what this configuration gives"):
        world.live("run", Player(world.options), lambda: None)


def test_an_error_before_any_round_is_over_takes_nothing_away(tmp_path, monkeypatch):
    """And in the end there is what lockstep leaves, the results as well."""
    monkeypatch.chdir(small_run.ROOT)
    assert main(small_run.arguments(tmp_path, tmp_path / "lockstep")) == 0
    freely = small_run.arguments(tmp_path, tmp_path / "run", 3, 4, 2, "--config.evolve.lockstep=False")

    def failing(self, requests):
        if requests[0].episode == 5:
            raise UserError("no room")
        return answer(self, requests)

    answer = ScriptedPolicy.answer
    with monkeypatch.context() as patch:
        patch.setattr(ScriptedPolicy, "answer", failing)
        assert main(freely) == 2
    journal = tmp_path / "run" / "evolve" / "scripted" / "journal.jsonl"
    assert journal.read_bytes() and not (tmp_path / "run" / "metrics.jsonl").exists()
    assert main(freely) == 0
    assert small_run.left_behind(tmp_path / "run") == small_run.left_behind(tmp_path / "lockstep")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(line["seconds"] is None for line in lines)
