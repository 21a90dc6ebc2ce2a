"""What is shown of threshold games: the table, the CSV, the pictures and the page."""

import csv
import io
import re

import matplotlib.image
import numpy as np
import pytest
from game_records import condition_of, grid, imitators, records_of_games, setting_of
from rich.console import Console
from test_analysis_report import EVIL, Page

from atp_jax.analysis import games_plots, games_tables, plots, print_table, summarise_games, tables, write_report
from atp_jax.analysis.tipping import against_controls


@pytest.fixture(scope="module")
def run():
    """2 thresholds x 2 payoff sets x 2 models x 3 controls, and a mixed population with fixed agents."""
    results, records = grid((2, 6), ((1.2, 1.0, 0.8), (1.8, 1.0, 1.0)), ("base", "dpo"), games=12, rounds=4)
    games = imitators(12, 8, 2, 4, 0.5, seed=9, fixed=(0,))
    records["mixed"] = records_of_games(games, 2, fixed=(0,), unaligned=(6, 7))
    results["conditions"].append(condition_of("mixed", "dpo", "none", 2, records["mixed"]))
    return results, records


def plain(results, width):
    out = io.StringIO()
    print_table(results, Console(file=out, width=width))
    return out.getvalue()


# ---------------------------------------------------------------- terminal and CSV


