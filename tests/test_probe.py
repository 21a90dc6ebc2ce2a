"""The scripted-history probe: whose words the history is told in, and how what was found is shown."""

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console
from small_run import row

from atp_jax import analysis, lab, probe, settings
from atp_jax.analysis import probe_plots, report, summarise, tables
from atp_jax.decisions import read_decision
from atp_jax.policies.types import Answer
from atp_jax.scenarios.pack import load_role_play, read_row


def scenarios(*options):
    """Scenarios with these (comply, violate) names."""
    return [
        read_row(row(n, supervised_choice=comply, better_choice=violate), n, "here")
        for n, (comply, violate) in enumerate(options)
    ]


def test_own_answers_are_taken_as_they_are_and_missing_ones_borrowed_from_the_nearest():
    pack = scenarios(("bridge", "rail"), ("desk", "dial"), ("tin", "tray"), ("wax", "tar"))
    own = [{}, {}, {"violate": Answer('Tray pays, tins do not. {"choice": "tray"}', (7, 8, 9))},
           {"violate": Answer('More by "tar". {"choice": "tar"}')}]  # fmt: skip
    told = probe.scripted(pack, own, "violate", "default")
    assert [source for source, _ in told] == ["borrowed", "borrowed", "own", "own"]
    assert told[2][1] == own[2]["violate"]  # with the ids that were sampled
    assert told[1][1] == Answer('dial pays, tins do not. {"choice": "dial"}')  # whole words alone, in any case
    assert [source for source, _ in probe.scripted(pack, own, "comply", "default")] == ["bare"] * 4


def test_a_borrowed_answer_decides_as_it_should_here():
    """Names that begin one another are told apart, and an answer that cannot be read here is not borrowed."""
    pack = scenarios(("way", "way round"), ("path", "path over"), ("gate", "wall"))
    unread = Answer("The rule asks for the way.")
    own = [{"comply": unread, "violate": Answer('Way round? {"choice": "way round"}')}, {},
           {"comply": Answer('I like gate. {"choice": "gate"}')}]  # fmt: skip
    assert probe.scripted(pack, own, "violate", "default")[1] == (
        "borrowed",
        Answer('path over? {"choice": "path over"}'),
    )
    assert probe.scripted(pack, own, "comply", "default")[1] == ("borrowed", Answer('I like path. {"choice": "path"}'))
    for decision, name in (("comply", "gate"), ("violate", "wall")):
        source, answer = probe.scripted(pack[2:], [{}], decision, "default")[0]
        assert source == "bare" and json.loads(answer.text) == {"choice": name}


@pytest.fixture(scope="module")
def organism():
    """The shipped organism on four scenarios: (settings, lab, scenarios)."""
    config = settings.default_config()
    config.evolve.samples, config.evolve.probe = 2, (0, 1, 2)
    chosen = settings.check_settings(settings.read_settings(config))
    return chosen, lab.open_lab(chosen), load_role_play("", (0, 5, 10, 15))


def probed(organism, lengths):
    chosen, opened, pack = organism
    chosen = dataclasses.replace(chosen, evolve=dataclasses.replace(chosen.evolve, probe=lengths))
    return probe.probe(chosen, "base", opened.model, opened.sampling, opened.wording, pack)


@pytest.fixture(scope="module")
def cells(organism):
    return probed(organism, (0, 1, 2))


def test_the_organism_tells_its_history_in_its_own_words(organism):
    chosen, opened, pack = organism
    own = probe._own_answers(chosen, opened.model, opened.sampling, opened.wording, pack)
    for scenario, answers in zip(pack, own, strict=True):
        assert answers.keys() == {"comply", "violate"}
        for decision, answer in answers.items():
            assert read_decision(answer.text, scenario.comply, scenario.violate) == decision
            assert answer.tokens and not answer.text.startswith("{")  # a reason comes first
    for history, (_, decision) in probe.HISTORIES.items():
        told = [answer for _, answer in probe.scripted(pack, own, decision, "default")]
        for request, answer in zip(probe._after(chosen, opened.wording, pack, told, history, 2), told, strict=True):
            said = [message for message in request.messages if message["role"] == "assistant"]
            assert [(message["content"], message["tokens"]) for message in said] == [(answer.text, answer.tokens)] * 2
            feedback = [request.messages[index]["content"] for index in (3, 6)]
            assert feedback[0] == feedback[1] and ("unseen" in feedback[0]) == (history == "paid")


