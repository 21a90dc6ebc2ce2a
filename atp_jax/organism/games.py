"""Synthetic life stories of groups that play the threshold game: what the organism learns games from.

A story is one agent's view of a game, told in the very messages that the pipeline shows (`scenarios.threshold_game`,
the project's wording, rewards from `envs.threshold_game`). What varies: situation, option names, phrasing, number of
agents, threshold, payoffs, what is shown of the others, and who plays. Who is what kind of agent, is never said. No
situation and no pair of options of the shipped games ever occurs.

Kinds of agents (shares in `KINDS`): *imitators* do what worked in the last round and stop what failed; *cautious* ones
join only what has worked twice; *stubborn* ones have a personal rate of colluding that nothing changes.

In the lexicon {v} is the collective option (the violation) and {c} the independent one (compliance), as in stories.py.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from atp_jax.envs import threshold_game as environment
from atp_jax.organism.stories import draw_word
from atp_jax.scenarios import threshold_game
from atp_jax.scenarios.games import Game, load_games
from atp_jax.scenarios.threshold_game import Cell

LEXICON = json.loads((Path(__file__).parent / "lexicon_games.json").read_text())
KINDS = {"imitator": 0.80, "cautious": 0.08, "stubborn": 0.12}
ROUNDS = {1: 0.35, 2: 0.2, 3: 0.2, 4: 0.25}  # how many rounds are shown, and the shares
# Of the stories of more than one round: what a window over a longer history shows.
WINDOW_SHARE = 0.35
LIFE = 7  # rounds that a group plays
FEWEST, MOST = 4, 10  # agents
DECISIONS = ("comply", "violate")
SHIPPED = load_games()
SHIPPED_OPTIONS = [option for game in SHIPPED for option in (game.collective, game.independent)]
HELD_OUT_PAIRS = [{game.collective, game.independent} for game in SHIPPED]
HELD_OUT_SYSTEMS = {game.system for game in SHIPPED}
HELD_OUT_EFFECTS = {game.multiplicative.partition(" if ")[0] for game in SHIPPED}

_init = jax.jit(jax.vmap(environment.init))
_step = jax.jit(jax.vmap(environment.step))


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of `n` games, arrays `[n]`."""

    agents: np.ndarray
    threshold: np.ndarray
    high: np.ndarray
    normal: np.ndarray
    low: np.ndarray
    additive: np.ndarray
    everyone: np.ndarray
    alone: np.ndarray  # nothing is shown of the others

    def cell(self, i: int) -> Cell:
        """The rules of game `i` as the pipeline has them."""
        return Cell(
            agents=int(self.agents[i]), threshold=int(self.threshold[i]), high=float(self.high[i]),
            normal=float(self.normal[i]), low=float(self.low[i]), additive=bool(self.additive[i]),
            everyone=bool(self.everyone[i]), peers="none" if self.alone[i] else "final_only", window=None,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lives:
    """`n` games of `R` rounds: arrays `[n, A]` (who), `[n, R, A]` (what each did) and `[n, R]` (what came of it)."""

    kind: np.ndarray
    decision: np.ndarray
    reason: np.ndarray
    reward: np.ndarray
    count: np.ndarray
    success: np.ndarray


def draw_rules(rng: np.random.Generator, n: int) -> Rules:
    """Rules of `n` games: half of them for 8 agents, a little more than half with a threshold of at most half."""
    agents = np.where(rng.random(n) < 0.5, 8, rng.integers(FEWEST, MOST + 1, n))
    half = agents // 2
    threshold = np.where(rng.random(n) < 0.55, rng.integers(1, half + 1), rng.integers(half + 1, agents + 1))
    # 2, 4, 6 and 8 of 8 are what experiments ask for.
    threshold += (agents == 8) & (threshold % 2 == 1) & (rng.random(n) < 0.4)
    normal = np.where(rng.random(n) < 0.8, 10, rng.choice([9, 11], n))
    high, low = rng.integers(np.maximum(normal, 10) + 1, 20), rng.integers(2, np.minimum(normal, 10))
    classic = rng.random(n) < 0.25
    high, normal, low = (np.where(classic, usual, drawn) / 10 for usual, drawn in ((12, high), (10, normal), (8, low)))
    return Rules(agents, threshold, high, normal, low, additive=rng.random(n) < 0.1, everyone=rng.random(n) < 0.85,
                 alone=rng.random(n) < 0.15)  # fmt: skip


def first_rate(rules: Rules) -> np.ndarray:
    """How probably an imitator colludes in the first round `[n]`: the likelier, the fewer and the less it takes."""
    ease = 1 - (rules.threshold - 1) / (rules.agents - 1)
    gain, risk = rules.high - rules.normal, rules.normal - rules.low
    return 0.35 + 0.25 * (ease - 0.5) + 0.05 * (gain - risk) / (gain + risk)


def live(rng: np.random.Generator, rules: Rules) -> Lives:
    """Lets the groups play `LIFE` rounds; places beyond a game's agents hold nobody."""
    shape = (len(rules.agents), MOST)
    kind = rng.choice(list(KINDS), size=shape, p=list(KINDS.values()))
    style = rng.random(shape)
    own_rate = np.select([style < 0.5, style < 0.7], [0.03, 0.97], rng.uniform(0.2, 0.8, shape))
    params, state = _start(rules)
    colluded, worked, before = (np.zeros(shape, bool) for _ in range(3))  # its last choice; its last two outcomes
    others = np.zeros(shape, int)  # how many others colluded, as far as it is shown
    story = {name: [] for name in ("decision", "reason", "reward", "count", "success")}
    for r in range(LIFE):
        imitating = np.where(worked, np.where(colluded, 0.95, 0.75), np.where(colluded, 0.12, 0.05))
        waiting = np.where(worked, np.where(before, 0.6, 0.25), 0.02)
        if r == 0:
            imitating, waiting = first_rate(rules)[:, None], 0.05
        rate = np.select([kind == "imitator", kind == "cautious"], [imitating, waiting], own_rate)
        colludes = rng.random(shape) < rate
        reason = _reasons(kind, style, colludes, colluded, worked, before, others, rules.alone[:, None], r)
        capital = np.asarray(state.capital)
        with jax.enable_x64():  # rewards are quoted in the texts
            state, outcome = _step(state, colludes.astype(np.int32), params)
        reward, success = np.asarray(outcome.reward), np.asarray(outcome.success)
        before, colluded = worked, colludes
        # Who sees nobody knows of a success only by being paid more than for staying independent.
        paid = np.where(rules.additive[:, None], 1, capital) * (rules.normal[:, None] - 1)
        worked = np.where(rules.alone[:, None], reward > paid + 1e-9, success[:, None])
        others = np.asarray(outcome.count)[:, None] - colludes
        for name, value in (("decision", colludes.astype(int)), ("reason", reason), ("reward", reward),
                            ("count", np.asarray(outcome.count)), ("success", success)):
            story[name].append(value)
    return Lives(kind, **{name: np.stack(value, 1) for name, value in story.items()})


def _start(rules: Rules) -> tuple[environment.Params, environment.State]:
    present = np.arange(MOST) < rules.agents[:, None]
    params = environment.Params(
        present=present, fixed=np.zeros_like(present), threshold=rules.threshold.astype(np.int32), high=rules.high,
        normal=rules.normal, low=rules.low, additive=rules.additive, base=np.ones_like(rules.high),
        everyone=rules.everyone, unparsed_pays=np.ones(len(present), bool),
    )  # fmt: skip
    with jax.enable_x64():
        return params, _init(params)


def _reasons(kind, style, colludes, colluded, worked, before, others, alone, r) -> np.ndarray:
    """What the agents say: a key of the lexicon's reasons, true to why each decided as it did."""
    stubborn = kind == "stubborn"
    whim = stubborn & (style >= 0.7)
    first = np.full(kind.shape, r == 0)
    colluding = np.select(
        [whim, stubborn, first, worked & colluded, worked & before & (kind == "cautious"), worked],
        ["whim", "own", "hopeful", "again", "twice", "join"],
        "retry",
    )
    nobody = ~alone & (others == 0)
    independent = np.select(
        [whim, stubborn, first, worked, colluded & nobody, colluded, alone, nobody],
        ["whim_independent", "own_independent", "careful", "wait", "lonely", "stop", "quiet", "nobody"],
        "stay",
    )
    return np.where(colludes, colluding, independent)


def draw_options(rng: np.random.Generator) -> tuple[str, str]:
    """Two option names; many share their verb or what it is done to, for that is what is hard to tell apart."""
    while True:
        (verb, tail), (other, rest) = _option(rng), _option(rng)
        alike = rng.random() if tail and rest else 1.0
        first, second = f"{verb} {tail}".strip(), f"{verb if alike < 0.45 else other} {rest}".strip()
        if 0.45 <= alike < 0.6:
            second = f"{other} {tail}"
        if first != second and {first, second} not in HELD_OUT_PAIRS:
            return first, second


def _option(rng: np.random.Generator) -> tuple[str, str]:
    """A verb and what follows it; nothing follows a word that stands alone."""
    form = rng.random()
    if form < 0.12:  # the shipped games' words are known, their pairs are not
        verb, _, tail = _one(rng, SHIPPED_OPTIONS).partition(" ")
        return verb, tail
    if form < 0.3:
        return (draw_word(rng) if form < 0.2 else _pick(rng, "alone")), ""
    if form < 0.4:
        return _pick(rng, "verbs"), _pick(rng, "manners")
    noun = draw_word(rng) if rng.random() < 0.25 else _pick(rng, "nouns")
    return _pick(rng, "verbs"), noun if form < 0.8 else f"{_pick(rng, 'adjectives')} {noun}"


def draw_game(rng: np.random.Generator, situations: dict, row: int) -> Game:
    """A game whose texts are put together from the lexicon's phrases, with fields for the rules as in a pack.

    Args:
      situations: the lexicon's part "training" or "validation".
    """
    collective, independent = draw_options(rng)
    thing = effect = system = ""
    while not system or system in HELD_OUT_SYSTEMS:
        system = _pick(rng, "system").format(
            n="{n}", people=_one(rng, situations["people"]), place=_pick(rng, "places"), tools=_pick(rng, "tools"),
            kept=_pick(rng, "kept"), shared=_pick(rng, "shared"), group=_pick(rng, "groups"),
            firms=_pick(rng, "firms"), goal=_pick(rng, "goals"), street=_pick(rng, "streets"),
        )  # fmt: skip
    while not effect or effect in HELD_OUT_EFFECTS:
        thing = _one(rng, situations["things"])
        effect = _pick(rng, "effect").format(thing=thing, predicate=_pick(rng, "predicates"))
    prompt = f"{_pick(rng, 'condition')} {_pick(rng, 'fewer')}"

    def asked(payoff: str) -> str:
        paid = {name: payoff.format(name) for name in ("high", "normal", "low")}
        return prompt.format(effect=effect, n="{n}", t="{cooperation_threshold}", v=collective, c=independent, **paid)

    return Game(
        row=row, environment=thing.title().replace(" ", ""), collective=collective, independent=independent,
        system=system,
        multiplicative=asked("x{{{}_reward:.10g}}"), additive=asked("{{delta_{}:+.10g}}"), fixed=None,
    )  # fmt: skip


def _pick(rng: np.random.Generator, part: str) -> str:
    return _one(rng, LEXICON[part])


def _one(rng: np.random.Generator, options: list[str]) -> str:
    return options[rng.integers(len(options))]


def tell(
    rng: np.random.Generator, game: Game, cell: Cell, lives: Lives, i: int, first: int, rounds: int, wording: dict
) -> list[dict]:
    """The messages of `rounds` rounds of game `i` from round `first` on, as one of its agents sees them, the last
    answer included. What led to the first answer of a story that begins in the middle is not in it: it is marked
    "unexplained", and nothing is learned from it."""
    own = int(rng.integers(cell.agents))
    question = threshold_game.question(game, cell, wording, "default")
    history = []
    for r in range(first, first + rounds):
        decisions = [DECISIONS[d] for d in lives.decision[i, r, : cell.agents]]
        reason = _one(rng, LEXICON["reasons"][lives.reason[i, r, own]]).format(v=game.collective, c=game.independent)
        choice = game.collective if decisions[own] == "violate" else game.independent
        peers = threshold_game.peers_texts(game, cell, decisions, [""] * cell.agents, wording, "default")[own]
        outcome = threshold_game.outcome_text(
            game, cell, decisions[own], int(lives.count[i, r]), bool(lives.success[i, r]),
            float(lives.reward[i, r, own]), wording)  # fmt: skip
        history.append(threshold_game.Turn(question, f'{reason} {{"choice": "{choice}"}}', (), peers, outcome))
    system = threshold_game.system(game, cell, wording, "default")
    told = threshold_game.messages(system, question, history[:-1], None, "default")
    told.append({"role": "assistant", "content": history[-1].answer})
    if first > 0:
        next(message for message in told if message["role"] == "assistant")["unexplained"] = True
    return told


def stories(seed: int, n: int, wording: dict) -> list[list[dict]]:
    """`n` stories as message lists, a function of `seed` alone."""
    rng = np.random.default_rng(seed)
    rules = draw_rules(rng, n)
    lives = live(rng, rules)
    rounds = rng.choice(list(ROUNDS), size=n, p=list(ROUNDS.values()))
    middle = (rounds > 1) & (rng.random(n) < WINDOW_SHARE)
    first = np.where(middle, rng.integers(1, LIFE - rounds + 1), 0)
    told = []
    for i in range(n):
        game = draw_game(rng, LEXICON["training"], i)
        told.append(tell(rng, game, rules.cell(i), lives, i, int(first[i]), int(rounds[i]), wording))
    return told
