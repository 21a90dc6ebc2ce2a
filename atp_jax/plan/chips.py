"""What a chip has, as its maker says: the data sheets of NVIDIA's A100, H100 and H200 (SXM) and Google's pages on the
architecture of TPU v5e, v5p and v6e. A product in float32 is one in full (models/cache.py:dot): on a GPU without tensor
cores, on a TPU six in bfloat16."""

import dataclasses
import re

from atp_jax.errors import UserError

USABLE = 0.92  # of the memory, for what a program keeps: launch/gpu.sh takes as much, the rest is the runtime's


@dataclasses.dataclass(frozen=True)
class Chip:
    """memory in bytes; bandwidth of the memory and link, to all other chips together and one way, in bytes a second;
    flops: multiplications and additions a second in a dtype, without sparsity."""

    name: str
    memory: float
    bandwidth: float
    flops: dict[str, float]
    link: float


def _gpu(bfloat16: float, float32: float) -> dict[str, float]:
    return {"bfloat16": bfloat16, "float32": float32}


def _tpu(bfloat16: float) -> dict[str, float]:
    return {"bfloat16": bfloat16, "float32": bfloat16 / 6}


CHIPS = (
    Chip("A100-40", 40e9, 1.555e12, _gpu(312e12, 19.5e12), 300e9),
    Chip("A100-80", 80e9, 2.039e12, _gpu(312e12, 19.5e12), 300e9),
    Chip("H100-80", 80e9, 3.35e12, _gpu(989e12, 67e12), 450e9),
    Chip("H200", 141e9, 4.8e12, _gpu(989e12, 67e12), 450e9),
    Chip("v5e", 16e9, 0.819e12, _tpu(197e12), 200e9),
    Chip("v5p", 95e9, 2.765e12, _tpu(459e12), 600e9),
    Chip("v6e", 32e9, 1.6e12, _tpu(918e12), 400e9),
)


def read_device(said: str) -> tuple[Chip | None, int | None]:
    """`H100-80`, `8xH100-80` or `64x` -> the chip and how many; None for what is not said. UserError otherwise."""
    count, name = re.fullmatch(r"(?:(\d+)x)?(.*)", said.strip(), re.DOTALL).groups()
    named = {chip.name.lower(): chip for chip in CHIPS}
    if (name and name.lower() not in named) or count == "0":
        known = ", ".join(chip.name for chip in CHIPS)
        raise UserError(f"--plan={said}: a chip, and how many, as in --plan=8xH100-80; there are {known}")
    return named.get(name.lower()), int(count) if count else None