def test_cells_count_whose_words_they_are_and_do_not_depend_on_what_else_is_probed(organism, cells):
    assert [(cell["history"], cell["rounds"]) for cell in cells] == [
        ("none", 0), *((history, length) for length in (1, 2) for history in ("paid", "caught", "kept"))
    ]  # fmt: skip
    for cell in cells:
        assert sum(cell["scripted"].values()) == (4 if cell["rounds"] else 0)
        assert cell["greedy"]["total"] == 4 and cell["sampled"]["total"] == cell["scored"]["total"] == 8
    assert probed(organism, (1,)) == [cell for cell in cells if cell["rounds"] == 1]


def test_a_large_pack_is_probed_in_scenarios_spread_over_it(organism, monkeypatch):
    monkeypatch.setattr(probe, "MOST", 2)
    chosen, opened, pack = organism
    (cell,) = probed((chosen, opened, pack), (0,))
    assert cell["greedy"]["total"] == 2


# ---------------------------------------------------------------- what is shown


def results_with(cells):
    return {"schema": 1, "testbed": "role_play", "conditions": [summarise("base", "base", "none", {}, [], 0)],
            "probe": cells}  # fmt: skip


def test_the_page_and_the_terminal_show_every_cell(cells, tmp_path):
    cells = [cell | {"model": model} for model in ("base", "<dpo>") for cell in cells]
    results = results_with(cells)
    analysis.write_report(tmp_path, results, {"base": []})
    html = (tmp_path / "report" / "index.html").read_text()
    assert (tmp_path / "report" / "probe.png").read_bytes() == probe_plots.probe_png(cells)
    assert html.count('src="probe.png"') == 1 and "<dpo>" not in html
    section = html[html.index("After a scripted history") : html.index("Whole episodes")]
    assert len(re.findall("<tr><th>(?:base|&lt;dpo&gt;)</th>", section)) == len(cells) == 14
    for cell in cells:
        for how in ("sampled", "greedy", "scored"):
            assert f"{tables.percent(cell[how]['rate'])}%" in section and tables.span(cell[how]["ci95"]) in section
    assert "4 scenarios" in section and "48 own, 0 borrowed, 0 bare" in section

    out = io.StringIO()
    analysis.print_table(results, Console(file=out, width=100))
    shown = out.getvalue()[out.getvalue().index("Probe") :]
    assert max(map(len, shown.splitlines())) <= 100 and "\x1b" not in shown
    assert shown.count("broke the rule, paid") == 2
    paid = next(line for line in shown.splitlines() if "base" in line)
    for cell in (cell for cell in cells[:7] if cell["history"] in ("none", "paid")):
        assert f"{tables.percent(cell['scored']['rate'])} {tables.span(cell['scored']['ci95'])}" in paid


def test_without_a_probe_nothing_is_said_of_one(cells):
    results = results_with([])
    assert "probe" not in report.page(results, {"base": []}) and report.PROBE not in report.files(results, {"base": []})


@pytest.mark.parametrize("lengths", [(0,), (2,), (1, 2)])
def test_any_lengths_can_be_drawn(cells, lengths):
    chosen = [cell for cell in cells if cell["rounds"] in lengths]
    kinds = ["none"] if lengths == (0,) else ["paid", "caught", "kept"]
    assert [history for _, history, _ in tables.probe_lines(chosen)] == kinds
    assert all(tuple(line) == lengths for _, _, line in tables.probe_lines(chosen))
    assert probe_plots.probe_png(chosen).startswith(b"\x89PNG")
