"""Packs of threshold games in both schemas, the rules that make a game, and questions drawn from a seed."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.decisions import normalise
from atp_jax.errors import UserError
from atp_jax.organism import packs
from atp_jax.scenarios import generate_games
from atp_jax.scenarios.games import ALIGN, VALIDATION, Rules, check_rules, load_games
from atp_jax.scenarios.generate import command
from atp_jax.scenarios.threshold_game import Cell, check, messages, question, settle, system
from atp_jax.scenarios.wording import fill, load_wording


def template(**changes) -> dict:
    """A row to be filled in, in the original's schema."""
    texts = {
        "system_prompt": "One of {n}.",
        "user_prompt_mult": "{cooperation_threshold}: x{high_reward}, x{normal_reward}, x{low_reward:.2f}",
        "user_prompt_add": "{cooperation_threshold}: {delta_high}, {delta_normal}, {delta_low}",
        "collective_choice": "ring",
        "independent_choice": "wait",
    }
    return {"environment": "Bells", "template": {**texts, **changes}, "params": {"n": 10}}


PARAMS = {"n": 5, "cooperation_threshold": 2, "high_reward": 1.5, "normal_reward": 1, "low_reward": 0}


def asked(params=None, **changes) -> dict:
    """A row that is filled in, in the original's schema."""
    row = {
        "environment": "Bells",
        "system_prompt": "One of 5.",
        "user_prompt": 'Ring or wait? {"choice": "ring"}',
        "cooperative_choice": "ring",
        "independent_choice": "wait",
        "params": {**PARAMS, **(params or {})},
    }
    return {**row, **changes}


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


def saved(tmp_path: Path, rows) -> str:
    path = tmp_path / "g.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return str(path)


# --- packs -----------------------------------------------------------------------------------------------------------


def test_rows_of_both_schemas_become_games_and_items_and_limit_choose(tmp_path):
    path = saved(tmp_path, [template(), asked(), template(collective_choice="toll")])
    games = load_games(path)
    assert [game.row for game in games] == [0, 1, 2]
    assert {(game.environment, game.independent) for game in games} == {("Bells", "wait")}
    assert [game.collective for game in games] == ["ring", "ring", "toll"]
    assert [game.fixed for game in games] == [None, Rules(5, 2, 1.5, 1.0, 0.0), None]
    assert games[0].system == "One of {n}." and games[1].additive == ""
    assert fill(games[1].multiplicative) == 'Ring or wait? {"choice": "ring"}'
    assert [game.row for game in load_games(path, (2, 0))] == [2, 0]
    assert [game.row for game in load_games(path, limit=1)] == [0]
    for items, limit, message in [((3,), None, "row 3"), ((1, 1), None, "twice"), ((), 0, "limit")]:
        with pytest.raises(UserError, match=message):
            load_games(path, items, limit)


def test_the_original_files_load_as_they_are(shared):
    data = shared / "data" / "upstream"
    templates = load_games(str(data / "threshold_game_templates.json"))
    assert len(templates) == 7 and all(game.fixed is None for game in templates)
    options = {(game.environment, game.collective, game.independent) for game in templates}
    assert options == {(game.environment, game.collective, game.independent) for game in load_games()}
    for count in (350, 70):
        games = load_games(str(data / f"question_{count}.json"))
        assert len(games) == count
        assert {(game.environment, game.collective, game.independent) for game in games} == options
        rows = json.loads((data / f"question_{count}.json").read_text(encoding="utf-8"))
        for game, row in zip(games, rows, strict=True):
            assert (fill(game.system), fill(game.multiplicative)) == (row["system_prompt"], row["user_prompt"])
            assert list(vars(game.fixed).values()) == list(row["params"].values())
            assert check_rules(**vars(game.fixed)) == []


def test_no_sentence_of_the_shipped_pack_is_the_original_s(shared):
    """Names and payoffs are facts; the sentences are the project's own."""

    def sentences(*texts):
        return {normalise(part) for text in texts for part in re.split(r"[.,:]\s", text) if len(part.split()) > 4}

    def said(games, wording):
        texts = [text for game in games for text in (game.system, game.multiplicative, game.additive)]
        part = json.loads(json.dumps(wording["threshold_game"]))
        return sentences(*texts, part["outcome"], *part["system"].values(), *part["peers"].values())

    theirs = load_games(str(shared / "data" / "upstream" / "threshold_game_templates.json"))
    their_wording = load_wording(str(shared / "data" / "upstream_wording.json"), "threshold_game")
    ours = said(load_games(), load_wording("", "threshold_game"))
    assert len(ours) > 20 and not ours & said(theirs, their_wording)


