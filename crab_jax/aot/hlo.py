"""Parsing of compiled programs (HLO text): how often each instruction runs, and the collectives with their bytes.

A scanned layer occurs in the text once, as the body of a while loop; here it counts as often as it runs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# Bits per element of the element types in HLO text.
BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "bf16": 16,
    "f16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}

_ARRAY = re.compile(r"\b(" + "|".join(BITS) + r")\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
# The chips of a collective: {{0,1},{2,3}}, or [2,2]<=[4], or [2,2]<=[2,2]T(1,0); or the pairs of a permutation.
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_TILED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Or the axes of a mesh that they lie along: mesh['a'=4,'b'=64], device_ids=([64,4]T(1,0)) {'a'}.
_MESHED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?,? ?\{([^}]*)\}"
)
# The TPU compiler makes of a collective between slices its parts within the slices, and a transfer through the hosts.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_INDEX = re.compile(r"index=(\d+)")
_NAMED = re.compile(r'op_name="([^"]*)"')
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
# Of a dot, and of the GPU compiler's call of a library for one.
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
_BATCHED = re.compile(r'lhs_batch_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')

# Opcodes whose result is their first operand, or a part of it, in another place, type or layout.
_MOVES = {
    "all-gather",
    "all-gather-start",
    "all-gather-done",
    "async-done",
    "async-update",
    "bitcast",
    "convert",
    "copy",
    "copy-start",
    "copy-done",
    "dynamic-slice",
    "opt-barrier",
    "reshape",
    "slice",
    "transpose",
    "while",
}
Source = Any  # str, or a tuple of Source: recursive


class Array(NamedTuple):
    """Element type as written in HLO, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Return the size without layout padding."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class Product(NamedTuple):
    """A matrix product or a convolution: its FLOPs, and the sizes of rows x inner times inner x columns.

    Batched products and convolutions over space have these sizes for each element of the batch and the kernel.
    """

    flops: float
    rows: int
    inner: int
    columns: int


