"""A run that was interrupted, anywhere and however often, ends with the bytes of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_run

from atp_jax.__main__ import main


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(small_run.ROOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder, workdir and what was left behind of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small_run.ROOT)
        assert main(small_run.arguments(folder, folder / "run")) == 0
    return folder, folder / "run", small_run.left_behind(folder / "run")


def as_killed(workdir: Path, whole: Path, plain: int, no_history: int | None) -> None:
    """What a kill leaves: so many bytes of the first condition's file, and of the second's if it was begun."""
    workdir.mkdir()
    (workdir / "config.json").write_bytes((whole / "config.json").read_bytes())
    (workdir / "metrics.jsonl").write_bytes((whole / "metrics.jsonl").read_bytes()[: plain // 50])
    for name, length in (("scripted", plain), ("scripted-no_history", no_history)):
        if length is not None:
            source = whole / "evolve" / name / "episodes.jsonl"
            target = workdir / "evolve" / name / "episodes.jsonl"
            target.parent.mkdir(parents=True)
            target.write_bytes(source.read_bytes()[:length])


def test_every_kind_of_place(finished, tmp_path):
    """Cut after 0 bytes, 1 byte, in a line, at a line's end, at a round's end, in the second condition, at the end."""
    folder, whole, expected = finished
    lines = (whole / "evolve" / "scripted" / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 6 * 4
    size = sum(map(len, lines))
    at = [sum(map(len, lines[:count])) for count in range(len(lines) + 1)]
    draw = random.Random(0)
    cuts = [(n, None) for n in (0, 1, at[1], at[6] - 1, at[6], at[6] + 1, at[17], at[18], at[20] + 7, size - 1, size)]
    cuts += [(draw.randrange(size), None) for _ in range(5)]
    cuts += [(size, n) for n in (0, 1, at[6] // 3, 10**9)]
    for number, (plain, no_history) in enumerate(cuts):
        workdir = tmp_path / str(number)
        as_killed(workdir, whole, plain, no_history)
        assert main(small_run.arguments(folder, workdir)) == 0
        assert small_run.left_behind(workdir) == expected, (plain, no_history)
        assert (workdir / "report" / "index.html").exists()
        assert (workdir / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def test_killed_in_earnest(tmp_path):
    """`kill -9` at random sizes of the file that is being written, the same command again after each."""
    size = {"rows": 5, "rounds": 40, "samples": 8}
    arguments = small_run.arguments(tmp_path, tmp_path / "whole", **size)
    assert main(arguments) == 0
    expected = small_run.left_behind(tmp_path / "whole")
    file = tmp_path / "run" / "evolve" / "scripted-no_history" / "episodes.jsonl"
    other = tmp_path / "run" / "evolve" / "scripted" / "episodes.jsonl"
    command = [sys.executable, "-m", "atp_jax", *small_run.arguments(tmp_path, tmp_path / "run", **size)]
    draw, killed = random.Random(1), 0
    for path, share in ((other, draw.random() / 2), (other, 0.5 + draw.random() / 2), (file, draw.random())):
        threshold = share * len(expected[str(path.relative_to(tmp_path / "run"))])
        process = subprocess.Popen(command, cwd=small_run.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not (path.exists() and path.stat().st_size >= threshold):
            time.sleep(0.0005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed >= 2  # the last may have been quicker than we are
    done = subprocess.run(command, cwd=small_run.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert small_run.left_behind(tmp_path / "run") == expected


def test_finished_is_shown_again_and_nothing_is_done_again(finished, capsys):
    folder, whole, expected = finished
    arguments = small_run.arguments(folder, whole)
    (folder / "script.jsonl").unlink()  # no policy could be made from it
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "holds the finished run" in said and "scripted-no_history" in said
    assert small_run.left_behind(whole) == expected
