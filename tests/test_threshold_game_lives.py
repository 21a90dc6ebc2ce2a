"""Games that are lived through: who is asked and shown what, what is recorded, and that a grid is one batch."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from atp_jax.envs import threshold_game as env
from atp_jax.errors import UserError
from atp_jax.generate.sampling import Sampling
from atp_jax.model import ORGANISM, load_model
from atp_jax.models import lora as adapters
from atp_jax.policies.model import ModelPolicy
from atp_jax.policies.types import Answer
from atp_jax.rollout import run_conditions
from atp_jax.scenarios.games import load_games
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import EvolveSettings, GameSettings, Settings, check_settings
from atp_jax.testbeds import threshold_game as testbed

WORDING = load_wording("", "threshold_game")
GAMES = load_games()


def settings(evolve=types.MappingProxyType({}), **game) -> Settings:
    return Settings(
        testbed="threshold_game",
        evolve=EvolveSettings(**({"rounds": 3, "window": 3} | dict(evolve))),
        game=GameSettings(**({"agents": 4, "thresholds": (2,)} | game)),
    )


def choose(game, request) -> Answer:
    """Agents of even number collude from the second round on; the third is unreadable; ids tell who spoke."""
    colludes = request.agent % 2 == 0 and request.round > 1
    option = game.collective if colludes else game.independent
    text = "well" if request.agent == 3 else f'{{"choice": "{option}"}}'
    return Answer(text, (request.episode, request.agent, request.round), "stop", -1.0)


class Player:
    def __init__(self, games, samples=1):
        self.asked, self.recalled, self._games, self._samples = [], [], games, samples

    def answer(self, requests):
        self.asked.append(list(requests))
        return [choose(self._games[request.episode // self._samples], request) for request in requests]

    def recall(self, requests):
        self.recalled.append(list(requests))


def play(chosen, folder, model="base", games=GAMES[:2]):
    conditions = testbed.conditions(chosen, model, 0)
    player = Player(games, chosen.evolve.samples)
    paths = [folder / condition.name / "episodes.jsonl" for condition in conditions]
    found = run_conditions(conditions, games, player, WORDING, chosen, paths, lambda finished: None)
    return dict(zip((condition.name for condition in conditions), found, strict=True)), player, paths


def test_records_are_what_the_environment_pays_and_counts(tmp_path):
    found, player, (path,) = play(settings(payoffs=((1.5, 1.0, 0.4),)), tmp_path)
    (records,) = found.values()
    assert [(r["round"], r["episode"], r["agent"]) for r in records] == [
        (n, e, a) for n in (1, 2, 3) for e in (0, 1) for a in range(4)
    ]
    assert records == [json.loads(line) for line in path.read_text().splitlines()]
    first, second = (records[8 * n : 8 * n + 4] for n in (0, 1))  # the first game's
    assert [r["decision"] for r in first] == ["comply", "comply", "comply", "unparsed"]
    assert [(r["count"], r["success"], r["reward"], r["capital"]) for r in first] == [(0, False, 0.0, 1.0)] * 4
    assert [r["decision"] for r in second] == ["violate", "comply", "violate", "unparsed"]
    assert [(r["count"], r["success"], r["reward"], r["capital"]) for r in second] == [(2, True, 0.5, 1.5)] * 4
    assert {r["environment"] for r in records} == {game.environment for game in GAMES[:2]}
    assert not any(r["fixed"] or r["unaligned"] for r in records)


def test_everyone_sees_everyone_elses_choice_and_the_outcome(tmp_path):
    _, player, _ = play(settings(), tmp_path)
    game, shown = GAMES[0], {request.agent: request.messages for request in player.asked[2][:4]}
    for agent, messages in shown.items():
        assert [m["role"] for m in messages] == ["system", *(["user", "assistant", "user"] * 2), "user"]
        told, outcome = messages[6]["content"].split("\n")  # of round 2, when agents 0 and 2 colluded
        assert told.count(f'"{game.collective}"') == 2 - (agent in (0, 2)) and "2 of 4 chose" in outcome
        assert messages[5]["tokens"] == (0, agent, 2)


def test_controls_take_away_history_or_peers(tmp_path):
    controls = ("none", "no_history", "no_peers")
    found, player, _ = play(settings({"controls": controls}), tmp_path)
    assert [name.partition("-t2-1.2_1_0.8")[2] for name in found] == ["", "-no_history", "-no_peers"]
    plain, alone, blind = (player.asked[2][8 * n : 8 * n + 8] for n in range(3))  # all in one batch
    assert len(player.asked[2]) == 24 and len({q.condition for q in player.asked[2]}) == 3
    for one, other, third in zip(plain, alone, blind, strict=True):
        assert other.messages == [one.messages[0], one.messages[-1]]
        assert [m["role"] for m in third.messages] == [m["role"] for m in one.messages]
        assert len(third.messages[6]["content"]) < len(one.messages[6]["content"])


def test_a_grid_has_one_condition_a_cell_and_its_randomness_does_not_depend_on_the_grid():
    grid = settings(thresholds=(2, 3, 4), payoffs=((1.2, 1.0, 0.8), (1.5, 1.0, 0.5)))
    found = testbed.conditions(grid, "dpo", 1)
    assert [c.setting for c in found] == [
        {"game.threshold": t, "game.payoffs": list(p)} for p in grid.game.payoffs for t in grid.game.thresholds
    ]
    assert len({c.index for c in found}) == len({c.name for c in found}) == 6
    near = testbed.conditions(settings(payoffs=((1.2, 1.0, 0.8), (1.2000001, 1.0, 0.8))), "base", 0)
    assert len({c.name for c in near}) == 2
    (one,) = testbed.conditions(settings(thresholds=(3,), payoffs=((1.5, 1.0, 0.5),)), "dpo", 0)
    assert (one.index, one.name) == next((c.index, c.name) for c in found if c.name == one.name)


@pytest.mark.parametrize(("where", "agents"), [("first", [0, 1]), ("last", [2, 3])])
def test_fixed_cooperators_collude_unasked(tmp_path, where, agents):
    found, player, _ = play(settings(fixed_cooperators=2, fixed_at=where), tmp_path)
    (records,) = found.values()
    for record in records:
        assert record["fixed"] == (record["agent"] in agents)
        if record["fixed"]:
            assert record["decision"] == "violate" and record["messages"] == [] and record["tokens"] == []
    assert all(request.agent not in agents for asked in player.asked for request in asked)
    assert records[0]["count"] == 2 and records[0]["success"]


def test_what_was_finished_is_recalled(tmp_path):
    chosen = settings({"samples": 2}, fixed_cooperators=1)
    whole, first, (path,) = play(chosen, tmp_path)
    data = path.read_bytes()
    path.write_bytes(b"".join(data.splitlines(keepends=True)[:27]) + b'{"epi')  # of 16 lines a round
    again, second, _ = play(chosen, tmp_path)
    assert again == whole and path.read_bytes() == data
    assert second.recalled == first.asked[:1] and second.asked == first.asked[1:]


def test_questions_are_played_by_their_own_rules(tmp_path):
    rows = [
        {"environment": "Barn", "system_prompt": "A barn.", "user_prompt": f"Build or not, {n} of you.",
         "cooperative_choice": "build", "independent_choice": "rest",
         "params": {"n": n, "cooperation_threshold": t, "high_reward": 1.5, "normal_reward": 1.0, "low_reward": 0.5}}
        for n, t in ((3, 2), (5, 4))
    ]  # fmt: skip
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(rows))
    games = load_games(str(path))
    found, _, _ = play(settings(), tmp_path, games=games)
    (records,) = found.values()
    second = [r for r in records if r["round"] == 2]
    assert [r["episode"] for r in second] == [0] * 3 + [1] * 5
    assert [r["success"] for r in second] == [True] * 3 + [False] * 5  # 2 of 3, and 3 of 5 where it takes 4
    asked = testbed.questions(games, WORDING, settings())
    assert [q.messages for q in asked] == [
        [{"role": "system", "content": "A barn."}, {"role": "user", "content": row["user_prompt"]}] for row in rows
    ]
    assert (asked[0].comply, asked[0].violate) == ("rest", "build") and asked[0].steering["violate"].count("build")
    with pytest.raises(UserError, match="is a template"):
        testbed.questions(GAMES[:1], WORDING, settings())
    with pytest.raises(UserError, match="row 0 .* is a question with rules of its own"):
        testbed.notes(settings(), games, WORDING)
    # How games are played says nothing of what is trained on.
    assert testbed.questions(games, WORDING, settings(mode="additive")) == asked


def test_rewards_permute_with_the_games_they_are_of():
    """A batch of games of different sizes pays each as it is paid alone."""
    with jax.enable_x64():
        cells = [testbed.conditions(settings(agents=n, thresholds=(t,)), "", 0)[0].cell for n, t in ((2, 1), (6, 3))]
        codes = np.array([[1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 2, 0]], np.int32)
        params = testbed._params(cells, np.zeros((2, 6), bool), True)
        _, together = testbed._step(jax.vmap(env.init)(params), codes, params)
        for row, (cell, size) in enumerate(zip(cells, (2, 6), strict=True)):
            alone = testbed._params([cell], np.zeros((1, size), bool), True)
            _, outcome = testbed._step(jax.vmap(env.init)(alone), codes[row : row + 1, :size], alone)
            np.testing.assert_array_equal(outcome.reward[0], together.reward[row, :size])


def test_unaligned_agents_answer_as_the_base_does(tmp_path):
    """Half a population wears the adapter: first rounds are those of the two pure populations."""
    base = load_model(ORGANISM)
    lora = adapters.init(base.config, 4, 8, ("query", "down"), 0, base.mesh)
    draw = np.random.default_rng(0)
    lora = lora.replace(
        b={name: jax.numpy.asarray(draw.normal(size=b.shape) * 0.5, b.dtype) for name, b in lora.b.items()}
    )
    worn, found = dataclasses.replace(base, lora=lora), {}
    for name, model, share in (("base", base, 0.0), ("dpo", worn, 0.0), ("mixed", worn, 0.5)):
        chosen = settings({"rounds": 1}, unaligned=share)
        (condition,) = testbed.conditions(chosen, "dpo", 0)  # of the same name and randomness
        policy = ModelPolicy(model, Sampling(max_new_tokens=8), 0)
        path = tmp_path / name / "episodes.jsonl"
        (found[name],) = run_conditions([condition], GAMES[:2], policy, WORDING, chosen, [path], lambda finished: None)
    assert [r["unaligned"] for r in found["mixed"]] == [True, True, False, False] * 2
    for mixed, plain, aligned in zip(found["mixed"], found["base"], found["dpo"], strict=True):
        assert mixed["tokens"] == (plain if mixed["unaligned"] else aligned)["tokens"]
    assert [r["tokens"] for r in found["base"]] != [r["tokens"] for r in found["dpo"]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"thresholds": (5,)}, "threshold of 5 in a game of 4"),
        ({"thresholds": (0,)}, "threshold of 0"),
        ({"agents": 1, "thresholds": (1,)}, "game of 1 agents"),
        ({"payoffs": ((1.0, 1.2, 0.8),)}, "game.allow_pointless"),
    ],
)
def test_rules_that_make_no_game_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        testbed.notes(settings(**changes), GAMES, WORDING)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"payoffs": ((1.2, 1.0),)}, "game.payoffs"),
        ({"thresholds": ()}, "game.thresholds"),
        ({"thresholds": (2, 2)}, "game.thresholds"),
        ({"mode": "divided"}, "game.mode"),
        ({"fixed_cooperators": 4}, "game.fixed_cooperators"),
        ({"unaligned": 1.5}, "game.unaligned"),
        ({"unaligned": 0.5}, "align.method"),  # nobody would be aligned
    ],
)
def test_settings_that_make_no_game_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        check_settings(settings(**changes))


def test_what_costs_nothing_to_fail_at_is_said_and_allowed():
    said = testbed.notes(settings(payoffs=((1.2, 1.0, 1.0),)), GAMES, WORDING)
    assert any("costs nothing" in sentence for sentence in said)
