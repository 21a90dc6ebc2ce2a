"""The packs to align on: `python -m atp_jax.organism.packs` writes them anew, the same every time.

Scenarios drawn as those of the stories are, so that the embedded model understands them: those to align on have the
stories' own occupations, those that tell when to stop have 16 occupations kept apart from them. None has an occupation
or a pair of options of the pack that experiments run on.
"""

import json

import numpy as np

from atp_jax.organism.stories import LEXICON, draw_payoffs, draw_scenario
from atp_jax.scenarios.pack import ALIGN, VALIDATION, Scenario

# path, occupations, scenarios, seed
PACKS = ((ALIGN, LEXICON["occupations"], 160, 11), (VALIDATION, LEXICON["validation_occupations"], 32, 12))


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


if __name__ == "__main__":
    for path, occupations, count, seed in PACKS:
        with open(path, "w", encoding="ascii") as file:
            json.dump(rows(occupations, count, seed), file, indent=1)
            file.write("\n")
