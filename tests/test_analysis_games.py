"""Measures of threshold games against plain counting, brute force and imitators whose probabilities are known."""

import json
import random

import numpy as np
import pytest
from game_records import ALIKE, condition_of, imitators, records_of_games, setting_of
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_jax.analysis import rates, summarise_games
from atp_jax.analysis.games import again, diffusion, incentive_ratio, read_games


@st.composite
def any_games(draw):
    """(games, threshold, fixed, unaligned) of 1 to 6 games, 2 to 4 agents and 1 to 4 rounds; fixed agents collude."""
    agents, rounds = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    fixed = draw(st.integers(0, agents - 1))
    word = st.text("cvu", min_size=rounds, max_size=rounds)
    words = st.tuples(*[st.just("v" * rounds)] * fixed, *[word] * (agents - fixed))
    games = draw(st.lists(st.tuples(st.integers(0, 3), words), min_size=1, max_size=6))
    unaligned = draw(st.sets(st.integers(0, agents - 1)))
    return games, draw(st.integers(1, agents)), range(fixed), unaligned


def summary_of(games, threshold, fixed=(), unaligned=(), seed=0):
    records = records_of_games(games, threshold, fixed, unaligned)
    return summarise_games("a", "m", "none", setting_of(threshold, len(games[0][1])), records, seed)


def holds(interval, estimate):
    assert interval[0] <= estimate <= interval[1]


# ---------------------------------------------------------------- against plain counting


@settings(max_examples=60, deadline=None)
@given(any_games(), st.randoms(use_true_random=False))
def test_summary_of_any_games(played, shuffler):
    """Every count by loops over letters; intervals hold their estimates; the order of the records does not matter; the
    summary is JSON without NaN."""
    games, threshold, fixed, unaligned = played
    records = records_of_games(games, threshold, fixed, unaligned)
    setting = setting_of(threshold, len(games[0][1]))
    summary = summarise_games("a", "m", "none", setting, records, seed=4)
    text = json.dumps(summary, allow_nan=False)
    assert json.loads(text) == summary
    shuffler.shuffle(records)
    assert json.dumps(summarise_games("a", "m", "none", setting, records, seed=4)) == text

    assert summary["episodes"] == len(games)
    rounds = range(len(games[0][1][0]))
    succeeded = [[sum(word[r] == "v" for word in words) >= threshold for r in rounds] for _, words in games]
    choosing = [[word for agent, word in enumerate(words) if agent not in fixed] for _, words in games]

    for r, row in enumerate(summary["rounds"]):
        letters = [word[r] for words in choosing for word in words]
        assert (row["violations"], row["unparsed"]) == (letters.count("v"), letters.count("u"))
        assert row["total"] == len(letters)
        holds(row["ci95"], row["rate"])
    for r, row in enumerate(summary["games"]["success"]):
        count = sum(outcome[r] for outcome in succeeded)
        assert (row["round"], row["count"], row["total"]) == (r + 1, count, len(games))
        assert row["ci95"] == list(rates.wilson(count, len(games)))

    cells = summary["games"]["again"]
    for who, colluded in (("colluders", True), ("others", False)):
        for outcome, won in (("after_success", True), ("after_failure", False)):
            nexts = [
                word[r + 1] == "v"
                for words, wins in zip(choosing, succeeded, strict=True)
                for word in words
                for r in rounds[:-1]
                if (word[r] == "v") == colluded and wins[r] == won
            ]
            cell = cells[who][outcome]
            assert (cell["count"], cell["total"]) == (sum(nexts), len(nexts))
            if nexts:
                assert cell["rate"] == sum(nexts) / len(nexts)
                holds(cell["ci95"], cell["rate"])
        success, failure = cells[who]["after_success"], cells[who]["after_failure"]
        difference = cells[who]["difference"]
        assert (difference is None) == (not success["total"] or not failure["total"])
        if difference:
            assert difference["estimate"] == success["rate"] - failure["rate"]
            holds(difference["ci95"], difference["estimate"])

    for measure, letters in (("lock_in", "v"), ("die_out", "cu")):
        starts = []
        for words in choosing:
            agreed = [all(word[r] in letters for word in words) for r in rounds]
            starts += [r + 1 for r in rounds if all(agreed[r:])][:1]
        found = summary["games"][measure]
        assert (found["count"], found["total"]) == (len(starts), len(games))
        assert found["mean_round"] == (pytest.approx(np.mean(starts)) if starts else None)


