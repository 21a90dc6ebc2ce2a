"""Preference pairs: collected from a model's own answers, or read from the user's data.

A model is asked the same question under two steering messages, one for each decision (the wording pack's
`role_play.steer`), until an answer decides as asked. The pair is kept with the *bare* question: what it learns is to
answer that without being steered (context distillation).
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from atp_jax.chat import Chat
from atp_jax.decisions import read_decision
from atp_jax.envs import role_play as env
from atp_jax.errors import UserError
from atp_jax.files import write_lines
from atp_jax.policies.types import Policy, Request
from atp_jax.rollout import AGENT
from atp_jax.scenarios import role_play as words
from atp_jax.scenarios.pack import Scenario
from atp_jax.scenarios.wording import steer

WANTED = ("comply", "violate")
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question and two answers to it; token ids where the answers were sampled here, else empty."""

    messages: tuple[dict, ...]
    chosen: str
    rejected: str
    chosen_tokens: tuple[int, ...] = ()
    rejected_tokens: tuple[int, ...] = ()


def collect(
    scenarios: Sequence[Scenario],
    policy: Policy,
    wording: dict,
    *,
    samples: int,
    tries: int,
    steered: bool,
    condition: int,
    parity: str,
) -> tuple[list[Pair], dict]:
    """`samples` pairs a scenario: the chosen answer complies, the rejected one violates.

    Each half is asked for at most `tries` times, with fresh randomness: try t of half h is round 1 + 2 t + h of episode
    (scenario x samples + sample) in `condition`, so that an answer does not depend on what else is asked. All that is
    still open is asked together. -> the pairs, and how many answers were of no use, by what they decided.
    """
    pattern = "all_unsupervised"  # whose question says the neutral text
    places = [scenario for scenario in scenarios for _ in range(samples)]
    bare = []
    for scenario in places:
        question = words.question(scenario, env.UNSUPERVISED, pattern, wording, parity)
        bare.append(words.messages(scenario, question, (), None, parity))
    found: dict[tuple[int, str], object] = {}
    told = {"asked": 0, "other_decision": 0, "unparsed": 0}
    for attempt in range(tries):
        open_ones = [(place, want) for place in range(len(places)) for want in WANTED if (place, want) not in found]
        if not open_ones:
            break
        requests = []
        for place, want in open_ones:
            said = steer(wording, want) if steered else ""
            extra = [{"role": "user", "content": said}] if said else []
            number = 1 + 2 * attempt + WANTED.index(want)
            requests.append(Request(condition, place, AGENT, number, [*bare[place], *extra]))
        for (place, want), answer in zip(open_ones, policy.answer(requests), strict=True):
            told["asked"] += 1
            decision = read_decision(answer.text, places[place].comply, places[place].violate, parity)
            if decision == want and answer.finish == "stop":
                found[place, want] = answer
            else:
                told["unparsed" if decision == "unparsed" else "other_decision"] += 1
    pairs = []
    for place, messages in enumerate(bare):
        chosen, rejected = found.get((place, "comply")), found.get((place, "violate"))
        if chosen and rejected:
            pairs.append(Pair(tuple(messages), chosen.text, rejected.text, chosen.tokens, rejected.tokens))
    return pairs, told | {"dropped": len(places) - len(pairs)}


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """One JSON line a pair: `prompt` (messages), `chosen`, `rejected`, their ids, token counts; whole or not at all."""
    write_lines(path, [
        {
            "prompt": list(pair.messages), "chosen": pair.chosen, "rejected": pair.rejected,
            "chosen_ids": list(pair.chosen_tokens), "rejected_ids": list(pair.rejected_tokens),
            "chosen_tokens": len(pair.chosen_tokens), "rejected_tokens": len(pair.rejected_tokens),
        }
        for pair in pairs
    ])  # fmt: skip


