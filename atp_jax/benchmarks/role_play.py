r"""Seconds of role-play, round by round: 64 items lived through together by the real policy.

    python -m atp_jax.benchmarks.role_play --model DIR [--data F] --items 64 --rounds 6 --new 64 \
        [--how freely] [--against transformers]

All rounds stay in view, and every answer has exactly `new` tokens. The first life compiles, the second is measured.
--how=freely: as with evolve.lockstep=False, where the model has read an answer once it has given it; in lockstep it
reads it again with the next prompt. Since all answers are equally long, the rounds are the same ones.
--how=ahead: as with evolve.ahead=True. A round is then computed while the host sees to the one before, so what is left
of its seconds may be waiting, and reading counts as decoding but for the first prompts.
Prints one JSON object: seconds of all rounds and tokens_per_s (new tokens), of each round the seconds, those of prefill
and decoding, what is left (rendering, tokenizing, reading decisions; freely also caches that grow), and the longest
prompt; compile_s, the machine.
--against transformers answers the same prompts of each round as one batch right after it, --against transformers_each
with one call a prompt, in a process of its own: peer_s by round, and ratio.
"""

if __name__ == "__main__":  # first of all: it starts the program again
    from atp_jax.memory import keep_memory

    keep_memory(__spec__)

import contextlib
import dataclasses
import json
import sys
import time

from absl import app, flags

from atp_jax.benchmarks.generate import transformers_peer
from atp_jax.benchmarks.machine import machine
from atp_jax.benchmarks.peer import Peer
from atp_jax.benchmarks.work import check_whole
from atp_jax.errors import UserError
from atp_jax.generate.sampling import Sampling
from atp_jax.model import ORGANISM, Model, load_model
from atp_jax.policies.model import ModelPolicy
from atp_jax.policies.types import Answer, Request
from atp_jax.scenarios.pack import load_role_play
from atp_jax.scenarios.wording import load_wording
from atp_jax.settings import default_config, read_settings
from atp_jax.testbeds.role_play import Lives, conditions


def live(
    policy: ModelPolicy, items: list, rounds: int, new: int, how: str, peer: Peer | None, each: bool
) -> list[dict]:
    """What each round took."""
    config = default_config()
    config.evolve.rounds, config.evolve.window = rounds, None
    settings = read_settings(config)
    lives = Lives(conditions(settings, "base", 0)[0], items, load_wording("", "role_play"), settings)
    spent, began, answered = [], time.perf_counter(), {}
    policy.spent.clear()

    def go_on(answers: list[Answer]) -> list[Request]:
        """The round is over. -> what is asked in the next"""
        nonlocal began
        lives.tell(answers)
        took = time.perf_counter() - began
        check_whole(answers, new)
        phases = {"prefill_s": policy.spent["prefill"], "decode_s": policy.spent["decode"]}
        phases |= {"seconds": took, "host_s": took - sum(phases.values())}
        if peer:
            phases["peer_s"] = peer.seconds(prompts=[answer.prompt for answer in answers], new=new, each=each)
        longest = max(len(answer.prompt) for answer in answers)
        spent.append({"round": len(spent) + 1, "longest_prompt": longest} | {k: round(v, 3) for k, v in phases.items()})
        policy.spent.clear()
        began = time.perf_counter()
        return lives.ask() if len(spent) < rounds else []

    def follow(request: Request, answer: Answer) -> list[Request]:
        answered[request.episode] = answer
        return go_on([answered.pop(episode) for episode in range(len(items))]) if len(answered) == len(items) else []

    if how == "ahead":
        policy.foresee(lives.script)
    asked = lives.ask()
    if how == "freely":
        policy.pursue(asked, follow)
    else:
        while asked:
            asked = go_on(policy.answer(asked))
    return spent


def measure(
    model: Model, data: str, items: int, rounds: int, new: int, how: str, peer: Peer | None, each: bool
) -> dict:
    """The JSON object. UserError where there are too few scenarios."""
    scenarios = load_role_play(data)
    if len(scenarios) < items:
        raise UserError(f"--items={items}, but {data or 'the shipped pack'} has only {len(scenarios)} scenarios")
    endless = dataclasses.replace(model, generation={"eos_token_id": []})
    policy = ModelPolicy(endless, Sampling(max_new_tokens=new), seed=0)
    first = live(policy, scenarios[:items], rounds, new, how, None, each)
    spent = live(policy, scenarios[:items], rounds, new, how, peer, each)
    seconds = sum(one["seconds"] for one in spent)
    result = {
        "seconds": round(seconds, 2), "tokens_per_s": round(items * rounds * new / seconds, 1),
        "prefill_s": round(sum(one["prefill_s"] for one in spent), 2),
        "decode_s": round(sum(one["decode_s"] for one in spent), 2),
        "host_s": round(sum(one["host_s"] for one in spent), 2),
        "compile_s": round(sum(one["seconds"] for one in first) - seconds, 1),
    }  # fmt: skip
    if peer:
        theirs = sum(one["peer_s"] for one in spent)
        result |= {"peer_s": round(theirs, 2), "ratio": round(theirs / seconds, 2), "peer": peer.about}
    shape = {"items": items, "rounds": rounds, "new": new, "how": how, "dtype": model.dtype}
    return result | {"by_round": spent} | shape | machine()


def main(argv):
    del argv
    v = flags.FLAGS
    try:
        if v.how == "ahead" and v.against:
            raise UserError("--how=ahead has no peer: the next round would run beside it")
        path = v.model or str(ORGANISM)
        model = load_model(path, v.dtype)
        with transformers_peer(path, v.dtype) if v.against else contextlib.nullcontext() as peer:
            each = v.against == "transformers_each"
            print(json.dumps(measure(model, v.data, v.items, v.rounds, v.new, v.how, peer, each)))
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "Hugging Face directory; empty: the embedded organism")
    flags.DEFINE_string("data", "", "scenario file; empty: the shipped pack")
    flags.DEFINE_integer("items", 64, "scenarios", lower_bound=1)
    flags.DEFINE_integer("rounds", 6, "rounds", lower_bound=1)
    flags.DEFINE_integer("new", 64, "tokens of an answer", lower_bound=1)
    flags.DEFINE_enum("how", "lockstep", ["lockstep", "freely", "ahead"], "rounds follow one another")
    flags.DEFINE_string("dtype", "float32", "of the model")
    flags.DEFINE_enum("against", "", ["", "transformers", "transformers_each"], "what answers the same prompts, too")
    app.run(main)
