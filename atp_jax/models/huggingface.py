"""Hugging Face model directories, in and out: `config.json` and safetensors, single or sharded by an index.

Nothing here is ever unpickled and no code of a model is run. Tokenizers and `generation_config.json` are not ours.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from atp_jax import processes
from atp_jax.errors import UserError
from atp_jax.files import replacing
from atp_jax.models.config import DecoderConfig
from atp_jax.models.decoder import abstract
from atp_jax.parallel import fetch, param_shardings

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Path in the Decoder -> name in a checkpoint ({} is the layer), and for each dimension of the tensor there which axes
# of our array (without the layer axis) it is made of: torch keeps a projection as [out, in], heads and their size in
# one dimension. Only the first axis of a dimension may be split over devices (parallel.RULES keeps to that).
MATRIX, TRANSPOSED, VECTOR = ((0,), (1,)), ((1,), (0,)), ((0,),)
INTO_HEADS, OUT_OF_HEADS, HEADS = ((1, 2), (0,)), ((2,), (0, 1)), ((0, 1),)
LAYER, ATTENTION, MLP = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp."
TENSORS = {
    ("embedding",): ("model.embed_tokens.weight", MATRIX),
    ("norm",): ("model.norm.weight", VECTOR),
    ("lm_head",): ("lm_head.weight", MATRIX),
    ("layers", "input_norm"): (LAYER + "input_layernorm.weight", VECTOR),
    ("layers", "query"): (ATTENTION + "q_proj.weight", INTO_HEADS),
    ("layers", "key"): (ATTENTION + "k_proj.weight", INTO_HEADS),
    ("layers", "value"): (ATTENTION + "v_proj.weight", INTO_HEADS),
    ("layers", "output"): (ATTENTION + "o_proj.weight", OUT_OF_HEADS),
    ("layers", "query_bias"): (ATTENTION + "q_proj.bias", HEADS),
    ("layers", "key_bias"): (ATTENTION + "k_proj.bias", HEADS),
    ("layers", "value_bias"): (ATTENTION + "v_proj.bias", HEADS),
    ("layers", "output_bias"): (ATTENTION + "o_proj.bias", VECTOR),
    ("layers", "query_norm"): (ATTENTION + "q_norm.weight", VECTOR),
    ("layers", "key_norm"): (ATTENTION + "k_norm.weight", VECTOR),
    ("layers", "mlp_norm"): (LAYER + "post_attention_layernorm.weight", VECTOR),
    ("layers", "gate"): (MLP + "gate_proj.weight", TRANSPOSED),
    ("layers", "up"): (MLP + "up_proj.weight", TRANSPOSED),
    ("layers", "down"): (MLP + "down_proj.weight", TRANSPOSED),
    ("layers", "gate_bias"): (MLP + "gate_proj.bias", VECTOR),
    ("layers", "up_bias"): (MLP + "up_proj.bias", VECTOR),
    ("layers", "down_bias"): (MLP + "down_proj.bias", VECTOR),
}


FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model")


def resolve(path_or_hub_id: str | os.PathLike, fetched: Sequence[str] = FETCHED) -> Path:
    """The directory of a model: itself when it is one, else what the hub holds under an id `organisation/name`.

    Of the hub only JSON, safetensors and tokenizer files are fetched (into the hub's own cache), or of these what
    `fetched` names. UserError otherwise.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"model {name!r} is not a directory, nor a hub id of the form organisation/name")
    import huggingface_hub  # here, because a local model needs none of it

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(fetched)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model {name!r} is not a directory and cannot be had from the hub: {reason}") from error


def load_config(directory: str | os.PathLike) -> DecoderConfig:
    """The configuration of the model in a directory. UserError where it is missing, malformed or unsupported."""
    path = Path(directory) / "config.json"
    return DecoderConfig.from_dict(read_json(path), str(path))


