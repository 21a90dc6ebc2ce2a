"""Several processes that run this program as one.

Every process runs the same program on the same prompts, pairs and rewards and holds its devices' part of every array
(parallel.py). Process 0 alone prints and writes text files, and it alone reads them: what it finds in the workdir it
tells the others (`share`), so that all decide alike whatever a shared disk shows to whom and when.

Beside the connections of JAX, each process keeps one to process 0, from before JAX has any. It carries those texts, the
word that somebody was asked to stop, and the end: an error in one process ends all with the same exit status, shown
once; a process that dies closes its connection, which the others notice at once, also while they wait for it inside a
computation, or for a third one to start. Of a process that never came nobody can know why: it is waited for START
seconds. A host that vanishes without closing anything is given up after about half a minute (TCP), a process that hangs
after HEARTBEAT seconds (JAX, which then aborts).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import re
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from atp_jax.errors import UserError

START = 300  # seconds for all processes to come up
HEARTBEAT = 40  # seconds without a sign of life until JAX gives a process up
GRACE = 2  # seconds from a first error to the end: for what else is heard, which may be its cause
LAST = 20  # seconds that a process with an error waits to be told the end
# What a message is: a text of process 0, a word to it, an error, the end (a status), farewell.
TEXT, WORD, ERROR, END, BYE = b"T", b"W", b"E", b"X", b"B"


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the processes find each other: address host:port of process 0, how many there are, which one this is, and
    which of the host's devices are its own (None: all). An empty coordinator: JAX asks the TPU's metadata."""

    coordinator: str
    count: int = 0
    index: int = 0
    devices: tuple[int, ...] | None = None


