"""The final answer of a worked problem: found in what was said, and compared with the right one.

What a model says is hostile here too: a library for mathematics that is asked whether `9^{9^{9^9}}` is 7 may never come
back. Plain numbers are compared at once; everything else goes to math-verify (sympy, on its LaTeX grammar alone, which
evaluates no Python) in a worker process that has a limit of memory and is killed when it is late.
"""

import json
import re
import selectors
import subprocess
import sys
import weakref
from decimal import Decimal, InvalidOperation
from pathlib import Path

from atp_jax.decisions import spoken
from atp_jax.errors import UserError

SECONDS = 5.0  # after which an answer counts as unreadable
STARTING = 120.0  # seconds that the worker may take to import what it needs
LONGEST = 300  # characters of an answer that are looked at

_WORKER = Path(__file__).with_name("answers_worker.py")
_NAMED = re.compile(r"answer[ \t*_]*:([^\n]*)", re.IGNORECASE)
_BOXED = "\\boxed{"


def final_answer(text: str) -> str | None:
    r"""What an answer gives as its result: what stands in its last `\boxed{...}` or behind its last `Answer:`,
    whichever comes later, thoughts aside. None where there is neither, or only blanks, or far too much."""
    said = spoken(text) or ""
    found, where = None, -1
    for match in _NAMED.finditer(said):
        found, where = match[1].strip(" \t*_$").rstrip("."), match.start()
    if (start := said.rfind(_BOXED)) >= 0 and (start > where or _BOXED in (found or "")):
        found = _braced(said, start + len(_BOXED))
    found = (found or "").strip()
    return found if 0 < len(found) <= LONGEST else None


def right_answer(text: str) -> str:
    r"""The answer in the column of a data set: behind `####` (as GSM8K writes), in the last `\boxed{...}` of a worked
    solution, or all of it."""
    behind = text.rpartition("####")[2].strip()
    start = behind.rfind(_BOXED)
    return (_braced(behind, start + len(_BOXED)) or "").strip() if start >= 0 else behind


class Grader:
    """Compares answers. The worker starts with the first that are no plain numbers; it ends with `close`, or when the
    grader is forgotten."""

    def __init__(self):
        self._worker: subprocess.Popen | None = None
        self._known: dict[tuple[str, ...], bool] = {}

    def same(self, said: str, right: str) -> bool:
        """Do the two mean the same? Whatever cannot be read means nothing."""
        if (a := plain(said)) is not None and (b := plain(right)) is not None:
            return a == b
        return self._asked(said, right)

    def readable(self, text: str) -> bool:
        """Can an answer be compared with this one?"""
        return plain(text) is not None or self._asked(text)

    def close(self) -> None:
        """Ends the worker; the next question starts another."""
        if self._worker is not None:
            _end(self._worker)
            self._worker = None

    def _asked(self, *texts: str) -> bool:
        if any(not text.strip() or len(text) > LONGEST for text in texts):
            return False
        if texts not in self._known:
            reply = self._ask(texts)
            if reply is None:  # not in time: another time it may be
                return False
            self._known[texts] = reply == b"true\n"
        return self._known[texts]

    def _ask(self, texts: tuple[str, ...]) -> bytes | None:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            self._worker = _started()
            weakref.finalize(self, _end, self._worker)
        try:
            self._worker.stdin.write(json.dumps(texts).encode() + b"\n")
            self._worker.stdin.flush()
            reply = _line(self._worker, SECONDS)
        except OSError:
            reply = None
        if reply is None:
            self.close()
        return reply


def plain(text: str) -> Decimal | None:
    """A number in decimal digits, or None."""
    if not text.isascii() or len(text) > 60 or "_" in text:
        return None
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _braced(text: str, start: int) -> str | None:
    """From `start` to the brace that closes the one before it; None if it is never closed."""
    depth = 1
    for end in range(start, min(len(text), start + LONGEST + 1)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end]
    return None


def _started() -> subprocess.Popen:
    worker = subprocess.Popen(
        [sys.executable, "-I", str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={}, cwd="/",
    )  # fmt: skip
    if _line(worker, STARTING) != b"ready\n":
        _end(worker)
        raise UserError("answers that are no plain numbers are compared by math-verify: pip install math-verify")
    return worker


def _line(worker: subprocess.Popen, seconds: float) -> bytes | None:
    """The next line of the worker; None if it says nothing in time. Its lines are short, and whole once they begin."""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        return (worker.stdout.readline() or None) if selector.select(seconds) else None


def _end(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        try:
            pipe.close()
        except OSError:  # what was still to be written has nowhere to go
            pass
