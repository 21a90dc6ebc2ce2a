"""Several processes are one run: the same results, one error shown once, nobody left behind when one dies."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_run

from atp_jax import processes
from atp_jax.__main__ import main
from atp_jax.errors import UserError

HERE = Path(__file__).resolve().parent
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "8001",
         "SLURM_STEP_NUM_NODES": "4"}  # fmt: skip
FOUND = processes.Launch("host:12", 4, 2)


@pytest.mark.parametrize(
    ("flags", "variables", "expected"),
    [
        (("host:12", "4", "2"), {}, FOUND),
        ((None, None, "2"), {"JAX_COORDINATOR_ADDRESS": "host:12", "JAX_NUM_PROCESSES": "4"}, FOUND),
        (
            (None, None, None),
            {"JAX_COORDINATOR_ADDRESS": "host:12", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"},
            FOUND,
        ),
        ((None, None, None), {"JAX_PLATFORMS": "cpu"}, None),
        ((None, None, None), {"JOB_COMPLETION_INDEX": "2", "JAX_PLATFORMS": "cpu"}, None),  # one Job of many, alone
        ((None, "1", None), {}, None),
        ((None, None, None), SLURM | {"SLURM_STEP_NODELIST": "a01"}, processes.Launch("a01:61001", 4, 2)),
        ((None, None, None), SLURM | {"SLURM_STEP_NODELIST": "a01,b[2-3]"}, processes.Launch("a01:61001", 4, 2)),
        ((None, None, None), SLURM | {"SLURM_STEP_NODELIST": "a[07,09-11]"}, processes.Launch("a07:61001", 4, 2)),
        ((None, None, None), SLURM | {"SLURM_STEP_NODELIST": "a[07-10],b1"}, processes.Launch("a07:61001", 4, 2)),
        ((None, None, None), SLURM | {"SLURM_STEP_NODELIST": "a[1-2]n[03-10]"}, processes.Launch("a1n03:61001", 4, 2)),
        (
            (None, None, None),
            SLURM | {"SLURM_STEP_NODELIST": "a01", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "3"},
            processes.Launch("a01:61001", 4, 2, (3,)),
        ),
        ((None, None, None), SLURM | {"SLURM_STEP_NUM_TASKS": "1", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_how_a_process_was_started(flags, variables, expected):
    assert processes.find(*flags, variables) == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((None, "4", "1"), "--processes=4 needs --coordinator"),
        (("host:1", "4", None), "needs --process_id"),
        (("host", "4", "1"), "must be host:port"),
        (("host:1", "4", "4"), "--process_id=4 must be below --processes=4"),
        (("host:1", "four", "1"), "--processes must be a whole number, found 'four'"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        processes.find(*flags, {})


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    return os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": path}


def start(count: int, code: str, devices: int = 1, *more: str) -> list[subprocess.Popen]:
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(count), str(place), *more], env=environment(devices),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for place in range(count)
    ]  # fmt: skip


def ended(group: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit statuses and what each said on stderr."""
    try:
        said = [process.communicate(timeout=120)[1] for process in group]
        return [process.returncode for process in group], said
    finally:
        for process in group:
            process.kill()


JOINED = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from atp_jax import parallel, processes

processes.connect(processes.find(*sys.argv[1:], {}))
me = jax.process_index()
mesh = parallel.make_mesh()
"""

AGREE = """
whole = np.arange(24.0, dtype=np.float32).reshape(6, 4)
placed = parallel.put({"x": whole, "y": jnp.asarray(whole)}, parallel.batch_sharding(mesh))
assert placed["x"].addressable_shards[0].data.shape == (1, 4)
doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))(placed)
for value in parallel.fetch(doubled).values():
    np.testing.assert_array_equal(value, 2 * whole)
assert float(jax.jit(jnp.sum)(placed["x"])) == whole.sum()
# What each process would say is different; what all hear is what process 0 says.
assert processes.share(lambda: b"%d" % me) == b"0" and processes.leads() == (me == 0) and processes.count() == 3
assert processes.first("") == "" and processes.first("from 2" if me == 2 else "") == "from 2"
assert processes.first("from 0" if me == 0 else "later") == "from 0"
processes.alike("this", "the same")
big = bytes(range(256)) * 20_000
assert processes.share(lambda: big) == big
try:
    processes.alike("that", "mine" if me == 1 else "ours")
    assert me != 1
except processes.UserError as error:
    assert me == 1 and "that is not the same as in process 0" in str(error)