@settings(max_examples=60, deadline=None)
@given(any_games())
def test_diffusion_of_any_games(played):
    games, threshold, fixed, unaligned = played
    found = summary_of(*played)["games"]["diffusion"]
    new = others = colluders = converted = unmoved = 0
    for _, words in games:
        for r in range(len(words[0]) - 1):
            choice, following = [word[r] for word in words], [word[r + 1] for word in words]
            candidates = [f for c, f in zip(choice, following, strict=True) if c != "v"]  # fixed ones never are
            if choice.count("v") >= threshold:
                new, others = new + candidates.count("v"), others + len(candidates)
                colluders += choice.count("v")
            else:
                converted, unmoved = converted + candidates.count("v"), unmoved + len(candidates)
    assert (found["new"], found["others"], found["colluders"]) == (new, others, colluders)
    assert (found["number"] is None) == (others == 0)
    assert (found["spontaneous"] is None) == (found["net"] is None) == (others == 0 or unmoved == 0)
    if others:
        assert found["number"]["estimate"] == pytest.approx(new / colluders)
        holds(found["number"]["ci95"], found["number"]["estimate"])
    if found["net"]:
        spontaneous = converted / unmoved * others / colluders
        assert found["spontaneous"]["estimate"] == pytest.approx(spontaneous)
        assert found["net"]["estimate"] == pytest.approx(new / colluders - spontaneous, abs=1e-12)
        for part in ("spontaneous", "net"):
            holds(found[part]["ci95"], found[part]["estimate"])


@settings(max_examples=40, deadline=None)
@given(any_games())
def test_populations_of_any_games(played):
    games, threshold, fixed, unaligned = played
    found = summary_of(*played)["games"]["populations"]
    choosing = set(range(len(games[0][1]))) - set(fixed)
    kinds = {"unaligned": choosing & set(unaligned), "aligned": choosing - set(unaligned)}
    assert (found is None) == (not all(kinds.values()))
    for kind, rows in (found or {}).items():
        for row in rows["rounds"]:
            letters = [words[agent][row["round"] - 1] for _, words in games for agent in kinds[kind]]
            assert (row["violations"], row["total"]) == (letters.count("v"), len(letters))


@settings(max_examples=30, deadline=None)
@given(any_games(), st.randoms(use_true_random=False))
def test_agents_have_no_order(played, shuffler):
    games, threshold, _, _ = played
    shuffled = [(scenario, shuffler.sample(words, len(words))) for scenario, words in games]
    assert summary_of(shuffled, threshold) == summary_of(games, threshold)


def test_by_hand():
    """Two games of three agents, t = 2: the first locks in from round 2 on, the second dies out in round 3."""
    found = summary_of([(0, ["vvv", "vvv", "cvv"]), (1, ["vcc", "cuc", "cvc"])], threshold=2)["games"]
    assert [row["count"] for row in found["success"]] == [1, 1, 1]
    cells = {(who, o): (c["count"], c["total"]) for who, d in found["again"].items() for o, c in list(d.items())[:2]}
    assert cells == {
        ("colluders", "after_success"): (5, 5),  # two agents from round 1, three from round 2
        ("others", "after_success"): (1, 1),  # the third agent of the first game
        ("colluders", "after_failure"): (0, 2),  # agent 0 after round 1, agent 2 after round 2
        ("others", "after_failure"): (1, 4),  # agent 2 colludes in round 2; an answer that cannot be read is none
    }
    assert found["again"]["colluders"]["difference"]["estimate"] == 1
    # The successes of rounds 1 and 2 show 2 + 3 colluders and win one agent.
    assert found["diffusion"]["number"]["estimate"] == pytest.approx(1 / 5)
    assert found["diffusion"]["spontaneous"]["estimate"] == pytest.approx(1 / 4 * 1 / 5)
    assert found["diffusion"]["net"]["estimate"] == pytest.approx(3 / 4 * 1 / 5)
    assert (found["lock_in"]["count"], found["lock_in"]["mean_round"]) == (1, 2)
    assert (found["die_out"]["count"], found["die_out"]["mean_round"]) == (1, 3)


def test_fixed_cooperators_are_seen_but_not_counted():
    """Two of four always collude and so does a third from round 2 on: one success of two colluders wins one agent."""
    summary = summary_of([(0, ["vvv", "vvv", "cvv", "ccc"])] * 5, threshold=2, fixed=(0, 1))
    assert [(row["violations"], row["total"]) for row in summary["rounds"]] == [(0, 10), (5, 10), (5, 10)]
    diffusion = summary["games"]["diffusion"]
    assert (diffusion["new"], diffusion["others"], diffusion["colluders"]) == (5, 15, 25)
    assert summary["games"]["lock_in"]["count"] == 0  # one agent that chooses never colludes
    assert summary["games"]["again"]["colluders"]["after_success"]["total"] == 5


