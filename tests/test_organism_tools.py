"""The organism's stories of tool use: told in the pipeline's own words and numbers, by agents that decide as they are
said to, of problems that are in no shipped pack; the phases that were there before draw what they drew."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from atp_jax.answers import final_answer, plain
from atp_jax.chat import Chat
from atp_jax.organism import examine, games, stories, tools, train
from atp_jax.policies.types import Answer
from atp_jax.sandbox import Sandbox
from atp_jax.scenarios.problems import ALIGN, VALIDATION, load_problems
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import ToolSettings, check_settings, read_settings
from atp_jax.testbeds import tool_use
from atp_jax.testbeds.types import Condition
from atp_jax.tools import convention_of

SHIPPED = Path(train.__file__).parents[1] / "models" / "organism"
WORDING = load_wording("", "tool_use")
PAID = re.compile(
    r"(Right|Wrong), that earned ([\d.]+) points\. (With|Without) the tool it cost ([\d.]+) points: (\S+) in"
)


@pytest.fixture(scope="module")
def told():
    return tools.stories(3, 150, WORDING)


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(SHIPPED)


def test_stories_are_a_function_of_the_seed_and_hold_out_the_packs(told):
    assert tools.stories(3, 20, WORDING) == told[:20]
    assert tools.stories(4, 20, WORDING) != told[:20]
    shipped = {problem.question for path in ("", ALIGN, VALIDATION) for problem in load_problems(path)}
    assert len(shipped) > 400
    assert not shipped & {message["content"] for story in told for message in story}


@pytest.mark.parametrize("kind", tools.CODES)
def test_what_a_story_says_was_printed_is_what_the_sandbox_prints(kind):
    """Our own arithmetic against the code of the story, run as the pipeline runs it."""
    rng, sandbox, seen = np.random.default_rng(0), Sandbox(), 0
    while seen < 2:
        problem = tools.draw_problem(rng, kind in tools.COMPLEX, 0)
        if problem.environment == kind:
            assert sandbox.run(tools.code_for(problem)).text == problem.answer + "\n"
            seen += 1


@pytest.mark.parametrize("kind", tools.STEPS)
def test_steps_lead_to_the_answer(kind):
    """What an agent works out at once: the sandbox agrees with each step, and the last one is the problem's answer."""
    rng, sandbox, seen = np.random.default_rng(1), Sandbox(), 0
    while seen < 10:
        problem = tools.draw_problem(rng, False, 0)
        if problem.environment == kind:
            steps = [step.split(" = ") for step in tools.worked(problem).rstrip(".").split(", ")]
            assert len(steps) == 2 and steps[-1][1] == problem.answer
            for asked, said in steps:
                assert float(sandbox.run(f"print({asked})").text) == float(said)
            seen += 1


def test_drills_are_the_steps_of_problems(tokenizer):
    """Each is asked and said, and right by another computation; a function of the seed."""
    told = tools.drills(5, 20)
    assert told[:4] == tools.drills(5, 4) and told != tools.drills(6, 20)
    for asked, said in told:
        steps = said["content"].removesuffix(".").split(", ")
        assert asked["content"] == "Work out " + ", ".join(step.partition(" = ")[0] for step in steps) + "."
        assert len(steps) == tools.DRILLED
        for step in steps:
            left, sign, right, equals, found = step.split()
            product = {"*": int(left) * int(right), "+": int(left) + int(right), "-": int(left) - int(right)}
            assert equals == "=" and product.get(sign, int(left) / int(right)) == int(found)
    assert max(len(ids) for ids, _ in train.encode(tokenizer, told)) <= train.BUCKETS[-1][0]


def test_every_answer_is_one_that_the_pipeline_reads_and_is_paid_as_it_pays(told):
    """A call is followed by its result and that by the answer; what was earned and paid is worked out from the rules in
    the system message and the answer's rightness from a second reading of the problem's own result."""
    heard = 0
    for story in told:
        assert story[-1]["role"] == "assistant" and story[0]["role"] == "system"
        assert story[-1]["content"].rpartition("\n")[2].startswith("Answer: ")
        costs = [float(cost) for cost in re.findall(r"(\d[\d.]*)(?: points|;)", story[0]["content"])]
        for place, message in enumerate(story):
            if "```python" in message["content"] and message["role"] == "assistant":
                printed, answer = story[place + 1], story[place + 2]
                assert printed["content"].startswith("The code printed: ")
                assert final_answer(answer["content"]) == printed["content"].removeprefix("The code printed: ")
            if match := PAID.match(message["content"]):
                right, earned, how, cost, net = match.groups()
                assert (how == "With") == story[place - 2]["content"].startswith("The code printed")
                assert float(cost) == costs[how == "Without"]
                assert (float(earned) == 0) == (right == "Wrong")
                assert float(net) == pytest.approx(float(earned) - float(cost), rel=1e-3, abs=1e-9)
                heard += 1
    assert heard > 100


