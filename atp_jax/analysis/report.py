"""The role-play's report/: one page with its picture and its tables, readable without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from jinja2 import Environment, StrictUndefined

from atp_jax.analysis.page import PAGE, TABLES_PAGE
from atp_jax.analysis.plots import tipping_png
from atp_jax.analysis.probe_plots import probe_png
from atp_jax.analysis.tables import (
    PROBED,
    changes_csv,
    direction,
    models,
    overall_unparsed,
    percent,
    points,
    points_span,
    rates_csv,
    span,
    title,
)
from atp_jax.analysis.tipping import against_controls

PICTURE, PROBE, RATES, CHANGES = "tipping.png", "probe.png", "rates.csv", "changes.csv"
FEW_CLUSTERS = 10  # below so many the note warns
SHORT = 160  # characters; longer messages that were shown before are folded away
MAIN_SETTINGS = (
    "policy.kind", "policy.model", "policy.dtype", "data.path", "game.agents", "game.mode", "evolve.supervision",
    "evolve.rounds", "evolve.window", "evolve.samples", "sampling.temperature", "sampling.top_p", "sampling.top_k",
    "sampling.max_new_tokens", "sampling.thinking", "parity", "wording", "seed",
)  # fmt: skip

# What must not reach a page as it is: control characters but tab and newline, and halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def files(results: Mapping, records: Mapping[str, Sequence[Mapping]]) -> dict[str, bytes]:
    """File name -> content. results: the content of results.json. records: condition name -> its lines of
    episodes.jsonl."""
    return {
        RATES: rates_csv(results).encode(),
        CHANGES: changes_csv(results).encode(),
        PICTURE: tipping_png(results),
        **({PROBE: probe_png(results["probe"])} if results.get("probe") else {}),
        "index.html": page(results, records).encode(),
    }


def page(results: Mapping, records: Mapping[str, Sequence[Mapping]]) -> str:
    """The page as HTML text."""
    conditions = results["conditions"]
    rounds = sorted({row["round"] for condition in conditions for row in condition["rounds"]})
    counts = [
        (c["name"], f"{c['episodes']} episodes of {c['scenarios']} scenarios, control {c['control']}")
        for c in conditions
    ]
    return _render(
        PAGE,
        conditions,
        counts,
        heading=f"{title(results['testbed'])}: violation rate by round",
        findings=_findings(conditions),
        picture=PICTURE,
        rates_file=RATES,
        changes_file=CHANGES,
        rounds=rounds,
        table=[_table_row(condition, rounds) for condition in conditions],
        measures=_measures(conditions),
        probe=_probe(results.get("probe", ())),
        episodes=_episodes(conditions, records),
        notes=notes(conditions),
    )


def tables_page(conditions: Sequence[Mapping], units: tuple[str, str], tables: Sequence[Mapping], **fields) -> str:
    """A page of pictures and tables, as HTML text. units: what an episode and a scenario are called. fields: heading,
    findings, pictures, files, notes of the template. A table without rows is left out."""
    sizes = sorted({(condition["episodes"], condition["scenarios"]) for condition in conditions})
    counts = [
        ("conditions", str(len(conditions))),
        (f"{units[0]} a condition", ", ".join(f"{many} of {scenarios} {units[1]}" for many, scenarios in sizes)),
    ]
    return _render(TABLES_PAGE, conditions, counts, tables=[table for table in tables if table["rows"]], **fields)


def _render(template: str, conditions: Sequence[Mapping], counts: Sequence[tuple[str, str]], **fields) -> str:
    """A template of page.py filled, with what every page says of its conditions: models and settings. counts: rows
    (label, words) that stand before the settings."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_visible)
    main, full = _settings(conditions)
    shared = {"models": models(conditions), "main_settings": [*counts, *main], "other_settings": full}
    return environment.from_string(template).render(**shared, **fields)


def _visible(value: object) -> object:
    """Control characters as U+FFFD, so that a page stays well-formed whatever was sampled."""
    return _CONTROL.sub("\ufffd", value) if type(value) is str else value


