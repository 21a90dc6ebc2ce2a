"""The peer of `atp_jax.benchmarks.grpo`: the same step in TRL, as a process that peer.py describes.

It is given {"model", "dtype", "random", "device", "asked", "group", "new", "rank", "kl", "temperature",
"learning_rate"}; "asked" are token ids of the prompts of each step. The trainer runs its own loop and waits before each
step until it is asked for it.

The same prompts, group, tokens a completion, KL weight, optimiser, and what is trained: all weights, or an adapter of
the same rank and targets. What is trained is float32, computed in the dtype. On a CPU activations are not
checkpointed (TRL is faster without), on a GPU they are, as ours.
"""

import tempfile

import numpy as np

from atp_jax.benchmarks import peer


def train(benchmark: peer.Benchmark) -> None:
    """TRL's training, a step whenever the benchmark asks for one."""
    import datasets
    import peft
    import transformers
    import trl

    given = benchmark.hear()
    on_gpu, rank, prompts = given["device"] == "cuda", given["rank"], given["asked"]
    model = peer.load(given, given["dtype"] if rank else "float32")
    stop = np.ravel(model.generation_config.eos_token_id or 0)
    tokenizer = peer.spelled_ids(model.config.vocab_size, int(stop[0]))
    flat = [prompt for step in prompts for prompt in step]
    texts = tokenizer.batch_decode(flat)
    assert tokenizer(text=texts)["input_ids"] == flat

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            benchmark.hear()
            self.began = peer.clock(given["device"])

        def on_step_end(self, *_, **__):
            benchmark.say(seconds=peer.clock(given["device"]) - self.began)

    def reward(completion_ids, **_):
        assert all(len(ids) == given["new"] for ids in completion_ids)
        return [float(np.mean(np.array(ids) % 2)) for ids in completion_ids]

    rows = len(prompts[0]) * given["group"]
    adapter = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear") if rank else None
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl.GRPOConfig(
            output_dir=scratch, per_device_train_batch_size=rows, num_generations=given["group"],
            max_completion_length=given["new"], generation_kwargs={"min_new_tokens": given["new"]},
            max_steps=len(prompts), beta=given["kl"], learning_rate=given["learning_rate"], loss_type="dapo",
            temperature=given["temperature"], use_cpu=not on_gpu, bf16=given["dtype"] == "bfloat16",
            gradient_checkpointing=on_gpu, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            shuffle_dataset=False,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=model, reward_funcs=reward, args=arguments, processing_class=tokenizer, callbacks=[Turns()],
            peft_config=adapter, train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]),
        )  # fmt: skip
        benchmark.say(**peer.about(model, "trl", "peft"))
        trainer.train()


if __name__ == "__main__":
    peer.run(train, peer.TORCH)
