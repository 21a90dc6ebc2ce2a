"""The machine that a benchmark runs on: what it is, and what it reaches when it does nothing but copy or multiply."""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from atp_jax.errors import UserError
from atp_jax.model import check_dtype
from atp_jax.models.cache import dot


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of one device: bytes a second that its memory reads and writes, multiplications and additions a second of a large
    product. Both are measured, since no program reaches a data sheet's."""

    bandwidth: float
    flops: float


def machine() -> dict:
    """What every benchmark says of where it ran. peak_gb: the most memory that the first device had in use so far; left
    out where the device does not say, as a CPU."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return ({} if used is None else {"peak_gb": round(used / 1e9, 2)}) | {
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "cores": os.cpu_count(),
        "jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__,
    }  # fmt: skip


def rates(dtype: str) -> Rates | None:
    """Of the first device, products in this dtype; None on a CPU, of which a benchmark needs no such shares.

    To be asked before there is a model: what it allocates would else count into peak_gb."""
    check_dtype(dtype)
    if jax.devices()[0].platform == "cpu":
        return None
    return Rates(bandwidth(), product_rate(dtype))


def bandwidth(size: int = 2**30) -> float:
    """Bytes a second that copying `size` bytes reads and writes, the best of ten times."""
    return 2 * size / _best(jax.jit(lambda x: x + 1), jnp.zeros(size // 4, jnp.float32))


def product_rate(dtype: str, size: int = 2**13) -> float:
    """Multiplications and additions a second in a product of two matrices [size, size], computed as a model's are
    (models/cache.py:dot), the best of ten times."""
    # Not zeros: a chip that multiplies them is cooler and runs faster.
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    return 2 * size**3 / _best(jax.jit(lambda x: dot("xi,io->xo", x, x, x.dtype)), matrix)


def torch_device(dtype: str) -> str:
    """Where torch does the same work: on a GPU as on a CPU. UserError where that would be no fair comparison."""
    platform = jax.devices()[0].platform
    if platform not in ("cpu", "gpu"):
        raise UserError(f"--against compares on a CPU or a GPU, not on {platform}")
    if platform == "cpu" and dtype != "float32":
        raise UserError("--against compares in float32 on a CPU; leave --dtype out")
    return {"cpu": "cpu", "gpu": "cuda"}[platform]


def _best(call, array: jax.Array) -> float:
    """Seconds of the best of ten calls, after one that compiles."""
    spent = []
    for _ in range(11):
        began = time.perf_counter()
        jax.block_until_ready(call(array))
        spent.append(time.perf_counter() - began)
    return min(spent[1:])