def find(coordinator: str | None, count: str | None, index: str | None, environ: Mapping[str, str]) -> Launch | None:
    """How this process was started; None: alone. The arguments are the values of the command line's flags.

    Each flag that is missing is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (in an indexed
    Job of Kubernetes from JOB_COMPLETION_INDEX). Where none is set: a step of SLURM with several tasks, then a TPU
    VM. UserError for values that make no sense or are only given in part.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    count = count or environ.get("JAX_NUM_PROCESSES")
    index = index or environ.get("JAX_PROCESS_ID") or (environ.get("JOB_COMPLETION_INDEX") if count else None)
    if coordinator or count or index:
        total = _number("processes", count or "1")
        if total == 1:
            return None
        given = {"coordinator": coordinator, "process_id": index}
        if missing := [name for name, value in given.items() if not value]:
            raise UserError(f"--processes={total} needs --{missing[0]} as well, or its variable; see --help")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator must be host:port of process 0, found {coordinator!r}")
        if (place := _number("process_id", index)) >= total:
            raise UserError(f"--process_id={place} must be below --processes={total}")
        return Launch(coordinator, total, place)
    if int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _of_slurm(environ)
    chips = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    if chips and util.find_spec("libtpu") and environ.get("JAX_PLATFORMS", "tpu") != "cpu":
        return Launch("")
    return None


def _number(flag: str, value: str) -> int:
    if not str(value).isdigit():
        raise UserError(f"--{flag} must be a whole number, found {value!r}")
    return int(value)


def _of_slurm(environ: Mapping[str, str]) -> Launch:
    """A task of srun. The first host of the step is the coordinator; a task that has its host for itself has all its
    devices, one of several on a host has the one of its own number."""
    nodes = environ["SLURM_STEP_NODELIST"]  # a01 | a01,b07 | a[01,04-07],b07 | a[1-2]n[01-07]
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]
    count, port = int(environ["SLURM_STEP_NUM_TASKS"]), 61000 + int(environ["SLURM_JOB_ID"]) % 4000
    shared = count > int(environ.get("SLURM_STEP_NUM_NODES", count))
    own = (int(environ["SLURM_LOCALID"]),) if shared else None
    return Launch(f"{first}:{port}", count, int(environ["SLURM_PROCID"]), own)


class _Line:
    """One connection: whole messages, one writer at a time."""

    def __init__(self, connection: socket.socket):
        self._socket, self._lock = connection, threading.Lock()
        options = {
            "SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": 30_000,  # milliseconds; while something is on its way nothing else asks for a sign
            "TCP_NODELAY": 1,  # messages are small
        }  # fmt: skip
        for name, value in options.items():  # not all of them are everywhere
            if hasattr(socket, name):
                level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
                connection.setsockopt(level, getattr(socket, name), value)

    def send(self, kind: bytes, content: bytes = b"") -> None:
        with self._lock:
            self._socket.sendall(kind + struct.pack(">Q", len(content)) + content)

    def receive(self) -> tuple[bytes, bytes]:
        """(kind, content). OSError when the other end is gone."""
        kind, length = struct.unpack(">cQ", self._exactly(9))
        return kind, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            part = self._socket.recv(min(count - len(found), 1 << 20))
            if not part:
                raise ConnectionError("closed")
            found += part
        return bytes(found)


class _Member:
    """The end of the line at a process other than 0."""

    def __init__(self, index: int, line: _Line):
        self.index, self._line = index, line
        self._texts: queue.SimpleQueue = queue.SimpleQueue()
        self._left = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                kind, content = self._line.receive()
                if kind == TEXT:
                    self._texts.put(content)
                elif kind == END:
                    leave(content[0], content[1:].decode())
                else:
                    self._left.set()
        except OSError:
            if not self._left.is_set():
                leave(1, died(0))

    def share(self, make: Callable[[], bytes]) -> bytes:
        return self._texts.get()

    def first(self, word: str) -> str:
        self._tell(WORD, word.encode())
        return self._texts.get().decode()

    def fail(self, status: int, message: str) -> None:
        self._tell(ERROR, bytes([status]) + message.encode(errors="replace"))
        time.sleep(LAST)
        leave(status, message)

    def close(self) -> None:
        self._tell(BYE)
        self._left.wait()

    def _tell(self, kind: bytes, content: bytes = b"") -> None:
        try:
            self._line.send(kind, content)
        except OSError:
            time.sleep(LAST)  # the listener sees the same, and knows whether it was the end
            leave(1, died(0))


@dataclasses.dataclass(frozen=True)
class _Failure:
    died: bool
    process: int
    status: int
    message: str


class _Leader:
    """Process 0, with a line to each of the others."""

    index = 0

    def __init__(self):
        self._lines: dict[int, _Line] = {}
        self._words: dict[int, queue.SimpleQueue] = {}
        self._left: dict[int, threading.Event] = {}
        self._failures: list[_Failure] = []

    def add(self, place: int, line: _Line) -> None:
        """Process `place` has come, and is listened to from here on."""
        self._words[place], self._left[place] = queue.SimpleQueue(), threading.Event()
        self._lines[place] = line
        threading.Thread(target=self._listen, args=(place,), daemon=True).start()

    def here(self) -> set[int]:
        return set(self._lines)

    def _listen(self, place: int) -> None:
        try:
            while True:
                kind, content = self._lines[place].receive()
                if kind == WORD:
                    self._words[place].put(content.decode())
                elif kind == BYE:
                    self._left[place].set()
                else:
                    self._end(_Failure(False, place, content[0], content[1:].decode()))
        except OSError:
            if not self._left[place].is_set():
                self._end(_Failure(True, place, 1, died(place)))

    def share(self, make: Callable[[], bytes]) -> bytes:
        content = make()
        self._tell(TEXT, content)
        return content

    def first(self, word: str) -> str:
        words = [word, *(self._words[place].get() for place in self._lines)]
        found = next((word for word in words if word), "")
        self._tell(TEXT, found.encode())
        return found

    def fail(self, status: int, message: str) -> None:
        self._end(_Failure(False, 0, status, message))

    def close(self) -> None:
        for left in self._left.values():
            left.wait()
        self._tell(BYE)

    def _tell(self, kind: bytes, content: bytes = b"") -> None:
        for line in list(self._lines.values()):  # others may be coming
            try:
                line.send(kind, content)
            except OSError:
                pass  # its listener sees the same

    def _end(self, failure: _Failure) -> None:
        """Does not return. The first one heard of is shown, but for a death, which is what others' errors come of."""
        self._failures.append(failure)
        time.sleep(GRACE)
        if self._failures[0] is not failure:
            time.sleep(LAST)  # whoever was first ends it
        first = min(self._failures, key=lambda one: not one.died)
        own = any(one.process == 0 and one.message == first.message for one in self._failures)
        message = first.message
        if not own and not first.died:
            message = f"error: process {first.process}: " + message.removeprefix("error: ")
        self._tell(END, bytes([first.status]))
        time.sleep(GRACE / 4)  # the others go first: JAX's service ends with this process, and their logs would say so
        leave(first.status, message)


_here: _Member | _Leader | None = None


def connect(launch: Launch) -> None:
    """Joins the other processes, before anything else asks JAX for its devices. UserError where they do not come."""
    global _here
    # JAX would take SIGTERM for itself; here it is heard by interrupt.py, and the others are told (`first`).
    jax.config.update("jax_enable_preemption_service", False)
    where = f"{launch.count} processes at {launch.coordinator}" if launch.coordinator else "processes of this TPU"

    def late() -> None:  # JAX itself would abort the process with a trace
        message = f"error: the {where} did not come together within {START} s"
        if isinstance(_here, _Leader) and (missing := set(range(1, launch.count)) - _here.here()):
            message += f"; missing: {', '.join(map(str, sorted(missing)))}"
        if _here is not None:
            _here.fail(2, message)
        leave(2, message)

    waited = threading.Timer(START, late)
    waited.start()
    try:
        asked = {"initialization_timeout": 2 * START, "heartbeat_timeout_seconds": HEARTBEAT}
        if launch.coordinator:
            asked |= {"coordinator_address": _meet(launch), "num_processes": launch.count, "process_id": launch.index}
            asked |= {"local_device_ids": launch.devices, "cluster_detection_method": "deactivate"}
        jax.distributed.initialize(**asked)
        if _here is None and jax.process_count() > 1:
            _meet_by_devices()
        jax.local_devices()  # what is wrong with them is said here
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the {where} cannot join: {str(error).partition(chr(10))[0]}") from error
    finally:
        waited.cancel()


