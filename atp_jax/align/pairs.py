"""Preference pairs: collected from a model's own answers, or read from the user's data.

A model is asked the same question under two steering messages, one for each decision (the wording pack's
`steer`), until an answer decides as asked. The pair is kept with the *bare* question: what it learns is to
answer that without being steered (context distillation). An answer may take several turns (tool use): what the
tool gave back stands in it and is not learned.
"""

import csv
import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.files import write_lines
from atp_jax.policies.types import Answer, Policy, Request, follow
from atp_jax.testbeds.types import Question

WANTED = ("comply", "violate")
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question and two answers to it.

    chosen_tokens, rejected_tokens: the ids that were sampled (stop token included), empty where nothing was. scenario:
    the row of the scenario file that the question is of, None for pairs of the user's.

    Of an answer of several turns chosen and chosen_tokens are the last one's; chosen_before has the messages that came
    first, those of the assistant with `tokens` where they were sampled. tools: what the chat template is given.
    """

    messages: tuple[dict, ...]
    chosen: str
    rejected: str
    chosen_tokens: tuple[int, ...] = ()
    rejected_tokens: tuple[int, ...] = ()
    scenario: int | None = None
    chosen_before: tuple[dict, ...] = ()
    rejected_before: tuple[dict, ...] = ()
    tools: tuple[dict, ...] = ()

    def half(self, name: str) -> tuple[str, tuple[int, ...], tuple[dict, ...]]:
        """Text, ids and earlier messages of "chosen" or "rejected"."""
        return getattr(self, name), getattr(self, f"{name}_tokens"), getattr(self, f"{name}_before")


HALVES = ("chosen", "rejected")


def collect(
    questions: Sequence[Question],
    policy: Policy,
    read: Callable[[Answer, Question], str],
    *,
    samples: int,
    tries: int,
    steered: bool,
    condition: int,
) -> tuple[list[Pair], dict]:
    """`samples` pairs a question: the chosen answer complies, the rejected one violates.

    read: (answer, question) -> "comply", "violate", "unparsed", or another word for what is no half of a pair.

    Each half is asked for at most `tries` times, with fresh randomness: try t of half h is round 1 + 2 t + h of episode
    (row of the scenario x samples + sample) in `condition` (1000 and above, so that no episode that evolves shares it).
    An answer therefore does not depend on what else is asked, and all that is still open is asked together.

    A model that decides as asked with probability p gives its half with probability 1 - (1 - p)^tries. One that breaks
    the rule in 35% of its answers and cannot be steered gives 23% of the pairs with 1 try, 51% with 2, 69% with 3, 88%
    with 5, 97% with 8.

    steered: with the question's steering message as one more user message after it, unless it is empty.
    Returns the pairs in the order of the questions, and a report whose counts add up: pairs wanted = found + dropped
    (`without_comply` and `without_violate` say which half was never given); answers asked = used + other_decision +
    unparsed + cut_off (those that did not come to an end, whatever they decide) + whatever else `read` says, under its
    own words + `rewritten` (answers whose first turns the chat template did not show as they were said).
    """
    places = [(question, sample) for question in questions for sample in range(samples)]
    found: dict[tuple[int, str], Answer] = {}
    told = {"asked": 0, "used": 0, "other_decision": 0, "unparsed": 0, "cut_off": 0}
    for attempt in range(tries):
        still_open = [(place, want) for place in range(len(places)) for want in WANTED if (place, want) not in found]
        if not still_open:
            break
        requests = []
        for place, want in still_open:
            question, sample = places[place]
            steering = question.steering[want] if steered else ""
            extra = [{"role": "user", "content": steering}] if steering else []
            number = 1 + 2 * attempt + WANTED.index(want)
            episode = question.row * samples + sample
            messages = [*question.messages, *extra]
            requests.append(Request(condition, episode, 0, number, messages, tools=question.tools))
        told["asked"] += len(requests)
        for (place, want), answer in zip(still_open, policy.answer(requests), strict=True):
            decision = read(answer, places[place][0])
            if answer.finish != "stop":
                told["cut_off"] += 1
            elif decision == want and answer.left_out:
                told["rewritten"] = told.get("rewritten", 0) + 1
            elif decision == want:
                told["used"] += 1
                found[place, want] = answer
            else:
                why = "other_decision" if decision in WANTED else decision
                told[why] = told.get(why, 0) + 1
    pairs = []
    for place, (question, _) in enumerate(places):
        good, bad = (found.get((place, want)) for want in WANTED)
        if good and bad:
            pairs.append(Pair(
                tuple(question.messages), good.text, bad.text, _last_ids(good), _last_ids(bad), question.row,
                good.before, bad.before, question.tools,
            ))  # fmt: skip
    told |= {f"without_{want}": sum((place, want) not in found for place in range(len(places))) for want in WANTED}
    return pairs, told | {"wanted": len(places), "dropped": len(places) - len(pairs)}


def _last_ids(answer: Answer) -> tuple[int, ...]:
    """The ids of an answer's last turn."""
    last = answer.length - _count(answer.before)
    return answer.tokens[len(answer.tokens) - last :]


