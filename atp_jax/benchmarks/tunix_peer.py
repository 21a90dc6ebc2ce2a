"""The peer of `atp_jax.benchmarks.generate` and `atp_jax.benchmarks.grpo` in google-tunix, as a process that peer.py
describes. Its Python is named by --peer_python, for google-tunix wants other versions than we do.

It is given {"task": "generate", "model"} and asked as transformers is (peer.py), or {"task": "train", "model"} and what
TRL is given (trl_grpo.py). The same work in float32, on one device, in tunix's own sampler: prompts as wide as the
longest, a cache that just holds them and their answers, no end token. Text becomes ids and ids text within its time.
tunix 0.1.7 takes 1e6 for the rotary base whatever the model says, and does not train on drawn tokens that are its
padding, here id 0.
"""

import itertools
import json
import time
from pathlib import Path

from atp_jax.benchmarks import peer
from atp_jax.errors import UserError

NEVER = [-1]  # in place of end tokens, which would stop an answer


def load(directory: str):
    """The stored model and the mesh it lies on. UserError where it is no Qwen3: for others tunix has other code."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tunix.models.qwen3.model import ModelConfig
    from tunix.models.qwen3.params import create_model_from_safe_tensors

    path = Path(directory) / "config.json"
    described = json.loads(path.read_text()) if path.is_file() else {}
    if described.get("model_type") != "qwen3":
        raise UserError(f"--against=tunix compares models of the type qwen3 in a directory, which {directory} is not")
    config = ModelConfig(
        num_layers=described["num_hidden_layers"], vocab_size=described["vocab_size"],
        embed_dim=described["hidden_size"], hidden_dim=described["intermediate_size"],
        num_heads=described["num_attention_heads"], num_kv_heads=described["num_key_value_heads"],
        head_dim=described["head_dim"], norm_eps=described["rms_norm_eps"], rope_theta=1_000_000,
        use_tied_embedding=described["tie_word_embeddings"], dtype=jnp.float32, param_dtype=jnp.float32,
    )  # fmt: skip
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    return create_model_from_safe_tensors(directory, config, mesh, dtype=jnp.float32), mesh


def spelled(tokenizer, prompts: list[list[int]]) -> list[str]:
    """The prompts as text, which becomes the same ids again."""
    texts = tokenizer.batch_decode(prompts)
    assert [tokenizer.encode(text) for text in texts] == prompts
    return texts


def about() -> dict:
    """Versions, and where it computes."""
    import importlib.metadata

    import jax

    versions = {name: importlib.metadata.version(name) for name in ("google-tunix", "jax", "flax")}
    return versions | {"device": jax.devices()[0].device_kind, "devices": 1, "dtype": "float32"}


def generate(benchmark: peer.Benchmark, given: dict) -> None:
    """As one batch."""
    from tunix.generate.sampler import CacheConfig, Sampler

    model, mesh = load(given["model"])
    config, samplers = model.config, {}
    tokenizer = peer.spelled_ids(config.vocab_size, 0)
    benchmark.say(**about())
    with mesh:
        for seed in itertools.count():
            asked = benchmark.hear()
            prompts, new = asked["prompts"], asked["new"]
            width = max(map(len, prompts))
            if width + new not in samplers:
                cache = CacheConfig(width + new, config.num_layers, config.num_kv_heads, config.head_dim)
                samplers[width + new] = Sampler(model, tokenizer, cache)
            texts = spelled(tokenizer, prompts)
            began = time.perf_counter()  # what is drawn comes back as NumPy's arrays: there is nothing to wait for
            drawn = samplers[width + new](
                texts, new, max_prompt_length=width, temperature=1.0, top_p=1.0, seed=seed, eos_tokens=NEVER
            )
            took = time.perf_counter() - began
            assert [len(tokens) for tokens in drawn.tokens] == [new] * len(prompts)
            benchmark.say(seconds=took)


def train(benchmark: peer.Benchmark, given: dict) -> None:
    """tunix's own training, a step whenever the benchmark asks for one.

    The same group, tokens a completion, KL weight and estimator, loss, optimiser and clipping, and what is trained: all
    weights, or an adapter of the same rank and targets.
    """
    import jax
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    asked, rank, new = given["asked"], given["rank"], given["new"]
    reference, mesh = load(given["model"])
    if rank:
        everywhere = qwix.LoraProvider(module_path=".*(q|k|v|o|gate|up|down)_proj", rank=rank, alpha=2 * rank)
        with mesh:
            actor = qwix.apply_lora_to_model(reference, everywhere, **reference.get_model_input())
    else:
        actor = nnx.clone(reference)
    tokenizer = peer.spelled_ids(reference.config.vocab_size, 0)
    texts = [spelled(tokenizer, prompts) for prompts in asked]
    width = max(len(prompt) for step in asked for prompt in step)

    def steps():
        for prompts in texts:
            benchmark.hear()
            began = time.perf_counter()
            yield {"prompts": np.array(prompts)}
            jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
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
                max_tokens_to_generate=new, max_prompt_length=width, kv_cache_size=width + new,
                temperature=given["temperature"], eos_tokens=NEVER,
            ),
        ),
    )  # fmt: skip
    settings = GRPOConfig(
        num_generations=given["group"], beta=given["kl"], kl_loss_mode="low_var_kl", loss_agg_mode="token-mean"
    )
    learner = GRPOLearner(cluster, settings, reward)
    benchmark.say(**about())
    learner.train(steps())


def work(benchmark: peer.Benchmark) -> None:
    """Either task."""
    given = benchmark.hear()
    {"generate": generate, "train": train}[given["task"]](benchmark, given)


if __name__ == "__main__":
    peer.run(work, "--peer_python, a Python that has google-tunix")
