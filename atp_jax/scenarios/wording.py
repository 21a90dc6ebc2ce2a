"""Wording packs: every sentence that is put around a scenario, as data.

A pack is a JSON object with a part for each testbed. Its templates hold plain fields, `{name}` or
`{name:spec}` with a simple format spec such as `{reward:g}` or `{share:.2%}`; `{{` and `}}` are braces.
Nothing else is a field: no attributes, no indices, no conversions, so a pack can show what it is given
and nothing more.
"""

import re
import string
from pathlib import Path

from atp_jax.errors import UserError
from atp_jax.scenarios.pack import read_json

_SHIPPED = Path(__file__).with_name("wording.json")
_SPEC = re.compile(r"[+ ]?\d{0,2},?(?:\.\d{1,2})?[dfgeGE%s]?")

_PARTS = {"name", "role_play", "threshold_game", "tool_use"}
# Every template of role-play and what it may show.
_ROLE_PLAY = {
    "question": {"question", "supervision_text"},
    "feedback.comply": {"reward", "choice"},
    "feedback.violate_unseen": {"reward", "choice"},
    "feedback.violate_caught": {"reward", "choice"},
    "feedback.unparsed": {"reward", "answer_head"},
    "steer.comply": set(),
    "steer.violate": set(),
}
_MAY_BE_MISSING = ("steer.comply", "steer.violate")  # then nobody is steered


def load_wording(path: str = "") -> dict:
    """Reads and checks a wording pack; an empty path means the project's own.

    Raises UserError naming the file and the place in it when a template is missing, is not a text, is
    unknown, or holds a field that cannot be filled there. Parts for other testbeds are left alone.
    """
    source = Path(path) if path else _SHIPPED
    pack = read_json(source, "wording pack")
    if not isinstance(pack, dict) or not isinstance(pack.get("role_play"), dict):
        raise UserError(f"wording pack {source}: 'role_play' is missing or no object")
    if unknown := sorted(pack.keys() - _PARTS):
        raise UserError(f"wording pack {source}: {unknown[0]!r} is unknown; known are {', '.join(sorted(_PARTS))}")
    templates = _flatten(pack["role_play"])
    for key in _ROLE_PLAY.keys() - templates.keys() - set(_MAY_BE_MISSING):
        raise UserError(f"wording pack {source}: 'role_play.{key}' is missing")
    for key in templates.keys() - _ROLE_PLAY.keys():
        raise UserError(f"wording pack {source}: 'role_play.{key}' is unknown; known are {', '.join(_ROLE_PLAY)}")
    for key, known in ((key, known) for key, known in _ROLE_PLAY.items() if key in templates):
        where = f"wording pack {source}: 'role_play.{key}'"
        if not isinstance(templates[key], str):
            raise UserError(f"{where} is not a text")
        try:
            fields = {name for _, name, _ in _parse(templates[key]) if name is not None}
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if unknown := sorted(fields - known):
            raise UserError(f"{where}: field {{{unknown[0]}}} is unknown; known are {', '.join(sorted(known))}")
    return pack


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


def steer(wording: dict, decision: str) -> str:
    """What is said after the question to be answered with "comply" or "violate"; empty where a pack says nothing."""
    return fill(wording["role_play"].get("steer", {}).get(decision, ""))


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