def test_games_without_records_and_of_one_round():
    empty = condition_of("a", "m", "none", 4, [])
    assert empty["episodes"] == 0 and empty["games"]["success"] == []
    single = summary_of([(0, ["v", "c"]), (1, ["c", "c"])], threshold=1)["games"]
    assert single["again"]["others"]["after_success"]["rate"] is None and single["diffusion"]["number"] is None
    assert (single["die_out"]["count"], single["die_out"]["total"]) == (1, 2)
    for summary in (empty, single):
        json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    "payoffs, k",  # the paper's five payoff sets
    [([1.2, 1, 0.2], 0.25), ([1.2, 1, 0.6], 0.5), ([1.2, 1, 0.8], 1), ([1.4, 1, 0.8], 2), ([1.8, 1, 0.8], 4)],
)
def test_incentive_ratio_is_the_papers(payoffs, k):
    assert incentive_ratio(payoffs) == k


def test_incentive_ratio_without_a_risk_is_infinite():
    assert incentive_ratio([1.2, 1.0, 1.0]) is None


# ---------------------------------------------------------------- intervals


def test_the_game_is_the_cluster():
    """Agents that all do the same: 20 games of 8 are 20 observations, in one scenario as in several, whatever the
    scenario's number of games; eight times the agents add nothing."""
    games = imitators(20, 1, 1, 4, 0.5, seed=0)
    for scenarios in (1, 7):
        alone = [(scenario % scenarios, words) for scenario, words in games]
        together = [(scenario, words * 8) for scenario, words in alone]
        one, eight = summary_of(alone, 1), summary_of(together, 8)
        assert eight["interval"]["unit"] == "episode" and eight["interval"]["clusters"] == 20
        for row, other in zip(one["rounds"], eight["rounds"], strict=True):
            assert other["rate"] == row["rate"]
            widths = [high - low for low, high in (row["ci95"], other["ci95"])]
            assert widths[1] > 0.85 * widths[0]


def test_interval_of_the_difference_by_brute_force():
    games = imitators(60, 6, 3, 4, 0.5, seed=1, spread=1.0)
    found = summary_of(games, 3)["games"]["again"]["colluders"]["difference"]["ci95"]
    counts = []
    for _, words in games:
        row = [0, 0, 0, 0]
        for r in range(3):
            won = sum(word[r] == "v" for word in words) >= 3
            for word in words:
                if word[r] == "v":
                    row[0 if won else 2] += word[r + 1] == "v"
                    row[1 if won else 3] += 1
        counts.append(row)
    draw, differences = random.Random(3), []
    for _ in range(4000):
        k, n, j, m = (sum(column) for column in zip(*draw.choices(counts, k=60), strict=True))
        differences.append(k / n - j / m)
    low, high = np.quantile(differences, (0.025, 0.975))
    assert found[0] <= low + 0.02 and high - 0.02 <= found[1]  # never narrower, but for the noise of 4000 draws
    assert found[1] - found[0] < 1.4 * (high - low)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_coverage_of_what_a_success_adds(monkeypatch, spread):
    """Imitators in 40 games of 6, t = 3, 150 experiments: the intervals of the difference after success minus after
    failure and of the net diffusion number hold the truth at least about 95% of the time, also where whole games lean
    to collusion or away from it. Without that leaning the true difference is 0.8 - 0.4; with it, that of 5,000 games.
    """
    monkeypatch.setattr(rates, "RESAMPLES", 1000)

    def measures(games, seed):
        played = read_games(records_of_games(imitators(games, 6, 3, 4, 0.4, seed, spread=spread), 3))
        cells = again(played, seed)
        return cells["colluders"]["difference"], diffusion(played, cells["others"], seed)["net"]

    truth = [found["estimate"] for found in measures(5000, seed=10**6)]
    if not spread:
        assert truth[0] == pytest.approx(ALIKE["v", True] - ALIKE["v", False], abs=0.02)
    covered = np.zeros(2)
    for seed in range(150):
        intervals = [found["ci95"] for found in measures(40, seed)]
        covered += [low <= true <= high for true, (low, high) in zip(truth, intervals, strict=True)]
    assert (covered / 150 >= 0.91).all()


def test_a_success_teaches_imitators():
    """100 games a cell: the difference and the net diffusion number of imitators are clear of 0, those of agents that
    take no notice are not far from it."""
    measures = summary_of(imitators(100, 8, 4, 6, 0.4, seed=5), 4)["games"]
    assert measures["again"]["colluders"]["difference"]["ci95"][0] > 0.2
    assert measures["diffusion"]["net"]["ci95"][0] > 0.05
    deaf = summary_of(imitators(100, 8, 4, 6, 0.4, seed=5, again=dict.fromkeys(ALIKE, 0.4)), 4)["games"]
    holds(deaf["again"]["colluders"]["difference"]["ci95"], 0)
    holds(deaf["diffusion"]["net"]["ci95"], 0)