BAD = [
    ([], "at least one row"),
    ("[\n{,}]", "line 2"),
    (["x"], r"row 0 \(from 0\) is not an object"),
    ([template(), {"environment": "x"}], r"row 1 .*object 'params' is missing"),
    ([{"environment": "x", "template": 3}], "object 'template' is missing"),
    ([without(template(), "environment")], "'environment' is missing"),
    ([template(system_prompt=3)], r"'template\.system_prompt' is not a text"),
    ([template(user_prompt_add=" ")], r"'template\.user_prompt_add' is empty"),
    (
        [{**template(), "template": without(template()["template"], "user_prompt_mult")}],
        r"'template\.user_prompt_mult'",
    ),
    ([template(user_prompt_mult="{n} {reward}")], r"row 0 .*'template\.user_prompt_mult': field \{reward\} is unknown"),
    ([template(), template(system_prompt="{N}")], r"row 1 .*'template\.system_prompt': field \{N\} is unknown"),
    ([template(user_prompt_add="{n.real}")], r"'template\.user_prompt_add'.*\{n\.real\} is not a plain name"),
    ([template(user_prompt_add="{n")], r"'template\.user_prompt_add'"),
    ([template(collective_choice=" Wait")], r"'template\.collective_choice'.*'template\.independent_choice'.*same"),
    ([without(asked(), "cooperative_choice")], "'cooperative_choice' is missing"),
    ([asked(cooperative_choice="wait")], "same option"),
    ([asked(user_prompt="{cooperation_threshold} ring")], r"'user_prompt'.*\{cooperation_threshold\} without a value"),
    ([asked(), asked(params={"n": 5.0})], r"row 1 .*'params\.n' is 5\.0"),
    ([asked(params={"cooperation_threshold": True})], r"'params\.cooperation_threshold' is True"),
    ([asked(params={"cooperation_threshold": 6})], "row 0 .*threshold of 6 in a game of 5 agents"),
    ([asked(params={"n": 1, "cooperation_threshold": 1})], "game of 1 agents"),
    ([asked(params={"low_reward": -1})], r"'params\.low_reward' is -1"),
    ([asked(params={"high_reward": math.inf})], r"'params\.high_reward' is inf"),
    ([asked(params={"normal_reward": "1"})], r"'params\.normal_reward' is '1'"),
]


@pytest.mark.parametrize(("rows", "message"), BAD)
def test_a_bad_pack_is_refused_with_file_row_and_key(rows, message, tmp_path):
    with pytest.raises(UserError, match=rf"g\.json.*{message}"):
        load_games(saved(tmp_path, rows))


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((1, 1, 1.2, 1.0, 0.8), "game of 1 agents: 2 to 4096"),
        ((4097, 1, 1.2, 1.0, 0.8), "game of 4097 agents"),
        ((8, 0, 1.2, 1.0, 0.8), "threshold of 0 in a game of 8 agents: 1 to 8"),
        ((8, 9, 1.2, 1.0, 0.8), "threshold of 9"),
        ((8, 4, math.nan, 1.0, 0.8), "high nan.*finite"),
        ((8, 4, math.inf, 1.0, 0.8), "high inf.*finite"),
        ((8, 4, 1.2, 1.0, -0.1), "low -0.1.*at least 0"),
        ((8, 4, 1.0, 1.0, 0.8), "high is not above normal.*game.allow_pointless"),
        ((8, 4, 0.5, 1.0, 0.8), "high 0.5, normal 1, low 0.8"),
    ],
)
def test_rules_that_make_no_game_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        check_rules(*rules)


def test_payoffs_out_of_order_are_another_game():
    assert (
        check_rules(8, 4, 1.2, 1.0, 0.8) == check_rules(2, 1, 1.2, 1.0, 0.0) == check_rules(4096, 4096, 2, 1, 0.5) == []
    )
    (said,) = check_rules(8, 4, 1.2, 1.0, 1.1)
    assert "low is not below normal" in said and "high 1.2, normal 1, low 1.1" in said
    (said,) = check_rules(8, 4, 0.9, 1.0, 0.8, allow_pointless=True)
    assert "never pays" in said
    assert len(check_rules(8, 4, 0.9, 1.0, 1.0, allow_pointless=True)) == 2


