"""What the testbeds have in common: how a decision is written in an array."""

COMPLY, VIOLATE, UNPARSED = 0, 1, 2  # the order of `atp_jax.decisions.DECISIONS`