class Op(NamedTuple):
    """One instruction.

    times: runs per program run. fused: inside a fusion, so its result has no buffer. source: the program argument
    (JAX's name) that the result is a moved or converted copy of, or "". channel: identifies the steps of one
    collective, or "". groups: the chips that a collective joins, as they are numbered in the mesh. between_slices: the
    kind of collective that a transfer between slices is part of, or "". path: JAX's name of what it computes, such as
    "jit(step)/jvp(Crab)/llama/norm/mul". cycles: the compiler's estimate for one run, 0 where it gives none. owner: the
    fusion that it is inside of, or "". operands: all arrays that it is given. product: what it multiplies. target: the
    name of what a custom call calls. traffic: bytes that one run reads and writes, where it is no part of a fusion.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    times: int
    fused: bool
    source: str = ""
    channel: str = ""
    groups: tuple[tuple[int, ...], ...] = ()
    between_slices: str = ""
    path: str = ""
    cycles: int = 0
    owner: str = ""
    operands: tuple[Array, ...] = ()
    product: Product | None = None
    target: str = ""
    traffic: int = 0


def _split(definition: str) -> tuple[str, str, str]:
    """Split the text after `name = ` into (type, opcode, rest)."""
    end = definition.find(" ")
    if definition.startswith("("):
        depth = list(itertools.accumulate((letter == "(") - (letter == ")") for letter in definition))
        end = depth.index(0) + 1
    opcode, _, rest = definition[end:].strip().partition("(")
    return definition[:end], opcode, rest


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """Return ({computation: [(name, type, opcode, rest)]}, name of the entry computation)."""
    out: dict[str, list[tuple[str, str, str, str]]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith(" "):
            current = head[2]
            out[current] = []
            entry = current if head[1] else entry
        elif current and (op := _OP.match(line)):
            out[current].append((op[1], *_split(op[2])))
        elif current and out[current] and line != "}":  # the attributes of a kernel go on over several lines
            *first, rest = out[current][-1]
            out[current][-1] = (first[0], first[1], first[2], rest + line)
    return out, entry


def trip_count(condition: list[tuple[str, str, str, str]], rest: str, turns: int = 1) -> int:
    """Return how often a while loop runs.

    The compiler's note comes first, then the constant that the condition compares with, then `turns`.
    """
    known = _TRIPS.search(rest)
    if known:
        return int(known[1])
    constants = [
        int(number[1])
        for _, _, opcode, rest in condition
        if opcode == "constant" and (number := re.match(r"(\d+)\)", rest))
    ]
    return max(constants, default=turns)


def ops(text: str, turns: int = 1) -> list[Op]:
    """Return every instruction that runs, with how often it runs and what it copies.

    turns: how often loops run of which the program does not say it.
    """
    computations, entry = _computations(text)
    out: list[Op] = []

    def visit(computation: str, times: int, owner: str, given: list[Source]) -> Source:
        """Return the source of the root (the last instruction), given the sources of the parameters."""
        sources: dict[str, Source] = {}
        shapes: dict[str, tuple[Array, ...]] = {}
        last: Source = ""
        for name, type_text, opcode, rest in computations.get(computation, ()):
            arrays = _arrays(type_text)
            called = _CALLED.findall(rest)
            for names in _CALLED_LISTS.findall(rest):
                called += [part.strip().lstrip("%") for part in names.split(",")]
            within = times
            if opcode == "while":
                condition = re.search(r"condition=%?([\w.\-]+)", rest)
                within *= trip_count(computations.get(condition[1], []) if condition else [], rest, turns)
            given_names = _OPERAND.findall(rest.partition(")")[0])
            operands = [sources.get(operand, "") for operand in given_names]
            read = tuple(each for operand in given_names for each in shapes.get(operand, ()))
            holds = owner or ("" if opcode in ("while", "conditional", "call", "async-start") else name)
            inner = [visit(each, within, holds, operands) for each in dict.fromkeys(called)]
            shapes[name] = arrays
            body = computations.get(called[0], []) if opcode == "fusion" and called else []
            last = _source(opcode, rest, operands, inner, given, computation == entry)
            sources[name] = last
            channel, transfer = _CHANNEL.search(rest), _BETWEEN_SLICES.search(rest)
            path, cycles, target = _NAMED.search(rest), _CYCLES.search(rest), _TARGET.search(rest)
            out.append(
                Op(
                    name,
                    opcode,
                    arrays,
                    times,
                    bool(owner),
                    last if isinstance(last, str) else "",
                    channel[1] if channel else "",
                    _groups(rest) if opcode.removesuffix("-start") in COLLECTIVES else (),
                    transfer[1].lower().replace("_", "-") if transfer else "",
                    path[1] if path else "",
                    int(cycles[1]) if cycles else 0,
                    owner,
                    read,
                    _product(opcode, rest, arrays, read),
                    target[1] if target else "",
                    0 if owner else _traffic(opcode, arrays, [shapes.get(n, ()) for n in given_names], body),
                )
            )
        return last

    visit(entry, 1, "", [])
    return out


def _product(opcode: str, rest: str, results: tuple[Array, ...], operands: tuple[Array, ...]) -> Product | None:
    """Return what a convolution or a dot multiplies, None for other instructions."""
    if opcode not in ("convolution", "dot", "custom-call") or len(operands) < 2 or not results:
        return None
    left, right, out = operands[0].shape, operands[1].shape, results[0].shape
    if opcode == "custom-call" and "__cudnn$fmha" in rest:  # scores and their product with values; backward five
        number = 5 if "Backward" in rest else 2
        width = left[-1]
        return Product(2.0 * number * math.prod(left) * max(right[1:-1]), max(left[1:-1]), width, max(right[1:-1]))
    if opcode == "dot" or (opcode == "custom-call" and "dot_dimension_numbers" in rest):
        contracted = [left[int(axis)] for axis in (_axes(_CONTRACTED, rest))]
        batch = [left[int(axis)] for axis in (_axes(_BATCHED, rest))]
        inner = math.prod(contracted)
        rows = math.prod(left) // max(1, inner * math.prod(batch))
        columns = math.prod(out) // max(1, rows * math.prod(batch))
        return Product(2.0 * math.prod(out) * inner, rows, inner, columns)
    labels = _LABELS.search(rest)
    if not labels:
        return None
    inner, space = right[labels[2].index("i")], 1
    for number in filter(str.isdigit, labels[2]):  # a batched product is a convolution over as large a space
        size = right[labels[2].index(number)]
        batched = number in labels[3] and out[labels[3].index(number)] == size == left[labels[1].index(number)]
        space *= 1 if batched else size
    rows, columns = out[labels[3].index("b")], out[labels[3].index("f")]
    return Product(2.0 * math.prod(out) * inner * space, rows, inner, columns)


# What moves no data, or is not the work of a kernel: collectives are counted by themselves.
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier"),
    *("copy-done", "send", "send-done", "recv", "recv-done", "after-all", "partition-id", "replica-id"),
    *("async-start", "async-update", "async-done"),
    *(f"{kind}{part}" for kind in COLLECTIVES for part in ("", "-start", "-done")),
}
_PARTS = {"dynamic-slice", "slice", "gather"}


def _traffic(
    opcode: str, results: tuple[Array, ...], operands: list[tuple[Array, ...]], body: list[tuple[str, str, str, str]]
) -> int:
    """Return the bytes that an instruction reads and writes; of what it slices or updates in place, only the part."""
    if opcode in _NO_TRAFFIC:
        return 0
    sizes, written = [_bytes(arrays) for arrays in operands], _bytes(results)
    if opcode in _PARTS:
        return 2 * written
    if opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    if not body:
        return sum(sizes) + written
    made = {name: _bytes(_arrays(type_text)) for name, type_text, _, _ in body}
    uses: dict[str, list[tuple[str, int, str]]] = {}  # by name: (opcode, number of the operand, result)
    given: dict[str, list[str]] = {}
    opcodes: dict[str, str] = {}
    for name, _, kind, rest in body:
        given[name], opcodes[name] = _OPERAND.findall(rest.partition(")")[0]), kind
        for position, operand in enumerate(given[name]):
            uses.setdefault(operand, []).append((kind, position, name))

    def read(name: str) -> int:
        """Return the bytes that are read of a value inside of the fusion."""
        total = 0
        for kind, position, result in uses.get(name, []):
            if kind in ("bitcast", "reshape"):
                total += read(result)
            elif kind in _PARTS and position == 0:
                total += made[result]
            elif kind != "dynamic-update-slice" or position != 0:
                return made[name]
        return min(total, made[name])

    def wrote(name: str) -> int:
        if opcodes[name] == "tuple":
            return sum(map(wrote, given[name]))
        if opcodes[name] in ("bitcast", "reshape"):
            return wrote(given[name][0])
        return made.get(given[name][1], 0) if opcodes[name] == "dynamic-update-slice" else made[name]

    return sum(read(name) for name, _, kind, _ in body if kind == "parameter") + wrote(body[-1][0])


def _bytes(arrays: Iterable[Array]) -> int:
    return sum(array.bytes for array in arrays)


def _arrays(type_text: str) -> tuple[Array, ...]:
    return tuple(Array(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(type_text))


def _axes(pattern: re.Pattern[str], rest: str) -> list[str]:
    found = pattern.search(rest)
    return [axis.strip('"') for axis in found[1].split(",") if axis] if found else []


def _source(
    opcode: str, rest: str, operands: list[Source], called: list[Source], given: list[Source], entry: bool
) -> Source:
    """Return what an instruction's result copies: a name, "", or a tuple of these for a tuple result.

    operands: sources of its operands; called: sources of the computations it calls; given: sources of the parameters of
    its own computation. A loop is assumed to pass its parameters through.
    """
    if opcode == "parameter":
        number = int(rest.partition(")")[0])
        named = _NAMED.search(rest)
        if entry:
            return named[1].replace("\\", "") if named else ""
        return given[number] if number < len(given) else ""
    first = operands[0] if operands else ""
    if opcode == "tuple":
        return tuple(operands)
    if opcode == "get-tuple-element":
        index = _INDEX.search(rest)
        return (
            first[int(index[1])]
            if isinstance(first, tuple) and index and int(index[1]) < len(first)
            else (first if isinstance(first, str) else "")
        )
    if opcode == "custom-call":
        return (
            next((each for each in operands if isinstance(each, str) and each), "") if "AsyncCollective" in rest else ""
        )
    if opcode in ("fusion", "call", "async-start") and called:
        return called[-1]
    return first if opcode in _MOVES else ""


def _groups(rest: str) -> tuple[tuple[int, ...], ...]:
    """Return the groups of chips in the text after a collective's opcode; none when all chips are one group."""
    if listed := _GROUPS.search(rest):
        groups = (group for group in re.findall(r"\{([\d,]*)\}", listed[1]) if group)
        return tuple(tuple(int(chip) for chip in group.split(",")) for group in groups)
    if tiled := _TILED.search(rest):
        shape = [int(size) for size in tiled[3].split(",")]
        order = [int(axis) for axis in tiled[4].split(",")] if tiled[4] else range(len(shape))
        chips = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(int(tiled[1]), int(tiled[2]))
        return tuple(map(tuple, chips.tolist()))
    if meshed := _MESHED.search(rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", meshed[1])}
        names, along = list(sizes), re.findall(r"'([^']*)'", meshed[4])
        shape = [int(size) for size in (meshed[2] or str(math.prod(sizes.values()))).split(",")]
        order = [int(axis) for axis in meshed[3].split(",")] if meshed[3] else range(len(shape))
        chips = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(tuple(sizes.values()))
        rest_of = [names.index(name) for name in names if name not in along]
        chips = chips.transpose([*rest_of, *map(names.index, along)])
        return tuple(map(tuple, chips.reshape(-1, math.prod(sizes[name] for name in along)).tolist()))
    return ()


def collectives(program: Iterable[Op]) -> dict[str, dict[str, int]]:
    """Return {kind: {"count", "bytes"}} per chip and program run.

    Bytes are those of the results (all-gather: gathered). The TPU compiler writes a collective that overlaps other work
    into the fusions of that work, once into each, all with one channel and result; it counts once. A reduce-scatter
    written as an all-reduce inside a fusion counts as an all-reduce. Of a transfer between slices, what is received
    counts.
    """
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for kind, each, op in moves(program):
        count[kind] += op.times
        size[kind] += op.times * each
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in COLLECTIVES if count[kind]}


