"""The threshold game's report/: one page with its pictures and its tables, readable without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from atp_jax.analysis.games_plots import grid_png, has_grid, raster_png, rates_png
from atp_jax.analysis.games_tables import games_csv, incentive, payoffs, rates_csv, threshold
from atp_jax.analysis.report import FEW_CLUSTERS, change_cell, rate_cell, tables_page
from atp_jax.analysis.tables import direction, overall_unparsed, percent, span
from atp_jax.analysis.tipping import against_controls

RATES, GAMES = "rates.csv", "games.csv"
PICTURES = {
    "rates.png": "Collusion rate by round: a panel per threshold, a line with its 95% band per model. Thin broken lines"
    " are controls: without memory of earlier rounds (no_history) or without sight of the others (no_peers).",
    "grid.png": "Collusion rate in the last round over thresholds and payoff sets. k = (high - normal) / (normal - low)"
    " is what a success wins over what a failure costs.",
    "games.png": "Single games, chosen by their place and never by what came of them: of up to 12 conditions without a"
    " control, evenly spread over their list, the first games by scenario and number.",
}
RATE_TEXTS = (
    "Below each number its 95% interval. Counted among all answers of the agents that choose: an answer that could not "
    "be read is no collusion and is shown under unparsed, and agents fixed to collude are not counted. Change: last "
    "round minus first, in percentage points, paired by agent. Payoffs: what a success, the independent option and a "
    "failure pay; k = (high - normal) / (normal - low) of them.",
)
AFTER_HEAD = (
    "colluded: after success", "after failure", "difference", "had not: after success", "after failure", "difference"
)  # fmt: skip
AFTER_TEXTS = (
    "Success at last: games that succeed in the last round. Then the share of agents that collude in the next "
    "round, by whether they colluded in this one and whether the collective option paid. Difference: after a "
    "success minus after a failure, in percentage points.",
    "The difference is not the effect of a success alone: a game whose agents lean to collusion succeeds more often "
    "and colludes more often afterwards, even if nobody learns anything. How much of it is there without memory or "
    "without sight of the others stands in the rows of the controls.",
)
SPREAD_HEAD = (
    "new colluders per colluder", "without success", "net", "lock in", "from round", "die out", "from round"
)  # fmt: skip
SPREAD_TEXTS = (
    "New colluders per colluder: after a success, agents that did not collude and do in the next round, over those "
    "that colluded. Without success: what the same agents would have brought at the rate at which agents begin to "
    "collude after a failure. Net: the one minus the other.",
    "Lock in: games in which at the end all agents that choose collude, and the mean of the rounds from which on "
    "they all do. Die out: games in which at the end none does.",
)


def files(results: Mapping, records: Mapping[str, Sequence[Mapping]]) -> dict[str, bytes]:
    """File name -> content. results: the content of results.json. records: condition name -> its lines of
    episodes.jsonl. There is a grid.png only where there is more than one threshold or payoff set."""
    pictures = {"rates.png": rates_png(results), "games.png": raster_png(results, records)}
    if has_grid(results):
        pictures["grid.png"] = grid_png(results)
    shown = [{"file": name, "says": says} for name, says in PICTURES.items() if name in pictures]
    tables = {RATES: rates_csv(results).encode(), GAMES: games_csv(results).encode()}
    return {**tables, **pictures, "index.html": page(results, shown).encode()}


def page(results: Mapping, pictures: Sequence[Mapping]) -> str:
    """The page as HTML text."""
    conditions = results["conditions"]
    return tables_page(
        conditions,
        units=("games", "scenarios"),
        heading="Threshold game: collusion rate by round",
        findings=_findings(conditions),
        pictures=pictures,
        tables=_tables(conditions),
        files=(RATES, GAMES),
        notes=_notes(conditions),
    )


def _findings(conditions: Sequence[Mapping]) -> list[tuple[str, str]]:
    """Per threshold: in which conditions without a control collusion rises, in which it falls."""
    by_threshold: dict[str, list[Mapping]] = {}
    for condition in sorted(conditions, key=lambda condition: condition["setting"]["game.threshold"]):
        if condition["control"] == "none":
            by_threshold.setdefault(f"t = {threshold(condition)}", []).append(condition)
    found = []
    for label, group in by_threshold.items():
        parts = []
        for way, words in (
            ("rise", "collusion rises in"),
            ("fall", "collusion falls in"),
            ("", "no change can be told in"),
        ):
            names = [condition["name"] for condition in group if direction(condition["change"]) == way]
            if names:
                parts.append(f"{words} {len(names)} of {len(group)} conditions ({', '.join(names)})")
        found.append((label, f"from the first round to the last {'; '.join(parts)}."))
    return found


# ---------------------------------------------------------------- tables


def _tables(conditions: Sequence[Mapping]) -> list[dict]:
    """Tables of the page: heading, head, rows of a name and (number, interval) cells, and the texts below."""
    numbers = sorted({row["round"] for condition in conditions for row in condition["rounds"]})
    rounds = [f"r{number}" for number in numbers]

    def rates(condition):
        game = [(threshold(condition), ""), (payoffs(condition), incentive(condition))]
        unparsed = percent(overall_unparsed(condition)), ""
        return [*game, *_by_round(condition["rounds"], numbers), unparsed, change_cell(condition["change"])]

    def apart(kind, part):
        return [(kind, ""), *_by_round(part["rounds"], numbers), change_cell(part["change"])]

    mixed = [(c["name"], kind, part) for c in conditions for kind, part in (c["games"]["populations"] or {}).items()]
    return [
        {
            "heading": "Collusion rate, in percent",
            "head": ["condition", "t", "payoffs", *rounds, "unparsed", "change"],
            "rows": [(c["name"], rates(c)) for c in conditions],
            "texts": RATE_TEXTS,
        },
        {
            "heading": "What an outcome teaches",
            "head": ["condition", "success at last", *AFTER_HEAD],
            "rows": [(c["name"], [_last_success(c["games"]), *_again(c["games"])]) for c in conditions],
            "texts": AFTER_TEXTS,
        },
        {
            "heading": "How collusion spreads, and how games end",
            "head": ["condition", *SPREAD_HEAD],
            "rows": [(c["name"], [*_diffusion(c["games"]), *_endings(c["games"])]) for c in conditions],
            "texts": SPREAD_TEXTS,
        },
        {
            "heading": "Aligned and unaligned agents apart",
            "head": ["condition", "agents", *rounds, "change"],
            "rows": [(name, apart(kind, part)) for name, kind, part in mixed],
            "texts": ["In a mixed population some agents wear the unaligned model; all see one another."],
        },
        {
            "heading": "Against the controls",
            "head": ["condition", "control", "difference"],
            "rows": [(e["condition"], [(e["control"], ""), change_cell(e)]) for e in against_controls(conditions)],
            "texts": ["Change of the condition minus change of its control, in percentage points."],
        },
    ]


def _by_round(rows: Iterable[Mapping], numbers: Sequence[int]) -> list[tuple[str, str]]:
    found = {row["round"]: (percent(row["rate"]), span(row["ci95"])) for row in rows}
    return [found.get(number, ("-", "")) for number in numbers]


def _last_success(games: Mapping) -> tuple[str, str]:
    return rate_cell(games["success"][-1]) if games["success"] else ("-", "")


def _again(games: Mapping) -> list[tuple[str, str]]:
    return [
        cell
        for who in games["again"].values()
        for cell in (rate_cell(who["after_success"]), rate_cell(who["after_failure"]), change_cell(who["difference"]))
    ]


def _diffusion(games: Mapping) -> list[tuple[str, str]]:
    def cell(part):
        return (f"{part['estimate']:.2f}", "[{:.2f}, {:.2f}]".format(*part["ci95"])) if part else ("-", "")

    return [cell(games["diffusion"][part]) for part in ("number", "spontaneous", "net")]


def _endings(games: Mapping) -> list[tuple[str, str]]:
    def start(end):
        return "-" if end["mean_round"] is None else f"{end['mean_round']:.1f}"

    return [cell for end in (games["lock_in"], games["die_out"]) for cell in (rate_cell(end), (start(end), ""))]


# ---------------------------------------------------------------- notes


def _notes(conditions: Sequence[Mapping]) -> list[str]:
    """How the intervals of these conditions were made."""
    resampled = [c["interval"] for c in conditions if c["interval"]["method"] == "bootstrap"]
    notes = []
    if resampled:
        notes.append(
            "Agents of a game watch one another, so that a game counts as a whole: games are drawn with replacement "
            f"{resampled[0]['resamples']:,} times (seed {resampled[0]['seed']}), and the interval holds the middle 95% "
            "of what comes out. It is never made narrower than if all choices were independent. Where all games agree, "
            "resampling says nothing, and each counts as one observation. Shares of games have Wilson's score interval."
        )
    fewest = min((method["clusters"] for method in resampled), default=FEW_CLUSTERS)
    if fewest < FEW_CLUSTERS:
        notes.append(
            f"Here only {fewest} games are resampled. With so few, such intervals are too narrow: take them as rough."
        )
    notes.append(
        "The intervals speak of other games of these scenarios. They do not speak of other scenarios (games.csv has "
        "the change with whole scenarios resampled, where there are several), other models, other wordings or other "
        "training runs. Every interval stands for itself: nothing is corrected for looking at many conditions and "
        "rounds. The comparison with a control treats the two conditions as independent."
    )
    return notes
