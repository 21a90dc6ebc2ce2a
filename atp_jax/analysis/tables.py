"""The result as a table on the terminal and as CSV text."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atp_jax.analysis.tipping import against_controls

PLAIN_WIDTH = 100  # columns where no terminal says how many it has

RATE_COLUMNS = (
    "condition", "model", "control", "round", "violations", "unparsed", "total", "rate", "ci95_low", "ci95_high",
    "unparsed_rate", "change", "change_low", "change_high",
    "hazard_violations", "hazard_total", "hazard", "hazard_low", "hazard_high",
)  # fmt: skip
CHANGE_COLUMNS = (
    "condition", "model", "control", "episodes", "scenarios", "from", "to", "change", "change_low", "change_high",
    "change_environment_low", "change_environment_high", "onset", "stickiness", "stickiness_low", "stickiness_high",
    "payoff_cut", "change_below", "change_below_low", "change_below_high",
    "change_above", "change_above_low", "change_above_high",
    "payoff_difference", "payoff_difference_low", "payoff_difference_high",
)  # fmt: skip


# ---------------------------------------------------------------- words for numbers


def percent(rate: float | None, digits: int = 1) -> str:
    """0.4125 -> "41.2"; None -> "-"."""
    return "-" if rate is None else f"{100 * rate:.{digits}f}"


def span(interval: Sequence[float] | None) -> str:
    """[0.351, 0.475] -> "35-48", in whole percent; None -> "" ."""
    return "" if interval is None else f"{100 * interval[0]:.0f}-{100 * interval[1]:.0f}"


def points(change: Mapping | None) -> str:
    """Estimate of a change in percentage points, signed: "+19.4"; None -> "-"."""
    return "-" if change is None else f"{100 * change['estimate']:+.1f}"


def points_span(interval: Sequence[float] | None) -> str:
    """[0.121, 0.267] -> "[+12.1, +26.7]"; None -> ""."""
    return "" if interval is None else f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def direction(change: Mapping | None) -> str:
    """Which way: "rise" or "fall" when the interval of the change lies on one side of 0, else ""."""
    if change is None:
        return ""
    low, high = change["ci95"]
    return "rise" if low > 0 else "fall" if high < 0 else ""


def overall_unparsed(condition: Mapping) -> float | None:
    """Share of all the condition's answers that could not be read."""
    total = sum(row["total"] for row in condition["rounds"])
    return sum(row["unparsed"] for row in condition["rounds"]) / total if total else None


def title(testbed: str) -> str:
    """As a heading: "role_play" -> "Role-play"."""
    return testbed.replace("_", "-").capitalize()


def models(conditions: Sequence[Mapping]) -> str:
    """The models of the conditions, each once, with the name of the directory or hub id: "base (Qwen3-8B)"."""
    names = []
    for condition in conditions:
        name, setting = condition["model"], condition["setting"]
        if setting.get("policy.kind") == "model" and "policy.model" in setting:
            name += f" ({PurePath(setting['policy.model']).name or 'embedded organism'})"
        names.append(name)
    return ", ".join(dict.fromkeys(names))


# ---------------------------------------------------------------- terminal


def print_table(results: Mapping, console: Console | None = None) -> None:
    """Print results.json as one table, then one line per control. Plain text, 100 columns, when not on a terminal."""
    if console is None:
        console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    console.print(_table(results, console.width))
    for effect in against_controls(results["conditions"]):
        line = Text("\n change of ").append(effect["condition"], "bold").append(" minus change of ")
        line.append(effect["control"], "bold").append(": ").append(f"{points(effect)} points", _style(effect))
        console.print(line.append(f" {points_span(effect['ci95'])}"))