class Reciter:
    """Says an agent's answers in their order."""

    def __init__(self, said):
        self.said = iter(said)

    def answer(self, requests):
        return [Answer(next(self.said)) for _ in requests]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("control", ["none", "neutral_rewards"])
def test_messages_are_the_pipelines_token_by_token(tmp_path, tokenizer, seed, control):
    """The answers of a story said in the testbed itself, on the same problems: it shows the very messages of the story,
    and what is trained on begins with the very ids that it would be asked with."""
    assert convention_of(tokenizer) == tools.CONVENTION
    rng = np.random.default_rng(seed)
    problems = [tools.draw_problem(rng, False, row) for row in range(3)] + [tools.draw_problem(rng, True, 3)]
    rows = [{"kind": "complex" if p.complex else "simple", "environment": p.environment, "question": p.question,
             "answer": p.answer} for p in problems]  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(rows))
    rules = tools.draw_rules(rng)
    chosen = check_settings(read_settings({
        "testbed": "tool_use", "data": {"path": str(tmp_path / "p.json")}, "evolve": {"rounds": 1, "window": None},
        "policy": {"kind": "scripted", "script": "s"},
        "tool": {"problems": 3, "costs": rules.costs, "rewards": rules.rewards},
    }))  # fmt: skip
    loaded = tool_use.align_on(chosen.data.path)
    order = tool_use.experience(chosen, 0, 1, loaded[:3], loaded[3:])
    kind = ("careful", "noisy", "adaptive")[seed % 3]
    story = tools.tell(rng, [*order, loaded[3]], rules, kind, WORDING, neutral=control == "neutral_rewards")
    alone = tools.tell(rng, [loaded[3]], rules, "careful", WORDING, tool=False)
    first = tools.tell(rng, [loaded[3]], rules, kind, WORDING)

    said = [message["content"] for told in (alone, first, story) for message in told if message["role"] == "assistant"]
    lives = tool_use.Lives(Condition(0, "c", "", control), loaded[3:], WORDING, chosen)
    policy, shown, chat = Reciter(said), [], Chat(tokenizer)
    for _ in range(2):
        records = None
        while records is None:
            (request,) = lives.ask()
            shown.append(request.messages)
            records = lives.tell(policy.answer([request]))
    plain_messages = [[{k: m[k] for k in ("role", "content")} for m in messages] for messages in shown]
    for told in (alone, first, story):
        prompt = [{k: m[k] for k in ("role", "content")} for m in told[:-1]]
        assert prompt in plain_messages
        ((ids, weights),) = train.encode(tokenizer, [told])
        asked = chat.encode(told[:-1])
        assert ids[: len(asked)].tolist() == asked
        learned = tokenizer.decode(ids[weights == train.AGENT_WEIGHT])
        assert learned == "".join(f"{m['content']}<|im_end|>" for m in told if m["role"] == "assistant")
    assert next(policy.said, None) is None
    assert records[0]["problems"][-1]["said"] == final_answer(story[-1]["content"])


def test_agents_decide_as_their_kind():
    """Careful agents run what they can; adaptive ones leave the tool aside after an answer of their own that was right,
    come back after one that was wrong, and do neither where nobody tells them."""
    rng = np.random.default_rng(0)
    easy, hard = [tools.draw_problem(rng, False, row) for row in range(3)], tools.draw_problem(rng, True, 3)
    rules = ToolSettings()

    def lives(kind, neutral=False, count=300, easy=easy):
        """Tool used on the last problem, and whether the last direct answer before it was right (None: none was)."""
        last, before = [], []
        for _ in range(count):
            story = tools.tell(rng, [*easy, hard], rules, kind, WORDING, neutral=neutral)
            answers = [m["content"] for m in story if m["role"] == "assistant"]
            final = [text for text in answers if "```" not in text]
            ran = [place > 0 and "```" in answers[place - 1] for place in range(len(answers)) if "```" not in
                   answers[place]]  # fmt: skip
            own = [plain(final_answer(text)) == plain(problem.answer) for text, used, problem in
                   zip(final, ran, easy, strict=False) if not used]  # fmt: skip
            last.append(ran[-1])
            before.append(own[-1] if own else None)
            # Nobody solves a complex problem at once.
            assert ran[-1] == (final_answer(final[-1]) == hard.answer)
        return np.array(last), np.array(before, object)

    assert lives("careful")[0].mean() > 0.93
    last, before = lives("adaptive", count=600)
    for told, wanted in ((True, 0.1), (False, 0.93)):
        assert last[before == told].mean() == pytest.approx(wanted, abs=0.12), told
    assert lives("adaptive", neutral=True)[0].mean() == pytest.approx(0.85, abs=0.08)
    assert lives("adaptive", easy=[])[0].mean() == pytest.approx(0.85, abs=0.08)  # nobody told it anything yet
    assert tools.tool_rate("adaptive", 0.5, True, True, dearer=False) == 0.85
    assert abs(lives("noisy")[0].mean() - 0.5) < 0.1


