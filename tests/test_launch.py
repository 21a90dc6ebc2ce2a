"""The launch scripts: what they refuse, that --dry_run does nothing, and what they do with stand-ins for gcloud, Slurm
and Python in place of the real ones."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = ("--config=configs/role_play.py:qwen3_8b", "--workdir=runs/it's", "--config.data.items=(3, 5)")
PROCESS = ("--coordinator=10.0.0.1:8476", "--processes=2", "--process_id=1")
SLICE = ("--name=slice", "--zone=here", "--type=v5litepod-16")
SCRIPTS = {"gpu.sh": (), "multihost.sh": PROCESS, "slurm.sbatch": (), "tpu_vm.sh": SLICE}
OTHERS = ("quickstart.sh", "test.sh", "train_organism.sh", "detach.sh")

# Stand-ins: each writes down how it was called, in words that shlex reads; at one stroke, for several may run at once.
NOTE = """#!/usr/bin/env bash
call="$(printf ' %q' "${0##*/}" "$@")"
echo "${call# }" >>"$CALLS"
"""
GCLOUD = (
    NOTE
    + """
case "$*" in
*"value(state)"*) cat "$CALLS.state" 2>/dev/null ;;
*networkEndpoints*) echo 10.0.0.1 10.0.0.2 ;;
*" create "*) echo READY >"$CALLS.state" ;;
*" delete "*) rm "$CALLS.state" ;;
*pgrep*) exit 1 ;;
*tail*) [ -e "$CALLS.second" ] || { echo PREEMPTED >"$CALLS.state"; touch "$CALLS.second"; } ;;
*run.status*) [ "$(cat "$CALLS.state")" = READY ] || exit 255; echo 7 ;;
esac
"""
)
SRUN = (
    NOTE
    + """
