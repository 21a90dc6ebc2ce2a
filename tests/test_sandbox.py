"""The tool's sandbox: what honest code gets, and that hostile code gets an error message and nothing else.

Each attack must end in an error that the model is told, the worker's memory must stay below the limit and 64 MiB, this
process must live without growing, and the next call must find a sandbox that works.
"""

import glob
import math
import os
import signal
import threading
from pathlib import Path

import pytest

from atp_jax.sandbox import Limits, Sandbox

LIMITS = Limits(seconds=0.6, memory=64, output=2000, depth=200)
MARGIN = 64  # MiB that a process may hold beyond what the code may use


def workers() -> list[int]:
    """Process ids of this process's children."""
    found = []
    for path in glob.glob("/proc/self/task/*/children"):
        try:
            found += map(int, Path(path).read_text().split())
        except OSError:  # a thread that ended meanwhile
            pass
    return found


def memory(pid: int | str, what: str) -> float:
    """MiB, by /proc/<pid>/status; 0 where there is no such process any more."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(what + ":")), 0.0)


def state(pid: int) -> str:
    """The process's state by one letter, T for stopped; Z also where there is none any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


class Watch:
    """The highest memory of any worker while it is open, those that die included."""

    def __init__(self, before: set[int]):
        self.peak, self._before, self._done = 0.0, before, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _look(self):
        while True:
            last = self._done.is_set()
            for pid in set(workers()) - self._before:
                self.peak = max(self.peak, memory(pid, "VmHWM"))
            if last:
                return
            self._done.wait(0.002)


@pytest.fixture(scope="module")
def strangers() -> set[int]:
    """Children that were there before the sandbox."""
    return set(workers())


@pytest.fixture(scope="module")
def sandbox(strangers):
    with Sandbox(LIMITS) as found:
        yield found


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(2 + 3)", "5\n"),
        ("import math\nprint(math.comb(40, 20) % 1009)", f"{math.comb(40, 20) % 1009}\n"),
        ("total = 0\nfor n in range(1, 101):\n    if n % 3 == 0:\n        total += n * n\nprint(total)", "112761\n"),
        ("print(pow(7, 12345, 1000003))", f"{pow(7, 12345, 1000003)}\n"),
        ("from math import factorial as f\nprint(f(20))", "2432902008176640000\n"),
        ("def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\nprint(fib(15))", "610\n"),
        ("print(sum(i * i for i in range(10)))\nprint('é', 'ß')", "285\né ß\n"),
        ("1 + 1", ""),
        ("", ""),
        ("# nothing", ""),
    ],
)
def test_honest_code_prints(sandbox, code, printed):
    ran = sandbox.run(code)
    assert (ran.text, ran.failed) == (printed, False)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print(1)\nprint(1 / 0)", "1\nZeroDivisionError: division by zero"),
        ("print('so far', end='')\nx", "so far\nNameError: name 'x' is not defined"),
        ("while True:\n    pass", "TimeoutError: the code ran for more than 0.6 seconds"),
        ("x = 'a' * 10**9", "MemoryError: the code needed more than 64 MiB"),
        ("print('a' * 3000)", "Error: the code printed more than 2000 bytes"),
        ("raise TimeoutError('own words')", "TimeoutError: own words"),
        ("print('\n", None),
        ("x" * 20_001, "Error: the code is longer than 20000 characters"),
        ("print('\ud800')", "SyntaxError: the code is not valid Unicode"),
    ],
)
def test_what_a_model_is_told_of_an_error(sandbox, code, text):
    ran = sandbox.run(code)
    assert ran.failed
    assert ran.text == text if text else ran.text.startswith("SyntaxError")


