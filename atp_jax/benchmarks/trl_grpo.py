"""Seconds of the same GRPO step in TRL, to be set beside `atp_jax.benchmarks.grpo` (needs the `torch` extra).

    python -m atp_jax.benchmarks.trl_grpo --model DIR --data FILE --prompts 4 --group 4 --new 64 --steps 6

The same prompts, group, tokens a completion, KL weight, optimiser and float32 weights, all of them trained, no
checkpointing of activations (TRL is faster without). Prints one JSON object with step_s, the median after the first.
"""

import json
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from atp_jax.errors import UserError
from atp_jax.scenarios.pack import ALIGN, load_role_play
from atp_jax.settings import GrpoSettings


def measure(model_path: str, data: str, prompts: int, group: int, new: int, steps: int) -> dict:
    """The JSON object. UserError without TRL or where there are too few steps."""
    if steps < 2:
        raise UserError("--steps must be at least 2: the first one warms up")
    try:
        import datasets
        import torch
        import transformers
        import trl
    except ImportError as error:
        raise UserError(f"{error}: install the extra `torch`") from None

    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    asked = [
        [{"role": "system", "content": s.system_prompt}, {"role": "user", "content": s.user_prompt}]
        for s in load_role_play(data or ALIGN)
    ]
    ended = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ended.append(time.perf_counter())

    def reward(completion_ids, **_):
        return [float(np.mean(np.array(ids) % 2)) for ids in completion_ids]

    settings = GrpoSettings()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl.GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=prompts * group, num_generations=group,
            max_completion_length=new, generation_kwargs={"min_new_tokens": new}, max_steps=steps, beta=settings.kl,
            learning_rate=settings.learning_rate, loss_type="dapo", temperature=settings.temperature, use_cpu=True,
            bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, shuffle_dataset=False,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=reward, args=arguments, processing_class=tokenizer, callbacks=[Clock()],
            train_dataset=datasets.Dataset.from_list([{"prompt": messages} for messages in asked]),
        )  # fmt: skip
        trainer.train()
    step_s = float(np.median(np.diff(ended)))
    return {
        "step_s": round(step_s, 4), "tokens_per_s": round(prompts * group * new / step_s, 1), "prompts": prompts,
        "group": group, "new": new, "steps": steps, "dtype": "float32", "device": "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "trl": trl.__version__,
    }  # fmt: skip


def main(argv):
    del argv
    v = flags.FLAGS
    try:
        print(json.dumps(measure(v.model, v.data, v.prompts, v.group, v.new, v.steps)))
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "Hugging Face directory", required=True)
    flags.DEFINE_string("data", "", "scenario file; empty: the shipped alignment pack")
    flags.DEFINE_integer("prompts", 4, "prompts a step", lower_bound=1)
    flags.DEFINE_integer("group", 4, "completions a prompt", lower_bound=2)
    flags.DEFINE_integer("new", 64, "tokens a completion", lower_bound=1)
    flags.DEFINE_integer("steps", 6, "steps, the first of which warms up")
    app.run(main)
