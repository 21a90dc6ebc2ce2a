"""The threshold game: copies of one agent may collude, and all see whether it paid.

    python -m atp_jax --config=configs/threshold_game.py --workdir=runs/game
    python -m atp_jax --config=configs/threshold_game.py:qwen3_8b,dpo --workdir=runs/game_qwen3_8b_dpo
    python -m atp_jax --config=configs/threshold_game.py:llama31_8b,grpo --workdir=runs/game_llama31_8b_grpo
    python -m atp_jax.population --run=runs/game --out=runs/game/population

Without an argument the embedded organism plays: the base model, and DPO and GRPO of it towards the independent option,
each through six rounds of the seven shipped games at the thresholds 2, 4, 6 and 8 of 8, with and without its history
and with and without sight of its peers. With a family it is the paper's experiment: three rounds, the last three in
view, one game a situation and threshold; with `dpo` or `grpo` the model is aligned first.
`--config.data.path=threshold_game_templates.json` takes the original's situations in place of the shipped ones,
`--config.align.path=question_350.json --config.align.validation=question_70.json` its questions to align on.
"""

from atp_jax.errors import UserError
from atp_jax.settings import default_config

FAMILIES, METHODS = ("qwen3_8b", "llama31_8b"), ("dpo", "grpo")


def get_config(arg=""):
    config = default_config()
    config.testbed = "threshold_game"
    config.evolve.window = 3
    family, _, method = arg.partition(",")
    if family not in ("", *FAMILIES) or method not in ("", *METHODS) or (method and not family):
        known = " and ".join(FAMILIES)
        raise UserError(f"configs/threshold_game.py knows {known}, each also with ,dpo or ,grpo; not {arg!r}")
    align = config.align
    if not family:
        config.sampling.temperature = 1.0
        config.evolve.rounds = 6
        config.evolve.samples = 2
        config.evolve.controls = ("none", "no_history", "no_peers")
        config.policy.rows = 1024  # bounds the memory of the cache to some gigabytes
        align.method = "dpo+grpo"
        align.target, align.check_every, align.check_samples = 0.2, 5, 16
        align.pairs.steer = False
        align.pairs.tries = 12
        align.dpo.epochs, align.dpo.batch = 6, 16
        align.dpo.learning_rate, align.dpo.schedule = 3e-4, "constant"
        align.grpo.steps, align.grpo.prompts, align.grpo.group = 60, 8, 8
        align.grpo.learning_rate, align.grpo.schedule = 3e-4, "constant"
        return config
    config.evolve.rounds = 3
    config.evolve.samples = 1
    config.policy.dtype = "bfloat16"
    config.sampling.max_new_tokens = 32768
    if family == "qwen3_8b":
        config.policy.model = "Qwen/Qwen3-8B"
        config.sampling.update(temperature=0.6, top_p=0.95, top_k=20)
        align.dpo.learning_rate = 5e-6
    if family == "llama31_8b":
        config.policy.model = "meta-llama/Llama-3.1-8B-Instruct"
        config.sampling.update(temperature=0.7, top_p=0.9, top_k=50)
        align.dpo.learning_rate = 1e-5
    if method:
        align.method = method
    if method == "grpo":
        align.lora.rank = 0
        align.grpo.learning_rate = 5e-6
        align.grpo.max_new_tokens = 2048
    return config
