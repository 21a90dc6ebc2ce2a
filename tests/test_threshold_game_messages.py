"""What is said in the threshold game: the original's golden episodes to the letter, and the default's own manners."""

import json

import pytest

from atp_jax.decisions import read_decision
from atp_jax.errors import UserError
from atp_jax.scenarios.games import load_games
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