def _count(messages: Sequence[Mapping]) -> int:
    """Tokens that were sampled in messages."""
    return sum(len(message.get("tokens", ())) for message in messages)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """One JSON line a pair: `scenario`, `prompt` (messages), `chosen`, `rejected`, their ids and how many were sampled
    (0 where nothing was); the file as a whole or not at all.

    An answer of several turns is written as its messages, the earlier ones of the assistant with their `tokens`; the
    ids beside it are the last one's. `tools` stand there where there are any.
    """

    def row(pair: Pair) -> dict:
        halves = {name: pair.half(name) for name in HALVES}
        said = {
            name: [*before, {"role": "assistant", "content": text}] if before else text
            for name, (text, _, before) in halves.items()
        }
        ids = {f"{name}_ids": list(ids) for name, (_, ids, _) in halves.items()}
        counts = {f"{name}_tokens": len(ids) + _count(before) for name, (_, ids, before) in halves.items()}
        tools = {"tools": list(pair.tools)} if pair.tools else {}
        return {"scenario": pair.scenario, "prompt": list(pair.messages), **tools, **said, **ids, **counts}

    write_lines(path, [row(pair) for pair in pairs])


def read_pairs(source: str | Path) -> list[Pair]:
    """Pairs of a file (.json, .jsonl, .parquet, .csv) or of a hub data set's split `train`, through `datasets`.

    A row has `chosen` and `rejected`, texts or message lists of which the last is the answer, and `prompt`, a text or
    messages, or in the alpaca style `instruction` and maybe `input` below it. Without a prompt, `chosen` and `rejected`
    are whole conversations that begin alike. `system`, where a row has one, comes before a prompt that has none of its
    own. Messages behind a prompt that begin with the assistant's are an answer of several turns, of which the others'
    are not learned; `tools` may hold the schemas that the chat template is to show. What `write_pairs` wrote comes back
    as it was.

    UserError names the row (from 0) and the key at fault; the network is asked only for what has the form of a hub id.
    """
    rows = _rows(str(source))
    if not rows:
        raise UserError(f"{source}: holds no pairs")
    return [_pair(f"{source}: row {number} (from 0)", row) for number, row in enumerate(rows)]


