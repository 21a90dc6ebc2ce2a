"""What is shown: the table, the CSV, the picture and the page, whatever was said and whatever things are called."""

import copy
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from analysis_records import records_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from atp_jax.analysis import plots, print_table, report, summarise, tables, write_report

WORDS = ["cccccc", "ccvvvv", "cvcvcv", "vvcvcc", "cvvvvv", "cccuvv"]
EVIL = [
    "<script>alert(1)</script>",
    "</pre></details><img src=x onerror=alert(1)>",
    '"><style>*{display:none}</style>',
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; & ' \" `",
    "]]><!-- <!doctype",
]


def run_of(name="base", other="base-no_history", **fields):
    """Two conditions of 24 episodes and 6 rounds: (results, records)."""
    setting = {"policy.kind": "model", "policy.model": "", "evolve.rounds": 6, "seed": 0, "data.items": []}
    records = {
        name: records_of([(s % 12, WORDS[s % 6]) for s in range(24)], **fields),
        other: records_of([(s % 12, WORDS[s % 3]) for s in range(24)], **fields),
    }
    controls = ("none", "no_history")
    conditions = [
        summarise(each, "base", control, setting, records[each], seed=0)
        for each, control in zip(records, controls, strict=True)
    ]
    return {"schema": 1, "testbed": "role_play", "conditions": conditions}, records


