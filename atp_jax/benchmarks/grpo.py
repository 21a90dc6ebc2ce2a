"""Seconds of a GRPO step.

    python -m atp_jax.benchmarks.grpo --model DIR --data FILE --prompts 4 --group 4 --new 64 --steps 6

Every completion has exactly `new` tokens (nothing stops it), so that the work can be set beside another program's.
Prints one JSON object: step_s (median of the steps after compilation), generate_s and update_s of that step's halves,
tokens_per_s (completion tokens a second of a whole step), compile_s (the first step less the median), and the machine.

--model   a Hugging Face directory; empty: the embedded organism
--data    a scenario file; empty: the shipped alignment pack
--rank    of a LoRA adapter; 0 trains all weights
"""

import dataclasses
import json
import sys
import time

import jax
import numpy as np
from absl import app, flags

from atp_jax.align.grpo import Draw, Grpo
from atp_jax.align.trainable import join, partition
from atp_jax.align.update import init_state, make_optimiser, make_update, micro_batches
from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.model import load_model
from atp_jax.models import lora as adapters
from atp_jax.parallel import named_sharding
from atp_jax.policies.types import Answer
from atp_jax.scenarios.pack import ALIGN, load_role_play
from atp_jax.settings import TARGETS, GrpoSettings


def measure(model_path: str, data: str, prompts: int, group: int, new: int, steps: int, rank: int, dtype: str) -> dict:
    """The JSON object. UserError where there are too few scenarios or steps."""
    if steps < 2:
        raise UserError("--steps must be at least 2: the first one compiles")
    model = load_model(model_path, dtype=dtype)
    scenarios = load_role_play(data or ALIGN)
    if len(scenarios) < prompts:
        raise UserError(f"--prompts={prompts}, but {data or ALIGN} has only {len(scenarios)} scenarios")
    chat = Chat(model.tokenizer)
    asked = [
        chat.encode([{"role": "system", "content": s.system_prompt}, {"role": "user", "content": s.user_prompt}])
        for s in scenarios
    ]
    if rank:
        lora = adapters.init(model.config, rank, 2.0 * rank, TARGETS, 0, model.mesh)
        model = dataclasses.replace(model, lora=lora)
    engine = Engine(model.config, model.params, (), model.mesh, model.lora)
    spent = {"generate": [], "update": []}

    def draw(step: int, params, lora) -> Draw:
        chosen = [asked[(step * prompts + i) % len(asked)] for i in range(prompts) for _ in range(group)]
        engine.load(params, lora)
        streams = [(0, 0, step * len(chosen) + row, 0, 1) for row in range(len(chosen))]
        drawn = engine.generate(chosen, Sampling(max_new_tokens=new), streams)
        answers = [
            Answer("", one.tokens, one.finish, sum(one.logprobs), tuple(prompt), one.logprobs)
            for prompt, one in zip(chosen, drawn, strict=True)
        ]
        rewards = np.array([np.mean(np.array(answer.tokens) % 2) for answer in answers])  # any will do
        return Draw(answers, rewards.reshape(prompts, group, 1), {})

    settings = GrpoSettings(steps=steps, prompts=prompts, group=group)
    method = Grpo("grpo", draw, model, settings, new, prompts * group)
    trainable, frozen = partition(model.params, model.lora)
    optimiser = make_optimiser(**method.optimiser, steps=steps)
    state, update = init_state(trainable, optimiser), make_update(method.loss, optimiser)
    fixed = (frozen, (model.params, None))
    placed = named_sharding(model.mesh, "length", "batch")
    for step in range(steps):
        began = time.perf_counter()
        batch, _ = method.batch(step, *join(state.trainable, frozen))
        drawn = time.perf_counter()
        shaped = jax.device_put(micro_batches(batch, prompts), placed)
        state, metrics, _ = update(state, fixed, shaped)
        jax.block_until_ready((state, metrics))
        spent["generate"].append(drawn - began)
        spent["update"].append(time.perf_counter() - drawn)
    whole = np.sum(list(spent.values()), 0)
    step_s = float(np.median(whole[1:]))
    device = jax.devices()[0]
    return {
        "step_s": round(step_s, 4), "generate_s": round(float(np.median(spent["generate"][1:])), 4),
        "update_s": round(float(np.median(spent["update"][1:])), 4),
        "tokens_per_s": round(prompts * group * new / step_s, 1), "compile_s": round(float(whole[0]) - step_s, 2),
        "prompts": prompts, "group": group, "new": new, "steps": steps, "rank": rank, "dtype": dtype,
        "device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__,
    }  # fmt: skip


def main(argv):
    del argv
    v = flags.FLAGS
    try:
        print(json.dumps(measure(v.model, v.data, v.prompts, v.group, v.new, v.steps, v.rank, v.dtype)))
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "Hugging Face directory; empty: the embedded organism")
    flags.DEFINE_string("data", "", "scenario file; empty: the shipped alignment pack")
    flags.DEFINE_integer("prompts", 4, "prompts a step", lower_bound=1)
    flags.DEFINE_integer("group", 4, "completions a prompt", lower_bound=2)
    flags.DEFINE_integer("new", 64, "tokens a completion", lower_bound=1)
    flags.DEFINE_integer("steps", 6, "steps, the first of which compiles")
    flags.DEFINE_integer("rank", 0, "of a LoRA adapter; 0: all weights", lower_bound=0)
    flags.DEFINE_string("dtype", "float32", "of the model")
    app.run(main)