ATTACKS = {
    # files
    "read a file": "print(open('/etc/passwd').read())",
    "write a file": "open('/tmp/atp_jax_attack', 'w').write('x')",
    "list files": "import os\nprint(os.listdir('/'))",
    "read through pathlib": "from pathlib import Path\nprint(Path('/etc/hosts').read_text())",
    "a file of the process": "print(open('/proc/self/environ').read())",
    "a file by descriptor": "print(open(0).read())",
    "walk out of the directory": "print(open('../../../../etc/passwd').read())",
    # the environment, other processes, the network
    "the environment": "import os\nprint(os.environ)",
    "one variable": "import os\nprint(os.environ['PATH'])",
    "a shell": "import os\nos.system('id')",
    "a subprocess": "import subprocess\nprint(subprocess.run(['id']))",
    "a fork": "import os\nwhile True:\n    os.fork()",
    "a socket": "import socket\nsocket.create_connection(('127.0.0.1', 80))",
    "a download": "import urllib.request\nprint(urllib.request.urlopen('http://example.com').read())",
    "a C library": "import ctypes\nctypes.CDLL(None)",
    "threads": "import threading\nthreading.Thread(target=print).start()",
    # imports
    "import by name": "print(__import__('os').system('id'))",
    "importlib": "import importlib\nimportlib.import_module('subprocess')",
    "builtins": "import builtins\nbuiltins.open('/etc/passwd')",
    "our own package": "import atp_jax",
    "pickle": "import pickle\npickle.loads(b'cos\\nsystem\\n(S\"id\"\\ntR.')",
    # walking from an attribute to another
    "subclasses": "print(().__class__.__bases__[0].__subclasses__())",
    "globals of a function": "def f(): pass\nprint(f.__globals__)",
    "code of a function": "def f(): pass\nf.__code__ = None",
    "globals": "print(globals()['__builtins__'])",
    "frames": "import sys\nprint(sys._getframe().f_back.f_globals)",
    "traceback of an exception": "try:\n    1 / 0\nexcept Exception as e:\n    print(e.__traceback__.tb_frame)",
    "format string walk": "print('{0.__class__.__mro__}'.format(1))",
    "format map walk": "print('{x.__init__.__globals__}'.format_map({'x': print}))",
    "getattr walk": "print(getattr(getattr(1, '__class__'), '__base__'))",
    "eval with builtins": "eval(\"__import__('os').system('id')\")",
    "exec with builtins": "exec(\"import subprocess\\nsubprocess.run('id')\")",
    # memory
    "a long string": "x = 'a' * 10**10",
    "a long list": "x = [0] * 10**9",
    "a growing list": "x = []\nwhile True:\n    x.append(x[:])",
    "a growing string": "x = 'a'\nwhile True:\n    x += x",
    "a growing dict": "x = {i: str(i) for i in range(10**8)}",
    "a joined string": "x = ''.join(['a' * 1000] * 10**6)",
    "a split string": "x = ('a,' * 10**7).split(',')",
    "a printed tree of one list": "a = [0] * 1000\nfor i in range(20):\n    a = [a] * 1000\nprint(a)",
    "a sorted range": "sorted(range(10**8))",
    "an endless iterator": "import itertools\nlist(itertools.repeat(1))",
    "memory, caught": "while True:\n    try:\n        x = ['a' * 10**7] * 10**7\n    except Exception: pass",
    # time
    "an endless loop": "while True:\n    pass",
    "an endless loop, caught": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "a generator without end": "sum(1 for _ in iter(int, 1))",
    "a long product": "import itertools\nn = sum(1 for _ in itertools.product(range(1000), repeat=6))",
    "a loop of sleeps": "import time\nwhile True:\n    time.sleep(1)",
    "a coroutine without end": "import asyncio\nasync def f():\n    while True: await asyncio.sleep(0)\nawait f()",
    # huge integers
    "a power tower": "print(9 ** 9 ** 9 ** 9)",
    "a shift": "print(1 << 10**12)",
    "a factorial": "import math\nprint(math.factorial(10**8))",
    "a binomial": "import math\nprint(math.comb(10**8, 5 * 10**7))",
    "squares of squares": "x = 3\nwhile True:\n    x = x * x",
    "digits of a huge number": "print(str(10 ** 1000000))",
    "a number of many digits": "int('9' * 10**7)",
    # floods of output
    "an output flood": "while True:\n    print('a' * 1000)",
    "a flood of short lines": "for i in range(10**7):\n    print(i)",
    "one huge line": "print('a' * 10**7)",
    "a flood of nothing": "while True:\n    print(end='')",
    "a wide format": "print(f'{1:>1000000000}')",
    "a wide old format": "print('%1000000000d' % 1)",
    # recursion
    "endless recursion": "def f(n):\n    return f(n + 1)\nf(0)",
    "recursion, caught": "def f():\n    try:\n        f()\n    finally:\n        f()\nf()",
    "recursion by a special method": "class A:\n    def __repr__(self): return repr(self)\nprint(A())",
    "recursion of a lambda": "(lambda f: f(f))(lambda f: f(f))",
    "deep brackets": "(" * 9000 + ")" * 9000,
    "many signs": "-" * 19_000 + "1",
    "deep JSON": "import json\njson.loads('[' * 100000)",
    "a deep list, compared": "x = y = 0\nfor i in range(10**5):\n    x = [x]\n    y = [y]\nprint(x == y)",
    # generators and odd syntax
    "a generator function": "def g():\n    while True:\n        yield 1\nsum(g())",
    "a walrus in a comprehension": "print([y := i for i in range(10**9)])",
    "fullwidth underscores": "print(＿＿import＿＿('os'))",
    "letters that look like others": "print(оpen('/etc/passwd'))",
    "a null in the code": "print(1)\0import os",
    "direction marks": "print('a\u202e') ; import os\u202e",
    "a form feed": "\fimport subprocess",
    # ending the worker
    "exit": "import sys\nsys.exit(0)",
    "exit by name": "exit()",
    "exit at once": "import os\nos._exit(0)",
    "kill": "import os\nos.kill(os.getpid(), 9)",
    "abort": "import os\nos.abort()",
    "a signal": "import signal\nsignal.raise_signal(9)",
    "system exit": "raise SystemExit",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "asking for input": "print(input())",
}


