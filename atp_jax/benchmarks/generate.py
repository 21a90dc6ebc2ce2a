r"""Seconds of answering a batch of prompts of one length, beside transformers `generate` or tunix if wanted.

    python -m atp_jax.benchmarks.generate --make-test-model DIR
    python -m atp_jax.benchmarks.generate --model DIR [--random] --prompt 256 --new 64 --batch 1,16,64 \
        [--against transformers|tunix]

Random prompts; exactly `new` sampled tokens an answer. Prints one JSON object a batch size: seconds (median after the
first, which compiles), prefill_s and decode_s of it, tokens_per_s (new tokens), compile_s, and the machine. With
--against the peer answers the same prompts in alternation, in a process of its own: peer_s and ratio = peer_s /
seconds. On an accelerator `roofline` is the share of decoding that reading the weights and the filled cache would take
at the bandwidth `bandwidth_gb_s` that copying a gigabyte reaches, `prefill_mfu` the share of prefill that its
multiplications and additions (work.py) would take at the rate `product_tflops` of a large product in this dtype;
`peak_gb` is the most memory in use so far on the first device.

--random takes of DIR only config.json, and random weights of that shape. --peer_python names the Python of an
environment with google-tunix, which wants other versions than we do.

--make-test-model writes a random Qwen3 of 7.3 million parameters and does nothing else: vocabulary 4096, hidden 256,
feed-forward 768, 8 layers, 8 heads, 4 key-value heads of 32, tied. Its tokenizer is the organism's with unused tokens.
"""

if __name__ == "__main__":  # first of all: it starts the program again
    from atp_jax.memory import keep_memory

    keep_memory(__spec__)

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from transformers import PreTrainedTokenizerFast

from atp_jax.benchmarks.machine import Rates, machine, rates, torch_device
from atp_jax.benchmarks.peer import Peer, check_tunix
from atp_jax.benchmarks.random_model import random_model
from atp_jax.benchmarks.work import check_whole, must_read, prefill_flops
from atp_jax.errors import UserError
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.model import ORGANISM, Model, load_model
from atp_jax.models import huggingface
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import Decoder

TEST_MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "initializer_range": 0.02, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def make_test_model(directory: Path) -> None:
    """Writes the model that the benchmarks of small machines are about."""
    if directory.exists():
        raise UserError(f"{directory}: exists already; models are not overwritten")
    config = DecoderConfig.from_dict(TEST_MODEL, "the test model")
    huggingface.save(directory, config, nnx.state(Decoder(config, rngs=nnx.Rngs(0))))
    described = json.loads((ORGANISM / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary |= {f"<unused{index}>": index for index in range(len(vocabulary), config.vocab_size)}
    made = PreTrainedTokenizerFast.from_pretrained(ORGANISM)
    made.backend_tokenizer.model = type(made.backend_tokenizer.model)(
        vocabulary, [tuple(pair) for pair in described["model"]["merges"]]
    )
    made.save_pretrained(directory)


def transformers_peer(model: str, dtype: str, random: bool = False) -> Peer:
    """The peer that answers the same prompts."""
    given = {"model": model, "dtype": dtype, "random": random, "device": torch_device(dtype)}
    return Peer("atp_jax.benchmarks.peer", **given)


def measure(
    model: Model, rows: int, prompt: int, new: int, repeats: int, peer: Peer | None = None, reached: Rates | None = None
) -> dict:
    """The JSON object of one batch size. reached: what a device does at its best, if shares of it are asked for."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, model.config.vocab_size, (rows, prompt)).tolist()
    engine, sampling = Engine(model.config, model.params, (), model.mesh, model.lora), Sampling(max_new_tokens=new)
    spent, phases, theirs = [], [], []
    for repeat in range(repeats + 1):
        engine.forget()
        engine.spent.clear()
        began = time.perf_counter()
        drawn = engine.generate(prompts, sampling, [(repeat, 0, row, 0, 1) for row in range(rows)])
        spent.append(time.perf_counter() - began)
        check_whole(drawn, new)
        phases.append([engine.spent["prefill"], engine.spent["decode"]])
        if peer:
            theirs.append(peer.seconds(prompts=prompts, new=new, each=False))
    seconds = float(np.median(spent[1:]))
    prefill, decode = (float(value) for value in np.median(phases[1:], axis=0))
    result = {
        "batch": rows, "seconds": round(seconds, 4), "prefill_s": round(prefill, 4), "decode_s": round(decode, 4),
        "tokens_per_s": round(rows * new / seconds, 1), "compile_s": round(spent[0] - seconds, 2),
    }  # fmt: skip
    if peer:
        seconds = float(np.median(theirs[1:]))
        result |= {"peer_s": round(seconds, 4), "ratio": round(seconds / result["seconds"], 2), "peer": peer.about}
    if reached:
        read, flops = must_read(model, rows, prompt, new), prefill_flops(model.config, rows, prompt)
        result |= {
            "bandwidth_gb_s": round(reached.bandwidth / 1e9),
            "roofline": round(read / reached.bandwidth / jax.device_count() / decode, 3),
            "product_tflops": round(reached.flops / 1e12, 1),
            "prefill_mfu": round(flops / reached.flops / jax.device_count() / prefill, 3),
        }  # fmt: skip
    return result | {"prompt": prompt, "new": new, "repeats": repeats, "dtype": model.dtype} | machine()


def batch_sizes(given: Sequence[str]) -> list[int]:
    """UserError where one of them is no positive integer."""
    if wrong := [size for size in given if not size.isdecimal() or int(size) == 0]:
        raise UserError(f"--batch takes positive integers with commas between them, not {wrong[0]!r}")
    return [int(size) for size in given]


def main(argv):
    del argv
    v = flags.FLAGS
    try:
        if v["make-test-model"].value:
            make_test_model(Path(v["make-test-model"].value))
            return
        check_tunix(v.against, v.peer_python, v.dtype, v.random)
        batches, reached = batch_sizes(v.batch), rates(v.dtype)
        path = v.model or str(ORGANISM)
        model = random_model(path, v.dtype) if v.random else load_model(path, v.dtype)
        theirs = contextlib.nullcontext()
        if v.against == "tunix":
            theirs = Peer("atp_jax.benchmarks.tunix_peer", v.peer_python, task="generate", model=path)
        elif v.against:
            theirs = transformers_peer(path, v.dtype, v.random)
        with theirs as peer:
            for rows in batches:
                print(json.dumps(measure(model, rows, v.prompt, v.new, v.repeats, peer, reached)), flush=True)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.DEFINE_string("make-test-model", "", "write the test model to this directory and do nothing else")
    flags.DEFINE_string("model", "", "Hugging Face directory; empty: the embedded organism")
    flags.DEFINE_boolean("random", False, "random weights of the shape in its config.json")
    flags.DEFINE_integer("prompt", 256, "tokens of a prompt", lower_bound=1)
    flags.DEFINE_integer("new", 64, "tokens of an answer", lower_bound=1)
    flags.DEFINE_list("batch", "1,16,64", "prompts answered together")
    flags.DEFINE_integer("repeats", 5, "repetitions after compilation", lower_bound=1)
    flags.DEFINE_string("dtype", "float32", "of the model")
    flags.DEFINE_enum("against", "", ["", "transformers", "tunix"], "what answers the same prompts in alternation")
    flags.DEFINE_string("peer_python", "", "Python that has google-tunix, for --against=tunix")
    app.run(main)
