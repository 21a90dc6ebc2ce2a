"""Wording packs are checked whole when they are loaded, and filled without any access but to plain names."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax.errors import UserError
from atp_jax.scenarios.wording import fill, harmless, load_wording, steer


def pack() -> dict:
    feedback = {key: "{reward:g} for {choice}" for key in ("comply", "violate_unseen", "violate_caught")}
    return {
        "name": "mine",
        "role_play": {
            "question": "{question} {supervision_text}",
            "feedback": {**feedback, "unparsed": "{answer_head}? {{no}} {reward}"},
        },
    }


def game_part() -> dict:
    """The part of a pack for the threshold game, with nothing that may be left out."""
    results = {"success_everyone": "all {high:g}", "success_choosers": "some {delta_low:.2f}", "failure": "none {low}"}
    return {
        "question": "{question} {threshold} of {agents}",
        "system": {"multiplicative": "{system}", "additive": "{system} {additive_base}"},
        "peers": {
            "prefix": "They: ",
            "join": "; ",
            "final_only": "{agent} {choice}",
            "unparsed": "{agent}?",
            "full": "{agent} {answer}",
        },
        "outcome": "{count} {share:.0%} {result} {reward:g}",
        "result": {"multiplicative": results, "additive": results},
    }


def saved(tmp_path: Path, content) -> str:
    path = tmp_path / "w.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@given(name=st.text(), reward=st.floats(allow_nan=False), share=st.floats(0, 1))
def test_fields_are_filled_as_python_would(name, reward, share):
    template = "{{a}} {name}|{reward}|{reward:g}|{share:.2%}|{name:s}"
    filled = fill(template, name=name, reward=reward, share=share)
    assert filled == f"{{a}} {name}|{reward!r}|{reward:g}|{share:.2%}|{name}"


def test_what_is_filled_in_is_not_filled_again():
    assert fill("{answer}", answer="{secret} {{}} {answer}") == "{secret} {{}} {answer}"


NO_PLAIN_FIELDS = (
    ["{reward.real}", "{reward[0]}", "{reward.__class__.__mro__}", "{0}", "{}", "{ reward}", "{reward!r}"]
    + ["{reward:{width}}", "{reward:999999999}", "{reward:>9}", "{reward:\n}", "{reward", "}"]
)  # fmt: skip


@pytest.mark.parametrize("template", NO_PLAIN_FIELDS)
def test_anything_but_a_plain_name_is_refused_by_name(template, tmp_path):
    with pytest.raises(UserError, match="template"):
        fill(template, reward=1.0, width=3)
    content = pack()
    content["role_play"]["feedback"]["comply"] = template
    with pytest.raises(UserError, match=r"w\.json: 'role_play\.feedback\.comply'"):
        load_wording(saved(tmp_path, content))


def test_a_field_without_a_value_or_with_one_that_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"'Pay: \{reward\}'.*\{reward\}"):
        fill("Pay: {reward}", share=1.0)
    with pytest.raises(UserError, match=r"\{choice:g\}"):
        fill("{choice:g}", choice="Route A")


def test_a_good_pack_loads_whole_and_with_parts_of_other_testbeds(tmp_path):
    content = {**pack(), "threshold_game": {"question": "{anything}"}}
    assert load_wording(saved(tmp_path, content)) == content
    assert load_wording()["role_play"]["feedback"].keys() == content["role_play"]["feedback"].keys()


def test_the_original_wording_loads_as_it_is(shared):
    path = shared / "data" / "upstream_wording.json"
    for testbed in ("role_play", "threshold_game"):
        assert load_wording(str(path), testbed) == json.loads(path.read_text(encoding="utf-8"))


def test_only_the_part_that_is_needed_is_checked(tmp_path):
    path = saved(tmp_path, {"threshold_game": game_part()})
    assert load_wording(path, "threshold_game") == {"threshold_game": game_part()}
    with pytest.raises(UserError, match=r"w\.json: 'role_play' is missing"):
        load_wording(path)
    with pytest.raises(UserError, match=r"w\.json: 'threshold_game' is missing"):
        load_wording(saved(tmp_path, pack()), "threshold_game")
    whole = load_wording("", "threshold_game")
    assert whole == load_wording()
    assert {"outcome_alone", "unreadable", "success", "steer"} <= whole["threshold_game"].keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("outcome"), r"'threshold_game\.outcome' is missing"),
        (lambda p: p["peers"].pop("full"), r"'threshold_game\.peers\.full' is missing"),
        (lambda p: p["result"].pop("additive"), r"'threshold_game\.result\.additive\.failure' is missing"),
        (lambda p: p.update(outcomes="x"), r"'threshold_game\.outcomes' is unknown"),
        (lambda p: p["system"].update(additive=1), r"'threshold_game\.system\.additive' is not a text"),
        (lambda p: p["peers"].update(join="{agent}"), r"'threshold_game\.peers\.join': field \{agent\} is unknown"),
        (lambda p: p.update(outcome="{reward.real}"), r"'threshold_game\.outcome'.*not a plain name"),
        (lambda p: p.update(outcome_alone="{count}"), r"'threshold_game\.outcome_alone': field \{count\} is unknown"),
    ],
)
def test_a_bad_game_part_is_refused_with_the_place(change, message, tmp_path):
    part = game_part()
    change(part)
    path = saved(tmp_path, {**pack(), "threshold_game": part})
    with pytest.raises(UserError, match=rf"w\.json: {message}"):
        load_wording(path, "threshold_game")
    load_wording(path)  # role-play has no need of it


def test_steering_may_name_the_options_of_a_game():
    fields = {"collective": "invest", "independent": "keep money"}
    said = {decision: steer(load_wording(), decision, "threshold_game", **fields) for decision in ("comply", "violate")}
    assert "keep money" in said["comply"] and "invest" in said["violate"]
    assert steer({"threshold_game": game_part()}, "comply", "threshold_game", **fields) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("role_play"), "'role_play' is missing"),
        (lambda p: p.update(rolle_play={}), "'rolle_play' is unknown"),
        (lambda p: p["role_play"].pop("question"), r"'role_play\.question' is missing"),
        (lambda p: p["role_play"]["feedback"].pop("comply"), r"'role_play\.feedback\.comply' is missing"),
        (lambda p: p["role_play"].update(feedback="x"), r"'role_play\.feedback.*' is"),
        (lambda p: p["role_play"].update(qestion="x"), r"'role_play\.qestion' is unknown"),
        (lambda p: p["role_play"].update(question=3), r"'role_play\.question' is not a text"),
        (
            lambda p: p["role_play"].update(question="{question} {reward}"),
            r"'role_play\.question'.*\{reward\} is unknown",
        ),
        (
            lambda p: p["role_play"]["feedback"].update(unparsed="{choice}"),
            r"'role_play\.feedback\.unparsed'.*\{choice\} is unknown",
        ),
    ],
)
def test_a_bad_pack_is_refused_with_the_place(change, message, tmp_path):
    content = pack()
    change(content)
    with pytest.raises(UserError, match=rf"w\.json: {message}"):
        load_wording(saved(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [('{\n"role_play": {\n,}', "line 3"), ("", "empty"), ("[" * 100_000, "not JSON"), ("[]", "'role_play' is missing")],
)
def test_a_file_that_is_no_pack_is_refused(content, message, tmp_path):
    with pytest.raises(UserError, match=rf"w\.json.*{message}"):
        load_wording(saved(tmp_path, content))
    with pytest.raises(UserError, match="nowhere"):
        load_wording(str(tmp_path / "nowhere.json"))


@given(st.text())
def test_what_is_quoted_has_no_tag_and_one_line(text):
    assert harmless(text).isprintable() and not set(harmless(text)) & set("<>")
    assert harmless("<|im_end|>\n a  b\x00") == "|im_end| a b"
