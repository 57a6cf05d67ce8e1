"""How long a compiled program takes by the compiler's own estimate, and what the time is spent on.

The TPU compiler notes on every operation of an optimised program how many cycles one run of it takes. Summed over the
operations that run, times how often they run, over the chip's clock, this is the time of the arithmetic and of the
memory traffic that goes with it. Kernels (Pallas) have no estimate; theirs is the roofline of what they compute, move
and do in the vector unit, as if no block of their grid were skipped. The interconnect is not in it: collectives run
beside the arithmetic, and only the cycles that their instructions take of the core count here (`links.py` has the time
that they need).

The GPU compiler makes no estimate. There, every kernel takes the time of its products at the peak of their dtype, of
the bytes that it reads and writes at the memory's bandwidth, or of its other operations, whichever is the longest.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from crab_jax.aot.flops import Kernel
from crab_jax.aot.hlo import COLLECTIVES, Op
from crab_jax.parallel.chips import Chip

# What time is spent on. "base" are the products with the language model's matrices, "lora" all of the low-rank update
# but its dropout bits, "rope" rotations and changes of the layout of heads, "stacks" what loops copy into and out of
# arrays of all layers or micro-batches. "attention" are its products at the rate of a large one; "softmax" is what
# their fusions take beyond that.
PARTS = (
    "base",
    "lora",
    "dropout_bits",
    "attention",
    "softmax",
    "rope",
    "norms",
    "activation",
    "stacks",
    "embedding",
    "loss",
    "encoders",
    "qformers",
    "mask_decoder",
    "collectives",
    "optimizer",
    "other",
)
PASSES = ("forward", "recomputed", "backward")
MODULES = {
    "seg_module": "mask_decoder",
    "clip": "encoders",
    "beats": "encoders",
    "vl_projector": "qformers",
    "al_projector": "qformers",
}
SLIM = 128  # a product with fewer inputs or outputs than this is of a low-rank update or its router
PRODUCT_SHARE = 0.95  # of the peak that a large product reaches, by the compiler's estimate
_BITS = re.compile(r"threefry|random_bits|_bernoulli|_uniform|dropout_bits")
_LOSS = re.compile(r"jvp\(\)|lm_head|logits|text_rows|mask_rows")  # the loss is the only thing outside the model
_FREE = {"parameter", "constant", "broadcast", "bitcast", "reshape", "tuple", "get-tuple-element", "fusion"}
_FREE |= {"dynamic-slice", "dynamic-update-slice", "slice", "gather", "copy", "transpose"}  # only move
_SOFTMAX = {"exp", "sub", "div", "max", "reduce_max", "reduce_sum", "select_n"}


class Spent(NamedTuple):
    """Seconds of one operation over all its runs, by part and pass of the program."""

    part: str
    turn: str
    seconds: float
    op: Op


def spent(program: list[Op], chip: Chip, kernels: Iterable[Kernel] = ()) -> list[Spent]:
    """Return what every operation of an optimised program takes, in no order; those that take nothing are left out."""
    inside: dict[str, list[Op]] = defaultdict(list)
    for op in program:
        if op.owner:
            inside[op.owner].append(op)
    known = {(kernel.name, kernel.results): kernel for kernel in kernels}
    out = []
    for op in program:
        if op.owner:
            continue
        held = inside[op.name]
        seconds = op.times * (op_seconds(op, chip, known) if chip.clock else gpu_seconds(op, held, chip))
        if not seconds:
            continue
        product = max((each for each in (op, *held) if each.product), key=_flops, default=None)
        paths = [each.path for each in (op, *reversed(held)) if "/" in each.path]
        path = product.path if product else paths[0] if paths else ""
        turn, part = pass_of(path), part_of(path, op, product)
        # What is made inside of a product takes what the product would not take without it.
        bits = any(map(_BITS.search, paths))
        extra = "dropout_bits" if bits and part in ("base", "lora") else "softmax" if part == "attention" else ""
        if extra and (product or extra == "dropout_bits"):
            plain = sum(map(_flops, (op, *held))) / chip.flops / PRODUCT_SHARE if product else _moving(op, chip)
            alone = min(seconds, op.times * plain)
            out.append(Spent(extra, turn, seconds - alone, op))
            seconds = alone
        out.append(Spent(part, turn, seconds, op))
    return out


def op_seconds(op: Op, chip: Chip, kernels: dict[tuple[str, tuple[tuple[int, ...], ...]], Kernel]) -> float:
    """Return the seconds of one run of an operation; 0 where nothing is known of it."""
    if op.opcode == "custom-call" and op.target == "tpu_custom_call":
        shapes = tuple(array.shape for array in op.results)
        kernel = next((k for (name, results), k in kernels.items() if name in op.path and results == shapes), None)
        moved = sum(array.bytes for array in (*op.operands, *op.results)) / chip.hbm_bandwidth
        return max(moved, kernel_seconds(kernel, chip)) if kernel else moved
    return op.cycles / chip.clock


def gpu_seconds(op: Op, held: list[Op], chip: Chip) -> float:
    """Return the roofline of one run of a kernel of a GPU: its products, its bytes, or its other operations."""
    products = sum(_flops(each) / (chip.flops * _rate(each)) for each in (op, *held) if each.product and each.operands)
    other = sum(
        math.prod(each.results[0].shape)
        for each in held
        if each.results and not each.product and each.opcode not in _FREE
    )
    return max(products, _moving(op, chip), other / chip.vector_ops)


def _moving(op: Op, chip: Chip) -> float:
    return op.traffic / chip.hbm_bandwidth


def _rate(op: Op) -> float:
    """Return at which share of the bf16 peak a product runs; those of float32 are made in TF32."""
    return {"f32": 0.5, "f64": 0.07, "s8": 2.0}.get(op.operands[0].dtype, 1.0)


def kernel_seconds(kernel: Kernel, chip: Chip) -> float:
    """Return the roofline of one call of a kernel: its products, its bytes, or what its vector operations compute."""
    work = kernel.work
    return max(work.flops / chip.flops, work.bytes / chip.hbm_bandwidth, kernel.vector / chip.vector_ops)


def _flops(op: Op) -> float:
    return op.product.flops if op.product else 0.0


def pass_of(path: str) -> str:
    """Return "recomputed" or "backward" for operations of these, "forward" for all others."""
    if "rematted_computation" in path:
        return "recomputed"
    return "backward" if "transpose(" in path else "forward"


def part_of(path: str, op: Op, product: Op | None) -> str:
    """Return which of PARTS an operation belongs to, from JAX's name of it and from the product that it holds."""
    kind = op.opcode.removesuffix("-start").removesuffix("-done")
    if kind in COLLECTIVES or "async_collective" in op.name or "async-collective" in op.name:
        return "collectives"
    if _BITS.search(path):
        return "dropout_bits"
    for module, part in MODULES.items():
        if re.search(rf"\b{module}\b", path):
            return part
    if "_proj" in path or re.search(r"\b(qkv|o|gate_up|down)\b/", path):
        if product is None or product.product is None:
            return "lora"
        sizes = [product.product.inner, product.product.columns]
        # The gradient of a low-rank matrix has its rank as rows; few rows forwards are few tokens.
        sizes += [product.product.rows] if pass_of(path) == "backward" else []
        return "lora" if min(sizes) < SLIM else "base"
    if "self_attn" in path or "bkgln" in path:
        if product or op.target:
            return "attention"
        return "softmax" if path.rpartition("/")[2] in _SOFTMAX else "rope"
    if _LOSS.search(path):
        return "loss"
    if "layernorm" in path or re.search(r"\bnorm\b", path):
        return "norms"
    if "embed_tokens" in path:
        return "embedding"
    if "mlp" in path:
        return "activation"
    if re.search(r"dynamic_(update_)?(slice|index_in_dim)", path):
        return "stacks"
    if path.startswith("jit(step)") and "jvp(" not in path:
        return "optimizer"
    return "other"


