"""Tool use as it is lived: every branch of an answer by a script with exact messages, experience, controls, resumed."""

import json

import pytest
import small_run

from atp_jax import experiment
from atp_jax.__main__ import main
from atp_jax.envs.tool_use import COMPLEX, SIMPLE
from atp_jax.errors import UserError
from atp_jax.policies.scripted import ScriptedPolicy
from atp_jax.policies.types import Answer
from atp_jax.rollout import run_conditions
from atp_jax.scenarios.problems import Problem
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import check_settings, read_settings
from atp_jax.testbeds import tool_use

WORDING = load_wording("", "tool_use")
SAID = WORDING["tool_use"]
RULES = (
    "You solve mathematics problems. You may run Python code with a tool. A problem that you answer with the tool "
    "costs you 0.7 points, one that you answer at once 0.2; right answers earn points. "
    "End with one line: Answer: NUMBER"
)
NO_TOOL = (
    "You solve mathematics problems. There is no tool; answer at once. Right answers earn points. "
    "End with one line: Answer: NUMBER"
)


def pack(folder, simple=6, complex_=10):
    """Simple problem n asks for n + 1, complex problem n for 1000 n."""
    rows = [
        {"kind": "simple", "environment": "easy", "question": f"Easy {n}?", "answer": f"{n + 1}"} for n in range(simple)
    ]
    rows += [
        {"kind": "complex", "environment": "hard", "question": f"Hard {n}?", "answer": f"{1000 * n}"}
        for n in range(complex_)
    ]
    path = folder / "problems.json"
    path.write_text(json.dumps(rows))
    return path


def settings(folder, **changes):
    tool = {"problems": 1, "max_calls": 2} | changes.pop("tool", {})
    evolve = {"rounds": 1, "window": None} | changes.pop("evolve", {})
    policy = {"kind": "scripted", "script": "s"}
    config = {
        "testbed": "tool_use",
        "tool": tool,
        "evolve": evolve,
        "policy": policy,
        "data": {"path": str(pack(folder))},
    }
    return check_settings(read_settings(config | changes))


def script(folder, lines):
    """lines: (episode, round, turn) -> text, or (text, "length") for an answer that was cut off."""
    path = folder / "script.jsonl"
    with path.open("w") as file:
        for (episode, number, turn), said in lines.items():
            text, finish = said if isinstance(said, tuple) else (said, "stop")
            row = {"episode": episode, "round": number, "turn": turn, "answer": text, "finish": finish}
            print(json.dumps(row), file=file)
    return ScriptedPolicy(path)


def live(folder, chosen, policy, count, convention="fenced", path=None):
    """All records of the first condition, by (episode, round)."""
    condition = tool_use.conditions(chosen, "scripted", 0)[0]
    path = folder / "episodes.jsonl" if path is None else path
    scenarios, wording = tool_use.scenarios(chosen)[:count], WORDING | {"convention": convention}
    (records,) = run_conditions([condition], scenarios, policy, wording, chosen, [path], lambda finished: None)
    assert records == [json.loads(line) for line in path.read_text().splitlines()]
    return {(record["episode"], record["round"]): record for record in records}


def fenced(code):
    return f"I run it.\n```python\n{code}\n```"


def tagged(code):
    return "<tool_call>\n" + json.dumps({"name": "python", "arguments": {"code": code}}) + "\n</tool_call>"


