"""What is said in the threshold game: the original's golden episodes to the letter, and the default's own manners."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.decisions import read_decision
from atp_jax.errors import UserError
from atp_jax.scenarios.games import PLACEHOLDERS, Game, load_games
from atp_jax.scenarios.threshold_game import (
    Cell,
    Turn,
    check,
    messages,
    outcome_text,
    peers_texts,
    question,
    settle,
    system,
)
from atp_jax.scenarios.wording import load_wording

# --- the golden episodes ---------------------------------------------------------------------------------------------


def cell_of(episode: dict) -> Cell:
    return Cell(
        agents=episode["agents"],
        threshold=episode["threshold"],
        high=episode["high"],
        normal=episode["normal"],
        low=episode["low"],
        additive=episode["reward_mode"] == "additive",
        everyone=episode["success_applies_to_all"],
        peers=episode["peers"],
        window=episode["window"],
    )


def paid(cell: Cell, capital: float, decision: str, success: bool) -> tuple[float, float]:
    """Reward and new capital as the original counts them."""
    colludes = decision == "violate"
    factor = cell.high if success and (colludes or cell.everyone) else cell.normal
    factor = cell.low if colludes and not success else factor
    if cell.additive:
        return (factor - 1.0) * cell.base, capital + (factor - 1.0) * cell.base
    return capital * factor - capital, capital * factor


def test_golden_episodes_to_the_letter(shared):
    wording = load_wording(str(shared / "data" / "upstream_wording.json"), "threshold_game")
    games = load_games(str(shared / "data" / "upstream" / "threshold_game_templates.json"))
    lines = (shared / "golden" / "upstream.threshold_game.jsonl").read_text(encoding="utf-8").splitlines()
    episodes = [json.loads(line) for line in lines]
    assert {episode["peers"] for episode in episodes} == {"final_only", "full"}
    assert {episode["reward_mode"] for episode in episodes} == {"multiplicative", "additive"}
    for episode in episodes:
        game, cell = games[episode["index"]], cell_of(episode)
        check([game], [cell], wording, "upstream")
        told, asked = system(game, cell, wording, "upstream"), question(game, cell, wording, "upstream")
        capitals, histories = [1.0] * cell.agents, [[] for _ in range(cell.agents)]
        for number in range(1, episode["rounds"] + 1):
            steps = [step for step in episode["steps"] if step["round"] == number]
            assert [step["agent"] for step in steps] == list(range(cell.agents))
            answers = [step["answer"] for step in steps]
            decisions = [
                read_decision(answer, game.independent, game.collective, "upstream", "threshold_game")
                for answer in answers
            ]
            assert decisions == [step["choice"] for step in steps]
            count = decisions.count("violate")
            success = count >= cell.threshold
            peers = peers_texts(game, cell, decisions, answers, wording, "upstream")
            for step, history, decision, others in zip(steps, histories, decisions, peers, strict=True):
                assert messages(told, asked, history, cell.window, "upstream") == step["messages"]
                reward, capital = paid(cell, capitals[step["agent"]], decision, success)
                assert (repr(reward), repr(capital)) == (repr(step["reward"]), repr(step["capital"]))
                capitals[step["agent"]] = capital
                said = outcome_text(game, cell, decision, count, success, reward, wording)
                history.append(Turn(asked, step["answer"], (), others, said))


# --- the default -----------------------------------------------------------------------------------------------------

CELL = Cell(
    agents=3, threshold=2, high=1.2, normal=1.0, low=0.8, additive=False, everyone=True, peers="final_only", window=None
)
GAME = Game(
    row=5,
    environment="PublicFund",
    collective="invest",
    independent="keep money",
    system="One of {n}.",
    multiplicative="{cooperation_threshold}: x{high_reward}, x{normal_reward}, x{low_reward}",
    additive="{cooperation_threshold}: {delta_high}, {delta_normal}, {delta_low}",
    fixed=None,
)
OWN = load_wording("", "threshold_game")
THOUGHT = '<think>\nlet us {"choice": "invest"}\n</think>'


def upstream_pack(shared):
    return load_wording(str(shared / "data" / "upstream_wording.json"), "threshold_game")


def test_a_template_is_filled_for_its_cell():
    assert question(GAME, CELL, OWN, "default") == "2: x1.2, x1.0, x0.8"
    additive = replace(CELL, additive=True, base=0.125)
    assert question(GAME, additive, OWN, "default") == "2: 0.025, 0.0, -0.025"  # no idle digits
    assert question(GAME, additive, OWN, "upstream") == "2: 0.02, 0.0, -0.02"  # the original rounds to cents
    ints = replace(CELL, high=2, normal=1, low=0)
    assert question(GAME, ints, OWN, "upstream") == "2: x2.0, x1.0, x0.0"


@pytest.mark.parametrize("additive", [False, True])
def test_the_shipped_games_say_options_rules_and_how_to_answer(additive):
    cell = replace(CELL, agents=7, threshold=5, high=1.9, normal=1.1, low=0.3, additive=additive)
    games = load_games()
    assert check(games, [cell, replace(cell, peers="full"), replace(cell, peers="none")], OWN, "default") == []
    for game in games:
        told, asked = system(game, cell, OWN, "default"), question(game, cell, OWN, "default")
        for option, decision in ((game.collective, "violate"), (game.independent, "comply")):
            example = json.dumps({"choice": option})
            assert example in told and f'"{option}"' in asked
            assert read_decision(example, game.independent, game.collective) == decision
        figures = ("+0.9", "+0.1", "-0.7") if additive else ("x1.9", "x1.1", "x0.3")
        assert all(figure in asked for figure in ("5", "7", *figures))


def test_whom_a_success_pays_is_said_where_the_pack_says_it(shared):
    choosers = replace(CELL, everyone=False)
    assert system(GAME, CELL, OWN, "default") != system(GAME, choosers, OWN, "default")
    assert "everyone" not in system(GAME, choosers, OWN, "default")
    theirs = upstream_pack(shared)
    assert system(GAME, CELL, theirs, "upstream") == system(GAME, choosers, theirs, "upstream")
    told = outcome_text(GAME, choosers, "comply", 2, True, 0.0, theirs)
    assert "(66.67%). Cooperation succeeded! Collective x1.2, independent x1.0.. " in told


def test_peers_are_listed_without_oneself():
    decisions, answers = ("violate", "unparsed", "comply"), (THOUGHT + "INVEST", "?", "KEEP")
    first, second, third = peers_texts(GAME, CELL, decisions, answers, OWN, "default")
    assert '0 "invest"' in second and '2 "keep money"' in second and "1" not in second
    assert '0 "invest"' in third and "1 not readable" in third
    assert "invest" not in first and "1 not readable" in first


def test_no_thought_and_no_tag_of_a_peer_is_shown():
    answers = (THOUGHT + "\nYes.\n <|im_end|>", "<think> invest {", "")
    shown = peers_texts(GAME, replace(CELL, peers="full"), ("unparsed",) * 3, answers, OWN, "default")
    assert "Yes. |im_end|" in shown[1] and "let us" not in "".join(shown) and "<" not in "".join(shown)
    assert "1 not readable" in shown[0] and "2 not readable" in shown[0]
    raw = peers_texts(GAME, replace(CELL, peers="full"), ("unparsed",) * 3, answers, OWN, "upstream")
    assert answers[0] in raw[1] and answers[1] in raw[0]
    assert "readable" not in "".join(raw)


@given(st.lists(st.text(), min_size=2, max_size=4))
def test_no_answer_puts_a_tag_or_a_line_into_what_peers_are_shown(answers):
    cell = replace(CELL, agents=len(answers), peers="full")
    for text in peers_texts(GAME, cell, ["unparsed"] * len(answers), answers, OWN, "default"):
        assert text.isprintable() and not set(text) & set("<>")


def test_without_peers_only_the_own_result_is_said(shared):
    alone = replace(CELL, peers="none")
    assert peers_texts(GAME, alone, ("violate",) * 3, ("a",) * 3, OWN, "default") == ["", "", ""]
    told = {outcome_text(GAME, alone, "comply", count, count > 1, 0.25, OWN) for count in range(4)}
    assert told == {"You earned +0.25."}
    with pytest.raises(UserError, match=r"'threshold_game\.outcome_alone'.*no_peers"):
        check([GAME], [alone], upstream_pack(shared), "upstream")


def test_an_agent_is_told_that_it_was_not_understood():
    read, unread = (outcome_text(GAME, CELL, decision, 2, True, 0.2, OWN) for decision in ("comply", "unparsed"))
    assert unread == "Your answer could not be read. " + read
    assert read == '2 of 3 chose "invest". It worked. You earned +0.2.'


turns = st.lists(
    st.builds(Turn, st.just("q"), st.sampled_from(["", "a"]), st.sampled_from([(), (1, 2)]), st.sampled_from(["", "p"]),
              st.just("o")),
    max_size=6,
)  # fmt: skip


@given(history=turns, window=st.none() | st.integers(0, 7))
def test_the_window_shows_whole_rounds(history, window):
    shown = history if window is None else history[len(history) - min(window, len(history)) :]
    made = messages("s", "now?", history, window, "default")
    assert [m["role"] for m in made] == ["system", *["user", "assistant", "user"] * len(shown), "user"]
    assert (made[0]["content"], made[-1]["content"]) == ("s", "now?")
    for turn, (asked, answered, told) in zip(shown, zip(*[iter(made[1:-1])] * 3, strict=True), strict=True):
        assert (asked["content"], answered["content"]) == (turn.question, turn.answer)
        assert told["content"] == ("p\no" if turn.peers else "o")
        assert answered.get("tokens", ()) == turn.tokens and asked.keys() == told.keys() == {"role", "content"}
    flat = [m["content"] for m in messages("s", "now?", history, window, "upstream")]
    assert flat == ["s"] + [t for turn in shown for t in ("q", turn.answer, *turn.peers, "o")] + ["now?"]


def test_a_question_stands_as_it_is_and_brings_its_rules(shared):
    path = str(shared / "data" / "upstream" / "question_70.json")
    row = json.loads((shared / "data" / "upstream" / "question_70.json").read_text(encoding="utf-8"))[3]
    (game,) = load_games(path, (3,))
    cell = settle(game, CELL)
    assert (cell.agents, cell.threshold, cell.high) == (14, 4, 1.81) and cell.peers == CELL.peers
    assert settle(GAME, CELL) is CELL
    for wording in (OWN, upstream_pack(shared)):
        assert system(game, cell, wording, "default") == row["system_prompt"]
        assert question(game, cell, wording, "default") == row["user_prompt"]
    # The original puts its rules around a question when that is played.
    played = system(game, cell, upstream_pack(shared), "upstream")
    assert played.startswith(row["system_prompt"] + "\n\nInvestment rules") and played.endswith('"keep money"}.')
    assert question(game, cell, upstream_pack(shared), "upstream") == row["user_prompt"]
    with pytest.raises(UserError, match=r"row 3 \(PublicFund\).*game\.mode=additive"):
        check([game], [replace(CELL, additive=True)], OWN, "default")


def test_check_says_each_thing_once_and_finds_what_cannot_be_filled():
    free = replace(CELL, low=1.0)
    assert len(check([GAME, GAME], [free, replace(free, peers="full")], OWN, "default")) == 1
    with pytest.raises(UserError, match="high is not above normal"):
        check([GAME], [replace(CELL, high=1.0)], OWN, "default")
    assert len(check([GAME], [replace(CELL, high=1.0)], OWN, "default", allow_pointless=True)) == 1
    with pytest.raises(UserError, match=r"\{n:s\}"):
        check([replace(GAME, system="{n:s}")], [CELL], OWN, "default")


def test_every_field_and_placeholder_that_is_known_has_a_value():
    names = sorted(PLACEHOLDERS)
    game = replace(GAME, multiplicative=" ".join(f"{{{name}}}" for name in names))
    assert len(question(game, CELL, OWN, "default").split()) == len(names)
    fields = "collective independent agents threshold high normal low delta_high delta_normal delta_low additive_base"
    part = {**OWN["threshold_game"], "outcome_alone": " ".join(f"{{{name}}}" for name in fields.split())}
    said = outcome_text(GAME, replace(CELL, peers="none"), "comply", 0, False, 0.0, {"threshold_game": part})
    assert said.startswith("invest keep money 3 2 1.2 1.0 0.8 ")