sys.exit(processes.end(0, ""))
"""


def test_what_all_processes_agree_on_and_leave_together():
    """Arrays over three processes x two devices, texts, words, a difference that is noticed."""
    statuses, said = ended(start(3, JOINED + AGREE, devices=2))
    assert statuses == [0, 0, 0], said


# Process 1 has an error at once, or all have the same; the others wait for it inside a computation.
FAILS = """
def work():
    if me == 1 or {everybody}:
        {fails}
    for _ in range(2):
        jax.block_until_ready(jax.jit(jnp.sum)(parallel.put(np.ones(4), parallel.batch_sharding(mesh))))
    return 0, ""

try:
    end = work()
except Exception as error:  # what a computation says whose other half is gone
    end = 1, str(error)
sys.exit(processes.end(*end))
"""


@pytest.mark.parametrize(
    ("everybody", "fails", "status", "said"),
    [
        (False, 'return 2, "error: disk full"', 2, "error: process 1: disk full\n"),
        (True, 'return 2, "error: no such file"', 2, "error: no such file\n"),
        (False, "os.kill(os.getpid(), signal.SIGKILL)", 1, processes.died(1) + "\n"),
    ],
)
def test_the_first_error_is_shown_once_and_ends_all(everybody, fails, status, said):
    statuses, errors = ended(start(2, JOINED + FAILS.format(everybody=everybody, fails=fails)))
    assert statuses[0] == status and statuses[1] == (-signal.SIGKILL if "SIGKILL" in fails else status)
    assert errors == [said, ""]


DEAD_LEADER = """
if me == 0:
    os.kill(os.getpid(), signal.SIGKILL)
processes.share(lambda: b"")
"""


def test_without_process_0_the_others_say_so_and_leave():
    """The coordination service dies with process 0 and may log a line of its own, before ours or after."""
    statuses, errors = ended(start(2, JOINED + DEAD_LEADER))
    assert statuses == [-signal.SIGKILL, 1] and processes.died(0) in errors[1].splitlines()


NEVER = """
import sys
from atp_jax import processes
processes.START = 3
processes.connect(processes.find(sys.argv[1], "3", {index}, {{}}))
"""


@pytest.mark.parametrize(("index", "missing"), [("0", "; missing: 1, 2"), ("1", "")])
def test_processes_that_never_come_are_not_waited_for_forever(index, missing):
    """Only one of three is started."""
    statuses, errors = ended(start(1, NEVER.format(index=repr(index))))
    assert statuses == [2] and errors[0].endswith(f"did not come together within 3 s{missing}\n")


# Four are to come, three do: the second dies as soon as process 0 knows it, or has no device, or says it is the third.
COMING = """
import os, signal, sys, time
if {without_device} and sys.argv[3] == "1":
    os.environ["JAX_PLATFORMS"] = "abacus"
from atp_jax import processes

follow = processes._follow
def dying(host, port, index, token):
    found = follow(host, port, {index}, token)
    {then}
    return found
processes._follow = dying
try:
    processes.connect(processes.find(sys.argv[1], "{count}", sys.argv[3], {{}}))
except processes.UserError as error:
    sys.exit(processes.end(2, f"error: {{error}}"))
"""
# It waits for the third, which else would come too late to be told.
DYING = """
    there = os.path.join(sys.argv[4], "third")
    if index == 2: open(there, "w").close()
    while index == 1 and not os.path.exists(there): time.sleep(0.1)
    if index == 1: time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("change", "statuses", "said"),
    [
        ({"then": DYING}, [1, -signal.SIGKILL, 1], processes.died(1)),
        ({"count": 3, "without_device": True}, [2, 2, 2], "error: process 1: the 3 processes at"),
        ({"index": 2}, [2, 2, 2], "error: two processes say --process_id=2; each needs its own, from 0 to 3"),
    ],
    ids=["died", "no device", "twice"],
)
def test_what_goes_wrong_before_all_have_come_is_told_to_those_that_have(tmp_path, change, statuses, said):
    """At once, while they wait for one that never comes (START seconds), or for all others to find their devices."""
    code = COMING.format(**{"count": 4, "index": "index", "then": "pass", "without_device": False} | change)
    found, errors = ended(start(3, code, 1, str(tmp_path)))
    assert found == statuses and errors[0].startswith(said) and errors[0].count("\n") == 1
    assert errors[1:] == ["", ""]


