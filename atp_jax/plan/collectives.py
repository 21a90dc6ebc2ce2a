"""The collectives of a compiled program, read from its HLO text."""

import collections
import dataclasses
import math
import re

import ml_dtypes
import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(rf"^(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind over groups of so many devices: how often it runs, and the bytes of what each device gets from it (of an
    all-reduce the reduced, of an all-gather the gathered), all times together. in_loop: within a loop whose length
    only the run knows, as decoding's; then times and bytes are of one turn."""

    kind: str
    devices: int
    in_loop: bool
    times: int
    bytes: int


def read_collectives(hlo: str) -> list[Collective]:
    """Those of `compiled.as_text()`; loops with a known length are counted out."""
    computations, entry, current = {}, None, None
    for line in hlo.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line.strip())  # tuples of many parts are numbered in comments
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[1], [])
            entry = found[1] if line.startswith("ENTRY") else entry
        elif current is not None and " = " in line:
            current.append(line)

    counted = collections.defaultdict(lambda: [0, 0])

    def walk(name: str, times: int, in_loop: bool) -> None:
        for line in computations.get(name, ()):
            if found := _OPERATION.match(line):
                place = counted[found[2], _group_size(line), in_loop]
                place[0] += times
                place[1] += times * _bytes(found[1], started="-start(" in line)
            turns, unknown = 1, False
            if re.search(r" while\(", line):
                known = _TRIPS.search(line)
                turns, unknown = (int(known[1]), False) if known else (1, True)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.-]+", branches)
            for inner in called:
                walk(inner, times * turns, in_loop or unknown)

    walk(entry, 1, False)
    return [Collective(*key, *value) for key, value in sorted(counted.items())]


def _group_size(line: str) -> int:
    """Devices that take part together, in any of the three ways that HLO writes them."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):  # sizes of axes, and which of them
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # an axis, or a part of it of so many
        return math.prod(int(part or sizes[axis]) for axis, part in named)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):  # so many groups of so many
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    return 2  # a permute: pairs


def _bytes(result: str, started: bool) -> int:
    """Of the arrays of a result; an operation that is only started returns its operands before its results."""
    arrays = [_size(kind, dims) for kind, dims in _ARRAY.findall(result)]
    if started and result.startswith("((") or (started and len(arrays) == 2 and result.startswith("(")):
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def _size(kind: str, dims: str) -> int:
    names = {"pred": "bool", "bf16": ml_dtypes.bfloat16, "f": "float", "s": "int", "u": "uint"}
    if kind not in names:
        letters, bits = re.fullmatch(r"([a-z]+)(\d+).*", kind).groups()
        names[kind] = names[letters] + bits
    return np.dtype(names[kind]).itemsize * math.prod(int(n) for n in dims.split(",") if n)
