"""What is seen of a long run: a bar on a terminal, a line a round otherwise."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


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
    if metrics["tokens"]:
        text += f", {metrics['tokens'] / max(metrics['seconds'], 1e-3):.0f} tokens/s"
    return text


def describe_training(line: dict) -> str:
    """One step of a training, or one look at the validation scenarios (a line of `metrics.jsonl`) in words."""
    if "violation_rate" in line:
        return f"{line['stage']}, step {line['step']}: validation: {line['violation_rate']:.1%} violate in round 1"
    shown = ("loss", "reward", "rewards/accuracies", "kl", "grad_norm", "batch_s", "update_s")
    values = (f"{name} {line[name]:.4g}" for name in shown if line.get(name) is not None)
    return f"{line['stage']}, step {line['step']}: " + ", ".join(values)


class Progress:
    """A context for `total` rounds. The bar goes to stderr, the lines to stdout, where they may be kept."""

    def __init__(self, total: int):
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self.terminal = sys.stderr.isatty()
        self.bar = Bar(*columns, console=Console(stderr=True), disable=not self.terminal, transient=True)
        self.task = self.bar.add_task("round 1", total=total)

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def advance(self, metrics: dict) -> None:
        """A round of one condition is finished."""
        self.bar.update(self.task, advance=1, description=describe(metrics))
        if not self.terminal:
            print(describe(metrics), flush=True)
