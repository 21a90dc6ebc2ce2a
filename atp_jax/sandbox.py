"""Where code runs that a model wrote: a Python interpreter of its own kind, in a process of its own, under limits.

Such code is hostile until proven otherwise. It never reaches this process's interpreter: it is run by Monty
(pydantic-monty), a small Python written in Rust that has no files, no network, no environment and no imports but some
harmless modules of the standard library (`math`, `itertools`, ...), in a worker process that starts with an empty
environment and is killed and replaced when it hangs or dies. Only what the code prints comes back, as text. The clock
stands still and random numbers have a fixed seed, so that the same code prints the same.
"""

import datetime
import weakref
from dataclasses import dataclass

from atp_jax.errors import UserError

_GRACE = 1.0  # seconds after which a worker that does not heed its own time limit is killed
_LONGEST = 20_000  # characters of code that are looked at
_POLICY = {
    "datetime": datetime.datetime(2000, 1, 1),
    "timezone": "utc",
    "sleep": "zero",
    "random_start": {"seed": 0},
}


@dataclass(frozen=True)
class Limits:
    """What one call may use."""

    seconds: float = 2.0  # of computing
    memory: int = 64  # MiB
    output: int = 2000  # bytes that are printed
    depth: int = 200  # calls within calls


@dataclass(frozen=True)
class Ran:
    """What came of a call: what was printed, and after it the error in one line where there was one."""

    text: str
    failed: bool


class Sandbox:
    """Runs code under `limits`, one call after another; nothing passes from one call to the next.

    The worker starts with the first call. It lives until `close`, or until the sandbox is forgotten.
    """

    def __init__(self, limits: Limits = Limits()):
        self._limits = limits
        self._pool = None
        self._forgotten = None

    def run(self, code: str) -> Ran:
        """Runs `code`. Whatever it does, this returns: an error, a limit or a crash is what `text` tells.

        Raises UserError only where there is no sandbox to run it in.
        """
        if len(code) > _LONGEST:
            return Ran(f"Error: the code is longer than {_LONGEST} characters", True)
        try:
            code.encode()
        except UnicodeEncodeError:
            return Ran("SyntaxError: the code is not valid Unicode", True)
        return self._run(code)

    def close(self) -> None:
        """Ends the worker. The next `run` starts another."""
        if self._forgotten is not None:
            self._forgotten()
        self._pool = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self, code: str) -> Ran:
        try:
            import pydantic_monty as monty
        except ImportError:
            raise UserError("the tool's code runs in pydantic-monty: pip install pydantic-monty") from None
        limits = self._limits
        printed = monty.CollectString(limits.output)
        bounds = {
            "max_feed_duration_secs": limits.seconds,
            "max_memory": limits.memory * 2**20,
            "max_recursion_depth": limits.depth,
        }
        try:
            with self._workers(monty).checkout(limits=bounds, os_policy=_POLICY) as session:
                # The last line keeps the value of the code's own last expression from being sent to this process.
                session.feed_run(code + "\nNone", print_callback=printed)
        except monty.MontyCrashedError:
            return _told(printed.output, "Error: the tool stopped while it ran the code")
        except (monty.MontySyntaxError, monty.MontyRuntimeError) as error:
            return _told(printed.output, self._said(error))
        return Ran(printed.output, False)

    def _said(self, error) -> str:
        """An error in one line. What Monty says of a limit holds measurements that differ from run to run."""
        kind, limits, said = error.exception(), self._limits, error.display("type-msg")
        if isinstance(kind, TimeoutError) and "limit exceeded" in said:
            return f"TimeoutError: the code ran for more than {limits.seconds:g} seconds"
        if isinstance(kind, MemoryError):
            if f"> {limits.output} bytes" in said:
                return f"Error: the code printed more than {limits.output} bytes"
            return f"MemoryError: the code needed more than {limits.memory} MiB"
        return " ".join(said.split())[: limits.output]

    def _workers(self, monty):
        if self._pool is None:
            pool = monty.Monty(
                min_processes=1, max_processes=1, feed_duration_limit_grace=_GRACE,
                request_timeout=self._limits.seconds + 2 * _GRACE, checkout_timeout=60.0,
            )  # fmt: skip
            try:
                pool.__enter__()
                with pool.checkout() as session:
                    session.feed_run("None")
            except Exception as error:  # whatever keeps its program from starting
                raise UserError(f"the sandbox for the tool's code does not start: {error}") from None
            self._forgotten = weakref.finalize(self, pool.__exit__, None, None, None)
            self._pool = pool
        return self._pool


def _told(printed: str, error: str) -> Ran:
    return Ran(printed + ("\n" if printed and not printed.endswith("\n") else "") + error, True)
