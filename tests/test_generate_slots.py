"""Rows that leave and others that come: what is answered is the same, and waits for nobody."""

import numpy as np
import pytest
from small_engines import MIXED, ONE, assert_same, model, new_engine, prefilled, sizes, streams, text

from atp_jax.generate import engine as engines
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.generate.wanted import Next


def test_prompts_that_wait_for_a_free_row_are_answered_as_all_at_once(monkeypatch):
    """Six prompts through three rows; through as many as fit a memory in which a row must give way when the others'
    caches grow, and comes back with what it had answered."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    config, _, params = model()
    prompts = text(16, 20, 41, 8, 33, 20, 5)
    asked = [Sampling(max_new_tokens=new) for new in (3, 80, 12, 25, 60, 40)]  # their tails are long
    at_once = new_engine().generate(prompts, asked, streams(*range(6)))
    with sizes(monkeypatch) as seen:
        assert_same(new_engine().generate(prompts, asked, streams(*range(6)), rows=3), at_once)
    assert {rows for rows, *_ in seen} == {3}

    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    engine = Engine(config, params, (), ONE, memory=int(5 * 64 * position / engines.CACHES) + 1)
    with sizes(monkeypatch) as seen:
        assert_same(engine.generate(prompts, asked, streams(*range(6))), at_once)
    most = {64: 5, 96: 3, 128: 2}
    assert all(rows <= most[size] for rows, size, _ in seen) and {size for _, size, _ in seen} == set(most), seen
    engine.prefill(prompts, asked)
    assert engine._state is None  # nothing is remembered of prompts that had to wait


def test_a_batch_grows_when_its_longest_row_is_done(monkeypatch):
    """Among short prompts that wait there is one long one: while it is answered few rows fit, then many short ones, and
    the cache is cut back before there are more rows."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    config, _, params = model()
    prompts, asked = text(19, 300, *[10 + row for row in range(14)]), Sampling(max_new_tokens=20)
    at_once = new_engine().generate(prompts, asked, streams(*range(15)))
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    taken = []

    def spy(state, source, **static):
        taken.append((len(source), state.cache.keys[0].shape[3]))
        return take(state, source, **static)

    take = engines.take
    monkeypatch.setattr(engines, "take", spy)
    engine = Engine(config, params, (), ONE, memory=int(3 * 384 * position / engines.CACHES) + 1)
    with sizes(monkeypatch) as seen:
        assert_same(engine.generate(prompts, asked, streams(*range(15))), at_once)
    assert seen[0] == (3, 384, 0) and (12, 64, 0) in seen, seen
    assert taken[0] == (12, 64), taken


def test_a_batch_shrinks_to_the_rows_that_are_left(monkeypatch):
    """The tail is decoded in a smaller copy; what the next round continues is the whole batch, as it was."""
    monkeypatch.setattr(engines, "FEWEST", 4)
    monkeypatch.setattr(engines, "CHUNK", 16)
    prompts, asked = (
        text(17, 20, 41, 8, 33, 20, 5, 12, 27, 30, 9),
        [Sampling(max_new_tokens=70 if row == 3 else 6) for row in range(10)],
    )
    engine, whole = new_engine(), new_engine()
    with sizes(monkeypatch) as seen:
        answers = engine.generate(prompts, asked, streams(*range(10)))
    assert [rows for rows, *_ in seen] == [10, 1, 1, 1, 1]
    monkeypatch.setattr(engines, "FEWEST", 100)
    assert_same(whole.generate(prompts, asked, streams(*range(10))), answers)
    longer = [prompt + list(answer.tokens) + [1, 2] for prompt, answer in zip(prompts, answers, strict=True)]
    with prefilled(monkeypatch) as counts:
        again = engine.generate(longer, MIXED[0], streams(*range(10), round=2))
    np.testing.assert_array_equal(np.sum(counts, axis=0), [len(answer.tokens) + 2 for answer in answers])
    assert again == whole.generate(longer, MIXED[0], streams(*range(10), round=2))


def test_the_few_that_go_on_are_decoded_in_a_copy(monkeypatch):
    """And those that wait find their rows as they left them."""
    monkeypatch.setattr(engines, "FEWEST", 4)
    prompts, asked = text(17, 20, 41, 8, 33, 20, 5, 12, 27, 30, 9), Sampling(max_new_tokens=6)
    engine, whole = new_engine(), new_engine()
    answers = engine.generate(prompts, asked, streams(*range(10)))
    longer = [prompt + list(answer.tokens) + [1, 2] for prompt, answer in zip(prompts, answers, strict=True)]
    with sizes(monkeypatch) as seen:
        called = engine.generate([longer[2], longer[7]], asked, streams(2, 7, round=2))
    assert {rows for rows, *_ in seen} == {2}
    assert_same(called, whole.generate([longer[2], longer[7]], asked, streams(2, 7, round=2)))
    with prefilled(monkeypatch) as counts:
        again = engine.generate(longer, asked, streams(*range(10), round=3))
    read = [1 if row in (2, 7) else len(answer.tokens) + 2 for row, answer in enumerate(answers)]
    np.testing.assert_array_equal(np.sum(counts, axis=0), read)
    assert_same(again, whole.generate(longer, asked, streams(*range(10), round=3)))


