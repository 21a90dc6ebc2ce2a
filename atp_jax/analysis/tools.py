"""What experience does to the use of a tool: measures of tool use from the lines of episodes.jsonl. NumPy only.

An *episode* is one agent with its complex problem, which is asked in round 0, before any experience, and again after
each round of experience. Episodes of the same problem resemble one another, so problems are what every interval
resamples. An *opportunity* is an episode whose problem the agent answered wrongly when it had no tool (asked once, in
round 0): there the tool can change the answer.

Everything here is a number or None (null in results.json), never NaN, and the same for the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from atp_jax.analysis import rates
from atp_jax.analysis.tipping import summarise


def summarise_tools(
    name: str, model: str, control: str, setting: Mapping, records: Sequence[Mapping], seed: int
) -> dict:
    """One condition of results.json: what `summarise` says of the violation (a complex problem answered at once), and
    `tools`:

    - `complex`: by round, of the measured problems: `tool` (the tool was used) and `correct`.
    - `simple`: the same of the simple problems among the experience, from round 1.
    - `direct`: the measured problems answered rightly when there was no tool.
    - `opportunity`: by round, the tool's use where the answer without it was wrong.
    - `net`: by round, `measured` and `experience`: reward less cost of a problem, on average.
    - `change`: of `tool` and `correct` from the first round to the last, paired by episode; null
      with fewer than two rounds.

    Shares have count, total, rate, ci95; means have mean, ci95.
    """
    counted = _Counted(records, seed)
    numbers = sorted({record["round"] for record in records})
    measured = {n: [_measured(record) for record in records if record["round"] == n] for n in numbers}
    lived = {n: [_experience(record) for record in records if record["round"] == n] for n in numbers}
    needed = {
        record["episode"] for record in records for met in record["problems"] if not met["tool"] and not met["correct"]
    }
    direct = [[met for met in record["problems"] if not met["tool"]] for record in records if record["round"] == 0]
    places = {n: [record["scenario"] for record in records if record["round"] == n] for n in numbers}
    episodes = {n: [record["episode"] for record in records if record["round"] == n] for n in numbers}
    simple = {n: [[met for met in mets if not met["complex"]] for mets in lived[n]] for n in numbers}
    chances = {
        n: [[met] if episode in needed else [] for met, episode in zip(measured[n], episodes[n], strict=True)]
        for n in numbers
    }
    tools = {
        "complex": [
            {"round": n, **{key: counted.share(places[n], [[m] for m in measured[n]], field) for key, field in FIELDS}}
            for n in numbers
        ],
        "simple": [
            {"round": n, **{key: counted.share(places[n], simple[n], field) for key, field in FIELDS}}
            for n in numbers
            if any(simple[n])
        ],
        "direct": counted.share(places[0], direct, "correct") if 0 in places else None,
        "opportunity": [{"round": n, **counted.share(places[n], chances[n], "used_tool")} for n in numbers],
        "net": [
            {
                "round": n,
                "measured": counted.mean(places[n], [[m] for m in measured[n]]),
                "experience": counted.mean(places[n], lived[n]),
            }
            for n in numbers
        ],
        "change": {key: counted.change(places, episodes, measured, numbers, field) for key, field in FIELDS}
        if len(numbers) > 1
        else None,
    }
    return summarise(name, model, control, setting, records, seed) | {"tools": tools}


FIELDS = (("tool", "used_tool"), ("correct", "correct"))  # name in the results, key of a problem in the records


def _measured(record: Mapping) -> Mapping:
    """The problem that is measured in a round, asked with the tool at hand: its last."""
    return record["problems"][-1]


def _experience(record: Mapping) -> list[Mapping]:
    return [met for met in record["problems"] if not met["measured"]]


class _Counted:
    """Counts by cluster, which is the measured problem."""

    def __init__(self, records: Sequence[Mapping], seed: int):
        self._index = {place: number for number, place in enumerate(sorted({r["scenario"] for r in records}))}
        self._seed = seed

    def share(self, places: Sequence[int], mets: Sequence[Sequence[Mapping]], field: str) -> dict:
        """How many of the problems have `field`. places: the cluster of each episode; mets: its problems."""
        k = self._sums(places, [sum(bool(met[field]) for met in own) for own in mets]).astype(int)
        n = self._sizes(places, mets)
        rate, interval = rates.share(k, n, self._seed)
        return {"count": int(k.sum()), "total": int(n.sum()), "rate": rate, "ci95": interval and list(interval)}

    def mean(self, places: Sequence[int], mets: Sequence[Sequence[Mapping]]) -> dict | None:
        """The mean of what the problems brought in, clusters resampled."""
        sums = self._sums(places, [sum(met["net"] for met in own) for own in mets])
        n = self._sizes(places, mets)
        sums, n = sums[n > 0], n[n > 0]
        if not len(n):
            return None
        drawn = np.random.default_rng(self._seed).integers(0, len(n), (rates.RESAMPLES, len(n)))
        means = sums[drawn].sum(1) / n[drawn].sum(1)
        return {"mean": float(sums.sum() / n.sum()), "ci95": [float(end) for end in np.quantile(means, (0.025, 0.975))]}

    def change(self, places: Mapping, episodes: Mapping, measured: Mapping, numbers: Sequence[int], field: str):
        """Of `field`, from the first round to the last, paired by episode."""
        start, end = numbers[0], numbers[-1]
        after = dict(zip(episodes[end], measured[end], strict=True))
        pairs = [(before[field], after[e][field]) for before, e in zip(measured[start], episodes[start], strict=True)]
        gained, lost, n = (
            self._sums(places[start], [pair in wanted for pair in pairs]).astype(int)
            for wanted in ([(False, True)], [(True, False)], pairs)
        )
        estimate, interval = rates.change(gained, lost, n, self._seed)
        return {"from": start, "to": end, "estimate": estimate, "ci95": list(interval)}

    def _sums(self, places: Sequence[int], values: Sequence[float]) -> np.ndarray:
        where = [self._index[place] for place in places]
        return np.bincount(where, weights=np.asarray(values, float), minlength=len(self._index))

    def _sizes(self, places: Sequence[int], mets: Sequence[Sequence[Mapping]]) -> np.ndarray:
        return self._sums(places, [len(own) for own in mets]).astype(int)