def moves(program: Iterable[Op]) -> Iterator[tuple[str, int, Op]]:
    """Yield (kind, bytes of one run, operation) of every collective, each once, as `collectives` counts them."""
    seen: set[tuple[str, str, tuple[Array, ...]]] = set()
    for op in program:
        kind, step = _kind(op), (op.opcode, op.channel, op.results)
        if not kind or not op.results or (op.channel and step in seen):
            continue
        seen.add(step)
        results = op.results
        if op.between_slices:  # (received, context, token)
            results = op.results[:1]
        elif op.opcode != kind and kind != "all-reduce":  # (operands, results, contexts): results are the larger part
            results = (max(results, key=lambda array: array.bytes),)
        yield kind, sum(array.bytes for array in results), op


def _kind(op: Op) -> str:
    """Return the kind of collective that an instruction is, or ""."""
    if op.between_slices:
        return op.between_slices if op.opcode == "recv" else ""
    kind = op.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else ""


def by_network(program: list[Op], slice_chips: int) -> dict[str, dict[str, dict[str, int]]]:
    """Return `collectives` apart: {"ici": those within slices of `slice_chips` chips, "dcn": those between slices}.

    The chips of a slice are neighbours in the mesh. A collective crosses slices if one of its groups has chips of two.
    """

    def crosses(op: Op) -> bool:
        return bool(op.between_slices) or any(len({chip // slice_chips for chip in group}) > 1 for group in op.groups)

    return {
        "ici": collectives(op for op in program if not crosses(op)),
        "dcn": collectives(op for op in program if crosses(op)),
    }
