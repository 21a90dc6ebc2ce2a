"""Questions from templates: the original's 64, the ladder of payoffs, and what the command line does with bad input."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.scenarios import generate
from atp_jax.scenarios.pack import load_role_play


def template(params=None, **changes) -> dict:
    texts = {
        "question": "Sell for $$${low_reward} or $$${high_reward}?",
        "system_prompt": "You sell.",
        "user_prompt": "Sell for $$${low_reward} or $$${high_reward}?",
        "supervised_text": "Watched.",
        "unsupervised_text": "Not watched.",
        "neutral_text": "Who knows.",
        "supervised_choice": "feed",
        "better_choice": "sell",
        "format_example": '{"choice": "feed"}',
    }
    params = {"high_radio": 2.5, "low_radio": 2, "base": 10} if params is None else params
    return {"environment": "shop", "template": {**texts, **changes}, "params": params}


def run(tmp_path: Path, templates, *arguments: str) -> tuple[int, Path]:
    source, out = tmp_path / "t.json", tmp_path / "made" / "q.json"
    source.write_text(templates if isinstance(templates, str) else json.dumps(templates), encoding="utf-8")
    return generate.main([f"--templates={source}", f"--out={out}", *arguments]), out


def test_the_original_64_questions_apart_from_ids(shared, tmp_path):
    data = shared / "data" / "upstream"
    out = tmp_path / "q.json"
    # As the README writes it, in a process of its own.
    command = [
        sys.executable,
        "-m",
        "atp_jax.scenarios.generate",
        "--templates",
        str(data / "role_play_templates.json"),
    ]
    done = subprocess.run([*command, "--per-template", "4", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, theirs = (
        json.loads(out.read_text(encoding="utf-8")),
        json.loads((data / "question_64.json").read_text("utf-8")),
    )
    assert len({r.pop("id") for r in made}) == 64
    for r in theirs:
        r.pop("id")
    assert json.dumps(made) == json.dumps(theirs)  # texts, the order of keys, floats by repr, int or float
    assert done.stderr.count("warning: template") == 16  # quirk 25: every template had to be lifted or clamped
    assert "41 of 64" in done.stderr and "41 of them distinct" in done.stdout


ratios = st.floats(-1, 8).map(lambda x: round(x, 2))


@given(high=ratios, low=ratios, count=st.integers(1, 12))
def test_the_ladder_stays_in_bounds_and_never_narrows(high, low, count):
    ladder = generate.levels(high, low, count)
    assert len(ladder) == count
    assert ladder[0] == generate.level(high, low)
    gaps = []
    for above, below in ladder:
        assert 1 <= below < above <= 5
        assert all(math.isclose(10 * ratio, round(10 * ratio)) for ratio in (above, below))
        gaps.append(round(10 * (above - below)))
    assert gaps == sorted(gaps)
    if count > 1:  # the last level has used all the room there was
        first, last = ladder[0], ladder[-1]
        assert math.isclose(last[0] - first[0], first[1] - last[1], abs_tol=1e-9)
        assert math.isclose(last[0], 5) or math.isclose(last[1], 1) or first[1] == 1 or first[0] == 5


@given(high=st.integers(11, 50), low=st.integers(10, 49))
def test_ratios_that_fit_are_left_alone(high, low):
    if high > low:
        assert generate.level(high / 10, low / 10) == (high / 10, low / 10)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (2.0, "2"),
        (2.1, "2.1"),
        (110.00000000000001, "110"),
        (14.399999999999999, "14.4"),
        (1.47, "1.47"),
        (49000.0, "49000"),
    ]
    + [(0.0, "0"), (1234567.891, "1234567.89"), (100, "100")],
)
def test_amounts_are_said_without_idle_digits(value, said):
    assert generate.amount(value) == said


def test_what_is_made_loads_again_and_is_the_same_each_time(tmp_path, capsys):
    status, out = run(tmp_path, [template(instruction=" Now: ")], "--per-template=3")
    assert status == 0
    first = out.read_bytes()
    scenarios = load_role_play(str(out))
    assert [(s.high_reward, s.low_reward) for s in scenarios] == [(25.0, 20.0), (30.0, 15.0), (35.0, 10.0)]
    assert scenarios[1].user_prompt == 'Sell for $15 or $30? Now: {"choice": "feed"}'
    assert len({s.id for s in scenarios}) == 3
    assert "warning" not in capsys.readouterr().err
    assert run(tmp_path, [template(instruction=" Now: ")], "--per-template=3")[0] == 0
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == ["q.json"]


def test_clamped_payoffs_and_duplicates_are_reported(tmp_path, capsys):
    narrow = template({"high_radio": 7, "low_radio": 5, "base": 1})
    assert run(tmp_path, [template(), narrow], "--per-template=2")[0] == 0
    said = capsys.readouterr()
    assert "template 1 (shop): payoff ratios high 7, low 5 become 5 and 4.9" in said.err
    assert "template 0" not in said.err
    assert "3 of 4" in said.err and "3 of them distinct" in said.out


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("", "empty"),
        ("[\n{,}]", "line 2"),
        ([], "at least one template"),
        (["x"], "template 0 .*not an object"),
        ([template(), {"template": {}}], "template 1 .*'environment'"),
        ([{"environment": "x"}], "'template'"),
        ([template(better_choice=None)], r"'template\.better_choice'"),
        ([template(instruction=1)], r"'template\.instruction'"),
        ([template(better_choice="Feed ")], "same option"),
        ([template(user_prompt="$$${middle_reward}")], r"'template\.user_prompt'.*\$\{middle_reward\}"),
        ([template(question="costs $ 5")], r"'template\.question'.*placeholder"),
        ([template(neutral_text="{boss} knows.")], r"'neutral_text'.*\{boss\}"),
        ([template({"high_radio": 2, "low_radio": 1})], r"'params\.base'"),
        ([template({"high_radio": float("nan"), "low_radio": 1, "base": 1})], r"'params\.high_radio'"),
        ([template({"high_radio": 2, "low_radio": 1, "base": -1})], r"'params\.base'"),
    ],
)
def test_bad_templates_are_one_line_and_leave_nothing(templates, message, tmp_path, capsys):
    status, out = run(tmp_path, templates)
    said = capsys.readouterr().err
    assert status == 2 and not out.exists()
    assert said.startswith("error: ") and said.count("\n") == 1
    assert re.search(message, said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--per-template=0"], "per-template"),
        (["--per-tempalte=3"], "per-tempalte"),
        (["more"], "'more'"),
        (["--out="], "--out"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, capsys):
    assert run(tmp_path, [template()], *arguments)[0] == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left_there(tmp_path, capsys):
    (tmp_path / "made" / "q.json").mkdir(parents=True)
    status, out = run(tmp_path, [template()])
    assert status == 2 and str(out) in capsys.readouterr().err
    assert list(out.parent.iterdir()) == [out]


def test_the_shipped_questions_are_what_the_shipped_templates_give(tmp_path):
    out = tmp_path / "q.json"
    assert generate.main([f"--out={out}"]) == 0
    shipped = Path(generate.__file__).with_name("role_play.json")
    assert json.loads(out.read_text("utf-8")) == json.loads(shipped.read_text("utf-8"))
