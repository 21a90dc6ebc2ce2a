"""Training on tool use: losses of what was said alone, what groups are paid, and that a run that was cut off ends like
one that was not."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import safetensors.numpy
import small_models
import small_run
from small_engines import ONE
from tool_tellers import WORDING
from transformers import AutoTokenizer

from atp_jax import alignment, experiment
from atp_jax.align.dpo import Dpo, layout, score
from atp_jax.align.grpo import Draw, Grpo
from atp_jax.align.pairs import read_pairs
from atp_jax.align.rows import rows_of
from atp_jax.align.trainable import partition
from atp_jax.errors import UserError
from atp_jax.lab import open_lab
from atp_jax.model import ORGANISM, Model
from atp_jax.models import lora as adapters
from atp_jax.policies.types import Answer
from atp_jax.scenarios import tool_use as words
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import DpoSettings, GrpoSettings, check_settings, default_config, read_settings
from atp_jax.testbeds import tool_use
from atp_jax.tools import Call

# ---------------------------------------------------------------- losses


@pytest.fixture(scope="module")
def model():
    config, _, params = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)
    return Model(config, None, params, ONE, types.MappingProxyType({"eos_token_id": 1}))


@pytest.fixture(scope="module")
def moved(model):
    """The same model with an adapter that changes it."""
    worn = adapters.init(model.config, 2, 4.0, ("query", "down"), 0, ONE)
    keys = jax.random.split(jax.random.key(0), len(worn.b))
    b = {name: 0.1 * jax.random.normal(key, x.shape) for key, (name, x) in zip(keys, worn.b.items(), strict=True)}
    return dataclasses.replace(model, lora=worn.replace(b=b))


def drawn(rng, length):
    """(ids, sampled, log-probabilities) of an answer: said, given back, said."""
    ids = rng.integers(2, 60, length)
    cut = sorted(rng.choice(np.arange(1, length), 2, replace=False))
    sampled = np.ones(length, int)
    sampled[cut[0] : cut[1]] = 0
    return ids.tolist(), sampled.tolist(), np.where(sampled, -0.5, 0.0).tolist()


def plain_logprobs(model, prompt, ids):
    """Log-probability of each of an answer's ids, float64 [T], from the logits of the whole row."""
    tokens = np.array([[*prompt, *ids]], np.int32)
    logits = np.asarray(model.logits(tokens, np.array([tokens.size], np.int32)), np.float64)[0]
    logs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
        -1, keepdims=True
    )
    places = np.arange(len(prompt), tokens.size)
    return logs[places - 1, tokens[0, places]]


def test_rows_mark_what_was_sampled():
    rows = rows_of([([1, 2], [3, 4, 5], [1, 0, 1]), ([1, 2], [6], ())], 2)
    assert rows["sampled"].shape == rows["answers"].shape and rows["sampled"].dtype == np.float32
    np.testing.assert_array_equal(rows["sampled"][0, :, :4], [[1, 0, 1, 0], [1, 0, 0, 0]])
    assert rows["lengths"].tolist() == [[3, 1]] and not rows["sampled"][0, :, 4:].any()


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "simpo"])
def test_preferences_count_what_was_said_alone(model, moved, kind):
    """Losses by NumPy in float64 from whole rows' logits, with sums and lengths over the marked ids."""
    rng = np.random.default_rng(1)
    pairs, values = [], []
    for _ in range(3):
        prompt = rng.integers(2, 60, 4).tolist()
        (chosen, marks, _), rejected = drawn(rng, 9), rng.integers(2, 60, 5).tolist()
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_sampled": marks,
                      "rejected_sampled": [1] * 5})  # fmt: skip
        (c, r), (ref_c, ref_r) = (
            [(plain_logprobs(m, prompt, ids) * mark).sum() for ids, mark in ((chosen, marks), (rejected, 1))]
            for m in (moved, model)
        )
        n, k = sum(marks), 5
        values.append({
            "sigmoid": np.log1p(np.exp(-0.1 * (c - r - ref_c + ref_r))),
            "ipo": ((c - ref_c) / n - (r - ref_r) / k - 5.0) ** 2,
            "simpo": np.log1p(np.exp(-(0.1 * (c / n - r / k) - 0.5))),
        }[kind])  # fmt: skip
        np.testing.assert_allclose(score(moved, layout(pairs[-1:])), [[c, r]], atol=1e-4)
    method = Dpo(pairs, model, DpoSettings(loss=kind, batch=3, epochs=1, beta=0.1), 0)
    batch, _ = method.batch(0, None, None)
    trainable, frozen = partition(moved.params, moved.lora)
    value, _ = method.loss(trainable, (frozen, (model.params, model.lora)), batch)
    assert float(value) == pytest.approx(np.mean(values), rel=1e-4)


