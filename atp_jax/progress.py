"""What is seen of a long run: a bar on a terminal, otherwise a line a round or step, and a heartbeat between them."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from atp_jax import processes

EVERY = 60.0  # seconds between two heartbeats


def describe(metrics: dict) -> str:
    """One round of one condition (a line of `metrics.jsonl`) in words."""
    text = (
        f"{metrics['condition']}, round {metrics['round']}: "
        f"{metrics['violations']} of {metrics['total']} violate ({metrics['violations'] / metrics['total']:.1%})"
    )
    if metrics["unparsed"]:
        text += f", {metrics['unparsed']} unparsed"
    if metrics["cut_off"]:
        text += f", {metrics['cut_off']} cut off at the most new tokens"
    if metrics["tokens"] and metrics["seconds"] is not None:
        text += f", {metrics['tokens'] / max(metrics['seconds'], 1e-3):.0f} tokens/s"
    return text


def describe_training(line: dict) -> str:
    """One step of a training, or one look at the validation scenarios (a line of `metrics.jsonl`) in words."""
    if "violation_rate" in line:
        return f"{line['stage']}, step {line['step']}: validation: {line['violation_rate']:.1%} violate in round 1"
    shown = ("loss", "reward", "rewards/accuracies", "kl", "grad_norm", "batch_s", "update_s")
    values = (f"{name} {line[name]:.4g}" for name in shown if line.get(name) is not None)
    return f"{line['stage']}, step {line['step']}: " + ", ".join(values)


def span(seconds: float) -> str:
    """A length of time in words: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Heartbeat:
    """A context that says every minute, where there is no terminal, how far `what` is and how long it may still take,
    from the pace since it was entered. units: what is counted, "steps"."""

    def __init__(self, what: str, total: int, units: str):
        self.what, self.total, self.units = what, total, units
        self._over, self._thread = threading.Event(), threading.Thread(target=self._beat, daemon=True)
        self._first = self._done = 0
        self._began = time.monotonic()

    def __enter__(self) -> "Heartbeat":
        self._began = time.monotonic()
        if processes.leads() and not sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._over.set()

    def start(self, done: int) -> None:
        """So many were done before: they say nothing of the pace."""
        self._first = self._done = done

    def at(self, done: int) -> None:
        """So many are done now."""
        self._done = done

    def line(self, now: float) -> str:
        """What is said at a time of `time.monotonic`."""
        text = f"{self.what}: {self._done} of {self.total} {self.units} after {span(now - self._began)}"
        if made := self._done - self._first:
            # Counted with what is under way, so that a slow round makes it longer and never 0.
            text += f", about {span((now - self._began) / made * (self.total - self._done))} left"
        return text

    def _beat(self) -> None:
        while not self._over.wait(EVERY):
            print(self.line(time.monotonic()), flush=True)


class Progress:
    """A context for `total` rounds. The bar goes to stderr, the lines to stdout, where they may be kept."""

    def __init__(self, total: int):
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.terminal = sys.stderr.isatty() and processes.leads()
        self.bar = Bar(*columns, console=Console(stderr=True), disable=not self.terminal, transient=True)
        self.task = self.bar.add_task("round 1", total=total)
        self.heartbeat, self.finished = Heartbeat("evolve", total, "rounds"), 0

    def __enter__(self) -> "Progress":
        self.bar.start()
        self.heartbeat.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self.heartbeat.__exit__(*exception)
        self.bar.stop()

    def advance(self, metrics: dict) -> None:
        """A round of one condition is finished."""
        self.finished += 1
        self.heartbeat.at(self.finished)
        self.bar.update(self.task, advance=1, description=describe(metrics))
        if not self.terminal:
            print(describe(metrics), flush=True)