def _meet(launch: Launch) -> str:
    """Lines between process 0 and all others, at the coordinator's address. -> the address for JAX's own service."""
    global _here
    host, _, port = launch.coordinator.rpartition(":")
    if launch.index:
        _here = _follow(host.strip("[]"), int(port), launch.index, launch.coordinator)
    else:
        _here = _Leader()
        with _serve(int(port)) as server:
            _gather(_here, server, launch.count, launch.coordinator)

    def free() -> bytes:
        with _serve(0) as server:
            return f"{host}:{server.getsockname()[1]}".encode()

    return share(free).decode()


def _meet_by_devices() -> None:
    """The same where JAX found the others by itself: process 0 says through the devices where it waits."""
    global _here
    room = np.zeros(512, np.uint8)
    if jax.process_index() == 0:
        _here = _Leader()
        with _serve(0) as server:
            token = secrets.token_hex(16)
            content = json.dumps([socket.gethostname(), server.getsockname()[1], token]).encode()
            room[: len(content)] = np.frombuffer(content, np.uint8)
            multihost_utils.broadcast_one_to_all(room)
            _gather(_here, server, jax.process_count(), token)
        return
    host, port, token = json.loads(bytes(multihost_utils.broadcast_one_to_all(room)).rstrip(b"\0"))
    _here = _follow(host, port, jax.process_index(), token)


def _serve(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=128, dualstack_ipv6=dual)


def _gather(leader: _Leader, server: socket.socket, count: int, token: str) -> None:
    """Returns when all others have come; whoever does not know the token is none of them, and told so. UserError where
    two say that they are the same one."""
    while len(leader.here()) < count - 1:
        connection, _ = server.accept()
        connection.settimeout(10)
        line = _Line(connection)
        try:
            said, _, place = line.receive()[1].rpartition(b" ")
            place = int(place)
        except (OSError, ValueError):
            said = b""
        wrong = None
        if not secrets.compare_digest(said, token.encode()):
            wrong = "error: process 0 was started with another --coordinator, or is of another run"
        elif not 0 < place < count:
            wrong = f"error: process 0 was started with --processes={count}, and this is --process_id={place}"
        if wrong:
            with contextlib.suppress(OSError):  # a stranger does not wait for it
                line.send(END, bytes([2]) + wrong.encode())
            connection.close()
            continue
        if place in leader.here():
            line.send(END, bytes([2]))
            raise UserError(f"two processes say --process_id={place}; each needs its own, from 0 to {count - 1}")
        connection.settimeout(None)
        leader.add(place, line)


def _follow(host: str, port: int, index: int, token: str) -> _Member:
    """The line to process 0, which may come later than this one."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            break
        except OSError:
            time.sleep(0.5)
    connection.settimeout(None)
    line = _Line(connection)
    line.send(TEXT, f"{token} {index}".encode())
    return _Member(index, line)


def count() -> int:
    """How many processes run this program together."""
    return 1 if _here is None else jax.process_count()


def leads() -> bool:
    """Whether this process prints and writes text files."""
    return _here is None or _here.index == 0


def share(make: Callable[[], bytes]) -> bytes:
    """What `make` gives in process 0, in every process. Called by all, in the same order."""
    return make() if _here is None else _here.share(make)


def first(word: str) -> str:
    """The first word of all processes' that is not empty; empty where all are. Called by all, in the same order."""
    return word if _here is None else _here.first(word)


def wait() -> None:
    """Returns when all processes have come here."""
    first("")


def alike(what: str, content: str) -> None:
    """UserError where this process' `content` is not that of process 0; `what` says in the message what differs."""
    own = hashlib.sha256(content.encode()).digest()
    if share(lambda: own) != own:
        raise UserError(f"{what} is not the same as in process 0; all processes must be started alike")


def end(status: int, message: str) -> int:
    """The program's last words. With status 0 all processes leave together; otherwise the first error of any ends all,
    is shown once, and this does not return where there are several processes. -> the exit status."""
    if _here is None:
        if message:
            print(message, file=sys.stderr)
        return status
    if status:
        _here.fail(status, message)
    _here.close()
    return status


def died(process: int) -> str:
    """What is said of a process that is gone without a word."""
    return f"error: process {process} died; all others stopped, and the same command goes on from what was saved"


def leave(status: int, message: str = "") -> None:
    """Ends this process from whatever thread, whatever the others are waiting for."""
    if message:
        print(message, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(status)