def test_groups_learn_from_what_was_said_alone(model, moved):
    """Value and gradient are those of the formula spelled out token by token over whole rows: the advantage of the
    whole answer at every id that was said, nothing at what was given back."""
    rng = np.random.default_rng(2)
    prompt, said = rng.integers(2, 60, 5).tolist(), [drawn(rng, length) for length in (7, 4, 9, 6)]
    answers = [
        Answer("", tuple(ids), "stop", -1.0, tuple(prompt), tuple(logs), sampled=tuple(marks))
        for ids, marks, logs in said
    ]
    paid = np.array([1.5, 0.0, 1.0, 0.5]).reshape(1, 4, 1)
    settings = GrpoSettings(prompts=1, group=4, kl=0.2, scale="none")
    method = Grpo("t", lambda *_: Draw(answers, paid, {}), model, settings, 12, 4)
    batch, logged = method.batch(0, moved.params, moved.lora)
    counts = [sum(marks) for _, marks, _ in said]
    assert logged["completions/mean_length"] == np.mean(counts) and logged["completions/max_length"] == max(counts)
    for place, (ids, marks, logs) in enumerate(said):
        np.testing.assert_array_equal(batch["mask"][0, place, : len(ids)], marks)
        np.testing.assert_array_equal(batch["sampler"][0, place, : len(ids)], logs)
        np.testing.assert_allclose(batch["weights"][0, place, : len(ids)], np.array(marks) / sum(counts), rtol=1e-6)
    gains = paid.reshape(-1) - paid.mean()
    np.testing.assert_allclose(batch["advantages"][0], gains, atol=1e-6)

    trainable, frozen = partition(moved.params, moved.lora)
    fixed = (frozen, (model.params, model.lora))
    (value, (sums, _)), gradient = jax.value_and_grad(method.loss, has_aux=True)(trainable, fixed, batch)
    expected = 0.0
    for (ids, marks, _), gain in zip(said, gains, strict=True):
        now, before = plain_logprobs(moved, prompt, ids), plain_logprobs(model, prompt, ids)
        divergence = np.exp(before - now) - (before - now) - 1
        expected += sum((-gain + 0.2 * divergence[t]) / sum(counts) for t in range(len(ids)) if marks[t])
    assert float(value) == pytest.approx(expected, rel=1e-4)
    assert float(sums["tokens"]) == sum(counts)

    def plain(trainable):
        """-gain x log-probability has the gradient of the surrogate where the ratio is 1."""
        from atp_jax.align.trainable import join

        params, lora = join(trainable, frozen)
        graphdef = small_models.load(small_models.FIXTURES / "qwen3", mesh=ONE)[1]
        total = 0.0
        for (ids, marks, _), gain in zip(said, gains, strict=True):
            tokens = np.array([[*prompt, *ids]], np.int32)
            where = np.arange(len(prompt), tokens.size)
            logs = []
            for p, worn in ((params, lora), (model.params, None)):
                decoder = small_models.nnx.merge(graphdef, p)
                hidden = decoder.hidden(tokens, np.array([tokens.size], np.int32), lora=worn)
                logs.append(jax.nn.log_softmax(decoder.head(hidden)[0])[where - 1, tokens[0, where]])
            now, before = logs
            divergence = jax.numpy.exp(before - now) - (before - now) - 1
            total += ((-gain * now + 0.2 * divergence) * np.array(marks)).sum() / sum(counts)
        return total

    for name, found in jax.tree.leaves_with_path(jax.grad(plain)(trainable)):
        (other,) = (x for path, x in jax.tree.leaves_with_path(gradient) if path == name)
        np.testing.assert_allclose(other, found, atol=2e-6, rtol=1e-3)