# --- questions drawn from a seed -------------------------------------------------------------------------------------


@given(st.integers())
def test_drawn_rules_are_games_in_which_colluding_can_pay_and_can_cost(seed):
    rules = generate_games.draw(random.Random(seed))
    assert check_rules(**vars(rules)) == [] and rules.high > 1 and rules.threshold >= 2


def made(tmp_path, *arguments: str) -> Path:
    out = tmp_path / "made" / "q.json"
    assert command(generate_games.run, "", [f"--out={out}", *arguments]) == 0
    return out


def test_questions_are_a_function_of_the_seed_and_load_again(tmp_path, capsys):
    out = made(tmp_path, "--per-template=5")
    assert "35 questions from 7 templates" in capsys.readouterr().out
    first, rows = out.read_bytes(), json.loads(out.read_text(encoding="utf-8"))
    assert made(tmp_path, "--per-template=5").read_bytes() == first
    assert made(tmp_path, "--per-template=5", "--seed=1").read_bytes() != first
    fewer = json.loads(made(tmp_path, "--per-template=2").read_text(encoding="utf-8"))
    assert fewer == [row for i, row in enumerate(rows) if i % 5 < 2]
    assert [path.name for path in out.parent.iterdir()] == ["q.json"]
    assert len({json.dumps(row["params"]) for row in rows}) > 30


def test_a_question_is_asked_as_the_first_round_of_its_game_is(tmp_path):
    wording = load_wording("", "threshold_game")
    cell = Cell(2, 1, 2.0, 1.0, 0.0, additive=False, everyone=True, peers="final_only", window=None)
    games, questions = load_games(), load_games(str(made(tmp_path, "--per-template=3")))
    assert check(questions, [cell], wording, "default") == []
    for number, drawn in enumerate(questions):
        game, played = games[number // 3], settle(drawn, cell)
        assert (drawn.environment, drawn.collective) == (game.environment, game.collective)
        shown = [
            messages(
                system(each, played, wording, "default"), question(each, played, wording, "default"), (), 1, "default"
            )
            for each in (drawn, game)
        ]
        assert shown[0] == shown[1]


def test_the_original_templates_give_questions_too(shared, tmp_path):
    out = tmp_path / "q.json"
    # As the README writes it, in a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "atp_jax.scenarios.generate_games", "--per-template", "2", "--out", str(out)]
        + ["--templates", str(shared / "data" / "upstream" / "threshold_game_templates.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(load_games(str(out))) == 14


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([asked()], [], "row 0 .*is a question already"),
        ([template(user_prompt_mult="{high}")], [], r"\{high\} is unknown"),
        ([template(user_prompt_mult="{n:s}")], [], r"\{n:s\}"),
        ("", [], "empty"),
        ([template()], ["--per-template=0"], "per-template"),
        ([template()], ["--seeds=3"], "seeds"),
        ([template()], ["more"], "'more'"),
        ([template()], ["--out="], "--out"),
    ],
)
def test_what_cannot_be_generated_is_one_line_and_leaves_nothing(rows, arguments, message, tmp_path, capsys):
    out = tmp_path / "made" / "q.json"
    source = saved(tmp_path, rows)
    assert command(generate_games.run, "", [f"--templates={source}", f"--out={out}", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and re.search(message, said)
    assert not out.exists()


@pytest.mark.parametrize(("path", "situations", "count", "seed"), packs.GAME_PACKS, ids=["align", "validation"])
def test_the_packs_to_align_on_are_what_the_module_gives(path, situations, count, seed):
    assert packs.questions(situations, count, seed) == json.loads(Path(path).read_text())
    games = load_games(path)
    assert len(games) == count and all(game.fixed for game in games)


def test_the_packs_keep_clear_of_one_another_and_of_what_is_played():
    loaded = [load_games(path) for path in ("", ALIGN, VALIDATION)]  # what is played, aligned on, stopped by
    pairs = [{frozenset((game.collective, game.independent)) for game in games} for games in loaded]
    situations = [{game.environment for game in games} for games in loaded]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not pairs[one] & pairs[other] and not situations[one] & situations[other]
