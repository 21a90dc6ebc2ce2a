"""Measures of tool use against counts by hand, and what is shown of them."""

import csv
import io

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from atp_jax.analysis import print_table, summarise_tools, write_report
from atp_jax.analysis.rates import wilson


def problem(complex_=True, measured=True, tool=True, used=False, correct=False, net=0.0) -> dict:
    return {"complex": complex_, "measured": measured, "tool": tool, "used_tool": used, "correct": correct, "net": net}


def record(episode, scenario, number, problems) -> dict:
    last = problems[-1]
    decision = "comply" if last["used_tool"] else "violate"
    return {
        "episode": episode,
        "scenario": scenario,
        "agent": 0,
        "round": number,
        "decision": decision,
        "problems": problems,
    }


def easy(used, correct):
    return problem(
        complex_=False, measured=False, used=used, correct=correct, net=1.2 * correct - (0.7 if used else 0.2)
    )


def hard(used, correct):
    return problem(used=used, correct=correct, net=5.0 * correct - (0.7 if used else 0.2))


def tipping(episodes=4):
    """Episode e, of problem e // 2: alone it is right only for e = 0. In round 0 all use the tool and are right; after
    a round of simple problems the odd ones leave it aside and are wrong."""
    records = []
    for e in range(episodes):
        records.append(record(e, e // 2, 0, [problem(tool=False, correct=e == 0, net=-0.2), hard(True, True)]))
    for e in range(episodes):
        left = e % 2 == 1
        records.append(record(e, e // 2, 1, [easy(False, True), easy(e == 0, True), hard(not left, not left)]))
    return records


@pytest.fixture(scope="module")
def results():
    conditions = [
        summarise_tools("base", "base", "none", {"seed": 0}, tipping(), 0),
        summarise_tools("base-no_history", "base", "no_history", {"seed": 0}, tipping()[:4], 0),
        summarise_tools("$x_1$ <b>", "dpo", "none", {"seed": 0}, tipping(40), 0),
    ]
    return {"schema": 1, "testbed": "tool_use", "conditions": conditions}


def test_counts_by_hand(results):
    tools = results["conditions"][0]["tools"]
    assert [(r["round"], r["tool"]["count"], r["tool"]["total"]) for r in tools["complex"]] == [(0, 4, 4), (1, 2, 4)]
    assert [(r["correct"]["count"], r["correct"]["total"]) for r in tools["complex"]] == [(4, 4), (2, 4)]
    assert [(r["round"], r["tool"]["count"], r["correct"]["count"], r["tool"]["total"]) for r in tools["simple"]] == [
        (1, 1, 8, 8)
    ]
    assert (tools["direct"]["count"], tools["direct"]["total"]) == (1, 4)
    # Episodes 1, 2 and 3 need the tool; 2 alone still uses it in round 1.
    assert [(r["count"], r["total"]) for r in tools["opportunity"]] == [(3, 3), (1, 3)]
    assert tools["net"][0]["experience"] is None
    assert tools["net"][0]["measured"]["mean"] == pytest.approx(4.3)
    assert tools["net"][1]["measured"]["mean"] == pytest.approx((2 * 4.3 - 2 * 0.2) / 4)
    assert tools["net"][1]["experience"]["mean"] == pytest.approx((7 * 1.0 + 0.5) / 8)
    assert tools["change"]["tool"]["estimate"] == tools["change"]["correct"]["estimate"] == -0.5
    assert results["conditions"][0]["rounds"][1]["rate"] == 0.5 and results["conditions"][1]["tools"]["change"] is None


def test_intervals_are_of_whole_problems():
    """Two episodes of a problem that always agree count as one; where all agree the closed form holds."""
    tools = summarise_tools("m", "m", "none", {}, tipping(20), 0)["tools"]
    assert tools["complex"][0]["tool"]["ci95"] == pytest.approx(wilson(10, 10))
    one = [{**r, "scenario": r["episode"]} for r in tipping(20)]
    alone = summarise_tools("m", "m", "none", {}, one, 0)["tools"]
    assert alone["complex"][1]["tool"]["ci95"] == pytest.approx(wilson(10, 20))
    for part in (tools, alone):
        for row in part["complex"]:
            low, high = row["tool"]["ci95"]
            assert 0 <= low <= row["tool"]["rate"] <= high <= 1
        low, high = part["net"][1]["measured"]["ci95"]
        assert low <= part["net"][1]["measured"]["mean"] <= high
        assert part["change"]["tool"]["ci95"][1] < 0


def test_the_order_of_the_records_does_not_matter():
    records = tipping(20)
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    assert summarise_tools("m", "m", "none", {}, shuffled, 3) == summarise_tools("m", "m", "none", {}, records, 3)


def test_the_table(results):
    out = io.StringIO()
    print_table(results, Console(file=out, width=100))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for words in ("tool used", "right answers", "100.0", "50.0", "-50.0", "base-no_history", "change r0-r1"):
        assert words in text, words
    assert "left out" not in text


def test_a_narrow_table_says_what_it_leaves_out():
    lives = tipping() + [record(e, e // 2, number, [hard(True, True)]) for number in range(2, 9) for e in range(4)]
    condition, out = summarise_tools("base", "base", "none", {"seed": 0}, lives, 0), io.StringIO()
    print_table({"schema": 1, "testbed": "tool_use", "conditions": [condition]}, Console(file=out, width=80))
    assert "of 9 rounds are left out for want of room: see tools.csv" in " ".join(out.getvalue().split())


def test_what_the_report_holds(results, tmp_path):
    write_report(tmp_path, results, {})
    left = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(left) == {"index.html", "tools.png", "tools.csv", "rates.csv", "changes.csv"}
    rows = list(csv.DictReader(io.StringIO(left["tools.csv"].decode())))
    assert [(r["condition"], r["round"]) for r in rows] == [
        ("base", "0"), ("base", "1"), ("base-no_history", "0"), ("$x_1$ <b>", "0"), ("$x_1$ <b>", "1")
    ]  # fmt: skip
    second = rows[1]
    assert (second["complex_tool_count"], second["complex_tool"], second["complex_correct"]) == (
        "2",
        "0.500000",
        "0.500000",
    )
    assert (second["simple_tool_total"], second["opportunity"]) == ("8", "0.333333")
    assert second["net_measured"] == "2.050000" and rows[0]["net_experience"] == "" and rows[0]["simple_tool"] == ""
    page = left["index.html"].decode()
    for words in ("Tool use by round", "tools.png", "a fall of -50.0 points", "Net payoff", "right without a tool"):
        assert words in page, words
    assert "<b>" not in page.split("</head>")[1] and "$x_1$ &lt;b&gt;" in page
    height, width = matplotlib.image.imread(io.BytesIO(left["tools.png"])).shape[:2]
    assert width == 1600 and height > 700
    write_report(tmp_path, results, {})
    assert left == {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}


def test_a_run_of_nothing(tmp_path):
    empty = summarise_tools("e", "e", "none", {}, [], 0)
    results = {"schema": 1, "testbed": "tool_use", "conditions": [empty]}
    write_report(tmp_path, results, {})
    print_table(results, Console(file=io.StringIO(), width=100))
