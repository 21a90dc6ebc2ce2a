"""Text files that survive being interrupted: written as a whole or not at all, or line by line with a torn end cut.

Of several processes only process 0 writes and reads them; the others are told what it reads (processes.py), so all call
these functions in the same order.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from atp_jax import processes
from atp_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write so that `path` is replaced as a whole, once it is on disk, or not at all: a path beside it, which
    takes its place when the block ends well."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.chmod(0o644)  # safetensors writes what nobody else can read
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write `path` as a whole or not at all."""
    if processes.leads():
        with replacing(path) as partial:
            partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="ascii")


def exists(path: Path) -> bool:
    """Whether there is such a file or directory."""
    return bool(processes.share(lambda: b"yes" if path.exists() else b""))


def read(path: Path) -> bytes | None:
    """What is in `path`, None where there is no such file. UserError where it cannot be read."""

    def found() -> bytes:
        try:
            return b"+" + path.read_bytes()
        except FileNotFoundError:
            return b"-"
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error

    content = processes.share(found)
    return content[1:] if content[:1] == b"+" else None


def read_json(path: Path) -> dict | None:
    """The object in `path`, or None where there is no such file."""
    content = read(path)
    try:
        return None if content is None else json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not what this program wrote: {error}; use another workdir") from error


def append(path: Path, records: Sequence[dict]) -> None:
    """Append one JSON line a record, on disk when this returns. Floats are written by `repr`, text in ASCII."""
    if not processes.leads():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with path.open("ab") as file:
        file.write(lines.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, records: Sequence[dict]) -> None:
    """One JSON line a record, as `append` writes them; the file as a whole or not at all."""
    if processes.leads():
        with replacing(path) as partial:
            append(partial, records)


def read_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines; none where there is no file. UserError where it cannot be read."""
    text = (read(path) or b"").decode("utf-8", errors="surrogateescape")
    try:
        return [json.loads(line) for line in text.removesuffix("\n").split("\n")] if text else []
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def size(path: Path) -> int:
    """Bytes in `path`, 0 where there is none."""
    return int(processes.share(lambda: str(path.stat().st_size if path.exists() else 0).encode()))


def cut(path: Path, length: int) -> None:
    """Take back what was appended after `path` had `length` bytes."""
    if processes.leads() and path.exists() and path.stat().st_size > length:
        with path.open("r+b") as file:
            file.truncate(length)
            os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Take a file away, if there is one."""
    if processes.leads():
        path.unlink(missing_ok=True)


def mend(path: Path) -> None:
    """Cut a torn last line off a file of lines, so that the next can be appended."""
    if processes.leads() and path.exists():
        cut(path, path.read_bytes().rfind(b"\n") + 1)