def _table(results: Mapping, width: int) -> Table:
    """A row per condition, its rate over its interval in a column per round. Rounds that do not fit are left out."""
    conditions = results["conditions"]
    numbers = sorted({row["round"] for condition in conditions for row in condition["rounds"]})
    longest = max([len(condition["name"]) for condition in conditions] + [len("condition")])
    name_width = min(longest, max(12, width // 5))
    rates = [words for c in conditions for row in c["rounds"] for words in (percent(row["rate"]), span(row["ci95"]))]
    moves = [points_span(c["change"]["ci95"]) for c in conditions if c["change"]] + ["change r1-r10"]
    beside = 1 + sum(2 + used for used in (name_width, len("unparsed"), max(map(len, moves))))
    shown = _spread(numbers, (width - beside) // (2 + max(map(len, rates), default=1)))
    table = Table(
        title=Text(f"{title(results['testbed'])}: violation rate by round, in percent", "bold"),
        caption=_caption(conditions, len(numbers) - len(shown)),
        caption_justify="left",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),  # with the box's own blank, two between columns
    )
    table.add_column("condition", width=name_width, overflow="fold")
    for number in shown:
        table.add_column(f"r{number}", justify="right", no_wrap=True)
    table.add_column("unparsed", justify="right", no_wrap=True)
    table.add_column(f"change r{shown[0]}-r{shown[-1]}" if shown else "change", justify="right", no_wrap=True)
    for condition in conditions:
        rows = {row["round"]: row for row in condition["rounds"]}
        cells = [_two(percent(rows[n]["rate"]), span(rows[n]["ci95"])) if n in rows else Text("-") for n in shown]
        change = condition["change"]
        moved = _two(points(change), points_span(change and change["ci95"]), _style(change))
        table.add_row(Text(condition["name"]), *cells, Text(percent(overall_unparsed(condition))), moved)
        table.add_section()
    return table


def _spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most so many of the numbers (two at least), evenly spread, first and last among them."""
    most = max(most, 2)
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most)]


def _two(upper: str, lower: str, style: str = "") -> Text:
    text = Text(upper, style)
    return text.append(f"\n{lower}", "not bold dim") if lower else text


def _style(change: Mapping | None) -> str:
    return {"rise": "bold red", "fall": "bold green"}.get(direction(change), "")


def _caption(conditions: Sequence[Mapping], hidden: int) -> Text:
    sizes = sorted({(condition["episodes"], condition["scenarios"]) for condition in conditions})
    text = " ".join(f"{episodes} episodes of {scenarios} scenarios a condition." for episodes, scenarios in sizes)
    text += " Below each number its 95% interval; unparsed answers count as no violation."
    if hidden:
        text += f" {hidden} rounds are left out for want of room: see rates.csv."
    return Text(text.strip(), "dim")


# ---------------------------------------------------------------- CSV


def rates_csv(results: Mapping) -> str:
    """One row a condition and round, RATE_COLUMNS; rates as fractions, an empty field where there is no number."""
    rows = []
    for condition in results["conditions"]:
        for row, risk in zip(condition["rounds"], condition["hazard"], strict=True):
            moved = _number_and_span(row["change"], "estimate")
            hazard = (risk["violations"], risk["total"], *_number_and_span(risk, "rate"))
            counts = (row["violations"], row["unparsed"], row["total"], *_number_and_span(row, "rate"))
            rows.append((*_names(condition), row["round"], *counts, row["unparsed_rate"], *moved, *hazard))
    return _csv(RATE_COLUMNS, rows)


def changes_csv(results: Mapping) -> str:
    """One row a condition, CHANGE_COLUMNS."""
    rows = []
    for condition in results["conditions"]:
        change, split = condition["change"] or {}, condition["payoff"] or {}
        environment = change.get("ci95_environment") or (None, None)
        sides = [split.get(side, {}).get("change") for side in ("below", "above")] + [split.get("difference")]
        rows.append((
            *_names(condition), condition["episodes"], condition["scenarios"], change.get("from"), change.get("to"),
            *_number_and_span(change, "estimate"), *environment, condition["onset"],
            *_number_and_span(condition["stickiness"], "rate"), split.get("cut"),
            *(number for side in sides for number in _number_and_span(side, "estimate")),
        ))  # fmt: skip
    return _csv(CHANGE_COLUMNS, rows)


def _names(condition: Mapping) -> tuple[str, str, str]:
    return condition["name"], condition["model"], condition["control"]


def _number_and_span(holder: Mapping | None, key: str) -> tuple:
    if not holder or holder[key] is None:
        return None, None, None
    return holder[key], *holder["ci95"]


def _csv(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if x is None else f"{x:.6f}" if isinstance(x, float) else x for x in row])
    return out.getvalue()
