"""Questions from templates: the same situation at several payoffs.

    python -m atp_jax.scenarios.generate [--templates T.json] [--per-template 4] --out Q.json

--templates     a JSON list of templates (the original's schema); the project's own when left out
--per-template  questions a template; from the first to the last the two payoffs move apart in equal steps
--out           where the questions are written, as a scenario file for `data.path`

Exit status 0; 2 with one line on stderr for anything that you can mend. Warnings go to stderr.
"""

import json
import math
import string
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from atp_jax.errors import UserError
from atp_jax.files import replacing
from atp_jax.scenarios.pack import read_json, read_row, warnings

_SHIPPED = Path(__file__).with_name("role_play_templates.json")
_LOWEST, _HIGHEST = 1.0, 5.0  # payoffs as multiples of the base
_FILLED = ("question", "user_prompt")  # texts that say the payoffs
_TEXTS = (
    "question",
    "system_prompt",
    "user_prompt",
    "supervised_choice",
    "better_choice",
    "format_example",
    "supervised_text",
    "unsupervised_text",
    "neutral_text",
)
# What the original puts between a prompt and its format example; templates may bring their own.
_INSTRUCTION = "IMPORTANT: You must end your response with your final decision in JSON format: "


def level(high: float, low: float) -> tuple[float, float]:
    """Payoff ratios (high, low) made fit: one decimal, within [1, 5], high at least 0.1 above low."""
    high, low = (min(max(round(float(ratio), 1), _LOWEST), _HIGHEST) for ratio in (high, low))
    if high > low:
        return high, low
    low = min(low, round(_HIGHEST - 0.1, 1))
    return round(low + 0.1, 1), low


def levels(high: float, low: float, count: int) -> list[tuple[float, float]]:
    """`count` pairs (high, low) that start at `level(high, low)` and move apart in equal steps, rounded to
    one decimal, until one of them meets its bound."""
    high, low = level(high, low)
    room = min(_HIGHEST - high, low - _LOWEST)
    steps = [round(room * (i / max(count - 1, 1)), 1) for i in range(count)]
    return [level(high + step, low - step) for step in steps]


def amount(value: float) -> str:
    """A payoff as a prompt says it: at most two decimals, none that says nothing."""
    text = f"{value:.2f}"
    return text.rstrip("0").rstrip(".")


def generate(templates: list, per_template: int, where: str) -> tuple[list[dict], list[str]]:
    """The rows of a scenario file, and what is worth a warning.

    The same templates give the same rows, ids included. Raises UserError naming `where`, the template's
    number and the key for a bad template.
    """
    if not isinstance(templates, list) or not templates:
        raise UserError(f"{where}: a list with at least one template is expected")
    rows, said = [], []
    for number, entry in enumerate(templates):
        here = f"{where}: template {number} (from 0)"
        environment, template, (high, low, base) = _checked(entry, here)
        if (high, low) != level(high, low):
            said.append(
                f"template {number} ({environment}): payoff ratios high {high:g}, low {low:g} become "
                f"{' and '.join(f'{ratio:g}' for ratio in level(high, low))}: one decimal, within "
                f"{_LOWEST:g} to {_HIGHEST:g}, high above low"
            )
        for place, (ratio_high, ratio_low) in enumerate(levels(high, low, per_template)):
            params = {
                "high_radio": ratio_high,  # the original's spelling
                "low_radio": ratio_low,
                "base": base,
                "high_reward": ratio_high * base,
                "low_reward": ratio_low * base,
            }
            row = {"environment": environment}
            for key in _TEXTS:
                row[key] = template[key]
                if key in _FILLED:
                    row[key] = _substitute(template[key], params, f"{here}: 'template.{key}'")
            row["user_prompt"] += template.get("instruction", _INSTRUCTION) + template["format_example"]
            name = json.dumps([number, place, per_template, row, params], sort_keys=True)
            rows.append({"id": str(uuid.uuid5(uuid.NAMESPACE_OID, name)), **row, "params": params})
    return rows, said


def _checked(entry, here: str) -> tuple[str, dict, tuple[float, float, float]]:
    """Environment, texts, and the ratios high and low and the base of one template."""
    if not isinstance(entry, dict):
        raise UserError(f"{here} is not an object")
    template, params = entry.get("template"), entry.get("params")
    for key, value, kind in (("environment", entry.get("environment"), str), ("template", template, dict)):
        if not isinstance(value, kind):
            raise UserError(f"{here}: key {key!r} is missing or no {'text' if kind is str else 'object'}")
    for key in _TEXTS:
        if not isinstance(template.get(key), str):
            raise UserError(f"{here}: key 'template.{key}' is missing or no text")
    if not isinstance(template.get("instruction", ""), str):
        raise UserError(f"{here}: key 'template.instruction' is no text")
    if not isinstance(params, dict):
        raise UserError(f"{here}: key 'params' is missing or no object")
    for key in ("high_radio", "low_radio", "base"):
        value = params.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{here}: key 'params.{key}' is {value!r}; a finite number of at least 0 is expected")
    return entry["environment"], template, (params["high_radio"], params["low_radio"], params["base"])


def _substitute(text: str, params: dict, where: str) -> str:
    """`text` with ${high_reward} and ${low_reward} filled; $$ is a dollar sign."""
    try:
        return string.Template(text).substitute({key: amount(params[key]) for key in ("high_reward", "low_reward")})
    except KeyError as error:
        raise UserError(f"{where} holds the placeholder ${{{error.args[0]}}} without a value") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def write(path: Path, rows: list[dict]) -> None:
    """Writes the file whole or not at all."""
    text = json.dumps(rows, ensure_ascii=False, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written: {error.strerror}") from None


def run(arguments: Sequence[str]) -> None:
    """What the command line does; raises UserError."""
    values = flags.FlagValues()
    flags.DEFINE_string("templates", "", "template file", flag_values=values)
    flags.DEFINE_integer("per-template", 4, "questions a template", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", None, "scenario file to write", flag_values=values)
    parse(values, arguments)
    source, out = Path(values["templates"].value or _SHIPPED), Path(values["out"].value)
    templates = read_json(source, "template file")
    rows, said = generate(templates, values["per-template"].value, f"template file {source}")
    said += warnings([read_row(row, number, "generated questions") for number, row in enumerate(rows)])
    write(out, rows)
    for sentence in said:
        print("warning:", sentence, file=sys.stderr)
    distinct = len({(row["system_prompt"], row["user_prompt"]) for row in rows})
    print(f"{len(rows)} questions from {len(templates)} templates, {distinct} of them distinct: {out}")


def parse(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Reads the flags of a generator, of which `--out` must be given; raises UserError."""
    try:
        left = values(["generate", *arguments])[1:]
    except flags.Error as error:
        raise UserError(str(error)) from None
    if left:
        raise UserError(f"argument {left[0]!r} means nothing here")
    if not values["out"].value:
        raise UserError("--out=FILE is missing")


def main(arguments: Sequence[str]) -> int:
    """The command line (without the program's name); returns its exit status."""
    return command(run, __doc__, arguments)


def command(run: Callable[[Sequence[str]], None], help: str, arguments: Sequence[str]) -> int:
    """Runs a generator, or shows its help; returns its exit status."""
    if any(argument in ("-h", "-help", "--help") for argument in arguments):
        print(help)
        return 0
    try:
        run(arguments)
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
