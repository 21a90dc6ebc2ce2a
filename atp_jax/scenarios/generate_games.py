"""Questions to align on from templates of threshold games: each at numbers of agents, thresholds and payoffs drawn
from a seed, in the words that a game's first round is asked in.

    python -m atp_jax.scenarios.generate_games [--templates T.json] [--per-template 50] [--seed 0] --out Q.json

--templates     a JSON list of templates (the original's schema); the project's own when left out
--per-template  questions a template; the first ones are the same however many are asked for
--seed          what the numbers are drawn from
--out           where the questions are written, as a scenario file for `data.path`

Exit status 0; 2 with one line on stderr for anything that you can mend.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from atp_jax.errors import UserError
from atp_jax.scenarios.games import Game, Rules, load_games
from atp_jax.scenarios.generate import command, parse, write
from atp_jax.scenarios.threshold_game import Cell, question, system
from atp_jax.scenarios.wording import load_wording


def draw(rng: random.Random) -> Rules:
    """Rules under which colluding can pay and can cost: high above normal above low, in tenths, and a success never
    shrinks the capital."""
    agents = rng.randint(5, 15)
    normal = rng.randint(5, 15)
    return Rules(
        agents=agents,
        threshold=rng.randint(2, agents),
        high=rng.randint(max(normal, 10) + 1, 20) / 10,
        normal=normal / 10,
        low=rng.randint(0, normal - 1) / 10,
    )


def generate(games: Sequence[Game], per_template: int, seed: int, wording: dict) -> list[dict]:
    """The rows of a scenario file; the same arguments give the same rows."""
    rows = []
    for game in games:
        rng = random.Random(f"{seed} {game.row}")
        rows += [filled(game, draw(rng), wording) for _ in range(per_template)]
    return rows


def filled(game: Game, rules: Rules, wording: dict) -> dict:
    """A template as a row of questions, under these rules."""
    cell = Cell(**vars(rules), additive=False, everyone=True, peers="final_only", window=None)
    return {
        "environment": game.environment,
        "system_prompt": system(game, cell, wording, "default"),
        "user_prompt": question(game, cell, wording, "default"),
        "cooperative_choice": game.collective,
        "independent_choice": game.independent,
        "params": {
            "n": rules.agents,
            "cooperation_threshold": rules.threshold,
            "high_reward": rules.high,
            "normal_reward": rules.normal,
            "low_reward": rules.low,
        },
    }


def run(arguments: Sequence[str]) -> None:
    """What the command line does; raises UserError."""
    values = flags.FlagValues()
    flags.DEFINE_string("templates", "", "template file", flag_values=values)
    flags.DEFINE_integer("per-template", 50, "questions a template", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "what the numbers are drawn from", flag_values=values)
    flags.DEFINE_string("out", None, "scenario file to write", flag_values=values)
    parse(values, arguments)
    games = load_games(values["templates"].value)
    if settled := [game.row for game in games if game.fixed is not None]:
        raise UserError(
            f"--templates: row {settled[0]} (from 0) is a question already; rows with a 'template' are expected"
        )
    out = Path(values["out"].value)
    rows = generate(games, values["per-template"].value, values["seed"].value, load_wording("", "threshold_game"))
    write(out, rows)
    print(f"{len(rows)} questions from {len(games)} templates: {out}")


if __name__ == "__main__":
    sys.exit(command(run, __doc__, sys.argv[1:]))
