"""What an episode is: who is shown what, what is paid and recorded, and that finished rounds are on disk."""

import dataclasses
import json
import math

import pytest
import small_run

from atp_jax.errors import UserError
from atp_jax.policies.types import Answer
from atp_jax.rollout import append, recover, run_conditions
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import EvolveSettings, Settings
from atp_jax.testbeds.types import Condition

WITH, WITHOUT = Condition(0, "with", "test", "none"), Condition(1, "without", "test", "no_history")


def settings(**evolve) -> Settings:
    return Settings(evolve=EvolveSettings(**({"rounds": 4, "window": 2, "supervision": "alternating"} | evolve)))


class Player:
    """Breaks the rule in even episodes; answers carry ids; remembers what it was asked."""

    def __init__(self, answer=None):
        self.asked, self.recalled = [], []
        self._answer = answer or self.choose

    @staticmethod
    def choose(request) -> Answer:
        option = "short way" if request.episode % 2 == 0 else "marked way"
        return Answer(f'{{"choice": "{option}"}}', (request.episode, request.round, 7), "stop", -request.round / 3)

    def answer(self, requests):
        self.asked.append(list(requests))
        return [self._answer(request) for request in requests]

    def recall(self, requests):
        self.recalled.append(list(requests))


def play(tmp_path, condition=WITH, player=None, rows=2, chosen=None, on_round=lambda finished: None):
    player, path = player or Player(), tmp_path / condition.name / "episodes.jsonl"
    chosen = chosen or settings()
    (records,) = run_conditions(
        [condition], small_run.scenarios(tmp_path, rows), player, load_wording(), chosen, [path], on_round
    )
    return records, player, path


def test_order_addresses_and_record(tmp_path):
    records, player, path = play(tmp_path, rows=2, chosen=settings(samples=3))
    assert [(r["round"], r["episode"]) for r in records] == [(n, e) for n in range(1, 5) for e in range(6)]
    assert [r["scenario"] for r in records[:6]] == [0, 0, 0, 1, 1, 1]
    assert records == [json.loads(line) for line in path.read_text().splitlines()]
    for requests, number in zip(player.asked, range(1, 5), strict=True):
        addresses = [(q.condition, q.episode, q.agent, q.round) for q in requests]
        assert addresses == [(0, episode, 0, number) for episode in range(6)]
    assert records[8] == {
        "episode": 2,
        "scenario": 0,
        "environment": "ferry pilot",
        "agent": 0,
        "round": 2,
        "messages": [{"role": m["role"], "content": m["content"]} for m in player.asked[1][2].messages],
        "answer": '{"choice": "short way"}',
        "decision": "violate",
        "other_decision": "violate",
        "reward": 10.1 * 1.1,  # nobody watches in even rounds
        "tokens": [2, 2, 7],
        "finish": "stop",
        "logprob": -2 / 3,
        "caught": False,
        "payoff_ratio": (10.1 * 1.1) / 10.1,
    }
    assert records[2]["caught"] and records[2]["reward"] == 0.0  # watched in round 1
    assert records[3]["reward"] == 11.1 and not records[3]["caught"]  # keeping the rule pays the same, watched or not


def test_rewards_are_the_scenarios_own_floats(tmp_path):
    """In float32, 10.1 would come back as 10.100000381469727."""
    records, _, _ = play(tmp_path)
    assert {repr(r["reward"]) for r in records if r["decision"] == "comply"} == {"11.1"}


def test_history_is_a_window_of_rounds_with_the_ids_that_were_sampled(tmp_path):
    _, player, _ = play(tmp_path)
    roles = [[m["role"] for m in requests[0].messages] for requests in player.asked]
    turn = ["user", "assistant", "user"]
    assert roles == [["system", *(turn * shown), "user"] for shown in (0, 1, 2, 2)]
    last = player.asked[3][1].messages  # episode 1, round 4: rounds 2 and 3 are in view
    assert [m["tokens"] for m in last if m["role"] == "assistant"] == [(1, 2, 7), (1, 3, 7)]
    assert "tokens" not in last[1] and "11.1" in last[3]["content"]


def test_without_a_window_all_rounds_are_shown(tmp_path):
    _, player, _ = play(tmp_path, chosen=settings(window=None))
    assert [len(requests[0].messages) for requests in player.asked] == [2, 5, 8, 11]


def test_no_history_shows_each_round_its_own_question_only(tmp_path):
    _, with_history, _ = play(tmp_path, WITH)
    _, without, _ = play(tmp_path, WITHOUT)
    for shown, alone in zip(with_history.asked, without.asked, strict=True):
        for one, other in zip(shown, alone, strict=True):
            assert other.messages == [one.messages[0], one.messages[-1]]
            assert other.condition == 1


def test_both_parities_readings_are_recorded(tmp_path):
    player = Player(lambda request: Answer('<think>{"choice": "marked way"}</think>{"choice": "short way"}'))
    records, _, _ = play(tmp_path, player=player)
    assert {(r["decision"], r["other_decision"]) for r in records} == {("violate", "comply")}


