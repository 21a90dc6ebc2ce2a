"""Groups that share their prompt are answered as rows with copies of it."""

import dataclasses

import jax
import pytest
from small_engines import MIXED, ONE, assert_same, model, new_engine, sizes, streams, text

from atp_jax.generate import engine as engines
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.generate.wanted import Next
from atp_jax.models import lora

GROUPS = [4 * [prompt] for prompt in text(21, 70, 131, 9)]
GROUPS[2] = GROUPS[0]  # two that happen to be the same


@pytest.mark.parametrize("short", [6, 70])
def test_groups_that_share_their_prompts_are_answered_as_rows_with_copies(monkeypatch, short):
    """Round after round, with settings of their own; all members as long as one another, or two that go on alone, in
    rows that share nothing. The caches of answers grow with these, and none holds a prompt."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    monkeypatch.setattr(engines, "FEWEST", 4)
    first = sum(GROUPS, [])
    asked = [dataclasses.replace(MIXED[row % 5], max_new_tokens=70 if row in (3, 8) else short) for row in range(12)]
    found = {}
    for shared in (1, 10**6):
        monkeypatch.setattr(engines, "SHARED", shared)
        engine, prompts = new_engine(), first
        with sizes(monkeypatch) as seen:
            answers = engine.generate(prompts, asked, streams(*range(12)))
            prompts = [p + list(a.tokens) + [1, 2] for p, a in zip(prompts, answers, strict=True)]
            found[shared] = answers + engine.generate(prompts, MIXED[0], streams(*range(12), round=2))
        alone = [(2, 96, 0), (2, 128, 0), (2, 128, 0), (2, 192, 0), (12, 192, 0)]
        together = [*3 * [(12, 64, 3)], (12, 96, 3), (12, 256, 0)]
        assert shared > 1 or seen == [(12, 64, 3), *(together if short == 70 else alone)]
    assert_same(found[1], found[10**6])


@pytest.mark.parametrize("rest", [False, True])
def test_what_follows_is_answered_the_same_where_prompts_were_shared(monkeypatch, rest):
    """Also where the rows with long prompts rest until the others have gone on: nothing of them is cut off."""
    monkeypatch.setattr(engines, "CHUNK", 16)
    monkeypatch.setattr(engines, "FEWEST", 100)
    found, first = [], [prompt for prompt in text(23, 300, 30, 20) for _ in range(4)]

    def follow(place, answer):
        complete[place] = answer
        ready = [place] if place < 12 else []
        if rest:  # the short ones go on when all are complete, the long ones when the short ones are again
            ready = {12: range(4, 12), 20: range(4)}.get(len(complete), [])
        followed.extend(ready)
        return [Next(first[one] + list(complete[one].tokens) + [1, 2], (5, 0, one, 0, 2), after=one) for one in ready]

    stop, asked = set(range(16)), Sampling(max_new_tokens=40)
    for shared in (1, 10**6):
        monkeypatch.setattr(engines, "SHARED", shared)
        followed, complete = [], {}
        with sizes(monkeypatch) as seen:
            answers = new_engine(stop).generate(first, asked, streams(*range(12)), follow=follow)
        assert seen[0][2] == (3 if shared == 1 else 0) and seen[-1][2] == 0
        found.append(answers[:12] + [answers[12 + followed.index(place)] for place in range(12)])
    assert_same(*found)


def test_groups_wear_adapters():
    """The same prompt with an adapter and without one: two groups, each answered like its rows alone."""
    config, _, params = model()
    worn = lora.init(config, 2, 4.0, ("query", "down"), 0, ONE)
    worn = worn.replace(b=jax.tree.map(lambda x: x + 0.3, worn.b))
    prompts, adapter = 8 * text(24, 140), [*4 * [0], *4 * [-1]]
    with pytest.MonkeyPatch.context() as patch, sizes(patch) as seen:
        both = Engine(config, params, (), ONE, worn).generate(prompts, MIXED[0], streams(*range(8)), adapter)
    assert seen == [(8, 64, 2)]
    for part, one in ((slice(0, 4), worn), (slice(4, 8), None)):
        rows = range(8)[part]
        alone = [Engine(config, params, (), ONE, one).generate(prompts[:1], MIXED[0], streams(row))[0] for row in rows]
        assert_same(both[part], alone)
    assert both[0].tokens != both[4].tokens


@pytest.mark.parametrize("case, expected", [
    ((16, 4, 140, 64, 204, 1), True),
    ((16, 4, 127, 64, 191, 1), False),  # too short to pay
    ((16, 1, 140, 64, 204, 1), False),
    ((36, 4, 140, 64, 204, 1), False),  # a batch would have 40 rows
    ((16, 4, 140, 64, 204, 8), False),  # 4 prompts for 8 devices
    ((64, 8, 140, 64, 204, 8), True),
    ((4, 2, 2000, 2000, 2048, 1), False),  # a short prompt with a long answer, and the other way round
])  # fmt: skip
def test_prompts_are_shared_where_that_takes_no_more_memory_and_nothing_is_padded(case, expected):
    *numbers, shards = case
    assert engines.shares(*numbers, shards=shards) == expected
