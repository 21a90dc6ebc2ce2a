"""Rates and intervals against published values, exact enumeration, brute force and simulation."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from analysis_records import records_of
from hypothesis import given, settings
from hypothesis import strategies as st

from atp_jax.analysis import rates
from atp_jax.analysis.tipping import against_controls, hazard, payoff_split, stickiness, summarise
from atp_jax.errors import UserError

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
several_lives = st.lists(st.tuples(st.integers(0, 5), st.text("cvu", min_size=3, max_size=3)), min_size=1, max_size=25)


def as_float(numbers):
    return np.asarray(numbers, np.float64)


# ---------------------------------------------------------------- Wilson and its kin


@pytest.mark.parametrize(
    "k, n, low, high",  # Newcombe 1998, Stat. Med. 17:857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_values(k, n, low, high):
    assert rates.wilson(k, n) == pytest.approx((low, high), abs=6e-5)


@given(counts)
def test_wilson_solves_its_own_equation(k_n):
    """The ends are the two p with (k/n - p)^2 = z^2 p (1 - p) / n, found here as roots of the quadratic."""
    k, n = k_n
    share, z2 = k / n, rates.Z95**2 / n
    roots = sorted(np.roots([1 + z2, -2 * share - z2, share * share]).real)
    assert rates.wilson(k, n) == pytest.approx(roots, abs=1e-7)
    low, high = rates.wilson(k, n)
    assert 0 <= low <= share <= high <= 1


def test_wilson_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for k, n in [(0, 1), (1, 1), (3, 7), (64, 64), (200, 320)]:
        theirs = stats.binomtest(k, n).proportion_ci(method="wilson")
        assert rates.wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_nothing_counted_is_nothing_known():
    assert rates.wilson(0, 0) == (0, 1)
    assert rates.paired_score(0, 0, 0) == (-1, 1)


def test_difference_gives_the_published_value():
    """Newcombe 1998, Stat. Med. 17:873-890, table II (a), method 10: 56/70 - 48/80."""
    interval = rates.difference(56 / 70, rates.wilson(56, 70), 48 / 80, rates.wilson(48, 80))
    assert interval == pytest.approx((0.0524, 0.3339), abs=6e-5)


@given(counts)
def test_paired_score_without_ties_is_wilson_stretched(k_n):
    """Where every pair goes one way or the other, gained - lost is 2 gained - n: one binomial."""
    k, n = k_n
    low, high = rates.wilson(k, n)
    assert rates.paired_score(k, n - k, n) == pytest.approx((2 * low - 1, 2 * high - 1), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 60))
def test_paired_score_is_antisymmetric_and_bounded(gained, lost, ties):
    n = gained + lost + ties
    low, high = rates.paired_score(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert low < high
    assert rates.paired_score(lost, gained, n) == pytest.approx((-high, -low))


@pytest.mark.parametrize("p, q, most", [(0.3, 0.1, 0.97), (0.5, 0.45, 0.97), (0.1, 0.1, 0.99), (0.05, 0.0, 1.0)])
def test_paired_score_covers_as_it_says(p, q, most):
    """Exact: the trinomial probability of all outcomes of 40 pairs whose interval holds p - q. Rare changes are covered
    more often than 95%, never less."""
    n, covered = 40, 0.0
    for gained, lost in itertools.product(range(n + 1), repeat=2):
        if gained + lost > n or (q == 0 and lost):
            continue
        ways = math.comb(n, gained) * math.comb(n - gained, lost)
        low, high = rates.paired_score(gained, lost, n)
        if low <= p - q <= high:
            covered += ways * p**gained * q**lost * (1 - p - q) ** (n - gained - lost)
    assert 0.94 <= covered <= most


# ---------------------------------------------------------------- the bootstrap


def test_cluster_bootstrap_is_the_bootstrap():
    """Against a loop that draws clusters with Python's own generator, and against the delta method's width."""
    rng = np.random.default_rng(3)
    n = rng.integers(2, 8, 60)
    k = rng.binomial(n, rng.beta(2, 3, 60))
    draw, ratios = random.Random(1), []
    for _ in range(4000):
        drawn = [draw.randrange(60) for _ in range(60)]
        ratios.append(sum(int(k[g]) for g in drawn) / sum(int(n[g]) for g in drawn))
    low, high = rates.cluster_bootstrap(k, n, seed=0)
    assert (low, high) == pytest.approx(np.quantile(ratios, (0.025, 0.975)), abs=0.012)
    rate = k.sum() / n.sum()
    deviation = math.sqrt(((k - rate * n) ** 2).sum()) / n.sum()
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.08)


def test_coverage_on_clustered_answers():
    """32 scenarios of 6 lives whose rates differ (beta-binomial, intra-cluster correlation 0.3), 200 experiments: the
    interval holds the truth about 95% of the time; Wilson's, which takes lives for independent, far less often."""
    rng = np.random.default_rng(0)
    truth, correlation, experiments, lives = 0.35, 0.3, 200, np.full(32, 6)
    ours = naive = 0
    for seed in range(experiments):
        spread = 1 / correlation - 1
        k = rng.binomial(6, rng.beta(truth * spread, (1 - truth) * spread, 32))
        _, (low, high) = rates.share(k, lives, seed)
        ours += low <= truth <= high
        low, high = rates.wilson(k.sum(), 32 * 6)
        naive += low <= truth <= high
    assert ours / experiments >= 0.90
    assert naive / experiments <= 0.85