def test_whoever_is_none_of_the_processes_is_not_waited_for():
    """A stranger at the port, one that knows nothing, one that says too little: the right one comes after them."""
    leader = processes._Leader()
    with processes._serve(0) as server:
        port = server.getsockname()[1]
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        strangers[0].close()
        processes._Line(strangers[1]).send(processes.TEXT, "wrong é 1".encode())
        processes._Line(strangers[2]).send(processes.TEXT, b"token")
        member = processes._follow("127.0.0.1", port, 1, "token")
        processes._gather(leader, server, 2, "token")
    assert leader.here() == {1}
    assert leader.share(lambda: b"said") == member.share(lambda: b"") == b"said"
    if hasattr(
        socket, "TCP_USER_TIMEOUT"
    ):  # else what was sent to a host that vanished is tried for a quarter of an hour
        assert member._line._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
    for stranger, said in ((strangers[1], b"another --coordinator"),):
        assert said in stranger.recv(200)
    member._left.set()  # the test's end is no death
    leader._left[1].set()
    for stranger in strangers:
        stranger.close()


# Only process 1 is asked to stop, after the first of two steps.
STOPPED = """
from pathlib import Path
import sharded, small_models
from atp_jax.align import loop
from atp_jax.interrupt import Interrupted
from atp_jax.model import Model
from atp_jax.settings import AlignSettings, LoraSettings

config, _, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=mesh)
model = Model(config, None, params, mesh)
align = AlignSettings(rows=4, check_every=1000, save_every=1000, lora=LoraSettings(rank=2))

def train(name, said):
    method = sharded.dpo(model, sharded.draw_pairs())
    folder = Path(sys.argv[4]) / name
    processes.leads() and folder.mkdir(exist_ok=True)
    processes.wait()
    found = loop.train(method, model, align, 0, folder, {}, lambda *_: 0.0, said)
    assert found.steps == 2
    return [x.tobytes() for x in jax.tree.leaves(parallel.fetch((found.model.lora.a, found.model.lora.b)))]

def ask(line):
    if me == 1 and "loss" in line:
        os.kill(os.getpid(), signal.SIGTERM)

whole = train("whole", lambda line: None)
try:
    train("stopped", ask)
    end = 1, "nobody heard it"
except Interrupted as stopped:
    print(stopped)
    end = 0, ""
seen = []
assert train("stopped", seen.append) == whole and [line["step"] for line in seen if "loss" in line] == [2]
sys.exit(processes.end(*end))
"""


def test_sigterm_to_one_process_has_all_save_and_go_on_from_there(tmp_path):
    """Training: every process leaves it after the same step, and what goes on ends with the same adapter."""
    group = start(2, JOINED.replace("*sys.argv[1:]", "*sys.argv[1:4]") + STOPPED, 1, str(tmp_path))
    said = [process.communicate(timeout=600) for process in group]
    assert [process.returncode for process in group] == [0, 0], said
    assert all("stopped by SIGTERM after step 1 of dpo" in out for out, _ in said), said


# The command; process 1 is asked to stop after the third line of metrics.
ASKED = """
import os, signal, sys
from atp_jax import __main__, experiment

append, lines = experiment.append, 0

def told(path, new):
    global lines
    append(path, new)
    lines += len(new)
    if "--process_id=1" in sys.argv and lines == 3:
        os.kill(os.getpid(), signal.SIGTERM)

experiment.append = told
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_sigterm_to_one_process_ends_the_command_in_all_and_the_same_command_resumes(tmp_path, monkeypatch):
    arguments, ends = small_run.arguments(tmp_path, tmp_path / "run"), []
    for code in (ASKED, ASKED.replace("lines == 3", "False")):
        address = f"127.0.0.1:{free_port()}"
        group = [
            subprocess.Popen(
                [sys.executable, "-c", code, *arguments, f"--coordinator={address}", "--processes=2",
                 f"--process_id={place}"],
                cwd=small_run.ROOT, env=environment(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for place in range(2)
        ]  # fmt: skip
        ends.append([process.communicate(timeout=300) for process in group])
        assert [process.returncode for process in group] == [0, 0], ends[-1]
    (stopped, _), (finished, _) = ends
    assert "stopped by SIGTERM after round" in stopped[0] and "stopped" not in finished[0]
    assert ends[0][1][0] == ends[1][1][0] == ""  # process 1 prints nothing
    monkeypatch.chdir(small_run.ROOT)
    assert main(small_run.arguments(tmp_path, tmp_path / "alone")) == 0
    results = [(tmp_path / name / "results.json").read_bytes() for name in ("run", "alone")]
    assert results[0] == results[1]


# A state of training on one mesh; what it holds does not depend on the mesh.
STATE = """
import os, sys
from pathlib import Path
import jax, numpy as np
import small_models
from atp_jax import parallel, processes
from atp_jax.align.update import init_state, make_optimiser
from atp_jax.checkpoint import Checkpoints
from atp_jax.models import huggingface

