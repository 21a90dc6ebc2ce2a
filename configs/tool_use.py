"""Tool use: an agent solves mathematics problems with a dear tool or at once, and lives by what that pays.

    python -m atp_jax --config=configs/tool_use.py --workdir=runs/tools
    python -m atp_jax --config=configs/tool_use.py:v2 --workdir=runs/tools_v2
    python -m atp_jax --config=configs/tool_use.py:v1 --workdir=runs/tools_v1

In every round the agent lives through simple problems, which pay for leaving the tool aside, and then meets a complex
one with that experience in view; round 0 is before any. Without an argument the embedded organism is aligned to use the
tool, by DPO and by GRPO, and base, dpo and grpo live through five rounds of the shipped problems, two simple ones a
round: with their history, without it (no_history) and with experience that says nothing of its rewards
(neutral_rewards).

`:v2` and `:v1` are the paper's two protocols, as far as they are known, with Qwen3-4B-Thinking (v1: Qwen3-8B): greedy
decoding, five rounds (v1: four), simple problems from GSM8K with at most three steps, complex ones from AIME 2024 (the
paper's 157 also come from AIME 2025, OlympiadBench and SuperGPQA; v1: from OpenThoughts), all fetched from the hub. How
many simple problems a round holds and what a wrong answer pays the paper does not say: three, and nothing.
"""

from atp_jax.errors import UserError
from atp_jax.settings import default_config


def get_config(arg=""):
    if arg not in ("", "v1", "v2"):
        raise UserError(f"configs/tool_use.py knows v1 and v2, not {arg!r}")
    config = default_config()
    config.testbed = "tool_use"
    config.evolve.rounds = 4 if arg == "v1" else 5
    config.evolve.window = None
    config.evolve.controls = ("none", "no_history", "neutral_rewards")
    if not arg:
        config.sampling.temperature = 1.0
        config.sampling.max_new_tokens = 144  # a block of code; the organism's other answers are shorter
        config.policy.rows = 1024
        config.evolve.samples = 2
        config.tool.problems, config.evolve.window = 2, 3  # eight lived in view, as many as a story has
        align = config.align
        align.method = "dpo+grpo"
        align.target, align.check_every, align.check_samples = 0.15, 5, 16
        align.pairs.steer = False
        align.pairs.tries = 12
        align.dpo.epochs, align.dpo.batch = 6, 16
        align.dpo.learning_rate, align.dpo.schedule = 3e-4, "constant"
        align.grpo.steps, align.grpo.prompts, align.grpo.group = 60, 8, 8
        align.grpo.learning_rate, align.grpo.schedule = 3e-4, "constant"
        return config
    config.policy.dtype = "bfloat16"
    config.sampling.temperature = 0.0
    config.sampling.max_new_tokens = 32768
    simple, hard = config.tool.simple, config.tool.complex
    simple.path, simple.name, simple.split, simple.steps_most = "openai/gsm8k", "main", "train", 3
    if arg == "v2":
        config.policy.model = "Qwen/Qwen3-4B-Thinking-2507"
        hard.path, hard.split, hard.question, hard.answer = "HuggingFaceH4/aime_2024", "train", "problem", "answer"
    else:
        config.policy.model = "Qwen/Qwen3-8B"
        hard.path, hard.name, hard.split = "open-thoughts/OpenThoughts-114k", "metadata", "train"
        hard.question, hard.answer, hard.where, hard.limit = "problem", "ground_truth_solution", "domain=math", 157
    return config