def lives(engine, rows=None, lockstep=False, rounds=4, together=1, many=1):
    """Answers [episode][round] of ten times `many` episodes whose prompts grow by their answers; `together` episodes
    wait for one another after each round, as the agents of a game do."""
    prompts = text(18, *(20, 41, 8, 33, 20, 5, 12, 27, 30, 9) * many)
    asked, count = Sampling(max_new_tokens=90), len(prompts)
    found = [[] for _ in prompts]

    def more(row):
        prompts[row] = prompts[row] + list(found[row][-1].tokens) + text(100 * row + len(found[row]), 6)[0]
        return Next(prompts[row], (5, 0, row, 0, len(found[row]) + 1), after=latest[row])

    latest = list(range(count))
    if lockstep:
        for number in range(1, rounds + 1):
            answers = engine.generate(prompts, asked, streams(*range(count), round=number), None, rows)
            for row, answer in enumerate(answers):
                found[row].append(answer)
                more(row)
        return found

    places = list(range(count))  # whose answer each place is

    def follow(place, answer):
        row = places[place]
        found[row].append(answer)
        group = range(row - row % together, row - row % together + together)
        if len(found[row]) == rounds or any(len(found[one]) < len(found[row]) for one in group):
            return []
        new = [more(one) for one in group]
        for one in group:
            latest[one] = len(places)
            places.append(one)
        return new

    everything = engine.generate(prompts, asked, streams(*range(count)), None, rows, follow)
    assert len(everything) == len(places) == rounds * count
    return found


@pytest.mark.parametrize("rows, together", [(None, 1), (4, 1), (10, 2), (3, 5)])
def test_what_follows_an_answer_is_answered_as_in_lockstep(monkeypatch, rows, together):
    """Rounds whose answers differ much in length, each row on its own or in groups, with rows for all or for some."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    stop = {3, 11}
    expected = lives(new_engine(stop), lockstep=True)
    lengths = [len(answer.tokens) for row in expected for answer in row]
    assert min(lengths) < 10 and max(lengths) > 60
    for one, other in zip(lives(new_engine(stop), rows, together=together), expected, strict=True):
        assert_same(one, other)


def test_what_follows_is_answered_the_same_where_memory_is_short(monkeypatch):
    """Twenty episodes, five of which wait for one another: batches grow and shrink, caches as well, rows give way."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    monkeypatch.setattr(engines, "FEWEST", 4)
    stop, config = {3, 11}, model()[0]
    expected = lives(new_engine(stop), lockstep=True, rounds=3, many=2)
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    engine = Engine(config, model()[2], stop, ONE, memory=int(20 * 96 * position / engines.CACHES) + 1)
    with sizes(monkeypatch) as seen:
        found = lives(engine, rounds=3, together=5, many=2)
    assert len({rows for rows, *_ in seen}) > 3 and len({size for _, size, _ in seen}) > 2, seen
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_what_follows_waits_for_nobody_and_reads_only_what_is_new(monkeypatch):
    """Of ten episodes with four rounds each: fewer steps than the longest answers of the rounds have together; a row
    reads the message after its last answer and nothing again: what was said was read when it was."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    monkeypatch.setattr(engines, "FEWEST", 100)  # no row moves
    steps = []

    def spy(*arguments, **static):
        out = original(*arguments, **static)
        steps.append(int(np.max(np.asarray(out[1]) - np.asarray(arguments[2].produced))))
        return out

    original = engines.decode_chunk
    monkeypatch.setattr(engines, "decode_chunk", spy)
    with prefilled(monkeypatch) as counts:
        found = lives(new_engine({3, 11}))
    in_turn = sum(max(len(row[number].tokens) for row in found) for number in range(4))
    assert sum(steps) < 0.8 * in_turn, (sum(steps), in_turn)
    first = [20, 41, 8, 33, 20, 5, 12, 27, 30, 9]
    for row, answers in enumerate(found):
        assert sum(count[row] for count in counts) == first[row] + 6 * len(answers[:-1])


@pytest.mark.parametrize("most", [9, 11, 5, 7])
def test_a_bound_that_no_batch_has_is_kept_from_below(monkeypatch, most):
    """Batches have 8, 10, 12, ... rows: of 9 allowed 8 are used, and all 11 are answered."""
    prompts, asked = text(31, *[10 + row for row in range(11)]), Sampling(max_new_tokens=7)
    whole = new_engine().generate(prompts, asked, streams(*range(11)))
    with sizes(monkeypatch) as seen:
        assert_same(new_engine().generate(prompts, asked, streams(*range(11)), rows=most), whole)
        assert_same(new_engine().generate(prompts[:most], asked, streams(*range(most)), rows=most), whole[:most])
    assert max(rows for rows, *_ in seen) == {9: 8, 11: 10, 5: 5, 7: 7}[most]