def test_coverage_of_rare_events():
    """A true rate of 1% in 64 scenarios of 5 lives: the plain bootstrap fails here, what `share` makes of it holds."""
    rng = np.random.default_rng(1)
    experiments, lives = 100, np.full(64, 5)
    ours = plain = 0
    for seed in range(experiments):
        k = rng.binomial(5, 0.01, 64)
        _, (low, high) = rates.share(k, lives, seed)
        ours += low <= 0.01 <= high
        low, high = rates.cluster_bootstrap(k, lives, seed)
        plain += low <= 0.01 <= high
    assert ours / experiments >= 0.94
    assert plain / experiments <= 0.88


def test_lives_copied_within_their_scenarios_add_nothing():
    rng = np.random.default_rng(2)
    n = np.full(20, 4)
    k = rng.binomial(n, rng.beta(1, 2, 20))
    once = rates.share(k, n, seed=0)
    assert rates.share(50 * k, 50 * n, seed=0)[1] == pytest.approx(once[1], abs=1e-12)
    _, (low, high) = rates.share(np.tile(k, 4), np.tile(n, 4), seed=0)  # four times the scenarios: half the width
    assert high - low == pytest.approx((once[1][1] - once[1][0]) / 2, rel=0.12)


@pytest.mark.parametrize("violating, lives", [(0, 5), (5, 5), (2, 5)])
def test_scenarios_that_all_agree_count_once_each(violating, lives):
    rate, interval = rates.share(np.full(20, violating), np.full(20, lives), seed=0)
    assert interval == pytest.approx(rates.wilson(rate * 20, 20))
    estimate, moved = rates.change(np.full(20, violating), np.zeros(20, int), np.full(20, lives), seed=0)
    assert estimate == rate
    assert moved == pytest.approx(rates.paired_score(rate * 20, 0, 20))
    assert moved[0] < moved[1]


# ---------------------------------------------------------------- rates of records


@settings(max_examples=40, deadline=None)
@given(several_lives, st.randoms(use_true_random=False))
def test_summary_of_any_records(lives, shuffler):
    """Counts are those of a plain count, intervals hold their rate, the order of the records does not matter, and the
    summary is JSON without NaN."""
    records = records_of(lives)
    summary = summarise("a", "m", "none", {"x": 1}, records, seed=4)
    for row in summary["rounds"]:
        letters = [letters[row["round"] - 1] for _, letters in lives]
        assert (row["violations"], row["unparsed"]) == (letters.count("v"), letters.count("u"))
        assert row["total"] == len(lives)  # unparsed answers are counted in it
        assert row["rate"] == row["violations"] / row["total"]
        assert row["unparsed_rate"] == row["unparsed"] / row["total"]
        assert 0 <= row["ci95"][0] <= row["rate"] <= row["ci95"][1] <= 1
        independent = rates.wilson(row["violations"], row["total"])  # clusters never make an interval narrower
        assert row["ci95"][0] <= independent[0] and independent[1] <= row["ci95"][1]
    low, high = summary["change"]["ci95"]
    assert -1 <= low <= summary["change"]["estimate"] <= high <= 1
    moves = [letters[0] + letters[2] for _, letters in lives]
    gained, lost = (sum((a != "v") & (b == "v") for a, b in pairs) for pairs in (moves, [m[::-1] for m in moves]))
    independent = rates.paired_score(gained, lost, len(lives))
    assert low <= independent[0] and independent[1] <= high
    text = json.dumps(summary, allow_nan=False)
    assert json.loads(text) == summary
    shuffler.shuffle(records)
    assert json.dumps(summarise("a", "m", "none", {"x": 1}, records, seed=4)) == text


