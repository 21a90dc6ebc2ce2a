"""Rotary position embedding: the frequencies a configuration asks for, and the rotation itself.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071, section 3), Llama 3.1's frequency scaling as published
with its weights; the key names are those of transformers' `config.json`, old (`rope_theta`, `rope_scaling`) and new
(`rope_parameters`).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from atp_jax.errors import UserError

TYPES = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """What decides the rotation. Only the fields of its `type` mean anything; the others keep their defaults.

    theta: base of the geometric row of frequencies. factor: how many times longer the context was made.
    original: context length (tokens) before that. low_freq_factor, high_freq_factor: llama3, in turns per original
    context. beta_fast, beta_slow: yarn, likewise. truncate: yarn rounds its two bounds to whole dimensions.
    attention_factor: yarn's multiplier of cosine and sine.
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    original: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @staticmethod
    def from_dict(config: dict, where: str) -> "Rope":
        """Read it from a `config.json`. `where` names the file in errors.

        theta may stand at the top level or inside `rope_parameters`/`rope_scaling` (inside wins, as in transformers).
        Raises UserError for an absent theta, an unknown type, a missing or impossible number.
        """
        inner = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(inner, dict) or any(isinstance(value, dict) for value in inner.values()):
            raise UserError(f"{where}: rope_parameters must be one flat object (rope by layer type is not supported)")
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind not in TYPES:
            raise UserError(f"{where}: unknown rope type {kind!r}; supported: {', '.join(TYPES)}")
        if config.get("partial_rotary_factor", inner.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
            raise UserError(f"{where}: partial_rotary_factor is not supported (the whole head is rotated)")

        def number(key, default=None):
            value = inner.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise UserError(f"{where}: rope type {kind!r} needs a positive number {key!r}, found {value!r}")
            return value

        theta = float(number("rope_theta", config.get("rope_theta")))
        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, kind, float(number("factor")))

        context = config.get("max_position_embeddings")
        if config.get("original_max_position_embeddings") is not None:  # outside wins here, as in transformers
            inner = inner | {"original_max_position_embeddings": config["original_max_position_embeddings"]}
        original = int(number("original_max_position_embeddings", context))
        if kind == "llama3":
            low, high = float(number("low_freq_factor")), float(number("high_freq_factor"))
            if not low < high:
                raise UserError(f"{where}: rope type 'llama3' needs low_freq_factor < high_freq_factor")
            return Rope(theta, kind, float(number("factor")), original, low, high)

        factor = float(number("factor", context / original if context else None))
        mscale, mscale_all = inner.get("mscale"), inner.get("mscale_all_dim")
        attention = _yarn_attention(factor, 1.0)
        if mscale and mscale_all:
            attention = _yarn_attention(factor, mscale) / _yarn_attention(factor, mscale_all)
        return Rope(
            theta,
            kind,
            factor,
            original,
            beta_fast=float(number("beta_fast", 32.0)),
            beta_slow=float(number("beta_slow", 1.0)),
            truncate=bool(inner.get("truncate", True)),
            attention_factor=float(number("attention_factor", attention)),
        )

    def to_dict(self) -> dict:
        """The `rope_parameters` object that says the same, theta included."""
        out = {"rope_type": self.type, "rope_theta": self.theta}
        if self.type != "default":
            out["factor"] = self.factor
        if self.type in ("llama3", "yarn"):
            out["original_max_position_embeddings"] = self.original
        if self.type == "llama3":
            out |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.type == "yarn":
            names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
            out |= {name: getattr(self, name) for name in names}
        return out


def _yarn_attention(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a position, float32 [head_dim / 2], computed in float64: f_i = theta^(-2i/head_dim), then scaled."""
    exact = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        exact = exact / rope.factor
    elif rope.type == "llama3":
        # Turns made within the original context: many turns keep their frequency, few are slowed by the factor,
        # and between the two bounds one goes over into the other.
        turns = rope.original * exact / (2 * math.pi)
        keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        exact = exact * (keep + (1 - keep) / rope.factor)
    elif rope.type == "yarn":
        # The same idea, but the passage is a ramp over the index of the dimension.
        def dimension(turns):
            return head_dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high = high + 0.001 if low == high else high
        slow = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
        exact = exact * (1 - slow + slow / rope.factor)
    return exact.astype(np.float32)


def rotate(x, positions, rope: Rope):
    """Rotate queries or keys by their positions, in float32.

    x [B, T, N, D] with dimension i paired with i + D/2; positions int [B, T] or [1, T]. Returns x's shape and dtype.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, x.shape[-1])  # [B, T, D/2]
    cos = (jnp.cos(angles) * rope.attention_factor)[:, :, None, :]
    sin = (jnp.sin(angles) * rope.attention_factor)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
