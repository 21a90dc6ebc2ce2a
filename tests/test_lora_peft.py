"""Adapters against PEFT itself: it wears what was saved here, and what it saves is worn here, with the same logits."""

import jax
import numpy as np
import pytest
import small_models
from small_engines import ONE
from test_lora import drawn, logits

from atp_jax.models import peft as ours

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
peft = pytest.importorskip("peft", reason="the extra `torch` is not installed")

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 9))


@pytest.fixture(params=["qwen2", "qwen3", "llama31"])
def both(request):
    from transformers import AutoModelForCausalLM

    directory = small_models.FIXTURES / request.param
    return small_models.load(directory, mesh=ONE), AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def theirs(model) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def test_peft_wears_what_was_saved_here(both, tmp_path):
    (config, graphdef, params), model = both
    lora = drawn(config, 5)
    ours.save(tmp_path / "adapter", config, lora, "base")
    worn = theirs(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"))
    found = logits(graphdef, params, TOKENS.astype(np.int32), lora)
    np.testing.assert_allclose(found[0], worn[0], atol=1e-4)
    np.testing.assert_allclose(found[1, :4], worn[1, :4], atol=1e-4)  # row 1 is 4 tokens long in test_lora


def test_what_peft_saves_is_worn_here(both, tmp_path):
    (config, graphdef, params), model = both
    asked = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    model = peft.get_peft_model(model, asked)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    lora = ours.load(tmp_path / "adapter", config, ONE)
    assert set(lora.a) == {"query", "value", "output", "down"}
    np.testing.assert_allclose(
        jax.device_get(logits(graphdef, params, TOKENS.astype(np.int32), lora))[0], theirs(model)[0], atol=1e-4
    )
