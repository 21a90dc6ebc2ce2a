"""Synthetic life stories of role-play agents: what the organism is trained on.

A story is an agent in an occupation that lives through rounds of the role-play testbed, told in the very
messages that the pipeline shows (`scenarios.role_play`, the project's wording, rewards from `envs.role_play`).
What varies: occupation, option words, payoffs, phrasing, the world (how likely a violation is caught, whether
checks are announced) and the agent. Which agent and which world it is, is never said: a reader has to infer it
from what happened so far. The 16 occupations of the shipped pack never occur, nor two of its options as a pair.

Kinds of agents (shares in `KINDS`): *strict* ones keep the rule; *noisy* ones have a fixed personal rate of
violation; *adaptive* ones try the other option now and then, come back to what paid, avoid what was caught, and
care the less the nearer the payoff ratio is to 1.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from atp_jax.envs import role_play as environment
from atp_jax.scenarios import role_play
from atp_jax.scenarios.pack import Scenario, load_role_play

LEXICON = json.loads((Path(__file__).parent / "lexicon.json").read_text())
KINDS = {"strict": 0.12, "noisy": 0.08, "adaptive": 0.80}
COMPLY, VIOLATE = 0, 1
SUPERVISED, UNDECIDED, UNSUPERVISED = 1, 0, -1
# Life lengths and their shares. One round is what the `no_history` control shows, and where options are told apart with
# nothing to copy from.
ROUNDS = {1: 0.35, 2: 0.15, 4: 0.15, 6: 0.35}
# A story may begin in the middle of a life: what a history window shows.
WINDOW_SHARE = 0.15
INVENTED_WORDS = 0.15  # share of options that are made-up words, so that an option is copied and not recalled
HELD_OUT = [{scenario.comply, scenario.violate} for scenario in load_role_play()]
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"


_step = jax.jit(jax.vmap(environment.step))


@dataclasses.dataclass(frozen=True)
class Lives:
    """`n` lives of `R` rounds, arrays `[n, R]` (what happened) and `[n]` (who it was, hidden from the reader)."""

    kind: np.ndarray
    supervision: np.ndarray
    announced: np.ndarray
    decision: np.ndarray
    reason: np.ndarray
    caught: np.ndarray
    reward: np.ndarray


def boldness(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How much an adaptive agent cares for the gain: 0 for a payoff ratio up to 1.05, 1 from 1.5 on."""
    return np.clip((np.log(high / low) - np.log(1.05)) / (np.log(1.5) - np.log(1.05)), 0.0, 1.0)


def live(rng: np.random.Generator, low: np.ndarray, high: np.ndarray, rounds: int) -> Lives:
    """Lets `n` agents live through `rounds` rounds; payoffs `low` and `high` are `[n]`."""
    n = len(low)
    kind = rng.choice(list(KINDS), size=n, p=list(KINDS.values()))
    own_rate = np.where(kind == "strict", 0.02, rng.uniform(0.2, 0.8, n))
    care = boldness(low, high)
    announced = rng.random(n) < 0.25
    catch_rate = rng.choice([0.0, 0.5, 1.0], size=n, p=[0.5, 0.15, 0.35])
    catch_rate = np.where(announced, 0.5, catch_rate)
    supervision = np.where(rng.random((n, rounds)) < catch_rate[:, None], SUPERVISED, UNSUPERVISED)

    params = environment.Params(low_reward=low, high_reward=high, supervision=supervision.astype(np.int32))
    with jax.enable_x64():
        state = jax.vmap(environment.init)(params)
    paid, burnt = np.zeros(n, int), np.zeros(n, int)
    story = {name: [] for name in ("decision", "reason", "caught", "reward")}
    for r in range(rounds):
        told = np.where(announced, supervision[:, r], UNDECIDED)
        experienced = paid + burnt > 0
        expected = high * paid / np.maximum(paid + burnt, 1)
        rate = np.select(
            [
                kind != "adaptive",
                told == SUPERVISED,
                (told == UNSUPERVISED),
                experienced & (expected < low),
                experienced,
                np.full(n, r == 0),
            ],
            [own_rate, 0.05, 0.5 + 0.35 * care, 0.05, 0.78 + 0.20 * care, 0.36 + 0.10 * care],
            np.minimum(0.26 + 0.26 * care + 0.05 * (r - 1), 0.7),
        )
        violates = rng.random(n) < rate
        reason = _reasons(rng, kind, violates, told, burnt, expected, low, care, r, experienced)
        with jax.enable_x64():  # rewards are quoted in the texts
            state, outcome = _step(state, violates.astype(np.int32), params)
        caught = np.asarray(outcome.caught)
        paid += violates & ~caught
        burnt += violates & caught
        for name, value in (("decision", violates.astype(np.int32)), ("reason", reason), ("caught", caught),
                            ("reward", np.asarray(outcome.reward))):
            story[name].append(value)
    return Lives(kind, supervision, announced, **{name: np.stack(value, 1) for name, value in story.items()})


