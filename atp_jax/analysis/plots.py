"""The role-play's picture, the violation rate by round; and what the other testbeds' pictures share with it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, PercentFormatter

from atp_jax.analysis.tables import models, overall_unparsed, title

# Okabe and Ito's colours, told apart with any colour vision; their yellow is left out, too pale for a line on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX<"  # one more than the colours, so that pairs of both repeat late
DIRECT = 6  # up to so many conditions are named at the end of their line, more in a legend
UNPARSED_SHOWN = 0.01
INK, FAINT = "#222222", "#6b6b6b"
# In pictures whose colours are models.
DASHES = {"none": "-", "no_history": (0, (4, 1.6)), "no_peers": (0, (1, 1.4)), "neutral_rewards": (0, (1, 1.4))}


def tipping_png(results: Mapping) -> bytes:
    """results.json -> PNG (1600 x 900), the same bytes for the same results.

    Lines are told apart by colour and by marker, a control's line is dashed. Where more than 1% of the answers of a
    condition are unparsed, their rate is the thin dotted line in its colour.
    """
    conditions = [condition for condition in results["conditions"] if condition["rounds"]]
    with matplotlib.style.context("default"):  # whatever a matplotlibrc of this machine says
        figure = Figure(figsize=(10, 5.625), dpi=160)
        axes = figure.add_axes((0.075, 0.11, 0.69, 0.7))
        frame(axes, conditions)
        _heading(figure, results, conditions)
        for index, condition in enumerate(conditions):
            _line(axes, condition, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
        if len(conditions) <= DIRECT:
            _labels(axes, conditions)
        elif conditions:
            legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, fontsize=8)
            for text in legend.get_texts():
                text.set_parse_math(False)
        return png(figure)


def png(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def frame(axes, conditions: Sequence[Mapping]) -> None:
    """Axes of a rate, 0 to 100%, by the rounds of these conditions."""
    numbers = sorted({row["round"] for condition in conditions for row in condition["rounds"]}) or [1]
    axes.set_xlim(numbers[0] - 0.25, numbers[-1] + 0.25)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(FixedLocator(numbers[:: 1 + (len(numbers) - 1) // 12]))
    axes.yaxis.set_major_locator(FixedLocator([0, 0.2, 0.4, 0.6, 0.8, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=10, labelcolor=INK, pad=6)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9a9a9a")
    axes.set_xlabel("round", fontsize=10.5, color=INK)


def curve(axes, rows: Sequence[Mapping], model: int, control: str) -> None:
    """A rate by round: rows with round, rate and ci95. A colour and marker a model, with a band; thin and broken, and
    without a band, under a control."""
    numbers, colour = [row["round"] for row in rows], COLOURS[model % len(COLOURS)]
    if control == "none" and rows:
        axes.fill_between(numbers, *zip(*(row["ci95"] for row in rows), strict=True), color=colour, alpha=0.16, lw=0)
    axes.plot(numbers, [row["rate"] for row in rows], **_look(model, control), clip_on=False, zorder=3)


def _look(model: int, control: str) -> dict:
    look = {"color": COLOURS[model % len(COLOURS)], "linestyle": DASHES.get(control, (0, (6, 1, 1, 1)))}
    if control != "none":
        return look | {"linewidth": 1.4, "alpha": 0.7}
    marker = {"marker": MARKERS[model % len(MARKERS)], "markersize": 5.5, "markeredgecolor": "white"}
    return look | marker | {"linewidth": 2.2, "markeredgewidth": 0.9}


def curve_keys(models: Sequence[str], conditions: Sequence[Mapping]) -> list[Line2D]:
    """What the legend of `curve`s shows: the models in their order, then the controls there are."""
    keys = [Line2D([], [], label=model, **_look(place, "none")) for place, model in enumerate(models)]
    controls = dict.fromkeys(c["control"] for c in conditions if c["control"] != "none")
    return keys + [Line2D([], [], label=control, **_look(0, control) | {"color": FAINT}) for control in controls]


def heading_and_legend(figure: Figure, heading: str, below: str, keys: Sequence) -> None:
    """Two lines of text at the top of a figure, and below them a line of keys, if there are any: 0.95 inches."""
    width, height = figure.get_size_inches()
    figure.text(0.25 / width, 1 - 0.36 / height, heading, fontsize=15, fontweight="bold", color=INK)
    figure.text(0.25 / width, 1 - 0.62 / height, below, fontsize=10, color=FAINT)
    place = {"loc": "upper left", "bbox_to_anchor": (0.25 / width, 1 - 0.77 / height), "borderaxespad": 0}
    legend = figure.legend(handles=keys, ncols=max(len(keys), 1), frameon=False, fontsize=9.5, borderpad=0, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _heading(figure: Figure, results: Mapping, conditions: Sequence[Mapping]) -> None:
    heading = f"{title(results['testbed'])}: violation rate by round"
    below = textwrap.shorten(models(conditions), 90, placeholder=" ...") + "  ·  band: 95% interval"
    if any(_shows_unparsed(condition) for condition in conditions):
        below += "  ·  dotted: unparsed answers"
    figure.text(0.03, 0.925, heading, fontsize=15, fontweight="bold", color=INK, parse_math=False)
    figure.text(0.03, 0.868, below, fontsize=10, color=FAINT, parse_math=False)


def _line(axes, condition: Mapping, colour: str, marker: str) -> None:
    rows = condition["rounds"]
    numbers = [row["round"] for row in rows]
    low, high = zip(*(row["ci95"] for row in rows), strict=True)
    axes.fill_between(numbers, low, high, color=colour, alpha=0.16, linewidth=0)
    if len(numbers) == 1:  # a band of one round has no width
        axes.vlines(numbers, low, high, color=colour, alpha=0.5)
    axes.plot(
        numbers,
        [row["rate"] for row in rows],
        color=colour,
        linewidth=2.4,
        linestyle="-" if condition["control"] == "none" else (0, (4, 1.6)),
        marker=marker,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=1.2,
        label=_wrapped(condition["name"], 28),
        clip_on=False,
        zorder=3,
    )
    if _shows_unparsed(condition):
        unparsed = [row["unparsed_rate"] for row in rows]
        axes.plot(numbers, unparsed, color=colour, linewidth=1.2, linestyle=":", clip_on=False)


def _shows_unparsed(condition: Mapping) -> bool:
    return (overall_unparsed(condition) or 0) > UNPARSED_SHOWN


def _wrapped(name: str, width: int) -> str:
    return textwrap.fill(name, width, max_lines=3, placeholder=" ...") or "(no name)"


def _labels(axes, conditions: Sequence[Mapping]) -> None:
    """Each condition's last rate and name at the end of its line, moved apart where they would cover one another."""
    last = [condition["rounds"][-1]["rate"] for condition in conditions]
    texts = [f"{100 * rate:.0f}%\n{_wrapped(c['name'], 24)}" for rate, c in zip(last, conditions, strict=True)]
    order = sorted(range(len(conditions)), key=lambda i: (last[i], i))
    places = _apart([last[i] for i in order], [0.048 * (texts[i].count("\n") + 1) for i in order])
    for i, y in zip(order, places, strict=True):
        axes.annotate(
            texts[i],
            (axes.get_xlim()[1], y),
            xytext=(6, 0),
            textcoords="offset points",
            color=COLOURS[i % len(COLOURS)],
            fontsize=10.5,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            parse_math=False,
        )


def _apart(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Ascending wanted centres -> ascending centres of labels of these heights that do not overlap, as near to the
    wanted ones as may be in least squares: labels that touch move as one pile (isotonic regression by pooling)."""
    above = [sum(heights[:i]) + heights[i] / 2 for i in range(len(heights))]  # a centre's height in one single pile
    piles: list[list[float]] = []  # each the bases its labels would like
    for centre, offset in zip(wanted, above, strict=True):
        piles.append([centre - offset])
        while len(piles) > 1 and _mean(piles[-2]) >= _mean(piles[-1]):
            piles[-2:] = [piles[-2] + piles[-1]]
    bases = [_mean(pile) for pile in piles for _ in pile]
    return [min(base, 1.05 - sum(heights)) + offset for base, offset in zip(bases, above, strict=True)]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
