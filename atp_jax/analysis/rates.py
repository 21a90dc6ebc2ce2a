"""Rates and paired changes of episodes, with 95% intervals. NumPy only.

A *life* is one agent's way through one episode. Lives of the same scenario resemble one another, so scenarios
(clusters) are what is resampled; in a game, whose agents watch one another, episodes are. Two closed forms serve where
every cluster holds one life:

- a rate: Wilson's score interval (Wilson 1927),
- a paired change, the share of lives that gained minus the share that lost: the two shares' Wilson intervals put
  together by the square-and-add rule of Newcombe (1998, Stat. Med. 17:2635-2650).

Otherwise the interval is the percentile bootstrap over clusters, *never narrower than the closed form on the same
counts*: with few events the plain bootstrap is far too sure of itself (a true rate of 1% in 64 scenarios of 5 lives is
covered 80% of the time; widened like this, 99%). Where all clusters agree, the bootstrap has no width and says nothing;
then the closed form is taken with each cluster counted once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from atp_jax.errors import UserError

Z95 = 1.959963984540054  # standard normal quantile at 0.975
RESAMPLES = 10_000
COMPLY, VIOLATE, UNPARSED, ABSENT = 0, 1, 2, -1
_CODES = {"comply": COMPLY, "violate": VIOLATE, "unparsed": UNPARSED}

Interval = tuple[float, float]


# ---------------------------------------------------------------- records to arrays


@dataclass(frozen=True)
class Lives:
    """Decisions as an array, lives sorted by (scenario, episode, agent): the order of the records is forgotten.

    decisions: int8 [L, R], codes COMPLY, VIOLATE, UNPARSED, or ABSENT where there is no record.
    rounds: the R round numbers, ascending. scenario, episode: int [L].
    environment: per life the occupation, or None. payoff_ratio: float [L], NaN where there is none.
    cluster: which lives go together, "scenario" or "episode".
    """

    decisions: np.ndarray
    rounds: tuple[int, ...]
    scenario: np.ndarray
    episode: np.ndarray
    environment: tuple[str | None, ...]
    payoff_ratio: np.ndarray
    cluster: str

    @property
    def unit(self) -> str:
        """What is resampled. With a single scenario its episodes: nothing can then be said about other scenarios, and
        the intervals are about this one."""
        return "scenario" if self.cluster == "scenario" and len(set(self.scenario.tolist())) > 1 else "episode"

    @property
    def clusters(self) -> np.ndarray:
        """int [L]: 0.. per scenario or episode, as `unit` says."""
        labels = self.scenario if self.unit == "scenario" else np.stack([self.scenario, self.episode], axis=1)
        return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)


def read_lives(records: Iterable[Mapping], cluster: str = "scenario") -> Lives:
    """Lines of episodes.jsonl -> Lives. UserError names a record that stands twice or an unknown decision."""
    cells: dict[tuple[int, int, int], dict[int, Mapping]] = {}
    for record in records:
        rounds = cells.setdefault((record["scenario"], record["episode"], record["agent"]), {})
        if record["round"] in rounds:
            where = ", ".join(f"{key} {record[key]}" for key in ("scenario", "episode", "agent", "round"))
            raise UserError(f"episodes: two records of {where}")
        if record["decision"] not in _CODES:
            raise UserError(f"episodes: unknown decision {record['decision']!r} in episode {record['episode']}")
        rounds[record["round"]] = record
    keys = sorted(cells)
    numbers = tuple(sorted({number for rounds in cells.values() for number in rounds}))
    decisions = np.full((len(keys), len(numbers)), ABSENT, np.int8)
    for row, key in enumerate(keys):
        for column, number in enumerate(numbers):
            if number in cells[key]:
                decisions[row, column] = _CODES[cells[key][number]["decision"]]
    any_record = [next(iter(cells[key].values())) for key in keys]
    ratios = [record.get("payoff_ratio") for record in any_record]
    return Lives(
        decisions=decisions,
        rounds=numbers,
        scenario=np.array([key[0] for key in keys], dtype=np.int64),
        episode=np.array([key[1] for key in keys], dtype=np.int64),
        environment=tuple(record.get("environment") for record in any_record),
        payoff_ratio=np.array([math.nan if ratio is None else ratio for ratio in ratios], dtype=np.float64),
        cluster=cluster,
    )


# ---------------------------------------------------------------- intervals


def wilson(k: float, n: float) -> Interval:
    """Wilson's 95% score interval of a proportion, k of n (k may be a fraction of a count). n = 0: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z95 * Z95 / n
    centre = (p + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * p * (1 - p) + z2 * z2 / 4) / (1 + z2)
    low = 0.0 if k == 0 else min(p, centre - half)  # exact at the ends, where rounding would leave 1e-18
    high = 1.0 if k == n else max(p, centre + half)
    return low, high


def paired_score(gained: float, lost: float, n: float) -> Interval:
    """95% interval of (gained - lost) / n, where of n pairs `gained` went from 0 to 1 and `lost` from 1 to 0.

    Square-and-add of the two shares' Wilson intervals with their multinomial correlation
    -sqrt(p q / ((1 - p)(1 - q))). n = 0: (-1, 1).
    """
    if n == 0:
        return -1.0, 1.0
    p, q = gained / n, lost / n
    (p_low, p_high), (q_low, q_high) = wilson(gained, n), wilson(lost, n)
    rest = (1 - p) * (1 - q)
    correlation = -1.0 if rest == 0 or p + q >= 1 else -math.sqrt(p * q / rest)

    def reach(a, b):
        return math.sqrt(a * a + b * b - 2 * correlation * a * b)

    return max(-1.0, p - q - reach(p - p_low, q_high - q)), min(1.0, p - q + reach(p_high - p, q - q_low))


