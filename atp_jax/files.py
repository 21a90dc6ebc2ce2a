"""Text files that survive being interrupted: written as a whole or not at all, or line by line with a torn end cut."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from atp_jax.errors import UserError


def write_json(path: Path, value: object) -> None:
    """Write `path` as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="ascii") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> dict | None:
    """The object in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not what this program wrote: {error}; use another workdir") from error


def append(path: Path, records: Sequence[dict]) -> None:
    """Append one JSON line a record, on disk when this returns. Floats are written by `repr`, text in ASCII."""
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with path.open("ab") as file:
        file.write(lines.encode("ascii"))
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, records: Sequence[dict]) -> None:
    """One JSON line a record, as `append` writes them; the file as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    append(partial, records)
    partial.replace(path)


def read_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines; none where there is no file. UserError where it cannot be read."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def size(path: Path) -> int:
    """Bytes in `path`, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def cut(path: Path, length: int) -> None:
    """Take back what was appended after `path` had `length` bytes."""
    if size(path) > length:
        with path.open("r+b") as file:
            file.truncate(length)
            os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Cut a torn last line off a file of lines, so that the next can be appended."""
    if path.exists():
        cut(path, path.read_bytes().rfind(b"\n") + 1)