def load_params(directory: str | os.PathLike, config: DecoderConfig, dtype, mesh):
    """The nnx state of `Decoder(config)` with the weights of a directory, each array put straight to its sharding.

    Every name, shape and stored type is checked before the first weight is read. Then one parameter after another is
    read, only the bytes that this process' devices hold, and converted to `dtype`. UserError names the first tensor
    that is missing, surplus, of the wrong shape or of a type other than float32, bfloat16 and float16. Two surplus
    kinds are harmless and left out: the rotary frequencies that old checkpoints store, and an lm_head beside tied
    embeddings when both are equal.
    """
    _, params = abstract(config, dtype)
    shardings = nnx.to_flat_state(param_shardings(params, mesh))
    with contextlib.ExitStack() as stack:
        weights = _Weights(Path(directory), stack)
        _check(weights, params, config)

        def load(path, variable, sharding):
            read = _reader(weights, path, variable.shape, jax.numpy.dtype(dtype))
            return variable.replace(jax.make_array_from_callback(variable.shape, sharding, read))

        flat = [
            (path, load(path, variable, sharding.get_value()))
            for (path, variable), (_, sharding) in zip(nnx.to_flat_state(params), shardings, strict=True)
        ]
    return nnx.from_flat_state(flat)


def save(directory: str | os.PathLike, config: DecoderConfig, params, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config.json and the weights, in the dtype they have, as a directory that transformers loads. All processes
    call it, process 0 writes.

    One `model.safetensors`, or several with an index when they are more than `max_shard_bytes` together (one tensor is
    never divided). Each file appears whole or not at all, config.json last. Weights of an earlier save that this one
    does not overwrite are removed. UserError where it cannot be written.
    """
    try:
        _save(Path(directory), config, params, max_shard_bytes)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory}: the model cannot be written: {error}") from error


def _save(directory: Path, config: DecoderConfig, params, max_shard_bytes: int) -> None:
    tensors = {}  # name -> (array, layer or None, dimensions), in the order of the checkpoint
    for path, variable in nnx.to_flat_state(params):
        template, dims = TENSORS[path]
        layers = range(config.num_layers) if path[0] == "layers" else [None]
        tensors |= {template.format(layer): (variable[...], layer, dims) for layer in layers}
    sizes = {name: array.nbytes // (1 if i is None else len(array)) for name, (array, i, _) in tensors.items()}
    shards = _plan(sizes, max_shard_bytes)

    written = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {name: _to_torch(*tensors[name]) for name in names}
        written |= dict.fromkeys(names, file)
        if not processes.leads():
            continue
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / file) as temporary:
            safetensors.numpy.save_file(content, temporary, metadata={"format": "pt"})
    if not processes.leads():
        return
    for old in [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE, directory / INDEX]:
        if old.name not in written.values():
            old.unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(array.nbytes for array in jax.tree.leaves(params))
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": written})
    dtype = str(jax.tree.leaves(params)[0].dtype)
    _write_json(directory / "config.json", config.to_dict() | {"dtype": dtype, "torch_dtype": dtype})


class _Weights:
    """The tensors of a directory by name; files stay open (memory-mapped) as long as the given exit stack."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack):
        self.directory = directory
        files = _weight_files(directory)
        self._files = {}
        for file in sorted(set(files.values()) if files else {SINGLE}):
            try:
                handle = stack.enter_context(safetensors.safe_open(directory / file, framework="numpy"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{directory / file}: cannot be read as safetensors: {error}") from error
            held = set(handle.keys())
            lost = sorted(name for name, where in files.items() if where == file and name not in held)
            if lost:
                raise UserError(f"{directory / file}: has no tensor {lost[0]!r}, though {INDEX} says so")
            self._files |= dict.fromkeys(held, handle)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def slices(self, name: str):
        """What can be asked for `get_shape()`, `get_dtype()`, and indexed, which reads only that."""
        return self._files[name].get_slice(name)


def _weight_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name where there is an index; empty for a single file. UserError where there is neither."""
    if (directory / SINGLE).is_file():
        return {}
    index = directory / INDEX
    if not index.is_file():
        pickled = sorted(path.name for end in ("bin", "pt", "pth", "ckpt") for path in directory.glob(f"*.{end}"))
        if pickled:
            raise UserError(
                f"{directory}: no {SINGLE}, only pickles ({pickled[0]}), which are not read since they can run code; "
                "load and save the model with transformers, which writes safetensors"
            )
        raise UserError(f"{directory}: no weights, neither {SINGLE} nor {INDEX}")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index}: has no weight_map")
    for file in files.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: {file!r} is not the name of a file in the same directory")
        if not (directory / file).is_file():
            raise UserError(f"{directory}: {file} is missing, though {INDEX} names it")
    return files


def _check(weights: _Weights, params, config: DecoderConfig) -> None:
    """Raise UserError unless the checkpoint holds exactly the tensors of this configuration."""
    expected = {}
    for path, variable in nnx.to_flat_state(params):
        template, dims = TENSORS[path]
        stacked = path[0] == "layers"
        sizes = variable.shape[1:] if stacked else variable.shape
        shape = [math.prod(sizes[axis] for axis in axes) for axes in dims]
        expected |= {template.format(layer): shape for layer in (range(config.num_layers) if stacked else [0])}

    missing = [name for name in expected if name not in weights.names]
    if missing:
        hint = "; config.json has tie_word_embeddings false" if missing[0] == "lm_head.weight" else ""
        raise UserError(f"{weights.directory}: tensor {missing[0]!r} is missing{_and_more(missing)}{hint}")
    surplus = sorted(name for name in weights.names - set(expected) if not name.endswith("rotary_emb.inv_freq"))
    if config.tie_word_embeddings and "lm_head.weight" in surplus:
        head, embedding = weights.slices("lm_head.weight"), weights.slices("model.embed_tokens.weight")
        if head.get_shape() != embedding.get_shape() or not np.array_equal(head[:], embedding[:]):
            raise UserError(
                f"{weights.directory}: config.json ties the head to the embedding (tie_word_embeddings), "
                "but a different 'lm_head.weight' is stored"
            )
        surplus.remove("lm_head.weight")
    if surplus:
        raise UserError(
            f"{weights.directory}: surplus tensor {surplus[0]!r}{_and_more(surplus)}: "
            f"a {config.architecture} of this config.json has none"
        )
    for name, shape in expected.items():
        stored = weights.slices(name)
        found = list(stored.get_shape())
        if found != shape:
            raise UserError(f"{weights.directory}: tensor {name!r} has shape {found}, config.json makes it {shape}")
        if stored.get_dtype() not in STORED:
            raise UserError(
                f"{weights.directory}: tensor {name!r} is stored as {stored.get_dtype()}; "
                f"supported: {', '.join(STORED.values())}"
            )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _reader(weights: _Weights, path, shape, dtype):
    """What make_array_from_callback calls with the index of one device's part: reads just that."""
    template, dims = TENSORS[path]
    known = {}  # devices that hold the same part: read it once

    def read(index):
        ranges = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if ranges in known:
            return known[ranges]
        if path[0] == "layers":
            part = np.empty([stop - start for start, stop in ranges], dtype)
            for at, layer in enumerate(range(*ranges[0])):
                part[at] = _from_torch(weights.slices(template.format(layer)), dims, ranges[1:], shape[1:])
        else:
            part = np.ascontiguousarray(_from_torch(weights.slices(template), dims, ranges, shape)).astype(dtype)
        known[ranges] = part
        return part

    return read


def _from_torch(stored, dims, ranges, shape) -> np.ndarray:
    """The part `ranges` of our array of `shape`, read from a tensor whose dimensions are made of our axes `dims`."""
    inner = [math.prod(shape[axis] for axis in axes[1:]) for axes in dims]
    wanted = [slice(*(end * size for end in ranges[axes[0]])) for axes, size in zip(dims, inner, strict=True)]
    order = [axis for axes in dims for axis in axes]
    part = stored[tuple(wanted)].reshape([ranges[axis][1] - ranges[axis][0] for axis in order])
    return part.transpose(np.argsort(order))


def _to_torch(array, layer, dims) -> np.ndarray:
    """The reverse: a whole array, or one layer of it, as the tensor of a checkpoint."""
    ours = np.asarray(fetch(array if layer is None else array[layer]))
    shape = [math.prod(ours.shape[axis] for axis in axes) for axes in dims]
    # contiguous, because safetensors writes the memory as it lies
    return np.ascontiguousarray(ours.transpose([axis for axes in dims for axis in axes]).reshape(shape))


def _plan(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, divided so that each part is at most `limit` bytes, or one tensor."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The JSON object in a file of a model's directory. UserError where it is missing, malformed or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent}: no {path.name}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: malformed JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object")
    return content