trap 'echo "srun told" >>"$CALLS"; exit 0' TERM
if [ -e "$CALLS.long" ]; then touch "$CALLS.running"; while true; do /bin/sleep 0.05; done; fi
shift
SLURM_PROCID=1 "$@"
"""
)


@pytest.fixture
def place(tmp_path):
    """A copy of the scripts in a repository of their own, with stand-ins on the PATH."""
    repository, programs = tmp_path / "repository", tmp_path / "bin"
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, repository / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, repository)
    (repository / ".venv/bin").mkdir(parents=True)
    programs.mkdir()
    made = {"gcloud": GCLOUD, "srun": SRUN, "scontrol": NOTE + 'case "$1" in show) echo node7; echo node8 ;; esac\n'}
    made |= {"nvidia-smi": NOTE + "echo 570.86\n", "sleep": NOTE, "git": NOTE + "printf 'setup.cfg\\0'\n"}
    for path, text in [(programs / name, text) for name, text in made.items()] + [
        (repository / ".venv/bin/python", NOTE + 'echo "ATP_EXTRA=$ATP_EXTRA" >>"$CALLS"\n')
    ]:
        path.write_text(text)
        path.chmod(0o755)
    return repository


def launch(place, script, *arguments, **variables):
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments], cwd=place, env=environment(place, **variables), timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip


def environment(place, **variables):
    path = f"{place.parent / 'bin'}:{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ATP_"))}
    return clean | {"PATH": path, "CALLS": str(place.parent / "calls")} | variables


def calls(place):
    path = place.parent / "calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def tree(place):
    return {path: path.stat().st_mtime_ns for path in place.parent.rglob("*")}


@pytest.mark.parametrize("script", [*SCRIPTS, *OTHERS])
def test_help_says_how_it_is_used(place, script):
    done = launch(place, script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and script in done.stdout
    assert not calls(place)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_shows_the_run_and_does_nothing(place, script):
    before = tree(place)
    done = launch(place, script, *SCRIPTS[script], "--dry_run", *RUN)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not calls(place) and tree(place) == before
    assert all(line.startswith(("+ ", "# ")) for line in done.stdout.splitlines())
    # What is shown is what a shell would read: the run's own arguments come out of it as they went in.
    shown = [shlex.split(line[1:]) for line in done.stdout.splitlines() if "-m atp_jax" in line]
    assert shown
    for words in shown:
        if script == "tpu_vm.sh":
            (remote,) = (word for word in words if word.startswith("--command="))
            words = shlex.split(remote.removeprefix("--command="))
        assert all(argument in words for argument in RUN)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (RUN[1:], "--config=FILE is missing"),
        (RUN[:1], "--workdir=DIRECTORY is missing"),
        (("--config=nowhere.py", RUN[1]), "--config: there is no file nowhere.py"),
        ((*RUN, "qwen"), "argument 'qwen' means nothing here"),
        ((*RUN, "--dryrun"), "argument '--dryrun' means nothing here"),
    ],
)
def test_arguments_of_the_run_are_refused_before_anything_is_done(place, script, wrong, said):
    refused(place, script, (*SCRIPTS[script], *wrong), said)


@pytest.mark.parametrize(
    ("script", "wrong", "said"),
    [
        ("multihost.sh", PROCESS[1:], "--coordinator=HOST:PORT must name host 0 and a port there, not ''"),
        ("multihost.sh", ("--coordinator=host", *PROCESS[1:]), "not 'host'"),
        ("multihost.sh", PROCESS[:1], "--processes=N is missing"),
        ("multihost.sh", PROCESS[:2], "--process_id=I is missing"),
        ("multihost.sh", (*PROCESS[:2], "--process_id=2"), "--process_id=2 must be below --processes=2"),
        ("multihost.sh", (*PROCESS[:2], "--process_id=x"), "--process_id must be a whole number, not 'x'"),
        ("multihost.sh", (*PROCESS[:2], "--process_id="), "--process_id needs a value: --process_id=VALUE"),
        ("tpu_vm.sh", SLICE[1:], "--name=NAME is missing"),
        ("tpu_vm.sh", SLICE[:1], "--zone=ZONE is missing"),
        ("tpu_vm.sh", SLICE[:2], "--type=TYPE is missing"),
        ("tpu_vm.sh", (*SLICE[:2], "--type=h100"), "--type=h100 is not v5litepod-N, v5p-N or v6e-N"),
        ("tpu_vm.sh", (*SLICE, "--capacity=cheap"), "--capacity must be spot or on-demand, not 'cheap'"),
        ("tpu_vm.sh", (*SLICE, "--after=x"), "--after must be delete or keep, not 'x'"),
        ("slurm.sbatch", (), "this is a Slurm job: sbatch launch/slurm.sbatch"),
    ],
)
def test_options_of_a_script_are_refused_before_anything_is_done(place, script, wrong, said):
    refused(place, script, (*wrong, *RUN), said)


def refused(place, script, arguments, said):
    done = launch(place, script, *arguments)
    assert done.returncode == 2 and not done.stdout and not calls(place)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr


@pytest.mark.parametrize(("driver", "extra"), [("570.86.10", "cuda12"), ("580.65.06", "cuda13")])
def test_one_host_runs_on_the_cuda_that_its_driver_knows(place, driver, extra):
    smi = place.parent / "bin/nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho {driver}\necho {driver}\n")
    assert launch(place, "gpu.sh", *RUN).returncode == 0
    *_, ran, said = calls(place)
    assert ran == ["python", "-m", "atp_jax", *RUN] and said == [f"ATP_EXTRA={extra}"]
    smi.write_text("#!/bin/sh\nexit 9\n")
    refusal = launch(place, "gpu.sh", *RUN)
    assert refusal.returncode == 2 and refusal.stderr == "error: nvidia-smi finds no GPU here\n"


def test_a_process_of_several_gets_its_number_and_all_arguments(place):
    assert launch(place, "multihost.sh", *RUN, *PROCESS, ATP_EXTRA="cuda13").returncode == 0
    assert calls(place)[-2] == ["python", "-m", "atp_jax", *PROCESS, *RUN]


def test_a_slurm_job_starts_a_process_a_node(place):
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    done = launch(place, "slurm.sbatch", *RUN, SLURM_SUBMIT_DIR=str(place), **job)
    assert done.returncode == 0, done.stderr
    process = ["--coordinator=node7:24711", "--processes=2", "--process_id=1"]
    assert calls(place)[-2] == ["python", "-m", "atp_jax", *process, *RUN]
    assert not any(call[:2] == ["scontrol", "requeue"] for call in calls(place))


def test_a_slurm_job_that_is_told_to_stop_lets_the_run_save_and_queues_again(place):
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    (place.parent / "calls.long").touch()
    process = subprocess.Popen(
        ["bash", "launch/slurm.sbatch", *RUN], cwd=place, env=environment(place, SLURM_SUBMIT_DIR=str(place), **job)
    )
    until = time.monotonic() + 60
    while not (place.parent / "calls.running").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert calls(place)[-2:] == [["srun", "told"], ["scontrol", "requeue", "4711"]]


def test_a_slice_is_made_filled_run_on_and_made_anew_when_preempted(place):
    done = launch(place, "tpu_vm.sh", *SLICE, "--capacity=spot", "--after=delete", "--setup=mount shared", *RUN)
    assert done.returncode == 7, done.stderr  # the status of the run
    tpu = [call[4:] for call in calls(place) if call[0] == "gcloud" and "describe" not in call]
    assert all(call[-2:] == ["--zone=here", "--quiet"] for call in tpu)
    kinds = [call[0] if call[0] != "ssh" else call[3].removeprefix("--command=") for call in tpu]
    once = ["pgrep", "scp", "mkdir", "mount shared", "enter_venv", "detach.sh", "detach.sh", "tail", "run.status"]
    expected = ["create", *once, "delete", "create", *once, "delete"]
    assert len(kinds) == len(expected) and all(part in kind for kind, part in zip(kinds, expected, strict=True))
    assert tpu[0] == ["create", "slice", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot",
                      "--zone=here", "--quiet"]  # fmt: skip
    started = sorted((call[2], call[3]) for call in tpu if call[0] == "ssh" and "detach.sh" in call[3])[::2]
    for worker, (which, command) in enumerate(started):
        process = ["--coordinator=10.0.0.1:8476", "--processes=2", f"--process_id={worker}"]
        assert which == f"--worker={worker}"
        assert shlex.split(command)[-len(RUN) - 3 :] == [*RUN, *process]


def test_a_slice_that_is_there_and_runs_is_only_followed(place):
    (place.parent / "calls.state").write_text("READY\n")
    (place.parent / "calls.second").touch()
    gcloud = place.parent / "bin/gcloud"
    gcloud.write_text(gcloud.read_text().replace("*pgrep*) exit 1 ;;", "*pgrep*) exit 0 ;;"))
    assert launch(place, "tpu_vm.sh", *SLICE, *RUN).returncode == 7
    verbs = [call[4] for call in calls(place) if call[0] == "gcloud"]
    assert verbs == ["describe", "ssh", "ssh", "ssh"]


def test_what_is_detached_leaves_its_words_and_its_status(tmp_path):
    words = ["bash", "-c", 'echo "$0 said"; exit 3', "it's"]
    subprocess.run([ROOT / "launch/detach.sh", *words], cwd=tmp_path, check=True)
    until = time.monotonic() + 60
    while not (tmp_path / "run.status").exists() or not (tmp_path / "run.status").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    assert (tmp_path / "run.status").read_text() == "3\n"
    assert (tmp_path / "run.log").read_text() == "it's said\n" and (tmp_path / "run.pid").read_text().strip().isdigit()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on the PATH")
def test_shellcheck_finds_nothing():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").iterdir())
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
