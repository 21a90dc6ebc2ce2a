"""Live comparison with transformers' own `generate`, token for token."""

import numpy as np
import pytest
import small_models
from fixtures.make_fixtures import LLAMA3, build, store

from atp_jax import parallel
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
pytestmark = pytest.mark.torch

CHANGES = {"max_position_embeddings": 256, "vocab_size": 96}
ARCHITECTURES = {
    "qwen2.5": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),  # its rows go beyond the original context of 16
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_answers_equal_transformers(name, tmp_path):
    """Ragged prompts in one batch against each row alone there, two rounds with the cache kept, several stop ids."""
    architecture, changes = ARCHITECTURES[name]
    theirs = build(architecture, CHANGES | changes, seed=11)
    store(theirs, tmp_path)

    def generate(prompt, stop):
        ids = torch.tensor([prompt])
        asked = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": stop, "pad_token_id": 0}
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        return tuple(out[0, len(prompt) :].tolist())

    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 96, length).tolist() for length in (12, 3, 7)]
    # Ids that do occur, so that some answers stop early and others do not.
    stop = sorted({generate(prompts[0], [1])[5], generate(prompts[1], [1])[11]})
    mesh = parallel.make_mesh()
    config, _, params = small_models.load(tmp_path, mesh=mesh)
    engine = Engine(config, params, stop, mesh)
    finishes = set()
    for number in (1, 2):
        streams = [(0, 0, row, 0, number) for row in range(3)]
        answers = engine.generate(prompts, Sampling(temperature=0.0, max_new_tokens=20), streams)
        assert [answer.tokens for answer in answers] == [generate(prompt, stop) for prompt in prompts]
        finishes |= {answer.finish for answer in answers}
        prompts = [p + list(a.tokens) + rng.integers(2, 96, 5).tolist() for p, a in zip(prompts, answers, strict=True)]
    assert "stop" in finishes
