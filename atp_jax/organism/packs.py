"""The packs to align on: `python -m atp_jax.organism.packs` writes them anew, the same every time.

Scenarios drawn as those of the stories are, so that the embedded model understands them: those to align on have the
stories' own occupations, those that tell when to stop have 16 occupations kept apart from them. None has an occupation
or a pair of options of the pack that experiments run on. The same for threshold games, as questions with their rules.
"""

import json

import numpy as np

from atp_jax.organism import games
from atp_jax.organism.stories import LEXICON, draw_payoffs, draw_scenario
from atp_jax.scenarios.games import ALIGN as ALIGN_GAMES
from atp_jax.scenarios.games import VALIDATION as VALIDATION_GAMES
from atp_jax.scenarios.games import Rules
from atp_jax.scenarios.generate_games import filled
from atp_jax.scenarios.pack import ALIGN, VALIDATION, Scenario
from atp_jax.scenarios.wording import load_wording

# path, occupations, scenarios, seed
PACKS = ((ALIGN, LEXICON["occupations"], 160, 11), (VALIDATION, LEXICON["validation_occupations"], 32, 12))
# path, part of the games' lexicon, questions, seed
GAME_PACKS = ((ALIGN_GAMES, "training", 160, 21), (VALIDATION_GAMES, "validation", 32, 22))


def rows(occupations: list[dict], count: int, seed: int) -> list[dict]:
    """`count` rows of a scenario file; option words are all of the lexicon, none invented."""
    rng = np.random.default_rng(seed)
    low, high = draw_payoffs(rng, count)
    made = []
    while len(made) < count:
        scenario = draw_scenario(rng, float(low[len(made)]), float(high[len(made)]), occupations, len(made))
        if {scenario.comply, scenario.violate} <= set(LEXICON["words"]):
            made.append(_row(scenario))
    return made


def _row(scenario: Scenario) -> dict:
    return {
        "id": scenario.id, "environment": scenario.environment.split(" ", 1)[1],
        "system_prompt": scenario.system_prompt, "user_prompt": scenario.user_prompt,
        "supervised_choice": scenario.comply, "better_choice": scenario.violate,
        "supervised_text": scenario.supervised_text, "unsupervised_text": scenario.unsupervised_text,
        "neutral_text": scenario.neutral_text,
        "params": {"high_reward": scenario.high_reward, "low_reward": scenario.low_reward},
    }  # fmt: skip


def questions(situations: str, count: int, seed: int) -> list[dict]:
    """`count` rows of a file of questions, each with a situation and rules of its own."""
    rng, wording = np.random.default_rng(seed), load_wording("", "threshold_game")
    rules = games.draw_rules(rng, count)
    made = []
    for row in range(count):
        own = rules.cell(row)
        rule = Rules(own.agents, own.threshold, own.high, own.normal, own.low)
        made.append(filled(games.draw_game(rng, games.LEXICON[situations], row), rule, wording))
    return made


def _write(path: str, made: list[dict]) -> None:
    with open(path, "w", encoding="ascii") as file:
        json.dump(made, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    for path, occupations, count, seed in PACKS:
        _write(path, rows(occupations, count, seed))
    for path, situations, count, seed in GAME_PACKS:
        _write(path, questions(situations, count, seed))
