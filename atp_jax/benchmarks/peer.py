"""Peers that the benchmarks are measured against, each in a process of its own: two programs in one process would share
its threads. Those in torch need the extra `torch`.

Both sides speak in lines of JSON. The benchmark first says what there is to work on, which the peer answers with its
versions; then it asks for one piece of work after another, each answered with {"seconds": 1.5}. {"error": "..."} in
place of an answer is the last one.

`python -m atp_jax.benchmarks.peer` is such a peer, transformers `generate`. It is given {"model", "dtype", "random",
"device"}; asked {"prompts": [[id, ...], ...], "new": 64, "each": false} it answers the prompts with exactly `new`
sampled tokens each, as one batch padded on the left (or, with `each`, one call a prompt).
"""

import contextlib
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from atp_jax.errors import UserError

TORCH = "the extra `torch`"


class Peer:
    """A peer's process as a benchmark holds it: `with Peer(module, **given) as peer: peer.seconds(**asked)`.

    python: what runs it, where that is another than this one; of this package it needs only the peer's modules.
    """

    def __init__(self, module: str, python: str = "", **given):
        command = [sys.executable, "-m", module]
        if python:  # which has packages of its own, so ours come last
            ours = str(Path(__file__).parents[2])
            code = f"import runpy, sys; sys.path.append({ours!r}); runpy.run_module({module!r}, run_name='__main__')"
            command = [python, "-c", code]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise UserError(f"{command[0]} cannot be run: {error.strerror}") from None
        try:
            self.about = self._ask(given)
        except UserError:
            self._end()
            raise

    def seconds(self, **asked) -> float:
        """How long it takes for a piece of work."""
        return self._ask(asked)["seconds"]

    def _ask(self, said: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is nothing to read either
            self._process.stdin.write(json.dumps(said) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the peer ended; its own words stand above"}
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()


def check_tunix(against: str, python: str, dtype: str, random: bool) -> None:
    """UserError where google-tunix has no Python to run it, or is asked for what it would not do as we do."""
    if (against == "tunix") != bool(python):
        raise UserError("--against=tunix and --peer_python, the Python of an environment that has it, go together")
    if python and (random or dtype != "float32"):
        raise UserError("--against=tunix compares a stored model in float32: leave --random and --dtype out")


class Benchmark:
    """The benchmark as a peer's process holds it. What libraries print is no answer and goes to stderr."""

    def __init__(self):
        self._answers, sys.stdout = sys.stdout, sys.stderr

    def hear(self) -> dict:
        """What it asks next. Ends the process where nothing comes any more."""
        return json.loads(sys.stdin.readline() or sys.exit())

    def say(self, **answer) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def run(work: Callable[[Benchmark], None], needs: str) -> None:
    """The main program of a peer. needs: what has the packages that it imports."""
    benchmark = Benchmark()
    try:
        work(benchmark)
    except ImportError as error:
        benchmark.say(error=f"--against: {error}; it needs {needs}")
    except UserError as error:
        benchmark.say(error=str(error))


def load(given: dict, dtype: str):
    """The model of transformers that is `given`, on its device."""
    import torch
    import transformers

    if given["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("--against: torch sees no GPU; it needs a build of torch for this one's driver")
    auto, dtype = transformers.AutoModelForCausalLM, getattr(torch, dtype)
    if not given["random"]:
        return auto.from_pretrained(given["model"], dtype=dtype).to(given["device"])
    with torch.device(given["device"]):
        return auto.from_config(transformers.AutoConfig.from_pretrained(given["model"]), dtype=dtype)


def about(model, *packages: str) -> dict:
    """A peer's versions, and where it computes."""
    import torch

    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "transformers", *packages)}
    return versions | {"threads": torch.get_num_threads(), "device": str(model.device), "dtype": str(model.dtype)}


def spelled_ids(vocabulary: int, eos: int):
    """A tokenizer for peers that take prompts as text: a text is its ids, "17 4 1093", and becomes the same ids. So
    the prompts have exactly the tokens that ours have, whatever the model's tokenizer would make of their text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The end token has no number, for it would be found within other numbers.
    words = Tokenizer(models.WordLevel({"<eos>" if i == eos else str(i): i for i in range(vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def clock(device: str) -> float:
    """Now, once the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def generate(benchmark: Benchmark) -> None:
    """The work of transformers."""
    import torch

    given = benchmark.hear()
    model, device = load(given, given["dtype"]).eval(), given["device"]
    benchmark.say(**about(model))

    def answer(prompts: list[list[int]], new: int) -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        drawn = model.generate(
            ids, attention_mask=real, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=new,
            min_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        assert drawn.shape == (len(prompts), width + new), drawn.shape

    while True:
        asked = benchmark.hear()
        prompts = asked["prompts"]
        began = clock(device)
        for batch in [[prompt] for prompt in prompts] if asked["each"] else [prompts]:
            answer(batch, asked["new"])
        benchmark.say(seconds=clock(device) - began)


if __name__ == "__main__":
    run(generate, TORCH)