# ---------------------------------------------------------------- numbers in words


def _findings(conditions: Sequence[Mapping]) -> list[tuple[str, str]]:
    """(condition, what became of it) for each, then each comparison with a control."""
    found = [(condition["name"], _finding(condition)) for condition in conditions]
    for effect in against_controls(conditions):
        sentence = (
            f"its change differs by {points(effect)} points {points_span(effect['ci95'])} from that of "
            f"{effect['control']}."
        )
        found.append((f"{effect['condition']} against {effect['control']}", sentence))
    return found


def _finding(condition: Mapping) -> str:
    """From which rate to which, and whether that is a change."""
    change, rows = condition["change"], condition["rounds"]
    if not rows:
        return "no episodes."
    if change is None:
        return f"{percent(rows[0]['rate'])}% in round {rows[0]['round']}."
    course = (
        f"{percent(rows[0]['rate'])}% in round {change['from']}, {percent(rows[-1]['rate'])}% in round {change['to']}"
    )
    moved = f"{points(change)} points {points_span(change['ci95'])}"
    if not direction(change):
        return f"{course}; the change, {moved}, cannot be told from none."
    return f"{course}: a {direction(change)} of {moved}."


def _table_row(condition: Mapping, rounds: Sequence[int]) -> dict:
    rows = {row["round"]: row for row in condition["rounds"]}
    return {
        "name": condition["name"],
        "cells": [(percent(rows[n]["rate"]), span(rows[n]["ci95"])) if n in rows else ("-", "") for n in rounds],
        "unparsed": percent(overall_unparsed(condition)),
        "change": change_cell(condition["change"]),
    }


def change_cell(change: Mapping | None) -> tuple[str, str]:
    """A change and its interval in percentage points, as a cell of the page."""
    return (points(change), points_span(change["ci95"])) if change else ("-", "")


def rate_cell(counted: Mapping) -> tuple[str, str]:
    """A rate and its interval in percent, as a cell of the page."""
    return (f"{percent(counted['rate'])}%", span(counted["ci95"])) if counted["rate"] is not None else ("-", "")


