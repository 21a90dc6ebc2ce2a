"""Three pictures of threshold games: rates by round, last rates over the grid, and single games choice by choice."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.style
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from atp_jax.analysis.games_tables import incentive, payoffs, population, threshold
from atp_jax.analysis.plots import FAINT, INK, curve, curve_keys, frame, heading_and_legend, png
from atp_jax.analysis.tables import spread

SHOWN_GAMES = 12
NAMED_AGENTS = 16  # so many rows of a raster carry their agent's number
CHOICES = ("independent", "collusion", "unparsed", "fixed to collude", "no record")
CHOICE_COLOURS = ("#BFD8EA", "#D55E00", "#4B4B4B", "#F2C6A0", "#ffffff")
_CODES = {"comply": 0, "violate": 1, "unparsed": 2}
_HEAT = LinearSegmentedColormap.from_list("collusion", ["#ffffff", "#F7C9A3", "#D55E00", "#7A3300"])


# ---------------------------------------------------------------- rates by round


def rates_png(results: Mapping) -> bytes:
    """Collusion rate by round: a panel per threshold (and a row per payoff set, if there are several), a line per
    population with its 95% band; a control's line is thin and broken."""
    conditions = [condition for condition in results["conditions"] if condition["rounds"]]
    columns, rows = _thresholds(conditions), _stakes(conditions)
    models = list(dict.fromkeys(map(population, conditions)))
    with matplotlib.style.context("default"):
        figure, panels = _panels(len(rows), len(columns), width=2.9, height=2.5, top=1.45)
        below, keys = "band: 95% interval, whole games resampled", curve_keys(models, conditions)
        heading_and_legend(figure, "Threshold game: collusion rate by round", below, keys)
        for r, c, axes in _each(panels) if conditions else ():
            frame(axes, conditions)
            axes.set_title(_panel_title(columns[c], rows[r], len(rows)), fontsize=10, color=INK, loc="left")
            axes.set_xlabel("round" if r == len(rows) - 1 else "", fontsize=9)
            axes.tick_params(labelsize=8.5, pad=4, labelleft=c == 0)
            for condition in conditions:
                if (_threshold(condition), _stake(condition)) == (columns[c], rows[r]):
                    curve(axes, condition["rounds"], models.index(population(condition)), condition["control"])
        return png(figure)


# ---------------------------------------------------------------- the grid


def has_grid(results: Mapping) -> bool:
    """Is there more than one cell of threshold and payoff set to compare?"""
    conditions = _uncontrolled(results)
    return len(_thresholds(conditions)) * len(_stakes(conditions)) > 1


def grid_png(results: Mapping) -> bytes:
    """The last round's collusion rate, thresholds across and payoff sets down (by incentive ratio), a panel per
    population without a control."""
    conditions = _uncontrolled(results)
    columns, rows = _thresholds(conditions), _stakes(conditions)
    models = list(dict.fromkeys(map(population, conditions)))
    with matplotlib.style.context("default"):
        height = 0.75 + 0.5 * len(rows)
        figure, panels = _panels(1, len(models), width=max(2.6, 0.62 * len(columns)), height=height, top=1.05, left=1.5)
        heading_and_legend(figure, "Collusion rate in the last round, in percent", "each model without a control", [])
        for _, c, axes in _each(panels):
            rates = np.full((len(rows), len(columns)), np.nan)
            for condition in conditions:
                if population(condition) == models[c]:
                    place = rows.index(_stake(condition)), columns.index(_threshold(condition))
                    rates[place] = condition["rounds"][-1]["rate"]
            _heat(axes, rates)
            axes.set_title(models[c], fontsize=10, fontweight="bold", color=INK, loc="left", parse_math=False)
            axes.set_xticks(range(len(columns)), [words for _, words in columns], fontsize=8.5, color=INK)
            labels = [f"{k}\n{words}" for _, k, words in rows] if c == 0 else []
            axes.set_yticks(range(len(rows)) if labels else [], labels, fontsize=8.5, color=INK)
            axes.set_xlabel("threshold", fontsize=9, color=INK)
        return png(figure)