# What an episode answers to its problem (the right answer to that of episode n is 1000 n), and what must come of it:
# results of each answer, tool used, calls, bad calls, what was read, right?, decision, net payoff.
FENCED = [
    ([fenced("print(0)"), "Answer: 0"], [["0\n"], []], True, 1, 0, "0", True, "comply", 5.0 - 0.7),
    (
        [fenced("1 / 0"), "Answer: 7"],
        [["ZeroDivisionError: division by zero"], []], True, 1, 0, "7", False, "comply", -0.7,
    ),
    (
        [fenced("print(1)"), fenced("2"), "Answer: 2000.0"],
        [["1\n"], [""], []], True, 2, 0, "2000.0", True, "comply", 5.0 - 0.7,
    ),
    (
        [fenced("print(1)") + "\n" + fenced("print(2)") + "\nAnswer: 1", "Answer: 3000"],
        [["1\n", "2\n"], []], True, 2, 0, "3000", True, "comply", 5.0 - 0.7,
    ),
    ([fenced("print(4)"), "So it is four."], [["4\n"], []], True, 1, 0, None, False, "comply", -0.7),
    (["Answer: 5000"], [[]], False, 0, 0, "5000", True, "violate", 5.0 - 0.2),
    ([(fenced("print(6)"), "length")], [[]], False, 0, 0, None, False, "unparsed", -0.2),
    (
        [fenced("print(7)"), fenced("print(8)"), fenced("print(9)") + "\nAnswer: 7000"],
        [["7\n"], ["8\n"], []], True, 2, 0, None, False, "comply", -0.7,
    ),
    (["I do not know."], [[]], False, 0, 0, None, False, "unparsed", -0.2),
    (
        ["\n".join(fenced(f"print({n})") for n in range(3)), "Answer: 1"],
        [["0\n", "1\n"], []], True, 2, 0, "1", False, "comply", -0.7,
    ),
]  # fmt: skip
TAGGED = [
    ([tagged("print(0)"), "Answer: 0"], [["0\n"], []], True, 1, 0, "0", True, "comply", 5.0 - 0.7),
    (
        ["<tool_call>\n{oops}\n</tool_call>", "Answer: 1000"],
        [["Error: the call is not valid JSON"], []], False, 1, 1, "1000", True, "violate", 5.0 - 0.2,
    ),
    (
        ["<tool_call>\nnull\n</tool_call>", tagged("print(2)"), "Answer: 2000"],
        [['Error: there is only the tool "python"'], ["2\n"], []], True, 2, 1, "2000", True, "comply", 5.0 - 0.7,
    ),
    ([fenced("print(3)")], [[]], False, 0, 0, None, False, "unparsed", -0.2),
    (
        ["<think>" + tagged("print(1)") + "</think>\nAnswer: 4000"],
        [[]], False, 0, 0, "4000", True, "violate", 5.0 - 0.2,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("convention", "branches"), [("fenced", FENCED), ("tool_call", TAGGED)])
def test_every_branch_of_an_answer(tmp_path, convention, branches):
    """Round 1 of a scripted run; in round 0 nobody knows anything, and the one problem of experience is answered."""
    lines = {}
    for episode, (said, *_) in enumerate(branches):
        lines |= {(episode, 0, 0): "?", (episode, 0, 1): "?", (episode, 1, 0): "Answer: 1"}
        lines |= {(episode, 1, 1 + turn): text for turn, text in enumerate(said)}
    records = live(tmp_path, settings(tmp_path), script(tmp_path, lines), len(branches), convention)
    for episode, (said, results, used, calls, bad, read, correct, decision, net) in enumerate(branches):
        record = records[episode, 1]
        last = said[-1] if isinstance(said[-1], str) else said[-1][0]
        assert record["answer"] == last, episode
        assert record["decision"] == record["other_decision"] == decision, episode
        assert (record["used_tool"], record["calls"], record["bad_calls"], record["correct"]) == (
            used,
            calls,
            bad,
            correct,
        )
        assert record["reward"] == net and record["environment"] == "hard"
        assert [turn["results"] for turn in record["turns"]] == [[], *results], episode
        measured = record["problems"][-1]
        assert measured["said"] == read and measured["turns"] == len(said) and measured["measured"]
        # The messages of the last question: rules, experience, the problem, then answers and results as they came.
        rules = RULES + (" " + SAID["fenced"] if convention == "fenced" else "")
        easy = record["problems"][0]
        right = easy["correct"]
        told = (
            "Right, that earned 1.2 points. Without the tool it cost 0.2 points: +1 in all."
            if right
            else "Wrong, that earned 0 points. Without the tool it cost 0.2 points: -0.2 in all."
        )
        expected = [
            {"role": "system", "content": rules},
            {"role": "user", "content": f"Easy {easy['row']}?"},
            {"role": "assistant", "content": "Answer: 1"},
            {"role": "user", "content": told},
            {"role": "user", "content": f"Hard {episode}?"},
        ]
        for text, printed in zip(said[:-1], results, strict=False):
            expected.append({"role": "assistant", "content": text})
            for result in printed:
                if not result:
                    content = "The code printed nothing."
                elif convention == "fenced":
                    content = "The code printed: " + result.strip()
                else:
                    content = result.strip()
                expected.append({"role": "user" if convention == "fenced" else "tool", "content": content})
        assert record["messages"] == expected, episode
        assert right == (easy["row"] == 0) and easy["net"] == pytest.approx(1.0 if right else -0.2)


class Solver:
    """Answers every request by a function of it, and keeps what it was asked."""

    def __init__(self, answer):
        self._answer, self.asked = answer, []

    def answer(self, requests):
        self.asked += requests
        return [Answer(self._answer(request)) for request in requests]

    def recall(self, requests):
        self.asked += requests


def easy_at_once(request):
    """Simple problems at once and rightly; complex ones with the tool, when there is one."""
    asked = next(m["content"] for m in reversed(request.messages) if m["content"].endswith("?"))
    kind, n = asked[:4], int(asked[5:-1])
    if kind == "Easy":
        return f"Answer: {n + 1}"
    if request.messages[0]["content"].startswith(NO_TOOL):
        return "Answer: 1"
    return fenced(f"print(1000 * {n})") if request.messages[-1]["content"] == asked else f"Answer: {1000 * n}"


def test_the_life_of_an_agent(tmp_path):
    """Round 0 asks without a tool and then with it; experience stays, what is measured is forgotten."""
    chosen = settings(tmp_path, tool={"problems": 2}, evolve={"rounds": 3, "window": 2})
    policy = Solver(easy_at_once)
    records = live(tmp_path, chosen, policy, 3)
    assert sorted(records) == [(e, r) for e in range(3) for r in range(4)]
    first = records[1, 0]
    assert [met["tool"] for met in first["problems"]] == [False, True]
    assert first["correct"] and first["used_tool"] and first["payoff"] == 0.0
    assert not first["problems"][0]["correct"] and first["problems"][0]["said"] == "1"
    assert first["messages"][0]["content"].startswith(RULES)
    alone = next(r for r in policy.asked if (r.episode, r.round, r.turn) == (1, 0, 0))
    assert alone.messages == [{"role": "system", "content": NO_TOOL}, {"role": "user", "content": "Hard 1?"}]
    for number in (1, 2, 3):
        record = records[1, number]
        assert [(met["complex"], met["used_tool"], met["net"]) for met in record["problems"]] == [
            (False, False, 1.0), (False, False, 1.0), (True, True, 4.3)
        ]  # fmt: skip
        assert record["payoff"] == 2.0 * number  # what was measured is no part of it
        shown = [m["content"] for m in record["messages"] if m["role"] == "user" and m["content"].endswith("?")]
        # Two rounds of history besides the one that is lived through, then the problem.
        assert len(shown) == 2 * min(number, 3) + 1 and shown[-1] == "Hard 1?" and "Hard 1?" not in shown[:-1]
    met = [met["row"] for number in (1, 2, 3) for met in records[1, number]["problems"][:-1]]
    assert sorted(met) == list(range(6))  # no problem twice while there are others
    assert [met["row"] for met in records[0, 1]["problems"]] != [met["row"] for met in records[1, 1]["problems"]]
    assert {r.stream for r in policy.asked} == {(0, r.episode, 0, r.round + (r.turn << 16)) for r in policy.asked}
    assert len({r.stream for r in policy.asked}) == len(policy.asked)


def test_window_of_rounds(tmp_path):
    policy = Solver(easy_at_once)
    live(tmp_path, settings(tmp_path, evolve={"rounds": 4, "window": 0}), policy, 1)
    measured = [r for r in policy.asked if r.messages[-1]["content"].startswith("Hard") and r.round > 0]
    assert [sum(m["content"].startswith("Easy") for m in r.messages) for r in measured] == [1, 1, 1, 1]


@pytest.mark.parametrize("control", ["no_history", "neutral_rewards"])
def test_what_a_control_leaves_out(tmp_path, control):
    chosen = settings(tmp_path, tool={"problems": 2}, evolve={"rounds": 2, "controls": (control,)})
    policy = Solver(easy_at_once)
    records = live(tmp_path, chosen, policy, 2)
    for request in policy.asked:
        said = " ".join(m["content"] for m in request.messages[1:])
        assert "earned" not in said and "cost" not in said
        if control == "no_history":
            assert sum(m["content"].endswith("?") for m in request.messages) == 1
    last = [
        m["content"] for m in records[0, 2]["messages"] if m["role"] == "user" and m["content"].endswith("problem.")
    ]
    assert last == ([] if control == "no_history" else ["Thank you. Here is another problem."] * 4)
    assert records[0, 2]["payoff"] == 4.0  # the environment pays all the same, and experience is the same problems
    plain = live(tmp_path, settings(tmp_path, tool={"problems": 2}, evolve={"rounds": 2}), Solver(easy_at_once), 2,
                 path=tmp_path / "other.jsonl")  # fmt: skip
    assert [met["row"] for met in plain[1, 2]["problems"]] == [met["row"] for met in records[1, 2]["problems"]]


def rows(kind, count):
    return [Problem(n, kind, kind == "complex", f"{kind} {n}", str(n)) for n in range(count)]


@pytest.mark.parametrize(
    ("share", "order", "kinds"),
    [
        (0.0, "simple_first", ["sss", "sss", "sss", "sss"]),
        (1.0, "simple_first", ["ccc", "ccc", "ccc", "ccc"]),
        (0.5, "simple_first", ["scc", "ssc", "scc", "ssc"]),
        (0.5, "complex_first", ["ccs", "css", "ccs", "css"]),
        (0.25, "complex_first", ["css", "css", "sss", "css"]),
    ],
)
def test_the_share_and_order_of_experience(tmp_path, share, order, kinds):
    chosen = settings(tmp_path, tool={"problems": 3, "complex_share": share, "order": order})
    simple, complex_ = rows("simple", 20), rows("complex", 20)
    met = [tool_use.experience(chosen, 4, number, simple, complex_) for number in range(1, 5)]
    assert ["".join(problem.environment[0] for problem in one) for one in met] == kinds
    everything = [problem for one in met for problem in one]
    assert len(set(everything)) == len(everything)
    assert met[2] == tool_use.experience(chosen, 4, 3, simple, complex_)  # a function of seed, episode and round


def test_mixed_experience_keeps_the_share(tmp_path):
    chosen = settings(tmp_path, tool={"problems": 4, "complex_share": 0.5, "order": "mixed"})
    simple, complex_ = rows("simple", 50), rows("complex", 50)
    orders = set()
    for episode in range(8):
        met = tool_use.experience(chosen, episode, 1, simple, complex_)
        assert sorted(problem.complex for problem in met) == [SIMPLE, SIMPLE, COMPLEX, COMPLEX]
        orders.add(tuple(problem.complex for problem in met))
    assert len(orders) > 2


def test_an_agent_never_lives_through_the_problem_that_is_measured(tmp_path):
    chosen = settings(tmp_path, tool={"problems": 4, "complex_share": 1.0}, evolve={"rounds": 3})
    policy = Solver(easy_at_once)
    for (episode, number), record in live(tmp_path, chosen, policy, 3).items():
        if number:
            assert episode not in [met["row"] - 6 for met in record["problems"][:-1]]


def test_a_run_that_was_cut_anywhere_ends_the_same(tmp_path):
    """Answers and results are read back: neither policy nor sandbox is asked again for what is there."""
    chosen = settings(tmp_path, tool={"problems": 1}, evolve={"rounds": 2})
    live(tmp_path, chosen, Solver(easy_at_once), 2)
    whole = (tmp_path / "episodes.jsonl").read_bytes()
    ends = [0, 5, *(i + 1 for i, byte in enumerate(whole) if byte == 10), len(whole) - 1]
    for end in ends:
        path = tmp_path / f"{end}.jsonl"
        path.write_bytes(whole[:end])
        policy = Solver(easy_at_once)
        live(tmp_path, chosen, policy, 2, path=path)
        assert path.read_bytes() == whole


def test_what_the_tool_gave_back_is_read_back(tmp_path, monkeypatch):
    """A call that ran out of time once is not run again, so that its result cannot differ."""
    chosen = settings(tmp_path)
    live(tmp_path, chosen, Solver(easy_at_once), 2)
    path = tmp_path / "episodes.jsonl"
    path.write_text(
        path.read_text()
        .replace('["1000\\n"]', '["TimeoutError: late"]')
        .replace("printed: 1000", "printed: TimeoutError: late")
    )
    before = path.read_text()

    def never(self, code):
        raise AssertionError("the sandbox is asked")

    monkeypatch.setattr("atp_jax.sandbox.Sandbox.run", never)
    live(tmp_path, chosen, Solver(None), 2)
    assert path.read_text() == before and "late" in before


def test_another_program_is_noticed(tmp_path):
    chosen = settings(tmp_path)
    live(tmp_path, chosen, Solver(easy_at_once), 2)
    path = tmp_path / "episodes.jsonl"
    path.write_text(path.read_text().replace("Hard 1?", "Hart 1?"))
    with pytest.raises(UserError, match="round 0 is not what this configuration gives"):
        live(tmp_path, chosen, Solver(easy_at_once), 2)


# ---------------------------------------------------------------- through the command line


def arguments(folder, workdir, *more):
    """Two episodes of two rounds: with experience at hand the tool is left aside."""
    lines = {}
    for e in range(2):
        lines |= {(e, 0, 0): "Answer: 3", (e, 0, 1): fenced(f"print(1000 * {e})"), (e, 0, 2): f"Answer: {1000 * e}"}
        lines |= {(e, 1, 0): "Answer: 1", (e, 1, 1): fenced(f"print(1000 * {e})"), (e, 1, 2): f"Answer: {1000 * e}"}
        lines |= {(e, 2, 0): "Answer: 1", (e, 2, 1): "Answer: 0"}
    path = script(folder, lines).path
    return [
        "--config=configs/tool_use.py", f"--workdir={workdir}", "--config.policy.kind=scripted",
        f"--config.policy.script={path}", f"--config.data.path={pack(folder)}", "--config.data.limit=2",
        "--config.evolve.rounds=2", "--config.tool.problems=1", "--config.evolve.samples=1",
        "--config.evolve.window=None", "--config.align.method=none", *more,
    ]  # fmt: skip


def test_what_a_run_leaves(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(small_run.ROOT)
    run = tmp_path / "run"
    assert main(arguments(tmp_path, run)) == 0
    results = json.loads((run / "results.json").read_text())
    assert [c["name"] for c in results["conditions"]] == ["scripted", "scripted-no_history", "scripted-neutral_rewards"]
    one = results["conditions"][0]
    assert [(row["round"], row["rate"]) for row in one["rounds"]] == [(0, 0.0), (1, 0.0), (2, 1.0)]
    assert [row["tool"]["rate"] for row in one["tools"]["complex"]] == [1.0, 1.0, 0.0]
    assert [row["correct"]["rate"] for row in one["tools"]["complex"]] == [1.0, 1.0, 0.5]
    assert one["tools"]["direct"]["count"] == 0 and one["tools"]["opportunity"][2]["rate"] == 0.0
    assert one["tools"]["change"]["tool"]["estimate"] == -1.0
    assert one["setting"]["tool.costs"] == [0.7, 0.2] and not any(key.startswith("game.") for key in one["setting"])
    left = {path.name for path in (run / "report").iterdir()}
    assert {"index.html", "tools.png", "tools.csv", "rates.csv"} <= left
    shown = capsys.readouterr().out
    assert "tool" in shown and "scripted-neutral" in shown
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(arguments(tmp_path, run)) == 0
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--config.evolve.controls=('no_peers',)"],
            "evolve.controls must be one of none, no_history, neutral_rewards",
        ),
        (["--config.tool.order=hard_first"], "tool.order must be one of simple_first, complex_first, mixed"),
        (["--config.tool.complex_share=1.5"], "tool.complex_share must be from 0 to 1"),
        (["--config.tool.costs=(1.0,)"], "tool.costs must be two numbers"),
        (["--config.tool.max_calls=0"], "tool.max_calls must be at least 1"),
        (["--config.tool.seconds=0.0"], "tool.seconds must be above 0"),
        (["--config.tool.simple.where=maths"], 'tool.simple.where is "column=value"'),
        (["--config.evolve.mode=weights"], "evolve.mode must be 'context' in tool use"),
        (["--config.parity=upstream", "--config.wording=w.json"], "parity must be 'default' in tool use"),
        (["--config.data.items=(99,)"], "there is no complex problem 99; they are 0 to 9"),
        (["--config.evolve.rounds=3"], "no answer for episode 0, round 3, agent 0"),
        (["--config.tool.complex.path=nowhere.jsonl"], "tool.complex: nowhere.jsonl cannot be read"),
        (["--config.wording={folder}/w.json"], "'tool_use' is missing"),
    ],
)
def test_what_cannot_be_run(tmp_path, capsys, monkeypatch, more, says):
    monkeypatch.chdir(small_run.ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "w.json").write_text('{"role_play": {}}')
    more = [argument.format(folder=tmp_path) for argument in more]
    assert main(arguments(tmp_path, tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said
    assert not (tmp_path / "run").exists()


def test_a_script_needs_an_answer_for_every_turn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(small_run.ROOT)
    given = arguments(tmp_path, tmp_path / "run")
    path = tmp_path / "script.jsonl"
    path.write_text("".join(x for x in path.read_text().splitlines(True) if '"round": 1, "turn": 2' not in x))
    assert main(given) == 2
    assert "no answer for episode 0, round 1, agent 0, turn 2" in capsys.readouterr().err


def test_a_dear_answer_is_said_aloud(tmp_path):
    chosen = settings(tmp_path, tool={"costs": (0.2, 0.2)})
    said = tool_use.notes(chosen, tool_use.scenarios(chosen), WORDING)
    assert said == ["the tool costs no more than answering at once: nothing teaches to leave it aside"]
    assert experiment.conditions(chosen)[0].name == "scripted"
