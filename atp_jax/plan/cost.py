"""What a program costs, counted on its jaxpr: multiplications, and the memory that its intermediate values need.

Nothing is compiled and no device is asked, so the count is the same for a chip that is not here. Multiplications are
exact. Memory is an estimate of what a compiler that fuses does: values are made in the program's order, chains of
elementwise operations lie nowhere unless a product, a loop or several others read them, an operand that is read for
the last time makes room for the result.
"""

import dataclasses
import math

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Their results are other views of what they are given.
VIEWS = {
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "broadcast_in_dim",
    "slice",
    "stop_gradient",
    "copy",
    "optimization_barrier",
}
# These read what a chain of elementwise operations gives only from memory.
READERS = {"dot_general", "scan", "while", "cond", "shard_map", "sort", "top_k", "scatter", "scatter-add", "gather"}
# These make something that is no elementwise function of equal shapes, and can take a chain in.
MAKERS = READERS | {
    "concatenate", "pad", "dynamic_update_slice", "dynamic_slice", "reduce_sum", "reduce_max", "reduce_min",
    "reduce_and", "reduce_or", "argmax", "argmin", "cumsum", "cumlogsumexp", "cummax", "random_bits", "threefry2x32",
}  # fmt: skip
INLINED = {"scan", "while", "cond"}  # the others that hold programs are calls


@dataclasses.dataclass(frozen=True)
class Cost:
    """flops: of all products, loops with a known length counted to it, others once. temporary: bytes at the worst
    moment, besides what is given and what is returned."""

    flops: float
    temporary: int


@dataclasses.dataclass
class _Operation:
    name: str
    params: dict
    reads: list[int]
    makes: list[int]


class _Program:
    """A jaxpr with its calls written out. Values are numbers; `size` their bytes, `given` those from outside."""

    def __init__(self, jaxpr: Jaxpr):
        self.operations: list[_Operation] = []
        self.size: list[int] = []
        self.avals: list = []
        self.given = [self._value(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)]
        self.returned = self._write_out(jaxpr, self.given)

    def _value(self, aval) -> int:
        self.avals.append(aval)
        item = getattr(aval.dtype, "itemsize", 4) if hasattr(aval, "dtype") else 0
        self.size.append(math.prod(getattr(aval, "shape", ())) * item)
        return len(self.size) - 1

    def _write_out(self, jaxpr: Jaxpr, given: list[int]) -> list[int]:
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), given, strict=True))

        def number(atom):
            return self._value(atom.aval) if isinstance(atom, Literal) else known[atom]

        for equation in jaxpr.eqns:
            reads = [number(atom) for atom in equation.invars]
            inner = None if equation.primitive.name in INLINED else _called(equation)
            if inner is None:
                makes = [self._value(v.aval) for v in equation.outvars]
                self.operations.append(_Operation(equation.primitive.name, equation.params, reads, makes))
            else:
                body, consts = inner
                makes = self._write_out(body, [self._value(jax.typeof(c)) for c in consts] + reads)
            known.update(zip(equation.outvars, makes, strict=True))
        return [number(atom) for atom in jaxpr.outvars]


def cost(jaxpr: ClosedJaxpr) -> Cost:
    """Of a program, as `jax.make_jaxpr` or `trace` of a jitted function writes it."""
    return _cost(jaxpr.jaxpr)


def _called(equation) -> tuple[Jaxpr, list] | None:
    for name, value in equation.params.items():
        if name in ("jaxpr", "call_jaxpr"):  # others say how to update or reduce, not what is called
            return (value.jaxpr, value.consts) if isinstance(value, ClosedJaxpr) else (value, [])
    return None


def _cost(jaxpr: Jaxpr) -> Cost:
    program = _Program(jaxpr)
    flops, inside = 0.0, []  # inside[i]: what operation i needs while it runs
    for operation in program.operations:
        found = _held(operation, program)
        flops += found.flops
        inside.append(found.temporary)
    return Cost(flops, _peak(program, inside))


def _held(operation: _Operation, program: _Program) -> Cost:
    params = operation.params
    if operation.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(program.avals[operation.reads[0]].shape[axis] for axis in contracted)
        return Cost(2.0 * terms * math.prod(program.avals[operation.makes[0]].shape), 0)
    if operation.name == "scan":
        body = _cost(params["jaxpr"].jaxpr)
        return Cost(params["length"] * body.flops, body.temporary)
    if operation.name == "while":
        return _cost(params["body_jaxpr"].jaxpr)
    if operation.name == "cond":
        branches = [_cost(branch.jaxpr) for branch in params["branches"]]
        return Cost(max(b.flops for b in branches), max(b.temporary for b in branches))
    return Cost(0.0, 0)


def _in_place(operation: _Operation, value: int) -> int | None:
    """What this result is written over, if nobody reads that afterwards: an array that is updated, or what a loop
    begins with. What is given counts as given away; a program keeps its arguments by other means."""
    if operation.name.startswith("scatter") or operation.name == "dynamic_update_slice":
        return operation.reads[0]
    place = operation.makes.index(value)
    if operation.name == "while":
        return operation.reads[operation.params["cond_nconsts"] + operation.params["body_nconsts"] + place]
    if operation.name == "scan" and place < operation.params["num_carry"]:
        return operation.reads[operation.params["num_consts"] + place]
    return None


def _peak(program: _Program, inside: list[int]) -> int:
    """Bytes at the worst moment of what lies in memory beside the given."""
    count = [0] * len(program.size)
    read_whole = [False] * len(program.size)
    for operation in reversed(program.operations):
        for value in operation.reads:
            count[value] += 1
            if operation.name in READERS or (operation.name in VIEWS and read_whole[operation.makes[0]]):
                read_whole[value] = True
            if operation.name in VIEWS:
                count[value] += count[operation.makes[0]] - 1

    final: dict[int, int] = {}  # the last operation that reads a value
    for index, operation in enumerate(program.operations):
        final |= dict.fromkeys(operation.reads, index)
    outside = set(program.given)
    lies: dict[int, frozenset[int]] = {value: frozenset() for value in range(len(program.size))}  # in which buffers
    last: dict[int, int] = {}
    born: list[list[int]] = []
    for index, operation in enumerate(program.operations):
        made = []
        for value in operation.makes:
            under = frozenset().union(*(lies[v] for v in operation.reads)) if operation.reads else frozenset()
            own = operation.name in MAKERS or read_whole[value] or count[value] > 1
            if operation.name in VIEWS:
                own = operation.name == "broadcast_in_dim" and read_whole[value] and not under
            before = _in_place(operation, value)
            if before is not None and program.size[before] == program.size[value] and final[before] == index:
                own, under = False, lies[before]
            if own and value not in outside:
                lies[value] = frozenset({value})
                made.append(value)
            else:
                lies[value] = under
        for value in (*operation.reads, *operation.makes):
            for buffer in lies[value]:
                last[buffer] = index
        born.append(made)
    for value in program.returned:
        for buffer in lies[value]:
            last[buffer] = len(program.operations)
    dying: dict[int, list[int]] = {}
    for buffer, index in last.items():
        dying.setdefault(index, []).append(buffer)

    now = worst = 0
    for index, operation in enumerate(program.operations):
        ends = sum(program.size[b] for b in dying.get(index, ()) if b not in born[index])
        new = sum(program.size[b] for b in born[index])
        reused = 0 if operation.name in ("dot_general", "sort", "gather", "concatenate") else min(ends, new)
        worst = max(worst, now + new - reused + inside[index])
        now += new - sum(program.size[b] for b in dying.get(index, ()))
    return worst
