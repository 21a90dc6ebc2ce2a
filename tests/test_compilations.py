"""Programs are let go before they are too many for a process, and only then."""

import jax
import jax.numpy as jnp
import pytest

from atp_jax import compilations


@pytest.mark.skipif(not compilations.MAPPINGS.exists(), reason="this system does not say what a process has mapped")
def test_programs_are_let_go_once_there_are_many(monkeypatch):
    traced = []

    @jax.jit
    def double(x):
        traced.append(x.shape)
        return 2 * x

    double(jnp.zeros(3))
    monkeypatch.setattr(compilations, "MOST", 10**9)
    compilations.make_room()
    double(jnp.zeros(3))
    assert len(traced) == 1
    monkeypatch.setattr(compilations, "MOST", 0)
    compilations.make_room()  # no program was made since it looked last
    double(jnp.zeros(3))
    assert len(traced) == 1
    double(jnp.zeros(4))
    compilations.make_room()
    assert double(jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert len(traced) == 3
