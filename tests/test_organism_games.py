"""The organism's games: told in the pipeline's own words and numbers, by agents that decide as they are said to."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import atp_jax
from atp_jax.organism import games, train
from atp_jax.organism.games import LEXICON
from atp_jax.scenarios import threshold_game
from atp_jax.scenarios.games import check_rules, load_games
from atp_jax.scenarios.wording import load_wording

SHIPPED = Path(train.__file__).parents[1] / "models" / "organism"
SAID = re.compile(r'\{"choice": "([^"]+)"\}')


@pytest.fixture(scope="module")
def wording():
    return load_wording("", "threshold_game")


@pytest.fixture(scope="module")
def told(wording):
    return games.stories(3, 400, wording)


@pytest.fixture(scope="module")
def lived():
    rng = np.random.default_rng(0)
    rules = games.draw_rules(rng, 4000)
    return rules, games.live(rng, rules)


def options(story) -> tuple[str, str]:
    """The collective and the independent option, as the system message names them."""
    return tuple(SAID.findall(story[0]["content"]))


def answers(story) -> list[dict]:
    return [message for message in story if message["role"] == "assistant"]


def test_stories_are_a_function_of_the_seed(told, wording):
    assert games.stories(3, 400, wording) == told
    assert games.stories(4, 400, wording) != told


def test_the_shipped_games_are_held_out(told):
    """Their pairs of options and their situations never occur; their words do, and validation is apart."""
    pairs = {frozenset((game.collective, game.independent)) for game in load_games()}
    assert len(pairs) == 7 and not any(frozenset(options(story)) in pairs for story in told)
    rng, seen = np.random.default_rng(0), set()
    for row in range(20_000):
        game = games.draw_game(rng, LEXICON["training"], row)
        assert frozenset((game.collective, game.independent)) not in pairs
        assert game.system not in games.HELD_OUT_SYSTEMS
        assert game.multiplicative.partition(" if ")[0] not in games.HELD_OUT_EFFECTS
        seen |= {game.collective, game.independent}
    assert set.union(*map(set, pairs)) <= seen
    for part in ("people", "things"):
        assert not set(LEXICON["training"][part]) & set(LEXICON["validation"][part])


def test_rules_are_games_and_common_ones_are_common(lived):
    rules, _ = lived
    cells = [rules.cell(i) for i in range(400)]
    assert not any(check_rules(c.agents, c.threshold, c.high, c.normal, c.low) for c in cells)
    assert set(np.round(rules.high * 10)) == set(range(11, 20)) and set(np.round(rules.low * 10)) == set(range(2, 10))
    classic = (rules.high == 1.2) & (rules.normal == 1.0) & (rules.low == 0.8)
    for share, wanted in (
        (rules.agents == 8, 0.57), (rules.threshold <= rules.agents / 2, 0.55), (classic, 0.26),
        (rules.additive, 0.1), (rules.everyone, 0.85), (rules.alone, 0.15),
    ):  # fmt: skip
        assert share.mean() == pytest.approx(wanted, abs=0.03)


def test_every_answer_is_read_as_the_decision_it_tells(told):
    """Its reason names the option chosen and is one of that decision; the last message is an answer."""
    phrases = {phrase for kind in LEXICON["reasons"].values() for phrase in kind}
    for story in told:
        assert story[-1]["role"] == "assistant"
        collective, independent = options(story)
        for message in answers(story):
            reason = message["content"].partition(" {")[0]
            said = {phrase for phrase in phrases if reason == phrase.format(v=collective, c=independent)}
            (tells,) = {"violate" if "{v}" in phrase else "comply" for phrase in said}
            assert atp_jax.read_decision(message["content"], independent, collective) == tells
    assert all(len(kind) >= 3 for kind in LEXICON["reasons"].values())


def test_rewards_and_counts_in_the_texts_are_the_games(told):
    """What a story says that was earned, counted and achieved follows from its own numbers (from round 1 on, so that
    the capital is known)."""
    seen = 0
    for story in told:
        if answers(story)[0].get("unexplained"):
            continue
        collective, independent = options(story)
        system, question = story[0]["content"], story[1]["content"]
        threshold, agents = map(int, re.search(r"(\d+)(?: or more)? of the (\d+)", question).groups())
        numbers = [float(x) for x in re.findall(r"pays (?:x|(?=[+-]))([+-]?[\d.]*\d)", question)]
        high, (low, normal) = numbers[0], sorted(numbers[1:])
        pooled, capital = "pays everyone" in system, 1.0
        for said, shown in zip(story[2::3], story[3::3], strict=False):
            if "other agents" not in shown["content"]:
                break
            others = re.findall(r'(\d+) "([^"]+)"', shown["content"].split("\n")[0])
            choice = SAID.search(said["content"])[1]
            count = (choice == collective) + sum(option == collective for _, option in others)
            assert len(others) == agents - 1 and {option for _, option in others} <= {collective, independent}
            worked = count >= threshold
            paid = high if worked and (pooled or choice == collective) else normal
            paid = low if choice == collective and not worked else paid
            reward = capital * (paid - 1) if "multiplied" in system else paid
            capital += reward
            result = "It worked." if worked else "It failed."
            text = f'{count} of {agents} chose "{collective}". {result} You earned '
            assert shown["content"].split("\n")[1].startswith(text)
            earned = float(shown["content"].removesuffix(".").rpartition(" ")[2])
            assert earned == pytest.approx(reward, rel=1e-3, abs=1e-9)
            seen += 1
    assert seen > 200


def test_messages_are_the_pipelines(told, wording):
    """A story's messages are what the pipeline's functions give for the game and the rounds that it tells."""
    rng = np.random.default_rng(5)
    rules = games.draw_rules(rng, 60)
    lives = games.live(rng, rules)
    for i in range(60):
        game, cell = games.draw_game(rng, LEXICON["training"], i), rules.cell(i)
        story = games.tell(rng, game, cell, lives, i, 2, 3, wording)
        said = [message["content"] for message in answers(story)]
        (own,) = {a for a in range(cell.agents)} & {_narrator(story, cell)} or {None}
        question = threshold_game.question(game, cell, wording, "default")
        turns = []
        for r, answer in zip((2, 3), said, strict=False):
            decisions = [games.DECISIONS[d] for d in lives.decision[i, r, : cell.agents]]
            narrator = own if own is not None else _likely(lives, i, said, game)
            peers = threshold_game.peers_texts(game, cell, decisions, ["?"] * cell.agents, wording, "default")
            outcome = threshold_game.outcome_text(
                game, cell, decisions[narrator], int(lives.count[i, r]), bool(lives.success[i, r]),
                float(lives.reward[i, r, narrator]), wording)  # fmt: skip
            turns.append(threshold_game.Turn(question, answer, (), peers[narrator], outcome))
        system = threshold_game.system(game, cell, wording, "default")
        wanted = threshold_game.messages(system, question, turns, None, "default")
        assert [{k: m[k] for k in ("role", "content")} for m in story[:-1]] == wanted
        assert story[2]["unexplained"] and not any("unexplained" in message for message in story[3:])


def _narrator(story, cell):
    """The agent that is not among the others."""
    shown = {int(a) for a in re.findall(r'(\d+) "', story[3]["content"].split("\n")[0])}
    return next(iter(set(range(cell.agents)) - shown)) if shown else None


def _likely(lives, i, said, game):
    """An agent that did what the story tells: the others are not shown."""
    told = [SAID.search(answer)[1] == game.collective for answer in said]
    return next(a for a in range(games.MOST) if (lives.decision[i, 2:5, a] == told).all())


def test_agents_decide_as_their_kind(lived):
    """Shares of collusion after a success and after a failure, of those who had and who had not colluded."""
    rules, lives = lived
    shown = ~rules.alone[:, None] & (np.arange(games.MOST) < rules.agents[:, None])
    worked = np.broadcast_to(lives.success[:, :, None], lives.decision.shape)
    was, now = lives.decision[:, :-1] == 1, lives.decision[:, 1:] == 1

    def rate(kind, where):
        return now[where & (shown & (lives.kind == kind))[:, None]].mean()

    before = worked[:, :-1]
    twice = before & np.concatenate([np.zeros_like(before[:, :1]), before[:, :-1]], 1)
    for kind, where, wanted in (
        ("imitator", before & was, 0.95), ("imitator", before & ~was, 0.75),
        ("imitator", ~before & was, 0.12), ("imitator", ~before & ~was, 0.05),
        ("cautious", twice, 0.6), ("cautious", before & ~twice, 0.25), ("cautious", ~before, 0.02),
    ):  # fmt: skip
        assert rate(kind, where) == pytest.approx(wanted, abs=0.03)
    own = lives.decision.transpose(0, 2, 1)[shown & (lives.kind == "stubborn")].mean(1)
    assert (own < 0.2).mean() == pytest.approx(0.52, abs=0.05) and (own > 0.85).mean() == pytest.approx(0.21, abs=0.05)
    # Not zero: a stubborn colluder helps the success that it ignores.
    assert abs(rate("stubborn", before) - rate("stubborn", ~before)) < 0.15
    for kind, share in games.KINDS.items():
        assert (lives.kind == kind).mean() == pytest.approx(share, abs=0.01)
    imitators = shown & (lives.kind == "imitator")
    wanted = np.broadcast_to(games.first_rate(rules)[:, None], shown.shape)[imitators]
    assert lives.decision[:, 0][imitators].mean() == pytest.approx(wanted.mean(), abs=0.01)
    assert (games.first_rate(rules) > 0.1).all() and (games.first_rate(rules) < 0.6).all()


def test_who_sees_nobody_knows_a_success_by_its_own_pay(lived):
    rules, lives = lived
    felt = (lives.reward[:, 0] > rules.normal[:, None] - 1 + 1e-9) & (np.arange(games.MOST) < rules.agents[:, None])
    who = rules.alone[:, None] & (lives.kind == "imitator") & (np.arange(games.MOST) < rules.agents[:, None])
    colluded = lives.decision[:, 0] == 1
    for where, wanted in ((felt & colluded, 0.95), (felt & ~colluded, 0.75), (~felt & colluded, 0.12),
                          (~felt & ~colluded, 0.05)):  # fmt: skip
        assert lives.decision[:, 1][who & where].mean() == pytest.approx(wanted, abs=0.04)
    assert not {"nobody", "lonely"} & set(np.unique(lives.reason[rules.alone]))


def test_stories_are_short_enough_and_nothing_is_learned_from_an_unexplained_answer(told):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SHIPPED)
    rows = train.encode(tokenizer, told)
    lengths = np.array([len(ids) for ids, _ in rows])
    assert np.percentile(lengths, 99) < 1000 and (lengths <= train.GAME_BUCKETS[-1][0]).all()
    for story, (ids, weights) in zip(told, rows, strict=True):
        heard = [message["content"] for message in answers(story) if not message.get("unexplained")]
        learned = tokenizer.decode(ids[weights == train.AGENT_WEIGHT])
        assert learned == "".join(f"{text}<|im_end|>" for text in heard)
        assert tokenizer.decode(ids[weights == 0]) == "".join(
            f'{message["content"]}<|im_end|>' for message in answers(story) if message.get("unexplained"))


def test_a_chunk_of_the_second_phase_is_half_games(wording):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SHIPPED)
    seen, tokens = train.mixed_lessons(tokenizer, wording, 0, 70, **train.LATER[0])
    by_kind = {"agent_loss": 0, "game_agent_loss": 0}
    for name, (_, weights, lengths) in seen:
        by_kind[name] += int(lengths[weights.any(1)].sum())
    assert sum(by_kind.values()) == pytest.approx(tokens, rel=0.02)
    assert by_kind["game_agent_loss"] / tokens == pytest.approx(0.5, abs=0.05)


def test_each_phase_has_a_schedule_of_its_own():
    phases = (70, 36, 0, 10)
    assert [train.phase_of(chunk, phases) for chunk in (0, 69, 70, 105, 106, 115)] == [0, 0, 1, 1, 3, 3]
    assert train.scheduled_rate(35, phases) == train.learning_rate(0.5) == train.LEARNING_RATE
    assert train.scheduled_rate(70 + 36 * 0.2, phases) == train.scheduled_rate(108, phases) == train.GAME_LEARNING_RATE
    assert train.scheduled_rate(70, phases) == train.scheduled_rate(106, phases) == 0
    for last, lasting in ((105.5, 36), (115.5, 10)):
        expected = train.GAME_LEARNING_RATE * 0.5 / lasting / train.GAME_DECAY
        assert train.scheduled_rate(last, phases) == pytest.approx(expected)
    for given, valid in ((["70"], True), (["1", "0", "3"], True), ([], False), (["0"], False), (["7", "x"], False)):
        assert train.valid_phases(given) == valid
    assert not train.valid_phases(["1"] * (2 + len(train.LATER)))
    assert json.dumps(train.BUCKETS) == json.dumps(train.GAME_BUCKETS[: len(train.BUCKETS)])