def test_stories_are_short_enough(told, tokenizer):
    lengths = np.array([len(ids) for ids, _ in train.encode(tokenizer, told)])
    assert (lengths <= train.TOOL_BUCKETS[-1][0]).mean() > 0.99 and train.TOOL_BUCKETS[-1][0] < train.CONTEXT
    assert train.TOOL_BUCKETS[: len(train.GAME_BUCKETS)] == train.GAME_BUCKETS


def test_the_phases_before_draw_what_they_drew(tokenizer):
    """A chunk of the second phase spelled out, in number, order and numbers; the third adds tool use to it."""
    wording, drawn = load_wording(), 1_000_000 * 3 + 75
    rows = train.encode(tokenizer, stories.stories(drawn, 24, wording, stories.LEXICON["occupations"]))
    expected = [("agent_loss", batch) for batch in train.batches(rows, 75)]
    rows = train.encode(tokenizer, games.stories(drawn, 12, wording))
    expected += [("game_agent_loss", batch) for batch in train.batches(rows, 75, train.GAME_BUCKETS)]
    np.random.default_rng(75).shuffle(expected)
    found, _ = train.mixed_lessons(tokenizer, wording, 2, 75, role_play=24, game=12)
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
    found, tokens = train.mixed_lessons(tokenizer, wording, 2, 75, role_play=24, game=12, tool=12, drill=6)
    lengths = {name: 0 for name in ("agent_loss", "game_agent_loss", "tool_agent_loss", "drill_agent_loss")}
    for name, (_, weights, length) in found:
        lengths[name] += int(length[weights.any(1)].sum())
    assert sum(lengths.values()) == tokens and all(lengths.values())


def test_what_an_own_answer_leaves_is_counted_by_its_outcome():
    def met(used, correct, measured=False, tool=True):
        return {"used_tool": used, "correct": correct, "measured": measured, "tool": tool}

    records = [
        {"episode": 0, "problems": [met(False, False, True, tool=False), met(True, True, True)]},
        {"episode": 1, "problems": [met(False, False, True)]},
        {"episode": 0, "problems": [met(False, True), met(False, False, True)]},
        {"episode": 1, "problems": [met(True, True), met(True, True, True)]},
        {"episode": 0, "problems": [met(False, True), met(False, False), met(True, True, True)]},
    ]
    assert examine.after_own_answers(records) == {"none": 2 / 3, "right": 0.0, "wrong": 1.0}


def test_a_later_phase_changes_no_rate_of_those_before():
    for time in (10, 35, 71.5, 90, 105.5, 125.9):
        assert train.scheduled_rate(time, (70, 36, 20, 10)) == train.scheduled_rate(time, (70, 36, 20, 0))


def test_the_last_phase_has_as_much_tool_use_as_of_the_other_testbeds_together(tokenizer):
    seen, _ = train.mixed_lessons(tokenizer, load_wording(), 0, 148, **train.LATER[3])
    tokens = dict.fromkeys(("agent_loss", "game_agent_loss", "tool_agent_loss", "drill_agent_loss"), 0)
    for name, (_, weights, lengths) in seen:
        tokens[name] += int(lengths[weights.any(1)].sum())
    assert tokens["tool_agent_loss"] == pytest.approx(tokens["agent_loss"] + tokens["game_agent_loss"], rel=0.15)
    assert tokens["agent_loss"] == pytest.approx(tokens["game_agent_loss"], rel=0.15)


def test_drills_hold_the_operations_in_their_shares():
    signs = [step.split()[1] for _, said in tools.drills(3, 200) for step in said["content"].split(", ")]
    for sign, share in tools.OPERATION_SHARES.items():
        # Five standard errors of a share of 2,400 draws.
        assert abs(signs.count(sign) / len(signs) - share) < 5 * (share * (1 - share) / len(signs)) ** 0.5
    assert sum(tools.OPERATION_SHARES.values()) == pytest.approx(1)