def difference(a: float, a_ci: Interval, b: float, b_ci: Interval) -> Interval:
    """95% interval of a - b for two independent estimates from their own intervals (square-and-add)."""
    low = a - b - math.hypot(a - a_ci[0], b_ci[1] - b)
    return low, a - b + math.hypot(a_ci[1] - a, b - b_ci[0])


def resampled_sums(counts: np.ndarray, seed: int) -> np.ndarray:
    """Column sums over clusters drawn with replacement: int [G, C] -> int [RESAMPLES, C]. The sums are of integers, so
    that the same seed gives the same sums on every machine."""
    count = len(counts)
    rng = np.random.default_rng(seed)
    block = max(1, 1_000_000 // count)  # rows at a time: memory stays small however many clusters there are
    sums = []
    for start in range(0, RESAMPLES, block):
        drawn = rng.integers(0, count, size=(min(block, RESAMPLES - start), count))
        sums.append(np.stack([column[drawn].sum(axis=1) for column in counts.T], axis=1))
    return np.concatenate(sums)


def cluster_bootstrap(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> Interval:
    """95% percentile interval of sum(numerators) / sum(denominators) over clusters drawn with replacement.

    numerators, denominators: int [G], denominators positive.
    """
    above, below = resampled_sums(np.stack([numerators, denominators], axis=1), seed).T
    low, high = np.quantile(above / below, (0.025, 0.975))
    return float(low), float(high)


def share(k: np.ndarray, n: np.ndarray, seed: int) -> tuple[float | None, Interval | None]:
    """Rate sum(k) / sum(n) and its interval. k, n: int [G] per cluster; (None, None) when there is nothing to count."""
    k, n = k[n > 0], n[n > 0]
    if not len(n):
        return None, None
    events, total = int(k.sum()), int(n.sum())
    rate, interval = events / total, wilson(events, total)
    if n.max() > 1:
        low, high = cluster_bootstrap(k, n, seed)
        interval = (min(low, interval[0]), max(high, interval[1])) if low < high else wilson(rate * len(n), len(n))
    return rate, _around(interval, rate)


def change(gained: np.ndarray, lost: np.ndarray, n: np.ndarray, seed: int) -> tuple[float | None, Interval | None]:
    """Paired change (sum(gained) - sum(lost)) / sum(n) and its interval; int [G] per cluster, as in `share`."""
    gained, lost, n = gained[n > 0], lost[n > 0], n[n > 0]
    if not len(n):
        return None, None
    up, down, total = int(gained.sum()), int(lost.sum()), int(n.sum())
    estimate, interval = (up - down) / total, paired_score(up, down, total)
    if n.max() > 1:
        low, high = cluster_bootstrap(gained - lost, n, seed)
        if low < high:
            interval = min(low, interval[0]), max(high, interval[1])
        else:
            interval = paired_score(up / total * len(n), down / total * len(n), len(n))
    return estimate, _around(interval, estimate)


def _around(interval: Interval, estimate: float) -> Interval:
    """The interval, never leaving its own estimate outside by a rounding or by very unequal clusters."""
    return min(interval[0], estimate), max(interval[1], estimate)


# ---------------------------------------------------------------- by round


def per_cluster(clusters: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """How many chosen lives each cluster has. clusters int [L], chosen bool [L] -> int64 [G]."""
    return np.bincount(clusters, weights=chosen, minlength=clusters.max() + 1 if len(clusters) else 0).astype(np.int64)


def rates_by_round(lives: Lives, seed: int) -> list[dict]:
    """Per round present: round, violations, unparsed, total, rate, unparsed_rate, ci95 (of the violation rate).

    Unparsed answers count in the total: rate = violations / total.
    """
    rows = []
    for number, decided in zip(lives.rounds, lives.decisions.T, strict=True):
        violating, present = per_cluster(lives.clusters, decided == VIOLATE), per_cluster(lives.clusters, decided >= 0)
        rate, interval = share(violating, present, seed)
        unparsed, total = int((decided == UNPARSED).sum()), int(present.sum())
        rows.append(
            {
                "round": number,
                "violations": int(violating.sum()),
                "unparsed": unparsed,
                "total": total,
                "rate": rate,
                "unparsed_rate": unparsed / total,
                "ci95": list(interval),
            }
        )
    return rows


def paired_change(lives: Lives, start: int, end: int, seed: int, clusters: Sequence[int] | None = None) -> dict | None:
    """Mean over lives of v_end - v_start, v = 1 for a violation, over the lives that have both rounds.

    start, end: round numbers. clusters: int [L], by default the scenarios. None when no life has both.
    """
    clusters = lives.clusters if clusters is None else np.asarray(clusters)
    before, after = (lives.decisions[:, lives.rounds.index(number)] for number in (start, end))
    both = (before >= 0) & (after >= 0)
    gained = both & (before != VIOLATE) & (after == VIOLATE)
    lost = both & (before == VIOLATE) & (after != VIOLATE)
    estimate, interval = change(*(per_cluster(clusters, chosen) for chosen in (gained, lost, both)), seed)
    if estimate is None:
        return None
    return {"from": start, "to": end, "estimate": estimate, "ci95": list(interval)}