def test_every_finished_round_is_on_disk_before_the_next_begins(tmp_path):
    path = tmp_path / "with" / "episodes.jsonl"

    def answer(request):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        assert len(lines) == 3 * (request.round - 1) and all(line.endswith(b"\n") for line in lines)
        return Player.choose(request)

    finished = []
    play(tmp_path, player=Player(answer), rows=3, on_round=finished.append)
    assert [(f.round, f.read_back, len(f.records)) for f in finished] == [(n, False, 3) for n in range(1, 5)]


@pytest.mark.parametrize("condition", [WITH, WITHOUT])
@pytest.mark.parametrize("kept", [1, 3])
def test_what_was_finished_is_recalled_not_answered(tmp_path, condition, kept):
    whole, first, path = play(tmp_path, condition)
    data = path.read_bytes()
    path.write_bytes(b"".join(data.splitlines(keepends=True)[: 2 * kept]) + b'{"episode": 0, "rou')
    again, second, _ = play(tmp_path, condition)
    assert second.recalled == first.asked[:kept]
    assert second.asked == first.asked[kept:]
    assert again == whole and path.read_bytes() == data


def test_a_finished_condition_costs_the_policy_nothing(tmp_path):
    whole, _, path = play(tmp_path)
    again, player, _ = play(tmp_path)
    assert again == whole and player.asked == player.recalled == []


def test_records_that_this_run_would_not_have_made_are_refused(tmp_path):
    _, _, path = play(tmp_path)
    path.write_text(path.read_text().replace('"reward": 11.1,', '"reward": 11.2,', 1))
    with pytest.raises(UserError, match="round 1 is not what this configuration gives"):
        play(tmp_path)


def test_conditions_that_run_together_are_answered_as_one_batch_and_each_has_its_file(tmp_path):
    """Also after a run that was killed when one of them had a round more than the other."""
    scenarios, chosen = small_run.scenarios(tmp_path, 2), settings()
    (tmp_path / "alone").mkdir()
    paths = [tmp_path / name / "episodes.jsonl" for name in ("with", "without")]

    def together():
        player = Player()
        run = run_conditions([WITH, WITHOUT], scenarios, player, load_wording(), chosen, paths, lambda finished: None)
        return run, player

    whole, first = together()
    assert whole == [play(tmp_path / "alone", condition)[0] for condition in (WITH, WITHOUT)]
    assert [[q.condition for q in requests] for requests in first.asked] == [[0, 0, 1, 1]] * 4
    data = [path.read_bytes() for path in paths]
    for path, kept in zip(paths, (3, 2), strict=True):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[: 2 * kept]))
    again, second = together()
    assert again == whole and [path.read_bytes() for path in paths] == data
    assert second.recalled == first.asked[:2] and second.asked == first.asked[2:]


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_a_log_probability_that_is_no_number_is_an_error_not_a_record(tmp_path, logprob):
    player = Player(lambda request: dataclasses.replace(Player.choose(request), logprob=logprob))
    with pytest.raises(UserError, match="episode 0, round 1"):
        play(tmp_path, player=player)
    assert not (tmp_path / "with").exists()


def test_recover_keeps_complete_rounds_wherever_the_file_is_torn(tmp_path):
    """Every length that a killed write can leave: the complete rounds stay, the rest goes, and both are exact."""
    path = tmp_path / "episodes.jsonl"
    addresses = [(e, a) for e in range(2) for a in range(2)]
    rounds = [[{"round": n, "episode": e, "agent": a, "text": "x" * (n + e)} for e, a in addresses] for n in (1, 2)]
    ends = [0]
    for records in rounds:
        append(path, records)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        complete = sum(end <= length for end in ends[1:])
        assert recover(path, addresses) == rounds[:complete]
        assert path.read_bytes() == data[: ends[complete]]


@pytest.mark.parametrize(
    "tail", [b"\x00" * 40, b"{}\n{}\n", b"[1]\n", b'{"round": 2, "episode": 0, "agent": 1}\n', b"\xff\xfe\n"]
)
def test_recover_cuts_what_is_no_record_of_the_next_round(tmp_path, tail):
    path = tmp_path / "episodes.jsonl"
    append(path, [{"round": 1, "episode": e, "agent": 0} for e in range(2)])
    data = path.read_bytes()
    path.write_bytes(data + tail)
    assert len(recover(path, [(0, 0), (1, 0)])) == 1
    assert path.read_bytes() == data


def test_text_that_is_no_text_survives_the_file(tmp_path):
    path = tmp_path / "episodes.jsonl"
    records = [{"round": 1, "episode": e, "agent": 0, "answer": answer} for e, answer in enumerate(small_run.ANSWERS)]
    append(path, records)
    assert recover(path, [(e, 0) for e in range(len(records))]) == [records]