class Page(HTMLParser):
    """Tags with their attributes in order, and all text, of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open, self.unbalanced = [], "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        self.text += data


# ---------------------------------------------------------------- terminal


def plain(results, width):
    out = io.StringIO()
    print_table(results, Console(file=out, width=width))
    return out.getvalue()


def test_table_at_100_columns(capsys):
    """Every round, the unparsed share and the change with its interval, in 100 columns without escape sequences."""
    results, _ = run_of()
    print_table(results)
    text = capsys.readouterr().out
    assert text == plain(results, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text and "…" not in text
    first = results["conditions"][0]
    for row in first["rounds"]:
        assert f"{100 * row['rate']:.1f}" in text
        assert "{:.0f}-{:.0f}".format(*(100 * end for end in row["ci95"])) in text
    assert f"{100 * first['change']['estimate']:+.1f}" in text
    assert "[{:+.1f}, {:+.1f}]".format(*(100 * end for end in first["change"]["ci95"])) in text
    assert "2.8" in text  # unparsed: 4 of 144 answers
    assert "24 episodes of 12 scenarios" in text
    assert "change of base minus change of base-no_history" in text


@pytest.mark.parametrize("width", [72, 80, 100, 140])
def test_table_leaves_out_rounds_rather_than_digits(width):
    records = records_of([(s, "ccccccvvvvvvvvvvvvvv") for s in range(30)])
    names = "a condition with quite a long name, such as there are", "[red]b[/red]"
    conditions = [summarise(name, "m", "none", {}, records, 0) for name in names]
    text = plain({"schema": 1, "testbed": "role_play", "conditions": conditions}, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    head = text.splitlines()[2]
    assert len(re.findall(r" r\d+", head)) - 1 >= {72: 3, 80: 3, 100: 6, 140: 9}[width]
    assert " r1 " in head and " r20 " in head and "change r1-r20" in head
    assert "[red]b[/red]" in text  # a name is no markup
    assert re.search(r"rounds\s+are\s+left\s+out", text)


def test_table_of_nothing():
    assert "condition" in plain({"testbed": "role_play", "conditions": []}, 100)
    empty = summarise("e", "m", "none", {}, [], 0)
    assert "e" in plain({"testbed": "role_play", "conditions": [empty]}, 100)


# ---------------------------------------------------------------- CSV


def test_csv_holds_the_results():
    name = 'a "quoted", name\nin two lines'
    results, _ = run_of(name=name)
    rows = list(csv.DictReader(io.StringIO(tables.rates_csv(results))))
    assert tuple(rows[0]) == tables.RATE_COLUMNS
    assert len(rows) == 12
    assert rows[0]["condition"] == name
    numbers = [row for condition in results["conditions"] for row in condition["rounds"]]
    for row, expected in zip(rows, numbers, strict=True):
        for key in ("round", "violations", "unparsed", "total"):
            assert int(row[key]) == expected[key]
        assert float(row["rate"]) == pytest.approx(expected["rate"], abs=1e-6)
        assert [float(row["ci95_low"]), float(row["ci95_high"])] == pytest.approx(expected["ci95"], abs=1e-6)
    assert rows[0]["change"] == "" and float(rows[5]["change"]) == pytest.approx(numbers[5]["change"]["estimate"])

    changes = list(csv.DictReader(io.StringIO(tables.changes_csv(results))))
    assert tuple(changes[0]) == tables.CHANGE_COLUMNS
    for row, condition in zip(changes, results["conditions"], strict=True):
        assert (int(row["from"]), int(row["to"]), int(row["episodes"]), int(row["scenarios"])) == (1, 6, 24, 12)
        assert float(row["change"]) == pytest.approx(condition["change"]["estimate"], abs=1e-6)
        difference = float(row["change_above"]) - float(row["change_below"])
        assert float(row["payoff_difference"]) == pytest.approx(difference, abs=2e-6)


# ---------------------------------------------------------------- picture


def test_picture_shows_each_line_where_its_rate_is():
    """At 0%, 50% and 100% a line is at the bottom, in the middle and at the top of the axes, in its own colour."""
    lives = {"low": ["ccc"], "half": ["vvv", "ccc"], "high": ["vvv"]}
    conditions = [
        summarise(name, "m", "none", {}, records_of([(s, words[s % len(words)]) for s in range(40)]), 0)
        for name, words in lives.items()
    ]
    results = {"testbed": "role_play", "conditions": conditions}
    data = plots.tipping_png(results)
    assert plots.tipping_png(copy.deepcopy(results)) == data
    image = matplotlib.image.imread(io.BytesIO(data))[..., :3]
    assert image.shape == (900, 1600, 3)
    heights = []
    for colour in plots.COLOURS[:3]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        column = np.abs(image[:, 400] - wanted).max(axis=1) < 0.02  # between round 1 and round 2
        assert column.any()
        heights.append(np.flatnonzero(column).mean())
    bottom, middle, top = heights
    assert top < middle < bottom
    assert middle == pytest.approx((top + bottom) / 2, abs=2)


@pytest.mark.parametrize("count", [0, 1, 6, 20])
def test_picture_of_few_and_many(count):
    records = records_of([(0, "cvu"), (1, "ccv")])
    name = r"$\no\such$ % _^"  # as a formula it would be an error
    conditions = [summarise(f"{i} {name}", name, "none", {}, records, 0) for i in range(count)]
    data = plots.tipping_png({"testbed": "role_play", "conditions": conditions})
    assert data.startswith(b"\x89PNG") and b"matplotlib" not in data.lower()


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.1, 0.15, 0.19])), min_size=1, max_size=6))
def test_labels_do_not_cover_one_another(labels):
    labels = sorted(labels)
    wanted, heights = zip(*labels, strict=True)
    places = plots._apart(wanted, heights)
    edges = [(y - h / 2, y + h / 2) for y, h in zip(places, heights, strict=True)]
    assert all(above[0] >= below[1] - 1e-9 for below, above in zip(edges, edges[1:], strict=False))
    if all(b - a >= 0.19 for a, b in zip(wanted, wanted[1:], strict=False)) and edges[-1][1] < 1.04:
        assert places == pytest.approx(wanted)  # those with room stay where they are


# ---------------------------------------------------------------- page


def test_report_twice_gives_the_same_bytes(tmp_path):
    results, records = run_of()
    write_report(tmp_path, results, records)
    folder = tmp_path / "report"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["changes.csv", "index.html", "rates.csv", "tipping.png"]
    shuffled = {name: lines[::-1] for name, lines in records.items()}
    write_report(tmp_path, results, shuffled)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_report_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    results, records = run_of()
    write_report(tmp_path, results, records)
    before = (tmp_path / "report" / "rates.csv").read_bytes()

    def torn(path, data):
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError):
        write_report(tmp_path, *run_of(name="other"))
    assert (tmp_path / "report" / "rates.csv").read_bytes() == before


def evil_run(words):
    """Everything that comes from outside spells `words`: conditions, model, settings, scenarios, messages, answers."""

    def messages(scenario, episode, number):
        history = [{"role": words[4], "content": words[0] + str(k)} for k in range(number)]
        return [{"role": "system", "content": words[1]}, *history, {"role": "user", "content": words[2]}]

    results, records = run_of(
        name=words[0], other=words[1], answer=words[3] + words[1], messages=messages, environment=words[5]
    )
    for condition in results["conditions"]:
        condition["model"] = words[2]
        condition["setting"] = {words[4]: words[5]}
    return results, records


def test_everything_said_is_escaped():
    """A page about hostile words has the very tags of a page about harmless ones, and shows the words as they are."""
    harmless = [f"plain words {i}" for i in range(len(EVIL))]
    good, bad = (Page(report.page(*evil_run(words))) for words in (harmless, EVIL))
    assert bad.tags == good.tags
    assert bad.text != good.text
    assert not bad.unbalanced and not bad.open
    for words in EVIL:
        assert words in bad.text
    assert "script" not in {tag for tag, _ in bad.tags}


def test_page_stands_alone(tmp_path):
    results, records = run_of()
    write_report(tmp_path, results, records)
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    targets = {value for _, attrs in Page(html).tags for key, value in attrs if key in ("src", "href")}
    assert targets == {"tipping.png", "rates.csv", "changes.csv"}
    assert all((tmp_path / "report" / target).exists() for target in targets)
    assert not re.search(r"https?:|@import|url\(", html)
    assert str(tmp_path) not in html


def test_page_shows_the_numbers_and_whole_episodes():
    def messages(scenario, episode, number):
        past = [({"role": "assistant", "content": f"answer {k}"}, {"role": "user", "content": f"paid for {k}"})
                for k in range(1, number)]  # fmt: skip
        flat = [message for pair in past for message in pair]
        return [{"role": "system", "content": "You mind."}, *flat, {"role": "user", "content": f"question {number}"}]

    results, records = run_of(messages=messages, answer=lambda s, e, r: f"answer {r}", finish="length")
    text = Page(report.page(results, records)).text
    change = results["conditions"][0]["change"]
    assert tables.points(change) in text and tables.points_span(change["ci95"]) in text
    labels = [label for label, _, _ in report.KINDS]
    places = [text.index(label) for label in labels]
    assert places == sorted(places)
    one = text[places[0] : places[1]]
    for number in range(1, 7):
        assert f"question {number}" in one and f"answer {number}" in one
    for number in range(1, 6):
        assert one.count(f"paid for {number}") == 2  # in its round, and in what was seen in the last round
    assert "cut off" in one and "reward 1.5" in one
    assert "8 of 24 episodes of base comply at first and from some round on violate, at least twice." in text
    assert "4 of 24 episodes of base comply in every round." in text


def test_kinds_of_episodes():
    def kinds(letters):
        decisions = [record["decision"] for record in records_of([(0, letters)])]
        return [label.split()[0] for label, _, belongs in report.KINDS if belongs(decisions)]

    assert kinds("ccvv") == ["Tips,", "Ends"]
    assert kinds("cccv") == kinds("cvcv") == ["Ends"]
    assert kinds("cuvv") == ["Ends", "Cannot"]
    assert kinds("cccc") == ["Never"]
    assert kinds("vvcc") == ["Comes"]
    assert kinds("uuvv") == kinds("uuuu") == ["Cannot"]
    assert kinds("vvvv") == []


def test_control_characters_do_not_break_the_page(tmp_path):
    results, records = run_of(answer="bell\x07 null\x00 escape\x1b[31m half \ud800 right-to-left\u202e tab\t")
    write_report(tmp_path, results, records)
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "bell\ufffd null\ufffd escape\ufffd[31m half \ufffd right-to-left\u202e tab\t" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


NOTES = (
    "With one episode a scenario",
    "With several episodes a scenario",
    "Here only 2 are resampled",
    "they say nothing about other scenarios",
    "Scenarios of one occupation",
)


@pytest.mark.parametrize(
    "lives, expected",
    [
        ([(0, "cv"), (1, "cc")], {0, 4}),
        ([(0, "cv"), (0, "cc"), (1, "cc")], {1, 2, 4}),
        ([(s, w) for s in range(12) for w in ("cv", "cc")], {1, 4}),
        ([(0, "cv"), (0, "cc")], {0, 3, 4}),
    ],
)
def test_notes_tell_how_intervals_were_made(lives, expected):
    records = records_of(lives)
    results = {"testbed": "role_play", "conditions": [summarise("a", "m", "none", {}, records, 0)]}
    text = " ".join(Page(report.page(results, {"a": records})).text.split())
    assert {i for i, note in enumerate(NOTES) if note in text} == expected


def test_page_of_nothing():
    empty = summarise("e", "m", "none", {}, [], 0)
    assert "no episodes" in report.page({"testbed": "role_play", "conditions": [empty]}, {"e": []})
