"""The result as a table on the terminal and as CSV text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from rich import box
from rich.table import Table
from rich.text import Text

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
# The scripted histories of the probe, in words.
PROBED = {
    "none": "no history", "paid": "broke the rule, paid", "caught": "broke the rule, caught", "kept": "kept the rule"
}  # fmt: skip


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


def results_table(results: Mapping, width: int) -> Table:
    """A row per condition, its rate over its interval in a column per round. Rounds that do not fit are left out."""
    conditions = results["conditions"]
    numbers = sorted({row["round"] for condition in conditions for row in condition["rounds"]})
    longest = max([len(condition["name"]) for condition in conditions] + [len("condition")])
    name_width = min(longest, max(12, width // 5))
    rates = [words for c in conditions for row in c["rounds"] for words in (percent(row["rate"]), span(row["ci95"]))]
    moves = [points_span(c["change"]["ci95"]) for c in conditions if c["change"]] + ["change r1-r10"]
    beside = 1 + sum(2 + used for used in (name_width, len("unparsed"), max(map(len, moves))))
    shown = spread(numbers, (width - beside) // (2 + max(map(len, rates), default=1)))
    heading = f"{title(results['testbed'])}: violation rate by round, in percent"
    table = empty_table(heading, _caption(conditions, len(numbers) - len(shown)))
    table.add_column("condition", width=name_width, overflow="fold")
    for number in shown:
        table.add_column(f"r{number}", justify="right", no_wrap=True)
    table.add_column("unparsed", justify="right", no_wrap=True)
    table.add_column(f"change r{shown[0]}-r{shown[-1]}" if shown else "change", justify="right", no_wrap=True)
    for condition in conditions:
        rows = {row["round"]: row for row in condition["rounds"]}
        cells = [two_lines(percent(rows[n]["rate"]), span(rows[n]["ci95"])) if n in rows else Text("-") for n in shown]
        change = condition["change"]
        moved = two_lines(points(change), points_span(change and change["ci95"]), style(change))
        table.add_row(Text(condition["name"]), *cells, Text(percent(overall_unparsed(condition))), moved)
        table.add_section()
    return table


def probe_lines(cells: Sequence[Mapping]) -> list[tuple[str, str, dict[int, Mapping]]]:
    """(model, kind of history, cell by length) of the probe's cells: without any round all histories are the same, so
    each begins with that cell. Where nothing else was probed, its own kind is "none"."""
    lines = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        own = [cell for cell in cells if cell["model"] == model]
        for history in dict.fromkeys(cell["history"] for cell in own if cell["rounds"]) or ("none",):
            line = {cell["rounds"]: cell for cell in own if cell["history"] in ("none", history)}
            lines.append((model, history, dict(sorted(line.items()))))
    return lines


def probe_table(cells: Sequence[Mapping]) -> Table:
    """A row a model and kind of history, the scored rate after so many scripted rounds in a column each."""
    lines = probe_lines(cells)
    lengths = sorted({cell["rounds"] for cell in cells})
    words = "The scored probability of violating in the next round, with its 95% interval."
    table = empty_table("Probe: violations after so many scripted rounds, in percent", Text(words, "dim"))
    table.add_column("model")
    table.add_column("history")
    for length in lengths:
        table.add_column(str(length), justify="right", no_wrap=True)
    for model, history, line in lines:
        scored = [line[length]["scored"] for length in lengths]
        numbers = [Text(percent(one["rate"])).append(f" {span(one['ci95'])}", "dim") for one in scored]
        table.add_row(Text(model), Text(PROBED[history]), *numbers)
    return table


def empty_table(heading: str, caption: Text) -> Table:
    """A table without columns, two blanks between those to come."""
    look = {"box": box.HORIZONTALS, "padding": (0, 1, 0, 0)}  # the box adds the second blank
    return Table(title=Text(heading, "bold"), caption=caption, caption_justify="left", **look)


def spread(numbers: Sequence, most: int) -> list:
    """At most so many of the numbers or names (two at least), evenly spread, first and last among them."""
    most = max(most, 2)
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / (most - 1))] for i in range(most)]


def two_lines(upper: str, lower: str, look: str = "") -> Text:
    """A number over its interval, or whatever stands below it, in faint."""
    text = Text(upper, look)
    return text.append(f"\n{lower}", "not bold dim") if lower else text


def style(change: Mapping | None) -> str:
    """A rise is red and a fall green."""
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
            moved = number_and_span(row["change"], "estimate")
            hazard = (risk["violations"], risk["total"], *number_and_span(risk, "rate"))
            counts = (row["violations"], row["unparsed"], row["total"], *number_and_span(row, "rate"))
            rows.append((*identity(condition), row["round"], *counts, row["unparsed_rate"], *moved, *hazard))
    return csv_text(RATE_COLUMNS, rows)


def changes_csv(results: Mapping) -> str:
    """One row a condition, CHANGE_COLUMNS."""
    rows = []
    for condition in results["conditions"]:
        change, split = condition["change"] or {}, condition["payoff"] or {}
        environment = change.get("ci95_environment") or (None, None)
        sides = [split.get(side, {}).get("change") for side in ("below", "above")] + [split.get("difference")]
        rows.append((
            *identity(condition), condition["episodes"], condition["scenarios"], change.get("from"), change.get("to"),
            *number_and_span(change, "estimate"), *environment, condition["onset"],
            *number_and_span(condition["stickiness"], "rate"), split.get("cut"),
            *(number for side in sides for number in number_and_span(side, "estimate")),
        ))  # fmt: skip
    return csv_text(CHANGE_COLUMNS, rows)


def identity(condition: Mapping) -> tuple[str, str, str]:
    return condition["name"], condition["model"], condition["control"]


def number_and_span(holder: Mapping | None, key: str) -> tuple:
    """holder[key] and the two ends of its interval, or three times None."""
    if not holder or holder[key] is None:
        return None, None, None
    return holder[key], *holder["ci95"]


def csv_text(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Floats with six decimals, None as an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if x is None else f"{x:.6f}" if isinstance(x, float) else x for x in row])
    return out.getvalue()