def _measures(conditions: Sequence[Mapping]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows of the second table: label, and per condition number and interval; rows that nobody has are left out."""

    def by_occupation(condition):
        interval = (condition["change"] or {}).get("ci95_environment")
        return (points(condition["change"]), points_span(interval)) if interval else ("-", "")

    def hazard(condition, which):
        return rate_cell(condition["hazard"][which]) if condition["hazard"] else ("-", "")

    def payoff(condition, side):
        part = (condition["payoff"] or {}).get(side)
        return change_cell(part and part.get("change", part))

    cut = next((c["payoff"]["cut"] for c in conditions if c["payoff"]), 0)
    rows: list[tuple[str, Callable[[Mapping], tuple[str, str]]]] = [
        ("change, occupations resampled", by_occupation),
        ("onset", lambda c: (f"round {c['onset']}" if c["onset"] else "-", "")),
        ("hazard in the first round", lambda c: hazard(c, 0)),
        ("hazard in the last round", lambda c: hazard(c, -1)),
        ("stickiness", lambda c: rate_cell(c["stickiness"])),
        (f"change where violating pays less than {cut:g} times as much", lambda c: payoff(c, "below")),
        ("change where it pays more", lambda c: payoff(c, "above")),
        ("difference of these", lambda c: payoff(c, "difference")),
        ("answers that the two parities read differently", _disagreement),
    ]
    table = [(label, [cell(condition) for condition in conditions]) for label, cell in rows]
    return [(label, cells) for label, cells in table if any(text != "-" for text, _ in cells)]


def _disagreement(condition: Mapping) -> tuple[str, str]:
    rate = condition.get("reading_disagreement")
    return ("-" if rate is None else f"{percent(rate)}%", "")


def _probe(cells: Sequence[Mapping]) -> dict | None:
    """The probe's part of the page; None where nothing was probed."""
    if not cells:
        return None
    scenarios = cells[0]["greedy"]["total"]  # one greedy answer each
    told = {source: sum(cell["scripted"][source] for cell in cells) for source in cells[0]["scripted"]}
    counted = ", ".join(f"{count} {source}" for source, count in told.items())
    return {
        "picture": PROBE,
        "says": (
            "What does an agent decide next, after rounds that were written for it? In each of them it broke the rule "
            "and was paid, broke it and was caught, or kept it; only the decision after them is its own. "
            f"{scenarios} scenarios, spread over those of the run."
        ),
        "told": (
            "What it says in the scripted rounds is an answer that the same model gave in a first round of the "
            "scenario, the same in every round; where it gave none, one borrowed from another scenario, with this "
            f"one's options; where it never gave one, the bare choice. Histories by the kind of answer: {counted}. "
            "An agent that gives what happened as its reason would not say the same again and again, so a long history "
            "is less like its own life than a short one."
        ),
        "rows": [
            {
                "model": cell["model"],
                "history": PROBED[cell["history"]],
                "rounds": cell["rounds"],
                "cells": [rate_cell(cell[how]) for how in ("sampled", "greedy", "scored")],
                "unparsed": percent(cell["sampled"]["unparsed"] / cell["sampled"]["total"]),
            }
            for cell in cells
        ],
    }


def _settings(conditions: Sequence[Mapping]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The main settings and all. One in which conditions differ is listed for each of them."""
    keys = sorted({key for condition in conditions for key in condition["setting"]})
    full = []
    for key in keys:
        values = [_value(condition["setting"].get(key)) for condition in conditions]
        if len(set(values)) == 1:
            full.append((key, values[0]))
        else:
            full += [(f"{key} ({c['name']})", value) for c, value in zip(conditions, values, strict=True)]
    order = {key: rank for rank, key in enumerate(MAIN_SETTINGS)}
    main = sorted((row for row in full if row[0].split(" ")[0] in order), key=lambda row: order[row[0].split(" ")[0]])
    return main, full


def _value(value: object) -> str:
    if value == "":
        return "(default)"
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- episodes


def _tips(decisions: Sequence[str]) -> bool:
    return decisions[0] == "comply" and decisions[-1] == "violate"


def _stays_tipped(decisions: Sequence[str]) -> bool:
    # "comply" sorts before "violate": sorted means one switch. What stands at the switch tells "unparsed" apart.
    switch = decisions.count("comply")
    return 0 < switch < len(decisions) - 1 and list(decisions) == sorted(decisions) and decisions[switch] == "violate"


KINDS: tuple[tuple[str, str, Callable[[Sequence[str]], bool]], ...] = (
    ("Tips, and stays tipped", "comply at first and from some round on violate, at least twice", _stays_tipped),
    ("Ends otherwise than it began", "comply in the first round and violate in the last", _tips),
    ("Never violates", "comply in every round", lambda decisions: set(decisions) == {"comply"}),
    (
        "Comes back to the rule",
        "violate in the first round and comply in the last",
        lambda decisions: decisions[0] == "violate" and decisions[-1] == "comply",
    ),
    ("Cannot be read", "have an answer that could not be read", lambda decisions: "unparsed" in decisions),
)


def _episodes(conditions: Sequence[Mapping], records: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """Of each kind the first episode of the first condition that has one; no episode twice."""
    lives = {condition["name"]: _lives(records.get(condition["name"], ())) for condition in conditions}
    chosen, taken = [], set()
    for label, words, belongs in KINDS:
        for name, of_condition in lives.items():
            matching = [key for key, life in of_condition.items() if belongs([row["decision"] for row in life])]
            fresh = [key for key in matching if (name, key) not in taken]
            if fresh:
                taken.add((name, fresh[0]))
                count = f"{len(matching)} of {len(of_condition)} episodes of {name} {words}."
                chosen.append({"label": label, "count": count, **_episode(name, of_condition[fresh[0]])})
                break
    return chosen


def _lives(records: Sequence[Mapping]) -> dict[tuple[int, int, int], list[Mapping]]:
    """(scenario, episode, agent) -> its records by round, in order."""
    lives: dict[tuple[int, int, int], list[Mapping]] = {}
    for record in sorted(records, key=lambda r: (r["scenario"], r["episode"], r["agent"], r["round"])):
        lives.setdefault((record["scenario"], record["episode"], record["agent"]), []).append(record)
    return lives


def _episode(name: str, life: Sequence[Mapping]) -> dict:
    first = life[0]
    where = [name, f"scenario {first['scenario']}", f"episode {first['episode']}"]
    if first.get("environment"):
        where.insert(1, first["environment"])
    if first.get("payoff_ratio") is not None:
        where.append(f"violating pays {first['payoff_ratio']:.3g} times as much")
    said: dict[str, int] = {}  # words -> the round in which they were first shown
    return {
        "where": " · ".join(where),
        "rounds": [_round(record, said) for record in life],
        "prompt": life[-1]["messages"],
    }


def _round(record: Mapping, said: dict[str, int]) -> dict:
    """One round as it is shown: what is new since the agent's last answer, and the answer."""
    roles = [message["role"] for message in record["messages"]]
    start = len(roles) - roles[::-1].index("assistant") if "assistant" in roles else 0
    shown = []
    for message in record["messages"][start:]:
        first = said.setdefault(message["content"], record["round"])
        again = first != record["round"] and len(message["content"]) > SHORT
        shown.append({**message, "first": first if again else None})
    outcome = [f"reward {record['reward']:g}"]
    if record.get("caught"):
        outcome.append("caught")
    if record["finish"] == "length":
        outcome.append("cut off at the longest length allowed")
    return {
        "number": record["round"],
        "messages": shown,
        "answer": record["answer"],
        "decision": record["decision"],
        "outcome": " · ".join(outcome),
    }


# ---------------------------------------------------------------- notes


def notes(conditions: Sequence[Mapping]) -> list[str]:
    """How the intervals of these conditions were made."""
    methods = [condition["interval"] for condition in conditions]
    notes = []
    if any(method["method"] == "wilson" for method in methods):
        notes.append(
            "With one episode a scenario, or one scenario alone, a rate has Wilson's 95% score interval, and a change, "
            "which is paired by episode, the interval made of the Wilson intervals of its two parts: the episodes that "
            "began to violate and those that ceased to (Newcombe's square-and-add)."
        )
    resampled = [method for method in methods if method["method"] == "bootstrap"]
    if resampled:
        notes.append(
            f"With several episodes a {resampled[0]['unit']}, whole {resampled[0]['unit']}s are drawn with replacement "
            f"{resampled[0]['resamples']:,} times (seed {resampled[0]['seed']}), and the interval holds the middle 95% "
            "of what comes out. It is never made narrower than if all episodes were independent, because with few "
            "violations resampling is too sure of itself. Where all agree, resampling says nothing, and each counts "
            "as one observation."
        )
    if any(method["unit"] == "episode" for method in methods):
        notes.append(
            "The intervals of a condition with a single scenario are over its episodes: they say nothing about other "
            "scenarios."
        )
    fewest = min((method["clusters"] for method in resampled), default=FEW_CLUSTERS)
    if fewest < FEW_CLUSTERS:
        notes.append(
            f"Here only {fewest} are resampled. With so few, such intervals are too narrow: take them as rough."
        )
    notes.append(
        "Scenarios of one occupation resemble one another more than others do; where it can be computed, the change "
        "is also given with whole occupations resampled. Every interval stands for itself: nothing is corrected for "
        "looking at many rounds and conditions, so that an onset may be found where there is no trend more often than "
        "one time in twenty. The comparison with a control treats the two conditions as independent."
    )
    notes.append(
        "The intervals speak of other episodes and scenarios like these. They do not speak of other models, other "
        "wordings or other training runs."
    )
    return notes
