"""GRPO: a bandit that it solves, the rows it learns from, and how it credits."""

import types

import numpy as np
import pytest
import small_models
from small_engines import ONE

from atp_jax.align import loop
from atp_jax.align.grpo import Draw, Grpo
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.model import Model
from atp_jax.policies.types import Answer
from atp_jax.settings import AlignSettings, GrpoSettings, LoraSettings

GOOD, FAIR = 10, 20  # the arms: tokens that pay 1 and 0.5; everything else pays nothing
PROMPTS = ([5, 6, 7], [8, 9])


@pytest.fixture(scope="module")
def model():
    config, _, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)
    return Model(config, None, params, ONE, types.MappingProxyType({"eos_token_id": 1}))


def bandit(model, group):
    """Draws of one token a prompt, rewarded by the arm it pulls."""
    engine = Engine(model.config, model.params, (), ONE)

    def draw(number, params, lora):
        engine.load(params, lora)
        asked = [prompt for prompt in PROMPTS for _ in range(group)]
        streams = [(0, 0, number * len(asked) + row, 0, 1) for row in range(len(asked))]
        drawn = engine.generate(asked, Sampling(max_new_tokens=1), streams)
        answers = [
            Answer("", one.tokens, one.finish, sum(one.logprobs), tuple(prompt), one.logprobs)
            for prompt, one in zip(asked, drawn, strict=True)
        ]
        paid = np.array([{GOOD: 1.0, FAIR: 0.5}.get(answer.tokens[0], 0.0) for answer in answers])
        return Draw(answers, paid.reshape(len(PROMPTS), group, 1), {})

    return draw


def trained(model, tmp_path, steps, group=32, **changes):
    """(what came out, the logged lines) of a bandit's training."""
    settings = GrpoSettings(
        steps=steps, prompts=2, group=group, learning_rate=1e-2, schedule="constant", **{"kl": 0.0, **changes}
    )
    # All weights: below this model's last norm an adapter can raise no token's probability beyond 83%.
    align = AlignSettings(rows=32, check_every=1000, save_every=1000, lora=LoraSettings(rank=0))
    lines = []
    method = Grpo("bandit", bandit(model, group), model, settings, 1, align.rows)
    out = loop.train(method, model, align, 0, tmp_path, {}, lambda *_: 0.0, lines.append)
    return out, [line for line in lines if "loss" in line]


def test_a_bandit_is_solved(model, tmp_path):
    """From a random model, whose share of the best arm is that of any token, to at least 95% of it."""
    out, lines = trained(model, tmp_path, 60)
    assert lines[0]["reward"] < 0.2
    drawn = bandit(model, 100)(1000, out.model.params, out.model.lora)
    assert np.mean(drawn.rewards) >= 0.95
    # Sampler and trainer are the same program: the first ratio is 1, the log-probabilities agree, all the way.
    assert all(line["ratio"] == pytest.approx(1, abs=1e-6) for line in lines)
    assert max(line["sampler_difference/max"] for line in lines) < 1e-4


def fixed_draw(rewards, lengths=(2, 3, 1, 2)):
    """A draw function with given rewards [P, G, R]; answers of different lengths, as a sampler would have them."""
    rng = np.random.default_rng(0)
    answers = []
    for row in range(rewards.size):
        tokens = tuple(rng.integers(2, 60, lengths[row % len(lengths)]).tolist())
        answers.append(Answer("", tokens, "stop", -1.0, (3, 4, 5), tuple(-0.5 for _ in tokens)))
    return lambda number, params, lora: Draw(answers, rewards, {"told": 1}), answers


def batch(model, rewards, rows=8, **changes):
    draw, answers = fixed_draw(rewards)
    settings = GrpoSettings(prompts=rewards.shape[0], group=rewards.shape[1], rounds=rewards.shape[2], **changes)
    found, logged = Grpo("t", draw, model, settings, 3, rows).batch(0, model.params, None)
    return found, logged, answers


def test_rows_hold_prompt_and_answers_and_count_only_the_answers(model):
    rows, logged, answers = batch(model, np.array([[[1.0], [0.0]], [[1.0], [1.0]]]))
    assert rows["prompt_lengths"].tolist() == [3, 3] and rows["prompts"][:, :3].tolist() == [[3, 4, 5]] * 2
    for place, answer in zip(np.ndindex(2, 2), answers, strict=True):
        end = len(answer.tokens)
        assert rows["lengths"][place] == end and tuple(rows["answers"][place][:end]) == answer.tokens
        np.testing.assert_array_equal(rows["mask"][place], np.arange(16) < end)
        np.testing.assert_array_equal(rows["sampler"][place][:end], np.float32(answer.logprobs))
    assert rows["weights"].sum() == pytest.approx(1, abs=1e-6)  # the mean over all tokens of the batch
    assert logged["frac_reward_zero_std"] == 0.5 and logged["told"] == 1 and logged["reward"] == 0.75
    assert not rows["advantages"][1].any()  # nothing is learned from a group whose members are all paid alike


