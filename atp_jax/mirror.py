"""`metrics.jsonl` shown elsewhere as well: TensorBoard, Weights & Biases.

The JSON lines are what a run leaves; these are made from them, by a thread that follows the file, so that nothing that
computes knows of it. Each start writes TensorBoard's files anew from the first line.
"""

import importlib
import json
import shutil
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from atp_jax import processes
from atp_jax.errors import UserError

EVERY = 5.0  # seconds between two looks at the file
# What tells where a line belongs, and not how something went.
PLACE = ("stage", "condition", "step", "round")


def scalars(line: dict) -> tuple[str, int, dict[str, float]] | None:
    """(the series it belongs to, its step, its numbers) of a line; None for one that has no step."""
    step = line.get("step", line.get("round"))
    if step is None:
        return None
    where = "/".join(line[name] for name in ("stage", "condition") if line.get(name))
    numbers = {
        name: float(value)
        for name, value in line.items()
        if name not in PLACE and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return where, step, numbers


class Show(Protocol):
    """Somewhere to show a series' numbers at a step."""

    def show(self, where: str, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Mirror:
    """A context in which the lines of `metrics.jsonl` are shown to each of `shows` as they come."""

    def __init__(self, path: Path, shows: Sequence[Show], every: float = EVERY):
        self._path, self._shows, self._every = path, shows, every
        self._over, self._at = threading.Event(), 0
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Mirror":
        if self._shows:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()
        if self._shows:
            self._thread.join()
        for show in self._shows:
            show.close()

    def _follow(self) -> None:
        over = False
        while not over:
            over = self._over.wait(self._every)
            self._look()

    def _look(self) -> None:
        if not self._path.exists():
            return
        self._at = min(self._at, self._path.stat().st_size)  # a run that goes on cuts what its checkpoint did not see
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        for text in whole.splitlines():
            try:
                found = scalars(json.loads(text))
            except ValueError:  # looked at between a cut and what was written over it
                continue
            for show in self._shows if found else ():
                show.show(*found)


def mirror(workdir: Path, tensorboard: bool, wandb: str | None, config: dict) -> Mirror:
    """What the command line asked for; of several processes only process 0 shows anything. UserError where the package
    is not installed."""
    shows = []
    if not processes.leads():
        return Mirror(workdir / "metrics.jsonl", shows)
    if tensorboard:
        shows.append(_TensorBoard(_package("tensorboardX", "--tensorboard"), workdir / "tensorboard"))
    if wandb:
        shows.append(_WeightsAndBiases(_package("wandb", "--wandb"), wandb, workdir, config))
    return Mirror(workdir / "metrics.jsonl", shows)


def _package(name: str, flag: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{flag} needs the package {name}, which is not installed: pip install {name}") from error


class _TensorBoard:
    def __init__(self, package, directory: Path):
        self._package, self._directory, self._writer = package, directory, None

    def show(self, where: str, step: int, numbers: dict[str, float]) -> None:
        if self._writer is None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._writer = self._package.SummaryWriter(str(self._directory))
        for name, value in numbers.items():
            self._writer.add_scalar(f"{where}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WeightsAndBiases:
    """Every series has steps of its own. The workdir is the run, so that one that goes on stays the same."""

    def __init__(self, package, project: str, workdir: Path, config: dict):
        name = f"{workdir.name}-{zlib.crc32(str(workdir.absolute()).encode()):08x}"
        about = {"project": project, "id": name, "name": workdir.name, "dir": str(workdir), "config": config}
        self._begin, self._run, self._known = lambda: package.init(resume="allow", **about), None, set()

    def show(self, where: str, step: int, numbers: dict[str, float]) -> None:
        if self._run is None:
            self._run = self._begin()
        if where not in self._known:
            self._known.add(where)
            self._run.define_metric(f"{where}/step")
            self._run.define_metric(f"{where}/*", step_metric=f"{where}/step")
        self._run.log({f"{where}/step": step} | {f"{where}/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
