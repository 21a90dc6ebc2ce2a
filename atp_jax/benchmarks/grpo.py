r"""Seconds of a GRPO step, beside TRL's or tunix's if wanted.

    python -m atp_jax.benchmarks.grpo --model DIR [--random] [--data FILE | --prompt 1024] --prompts 4 --group 4 \
        --new 64 --steps 6 [--against trl|tunix]

Every completion has exactly `new` tokens (nothing stops it), so that the work can be set beside another program's.
Prints one JSON object: step_s (median of the steps after the first, which compiles), generate_s and update_s of its
halves, prefill_s and decode_s of the first half, tokens_per_s (completion tokens a second of a whole step), compile_s
(the first step less the median), and the machine. With --against the peer makes each step right after ours, with the
same prompts, in a process of its own: peer_s and ratio = peer_s / step_s. On an accelerator `update_mfu` is the share
of the update that its multiplications and additions (work.py) would take at the rate `product_tflops` of a large
product in this dtype; `peak_gb` is the most memory in use on the first device.

--model   a Hugging Face directory; empty: the embedded organism
--random  takes of it only config.json, and random weights of that shape; needs --prompt, for there is no tokenizer
--data    a scenario file whose prompts are answered; empty: the shipped alignment pack
--prompt  random prompts of so many tokens, in place of scenarios
--rank    of a LoRA adapter; 0 trains all weights
--peer_python  of an environment with google-tunix, which wants other versions than we do
"""

if __name__ == "__main__":  # first of all: it starts the program again
    from atp_jax.memory import keep_memory

    keep_memory(__spec__)

import contextlib
import dataclasses
import json
import sys
import time

import jax
import numpy as np
from absl import app, flags

from atp_jax.align.grpo import Draw, Grpo
from atp_jax.align.trainable import join, partition
from atp_jax.align.update import as_many_as_fit, init_state, make_optimiser, make_update, micro_batches
from atp_jax.benchmarks.machine import Rates, machine, rates, torch_device
from atp_jax.benchmarks.peer import Peer, check_tunix
from atp_jax.benchmarks.random_model import random_model
from atp_jax.benchmarks.work import check_whole, update_flops
from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.model import ORGANISM, Model, load_model
from atp_jax.models import lora as adapters
from atp_jax.parallel import named_sharding, put
from atp_jax.policies.types import Answer
from atp_jax.scenarios.pack import ALIGN, load_role_play
from atp_jax.settings import TARGETS, GrpoSettings


def scenario_prompts(model: Model, data: str, prompts: int, steps: int) -> list[list[list[int]]]:
    """Token ids of the prompts of each step. UserError where there are too few scenarios."""
    scenarios = load_role_play(data or ALIGN)
    if len(scenarios) < prompts:
        raise UserError(f"--prompts={prompts}, but {data or ALIGN} has only {len(scenarios)} scenarios")
    chat = Chat(model.tokenizer)
    asked = [
        chat.encode([{"role": "system", "content": s.system_prompt}, {"role": "user", "content": s.user_prompt}])
        for s in scenarios
    ]
    return [[asked[(step * prompts + i) % len(asked)] for i in range(prompts)] for step in range(steps)]


def random_prompts(model: Model, length: int, prompts: int, steps: int) -> list[list[list[int]]]:
    """Token ids of the prompts of each step."""
    return np.random.default_rng(0).integers(3, model.config.vocab_size, (steps, prompts, length)).tolist()


def grpo_peer(model: str, dtype: str, random: bool, tunix: str = "", **work) -> Peer:
    """The peer that makes the same steps: TRL, or google-tunix in the Python `tunix`. work: asked, group, new and rank,
    as in `measure`. UserError where it cannot."""
    settings = GrpoSettings()
    given = work | {"model": model, "kl": settings.kl, "learning_rate": settings.learning_rate}
    given["temperature"] = settings.temperature
    if tunix:
        return Peer("atp_jax.benchmarks.tunix_peer", tunix, task="train", **given)
    if random and not work["rank"]:
        raise UserError("--against=trl with --random needs --rank: TRL reads a reference of its own from the directory")
    return Peer("atp_jax.benchmarks.trl_grpo", **given, dtype=dtype, random=random, device=torch_device(dtype))


