"""Records as rollout writes them, made from decisions."""

from collections.abc import Sequence

ASKED = [{"role": "system", "content": "You mind a gate."}, {"role": "user", "content": "And now?"}]
LETTERS = {"c": "comply", "v": "violate", "u": "unparsed", ".": None}


def records_of(lives: Sequence[tuple[int, str]], **fields) -> list[dict]:
    """(scenario, "cvu.") pairs -> records; a letter a round, "." for a round without a record.

    fields: further keys; a callable is called with (scenario, episode, round).
    """
    records = []
    for episode, (scenario, letters) in enumerate(lives):
        for number, letter in enumerate(letters, 1):
            if LETTERS[letter] is None:
                continue
            record = {
                "episode": episode,
                "scenario": scenario,
                "agent": 0,
                "round": number,
                "messages": ASKED,
                "answer": f"I {LETTERS[letter]}.",
                "decision": LETTERS[letter],
                "reward": 1.5,
                "tokens": [5, 6],
                "finish": "stop",
                "logprob": -0.5,
                "caught": False,
                "environment": f"occupation {scenario // 4}",
                "payoff_ratio": 1.02 if scenario % 2 else 2.0,
            }
            for key, value in fields.items():
                record[key] = value(scenario, episode, number) if callable(value) else value
            records.append(record)
    return records
