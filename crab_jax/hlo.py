"""Reading compiled programs (HLO text): what runs how often, which collectives move how much.

A scanned layer stands in the text once, as the body of a while loop; here it counts as often as it runs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
               "ragged-all-to-all")
# Bits per element of the types in HLO text.
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32,
        "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128}

_ARRAY = re.compile(r"\b(" + "|".join(BITS) + r")\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OP = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


class Array(NamedTuple):
    """Element type as HLO writes it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without layout padding."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class Op(NamedTuple):
    """One instruction. `times`: runs per program run. `fused`: inside a fusion, so its result is no buffer."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    times: int
    fused: bool


def _split(definition: str) -> tuple[str, str, str]:
    """(type, opcode, rest) of the text after `name = `."""
    end = definition.find(" ")
    if definition.startswith("("):
        depth = list(itertools.accumulate((letter == "(") - (letter == ")") for letter in definition))
        end = depth.index(0) + 1
    opcode, _, rest = definition[end:].strip().partition("(")
    return definition[:end], opcode, rest


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str, str]]], str]:
    """({computation: [(name, type, opcode, rest)]}, name of the entry)."""
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
    return out, entry


def trip_count(condition: list[tuple[str, str, str, str]], rest: str) -> int:
    """How often a while loop runs: as the compiler noted it, else the constant its condition compares with, else 1."""
    known = _TRIPS.search(rest)
    if known:
        return int(known[1])
    constants = [int(found[1]) for _, _, opcode, rest in condition if opcode == "constant"
                 and (found := re.match(r"(\d+)\)", rest))]
    return max(constants, default=1)


def ops(text: str) -> list[Op]:
    """Every instruction of a program that runs, with how often it does."""
    found, entry = _computations(text)
    out: list[Op] = []

    def visit(computation: str, times: int, fused: bool) -> None:
        for name, type_text, opcode, rest in found.get(computation, ()):
            arrays = tuple(Array(kind, tuple(int(n) for n in dims.split(",") if n))
                           for kind, dims in _ARRAY.findall(type_text))
            out.append(Op(name, opcode, arrays, times, fused))
            called = set(_CALLED.findall(rest))
            for names in _CALLED_LISTS.findall(rest):
                called |= {part.strip().lstrip("%") for part in names.split(",")}
            within = times
            if opcode == "while":
                condition = re.search(r"condition=%?([\w.\-]+)", rest)
                within *= trip_count(found.get(condition[1], []) if condition else [], rest)
            for inner in called:
                visit(inner, within, fused or opcode not in ("while", "conditional", "call", "async-start"))

    visit(entry, 1, False)
    return out


def collectives(program: list[Op]) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} per chip and program run. Bytes are those of the results (all-gather: gathered).

    A reduce-scatter that the TPU compiler writes as an all-reduce inside a fusion counts as an all-reduce.
    """
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for op in program:
        kind = op.opcode.removesuffix("-start")
        if kind not in COLLECTIVES or not op.results:
            continue
        results = op.results
        if op.opcode != kind and kind != "all-reduce":  # (operands, results, contexts): results are the larger half
            results = (max(results, key=lambda array: array.bytes),)
        count[kind] += op.times
        size[kind] += op.times * sum(array.bytes for array in results)
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in COLLECTIVES if count[kind]}