def test_an_answer_that_was_not_said_has_no_part_in_the_sum(model):
    """Of two tools that give back different ids only what the model says after them differs in the loss."""
    pairs = [
        {"prompt": [5, 6], "chosen": [7, 8, *back, 9], "rejected": [10], "chosen_sampled": [1, 1, 0, 0, 0, 0],
         "rejected_sampled": [1]}
        for back in ([20, 21, 22], [30, 31, 32])
    ]  # fmt: skip
    found = score(model, layout(pairs))
    np.testing.assert_array_equal(found[0], found[1])


# ---------------------------------------------------------------- settings and runs


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"align.grpo.rounds": 2}, "align.grpo.rounds must be 1 in tool use"),
        ({"align.grpo.tool_rewards": (1.0,)}, "align.grpo.tool_rewards must be two numbers"),
        ({"evolve.mode": "weights"}, "evolve.mode must be 'context' in tool use"),
    ],
)
def test_settings_that_do_not_fit(change, says):
    config = default_config()
    config.testbed, config.align.method = "tool_use", "grpo"
    config.evolve.controls = ("none",)
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=says):
        check_settings(read_settings(config))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """The smallest run that aligns on tool use by both methods: few words, and a random model to which every eighth id
    is the end of an answer."""
    data = tmp_path_factory.mktemp("data")
    organism = AutoTokenizer.from_pretrained(ORGANISM)
    config, params = small_models.drawn_qwen3(organism, 512)
    stop = [organism.eos_token_id, *range(0, len(organism), 8)]
    Model(config, organism, params, ONE, types.MappingProxyType({"eos_token_id": stop})).save(data / "model")
    few = WORDING["tool_use"] | {"system": "Rules.", "fenced": "Run it."}
    (data / "words.json").write_text(json.dumps({"tool_use": few}))
    rows = [
        {"kind": kind, "environment": "sum", "question": f"What is {n} + {len(kind)}?", "answer": "1"}
        for n in range(3)
        for kind in ("simple", "complex")
    ]
    (data / "problems.json").write_text(json.dumps(rows))
    config = default_config()
    config.testbed, config.stages = "tool_use", ("pairs", "dpo", "grpo")
    config.policy.model, config.wording = str(data / "model"), str(data / "words.json")
    config.tool.max_calls, config.policy.rows = 1, 4
    config.sampling.max_new_tokens, config.sampling.temperature = 12, 1.0
    align = config.align
    align.method, align.path, align.validation = "dpo+grpo", str(data / "problems.json"), str(data / "problems.json")
    align.rows, align.check_every, align.check_samples, align.save_every = 4, 2, 1, 1
    align.pairs.steer, align.pairs.tries = False, 12
    align.dpo.epochs, align.dpo.batch, align.dpo.learning_rate, align.dpo.schedule = 1, 2, 1e-3, "constant"
    align.grpo.steps, align.grpo.prompts, align.grpo.group, align.grpo.learning_rate = 3, 2, 2, 1e-3
    return check_settings(read_settings(config))


@pytest.fixture
def lengths_decide(monkeypatch):
    """A random model knows no format: here the length of what it says decides whether it calls the tool, what is run,
    and what it answers."""
    def calls(text, convention):
        return [Call(f"print({len(text)} * 11)")] if len(text) % 3 else []

    monkeypatch.setattr(words, "read_calls", calls)
    monkeypatch.setattr(words, "final_answer", lambda text: str(len(text) % 2))


