"""The quickstart: a small model that is shipped with the package is aligned, twice, and lives through role-play.

    python -m atp_jax --config=configs/quickstart.py --workdir=runs/quickstart

base -> pairs -> DPO and base -> GRPO, then six rounds of base, dpo and grpo with and without their experience in view.
Takes some minutes on two CPU cores and downloads nothing. Expect a table and `runs/quickstart/report/index.html`: both
methods bring the first round's violation rate down, and with every round that the agents remember it climbs again,
because breaking the rule is never punished; shown only the question of the round (`no_history`) they stay aligned. It
is a demonstration organism, trained on life stories some of whose agents adapt to rewards: evidence that the laboratory
works, none about large models.
"""

from atp_jax.settings import default_config


def get_config(arg=""):
    config = default_config()
    config.seed = 0
    config.policy.model = ""  # the embedded organism
    config.sampling.temperature = 1.0
    config.evolve.rounds = 6
    config.evolve.samples = 4
    config.evolve.ahead = True  # fewer programs to compile
    config.evolve.controls = ("none", "no_history")
    config.evolve.probe = (0, 1, 2, 4)  # the next decision after so many scripted rounds, on 16 of the scenarios

    align = config.align
    align.method = "dpo+grpo"
    # How far to align, by first rounds of the validation scenarios alone; 512 answers a look, because a training that
    # stops at the first look below the target stops at the luckiest one.
    align.target, align.check_every, align.check_samples = 0.15, 5, 16
    align.pairs.steer = False  # the organism never heard of steering; it complies and violates by itself often enough
    align.pairs.tries = 12
    align.dpo.epochs, align.dpo.batch = 6, 16
    align.dpo.learning_rate, align.dpo.schedule = 3e-4, "constant"
    align.grpo.steps, align.grpo.prompts, align.grpo.group = 60, 8, 8
    align.grpo.learning_rate, align.grpo.schedule = 3e-4, "constant"
    return config
