"""Being asked to stop: the first signal only says so, the second one stops, and what was saved ends with status 0."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atp_jax.interrupt import Interrupt

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_asked_and_everything_is_as_before_afterwards(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(number)
        assert interrupt.asked == number.name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.fixture
def interactive():
    """SIGINT as a program in the foreground has it: what a shell starts in the background is born ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interactive")
def test_after_either_signal_both_act_as_always():
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupt.asked == "SIGTERM"


def test_an_error_inside_leaves_the_handlers_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Interrupt():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == before


COMMAND = """
import sys
from atp_jax import __main__, experiment
from atp_jax.interrupt import Interrupt, Interrupted

def run(chosen, workdir):
    with Interrupt() as interrupt:
        step = 0
        while not interrupt.asked:
            step += 1
            print("step", step, flush=True)
    print("saved", flush=True)
    raise Interrupted(f"stopped by {interrupt.asked} after step {step}; the same command goes on from there")

experiment.run = run
sys.exit(__main__.main(["--config=configs/quickstart.py", "--workdir=nowhere"]))
"""

DEAF = """
import time
from atp_jax.interrupt import Interrupt

with Interrupt() as interrupt:
    print("ready", flush=True)
    while not interrupt.asked:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def running(code: str, first: str):
    """A process that has said its first line."""
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == first, child.communicate()[1]
        yield child
    finally:
        child.kill()
        child.communicate()


def test_sigterm_ends_the_command_with_status_0_and_a_line():
    with running(COMMAND, "step 1\n") as child:
        child.send_signal(signal.SIGTERM)
        *_, last, saved, line = ["step 1", *child.stdout.read().splitlines()]
        assert child.wait(60) == 0 and not child.stderr.read()
    assert saved == "saved" and line == f"stopped by SIGTERM after {last}; the same command goes on from there"


def test_a_second_sigterm_kills_a_loop_that_does_not_listen():
    with running(DEAF, "ready\n") as child:
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "asked\n"
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == -signal.SIGTERM