def test_one_life_a_scenario_has_wilson():
    lives = [(scenario, "vc" if scenario < 9 else "cv") for scenario in range(30)]
    summary = summarise("a", "m", "none", {}, records_of(lives), seed=0)
    assert summary["interval"] == {"method": "wilson", "clusters": 30, "unit": "scenario"}
    assert summary["rounds"][0]["ci95"] == list(rates.wilson(9, 30))
    assert summary["change"]["ci95"] == list(rates.paired_score(21, 9, 30))


def test_one_scenario_alone_has_intervals_over_its_episodes():
    summary = summarise("a", "m", "none", {}, records_of([(3, "cv"), (3, "cc"), (3, "vv")] * 5), seed=0)
    assert summary["interval"] == {"method": "wilson", "clusters": 15, "unit": "episode"}
    assert summary["rounds"][1]["ci95"] == list(rates.wilson(10, 15))


def test_agents_of_one_episode_are_no_independent_lives():
    """Four agents that all do the same in each of 12 episodes of one scenario are 12 observations, not 48."""
    alone = records_of([(0, "cv"), (0, "vc"), (0, "cc")] * 4)
    together = [record | {"agent": agent} for record in alone for agent in range(4)]
    _, (low, high) = rates.share(*_round_counts(together), seed=0)
    wilson = rates.wilson(4, 12)
    assert high - low > 0.85 * (wilson[1] - wilson[0])


def _round_counts(records):
    lives = rates.read_lives(records)
    decided = lives.decisions[:, 0]
    clusters = lives.clusters
    return rates.per_cluster(clusters, decided == rates.VIOLATE), rates.per_cluster(clusters, decided >= 0)


def test_only_what_is_there_is_counted():
    """Rounds that an episode has not reached are not counted, and only lives with both rounds are paired."""
    lives = [(0, "cvv"), (0, "cv."), (1, "vc."), (1, "c.."), (2, "ccv"), (2, "vcc")]
    summary = summarise("a", "m", "none", {}, records_of(lives), seed=0)
    assert [(row["violations"], row["total"]) for row in summary["rounds"]] == [(2, 6), (2, 5), (2, 3)]
    assert summary["change"]["estimate"] == pytest.approx((1 + 1 - 1) / 3)
    assert summary["rounds"][1]["change"]["estimate"] == pytest.approx((1 + 1 - 1 + 0 - 1) / 5)


@settings(max_examples=25, deadline=None)
@given(several_lives.filter(lambda lives: len({scenario for scenario, _ in lives}) > 1))
def test_paired_change_is_the_mean_difference(lives):
    """Against sums over lives in float64."""
    moves = as_float([(letters[2] == "v") - (letters[0] == "v") for _, letters in lives])
    found = rates.paired_change(rates.read_lives(records_of(lives)), 1, 3, seed=0)
    assert (found["from"], found["to"]) == (1, 3)
    assert found["estimate"] == pytest.approx(moves.mean(), abs=1e-12)


def test_interval_of_the_paired_change_by_brute_force():
    rng = np.random.default_rng(5)
    lives = [(s, "".join(rng.choice(["c", "v"], 2, p=(0.6, 0.4)))) for s in range(25) for _ in range(4)]
    found = rates.paired_change(rates.read_lives(records_of(lives)), 1, 2, seed=0)
    by_scenario = [[(w[1] == "v") - (w[0] == "v") for scenario, w in lives if scenario == s] for s in range(25)]
    draw = random.Random(7)
    means = []
    for _ in range(4000):
        drawn = [move for _ in range(25) for move in by_scenario[draw.randrange(25)]]
        means.append(as_float(drawn).mean())
    low, high = np.quantile(means, (0.025, 0.975))
    closed = rates.paired_score(sum(w == "cv" for _, w in lives), sum(w == "vc" for _, w in lives), 100)
    assert found["ci95"] == pytest.approx([min(low, closed[0]), max(high, closed[1])], abs=0.012)