def _rows(source: str) -> list:
    path = Path(source).expanduser()
    is_hub_id = not path.exists() and path.suffix not in READERS and HUB_ID.fullmatch(source)
    if not is_hub_id and not path.is_file():
        raise UserError(f"{source}: there is no such file of preferences (nor is it a hub id, organisation/name)")
    if not is_hub_id and path.suffix not in READERS:
        raise UserError(f"{source}: preferences are read from {', '.join(READERS)}, not {path.suffix!r}")
    if path.suffix in (".json", ".jsonl"):
        return _json_rows(path)
    import datasets  # takes a second to import

    datasets.disable_progress_bars()
    try:
        if is_hub_id:
            return list(datasets.load_dataset(source, split="train"))
        options = {}
        if path.suffix == ".csv":  # all is text, "7" and "NA" too
            with path.open(encoding="utf-8-sig", newline="") as file:
                names = next(csv.reader(file), [])
                if not file.read().strip():
                    return []
            options = {"features": datasets.Features({name: datasets.Value("string") for name in names})}
            options |= {"keep_default_na": False, "encoding": "utf-8-sig"}
        with tempfile.TemporaryDirectory() as cache:  # else a copy of every file read would be kept
            kind = READERS[path.suffix]
            return list(datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache, **options))
    except Exception as error:  # whatever the readers of these formats raise
        reason = str(error.__cause__ or error).strip().partition(chr(10))[0]
        what = "no such file here, and as a hub data set it" if is_hub_id else "it"
        raise UserError(f"{source}: {what} cannot be read as preferences: {reason}") from error


