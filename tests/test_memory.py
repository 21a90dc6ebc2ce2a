"""A program that keeps its memory is started twice and is one program all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from atp_jax import memory

PROGRAM = """
import atp_jax.memory
print("begun", flush=True)
atp_jax.memory.keep_memory(__spec__)
import json, os, sys
started_with = open("/proc/self/environ").read().replace("\\0", ":")  # the C library cuts what it reads into pieces
has = {name: value for name, value in os.environ.items() if name.startswith(("GLIBC", "ATP_MEMORY"))}
print(json.dumps([os.getpid(), sys.argv[1:], sys.stdin.read(), sys.flags.utf8_mode, started_with, has]))
sys.exit(3)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no such settings")


def run(tmp_path, *before, **variables):
    """before: what stands before the program on the command line. -> how often it began, and what else it said"""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != memory.NAME} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(memory.__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8", *before, "-m", "program", "--flag=a b", "", "*"], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    *begun, said = process.communicate("asked")[0].splitlines()
    assert process.returncode == 3 and set(begun) == {"begun"}
    pid, arguments, asked, utf8, started_with, has = json.loads(said)
    assert (pid, arguments, asked, utf8) == (process.pid, ["--flag=a b", "", "*"], "asked", 1)
    return len(begun), started_with, has


def test_it_begins_again_and_those_it_starts_know_nothing_of_it(tmp_path):
    """With the same process id, arguments, options of Python and standard input."""
    begun, started_with, has = run(tmp_path)
    assert begun == 2 and f"GLIBC_TUNABLES={memory.KEPT}:" in started_with and not has


@pytest.mark.parametrize("value", ["glibc.malloc.arena_max=2", ""])
def test_who_has_set_it_is_left_alone(tmp_path, value):
    begun, started_with, has = run(tmp_path, GLIBC_TUNABLES=value)
    assert begun == 1 and memory.KEPT not in started_with and has == {"GLIBC_TUNABLES": value}


def test_a_debugger_is_not_started_again(tmp_path):
    """Nor anything else that runs the program within itself."""
    (tmp_path / "debugger.py").write_text(
        "import runpy, sys\nsys.argv[1:3] = []\nrunpy.run_module('program', run_name='__main__', alter_sys=True)\n"
    )
    begun, started_with, has = run(tmp_path, "-m", "debugger")
    assert begun == 1 and memory.KEPT not in started_with and not has


@pytest.mark.parametrize(
    "module",
    ["", ".organism.train", ".organism.examine", ".benchmarks.generate", ".benchmarks.grpo", ".benchmarks.role_play"],
)
def test_what_runs_a_model_keeps_its_memory(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text("import sys\nprint('begun', file=sys.stderr)\n")
    environment = {name: value for name, value in os.environ.items() if name != memory.NAME}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(memory.__file__).parents[1])])
    command = [sys.executable, "-m", "atp_jax" + module, "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines().count("begun") == 2 and "--" in done.stdout


def test_the_settings_can_be_asked_for():
    said = subprocess.run([sys.executable, "-m", "atp_jax.memory"], capture_output=True, text=True, check=True)
    assert said.stdout == memory.KEPT + "\n"
