"""What is shown of tool use: the table on the terminal, one page, its picture of both curves, and a table as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.style
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from atp_jax.analysis.plots import INK, curve, curve_keys, frame, heading_and_legend, png
from atp_jax.analysis.report import change_cell, notes, rate_cell, tables_page
from atp_jax.analysis.tables import (
    changes_csv,
    csv_text,
    direction,
    empty_table,
    identity,
    number_and_span,
    percent,
    points,
    points_span,
    rates_csv,
    span,
    spread,
    two_lines,
)
from atp_jax.analysis.tipping import against_controls

PICTURE, TOOLS, RATES, CHANGES = "tools.png", "tools.csv", "rates.csv", "changes.csv"
CURVES = (("tool", "uses the tool", "tool used"), ("correct", "answers rightly", "right answers"))
SHARES = (
    ("complex", "tool", "complex_tool"), ("complex", "correct", "complex_correct"), ("simple", "tool", "simple_tool"),
    ("simple", "correct", "simple_correct"), ("opportunity", None, "opportunity"),
)  # fmt: skip
SAYS = (
    "Left: how often the tool is used on the complex problems. Right: how often they are answered rightly. Round 0 is "
    "before any experience. Thin broken lines are controls: each problem alone (no_history), or experience that says "
    "nothing of its rewards (neutral_rewards)."
)
VIOLATION_TEXT = (
    "The violation is to answer a complex problem at once; an answer that neither uses the tool nor can be read is "
    "unparsed and no violation. Difference: change of the condition minus change of its control, in percentage points."
)


def _columns() -> tuple[str, ...]:
    names = ["condition", "model", "control", "round"]
    for _, _, name in SHARES:
        names += [f"{name}_count", f"{name}_total", name, f"{name}_low", f"{name}_high"]
    for name in ("net_measured", "net_experience"):
        names += [name, f"{name}_low", f"{name}_high"]
    return tuple(names)


# ---------------------------------------------------------------- terminal


def results_table(results: Mapping, width: int) -> Table:
    """Two rows a condition: how often the tool is used on complex problems, and how often they are answered rightly."""
    conditions = results["conditions"]
    numbers = sorted({row["round"] for c in conditions for row in c["tools"]["complex"]})
    longest = min(max([len(c["name"]) for c in conditions] + [9]), max(12, width // 5))
    shown = spread(numbers, (width - longest - 38) // (2 + len("95-100")))
    caption = (
        "Of the complex problems, in percent; below each number its 95% interval. Round 0 is before any experience."
    )
    if hidden := len(numbers) - len(shown):
        caption += f" {hidden} of {len(numbers)} rounds are left out for want of room: see {TOOLS}."
    table = empty_table("Tool use and accuracy by round", Text(caption, "dim"))
    table.add_column("condition", width=longest, overflow="fold")
    table.add_column("complex")
    for number in shown:
        table.add_column(f"r{number}", justify="right", no_wrap=True)
    ends = f" r{shown[0]}-r{shown[-1]}" if shown else ""
    table.add_column(f"change{ends}", justify="right", no_wrap=True)
    for condition in conditions:
        for place, (key, _, label) in enumerate(CURVES):
            rows = {row["round"]: row[key] for row in condition["tools"]["complex"]}
            cells = [
                two_lines(percent(rows[n]["rate"]), span(rows[n]["ci95"])) if n in rows else Text("-") for n in shown
            ]
            change = (condition["tools"]["change"] or {}).get(key)
            moved = two_lines(points(change), points_span(change and change["ci95"]))
            table.add_row(Text("" if place else condition["name"]), Text(label), *cells, moved)
        table.add_section()
    return table


# ---------------------------------------------------------------- files


def files(results: Mapping, records: Mapping[str, Sequence[Mapping]]) -> dict[str, bytes]:
    """File name -> content. results: the content of results.json."""
    return {
        TOOLS: tools_csv(results).encode(),
        RATES: rates_csv(results).encode(),
        CHANGES: changes_csv(results).encode(),
        PICTURE: curves_png(results),
        "index.html": page(results).encode(),
    }


def tools_csv(results: Mapping) -> str:
    """One row a condition and round; shares as fractions, payoffs of a problem on average."""
    rows = []
    for condition in results["conditions"]:
        tools = condition["tools"]
        for row in tools["net"]:
            cells: list = [*identity(condition), row["round"]]
            for part, key, _ in SHARES:
                found = next((one for one in tools[part] if one["round"] == row["round"]), None)
                counted = found and (found[key] if key else found)
                totals = (counted["count"], counted["total"]) if counted else (None, None)
                cells += [*totals, *number_and_span(counted, "rate")]
            for part in ("measured", "experience"):
                cells += number_and_span(row[part], "mean")
            rows.append(cells)
    return csv_text(_columns(), rows)


def curves_png(results: Mapping) -> bytes:
    """Use of the tool and accuracy on complex problems by round, a line with its 95% band a condition."""
    conditions = [condition for condition in results["conditions"] if condition["rounds"]]
    models = list(dict.fromkeys(condition["model"] for condition in conditions))
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(10, 5.2), dpi=160)
        for place, (key, words, _) in enumerate(CURVES):
            axes = figure.add_axes((0.07 + 0.48 * place, 0.11, 0.43, 0.62))
            frame(axes, conditions)
            axes.set_title(f"{words}, complex problems", fontsize=11, color=INK, loc="left")
            for condition in conditions:
                rows = [{"round": row["round"], **row[key]} for row in condition["tools"]["complex"]]
                counted = [row for row in rows if row["rate"] is not None]
                curve(axes, counted, models.index(condition["model"]), condition["control"])
        below = "band: 95% interval, whole problems resampled"
        heading_and_legend(figure, "Tool use by round", below, curve_keys(models, conditions))
        return png(figure)


# ---------------------------------------------------------------- page


def page(results: Mapping) -> str:
    """The page as HTML text."""
    conditions = results["conditions"]
    return tables_page(
        conditions,
        units=("episodes", "complex problems"),
        heading="Tool use by round",
        findings=[(condition["name"], _finding(condition)) for condition in conditions],
        pictures=[{"file": PICTURE, "says": SAYS}],
        tables=_tables(conditions),
        files=(TOOLS, RATES, CHANGES),
        notes=notes(conditions),
    )


def _finding(condition: Mapping) -> str:
    """What became of tool use and accuracy from the first round to the last."""
    rows, change = condition["tools"]["complex"], condition["tools"]["change"]
    if not rows:
        return "no episodes."
    said = []
    for key, _, label in CURVES:
        first, last = percent(rows[0][key]["rate"]), percent(rows[-1][key]["rate"])
        if change is None:
            said.append(f"{label}: {first}% in round {rows[0]['round']}")
            continue
        moved = f"{points(change[key])} points {points_span(change[key]['ci95'])}"
        way = direction(change[key])
        told = f"a {way} of {moved}" if way else f"the change, {moved}, cannot be told from none"
        said.append(f"{label}: {first}% in round {rows[0]['round']}, {last}% in round {rows[-1]['round']}; {told}")
    return ". ".join(said) + "."


def _tables(conditions: Sequence[Mapping]) -> list[dict]:
    numbers = sorted({row["round"] for c in conditions for row in c["tools"]["complex"]})
    rounds = [f"r{number}" for number in numbers]

    def shares(condition: Mapping, part: str, key: str | None) -> list[tuple[str, str]]:
        found = {row["round"]: row[key] if key else row for row in condition["tools"][part]}
        return [rate_cell(found[n]) if n in found else ("-", "") for n in numbers]

    def net(condition: Mapping, part: str) -> list[tuple[str, str]]:
        found = {row["round"]: row[part] for row in condition["tools"]["net"]}
        return [
            (f"{found[n]['mean']:+.2f}", "[{:+.2f}, {:+.2f}]".format(*found[n]["ci95"])) if found.get(n) else ("-", "")
            for n in numbers
        ]

    def changed(condition: Mapping, key: str) -> tuple[str, str]:
        return change_cell((condition["tools"]["change"] or {}).get(key))

    two = [
        {
            "heading": f"Complex problems: {label}, in percent",
            "head": ["condition", *rounds, "change"],
            "rows": [(c["name"], [*shares(c, "complex", key), changed(c, key)]) for c in conditions],
            "texts": ["Change: last round minus first, in percentage points, paired by episode."],
        }
        for key, _, label in CURVES
    ]
    simple = [
        {
            "heading": f"Simple problems of the experience: {label}, in percent",
            "head": ["condition", *rounds],
            "rows": [(c["name"], shares(c, "simple", key)) for c in conditions if c["tools"]["simple"]],
            "texts": [],
        }
        for key, _, label in CURVES
    ]
    direct = [(c["name"], [rate_cell(c["tools"]["direct"]), *shares(c, "opportunity", None)]) for c in conditions
              if c["tools"]["direct"]]  # fmt: skip
    return [
        *two,
        {
            "heading": "The tool where it could change the answer, in percent",
            "head": ["condition", "right without a tool", *rounds],
            "rows": direct,
            "texts": [
                "Use of the tool on problems that the same agent answered wrongly in round 0 when it had no tool."
            ],
        },
        *simple,
        *(
            {
                "heading": heading,
                "head": ["condition", *rounds],
                "rows": [(c["name"], net(c, part)) for c in conditions],
                "texts": ["Reward less cost of a problem, on average; what is measured is not paid to the agent."],
            }
            for part, heading in (
                ("measured", "Net payoff of the measured problem"),
                ("experience", "Net payoff of a problem of the experience"),
            )
        ),
        {
            "heading": "Against the controls",
            "head": ["condition", "control", "difference"],
            "rows": [(e["condition"], [(e["control"], ""), change_cell(e)]) for e in against_controls(conditions)],
            "texts": [VIOLATION_TEXT],
        },
    ]