def measure(
    model: Model, asked: list[list[list[int]]], group: int, new: int, rank: int,
    peer: Peer | None = None, reached: Rates | None = None,
) -> dict:  # fmt: skip
    """The JSON object. asked: token ids of the prompts of each step, of which the first one compiles. reached: what a
    device does at its best, if the share of it is asked for."""
    steps, prompts = len(asked), len(asked[0])
    if rank:
        lora = adapters.init(model.config, rank, 2.0 * rank, TARGETS, 0, model.mesh)
        model = dataclasses.replace(model, lora=lora)
    engine = Engine(model.config, model.params, (), model.mesh, model.lora)

    def draw(step: int, params, lora) -> Draw:
        chosen = [prompt for prompt in asked[step] for _ in range(group)]
        engine.load(params, lora)
        streams = [(0, 0, step * len(chosen) + row, 0, 1) for row in range(len(chosen))]
        drawn = engine.generate(chosen, Sampling(max_new_tokens=new), streams)
        engine.forget()  # the update has the memory
        check_whole(drawn, new)
        answers = [
            Answer("", one.tokens, one.finish, sum(one.logprobs), tuple(prompt), one.logprobs)
            for prompt, one in zip(chosen, drawn, strict=True)
        ]
        rewards = np.array([np.mean(np.array(answer.tokens) % 2) for answer in answers])  # any will do
        return Draw(answers, rewards.reshape(prompts, group, 1), {})

    settings = GrpoSettings(steps=steps, prompts=prompts, group=group)
    method = Grpo("grpo", draw, model, settings, new, None)
    trainable, frozen = partition(model.params, model.lora)
    optimiser = make_optimiser(**method.optimiser, steps=steps)
    state, update = init_state(trainable, optimiser), make_update(method.loss, optimiser)
    fixed = (frozen, (model.params, None))
    placed = named_sharding(model.mesh, "length", "batch")
    spent, theirs, together = [], [], None
    for step in range(steps):
        engine.spent.clear()
        began = time.perf_counter()
        batch, _ = method.batch(step, *join(state.trainable, frozen))
        drawn = time.perf_counter()
        together = together or as_many_as_fit(update, state, fixed, batch, placed)
        state, metrics, _ = update(state, fixed, put(micro_batches(batch, together), placed))
        jax.block_until_ready((state, metrics))
        ended = time.perf_counter()
        spent.append([ended - began, drawn - began, ended - drawn, engine.spent["prefill"], engine.spent["decode"]])
        if peer:
            theirs.append(peer.seconds())
    names = ("step_s", "generate_s", "update_s", "prefill_s", "decode_s")
    medians = dict(zip(names, np.median(spent[1:], axis=0).tolist(), strict=True))
    step_s = medians["step_s"]
    result = {name: round(value, 4) for name, value in medians.items()}
    result |= {
        "tokens_per_s": round(prompts * group * new / step_s, 1), "compile_s": round(spent[0][0] - step_s, 2),
    }  # fmt: skip
    if peer:
        peer_s = float(np.median(theirs[1:]))
        result |= {"peer_s": round(peer_s, 4), "ratio": round(peer_s / step_s, 2), "peer": peer.about}
    if reached:
        flops = [update_flops(model.config, [*map(len, some)], group, new, whole=not rank) for some in asked]
        share = np.median([f / one[2] for f, one in zip(flops[1:], spent[1:], strict=True)]) / reached.flops
        result |= {
            "product_tflops": round(reached.flops / 1e12, 1), "update_mfu": round(share / jax.device_count(), 3),
        }  # fmt: skip
    shape = {
        "prompts": prompts, "group": group, "prompt": max(len(prompt) for some in asked for prompt in some), "new": new,
        "steps": steps, "rank": rank, "dtype": model.dtype,
    }  # fmt: skip
    return result | shape | machine()


def main(argv):
    del argv
    v = flags.FLAGS
    try:
        check_tunix(v.against, v.peer_python, v.dtype, v.random)
        if v.steps < 2:
            raise UserError("--steps must be at least 2: the first one compiles")
        if v.prompt and v.data:
            raise UserError("--prompt makes random prompts in place of those of --data: give one of the two")
        if v.random and not v.prompt:
            raise UserError("--random has no tokenizer for scenarios: give --prompt, the tokens of random prompts")
        reached, path = rates(v.dtype), v.model or str(ORGANISM)
        model = random_model(path, v.dtype) if v.random else load_model(path, v.dtype)
        if v.prompt:
            asked = random_prompts(model, v.prompt, v.prompts, v.steps)
        else:
            asked = scenario_prompts(model, v.data, v.prompts, v.steps)
        theirs = contextlib.nullcontext()
        if v.against:
            work = {"asked": asked, "group": v.group, "new": v.new, "rank": v.rank}
            theirs = grpo_peer(path, v.dtype, v.random, v.peer_python, **work)
        with theirs as peer:
            print(json.dumps(measure(model, asked, v.group, v.new, v.rank, peer, reached)))
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "Hugging Face directory; empty: the embedded organism")
    flags.DEFINE_boolean("random", False, "random weights of the shape in its config.json")
    flags.DEFINE_string("data", "", "scenario file; empty: the shipped alignment pack")
    flags.DEFINE_integer("prompt", 0, "tokens of random prompts in place of scenarios; 0: scenarios", lower_bound=0)
    flags.DEFINE_integer("prompts", 4, "prompts a step", lower_bound=1)
    flags.DEFINE_integer("group", 4, "completions a prompt", lower_bound=2)
    flags.DEFINE_integer("new", 64, "tokens a completion", lower_bound=1)
    flags.DEFINE_integer("steps", 6, "steps, the first of which compiles")
    flags.DEFINE_integer("rank", 0, "of a LoRA adapter; 0: all weights", lower_bound=0)
    flags.DEFINE_string("dtype", "float32", "of the model")
    flags.DEFINE_enum("against", "", ["", "trl", "tunix"], "what makes the same steps in alternation")
    flags.DEFINE_string("peer_python", "", "Python that has google-tunix, for --against=tunix")
    app.run(main)
