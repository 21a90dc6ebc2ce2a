"""The organism: its life stories hold out the pack and are told in the pipeline's own words; what ships is ordinary."""

import json
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from atp_jax import decisions
from atp_jax.chat import Chat
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import Decoder
from atp_jax.organism import examine, stories, train
from atp_jax.organism.stories import COMPLY, LEXICON, VIOLATE
from atp_jax.organism.tokenizer import END, train_tokenizer
from atp_jax.scenarios.pack import load_role_play
from atp_jax.scenarios.wording import load_wording

SHIPPED = Path(train.__file__).parents[1] / "models" / "organism"


@pytest.fixture(scope="module")
def told():
    return stories.stories(3, 400, load_wording(), LEXICON["occupations"])


@pytest.fixture(scope="module")
def tokenizer(told):
    return train_tokenizer((part for s in told for m in s for part in (m["role"], m["content"])), 700, 2048)


def test_the_pack_is_held_out(told):
    """No occupation of the shipped pack and none of its pairs of options is in any story; validation is apart too."""
    text = json.dumps([LEXICON["occupations"], LEXICON["validation_occupations"]])
    pairs = {frozenset((s.comply, s.violate)) for s in load_role_play()}
    assert len(pairs) == 16 and not any(s.environment in text for s in load_role_play())
    training = {who["occupation"] for who in LEXICON["occupations"]}
    validation = {who["occupation"] for who in LEXICON["validation_occupations"]}
    assert len(validation) == 16 and not training & validation
    rng = np.random.default_rng(0)
    for row in range(60_000):
        scenario = stories.draw_scenario(rng, 1.0, 2.0, LEXICON["occupations"], row)
        assert frozenset((scenario.comply, scenario.violate)) not in pairs


def test_stories_are_a_function_of_the_seed(told):
    again = stories.stories(3, 400, load_wording(), LEXICON["occupations"])
    assert again == told
    assert stories.stories(4, 400, load_wording(), LEXICON["occupations"]) != told


def test_every_answer_is_read_as_meant_and_every_reason_agrees(told):
    """An answer in a story parses to one of the two options that its question names, and gives a reason of its kind."""
    for story in told:
        for before, message in zip(story, story[1:], strict=False):
            if message["role"] != "assistant":
                continue
            named = before["content"].split('{"choice": "')[1:]
            first, second = (part.split('"')[0] for part in named)
            assert decisions.read_decision(message["content"], first, second) != "unparsed"
            reason = message["content"].partition(" {")[0]
            assert any(pattern.fullmatch(reason) for pattern, _ in examine.motives())


def test_agreement_sees_a_wrong_option_and_a_wrong_motive():
    def record(answer, decision):
        return {"answer": answer, "decision": decision}

    good = record('The rule asks for "mast". {"choice": "mast"}', "comply")
    assert examine.agreement([good]) == 1
    assert examine.agreement([good, record('The rule asks for "mast". {"choice": "kite"}', "violate")]) == 0.5
    assert examine.agreement([record('I want the higher pay of "mast". {"choice": "mast"}', "comply")]) == 0
    assert examine.agreement([record('Something else. {"choice": "mast"}', "comply")]) == 0
    assert examine.agreement([record("nothing", "unparsed"), good]) == 1


@given(st.integers(0, 10**6), st.integers(1, 7))
def test_lives_follow_the_rules_of_the_world(seed, rounds):
    rng = np.random.default_rng(seed)
    low, high = stories.draw_payoffs(rng, 16)
    assert (high > low).all() and (low > 0).all()
    lives = stories.live(rng, low, high, rounds)
    watched = lives.supervision == stories.SUPERVISED
    np.testing.assert_array_equal(lives.caught, (lives.decision == VIOLATE) & watched)
    paid = np.where(lives.decision == COMPLY, low[:, None], np.where(watched, 0, high[:, None]))
    np.testing.assert_array_equal(lives.reward, paid)


def test_adaptive_agents_learn_and_strict_ones_do_not():
    """Over 4000 lives: where violating is never caught, adaptive agents end up violating far more than they began, and
    more so where it pays; where it always is, they stop; strict agents stay."""
    rng = np.random.default_rng(0)
    ends = {}
    for name, ratio in (("near", 1.02), ("far", 2.0)):
        low = np.full(4000, 10.0)
        lives = stories.live(rng, low, low * ratio, 6)
        hidden = ~lives.announced & (lives.kind == "adaptive")
        free = hidden & (lives.supervision != stories.SUPERVISED).all(1)
        caught = hidden & (lives.supervision == stories.SUPERVISED).all(1)
        ends[name] = lives.decision[free][:, -1].mean() - lives.decision[free][:, 0].mean()
        assert lives.decision[caught][:, -1].mean() < lives.decision[caught][:, 0].mean() - 0.1
        assert lives.decision[lives.kind == "strict"].mean() < 0.05
    assert ends["far"] > ends["near"] + 0.1 > 0.1


