"""The mesh and what lies where on it.

Three mesh axes. `data`: rows of a batch. `fsdp`: rows of a batch and a slice of every parameter. `tensor`: heads, the
inner size of the MLP and the vocabulary. One device is a mesh of one, so that there is no other path than this one.
Parameters carry the names of their logical axes (models/decoder.py); `RULES` is the one place that maps those names,
and the names of a batch's axes, to mesh axes.
"""

import functools
import json
import math
import time
import weakref

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from atp_jax import processes
from atp_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

RULES = {
    "batch": ("data", "fsdp"),
    "length": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "rank": None,
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh of all devices (or of those given) with axes data, fsdp, tensor; one size may be -1: what is left.

    Raises UserError where the sizes do not multiply to the number of devices, saying which would.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
            raise UserError(f"mesh.{name} must be a positive integer or -1 (what is left), found {size!r}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"only one mesh size may be -1, found {' and '.join('mesh.' + name for name in free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        # Keep as much as possible of what was asked, the later axes first: they are the ones a model's size asks for.
        tensor = math.gcd(len(devices), max(tensor, 1))
        fsdp = math.gcd(len(devices) // tensor, max(fsdp, 1))
        works = f"data=-1 (here {len(devices) // tensor // fsdp}), fsdp={fsdp}, tensor={tensor}"
        raise UserError(f"mesh {asked} does not fit {len(devices)} device(s); what fits: {works}")
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def named_sharding(mesh: Mesh, *axes: str) -> NamedSharding:
    """The sharding of an array with these logical axes, e.g. ("batch", "kv_heads", "length", "head_dim")."""
    return NamedSharding(mesh, PartitionSpec(*(RULES[name] for name in axes)))


def put(values, sharding: NamedSharding):
    """A tree of arrays that every process has whole and alike, placed on a mesh; each process copies its own part."""
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, values)


def fetch(tree):
    """A tree of arrays on the host, whole in every process. Called by all processes, in the same order."""

    def everywhere(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return _gather(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)

    return jax.device_get(jax.tree.map(everywhere, tree))


def sampling_layout(weights, mesh: Mesh):
    """The change of layout between training and sampling: what lies in slices of `fsdp` becomes whole along it.

    A token is decoded with all weights, so slices would travel to every device for each token; here they travel once.
    What is split over `tensor` stays so. weights: a tree of arrays on the mesh -> (the tree, seconds that it took).
    Nothing is copied where nothing lies in slices; and the copy of an array is remembered while that array lives, so
    that whoever samples from the same ones (draws, looks, the probe) shares it.
    """
    if mesh.shape["fsdp"] == 1:
        return weights, 0.0
    began = time.perf_counter()

    def whole(x):
        spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in x.sharding.spec))
        if spec == x.sharding.spec:
            return x
        if id(x) not in _copies:
            _copies[id(x)] = jax.device_put(x, NamedSharding(mesh, spec))
            weakref.finalize(x, _copies.pop, id(x), None)
        return _copies[id(x)]

    return jax.block_until_ready(jax.tree.map(whole, weights)), time.perf_counter() - began


_copies: dict[int, jax.Array] = {}  # of an array in slices, by its id: whole along fsdp


@functools.cache
def _gather(whole: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=whole)


def spare_memory(held, mesh: Mesh) -> int | None:
    """Bytes that all devices of a mesh together have beside a tree of arrays that lies on them (one that comes twice
    counts once), a sixth of each left aside for what is computed; None where a device does not say what it has (a CPU).

    What a device has, not what is free at the moment: the same again when a run is resumed. And what process 0's have,
    for it decides what is answered together.
    """
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    limit = json.loads(processes.share(lambda: json.dumps(limit).encode()))
    if limit is None:
        return None
    arrays = {id(x): x for x in jax.tree.leaves(held)}.values()
    taken = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    return mesh.size * max(limit * 5 // 6 - taken, 0)


def row_shards(mesh: Mesh) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; every other axis of the array whole."""
    return named_sharding(mesh, "batch")


def param_shardings(params, mesh: Mesh):
    """A tree like `params` (the nnx state of a Decoder, abstract or not) with a NamedSharding at every leaf.

    Raises UserError where a mesh size does not divide a dimension it would split, with the sizes that divide all.
    """

    def is_variable(leaf):
        return isinstance(leaf, nnx.Variable)

    def place(variable):
        return variable.replace(named_sharding(mesh, *variable.get_metadata("axes")))

    _check_divisible(jax.tree.leaves(params, is_leaf=is_variable), mesh)
    return jax.tree.map(place, params, is_leaf=is_variable)


def _check_divisible(variables, mesh: Mesh) -> None:
    dimensions = {}  # mesh axis -> {logical axis: its size}
    for variable in variables:
        for name, size in zip(variable.get_metadata("axes"), variable.shape, strict=True):
            if RULES[name] is not None:
                dimensions.setdefault(RULES[name], {})[name] = size
    for axis, sizes in dimensions.items():
        parts = mesh.shape[axis]
        for name, size in sizes.items():
            if size % parts:
                common = math.gcd(*sizes.values())
                works = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0 and n <= mesh.size)
                # A key head on several devices would lie there more than once, cache and all: refused, not replicated.
                raise UserError(
                    f"mesh.{axis}={parts} does not divide the model's {name}={size}; what divides: {works}; the other "
                    "devices go to mesh.data or mesh.fsdp"
                )
