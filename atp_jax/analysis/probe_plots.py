"""The picture of the scripted-history probe: what an agent decides after a history that was written for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.style
from matplotlib.figure import Figure

from atp_jax.analysis.plots import COLOURS, FAINT, INK, MARKERS, frame, png
from atp_jax.analysis.tables import PROBED, probe_lines

PANEL, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 3.1, 4.4, 0.7, 0.25, 1.35, 0.6  # inches


def probe_png(cells: Sequence[Mapping]) -> bytes:
    """The cells of the probe -> PNG: the scored rate of violations against the number of scripted rounds, a panel for
    each model, a line and a 95% band for each kind of history; the same bytes for the same cells."""
    lines = probe_lines(cells)
    models = list(dict.fromkeys(model for model, _, _ in lines))
    kinds = list(dict.fromkeys(history for _, history, _ in lines))
    # Every panel has the rounds of all, and the frame reads them as it reads those of conditions.
    rounds = [{"rounds": [{"round": length} for _, _, line in lines for length in line]}]
    width = LEFT + PANEL * max(len(models), 2) + RIGHT
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(width, HEIGHT), dpi=160)
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        edges = {"left": LEFT / width, "right": 1 - RIGHT / width, "top": 1 - TOP / HEIGHT, "bottom": BOTTOM / HEIGHT}
        figure.subplots_adjust(wspace=0.14, **edges)
        for axes, model in zip(panels, models, strict=True):
            frame(axes, rounds)
            axes.set_title(model, fontsize=10.5, fontweight="bold", color=INK, loc="left", parse_math=False)
            axes.set_xlabel("scripted rounds before", fontsize=9.5, color=INK)
            axes.tick_params(labelsize=9, pad=4)
            for owner, history, line in lines:
                if owner == model:
                    _line(axes, line, history, kinds.index(history))
        figure.text(
            0.03, 1 - 0.4 / HEIGHT, "Violations after a scripted history", fontsize=14, fontweight="bold", color=INK
        )
        below = "scored probability of violating in the next round  ·  band: 95% interval"
        figure.text(0.03, 1 - 0.66 / HEIGHT, below, fontsize=9.5, color=FAINT)
        handles, labels = panels[0].get_legend_handles_labels()
        place = {"loc": "center left", "bbox_to_anchor": (0.02, 1 - 0.9 / HEIGHT), "ncols": len(kinds)}
        figure.legend(handles, labels, frameon=False, fontsize=9.5, handlelength=1.6, **place)
        return png(figure)


def _line(axes, line: Mapping[int, Mapping], history: str, index: int) -> None:
    lengths, scored = list(line), [cell["scored"] for cell in line.values()]
    colour = COLOURS[index % len(COLOURS)]
    low, high = zip(*(one["ci95"] for one in scored), strict=True)
    axes.fill_between(lengths, low, high, color=colour, alpha=0.16, linewidth=0)
    if len(lengths) == 1:  # a band of one point has no width
        axes.vlines(lengths, low, high, color=colour, alpha=0.5)
    marker = {"marker": MARKERS[index % len(MARKERS)], "markersize": 6, "markeredgecolor": "white"}
    rates = [one["rate"] for one in scored]
    axes.plot(lengths, rates, color=colour, linewidth=2.2, label=PROBED[history], clip_on=False, zorder=3, **marker)