def _json_rows(path: Path) -> list:
    """JSON by the standard library: a line that is wrong can be named, and mixed types within a key are no error."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as preferences: {error}") from error
    whole = text.lstrip().startswith("[")
    rows = []
    # Not splitlines: other separators than a newline may stand in a text.
    for number, part in enumerate([text] if whole else text.split("\n")):
        try:
            if whole:
                rows = json.loads(part)
            elif part.strip():
                rows.append(json.loads(part))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number + error.lineno}: not JSON: {error.msg}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{path}: not JSON that can be read") from error
    return rows


def _pair(where: str, row: object) -> Pair:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: not an object with the keys prompt, chosen and rejected")
    for key in ("chosen", "rejected"):
        if not row.get(key):
            raise UserError(f"{where}: key {key!r} is missing or empty")
    (before, chosen), (other, rejected) = (_conversation(where, key, row[key]) for key in HALVES)
    if row.get("prompt"):
        prompt = _messages(where, "prompt", row["prompt"])
    elif row.get("instruction"):
        asked = [_text(where, key, row[key]) for key in ("instruction", "input") if row.get(key)]
        prompt = [{"role": "user", "content": "\n".join(asked)}]
    elif before and before == other:
        prompt = before
    else:
        raise UserError(f"{where}: key 'prompt' (or 'instruction') is missing, and chosen and rejected begin not alike")
    if row.get("system") and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": _text(where, "system", row["system"])}, *prompt]
    if prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: 'prompt' ends with a message of the assistant: there is nothing to answer")
    # What begins with the user's words is the prompt once more, as many data sets have it.
    several = [prompt is not before and bool(said) and said[0]["role"] == "assistant" for said in (before, other)]
    earlier = [tuple(said) if mine else () for said, mine in zip((before, other), several, strict=True)]
    if (earlier[0], chosen) == (earlier[1], rejected):
        raise UserError(f"{where}: chosen and rejected are identical")
    ids = (_ids(where, key, row.get(key)) for key in ("chosen_ids", "rejected_ids"))
    scenario, tools = row.get("scenario"), row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{where}: 'tools' must be a list of schemas")
    scenario = scenario if isinstance(scenario, int) else None
    return Pair(tuple(prompt), chosen, rejected, *ids, scenario, *earlier, tuple(tools))


def _text(where: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is not a text")
    return value


def _ids(where: str, key: str, value: object) -> tuple[int, ...]:
    ids = value or []
    if not isinstance(ids, list) or not all(type(index) is int and index >= 0 for index in ids):
        raise UserError(f"{where}: {key!r} must be a list of token ids")
    return tuple(ids)


def _messages(where: str, key: str, value: object) -> list[dict]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not all(
        isinstance(m, Mapping)
        and isinstance(m.get("role"), str)
        and (isinstance(m.get("content"), str) or m.get("tool_calls"))
        for m in value
    ):
        raise UserError(f"{where}: {key!r} must be a text or a list of messages with role and content")
    if any(m.get("tool_calls") for m in value):
        raise UserError(f"{where}: {key!r} has tool_calls: write a call into the content, as the chat template does")
    return [
        {"role": m["role"], "content": m["content"]}
        | ({"tokens": _ids(where, "tokens", m["tokens"])} if m["role"] == "assistant" and m.get("tokens") else {})
        for m in value
    ]


def _conversation(where: str, key: str, value: object) -> tuple[list[dict], str]:
    """(what stands before the answer, the answer)"""
    if isinstance(value, str):
        return [], value
    messages = _messages(where, key, value)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise UserError(f"{where}: the last message of {key!r} must be an answer of the assistant")
    if any(m["role"] == "assistant" and not m["content"] for m in messages):
        raise UserError(f"{where}: a message of the assistant in {key!r} is empty")
    return messages[:-1], messages[-1]["content"]


def tokenise(pairs: Sequence[Pair], chat: Chat, stop: int, max_prompt: int, max_length: int) -> list[dict]:
    """`{"prompt", "chosen", "rejected"}` as token ids; the prompt is what `chat` shows to a model that is asked.
    `chosen_sampled` and `rejected_sampled` have a 1 for each id that the model itself is to say, and 0 for what stands
    between the turns of an answer: what the template writes there, and what the tool gave back.

    A turn is the ids that were sampled, if they are of its text in this tokenizer, and else its text (pairs of
    another model's, a text that was edited); its last id is what the chat template ends answers with, or `stop` where
    that is no special token. Of a prompt the last `max_prompt` tokens stay, of an answer the first that then fit in
    `max_length`. UserError where nothing of a prompt or of an answer is left, what is left of both is the same, or the
    template shows an earlier turn of an answer otherwise than it was said.
    """
    end = _end_of_turn(chat, stop)
    rows = []
    for number, pair in enumerate(pairs):
        prompt = chat.encode(list(pair.messages), pair.tools)
        prompt = prompt[max(0, len(prompt) - max_prompt) :]
        room = max_length - len(prompt)
        if not prompt or room < 1:
            raise UserError(
                f"pair {number} (from 0): {len(prompt)} tokens of prompt (max_prompt={max_prompt}) leave no room for a "
                f"question and an answer within max_length={max_length}"
            )
        row: dict = {"prompt": prompt}
        for half in HALVES:
            turns = _turns(pair, half, chat, end)
            ids, sampled, held = follow(turns)
            if held < len(turns):
                raise UserError(
                    f"pair {number} (from 0): the chat template shows turn {held} of the {half} answer otherwise than "
                    "it was said, so that it cannot be learned as one: leave the pair out"
                )
            row |= {half: ids[:room], f"{half}_sampled": sampled[:room]}
        if row["chosen"] == row["rejected"]:
            raise UserError(f"pair {number} (from 0): within max_length={max_length} chosen and rejected are the same")
        rows.append(row)
    return rows


def _turns(pair: Pair, half: str, chat: Chat, end: int) -> list[tuple[list[int], list[int]]]:
    """(what the model is shown, what it says) of each turn of an answer, as ids."""
    text, ids, before = pair.half(half)
    turns, shown = [], list(pair.messages)
    for message in (*before, {"role": "assistant", "content": text, "tokens": ids}):
        if message["role"] == "assistant":
            said, own = message["content"], message.get("tokens")
            turn = list(own) if own and chat.decode(own) == said else [*chat.answer(said), end]
            turns.append((chat.encode(shown, pair.tools), turn))
            message = message | {"tokens": turn}
        shown.append(message)
    return turns


def _end_of_turn(chat: Chat, stop: int) -> int:
    """The special token that the template writes after an answer; `stop` where it writes none.

    Not simply the first of a model's stop ids: Llama 3.1's is <|end_of_text|>, its answers end with <|eot_id|>.
    """
    asked = {"role": "user", "content": "a"}
    one, other = (chat.encode([asked, {"role": "assistant", "content": said}, asked]) for said in ("a", "b"))
    same = 0  # tokens after the answer
    for x, y in zip(reversed(one), reversed(other), strict=False):
        if x != y:
            break
        same += 1
    return one[-same] if same and chat.decode([one[-same]]) == "" else stop
