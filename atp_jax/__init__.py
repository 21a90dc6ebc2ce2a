"""A JAX-native laboratory for alignment tipping.

    model = atp_jax.load_model(path_or_hub_id, dtype="float32", mesh=None)
    model.generate(prompts, atp_jax.Sampling(temperature=0.0), seed)
    atp_jax.read_decision(text, comply, violate, parity="default")
    atp_jax.envs.role_play.init(params), .step(state, decision, params)

Each is imported when it is first used, so that `import atp_jax` costs nothing.
"""

import importlib

__all__ = ["Sampling", "envs", "load_model", "read_decision"]

_HOMES = {"Sampling": "atp_jax.generate.sampling", "load_model": "atp_jax.model", "read_decision": "atp_jax.decisions"}


def __getattr__(name: str):
    if name == "envs":
        return importlib.import_module("atp_jax.envs")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'atp_jax' has no attribute {name!r}")
