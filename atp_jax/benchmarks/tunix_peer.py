"""The peer of `atp_jax.benchmarks.generate` and `atp_jax.benchmarks.grpo` in google-tunix, as a process that peer.py
describes. Its Python is named by --peer_python, for google-tunix wants other versions than we do.

It is given what transformers (peer.py) or TRL (trl_grpo.py) is given, and does the same work: on one device, with
prompts that are as wide as the longest and a cache that just holds them and their answers, in tunix's own sampler.
"""

import itertools
import json
import time
from pathlib import Path

import numpy as np

from atp_jax.benchmarks import peer
from atp_jax.errors import UserError

NEVER = [-1]  # in place of end tokens, which would stop an answer


def load(given: dict, dtype: str):
    """The model that is `given` and the mesh it lies on. UserError where it is no Qwen3: tunix's Llama 3 scales no
    rotary frequencies."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.qwen3.model import ModelConfig, Qwen3
    from tunix.models.qwen3.params import create_model_from_safe_tensors

    described = json.loads((Path(given["model"]) / "config.json").read_text())
    if described["model_type"] != "qwen3":
        raise UserError(f"--against=tunix compares models of the type qwen3, not {described['model_type']}")
    config = ModelConfig(
        num_layers=described["num_hidden_layers"], vocab_size=described["vocab_size"],
        embed_dim=described["hidden_size"], hidden_dim=described["intermediate_size"],
        num_heads=described["num_attention_heads"], num_kv_heads=described["num_key_value_heads"],
        head_dim=described["head_dim"], norm_eps=described["rms_norm_eps"],
        rope_theta=described.get("rope_theta") or described["rope_parameters"]["rope_theta"],
        use_tied_embedding=described["tie_word_embeddings"], dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype),
    )  # fmt: skip
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    if not given["random"]:
        return create_model_from_safe_tensors(given["model"], config, mesh, dtype=config.dtype), mesh
    with mesh:
        return nnx.jit(lambda: Qwen3(config, rngs=nnx.Rngs(0)))(), mesh


def about(model) -> dict:
    """Versions, and where it computes."""
    import importlib.metadata

    import jax

    versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}
    return versions | {"device": jax.devices()[0].device_kind, "dtype": str(np.dtype(model.config.dtype))}


def generate(benchmark: peer.Benchmark, given: dict) -> None:
    """As one batch, in tunix's sampler."""
    from tunix.generate.sampler import CacheConfig, Sampler

    model, mesh = load(given, given["dtype"])
    config, samplers = model.config, {}
    tokenizer = peer.spelled_ids(config.vocab_size, 0)
    benchmark.say(**about(model))
    with mesh:
        for seed in itertools.count():
            asked = benchmark.hear()
            prompts, new = asked["prompts"], asked["new"]
            width = max(map(len, prompts))
            if width + new not in samplers:
                cache = CacheConfig(width + new, config.num_layers, config.num_kv_heads, config.head_dim)
                samplers[width + new] = Sampler(model, tokenizer, cache)
            texts = tokenizer.batch_decode(prompts)
            began = time.perf_counter()  # what is drawn comes back as NumPy's arrays: there is nothing to wait for
            drawn = samplers[width + new](
                texts, new, max_prompt_length=width, temperature=1.0, top_p=1.0, seed=seed, eos_tokens=NEVER
            )
            took = time.perf_counter() - began
            assert [len(tokens) for tokens in drawn.tokens] == [new] * len(prompts)
            benchmark.say(seconds=took)


def train(benchmark: peer.Benchmark, given: dict) -> None:
    """tunix's own training, a step whenever the benchmark asks for one.

    The same group, tokens a completion, KL weight, loss, optimiser and clipping, and what is trained: all weights, in
    float32, or an adapter of the same rank and targets beside weights in the dtype.
    """
    import jax
    import optax
    import qwix
    from flax import nnx
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    asked, rank, new = given["asked"], given["rank"], given["new"]
    reference, mesh = load(given, given["dtype"] if rank else "float32")
    if rank:
        everywhere = qwix.LoraProvider(module_path=".*(q|k|v|o|gate|up|down)_proj", rank=rank, alpha=2 * rank)
        with mesh:
            actor = qwix.apply_lora_to_model(reference, everywhere, **reference.get_model_input())
    else:
        actor = nnx.clone(reference)
    tokenizer = peer.spelled_ids(reference.config.vocab_size, 0)
    width = max(len(prompt) for step in asked for prompt in step)

    def steps():
        for prompts in asked:
            benchmark.hear()
            began = time.perf_counter()
            yield {"prompts": np.array(tokenizer.batch_decode(prompts))}
            jax.block_until_ready(nnx.state(actor))
            benchmark.say(seconds=time.perf_counter() - began)

    def reward(prompts, completions, **_):
        drawn = [[int(word) for word in text.replace("<eos>", "0").split()] for text in completions]
        assert all(len(ids) == new for ids in drawn)
        return [float(np.mean(np.array(ids) % 2)) for ids in drawn]

    adamw = optax.adamw(optax.linear_schedule(given["learning_rate"], 0.0, len(asked)), weight_decay=0.0)
    cluster = RLCluster(
        actor=actor, reference=reference, tokenizer=tokenizer,
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
            training_config=RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), adamw), max_steps=len(asked) + 1,
                eval_every_n_steps=len(asked) + 1,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=new, max_prompt_length=width, kv_cache_size=width + new, temperature=1.0,
                eos_tokens=NEVER,
            ),
        ),
    )  # fmt: skip
    learner = GRPOLearner(
        cluster, GRPOConfig(num_generations=given["group"], beta=given["kl"], loss_agg_mode="token-mean"), reward
    )
    benchmark.say(**about(reference))
    learner.train(steps())


def work(benchmark: peer.Benchmark) -> None:
    given = benchmark.hear()
    (train if "asked" in given else generate)(benchmark, given)


if __name__ == "__main__":
    peer.run(work, "--peer_python, a Python that has google-tunix")
