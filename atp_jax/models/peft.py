"""Adapters as PEFT keeps them: `adapter_config.json` beside `adapter_model.safetensors`, in and out."""

import math
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from atp_jax import processes
from atp_jax.errors import UserError
from atp_jax.files import replacing, write_json
from atp_jax.models.config import DecoderConfig
from atp_jax.models.huggingface import TENSORS, read_json
from atp_jax.models.lora import TARGETS, Lora, place, sizes
from atp_jax.parallel import fetch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Target <-> the module's name in a checkpoint, as in q_proj; and the whole name of its weight.
STORED = {target: TENSORS["layers", target][0] for target in TARGETS}
MODULES = {target: name.split(".")[-2] for target, name in STORED.items()}
# What an adapter of PEFT may ask for beyond A and B, with the value that asks for nothing.
PLAIN = {
    "bias": ("none",), "use_dora": (False, None), "fan_in_fan_out": (False, None), "modules_to_save": (None, []),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "layers_to_transform": (None, []),
    "layers_pattern": (None, [], ""), "use_qalora": (False, None), "lora_bias": (False, None),
    "megatron_config": (None,),
    "target_parameters": (None, []), "trainable_token_indices": (None, [], {}), "layer_replication": (None, []),
}  # fmt: skip


def save(directory: str | os.PathLike, config: DecoderConfig, lora: Lora, base: str) -> None:
    """Write one adapter as a directory that PEFT loads: adapter_model.safetensors, then adapter_config.json.

    base: what PEFT is told to load it on. UserError for several adapters at once, or where it cannot be written.
    """
    if int(lora.owner.max()) > 0:
        raise UserError("several adapters cannot be saved as one: save them one by one")
    directory, rank = Path(directory), len(lora.gain)
    tensors = {}
    for target in lora.a:
        into, out = (fetch(part[target]) for part in (lora.a, lora.b))
        for layer in range(config.num_layers):
            tensors[_name(target, layer, "A")] = np.ascontiguousarray(into[layer].reshape(-1, rank).T)
            tensors[_name(target, layer, "B")] = np.ascontiguousarray(out[layer].reshape(rank, -1).T)
    alpha = float(lora.gain[0]) * rank
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(MODULES[target] for target in lora.a), "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    if not processes.leads():
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS) as partial:
            safetensors.numpy.save_file(tensors, partial, metadata={"format": "pt"})
        write_json(directory / CONFIG, content)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory}: the adapter cannot be written: {error}") from error


def load(directory: str | os.PathLike, config: DecoderConfig, mesh) -> Lora:
    """The adapter in a PEFT directory. UserError where it is missing, pickled, for another model, or asks for more than
    A and B (the option is named)."""
    directory = Path(directory)
    asked = read_json(directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which is not read since it can run code)"
        hint = pickled if (directory / "adapter_model.bin").exists() else ""
        raise UserError(f"{directory}: no {WEIGHTS}{hint}")
    if asked.get("peft_type") != "LORA":
        raise UserError(f"{directory / CONFIG}: peft_type {asked.get('peft_type')!r} is not LORA")
    for option, plain in PLAIN.items():
        if asked.get(option, plain[0]) not in plain:
            raise UserError(f"{directory / CONFIG}: {option}={asked[option]!r} is not supported, only {plain[0]!r}")
    rank, alpha = asked.get("r"), asked.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{directory / CONFIG}: r={rank!r} and lora_alpha={alpha!r} must be numbers, r at least 1")
    gain = alpha / (math.sqrt(rank) if asked.get("use_rslora") else rank)

    try:
        with safetensors.safe_open(directory / WEIGHTS, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{directory / WEIGHTS}: cannot be read as safetensors: {error}") from error
    a, b, known = {}, {}, set()
    for target in TARGETS:
        if not any(_name(target, layer, letter) in tensors for layer in range(config.num_layers) for letter in "AB"):
            continue
        into, out = sizes(config, target)
        layers = []
        for letter, shape in (("A", (rank, math.prod(into))), ("B", (math.prod(out), rank))):
            stacked = []
            for layer in range(config.num_layers):
                name = _name(target, layer, letter)
                known.add(name)
                if name not in tensors or tensors[name].shape != shape:
                    found = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
                    raise UserError(
                        f"{directory}: tensor {name!r} {found}, this model needs {list(shape)}: "
                        "the adapter is for another model"
                    )
                stacked.append(tensors[name].T.astype(np.float32))
            layers.append(np.stack(stacked))
        a[target] = jnp.asarray(layers[0].reshape(config.num_layers, *into, rank))
        b[target] = jnp.asarray(layers[1].reshape(config.num_layers, rank, *out))
    if surplus := sorted(set(tensors) - known):
        raise UserError(f"{directory}: tensor {surplus[0]!r} belongs to nothing that an adapter of this model can have")
    if not a:
        raise UserError(f"{directory / WEIGHTS}: holds no tensor of an adapter")
    return place(Lora(a, b, jnp.full(rank, gain, jnp.float32), jnp.zeros(rank, jnp.int32)), mesh)


def _name(target: str, layer: int, letter: str) -> str:
    return "base_model.model." + STORED[target].format(layer).removesuffix("weight") + f"lora_{letter}.weight"