def test_table_shows_every_condition(run, capsys):
    results, _ = run
    print_table(results)
    text = capsys.readouterr().out
    assert text == plain(results, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text and "…" not in text
    for words in ("2/8", "6/8", "1.2/1/0.8", "k = 1", "k = ∞", "no_peers", "29% base"):
        assert words in text
    for condition in results["conditions"]:
        first, last, change = condition["rounds"][0], condition["rounds"][-1], condition["change"]
        colluders = condition["games"]["again"]["colluders"]
        cells = [first, last, condition["games"]["success"][-1], colluders["after_success"]]
        numbers = [tables.percent(cell["rate"]) for cell in cells]
        assert re.search(r"\s+.*".join(map(re.escape, [*numbers[:2], tables.points(change), *numbers[2:]])), text)
    assert "rounds are left out" in text and "rounds are left out" not in plain(results, 200)
    assert "12 games of 7 scenarios" in text


def test_table_of_nothing():
    empty = condition_of("e", "m", "none", 4, [])
    for conditions in ([], [empty]):
        assert "payoffs" in plain({"testbed": "threshold_game", "conditions": conditions}, 100)


def test_controls_are_those_of_the_same_game(run):
    results, _ = run
    effects = against_controls(results["conditions"])
    assert len(effects) == 16
    for effect in effects:
        assert effect["control"].removesuffix("-no_history").removesuffix("-no_peers") == effect["condition"]


def test_csv_holds_the_results(run):
    results, _ = run
    rows = list(csv.DictReader(io.StringIO(games_tables.rates_csv(results))))
    assert tuple(rows[0]) == games_tables.RATE_COLUMNS
    everyone = [row for row in rows if row["population"] == "all"]
    numbers = [(c, row) for c in results["conditions"] for row in c["rounds"]]
    for row, (condition, expected) in zip(everyone, numbers, strict=True):
        assert (row["condition"], int(row["round"])) == (condition["name"], expected["round"])
        assert float(row["rate"]) == pytest.approx(expected["rate"], abs=1e-6)
        success = condition["games"]["success"][expected["round"] - 1]
        assert (int(row["successes"]), int(row["games"])) == (success["count"], 12)
    assert {row["condition"] for row in rows if row["population"] != "all"} == {"mixed"}

    games = list(csv.DictReader(io.StringIO(games_tables.games_csv(results))))
    assert tuple(games[0]) == games_tables.GAME_COLUMNS and len(set(games[0])) == len(games_tables.GAME_COLUMNS)
    for row, condition in zip(games, results["conditions"], strict=True):
        measures = condition["games"]
        assert (int(row["threshold"]), float(row["low"])) == (
            condition["setting"]["game.threshold"],
            condition["setting"]["game.payoffs"][2],
        )
        assert row["incentive_ratio"] == ("" if measures["incentive_ratio"] is None else "1.000000")
        cell = measures["again"]["others"]["after_failure"]
        assert int(row["others_after_failure_total"]) == cell["total"]
        if cell["total"]:
            assert float(row["others_after_failure"]) == pytest.approx(cell["rate"], abs=1e-6)
        for part in ("number", "spontaneous", "net"):
            found = measures["diffusion"][part]
            assert row[f"diffusion_{part}"] == (f"{found['estimate']:.6f}" if found else "")
        assert int(row["lock_in_count"]) == measures["lock_in"]["count"]


# ---------------------------------------------------------------- pictures


def pixels(data):
    return matplotlib.image.imread(io.BytesIO(data))[..., :3]


def near(image, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.abs(image - wanted).max(axis=-1) < 0.02


def test_raster_shows_each_choice_where_it_was_made():
    """One game of two agents: the colours of the four quarters of its panel are those of the choices."""
    records = records_of_games([(0, ["vc", "uv"])], threshold=1)
    results = {"testbed": "threshold_game", "conditions": [condition_of("a", "m", "none", 1, records)]}
    image = pixels(games_plots.raster_png(results, records={"a": records}))
    image = image[256:]  # below the legend, which has the same colours
    independent, collusion, unparsed = (near(image, colour) for colour in games_plots.CHOICE_COLOURS[:3])

    def centre(mask):
        return np.argwhere(mask).mean(axis=0)

    assert centre(unparsed)[0] > centre(independent)[0] and centre(unparsed)[1] < centre(independent)[1]
    middle = (centre(unparsed) + centre(independent)) / 2  # of the two that collude, one above and left, one opposite
    assert centre(collusion) == pytest.approx(middle, abs=2)
    assert collusion.sum() == pytest.approx(2 * unparsed.sum(), rel=0.02)


def test_rates_are_where_they_belong():
    """A condition that always colludes is at the top of the panel of its threshold, one that never does at the bottom
    of the next."""
    conditions = []
    for t, letters in ((2, "vvv"), (4, "ccc")):
        records = records_of_games([(s, [letters] * 8) for s in range(20)], t)
        conditions.append(condition_of(f"t{t}", "m", "none", t, records))
    image = pixels(games_plots.rates_png({"testbed": "threshold_game", "conditions": conditions}))[
        180:
    ]  # below the legend
    line = near(image, plots.COLOURS[0])
    height, width = line.shape
    left, right = np.argwhere(line[:, : width // 2])[:, 0], np.argwhere(line[:, width // 2 :])[:, 0]
    assert left.mean() < 0.2 * height and right.mean() > 0.7 * height


def test_grid_is_drawn_where_there_is_one(run, tmp_path):
    results, records = run
    one = results | {"conditions": results["conditions"][:1]}
    assert games_plots.has_grid(results) and not games_plots.has_grid(one)
    write_report(tmp_path, one, records)
    assert not (tmp_path / "report" / "grid.png").exists()
    assert "grid.png" not in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_games_are_shown_whatever_came_of_them(run):
    results, records = run
    shown = games_plots.shown_games(results, records)
    names = [condition["name"] for condition in results["conditions"] if condition["control"] == "none"]
    assert [name for name, _ in shown] == names  # 12 of them are no more than 12 // 9 = 1 each
    assert all({(r["scenario"], r["episode"]) for r in game} == {(0, 0)} for _, game in shown)
    other = {name: [r | {"decision": "comply", "success": False} for r in lines] for name, lines in records.items()}
    places = [[(name, r["episode"], r["agent"], r["round"]) for name, game in games for r in game]
              for games in (shown, games_plots.shown_games(results, other))]  # fmt: skip
    assert places[0] == places[1]
    alone = results | {"conditions": results["conditions"][:1]}
    assert [game[0]["episode"] for _, game in games_plots.shown_games(alone, records)] == [
        0, 7, 1, 8, 2, 9, 3, 10, 4, 11, 5, 6
    ]  # fmt: skip  # by scenario, then by number


@pytest.mark.parametrize("agents, games", [(2, 1), (40, 3)])
def test_pictures_of_few_and_many_agents(agents, games):
    records = records_of_games(imitators(games, agents, 2, 3, 0.5, seed=0, fixed=(1,)), 2, fixed=(1,))
    name = r"$\no\such$ % _^ " + "long " * 20  # as a formula it would be an error
    conditions = [summarise_games(name, name, name, setting_of(2, agents), records, 0) for _ in range(2)]
    conditions[0]["control"] = "none"
    results = {"testbed": "threshold_game", "conditions": conditions}
    for data in (games_plots.rates_png(results), games_plots.raster_png(results, {name: records})):
        assert data.startswith(b"\x89PNG") and b"matplotlib" not in data.lower()


# ---------------------------------------------------------------- page


def test_report_twice_gives_the_same_bytes(run, tmp_path):
    results, records = run
    write_report(tmp_path, results, records)
    folder = tmp_path / "report"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["games.csv", "games.png", "grid.png", "index.html", "rates.csv", "rates.png"]
    write_report(tmp_path, results, {name: lines[::-1] for name, lines in records.items()})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first

    html = first["index.html"].decode()
    page = Page(html)
    assert not page.unbalanced and not page.open
    targets = {value for _, attrs in page.tags for key, value in attrs if key in ("src", "href")}
    assert targets == set(first) - {"index.html"}
    assert not re.search(r"https?:|@import|url\(", html)


def test_page_shows_the_numbers(run, tmp_path):
    results, records = run
    write_report(tmp_path, results, records)
    text = " ".join(Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8")).text.split())
    for condition in results["conditions"]:
        measures = condition["games"]
        assert tables.points_span(condition["change"]["ci95"]) in text
        difference = measures["again"]["colluders"]["difference"]
        assert difference is None or tables.points_span(difference["ci95"]) in text
        net = measures["diffusion"]["net"]
        assert net is None or "[{:.2f}, {:.2f}]".format(*net["ci95"]) in text
    assert "t = 2 of 8: from the first round to the last" in text
    assert "Aligned and unaligned agents apart" in text and "Against the controls" in text
    assert "games are drawn with replacement" in text and "The difference is not the effect of a success alone" in text


def test_everything_said_is_escaped(tmp_path):
    """A page about hostile words has the very tags of a page about harmless ones, and shows the words as they are."""
    pages = []
    for words in ([f"plain words {i}" for i in range(len(EVIL))], EVIL):
        records = records_of_games(imitators(8, 4, 2, 3, 0.5, seed=0), 2)
        conditions = [
            summarise_games(words[0], words[1], "none", setting_of(2, 4) | {words[2]: words[3]}, records, 0),
            summarise_games(words[4], words[1], words[5], setting_of(2, 4), records, 0),
        ]
        results = {"schema": 1, "testbed": "threshold_game", "conditions": conditions}
        write_report(tmp_path, results, {words[0]: records})
        pages.append(Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8")))
    good, bad = pages
    assert bad.tags == good.tags
    for words in EVIL[:5]:
        assert words in bad.text


def test_report_of_nothing(tmp_path):
    empty = condition_of("e", "m", "none", 4, [])
    for conditions in ([], [empty]):
        write_report(tmp_path, {"testbed": "threshold_game", "conditions": conditions}, {"e": []})
