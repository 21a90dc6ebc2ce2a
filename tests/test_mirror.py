"""Metrics shown elsewhere: every line once, in TensorBoard what the JSON lines say; and the heartbeat's words."""

import json
import struct
import types

import pytest
import small_run

from atp_jax import mirror, progress
from atp_jax.__main__ import main

LINES = [
    {"stage": "pairs", "pairs": 3},
    {"stage": "dpo", "step": 1, "loss": 0.5, "kl": None, "skipped": 0, "good": True},
    {"stage": "evolve", "condition": "base-no_history", "round": 2, "violations": 3, "total": 4},
]


def test_what_of_a_line_is_shown_and_where():
    assert mirror.scalars(LINES[0]) is None
    assert mirror.scalars(LINES[1]) == ("dpo", 1, {"loss": 0.5, "skipped": 0.0})
    assert mirror.scalars(LINES[2]) == ("evolve/base-no_history", 2, {"violations": 3.0, "total": 4.0})


def test_lines_are_shown_as_they_come_also_after_a_cut(tmp_path):
    path, seen = tmp_path / "metrics.jsonl", []
    follower = mirror.Mirror(path, [types.SimpleNamespace(show=lambda *found: seen.append(found))])
    follower._look()  # no file yet
    texts = [json.dumps(line) + "\n" for line in LINES]
    path.write_text(texts[0] + texts[1] + texts[2][:9])
    follower._look()
    assert [found[:2] for found in seen] == [("dpo", 1)]
    path.write_text("".join(texts))
    follower._look()
    assert [found[:2] for found in seen] == [("dpo", 1), ("evolve/base-no_history", 2)]
    path.write_text(texts[0] + texts[1])  # cut back to a checkpoint, and written on
    follower._look()
    path.write_text(texts[0] + texts[1] + texts[1].replace('"step": 1', '"step": 2'))
    follower._look()
    assert [found[:2] for found in seen[2:]] == [("dpo", 2)]


def events(folder) -> list:
    """What stands in TensorBoard's files: records of a length, its checksum, the event and its checksum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in folder.glob("events*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = proto.Event.FromString(data[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_a_run_is_in_tensorboard_as_in_its_metrics(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(small_run.ROOT)
    workdir = tmp_path / "run"
    assert main([*small_run.arguments(tmp_path, workdir), "--tensorboard"]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    expected = {
        (f"{where}/{name}", step): value
        for where, step, numbers in map(mirror.scalars, lines)
        for name, value in numbers.items()
    }
    found = {(tag, step): value for tag, step, value in events(workdir / "tensorboard")}
    assert found == pytest.approx(expected, rel=1e-6) and ("evolve/scripted/violations", 1) in found


def test_weights_and_biases_are_told_by_series(tmp_path):
    """With a stand-in for the package: a run that goes on has the same id."""
    said = []
    run = types.SimpleNamespace(
        define_metric=lambda *a, **k: said.append((a, k)), log=said.append, finish=lambda: said.append("end")
    )
    package = types.SimpleNamespace(init=lambda **about: said.append(about) or run)
    for _ in range(2):
        there = mirror._WeightsAndBiases(package, "tipping", tmp_path / "run", {"seed": 3})
        there.show("dpo", 1, {"loss": 0.5})
        there.close()
    first, again = said[: len(said) // 2], said[len(said) // 2 :]
    assert first == again and first[0]["project"] == "tipping" and first[0]["resume"] == "allow"
    assert first[1:] == [
        (("dpo/step",), {}),
        (("dpo/*",), {"step_metric": "dpo/step"}),
        {"dpo/step": 1, "dpo/loss": 0.5},
        "end",
    ]


@pytest.mark.parametrize(("flag", "package"), [("--tensorboard", "tensorboardX"), ("--wandb=project", "wandb")])
def test_a_package_that_is_missing_is_named_before_anything_is_done(tmp_path, monkeypatch, capsys, flag, package):
    monkeypatch.chdir(small_run.ROOT)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    assert main([*small_run.arguments(tmp_path, tmp_path / "run"), flag]) == 2
    assert f"needs the package {package}" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (90000, "25.0 h")],
)
def test_a_span_of_time_in_words(seconds, said):
    assert progress.span(seconds) == said


def test_a_heartbeat_says_how_far_and_how_long_by_the_pace_since_the_start():
    beat = progress.Heartbeat("grpo", 60, "steps")
    beat.start(20)
    beat._began = 1000.0
    assert beat.line(1030.0) == "grpo: 20 of 60 steps after 30 s"
    beat.at(30)
    assert beat.line(1120.0) == "grpo: 30 of 60 steps after 2 min, about 6 min left"
    assert beat.line(1300.0).endswith(", about 15 min left")  # nothing since: the pace was slower than it seemed
    beat.at(60)
    assert beat.line(1400.0).endswith(", about 0 s left")