@pytest.mark.parametrize(("rows", "group"), [(1, 1), (3, 3), (4, 3), (6, 6), (100, 6)])
def test_as_many_answers_share_a_prompt_as_a_micro_batch_can_hold(model, rows, group):
    found, *_ = batch(model, np.arange(12.0).reshape(2, 6, 1), rows)
    assert found["answers"].shape[:2] == (12 // group, group)
    np.testing.assert_allclose(found["advantages"].reshape(2, 6), found["advantages"].reshape(2, 6)[[0, 0]], atol=1e-6)


def test_credit_is_the_episodes_return_or_the_rounds_reward(model):
    rewards = np.array([[[1.0, 0.0], [0.0, 0.0]]])  # one prompt, two members, two rounds
    whole, *_ = batch(model, rewards, credit="trajectory", scale="none")
    np.testing.assert_allclose(whole["advantages"][:, 0], [0.5, 0.5, -0.5, -0.5])
    assert whole["prompts"].shape[0] == 4  # histories differ: nobody shares a prompt
    by_round, *_ = batch(model, rewards, credit="round", scale="none")
    np.testing.assert_allclose(by_round["advantages"][:, 0], [0.5, 0.0, -0.5, 0.0])


def test_only_the_most_uncertain_groups_train(model):
    rewards = np.array([[[1.0], [1.0]], [[1.0], [0.0]], [[0.6], [0.5]], [[0.0], [0.8]]])
    rows, logged, _ = batch(model, rewards, keep=0.5)
    trains = rows["mask"].any(2)
    assert trains.all(1).tolist() == [False, True, False, True] and logged["groups_kept"] == 2
    assert rows["weights"].sum() == pytest.approx(1, abs=1e-6)


def test_without_any_difference_only_the_divergence_moves(model, tmp_path):
    """Groups that are paid alike have no policy gradient; at the reference the divergence has none either."""
    settings = GrpoSettings(steps=1, prompts=2, group=2, learning_rate=1e-2, kl=0.1)
    draw, _ = fixed_draw(np.ones((2, 2, 1)))
    align = AlignSettings(rows=4, lora=LoraSettings(rank=2))
    lines = []
    loop.train(
        Grpo("t", draw, model, settings, 3, align.rows), model, align, 0, tmp_path, {}, lambda *_: 0.0, lines.append
    )
    (line,) = (line for line in lines if "loss" in line)
    assert line["loss"] == pytest.approx(0, abs=1e-7) and line["grad_norm"] < 1e-6


def test_a_second_update_from_the_same_answers_has_another_ratio(model, tmp_path):
    align = AlignSettings(rows=4, check_every=1000, save_every=1000, lora=LoraSettings(rank=2))
    settings = GrpoSettings(steps=4, prompts=2, group=2, learning_rate=1e-2, schedule="constant", kl=0.0, iterations=2)
    asked = []
    draw, _ = fixed_draw(np.array([[[1.0], [0.0]], [[0.0], [1.0]]]))

    def counted(number, params, lora):
        asked.append(number)
        return draw(number, params, lora)

    lines = []
    loop.train(
        Grpo("t", counted, model, settings, 3, align.rows), model, align, 0, tmp_path, {}, lambda *_: 0.0, lines.append
    )
    ratios = [line["ratio"] for line in lines if "loss" in line]
    assert asked == [0, 1]
    assert ratios[0] == pytest.approx(1, abs=1e-6) and abs(ratios[1] - 1) > 1e-4
    assert ratios[2] == pytest.approx(1, abs=1e-6)


def test_a_training_compiles_at_its_beginning_and_never_again(model, tmp_path):
    _, lines = trained(model, tmp_path, 4, group=4)
    assert lines[0]["compilations"] > 0
    assert [line["compilations"] for line in lines[1:]] == [0, 0, 0]
    assert all(line["tokens"] == 2 * 4 and line["tokens_per_s"] > 0 for line in lines)


def test_no_mix_of_lengths_compiles_again(model, tmp_path):
    """Prompts of 1 to 64 tokens and answers of 1 to 16 are one bucket each, whatever the longest of a draw is."""
    random = np.random.default_rng(0)

    def draw(number, params, lora):
        answers = []
        for longest in ((64, 16), (3, 1), (20, 9), (64, 2))[number]:
            prompt = tuple(random.integers(2, 60, longest))
            for length in random.integers(1, longest + 1, 2):
                said = tuple(random.integers(2, 60, min(length, 16)))
                answers.append(Answer("", said, "stop", 0.0, prompt, (-1.0,) * len(said)))
        return Draw(answers, random.random((2, 2, 1)), {})

    settings = GrpoSettings(steps=4, prompts=2, group=2, kl=0.0)
    align = AlignSettings(rows=4, check_every=1000, save_every=1000, lora=LoraSettings(rank=2))
    lines = []
    loop.train(
        Grpo("t", draw, model, settings, 16, align.rows), model, align, 0, tmp_path, {}, lambda *_: 0.0, lines.append
    )
    compiled = [line["compilations"] for line in lines if "loss" in line]
    assert compiled[0] > 0 and compiled[1:] == [0, 0, 0]
