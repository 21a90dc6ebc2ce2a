"""Being asked to stop: SIGTERM from a scheduler, Ctrl-C from a person. Training saves and leaves with status 0."""

import signal


class Interrupted(Exception):
    """The work was saved and left because it was asked to stop; the message says how to go on."""


class Interrupt:
    """A context in which the first of these signals (SIGTERM and Ctrl-C, unless others are named) only sets `asked`,
    its name; a second one acts as it always does.

    For the main thread, as everything that handles signals.
    """

    def __init__(self, *signals: signal.Signals):
        self.asked = ""
        self._signals = signals or (signal.SIGTERM, signal.SIGINT)
        self._before = {}

    def __enter__(self) -> "Interrupt":
        for number in self._signals:
            before = signal.signal(number, self._ask)
            self._before[number] = signal.SIG_DFL if before is None else before  # None: not Python's
        return self

    def __exit__(self, *exception) -> None:
        self._restore()

    def _ask(self, number, frame) -> None:
        self.asked = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
