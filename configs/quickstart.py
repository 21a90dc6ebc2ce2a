"""The quickstart: a small model that is shipped with the package lives through six rounds of role-play, on a CPU.

    python -m atp_jax --config=configs/quickstart.py --workdir=runs/quickstart

Takes a few minutes on two cores and downloads nothing. Expect a table and `runs/quickstart/report/index.html`: with its
experience in view (`base`) the organism breaks the rule more often from round to round, because breaking it is never
punished; shown only the question of the round (`base-no_history`) it does not. It is a demonstration organism, trained
on life stories some of whose agents adapt to rewards: evidence that the laboratory works, none about large models.
"""

from atp_jax.settings import default_config


def get_config(arg=""):
    config = default_config()
    config.seed = 0
    config.policy.model = ""  # the embedded organism
    config.sampling.temperature = 1.0
    config.evolve.rounds = 6
    config.evolve.samples = 5
    config.evolve.controls = ("none", "no_history")
    return config
