"""The peer that the engine is measured against: transformers `generate`, in a process of its own (the `torch` extra).

    python -m atp_jax.benchmarks.peer DIR

Reads one JSON object a line, {"prompts": [[id, ...], ...], "new": 64, "each": false}, answers the prompts with exactly
`new` sampled tokens each, as one batch padded on the left (or, with `each`, one call a prompt), and writes one object
{"seconds": 1.5} a line. Before the first it writes its versions. Two programs in one process would share its threads.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence

from atp_jax.errors import UserError


class Peer:
    """That process, as the benchmarks hold it: `with Peer(directory) as peer: peer.seconds(prompts, 64)`."""

    def __init__(self, directory: str):
        command = [sys.executable, "-m", "atp_jax.benchmarks.peer", directory]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def seconds(self, prompts: Sequence[Sequence[int]], new: int, each: bool = False) -> float:
        """How long it takes for `new` tokens a prompt."""
        self._process.stdin.write(json.dumps({"prompts": [list(p) for p in prompts], "new": new, "each": each}) + "\n")
        self._process.stdin.flush()
        return self._read()["seconds"]

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise UserError("the peer ended: --against=transformers needs the extra `torch`; its own words stand above")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait()


def main(directory: str) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions | {"threads": torch.get_num_threads()}), flush=True)

    def answer(prompts: list[list[int]], new: int) -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        drawn = model.generate(
            ids, attention_mask=real, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=new,
            min_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        assert drawn.shape == (len(prompts), width + new), drawn.shape

    for line in sys.stdin:
        asked = json.loads(line)
        prompts = asked["prompts"]
        began = time.perf_counter()
        for batch in [[prompt] for prompt in prompts] if asked["each"] else [prompts]:
            answer(batch, asked["new"])
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
