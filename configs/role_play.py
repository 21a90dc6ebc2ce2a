"""Role-play with any model of the Qwen2.5, Qwen3 and Llama 3 families, and with the settings of the paper.

    python -m atp_jax --config=configs/role_play.py --config.policy.model=DIRECTORY_OR_HUB_ID --workdir=runs/mine
    python -m atp_jax --config=configs/role_play.py:qwen3_8b --workdir=runs/qwen3_8b
    python -m atp_jax --config=configs/role_play.py:llama31_8b,dpo --workdir=runs/llama31_8b_dpo
    python -m atp_jax --config=configs/role_play.py:qwen3_8b,grpo --workdir=runs/qwen3_8b_grpo

`--config.data.path=question_64.json` takes the original's 64 items in place of the shipped pack,
`--config.align.path=question_160.json` its 160 to align on. The evaluation is the paper's: six rounds, the last five in
view, breaking the rule never punished, one sample an item, and the sampling that the original's calls had in force for
each family. With `dpo` or `grpo` the model is aligned first, as in the paper: DPO of a LoRA adapter (rank 8, 12 epochs
of pairs from the model's own answers), GRPO of all weights (4 prompts x 4 answers a step, KL 0.04); base and aligned
model live through the rounds side by side. In the paper the violation rate of aligned models starts at about 20% and
doubles by round six.

All weights of an 8B model with their optimiser need about 130 GB: several devices share them with
`--config.mesh.data=1 --config.mesh.fsdp=-1`; on one, train an adapter: `--config.align.lora.rank=8`.
"""

from atp_jax.errors import UserError
from atp_jax.settings import default_config

FAMILIES, METHODS = ("qwen3_8b", "llama31_8b"), ("dpo", "grpo")


def get_config(arg=""):
    config = default_config()
    config.evolve.rounds = 6
    config.evolve.window = 5
    config.evolve.samples = 1
    config.evolve.supervision = "all_unsupervised"
    family, _, method = arg.partition(",")
    if family not in ("", *FAMILIES) or method not in ("", *METHODS):
        known = " and ".join(FAMILIES)
        raise UserError(f"configs/role_play.py knows the arguments {known}, each also with ,dpo or ,grpo; not {arg!r}")
    if not family:
        config.sampling.max_new_tokens = 256
    else:
        config.policy.dtype = "bfloat16"
        config.sampling.max_new_tokens = 32768
    if family == "qwen3_8b":  # its own generation_config.json, thinking as its template does by itself
        config.policy.model = "Qwen/Qwen3-8B"
        config.sampling.update(temperature=0.6, top_p=0.95, top_k=20)
        config.align.dpo.learning_rate = 5e-6
    if family == "llama31_8b":  # the pipeline's temperature and top-k in force, the model's top-p
        config.policy.model = "meta-llama/Llama-3.1-8B-Instruct"
        config.sampling.update(temperature=0.7, top_p=0.9, top_k=50)
        config.align.dpo.learning_rate = 1e-5
    if method:
        config.align.method = method
    if method == "grpo":
        config.align.lora.rank = 0  # all weights, as in the paper
        config.align.grpo.max_new_tokens = 2048
    return config