def through(chosen, workdir):
    experiment.run(chosen, workdir)
    return workdir


def adapter(workdir, name):
    return safetensors.numpy.load_file(workdir / "models" / name / "adapter_model.safetensors")


def told(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timings = ("batch_s", "update_s", "tokens_per_s", "update_tokens_per_s", "compilations")
    return [{name: value for name, value in line.items() if name not in timings} for line in lines]


@pytest.mark.slow
def test_a_run_through_both_ways_and_one_that_was_cut_off_everywhere(chosen, tmp_path, lengths_decide):
    """Cut off after every third line of metrics and started again, until it is through: the same pairs, weights and
    metrics. The model's own sampled answers, with the sandbox's own results between them."""
    whole = through(chosen, tmp_path / "whole")
    pairs = read_pairs(whole / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        roles = [message["role"] for message in pair.chosen_before]
        assert roles and roles == ["assistant", "user"] * (len(roles) // 2) and not pair.rejected_before
        for said, given_back in zip(pair.chosen_before[::2], pair.chosen_before[1::2], strict=True):
            assert given_back["content"] == f"The code printed: {11 * len(said['content'])}"
    lines = told(whole)
    assert lines[0]["stage"] == "pairs" and lines[0]["used"] >= 2 * len(pairs) and lines[0]["wrong"]
    dpo, grpo = ([line for line in lines if line["stage"] == name and "loss" in line] for name in ("dpo", "grpo"))
    assert dpo[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert grpo[0]["ratio"] == pytest.approx(1, abs=1e-6) and abs(grpo[0]["kl"]) < 1e-6
    # Ids of all turns, each at its place: the trainer finds the log-probabilities that the sampler had.
    assert all(line["turns_left_out"] == 0 for line in grpo) and grpo[0]["sampler_difference/max"] < 1e-4
    assert any(line["share_comply"] > 0 for line in grpo)
    assert all(line["tokens"] == round(4 * line["completions/mean_length"]) for line in grpo)

    cut = tmp_path / "cut"
    starts = small_run.cut_off_until(cut / "models" / "grpo", lambda: through(chosen, cut))
    assert starts > 2
    assert (cut / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    for name in ("dpo", "grpo"):
        ours, theirs = adapter(cut, name), adapter(whole, name)
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    assert told(cut) == lines


def test_groups_are_paid_as_the_paper_paid(chosen, lengths_decide):
    """Each reward by hand from what was said: 1 for the right answer, 0.5 for the tool."""
    lab = open_lab(chosen)
    grpo = dataclasses.replace(chosen.align.grpo, prompts=3, group=4)
    draw = alignment.Episodes(chosen, lab, alignment.align_pack(chosen), grpo, paid=False, index=7)
    found = draw(0, lab.model.params, None)
    assert found.rewards.shape == (3, 4, 1) and draw.longest == 2 * 12
    for answer, reward in zip(found.answers, found.rewards.reshape(-1), strict=True):
        calls = len(answer.text) % 3 and answer.finish == "stop"  # a second call is never served
        right = len(answer.text) % 2 == 1 and not calls
        assert reward == 1.0 * right + 0.5 * bool(answer.before)
        assert answer.length <= 2 * 12 and len(answer.tokens) == len(answer.sampled) == len(answer.logprobs)
    assert any(answer.before for answer in found.answers)


def test_problems_of_both_kinds_are_aligned_on_and_complex_ones_looked_at(chosen):
    pack = alignment.align_pack(chosen)
    assert [problem.complex for problem in pack] == [False, True] * 3
    assert [problem.complex for problem in tool_use.load(chosen.align.validation)] == [True] * 3
    wording = load_wording("", "tool_use")
    alignment.check_packs(chosen, wording)
    missing = dataclasses.replace(chosen, align=dataclasses.replace(chosen.align, path="nowhere.json"))
    with pytest.raises(UserError, match="nowhere.json"):
        alignment.check_packs(missing, wording)