def _heat(axes, rates: np.ndarray) -> None:
    axes.imshow(rates, cmap=_HEAT, vmin=0, vmax=1, aspect="auto")
    for (row, column), rate in np.ndenumerate(rates):
        words, colour = ("-", FAINT) if np.isnan(rate) else (f"{100 * rate:.0f}", "white" if rate > 0.55 else INK)
        axes.text(column, row, words, ha="center", va="center", fontsize=10, color=colour)
    axes.set_xticks(np.arange(rates.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rates.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------- single games


def shown_games(results: Mapping, records: Mapping[str, Sequence[Mapping]]) -> list[tuple[str, list[Mapping]]]:
    """Condition name and records of the games that are drawn, chosen by their place and never by what came of them: of
    up to 12 conditions without a control, evenly spread over their list, the first games by scenario and episode, up
    to 12 in all."""
    names = spread([condition["name"] for condition in _uncontrolled(results)], SHOWN_GAMES)
    chosen = []
    for name in names:
        games: dict[tuple[int, int], list[Mapping]] = {}
        for record in records.get(name, ()):
            games.setdefault((record["scenario"], record["episode"]), []).append(record)
        chosen += [(name, games[key]) for key in sorted(games)[: SHOWN_GAMES // len(names)]]
    return chosen


def raster_png(results: Mapping, records: Mapping[str, Sequence[Mapping]]) -> bytes:
    """Who chose what: a panel per game of `shown_games`, a row per agent, a column per round, a tick where the
    collective option paid. A triangle marks an unaligned agent."""
    games = shown_games(results, records)
    played = {condition["name"]: condition for condition in results["conditions"]}
    columns = min(4, len(games)) or 1
    with matplotlib.style.context("default"):
        figure, panels = _panels(-(-len(games) // columns), columns, width=2.9, height=2.55, top=1.6)
        codes: set[int] = set()
        axes_of = [axes for _, _, axes in _each(panels)]
        for axes in axes_of[len(games) :]:
            axes.set_axis_off()
        for axes, (name, game) in zip(axes_of, games, strict=False):
            codes |= _raster(axes, game)
            rules = f"t = {threshold(played[name])}, {incentive(played[name])}"
            where = f"scenario {game[0]['scenario']}, game {game[0]['episode']}"
            title = f"{textwrap.shorten(name, 36, placeholder=' ...')}\n{rules}, {where}"
            axes.set_title(title, fontsize=8.5, color=INK, loc="left", pad=16, parse_math=False)
        keys = [Patch(color=CHOICE_COLOURS[code], label=CHOICES[code]) for code in sorted(codes)]
        if any(record.get("unaligned") for _, game in games for record in game):
            keys.append(Line2D([], [], color=INK, marker="<", linestyle="", markersize=5, label="unaligned agent"))
        below = "a row an agent, a column a round  ·  ✓ the collective option paid, ✗ not"
        heading_and_legend(figure, "Who chose what", below, keys)
        return png(figure)


def _raster(axes, game: Sequence[Mapping]) -> set[int]:
    """Draws a game; gives the codes it used."""
    agents, rounds = (sorted({record[key] for record in game}) for key in ("agent", "round"))
    codes = np.full((len(agents), len(rounds)), CHOICES.index("no record"))
    for record in game:
        code = CHOICES.index("fixed to collude") if record.get("fixed") else _CODES[record["decision"]]
        codes[agents.index(record["agent"]), rounds.index(record["round"])] = code
    axes.imshow(
        codes, cmap=ListedColormap(CHOICE_COLOURS), vmin=0, vmax=len(CHOICES) - 1, aspect="auto", interpolation="none"
    )
    success = {record["round"]: record["success"] for record in game}
    for column, number in enumerate(rounds):
        mark, colour = ("✓", INK) if success[number] else ("✗", FAINT)
        axes.annotate(mark, (column, 1), (0, 3), ("data", "axes fraction"), "offset points", ha="center", color=colour)
    few = len(agents) <= NAMED_AGENTS
    for row, agent in enumerate(agents):
        if any(record["agent"] == agent and record.get("unaligned") for record in game):
            axes.plot(len(rounds) - 0.38, row, marker="<", markersize=4, color=INK, clip_on=False)
    axes.set_xlim(-0.5, len(rounds) - 0.5)
    axes.set_xticks(range(len(rounds)), rounds, fontsize=8, color=INK)
    axes.set_yticks(range(len(agents)) if few else [], agents if few else [], fontsize=7.5, color=FAINT)
    axes.set_xticks(np.arange(len(rounds) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(agents) + 1) - 0.5 if few else [], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, pad=3)
    axes.spines[:].set_visible(False)
    return set(codes.ravel().tolist())


# ---------------------------------------------------------------- panels


def _panels(rows: int, columns: int, width: float, height: float, top: float, left: float = 0.6):
    """A figure of rows x columns panels, each of so many inches, below `top` inches for heading and legend. It is at
    least 10 inches wide, as the other pictures are."""
    rows, columns = max(rows, 1), max(columns, 1)
    whole = max(10.0, left + columns * width)
    size = (whole, top + rows * height)
    figure = Figure(figsize=size, dpi=160)
    right = 1 - 0.25 / whole
    edges = {"left": left / whole, "right": right, "top": 1 - top / size[1], "bottom": 0.5 / size[1]}
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw={**edges, "wspace": 0.16, "hspace": 0.42})


def _each(panels):
    return [(r, c, axes) for r, row in enumerate(panels) for c, axes in enumerate(row)]


# ---------------------------------------------------------------- the grid's axes


def _uncontrolled(results: Mapping) -> list[Mapping]:
    return [c for c in results["conditions"] if c["control"] == "none" and c["rounds"]]


def _threshold(condition: Mapping) -> tuple[int, str]:
    return condition["setting"]["game.threshold"], threshold(condition)


def _thresholds(conditions: Sequence[Mapping]) -> list[tuple[int, str]]:
    return sorted({_threshold(condition) for condition in conditions})


def _stake(condition: Mapping) -> tuple[float, str, str]:
    ratio = condition["games"]["incentive_ratio"]
    return float("inf") if ratio is None else ratio, incentive(condition), payoffs(condition)


def _stakes(conditions: Sequence[Mapping]) -> list[tuple[float, str, str]]:
    return sorted({_stake(condition) for condition in conditions})


def _panel_title(column: tuple[int, str], row: tuple[float, str, str], rows: int) -> str:
    return f"t = {column[1]}" + (f", {row[2]}, {row[1]}" if rows > 1 else "")
