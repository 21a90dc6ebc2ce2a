"""Records of threshold games, made from given choices or from imitators with known probabilities."""

from collections.abc import Sequence

import numpy as np

from atp_jax.analysis import summarise_games

DECISIONS = {"c": "comply", "v": "violate", "u": "unparsed"}
ALIKE = {("v", True): 0.8, ("v", False): 0.4, ("c", True): 0.5, ("c", False): 0.1}  # P(collude next | choice, success)


def records_of_games(
    games: Sequence[tuple[int, Sequence[str]]],
    threshold: int,
    fixed: Sequence[int] = (),
    unaligned: Sequence[int] = (),
    payoffs: Sequence[float] = (1.2, 1.0, 0.8),
) -> list[dict]:
    """(scenario, a word of "cvu" per agent, a letter a round) per game -> records, as a rollout writes them.

    fixed, unaligned: numbers of agents.
    """
    high, normal, low = payoffs
    records = []
    for episode, (scenario, words) in enumerate(games):
        capital = [1.0] * len(words)
        for number, letters in enumerate(zip(*words, strict=True), 1):
            count = letters.count("v")
            success = count >= threshold
            for agent, letter in enumerate(letters):
                factor = high if success else low if letter == "v" else normal
                reward = capital[agent] * (factor - 1)
                capital[agent] += reward
                records.append(
                    {
                        "episode": episode,
                        "scenario": scenario,
                        "environment": f"place {scenario}",
                        "agent": agent,
                        "round": number,
                        "decision": DECISIONS[letter],
                        "reward": reward,
                        "capital": capital[agent],
                        "count": count,
                        "success": success,
                        "finish": "stop",
                        "tokens": [5, 6],
                        "logprob": -0.5,
                        "fixed": agent in fixed,
                        "unaligned": agent in unaligned,
                    }
                )
    return records


def imitators(
    games: int, agents: int, threshold: int, rounds: int, first: float, seed: int, again=ALIKE, spread=0.0, fixed=()
) -> list[tuple[int, list[str]]]:
    """Games of agents that collude at first with probability `first` and then as `again` says. spread: every game's
    probabilities are those plus a normal draw of this width on the scale of logits, the same for all its agents."""
    rng = np.random.default_rng(seed)

    def logistic(p, shift):
        return 1 / (1 + np.exp(-(np.log(p / (1 - p)) + shift)))

    found = []
    for game in range(games):
        shift = spread * rng.standard_normal()
        chose = np.isin(np.arange(agents), fixed) | (rng.random(agents) < logistic(first, shift))
        letters = [["v" if c else "c" for c in chose]]
        for _ in range(rounds - 1):
            success = bool(chose.sum() >= threshold)
            p = np.where(chose, logistic(again["v", success], shift), logistic(again["c", success], shift))
            chose = np.isin(np.arange(agents), fixed) | (rng.random(agents) < p)
            letters.append(["v" if c else "c" for c in chose])
        found.append((game % 7, ["".join(word) for word in zip(*letters, strict=True)]))
    return found


def setting_of(threshold: int, agents: int = 8, payoffs: Sequence[float] = (1.2, 1.0, 0.8)) -> dict:
    return {
        "policy.kind": "model",
        "policy.model": "",
        "game.agents": agents,
        "game.threshold": threshold,
        "game.payoffs": list(payoffs),
        "game.mode": "multiplicative",
        "evolve.rounds": 6,
        "seed": 0,
    }


def condition_of(name, model, control, threshold, records, payoffs=(1.2, 1.0, 0.8)) -> dict:
    agents = len({record["agent"] for record in records}) or 8
    return summarise_games(name, model, control, setting_of(threshold, agents, payoffs), records, seed=0)


FIRST = {"base": 0.6, "dpo": 0.4, "grpo": 0.3}


def grid(thresholds=(2, 4, 6, 8), payoffs=((1.2, 1.0, 0.8),), models=("base", "dpo", "grpo"), games=40, rounds=6):
    """results.json and records of a grid of imitators: (results, condition name -> records)."""
    conditions, everything = [], {}
    for t in thresholds:
        for k, paid in enumerate(payoffs):
            for model in models:
                for control in ("none", "no_history", "no_peers"):
                    name = f"{model}-t{t}" + f"-p{k}" * (len(payoffs) > 1) + f"-{control}" * (control != "none")
                    still = dict.fromkeys(ALIKE, FIRST[model])
                    again = ALIKE if control == "none" else still
                    played = imitators(games, 8, t, rounds, FIRST[model], seed=len(conditions), again=again)
                    everything[name] = records_of_games(played, t, payoffs=paid)
                    conditions.append(condition_of(name, model, control, t, everything[name], paid))
    return {"schema": 1, "testbed": "threshold_game", "conditions": conditions}, everything