if sys.argv[2] != "1":
    processes.connect(processes.find(*sys.argv[1:4], {}))
mesh = parallel.make_mesh(*eval(os.environ["MESH"]))
directory, noise = small_models.FIXTURES / "qwen3", np.random.default_rng(0)

read = 0
class Counting(huggingface._Weights):
    def slices(self, name):
        stored = super().slices(name)
        class Slice:
            get_shape, get_dtype = stored.get_shape, stored.get_dtype
            def __getitem__(self, index):
                global read
                part = stored[index]
                read += part.nbytes
                return part
        return Slice()
huggingface._Weights = Counting

_, _, params = small_models.load(directory, mesh=mesh)
own = [shard for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
distinct = {(shard.data.shape, str(shard.index), shard.data.nbytes, id(leaf))
            for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards}
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
assert read == sum(nbytes for _, _, nbytes, _ in distinct), (read, whole)
print("read", read, "of", whole)

def filled(x):
    value = noise.normal(size=x.shape).astype(x.dtype) if x.ndim else np.asarray(7, x.dtype)
    return parallel.put(value, x.sharding)

state = jax.tree.map(filled, init_state(params, make_optimiser(1e-3, "linear", 10)))
empty = jax.tree.map(lambda x: parallel.put(np.zeros(x.shape, x.dtype), x.sharding), state)
with Checkpoints(Path(os.environ["WHERE"]), {"seed": 1}) as checkpoints:
    found = checkpoints.latest(empty)
    if found is not None:
        step, restored, extra = found
        assert extra == {"looks": [step]}
        for here, there, place in zip(*map(jax.tree.leaves, (state, restored, empty)), strict=True):
            assert there.sharding == place.sharding
            assert parallel.fetch(here).tobytes() == parallel.fetch(there).tobytes()
        print("restored", step)
    checkpoints.save(0 if found is None else step + 1, state, {"looks": [0 if found is None else step + 1]})
sys.exit(processes.end(0, ""))
"""


def test_saved_on_one_mesh_restored_on_another_bit_for_bit_each_reading_only_its_own(tmp_path):
    """8 devices -> 2 processes -> 2 devices: weights, optimiser and counters; and how much of the weights is read."""
    told = []
    for count, devices, mesh in ((1, 8, (2, 2, 2)), (2, 1, (1, 1, 2)), (1, 2, (1, 2, 1))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WHERE", str(tmp_path / "checkpoints"))
            patch.setenv("MESH", str(mesh))
            group = start(count, STATE, devices)
        said = [process.communicate(timeout=200) for process in group]
        assert [process.returncode for process in group] == [0] * count, said
        told.append([out for out, _ in said])
    assert "restored 0" in told[1][0] and "restored 1" in told[2][0]
    read = [[int(number) for number in line.split()[1::2]] for line in told[1][0].splitlines() if "read" in line]
    assert read[0][0] < 0.6 * read[0][1]  # one of two shards of `tensor`, and the norms


# Every stage of the quickstart.
CHANGES = {"evolve.controls": ("none", "no_history"), "evolve.probe": (0, 1)}


def run(folder: Path, workdir: Path, count: int, devices: int) -> list[subprocess.Popen]:
    """The command in `count` processes, each with its stdout and stderr in a file beside the workdir."""
    address, group = f"127.0.0.1:{free_port()}", []
    for place in range(count):
        own = [f"--coordinator={address}", f"--processes={count}", f"--process_id={place}"] if count > 1 else []
        command = small_run.pipeline(folder, workdir)
        with (
            workdir.with_suffix(f".out{place}").open("a") as out,
            workdir.with_suffix(f".err{place}").open("a") as err,
        ):
            group.append(
                subprocess.Popen(
                    command + own, cwd=small_run.ROOT, env=environment(devices), stdout=out, stderr=err, text=True
                )
            )
    return group


def same(one, other, tolerance: float = 1e-5) -> bool:
    """The same results but for the roundings of scored probabilities, whose sums over devices have another order."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name], tolerance) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= tolerance
    return one == other


def kill_one(
    group: list[subprocess.Popen], victim: int, workdir: Path, lines: int, delay: float, said: int
) -> float | None:
    """Kills a process `delay` seconds after the run has so many lines of metrics and all have come together. -> the
    seconds after which the last of the others had left; None where the run was over before."""
    while group[0].poll() is None:
        joined = "sampling:" in workdir.with_suffix(".out0").read_text()[said:]
        if joined and small_run.lines_of(workdir / "metrics.jsonl") >= lines:
            break
        time.sleep(0.02)
    time.sleep(delay)
    if any(process.poll() is not None for process in group):
        return None
    group[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    for process in group:
        process.wait(timeout=90)
    return time.monotonic() - began


def killed_and_resumed(folder: Path, whole: Path, count: int, kills: int, seed: int) -> list[float]:
    """Kills a process of a run `kills` times, resumes it each time, and compares what it ends with to `whole`, the
    workdir of a run that nobody killed. -> how long the others took to leave."""
    draw, workdir, took = random.Random(seed), folder / f"killed{seed}", []
    total = small_run.lines_of(whole / "metrics.jsonl")
    for number in range(kills):
        victim, lines, delay = draw.randrange(count), int(number * total / kills), draw.uniform(0, 3)
        before = workdir.with_suffix(".out0")
        said = len(before.read_text()) if before.exists() else 0
        group = run(folder, workdir, count, 1)
        try:
            seconds = kill_one(group, victim, workdir, lines, delay, said)
            if seconds is not None:
                took.append(seconds)
                statuses = [process.returncode for process in group]
                assert statuses == [-signal.SIGKILL if place == victim else 1 for place in range(count)], statuses
                told = (0 if victim else 1) if count > 1 else 0
                assert processes.died(victim) in workdir.with_suffix(f".err{told}").read_text()
                print(f"process {victim} killed at line {lines} of {total}: the others left within {seconds:.1f} s")
        finally:
            for process in group:
                process.kill()
    last = run(folder, workdir, count, 1)
    assert [process.wait() for process in last] == [0] * count
    for name in (
        "results.json",
        "pairs.jsonl",
        "models/dpo/adapter_model.safetensors",
        "models/grpo/adapter_model.safetensors",
    ):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    for path in whole.glob("evolve/*/episodes.jsonl"):
        assert (workdir / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    return took


@pytest.mark.slow
def test_a_process_killed_anywhere_ends_the_others_and_the_resumed_run_ends_the_same(tmp_path):
    """Every stage of the quickstart in two processes; and what one process with two devices gives is the same."""
    small_run.write_pipeline(tmp_path, CHANGES)
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    for workdir, count, devices in ((whole, 2, 1), (alone, 1, 2)):
        statuses = [process.wait() for process in run(tmp_path, workdir, count, devices)]
        assert statuses == [0] * count, workdir.with_suffix(".err0").read_text()
    assert workdir.with_suffix(".out0").read_text() and not whole.with_suffix(".err1").read_text()
    assert same(*(json.loads((workdir / "results.json").read_text()) for workdir in (whole, alone)))
    assert len(killed_and_resumed(tmp_path, whole, 2, 3, seed=1)) >= 2


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(tmp_path):
    """8 devices of one process, both architectures, and 4 processes with 2 each: logits, sampled tokens, losses and
    updated weights of DPO and GRPO, with adapters and all weights. `python tests/sharded.py` takes any mesh.

    Adam divides a gradient by its own size, so where it is nothing but rounding the update is anything up to the
    learning rate: of all weights, a thousandth may be further away than 1e-5, but not further than two steps of 1e-3.
    """
    whole = ("one", ["qwen3", "llama31"], [None, [2, 2, 2]], 1, 8)
    for out, names, sizes, count, devices in (whole, ("four", ["qwen3"], [[2, 2, 2]], 4, 2)):
        address = f"127.0.0.1:{free_port()}"
        group = [
            subprocess.Popen(
                [sys.executable, str(HERE / "sharded.py"), str(tmp_path / out), json.dumps(names), json.dumps(sizes)]
                + ([address, str(count), str(place)] if count > 1 else []),
                env=environment(devices), stderr=subprocess.PIPE, text=True,
            )
            for place in range(count)
        ]  # fmt: skip
        said = [process.communicate()[1] for process in group]
        assert [process.returncode for process in group] == [0] * count, said
    alone = dict(np.load(tmp_path / "one-0.npz"))
    for path in (*tmp_path.glob("one-[1-9].npz"), *tmp_path.glob("four-*.npz")):
        found = np.load(path)
        assert len(found.files) >= len(alone) / 2
        for name in found.files:
            expected = alone[name]
            if name.endswith("tokens"):
                np.testing.assert_array_equal(found[name], expected, err_msg=f"{path.name}: {name}")
            elif name.endswith("full weights"):
                apart = np.abs(found[name] - expected)
                assert np.quantile(apart, 0.999) <= 1e-5 and apart.max() <= 2e-3, (path.name, name)
            else:
                np.testing.assert_allclose(found[name], expected, atol=1e-5, rtol=0, err_msg=f"{path.name}: {name}")