def test_there_are_as_many_attacks_as_were_asked_for():
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_a_message(sandbox, strangers, name):
    sandbox.run("")  # a worker is there
    held = memory("self", "VmRSS")
    with Watch(strangers) as watch:
        ran = sandbox.run(ATTACKS[name])
    assert ran.failed, ran.text
    assert ran.text.splitlines()[-1].strip() and len(ran.text.encode()) <= LIMITS.output + 200
    assert "root:" not in ran.text and "uid=" not in ran.text
    assert 0 < watch.peak < LIMITS.memory + MARGIN
    assert memory("self", "VmRSS") - held < MARGIN
    assert not os.path.exists("/tmp/atp_jax_attack")
    assert sandbox.run("print(6 * 7)").text == "42\n"
    assert len(set(workers()) - strangers) == 1


def test_nothing_passes_from_one_call_to_the_next(sandbox):
    sandbox.run("x = 5\nimport math\nmath.pi = 3\ndef print(*a): pass")
    assert sandbox.run("x").text == "NameError: name 'x' is not defined"
    assert sandbox.run("import math\nprint(math.pi > 3.1)").text == "True\n"


def test_the_same_code_prints_the_same(sandbox):
    """Clock and random numbers included: a recorded run can be read again."""
    code = "import random, time, datetime\nprint(random.random(), time.time(), datetime.datetime.now())"
    first = sandbox.run(code)
    with Sandbox(LIMITS) as other:
        assert other.run(code) == first and not first.failed


@pytest.mark.parametrize("blow", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_hangs_or_died_is_replaced(strangers, blow):
    """A stopped worker answers nothing, whatever its own limits say: it is killed from outside."""
    others = set(workers())
    with Sandbox(Limits(seconds=1.0)) as sandbox:
        assert sandbox.run("print(1)").text == "1\n"
        (worker,) = set(workers()) - others
        os.kill(worker, blow)
        while state(worker) not in "TZ":  # the signal takes a moment to arrive
            pass
        ran = sandbox.run("print(2)")
        assert ran.text in ("Error: the tool stopped while it ran the code", "2\n")
        assert (ran.text == "2\n") <= (blow == signal.SIGKILL)  # the dead may have been noticed in time
        assert sandbox.run("print(3)").text == "3\n"
        assert worker not in workers()
    assert set(workers()) <= others


def test_a_thousand_calls_leak_nothing(sandbox, strangers):
    """Neither processes nor descriptors, with errors and a worker that dies among them."""
    codes = [f"print({n})" for n in range(7)] + ["1 / 0", "def f(:", "x = 'a' * 10**9"]
    for code in codes + [ATTACKS["a joined string"]]:
        sandbox.run(code)
    sandbox.run("")
    processes, descriptors = len(workers()), len(os.listdir("/proc/self/fd"))
    held = memory("self", "VmRSS")
    for n in range(1000):
        sandbox.run(ATTACKS["a joined string"] if n % 100 == 50 else codes[n % len(codes)])
    sandbox.run("")
    assert (len(workers()), len(os.listdir("/proc/self/fd"))) == (processes, descriptors)
    assert memory("self", "VmRSS") - held < MARGIN
    assert len(set(workers()) - strangers) == 1


def test_a_sandbox_that_is_forgotten_ends_its_worker():
    before = set(workers())
    sandbox = Sandbox(LIMITS)
    sandbox.run("print(1)")
    assert set(workers()) > before
    del sandbox
    assert set(workers()) <= before


def test_closed_and_opened_again():
    sandbox = Sandbox(LIMITS)
    assert sandbox.run("print(1)").text == "1\n"
    sandbox.close()
    sandbox.close()
    assert sandbox.run("print(2)").text == "2\n"
    sandbox.close()
