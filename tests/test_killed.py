"""The smallest whole pipeline, killed by SIGKILL at twenty moments, ends with the bytes of a run that nobody killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import small_run

from atp_jax.__main__ import main

KILLS = 20
CHANGES = {
    "evolve.mode": "both", "evolve.models": ("grpo",), "evolve.weights.updates": 6, "evolve.weights.measure_every": 1,
    "evolve.weights.prompts": 2, "evolve.weights.group": 2, "align.dpo.epochs": 4, "align.dpo.batch": 2,
    "align.grpo.steps": 6,
}  # fmt: skip


def metrics(workdir: Path) -> list[dict]:
    """Its lines without what depends on the machine and on when a run was cut off: seconds, tokens a second, what was
    compiled, and the tokens of a round, which are none where it was read back."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    apart = ("seconds", "tokens", "compilations")
    return [
        {key: value for key, value in line.items() if not key.endswith("_s") and key not in apart} for line in lines
    ]


def left_behind(workdir: Path) -> dict[str, bytes]:
    """All a run leaves but its checkpoints, the time they were made being in them, and the timings in its metrics."""
    files = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(workdir)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items()
            if not name.startswith("checkpoints") and name != "metrics.jsonl"}  # fmt: skip


def half_written(workdir: Path) -> list[str]:
    """What a kill left in the middle of being written."""
    names = [name for folder in workdir.rglob("*") if (name := folder.name) and ("-tmp" in name or ".partial" in name)]
    torn = [path.name for path in workdir.rglob("*.jsonl") if not (path.read_bytes() or b"\n").endswith(b"\n")]
    return names + torn


def stage(workdir: Path) -> str:
    """How far a run had come, from what lies there."""
    if not (workdir / "config.json").exists():
        return "start"
    for name, left in (("pairs", "pairs.jsonl"), ("dpo", "models/dpo"), ("grpo", "models/grpo")):
        if not (workdir / left).exists():
            return name if name == "pairs" or (workdir / "checkpoints" / name).exists() else f"before {name}"
    if (workdir / "results.json").exists():
        return "report"
    evolving = (workdir / "checkpoints" / "grpo-weights").exists()
    return "evolve, weights" if evolving else "evolve, context"


def kill(process: subprocess.Popen, workdir: Path, lines: int, delay: float | None) -> bool:
    """Kills when metrics has so many lines and `delay` seconds have passed, or with None when this process has written
    a line and then begun a checkpoint. -> whether there was anybody to be killed."""
    before = small_run.lines_of(workdir / "metrics.jsonl")
    while process.poll() is None:
        now = small_run.lines_of(workdir / "metrics.jsonl")
        if now >= lines and (delay is not None or now != before):
            break
        time.sleep(0.005)
    end = time.monotonic() + (20 if delay is None else delay)
    while process.poll() is None and time.monotonic() < end:
        if delay is None and any("-tmp" in path.name for path in workdir.glob("checkpoints/*/*")):
            break
        time.sleep(0.001)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configuration and data of the run, and what XLA compiles for it, so that a run that starts again is quick."""
    folder = tmp_path_factory.mktemp("killed")
    small_run.write_pipeline(folder, CHANGES)
    return folder


@pytest.fixture(scope="module")
def environment(folder):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache


@pytest.fixture(scope="module")
def finished(folder, environment):
    """The workdir of a run that nobody killed."""
    workdir = folder / "whole"
    began = time.monotonic()
    command = small_run.pipeline(folder, workdir)
    done = subprocess.run(command, cwd=small_run.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"\nuninterrupted: {time.monotonic() - began:.0f} s, {len(metrics(workdir))} lines of metrics")
    return workdir


@pytest.mark.slow
def test_killed_twenty_times_it_ends_the_same(folder, environment, finished):
    """A moment is drawn as a place in the run (so many lines of metrics, in each of nineteen parts of the run one; the
    first is before any) and up to 0.8 s after it; every fourth is the next write of a checkpoint."""
    workdir, draw, total = folder / "run", random.Random(0), len(metrics(finished))
    again = small_run.pipeline(folder, workdir)
    began, where, torn = time.monotonic(), [], 0
    with (folder / "said").open("w") as said:
        for number in range(KILLS):
            lines = max(0, int((number - 1 + draw.random()) * total / (KILLS - 1)))
            delay = None if number % 4 == 3 else draw.uniform(0, 0.8 if lines else 8)
            process = subprocess.Popen(again, cwd=small_run.ROOT, env=environment, stdout=said, stderr=said)
            if kill(process, workdir, lines, delay):
                where.append(stage(workdir))
                torn += delay is None and bool(half_written(workdir))
                came = f"{where[-1]}, {small_run.lines_of(workdir / 'metrics.jsonl')} of {total} lines of metrics"
                print(f"kill {number}: {came}, half-written: {half_written(workdir)}")
    done = subprocess.run(again, cwd=small_run.ROOT, env=environment, capture_output=True, text=True)
    took, aimed = time.monotonic() - began, KILLS // 4
    print(f"{took:.0f} s: {len(where)} kills, {torn} of {aimed} aimed at a write met one, {Counter(where)}")
    assert done.returncode == 0, done.stderr + (folder / "said").read_text()[-2000:]
    assert "Traceback" not in (folder / "said").read_text()
    assert len(where) >= 15 and len(set(where)) >= 4 and torn >= 3, (where, torn)

    ours, theirs = left_behind(workdir), left_behind(finished)
    assert ours.keys() == theirs.keys()
    assert {"pairs.jsonl", "results.json", "models/dpo/adapter_model.safetensors"} < ours.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert metrics(workdir) == metrics(finished)


@pytest.mark.slow
def test_killed_between_a_line_of_metrics_and_the_pairs(folder, environment, finished):
    """The moment is too short to be met by chance."""
    workdir = folder / "pairs"
    workdir.mkdir()
    shutil.copy(finished / "config.json", workdir)
    line = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]
    (workdir / "metrics.jsonl").write_bytes(line)
    again = [*small_run.pipeline(folder, workdir), "--stages=pairs"]
    done = subprocess.run(again, cwd=small_run.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == line
    assert (workdir / "pairs.jsonl").read_bytes() == (finished / "pairs.jsonl").read_bytes()


def test_killed_between_a_round_and_its_line_of_metrics(tmp_path, monkeypatch):
    """So is this one: the round is on disk, its line is not, or not whole."""
    monkeypatch.chdir(small_run.ROOT)
    arguments = small_run.arguments(tmp_path, tmp_path / "run")
    assert main(arguments) == 0
    whole, file = metrics(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for kept in (b"".join(lines[:-1]), b"".join(lines)[:-9]):
        file.write_bytes(kept)
        (tmp_path / "run" / "results.json").unlink()
        assert main(arguments) == 0
        assert metrics(tmp_path / "run") == whole
