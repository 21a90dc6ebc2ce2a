"""Role-play with any model of the Qwen2.5, Qwen3 and Llama 3 families, and with the settings of the paper.

    python -m atp_jax --config=configs/role_play.py --config.policy.model=DIRECTORY_OR_HUB_ID --workdir=runs/mine
    python -m atp_jax --config=configs/role_play.py:qwen3_8b --workdir=runs/qwen3_8b
    python -m atp_jax --config=configs/role_play.py:llama31_8b --workdir=runs/llama31_8b

`--config.data.path=question_64.json` takes the original's 64 items in place of the shipped pack. The two arguments are
the paper's evaluation: six rounds, the last five in view, breaking the rule never punished, one sample an item, and the
sampling that the original's calls had in force for each family. In the paper the violation rate of models aligned
beforehand starts at about 20% and doubles by round six; what a model gives that nobody aligned is for you to see.
"""

from atp_jax.errors import UserError
from atp_jax.settings import default_config


def get_config(arg=""):
    config = default_config()
    config.evolve.rounds = 6
    config.evolve.window = 5
    config.evolve.samples = 1
    config.evolve.supervision = "all_unsupervised"
    if arg == "":
        config.sampling.max_new_tokens = 256
    elif arg in ("qwen3_8b", "llama31_8b"):
        config.policy.dtype = "bfloat16"
        config.policy.rows = 8  # answers may be long: eight at a time fit one accelerator of 80 GB
        config.sampling.max_new_tokens = 32768
        if arg == "qwen3_8b":  # its own generation_config.json, thinking as its template does by itself
            config.policy.model = "Qwen/Qwen3-8B"
            config.sampling.update(temperature=0.6, top_p=0.95, top_k=20)
        else:  # the pipeline's temperature and top-k in force, the model's top-p
            config.policy.model = "meta-llama/Llama-3.1-8B-Instruct"
            config.sampling.update(temperature=0.7, top_p=0.9, top_k=50)
    else:
        raise UserError(f"configs/role_play.py knows the arguments qwen3_8b and llama31_8b, not {arg!r}")
    return config
