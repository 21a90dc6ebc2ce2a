"""Rounds that are begun before the host has seen to the ones before: the same prompts, answers and bytes, in one
program a round, also where what was foreseen is wrong."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_models
import small_run
import tiny_tokenizers
from test_experiment_model import arguments, checkpoint  # noqa: F401 (a fixture)
from test_lora import drawn

from atp_jax.__main__ import main
from atp_jax.chat import Chat
from atp_jax.compilations import Compilations
from atp_jax.errors import UserError
from atp_jax.generate import ahead
from atp_jax.generate.engine import SHARED
from atp_jax.generate.sampling import Sampling
from atp_jax.model import Model, load_model
from atp_jax.parallel import make_mesh
from atp_jax.policies.model import ModelPolicy
from atp_jax.policies.types import Answer, Script
from atp_jax.scenarios.pack import load_role_play
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import check_settings, default_config, read_settings
from atp_jax.testbeds.role_play import Lives, conditions

HERE = Path(__file__).resolve().parent
ROUNDS = 4
SAMPLING = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def organism():
    return load_model(mesh=make_mesh(devices=jax.devices()[:1]))


def tiny(tokenizer, mesh=None, params=None) -> Model:
    config, drawn = small_models.drawn_qwen3(tokenizer, 4096)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    return Model(config, tokenizer, drawn if params is None else params, mesh)


def lives(
    items=12, samples=1, rounds=ROUNDS, window=None, control="none", parity="default", order=1, wording=None
) -> Lives:
    config = default_config()
    config.parity, config.evolve.rounds, config.evolve.window = parity, rounds, window
    config.evolve.supervision, config.evolve.controls = "alternating", (control,)
    chosen = read_settings(config)
    scenarios = [scenario for scenario in load_role_play()[:items][::order] for _ in range(samples)]
    return Lives(conditions(chosen, "base", 0)[0], scenarios, wording or load_wording(), chosen)


@pytest.fixture
def begun(monkeypatch):
    """The number of each round that was begun, and whether anything was to be drawn in it."""
    seen, original = [], ahead.live_round

    def spy(weights, state, asked, script, new, number, **static):
        seen.append((int(number), not bool(np.all(asked.done))))
        return original(weights, state, asked, script, new, number, **static)

    monkeypatch.setattr(ahead, "live_round", spy)
    return seen


def live(policy, life, script=None, told=()):
    """Answers and records of all rounds, of which those `told` are recalled. script: what makes it, if anything."""
    if script is not None:
        policy.foresee(script)
    answers, records = [], []
    for number in range(ROUNDS):
        requests = life.ask()
        if number < len(told):
            policy.recall(requests)
        answers.append(told[number] if number < len(told) else policy.answer(requests))
        records.append(life.tell(answers[-1]))
    return answers, records


def assert_same(one, other):
    for answer, expected in zip(sum(one[0], []), sum(other[0], []), strict=True):
        assert (answer.prompt, answer.tokens, answer.finish) == (expected.prompt, expected.tokens, expected.finish)
        np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=1e-4)
    for answer, expected in zip(sum(one[1], []), sum(other[1], []), strict=True):
        assert answer["decision"] == expected["decision"] and answer["messages"] == expected["messages"]


@pytest.fixture(scope="module")
def expected(organism):
    """What nothing is foreseen of."""
    found = live(ModelPolicy(organism, SAMPLING, 0), lives())
    assert {"comply", "violate"} <= {record["decision"] for record in sum(found[1], [])}
    assert {record["caught"] for record in sum(found[1], [])} == {True, False}
    return found


def test_each_round_is_begun_once_and_answered_as_if_nothing_was_foreseen(organism, expected, begun):
    policy = ModelPolicy(organism, SAMPLING, 0)
    for _ in range(2):  # also where it is the second condition of a policy
        life, begun[:] = lives(), []
        assert_same(live(policy, life, life.script), expected)
        assert begun == [(number, True) for number in range(1, ROUNDS + 1)]


def test_a_round_is_begun_before_the_host_has_seen_to_the_one_before(organism, begun):
    policy, life = ModelPolicy(organism, SAMPLING, 0), lives()
    policy.foresee(life.script)
    for number in range(1, ROUNDS + 1):
        answers = policy.answer(life.ask())
        assert len(begun) == min(number + 1, ROUNDS)
        life.tell(answers)


@pytest.mark.slow
def test_samples_share_their_first_prompt_and_wear_the_adapter(begun):
    model = tiny(tiny_tokenizers.qwen3_tokenizer())
    model = dataclasses.replace(model, lora=drawn(model.config, 0, mesh=model.mesh))
    policies = [ModelPolicy(model, SAMPLING, 1, False) for _ in range(2)]
    expected = live(policies[0], lives(2, samples=4))
    assert max(len(answer.prompt) for answer in expected[0][0]) >= SHARED
    life = lives(2, samples=4)
    assert_same(live(policies[1], life, life.script), expected)
    assert [number for number, _ in begun][:2] == [1, 2]
    plain = ModelPolicy(dataclasses.replace(model, lora=None), SAMPLING, 1, False).answer(lives(2, samples=4).ask())
    assert [answer.tokens for answer in plain] != [answer.tokens for answer in expected[0][0]]


def swapped(script: Script) -> Script:
    """Who complied is told that it violated, and the other way round."""
    return dataclasses.replace(script, which=script.which[:, :, [1, 0, 2]])


def cut(script: Script) -> Script:
    """Nothing as long as what is really said can be appended."""
    return dataclasses.replace(script, segments=tuple(segment[:1] for segment in script.segments))


def of_others(script: Script) -> Script:
    return dataclasses.replace(script, condition=script.condition + 1)


@pytest.mark.parametrize("wrong, rounds", [
    (swapped, [1, 2, 2, 3, 4]),  # drawn again behind the right words, and then no longer ahead
    (cut, [1, 2]),  # as if nothing had been foreseen from there on
    (of_others, []),
])  # fmt: skip
def test_what_was_foreseen_wrongly_is_drawn_again(organism, expected, begun, wrong, rounds):
    policy, life = ModelPolicy(organism, SAMPLING, 0), lives()
    assert_same(live(policy, life, lambda chat: wrong(life.script(chat))), expected)
    assert [number for number, _ in begun] == rounds


@pytest.mark.parametrize("wrong", [lambda script: script, swapped, cut])
def test_rounds_that_are_recalled_go_on_bit_for_bit(organism, begun, wrong):
    policy, life = ModelPolicy(organism, SAMPLING, 0), lives()
    whole, _ = live(policy, life, lambda chat: wrong(life.script(chat)))
    for finished in (1, 2, 3):
        again, begun[:] = lives(), []
        answers, _ = live(
            ModelPolicy(organism, SAMPLING, 0), again, lambda chat, own=again: wrong(own.script(chat)), whole[:finished]
        )
        assert answers == whole
        assert not any(draws for number, draws in begun if number <= finished)


def test_new_words_seeds_and_answers_of_the_same_buckets_compile_nothing(organism):
    for order, seed in ((1, 0), (-1, 1)):
        with Compilations() as compiled:
            policy, life = ModelPolicy(organism, SAMPLING, seed), lives(order=order)
            live(policy, life, life.script)
    assert compiled.count == 0


def test_only_what_fits_is_begun_ahead(organism, begun):
    """Not more than the rows there may be at a time, nor what the context has no room for, nor long answers."""
    config = dataclasses.replace(organism.config, max_position_embeddings=400)
    for policy in (
        ModelPolicy(organism, SAMPLING, 0, rows=4),
        ModelPolicy(dataclasses.replace(organism, config=config), SAMPLING, 0),
        ModelPolicy(organism, Sampling(max_new_tokens=65), 0),
    ):
        life = lives()
        policy.foresee(life.script)
        assert len(policy.answer(life.ask())) == 12 and not begun


def test_what_a_template_takes_out_of_the_last_prompt_is_taken_back(begun):
    """Qwen3 without thoughts ends its prompt with an empty one, which is gone once there is an answer."""
    model, life = tiny(tiny_tokenizers.qwen3_tokenizer()), lives(2)
    assert [life.script(Chat(model.tokenizer, thinking)).rewind for thinking in (None, False)] == [0, 4]
    expected = live(ModelPolicy(model, SAMPLING, 1, False), lives(2))
    assert_same(live(ModelPolicy(model, SAMPLING, 1, False), life, life.script), expected)
    assert [number for number, _ in begun][:2] == [1, 2]


@pytest.mark.parametrize("make", [tiny_tokenizers.qwen3_tokenizer, tiny_tokenizers.llama31_tokenizer])
def test_a_script_says_what_the_host_would_say(make):
    """Every decision in every round, as ids."""
    chat, life = Chat(make(), False), lives(rounds=5)
    script, again = life.script(chat), lives(rounds=5)
    before, said = None, None
    for number in range(5):
        prompts = [chat.encode(request.messages) for request in again.ask()]
        for row, prompt in enumerate(prompts):
            if before is not None:
                scenario = load_role_play()[row]
                decided = said[row]["decision"]
                code = ("comply", "violate", "unparsed").index(decided)
                segment = script.segments[script.which[row, number - 1, code]]
                kept = before[row][: len(before[row]) - script.rewind]
                assert prompt == [*kept, *chat.answer(said[row]["answer"]), *segment], (scenario.id, decided)
        texts = [
            (f'{{"choice": "{scenario.comply}"}}', f'{{"choice": "{scenario.violate}"}}', "No.")[(row + number) % 3]
            for row, scenario in enumerate(load_role_play()[:12])
        ]
        answers = [Answer(text, tuple(chat.answer(text))) for text in texts]
        said, before = again.tell(answers), prompts
    assert (script.which[:, -1] == -1).all() and (script.which[:, :-1] >= 0).all()


QUOTING = load_wording()
QUOTING["role_play"]["feedback"]["unparsed"] += " It began: {answer_head}"


@pytest.mark.parametrize("unseen", [
    {"window": 2}, {"control": "no_history"}, {"parity": "upstream"}, {"rounds": 1}, {"wording": QUOTING},
])  # fmt: skip
def test_there_is_no_script_of_what_depends_on_more_than_the_decision(unseen):
    chat = Chat(tiny_tokenizers.qwen3_tokenizer())
    assert lives(**unseen).script(chat) is None
    assert lives(window=ROUNDS - 1).script(chat) is not None


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(checkpoint, tmp_path, monkeypatch, begun):  # noqa: F811
    monkeypatch.chdir(small_run.ROOT)
    more = ["--config.evolve.window=None", "--config.evolve.rounds=4", "--config.evolve.samples=1"]
    assert main(arguments(tmp_path, checkpoint, tmp_path / "plain", *more)) == 0
    more.append("--config.evolve.ahead=True")
    assert main(arguments(tmp_path, checkpoint, tmp_path / "whole", *more)) == 0
    assert {number for number, draws in begun if draws} == {1, 2, 3, 4}
    expected = small_run.left_behind(tmp_path / "whole")
    spent = [json.loads(line)["seconds"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert set(spent) == {None}  # a part of each lies in the one before
    small_run.assert_same_but_log_probs(expected, small_run.left_behind(tmp_path / "plain"))
    for share in (0.3, 0.9):
        run = tmp_path / str(share)
        shutil.copytree(tmp_path / "whole", run, ignore=shutil.ignore_patterns("results.json", "report"))
        path = run / "evolve" / "base" / "episodes.jsonl"
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        begun.clear()
        assert main(arguments(tmp_path, checkpoint, run, *more)) == 0
        assert small_run.left_behind(run) == expected
        assert share < 0.5 or (2, False) in begun


@pytest.mark.parametrize("testbed, lockstep", [("threshold_game", True), ("tool_use", True), ("role_play", False)])
def test_where_nothing_can_be_begun_ahead_it_is_refused(testbed, lockstep):
    config = default_config()
    config.testbed, config.evolve.lockstep, config.evolve.ahead = testbed, lockstep, True
    with pytest.raises(UserError, match="evolve.ahead"):
        check_settings(read_settings(config))


EIGHT = """
import jax
import test_ahead as t
from atp_jax import parallel
from atp_jax.policies.model import ModelPolicy

tokenizer, found = t.tiny_tokenizers.qwen3_tokenizer(), {}
for name, mesh in {"one": None, "data": parallel.make_mesh(8, 1, 1), "all": parallel.make_mesh(2, 2, 2)}.items():
    model = t.tiny(tokenizer)
    if mesh is not None:
        params = jax.device_put(model.params, parallel.param_shardings(t.small_models.abstract(model.config)[1], mesh))
        model = t.tiny(tokenizer, mesh, params)
    life = t.lives(6)  # 6 rows: the mesh pads them
    policy = ModelPolicy(model, t.SAMPLING, 0)
    found[name] = t.live(policy, life, life.script)
    assert policy._ahead._foresees
t.assert_same(found["data"], found["one"])
t.assert_same(found["all"], found["one"])
print("the same on 8 devices")
"""


@pytest.mark.slow
def test_eight_devices_answer_as_one():
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", EIGHT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "the same on 8 devices" in done.stdout, done.stderr