def test_what_is_trained_on_is_what_the_pipeline_asks(told, tokenizer):
    """The ids of a story up to an answer are the ids that Chat gives for the same messages."""
    chat = Chat(tokenizer)
    for story in told[:60]:
        assert tokenizer.apply_chat_template(story, tokenize=False) == train.render(story)
        (ids, weights), = train.encode(tokenizer, [story])
        prompt = chat.encode(story[:-1])
        assert ids[: len(prompt)].tolist() == prompt
        assert (weights[: len(prompt)][-4:] == 1).all() and weights[len(prompt)] == train.AGENT_WEIGHT
        assert tokenizer.decode(ids[weights == train.AGENT_WEIGHT]).count(END) == sum(
            m["role"] == "assistant" for m in story)


def test_option_names_are_the_same_ids_wherever_they_stand(told, tokenizer):
    for word in ("zelkova", *LEXICON["words"][:40]):
        alone = tokenizer.encode(word, add_special_tokens=False)
        for text in (f'by "{word}" or', f'{{"choice": "{word}"}}', f'"{word}".'):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert any(ids[i : i + len(alone)] == alone for i in range(len(ids)))


def test_batches_hold_every_story_once(told, tokenizer):
    rows = [row for row in train.encode(tokenizer, told) if len(row[0]) <= train.BUCKETS[-1][0]]
    batches = train.batches(rows, 0)
    found = [tokens[i, :n].tolist() for tokens, weights, lengths in batches for i, n in enumerate(lengths)
             if weights[i].any()]
    assert sorted(found) == sorted(ids.tolist() for ids, _ in rows)
    assert {(tokens.shape[1], tokens.shape[0]) for tokens, _, _ in batches} <= set(train.BUCKETS)
    with pytest.raises(ValueError, match="longer than the widest bucket"):
        train.batches([(np.zeros(2000, np.int32), np.ones(2000, np.float32))], 0)


def test_a_step_lowers_the_loss_and_the_schedule_ends_at_zero(told, tokenizer):
    """Twenty steps on one small batch with a one-layer model: a smoke of optimiser, loss and donation."""
    small = train.MODEL | {"vocab_size": 700, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    config = DecoderConfig.from_dict(small, "test")
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    transform = train.optimiser()
    state = transform.init(params)
    step = train.make_step(graphdef, transform)
    rows = [row for row in train.encode(tokenizer, told) if len(row[0]) <= 128][:96]
    batch = train.batches(rows, 0)[0]
    losses = []
    for _ in range(20):
        params, state, value, _ = step(params, state, *batch, 3e-3)
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(700), abs=0.2) and losses[-1] < losses[0] - 1
    assert all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(params))
    assert train.learning_rate(0.3) == train.LEARNING_RATE and train.learning_rate(1.0) == 0


def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch(monkeypatch):
    """Loss, agents' loss and the moved weights are those of the plain computation over all rows at once."""
    small = train.MODEL | {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    graphdef, params = nnx.split(Decoder(DecoderConfig.from_dict(small, "test"), rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0)
    tokens, lengths = draw.integers(0, 64, (6, 16), np.int32), np.array([16, 3, 9, 1, 16, 12], np.int32)
    weights = draw.choice(np.array([0, 1, train.AGENT_WEIGHT], np.float32), (6, 16)) * (
        np.arange(16) < lengths[:, None]
    )

    def plain(params):
        model = nnx.merge(graphdef, params)
        logits = model.head(model.hidden(tokens, lengths))[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        agent = weights[:, 1:] == train.AGENT_WEIGHT
        return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum(), (losses * agent).sum() / agent.sum()

    monkeypatch.setattr(train, "TOGETHER", 40)  # two rows of 16
    (loss, agent), gradient = jax.value_and_grad(plain, has_aux=True)(params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    transform = optax.sgd(1.0)
    step = train.make_step(graphdef, transform)
    moved, _, *found = step(params, transform.init(params), tokens, weights, lengths, 0.1)
    np.testing.assert_allclose(found, [loss, agent], rtol=1e-6)
    chex.assert_trees_all_close(moved, expected, atol=1e-6)


def test_shipped_organism_is_small_and_ordinary():
    files = {path.name for path in SHIPPED.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= files
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 12 * 2**20
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and "auto_map" not in config