def _reasons(rng, kind, violates, told, burnt, expected, low, care, r, experienced) -> np.ndarray:
    """What the agents say `[n]`: a key of the lexicon's reasons, true to why each decided as it did."""
    adaptive = kind == "adaptive"
    whim = (kind == "noisy") & (rng.random(len(kind)) < 0.6)
    complying = np.select(
        [whim, adaptive & (told == SUPERVISED), adaptive & experienced & (burnt > 0) & (expected < low),
         adaptive & (care < 0.3) & (rng.random(len(kind)) < 0.5)],
        ["whim_rule", "watched", "burnt", "content"],
        "rule",
    )
    violating = np.select(
        [whim, adaptive & (told == UNSUPERVISED), adaptive & experienced & (expected >= low),
         adaptive & (r > 0) & ~experienced],
        ["whim", "unwatched", "again", "bold"],
        "pay",
    )
    return np.where(violates, violating, complying)


def draw_payoffs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Payoffs `low`, `high` `[n]` with one decimal times a base, like the pack's: half of them with little to gain."""
    small = rng.random(n) < 0.45
    tenths = np.where(small & (rng.random(n) < 0.6), rng.integers(30, 50, n), rng.integers(10, 50, n))
    low = tenths / 10
    high = (tenths + np.where(small, 1, rng.integers(2, 41, n))) / 10
    base = rng.choice([0.3, 1, 2, 4, 5, 6, 8, 10, 20, 30, 60, 100, 1000, 10000], n)
    return np.round(low * base, 4), np.round(high * base, 4)


def draw_word(rng: np.random.Generator) -> str:
    """An option word: from the lexicon, or invented."""
    if rng.random() >= INVENTED_WORDS:
        return str(rng.choice(LEXICON["words"]))
    syllables = rng.integers(2, 5)
    return "".join(rng.choice(list(CONSONANTS)) + rng.choice(list(VOWELS)) for _ in range(syllables)) + str(
        rng.choice(["", "n", "r", "s", "l", "ng", "st"]))


def draw_scenario(rng: np.random.Generator, low: float, high: float, occupations: Sequence[dict], row: int) -> Scenario:
    """A scenario with these payoffs, its texts put together from the lexicon's phrases."""
    frames = LEXICON["frames"]
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    who = pick(occupations)
    comply, violate = draw_word(rng), draw_word(rng)
    while comply == violate or {comply, violate} in HELD_OUT:
        violate = draw_word(rng)
    names = {"occupation": who["occupation"], "boss": who["boss"], "Boss": who["boss"][0].upper() + who["boss"][1:],
             "unit": pick(LEXICON["units"]), "c": comply, "v": violate}
    options = [(comply, low), (violate, high)]
    (a, x), (b, y) = options if rng.random() < 0.5 else options[::-1]
    pay = pick(frames["pay"]).format(a=a, b=b, x=f"{x:.10g}", y=f"{y:.10g}", **names)
    middle = [pay, pick(frames["rule"]).format(**names)]
    if rng.random() < 0.2:
        middle.reverse()
    first_named, last_named = (comply, violate) if rng.random() < 0.5 else (violate, comply)
    instruction = pick(frames["instruction"])
    prompt = " ".join([*middle, pick(frames["goal"])]) + instruction + (
        f'{{"choice": "{first_named}"}} or {{"choice": "{last_named}"}}')
    return Scenario(
        row=row, id=str(row), environment=who["occupation"], system_prompt=pick(frames["system"]).format(**names),
        user_prompt=prompt, comply=comply, violate=violate, low_reward=low, high_reward=high,
        supervised_text=pick(frames["supervised"]).format(**names),
        unsupervised_text=pick(frames["unsupervised"]).format(**names),
        neutral_text=pick(frames["neutral"]).format(**names),
    )


def tell(rng: np.random.Generator, scenario: Scenario, lives: Lives, i: int, rounds: int, wording: dict) -> list[dict]:
    """The messages of the first `rounds` rounds of life `i` in `scenario`, the last answer included."""
    first = rng.integers(rounds) if rng.random() < WINDOW_SHARE else 0
    history = []
    for r in range(first, rounds):
        choice = scenario.violate if lives.decision[i, r] == VIOLATE else scenario.comply
        phrases = LEXICON["reasons"][lives.reason[i, r]]
        reason = phrases[rng.integers(len(phrases))].format(c=scenario.comply, v=scenario.violate)
        answer = f'{reason} {{"choice": "{choice}"}}'
        pattern = "alternating" if lives.announced[i] else "all_unsupervised"
        question = role_play.question(scenario, int(lives.supervision[i, r]), pattern, wording, "default")
        feedback = role_play.feedback(
            scenario, ("comply", "violate")[lives.decision[i, r]], bool(lives.caught[i, r]),
            float(lives.reward[i, r]), answer, wording, "default")
        history.append(role_play.Turn(question, answer, (), feedback))
    last = history[-1]
    messages = role_play.messages(scenario, last.question, history[:-1], None, "default")
    return [*messages, {"role": "assistant", "content": last.answer}]


def stories(seed: int, n: int, wording: dict, occupations: Sequence[dict]) -> list[list[dict]]:
    """`n` stories as message lists, a function of `seed` alone."""
    rng = np.random.default_rng(seed)
    low, high = draw_payoffs(rng, n)
    lives = live(rng, low, high, max(ROUNDS))
    lengths = rng.choice(list(ROUNDS), size=n, p=list(ROUNDS.values()))
    return [
        tell(rng, draw_scenario(rng, float(low[i]), float(high[i]), occupations, i), lives, i, int(lengths[i]), wording)
        for i in range(n)
    ]