def test_seed_decides_the_resampling():
    words = sorted(random.Random(0).choices(["cv", "vv", "cc", "vc", "cu"], k=90))  # alike within a scenario
    lives = [(math.isqrt(i), word) for i, word in enumerate(words)]  # scenarios of 1, 3, 5, ... lives
    first, same, other = (summarise("a", "m", "none", {}, records_of(lives), seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first["rounds"][0]["ci95"] != other["rounds"][0]["ci95"]
    assert first["change"]["estimate"] == other["change"]["estimate"]


@pytest.mark.parametrize("spoil, said", [({"round": 1}, "two records"), ({"decision": "maybe"}, "'maybe'")])
def test_records_that_cannot_be_right(spoil, said):
    records = records_of([(0, "cv")])
    records[1] |= spoil
    with pytest.raises(UserError, match=said):
        rates.read_lives(records)


# ---------------------------------------------------------------- tipping


def test_hazard_and_stickiness_by_hand():
    lives = rates.read_lives(records_of([(0, "ccv"), (1, "cvv"), (2, "vcv"), (3, "ucv"), (4, "ccc"), (5, "vvc")]))
    # Round 2: lives 0, 1, 4 have complied; round 3: lives 0 and 4. An unparsed answer is no compliance.
    assert [(row["violations"], row["total"]) for row in hazard(lives, 0)] == [(2, 6), (1, 3), (1, 2)]
    # After a violation: life 1 in 3 (again), life 2 in 2 (not), life 5 in 2 (again) and in 3 (not).
    found = stickiness(lives, 0)
    assert (found["violations"], found["total"], found["rate"]) == (2, 4, 0.5)


def test_onset_is_the_first_round_that_is_clear_of_zero():
    """Of 40 lives none, 2, 12 and 20 have begun to violate: 2 of 40 tell nothing, 12 do."""
    begun = [0, 2, 12, 20]
    lives = [(s, "".join("v" if s < count else "c" for count in begun)) for s in range(40)]
    assert summarise("a", "m", "none", {}, records_of(lives), 0)["onset"] == 3
    assert summarise("a", "m", "none", {}, records_of([(s, w[::-1]) for s, w in lives]), 0)["onset"] == 2  # a fall
    assert summarise("a", "m", "none", {}, records_of([(s, w[:2]) for s, w in lives]), 0)["onset"] is None


def test_payoff_split():
    """Odd scenarios pay a little and stay, even ones pay double and tip; the cut itself counts as above."""
    lives = [(s, "cc" if s % 2 else "cv") for s in range(40)]
    ratio = {0: 0.11 / 0.1, 1: 1.09}  # 0.11 / 0.1 is 1.1 but for rounding
    split = payoff_split(rates.read_lives(records_of(lives, payoff_ratio=lambda s, e, r: ratio[s % 2])), 0)
    assert (split["below"]["change"]["estimate"], split["above"]["change"]["estimate"]) == (0, 1)
    assert (split["below"]["episodes"], split["below"]["ratio"]) == (20, [1.09, 1.09])
    assert split["difference"]["estimate"] == 1
    assert split["difference"]["ci95"][0] > 0.5
    for one_kind in (1.02, 3.0, None):
        assert payoff_split(rates.read_lives(records_of(lives, payoff_ratio=one_kind)), 0) is None


def test_occupations_resampled():
    """All scenarios of an occupation do the same: then 10 occupations are all there is, and the interval is wider."""
    lives = [(s, "cv" if s // 4 < 6 else "cc") for s in range(40)]
    change = summarise("a", "m", "none", {}, records_of(lives), 0)["change"]
    width, wide = (high - low for low, high in (change["ci95"], change["ci95_environment"]))
    assert wide > 1.5 * width
    for environment in (None, "the same", lambda s, e, r: f"its own {s}"):
        records = records_of(lives, environment=environment)
        assert summarise("a", "m", "none", {}, records, 0)["change"]["ci95_environment"] is None


def test_against_controls():
    def condition(name, control, words, model="m"):
        return summarise(name, model, control, {}, records_of([(s, words[s % 2]) for s in range(40)]), 0)

    tipping, flat = condition("base", "none", ("cv", "cc")), condition("flat", "no_history", ("cc", "cc"))
    (effect,) = against_controls([tipping, flat, condition("other", "no_history", ("cv", "cv"), model="n")])
    assert (effect["condition"], effect["control"], effect["estimate"]) == ("base", "flat", 0.5)
    assert 0 < effect["ci95"][0] < 0.5 < effect["ci95"][1]


@pytest.mark.parametrize("lives", [[], [(0, "c")], [(0, "v"), (0, "u"), (1, "c")]])
def test_less_than_two_rounds(lives):
    summary = summarise("a", "m", "none", {}, records_of(lives), 0)
    assert summary["change"] is None and summary["onset"] is None and summary["payoff"] is None
    json.dumps(summary, allow_nan=False)
