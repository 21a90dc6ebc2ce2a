"""Being asked to stop: SIGTERM from a scheduler, Ctrl-C from a person. Training saves and leaves with status 0."""

import signal


class Interrupted(Exception):
    """The work was saved and left because it was asked to stop; the message says how to go on."""


class Interrupt:
    """A context in which SIGTERM and the first Ctrl-C only set `asked`; a second signal acts as it always does."""

    def __init__(self):
        self.asked = False
        self._before = {}

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self.asked = True
        signal.signal(number, self._before[number])
