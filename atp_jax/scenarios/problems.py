"""Mathematics problems: the shipped pack, problem files, and data sets of the hub or of a disk.

A problem file is a JSON list of rows `{"kind": "simple" or "complex", "environment", "question", "answer"}`. A data set
is read through `datasets`; which of its columns hold question and answer the settings say (`tool.simple`,
`tool.complex`). What is simple is decided by where a problem comes from, and by its number of steps where the settings
ask for that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from atp_jax.answers import Grader, right_answer
from atp_jax.errors import UserError
from atp_jax.scenarios.pack import read_rows, read_text
from atp_jax.settings import SourceSettings

SHIPPED = Path(__file__).with_name("tool_use.json")
ALIGN, VALIDATION = (str(Path(__file__).with_name(f"tool_use_{name}.json")) for name in ("align", "validation"))
KINDS = ("simple", "complex")
UNREADABLE = 0.05  # share of a data set's answers beyond which it is refused
_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Problem:
    """One problem and its right answer."""

    row: int  # place in the file or data set, from 0
    environment: str  # what kind of problem, or which data set
    complex: bool
    question: str
    answer: str


def load_problems(path: str = "") -> tuple[Problem, ...]:
    """All problems of a problem file; an empty path means the shipped pack.

    Raises UserError naming the file, and the row and key where there is one.
    """
    return read_rows(Path(path) if path else SHIPPED, _read)


def of_kind(problems: Sequence[Problem], kind: str, where: str) -> tuple[Problem, ...]:
    """The simple or the complex ones; UserError if there are none."""
    found = tuple(problem for problem in problems if problem.complex == (kind == "complex"))
    if not found:
        raise UserError(f"{where} holds no {kind} problems")
    return found


def load_source(source: SourceSettings, kind: str) -> tuple[tuple[Problem, ...], list[str]]:
    """The problems of a data set, and what the user should know of them.

    Raises UserError for what cannot be read, a column that is not there, a split without problems, and if more than one
    answer in twenty cannot be read.
    """
    where = f"tool.{kind}: {source.path}"
    rows = _rows(source, where)
    needed = {"question": source.question, "answer": source.answer, "steps": source.steps, "options": source.options}
    needed["where"] = source.where.partition("=")[0]
    for setting, column in needed.items():
        if column and column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise UserError(f"{where} has no column {column!r}, which tool.{kind}.{setting} names; it has {known}")
    found, unreadable, grader = [], [], Grader()
    for number, row in enumerate(rows):
        if source.where and str(row[needed["where"]]) != source.where.partition("=")[2]:
            continue
        if not _within(source, row, f"{where}, row {number} (from 0)"):
            continue
        answer = _text_of(row[source.answer])
        answer = right_answer(answer) if answer is not None else ""
        question = _asked(row, source)
        if question is None or not grader.readable(answer):
            unreadable.append(number)
        else:
            found.append(Problem(number, Path(source.path).stem, kind == "complex", question, answer))
        if source.limit is not None and len(found) == source.limit:
            break
    grader.close()
    if not found and not unreadable:
        raise UserError(f"{where} holds no problems that tool.{kind}.where and .steps_least to .steps_most leave")
    shown = ", ".join(map(str, unreadable[:10])) + (", ..." if len(unreadable) > 10 else "")
    said = f"{where}: {len(unreadable)} of {len(found) + len(unreadable)} problems have no answer that can be read"
    if len(unreadable) > UNREADABLE * (len(found) + len(unreadable)):
        raise UserError(f"{said} (rows {shown}): is tool.{kind}.answer the right column?")
    return tuple(found), [f"{said}, and are left out: rows {shown}"] if unreadable else []


def _read(row, number: int, where: str) -> Problem:
    where = f"{where}: row {number} (from 0)"
    if not isinstance(row, dict):
        raise UserError(f"{where} is not an object")
    texts = {key: read_text(row, key, where) for key in ("kind", "environment", "question", "answer")}
    kind = texts.pop("kind")
    if kind not in KINDS:
        raise UserError(f"{where}: key 'kind' is {kind!r}; simple or complex is expected")
    return Problem(number, complex=kind == "complex", **texts)


def _rows(source: SourceSettings, where: str):
    """The split as `datasets` reads it."""
    import datasets  # slow to import

    path = Path(source.path).expanduser()
    name = source.name or None
    try:
        if path.is_file():
            if path.suffix not in _LOADERS:
                raise UserError(f"{where}: a file must end in {', '.join(_LOADERS)}")
            return datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(source.path, name, split=source.split)
    except UserError:
        raise
    except Exception as error:  # the library raises what its parsers raise
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _within(source: SourceSettings, row: dict, where: str) -> bool:
    """Has the problem as many steps as the settings want?"""
    if source.steps_least is None and source.steps_most is None:
        return True
    if source.steps:
        steps = row[source.steps]
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise UserError(f"{where}: the column {source.steps!r} is {steps!r}; a whole number is expected")
    else:  # the lines of the worked answer, but the one that gives the result
        lines = (_text_of(row[source.answer]) or "").partition("####")[0].splitlines()
        steps = sum(bool(line.strip()) for line in lines)
    return (source.steps_least or 0) <= steps and (source.steps_most is None or steps <= source.steps_most)


def _text_of(value: object) -> str | None:
    """A text, a number, or a list of just one of them (as OlympiadBench gives its answers)."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value)


def _asked(row: dict, source: SourceSettings) -> str | None:
    """The question, with the options to choose from below it where there are any."""
    question = _text_of(row[source.question])
    if question is None or not question.strip():
        return None
    if not source.options:
        return question.strip()
    options = row[source.options]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        return None
    lines = [f"{chr(ord('A') + place)}) {option}" for place, option in enumerate(options)]
    return "\n".join([question.strip(), *lines])
