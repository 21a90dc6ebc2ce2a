"""Wording packs: every sentence that is put around a scenario, as data.

A pack is a JSON object with a part for each testbed. Its templates hold plain fields, `{name}` or
`{name:spec}` with a simple format spec such as `{reward:g}` or `{share:.2%}`; `{{` and `}}` are braces.
Nothing else is a field: no attributes, no indices, no conversions, so a pack can show what it is given
and nothing more.
"""

import re
import string
from collections.abc import Set
from pathlib import Path

from atp_jax.errors import UserError
from atp_jax.scenarios.pack import read_json

_SHIPPED = Path(__file__).with_name("wording.json")
_SPEC = re.compile(r"[+ ]?\d{0,2},?(?:\.\d{1,2})?[dfgeGE%s]?")

_PARTS = {"name", "role_play", "threshold_game", "tool_use"}
# What every template of the threshold game may show; factors pay in the one mode, deltas in the other.
_GAME = {"collective", "independent", "agents", "threshold", "high", "normal", "low"} | {
    "delta_high", "delta_normal", "delta_low", "additive_base",
}  # fmt: skip
_TOOL = {"cost_tool", "cost_plain", "reward_simple", "reward_complex", "wrong", "max_calls"}
_PAID = _TOOL | {"reward", "cost", "net"}
# Every template of a testbed and what it may show.
_TEMPLATES = {
    "role_play": {
        "question": {"question", "supervision_text"},
        "feedback.comply": {"reward", "choice"},
        "feedback.violate_unseen": {"reward", "choice"},
        "feedback.violate_caught": {"reward", "choice"},
        "feedback.unparsed": {"reward", "answer_head"},
        "steer.comply": set(),
        "steer.violate": set(),
    },
    "threshold_game": {
        "question": _GAME | {"question"},
        "system.multiplicative": _GAME | {"system", "success"},
        "system.additive": _GAME | {"system", "success"},
        "success.everyone": _GAME,
        "success.choosers": _GAME,
        "peers.prefix": _GAME,
        "peers.join": set(),
        "peers.final_only": {"agent", "choice"},
        "peers.unparsed": {"agent"},
        "peers.full": {"agent", "answer"},
        "outcome": _GAME | {"count", "share", "result", "reward"},
        "outcome_alone": _GAME | {"reward"},
        "unreadable": set(),
        **{
            f"result.{mode}.{result}": _GAME
            for mode in ("multiplicative", "additive")
            for result in ("success_everyone", "success_choosers", "failure")
        },
        "steer.comply": _GAME,
        "steer.violate": _GAME,
    },
    "tool_use": {
        "system": _TOOL,
        "system_direct": _TOOL,
        "fenced": _TOOL,
        "tool.description": set(),
        "tool.code": set(),
        "question": {"question"},
        "result.plain": {"result"},
        "result.fenced": {"result"},
        "result.nothing": {"result"},
        "paid.tool": _PAID,
        "paid.plain": _PAID,
        "feedback.right": _PAID | {"paid"},
        "feedback.wrong": _PAID | {"paid"},
        "feedback.unparsed": _PAID | {"paid"},
        "feedback.neutral": set(),
        "steer.comply": set(),
        "steer.violate": set(),
    },
}
# Without steering nobody is steered; without `success` the system message does not say whom one pays, without
# `unreadable` nobody is told that it was not understood; who asks for the control without peers finds out.
_MAY_BE_MISSING = {
    "steer.comply",
    "steer.violate",
    "success.everyone",
    "success.choosers",
    "outcome_alone",
    "unreadable",
}


def load_wording(path: str = "", testbed: str = "role_play") -> dict:
    """Reads a wording pack and checks its part for `testbed`; an empty path means the project's own.

    Raises UserError naming the file and the place in it when a template is missing, is not a text, is
    unknown, or holds a field that cannot be filled there. Parts for other testbeds are left alone.
    """
    source = Path(path) if path else _SHIPPED
    pack = read_json(source, "wording pack")
    if not isinstance(pack, dict) or not isinstance(pack.get(testbed), dict):
        raise UserError(f"wording pack {source}: {testbed!r} is missing or no object")
    if unknown := sorted(pack.keys() - _PARTS):
        raise UserError(f"wording pack {source}: {unknown[0]!r} is unknown; known are {', '.join(sorted(_PARTS))}")
    fields_of, templates = _TEMPLATES[testbed], _flatten(pack[testbed])
    for key in sorted(fields_of.keys() - templates.keys() - _MAY_BE_MISSING):
        raise UserError(f"wording pack {source}: '{testbed}.{key}' is missing")
    for key in templates.keys() - fields_of.keys():
        raise UserError(f"wording pack {source}: '{testbed}.{key}' is unknown; known are {', '.join(fields_of)}")
    for key, template in templates.items():
        where = f"wording pack {source}: '{testbed}.{key}'"
        if not isinstance(template, str):
            raise UserError(f"{where} is not a text")
        check_fields(template, fields_of[key], where)
    return pack


def check_fields(template: str, known: Set[str], where: str) -> None:
    """UserError beginning with `where` unless the template's fields are plain and all of them `known`."""
    try:
        fields = {name for _, name, _ in _parse(template) if name is not None}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if unknown := sorted(fields - known):
        raise UserError(f"{where}: field {{{unknown[0]}}} is unknown; known are {', '.join(sorted(known))}")


def fill(template: str, /, **fields) -> str:
    """The template with its fields filled.

    Raises UserError naming the template and the field when a field is missing, is more than a plain name
    with a simple format spec, or does not fit its spec.
    """
    parts = []
    for literal, name, spec in _parse(template):
        parts.append(literal)
        if name is None:
            continue
        if name not in fields:
            raise UserError(f"template {_short(template)}: no value for the field {{{name}}}")
        try:
            parts.append(format(fields[name], spec))
        except (TypeError, ValueError) as error:
            raise UserError(f"template {_short(template)}: field {{{name}:{spec}}}: {error}") from None
    return "".join(parts)


def steer(wording: dict, decision: str, testbed: str = "role_play", **fields) -> str:
    """What is said after the question to be answered with "comply" or "violate"; empty where a pack says nothing."""
    return fill(wording[testbed].get("steer", {}).get(decision, ""), **fields)


def harmless(text: str) -> str:
    """What a model said, on one line and without angle brackets, so that a user's message can quote it and no tag of
    a chat template comes along."""
    kept = "".join(c if c.isprintable() and c not in "<>" else " " for c in text)
    return " ".join(kept.split())


def _parse(template: str) -> list[tuple[str, str | None, str]]:
    """Literal text, then field name (None at the end) and format spec, in order."""
    parts = []
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {_short(template)}: {error}") from None
    for literal, name, spec, conversion in parsed:
        if name is not None:
            if not name.isidentifier():
                raise UserError(f"template {_short(template)}: field {{{name}}} is not a plain name")
            if conversion is not None:
                raise UserError(f"template {_short(template)}: field {{{name}!{conversion}}} has a conversion")
            if not _SPEC.fullmatch(spec):
                raise UserError(f"template {_short(template)}: field {{{name}:{spec}}} has no simple format")
        parts.append((literal, name, spec or ""))
    return parts


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _short(template: str) -> str:
    return repr(template if len(template) <= 60 else template[:57] + "...")