def read_pairs(source: str | Path) -> list[Pair]:
    """Pairs of a file (.json, .jsonl, .parquet, .csv) or of a hub data set's split `train`, through `datasets`.

    A row has `chosen` and `rejected`, texts or message lists of which the last is the answer, and `prompt`, a text or
    messages, or in the alpaca style `instruction` with optional `input` and `system`. Without a prompt, `chosen` and
    `rejected` are whole conversations that begin alike. UserError names the row (from 0) and the key at fault.
    """
    rows = _rows(str(source))
    if not rows:
        raise UserError(f"{source}: holds no pairs")
    return [_pair(f"{source}: row {number} (from 0)", row) for number, row in enumerate(rows)]


def _rows(source: str) -> list[dict]:
    path = Path(source).expanduser()
    if path.suffix in (".json", ".jsonl") and path.is_file():
        return _json_rows(path)
    import datasets  # takes a second to import

    datasets.disable_progress_bars()
    try:
        if path.is_file():
            if path.suffix not in READERS:
                raise UserError(f"{source}: preferences are read from {', '.join(READERS)}, not {path.suffix!r}")
            loaded = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) and not path.exists():
            loaded = datasets.load_dataset(source, split="train")
        else:
            raise UserError(f"there is no file {source}, nor is it a hub id of the form organisation/name")
        return [dict(row) for row in loaded]
    except UserError:
        raise
    except Exception as error:  # whatever the readers of these formats raise
        reason = str(error).strip().partition(chr(10))[0]
        raise UserError(f"{source}: cannot be read as preferences: {reason}") from error


def _json_rows(path: Path) -> list[dict]:
    """JSON by the standard library: a line that is wrong can be named, and mixed types within a key are no error."""
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def _pair(where: str, row: object) -> Pair:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: not an object")
    for key in ("chosen", "rejected"):
        if not row.get(key):
            raise UserError(f"{where}: no {key!r}")
    chosen, rejected = (_conversation(where, key, row[key]) for key in ("chosen", "rejected"))
    if row.get("prompt"):
        prompt = _messages(where, "prompt", row["prompt"])
    elif row.get("instruction"):
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        asked = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
        prompt = [*system, {"role": "user", "content": asked}]
    else:
        prompt = chosen[0]
        if not prompt or prompt != rejected[0]:
            raise UserError(f"{where}: no 'prompt' (or 'instruction'), and chosen and rejected do not begin alike")
    if chosen[1] == rejected[1]:
        raise UserError(f"{where}: chosen and rejected are identical")
    ids = (tuple(row.get(key) or ()) for key in ("chosen_ids", "rejected_ids"))
    return Pair(tuple(prompt), chosen[1], rejected[1], *ids)


def _messages(where: str, key: str, value: object) -> list[dict]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, Sequence) or not value or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    ):
        raise UserError(f"{where}: {key!r} must be a text or a list of messages with role and content")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _conversation(where: str, key: str, value: object) -> tuple[list[dict], str]:
    """(what stands before the answer, the answer)"""
    if isinstance(value, str):
        return [], value
    messages = _messages(where, key, value)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise UserError(f"{where}: the last message of {key!r} must be an answer of the assistant")
    return messages[:-1], messages[-1]["content"]


def tokenise(pairs: Sequence[Pair], chat: Chat, stop: int, max_prompt: int, max_length: int) -> list[dict]:
    """`{"prompt", "chosen", "rejected"}` as token ids, each answer ended by the id `stop`.

    Of a prompt the last `max_prompt` tokens stay, of an answer what then fits in `max_length`. Ids that were sampled
    are taken as they are. UserError where nothing of a prompt or of an answer is left, or what is left is the same.
    """
    rows = []
    for number, pair in enumerate(pairs):
        prompt = chat.encode(list(pair.messages))[-max_prompt:]
        room = max_length - len(prompt)
        if not prompt or room < 1:
            raise UserError(f"pair {number}: {len(prompt)} tokens of prompt leave no room to answer in {max_length}")
        answers = []
        for text, ids in ((pair.chosen, pair.chosen_tokens), (pair.rejected, pair.rejected_tokens)):
            ids = list(ids) or [*chat.answer(text), stop]
            answers.append(ids[:room])
        if not all(answers) or answers[0] == answers[1]:
            raise UserError(f"pair {number}: within max_length={max_length} chosen and rejected are the same or empty")
        rows.append({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]})
    return rows
