"""A language model as the rest of the project sees it: load it, ask it, score with it, save it."""

import dataclasses
import functools
import json
import logging
import os
import shutil
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from atp_jax import processes
from atp_jax.chat import Chat
from atp_jax.errors import UserError
from atp_jax.generate.engine import Engine
from atp_jax.generate.sampling import Sampling
from atp_jax.models import huggingface, peft
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import abstract
from atp_jax.models.lora import Lora, merge
from atp_jax.parallel import make_mesh

ORGANISM = Path(__file__).resolve().parent / "models" / "organism"
DTYPES = ("float32", "bfloat16")
GENERATION = "generation_config.json"
# One of these stands in every directory that holds a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer: token ids (the stop token, if any, is the last), the text without special tokens, the log-probability
    each token was drawn with, and why it ended: "stop" or "length"."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish: str


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder with its parameters on a mesh, its tokenizer, and how it wants to be sampled.

    params: the nnx state of `Decoder(config)`. generation: the content of generation_config.json, empty without one.
    lora: the adapter it wears in all that it computes, None without one.
    """

    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    params: nnx.State
    mesh: Mesh
    generation: Mapping = dataclasses.field(default_factory=lambda: types.MappingProxyType({}))
    lora: Lora | None = None

    @property
    def dtype(self) -> str:
        """Of the parameters, "float32" or "bfloat16"."""
        return str(jax.tree.leaves(self.params)[0].dtype)

    @property
    def stop(self) -> tuple[int, ...]:
        """Ids that end an answer: of generation_config.json, else of config.json, else the tokenizer's."""
        own = self.generation.get("eos_token_id")
        if own is None:
            own = self.config.eos_token_id or self.tokenizer.eos_token_id
        ids = () if own is None else tuple(own) if isinstance(own, (list, tuple)) else (own,)
        for index in ids:
            if isinstance(index, bool) or not isinstance(index, int):
                raise UserError(f"{self.tokenizer.name_or_path}: eos_token_id must hold token ids, found {index!r}")
        return ids

    def logits(self, tokens, lengths) -> jax.Array:
        """Next-token logits at every position: int32 [B, T] padded on the right, int32 [B] -> float32 [B, T, V].

        What stands beyond a row's length means nothing. UserError for an id that the model does not have.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths)
        if tokens.ndim != 2 or lengths.shape != tokens.shape[:1]:
            raise UserError(f"logits needs tokens [B, T] and lengths [B], found {tokens.shape} and {lengths.shape}")
        real = tokens[np.arange(tokens.shape[1]) < lengths[:, None]]
        if wrong := real[(real < 0) | (real >= self.config.vocab_size)].tolist():
            raise UserError(f"token id {wrong[0]}: the model only has 0 to {self.config.vocab_size - 1}")
        graphdef, _ = abstract(self.config)
        tokens, lengths = jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)
        return _logits(self.params, self.lora, tokens, lengths, graphdef=graphdef)

    def engine(self) -> Engine:
        """What answers batches of prompts with this model, and remembers them from one batch to the next."""
        return Engine(self.config, self.params, self.stop, self.mesh, self.lora)

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Sequence[Mapping]],
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> list[Completion]:
        """Answers prompts, each a list of token ids or a conversation of {"role", "content"} messages.

        sampling: one for all, or one a prompt. The same seed gives prompt i of the list the same answer, whatever the
        others are. UserError for an empty prompt, one longer than the context, or messages without a chat template.
        """
        ids = [self._ids(prompt) for prompt in prompts]
        streams = [(seed, 0, row, 0, 1) for row in range(len(ids))]
        return [
            Completion(sampled.tokens, self.decode(sampled.tokens), sampled.logprobs, sampled.finish)
            for sampled in self.engine().generate(ids, sampling, streams)
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a directory that transformers reads: weights (an adapter's summed into them), configs and tokenizer.

        It appears as a whole or not at all; of several processes, all call this and process 0 writes. UserError if
        something is there already or it cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            if processes.leads() and path.exists() and not (path.is_dir() and not any(path.iterdir())):
                raise UserError(f"{path}: exists already; models are not overwritten")
            params = self.params if self.lora is None else merge(self.params, self.lora)
            huggingface.save(temporary, self.config, params)
            if not processes.leads():
                return
            self.tokenizer.save_pretrained(temporary)
            generation = {**self.generation, "eos_token_id": list(self.stop) or None}
            (temporary / GENERATION).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"{path}: the model cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _ids(self, prompt) -> list[int]:
        if prompt and isinstance(prompt[0], Mapping):
            return self._chat.encode(prompt)
        return [int(token) for token in prompt]

    @functools.cached_property
    def _chat(self) -> Chat:
        return Chat(self.tokenizer)


def load_model(
    path_or_hub_id: str | os.PathLike = "",
    dtype: str = "float32",
    mesh: Mesh | None = None,
    adapter: str | os.PathLike = "",
) -> Model:
    """A model from a Hugging Face directory or hub id; empty is the embedded organism.

    dtype: of the parameters and of most arithmetic, "float32" or "bfloat16". mesh: where it lives, all devices along
    `data` if None. adapter: a PEFT directory that it wears, empty for none. Only safetensors are read, and no code of
    the directory is run. UserError says in one line what is missing or wrong.
    """
    check_dtype(dtype)
    directory = huggingface.resolve(path_or_hub_id or ORGANISM)
    config = huggingface.load_config(directory)
    tokenizer = _load_tokenizer(directory)
    generation = huggingface.read_json(directory / GENERATION) if (directory / GENERATION).exists() else {}
    mesh = make_mesh() if mesh is None else mesh
    params = huggingface.load_params(directory, config, jnp.dtype(dtype), mesh)
    worn = peft.load(Path(adapter).expanduser(), config, mesh) if adapter else None
    model = Model(config, tokenizer, params, mesh, types.MappingProxyType(generation), worn)
    if not model.stop:
        logging.getLogger(__name__).warning("%s: no eos_token_id anywhere: answers end only by length", directory)
    return model


def check_dtype(dtype: str) -> None:
    """UserError for what no model is computed in."""
    if dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(params, lora, tokens, lengths, *, graphdef):
    decoder = nnx.merge(graphdef, params)
    return decoder.head(decoder.hidden(tokens, lengths, lora=lora))


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{directory}: no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a malformed file
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {reason}") from error