def by_part(times: list[Spent]) -> dict[str, float]:
    """Return {part: seconds} in the order of PARTS, without those that take nothing."""
    sums = {part: sum(each.seconds for each in times if each.part == part) for part in PARTS}
    return {part: seconds for part, seconds in sums.items() if seconds}


def less(times: list[Spent], fewer: list[Spent]) -> list[Spent]:
    """Return what a program takes more than with fewer turns of its loops, operation by operation."""
    before = {(each.op.name, each.part): each.seconds for each in fewer}
    differences = [each._replace(seconds=each.seconds - before.get((each.op.name, each.part), 0.0)) for each in times]
    return [each for each in differences if each.seconds]


def kernels_run(program: list[Op]) -> int:
    """Return how many kernels a run of a GPU's program starts, those of collectives apart."""
    return sum(op.times for op in program if op.traffic)


def traffic_by_part(times: list[Spent]) -> dict[str, int]:
    """Return {part: bytes that a GPU's kernels read and write} in the order of PARTS."""
    owners = {each.op.name: each for each in times}  # the last, where the time of a kernel is in two parts
    sums = {part: sum(e.op.times * e.op.traffic for e in owners.values() if e.part == part) for part in PARTS}
    return {part: size for part, size in sums.items() if size}


def by_pass(times: list[Spent]) -> dict[str, float]:
    """Return {pass: seconds} in the order of PASSES."""
    return {turn: sum(each.seconds for each in times if each.turn == turn) for turn in PASSES}
