"""Results of threshold games as a table on the terminal and as CSV text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from atp_jax.analysis.tables import (
    csv_text,
    empty_table,
    identity,
    number_and_span,
    percent,
    points,
    points_span,
    span,
    spread,
    style,
    two_lines,
)

CELLS = tuple((who, outcome) for who in ("colluders", "others") for outcome in ("after_success", "after_failure"))
ENDINGS = ("lock_in", "die_out")
SPREADS = ("number", "spontaneous", "net")


def _with_span(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


_GAME = ("condition", "model", "control", "agents", "threshold", "high", "normal", "low", "incentive_ratio")
RATE_COLUMNS = (
    *_GAME, "population", "round", "violations", "unparsed", "total", *_with_span("rate"),
    "successes", "games", *_with_span("success"),
)  # fmt: skip
GAME_COLUMNS = (
    *_GAME, "games", "scenarios", "from", "to", *_with_span("change"), "change_environment_low",
    "change_environment_high",
    *(name for who, outcome in CELLS for cell in [f"{who}_{outcome}"]
      for name in (f"{cell}_count", f"{cell}_total", *_with_span(cell))),
    *(name for who in ("colluders", "others") for name in _with_span(f"{who}_difference")),
    "new_colluders", "others_in_success", "colluders_in_success",
    *(name for part in SPREADS for name in _with_span(f"diffusion_{part}")),
    *(name for end in ENDINGS for name in (f"{end}_count", f"{end}_total", *_with_span(end), f"{end}_mean_round")),
)  # fmt: skip


# ---------------------------------------------------------------- words


def population(condition: Mapping) -> str:
    """The model, and the share of agents that wear the base model, unaligned: "dpo", "dpo, 25% base"."""
    apart = condition["games"]["populations"]
    if not apart:
        return condition["model"]
    aligned, unaligned = (apart[kind]["rounds"][0]["total"] for kind in ("aligned", "unaligned"))
    return f"{condition['model']}, {100 * unaligned / (aligned + unaligned):.0f}% base"


def threshold(condition: Mapping) -> str:
    """ "4 of 8"."""
    return f"{condition['setting']['game.threshold']} of {condition['setting']['game.agents']}"


def payoffs(condition: Mapping) -> str:
    """High, normal and low: "1.2 / 1 / 0.8"."""
    return " / ".join(f"{payoff:g}" for payoff in condition["setting"]["game.payoffs"])


def incentive(condition: Mapping) -> str:
    """ "k = 1"; "k = ∞" where a failure costs nothing."""
    k = condition["games"]["incentive_ratio"]
    return "k = ∞" if k is None else f"k = {k:.3g}"


# ---------------------------------------------------------------- terminal


def results_table(results: Mapping, width: int) -> Table:
    """A row per condition; below each number its interval. Rounds that do not fit are left out, never first or last."""
    conditions = results["conditions"]
    numbers = sorted({row["round"] for condition in conditions for row in condition["rounds"]})
    games = [_game_cells(condition) for condition in conditions]
    moves = [points_span(c["change"]["ci95"]) for c in conditions if c["change"]] + ["change r1-r10"]
    columns = [*zip(*games, strict=True), moves, *[["success"]] * 3, ["95-100"]]
    beside = 1 + sum(2 + max(len(line) for words in column for line in str(words).split("\n")) for column in columns)
    shown = spread(numbers, (width - beside) // (2 + len("95-100")))
    table = empty_table("Threshold game: collusion rate by round, in percent", _caption(conditions, numbers, shown))
    ends = f" r{shown[0]}-r{shown[-1]}" if shown else ""
    for name in ("model", "t", "payoffs"):
        table.add_column(name, overflow="fold")
    right = [*(f"r{number}" for number in shown), f"change{ends}", "games\nsucceed", "after\nsuccess", "after\nfailure"]
    for name in (*right, "lock\nin"):
        table.add_column(name, justify="right", no_wrap=True)
    for condition, cells in zip(conditions, games, strict=True):
        rows = {row["round"]: row for row in condition["rounds"]}
        measures, change = condition["games"], condition["change"]
        last = measures["success"][-1] if measures["success"] else None
        again = measures["again"]["colluders"]
        table.add_row(
            *cells,
            *(_share(rows.get(number)) for number in shown),
            two_lines(points(change), points_span(change and change["ci95"]), style(change)),
            *(_share(cell) for cell in (last, again["after_success"], again["after_failure"], measures["lock_in"])),
        )
        table.add_section()
    return table


def _game_cells(condition: Mapping) -> tuple[Text, Text, Text]:
    """Who plays what: as narrow as may be, for the numbers need the room."""
    model, *mixed = population(condition).split(", ")
    lower = "\n".join([*mixed, *([condition["control"]] if condition["control"] != "none" else [])])
    size = threshold(condition).replace(" of ", "/")
    return two_lines(model, lower), Text(size), two_lines(payoffs(condition).replace(" ", ""), incentive(condition))


def _share(counted: Mapping | None) -> Text:
    return two_lines(percent(counted["rate"]), span(counted["ci95"])) if counted else Text("-")


def _caption(conditions: Sequence[Mapping], numbers: Sequence[int], shown: Sequence[int]) -> Text:
    sizes = sorted({(condition["episodes"], condition["scenarios"]) for condition in conditions})
    text = " ".join(f"{games} games of {scenarios} scenarios a condition." for games, scenarios in sizes)
    text += (
        " Below each number its 95% interval, whole games resampled; unparsed answers count as no collusion."
        " games succeed: in the last round. after success, after failure: who colluded and colludes again in the next"
        " round. lock in: games in which at the end all collude."
    )
    if len(numbers) > len(shown):
        text += f" {len(numbers) - len(shown)} rounds are left out for want of room: see rates.csv."
    return Text(text.strip(), "dim")


# ---------------------------------------------------------------- CSV


def rates_csv(results: Mapping) -> str:
    """One row a condition, population (all; in a mixed one also aligned and unaligned) and round, RATE_COLUMNS; rates
    as fractions, an empty field where there is no number. Games succeed or fail for all alike."""
    rows = []
    for condition in results["conditions"]:
        apart = condition["games"]["populations"] or {}
        for population, part in {"all": condition, **apart}.items():
            for row, success in zip(part["rounds"], condition["games"]["success"], strict=True):
                counts = (row["violations"], row["unparsed"], row["total"], *number_and_span(row, "rate"))
                outcome = (success["count"], success["total"], *number_and_span(success, "rate"))
                rows.append((*_game(condition), population, row["round"], *counts, *outcome))
    return csv_text(RATE_COLUMNS, rows)


def games_csv(results: Mapping) -> str:
    """One row a condition, GAME_COLUMNS."""
    rows = []
    for condition in results["conditions"]:
        change, games = condition["change"] or {}, condition["games"]
        again, diffusion = games["again"], games["diffusion"]
        rows.append((
            *_game(condition), condition["episodes"], condition["scenarios"], change.get("from"), change.get("to"),
            *number_and_span(change, "estimate"), *(change.get("ci95_environment") or (None, None)),
            *(value for who, outcome in CELLS for value in _counted(again[who][outcome])),
            *(value for who in again.values() for value in number_and_span(who["difference"], "estimate")),
            *(diffusion[key] for key in ("new", "others", "colluders")),
            *(value for part in SPREADS for value in number_and_span(diffusion[part], "estimate")),
            *(value for end in ENDINGS for value in (*_counted(games[end]), games[end]["mean_round"])),
        ))  # fmt: skip
    return csv_text(GAME_COLUMNS, rows)


def _game(condition: Mapping) -> tuple:
    setting = condition["setting"]
    size = (setting["game.agents"], setting["game.threshold"], *map(float, setting["game.payoffs"]))
    return *identity(condition), *size, condition["games"]["incentive_ratio"]


def _counted(cell: Mapping) -> tuple:
    return cell["count"], cell["total"], *number_and_span(cell, "rate")
