"""Compile a stage's step for a TPU slice, on a machine without a TPU, and report its memory and cost.

    python -m crab_jax.compile --config=configs/finetune.py --topology=v5e:16x16 --budget
    python -m crab_jax.compile --config=configs/finetune.py --topology=v6e:4x4 --config.mesh.fsdp=16 --json out.json
    python -m crab_jax.compile --config=configs/finetune.py --topology=v5e:8x8 --sweep
    python -m crab_jax.compile --config=configs/finetune.py --topology=v5p:2x2x4 --stage decode
    python -m crab_jax.compile --config=configs/finetune.py --topology=v5e:16x16 --slices=2 --json out.json
    python -m crab_jax.compile --config=configs/finetune.py --topology=v5e:16x16 --stage llm --thorough

Needs libtpu (pip install -e '.[tpu]') and no weights. Any config key can be overridden with --config.key=value. The
largest bucket of the config is compiled unless --bucket or --mix is given. With --budget the exit code is 3 when the
step does not fit or leaves less than 15 % of the memory free. The compiler spends little time on the speed of single
operations, because nothing will run: this takes a tenth of the time and changes neither shardings nor collectives. With
--thorough it optimises as it does for a run, and the report has its own estimate of the time, by what it is spent on.
--stage llm is the training step of the language model alone: its LoRA trains on text of the bucket's length. --stage
prefill and decode are what evaluate and predict run on one host, with --weights as there; the estimate of decode is
that of one token. With --slices, the program runs on several slices of the topology, and collectives are reported by
network: within a slice (ICI), and between slices over the data centre's network (DCN).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crab_jax import optim
from crab_jax.aot import cost, flops, gpu, hlo, links
from crab_jax.config import MeshConfig, RunConfig, parse_flags
from crab_jax.generate import GenerateOptions, advance, start
from crab_jax.io import bounds
from crab_jax.io.bounds import PATH, Whole
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import out_file, write_whole
from crab_jax.io.paths import at
from crab_jax.models.crab import PARAMETER_GROUPS
from crab_jax.models.generating import KINDS
from crab_jax.parallel import chips, sharding, torus
from crab_jax.runs import run_data, run_mesh, run_params
from crab_jax.training import train_step
from crab_jax.training.step_programs import abstract_batch
from data_pipelines.batching import Batch, Bucket

HEADROOM = 0.15
NEW_TOKENS = 256  # room for the answer in the cache of prefill and decode
REPORT_KEYS = (
    "topology",
    "chips",
    "fits",
    "hbm_bytes",
    "argument_bytes",
    "temporary_bytes",
    "peak_bytes",
    "compile_s",
    "compile_cpu_s",
    "model_flops_per_chip",
    "collectives",
    "slices",
    "roofline_s",
    "estimate_s",
    "estimate",
    "mfu_4n",
    "kernels",
    "traffic",
)  # of the report that --json writes
SMALL = 2**16  # elements; copies of smaller matrices are harmless
ROWS = 16  # of a batch in prefill and decode, as `evaluate` has by default
STAGES = ("train", "llm", "prefill", "decode")

Compiled = Any  # jax.stages.Compiled, which has no public name to annotate with


# --- programs ---------------------------------------------------------------------------------------------------------


def topology_devices(name: str, thorough: bool = False, slices: int = 1) -> list[Any]:
    """Return the devices of a topology such as v5e:16x16, v5p:2x2x4 or h200:8, on any machine with their compiler.

    thorough: as the command line option. slices: how many slices of this topology. Raises InputError for an unknown
    topology or without the compiler (libtpu, JAX's plug-in for CUDA).
    """
    generation, count = chips.chips_of(name)
    card = next((gpu for gpu in chips.GPUS if gpu.name == generation), None)
    if card is not None:
        if slices > 1:
            raise InputError("command line", "--slices", "is for TPUs", f"give {generation}:{chips.NODE * slices}")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)
        return gpu.devices(card, count)
    # libtpu asks for these where it would otherwise look for a TPU machine; the type counts cores on v4 and v5p.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["TPU_ACCELERATOR_TYPE"] = {
        "v4": f"v4-{2 * count}",
        "v5p": f"v5p-{2 * count}",
        "v5e": f"v5litepod-{count}",
        "v6e": f"v6e-{count}",
    }[generation]
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs, so two processes may compile side by side
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # its entries cannot be read back without a TPU
    jax.config.update("jax_exec_time_optimization_effort", 0.0 if thorough else -1.0)

    from jax.experimental.topologies import get_topology_desc

    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if count == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slices > 1:
        options["num_slices"] = slices
    try:
        return get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except ModuleNotFoundError as error:
        raise InputError("libtpu", "", "is not installed", "pip install -e '.[tpu]'") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        if "libtpu" in reason.lower() or "unknown backend" in reason.lower():
            problem = f"cannot be loaded ({reason[:200]})"
            raise InputError("libtpu", "", problem, "pip install -e '.[tpu]'") from error
        raise InputError(
            "command line",
            "--topology",
            f"{name!r} is refused ({reason[:200]})",
            "give a shape that this chip is sold in",
        ) from error


def frame_counts(config: RunConfig) -> list[int]:
    """Return how many frames clips have: those of every prepared data root of the run, or `data.video_frames`."""
    drawn, usual = config.mixture, config.data.video_frames
    roots = [root for root in drawn.roots or (drawn.root,) if root and at(root).exists()]
    return sorted({run_data.own_frames(root) or usual for root in roots} or {usual})


def largest_bucket(config: RunConfig) -> Bucket:
    """Return a bucket at least as large as every bucket of a stage in every size."""
    return Bucket(max(config.data.lengths), max(frame_counts(config)), 10, 198, 1)


def bucket_mix(config: RunConfig) -> list[Bucket]:
    """Return the buckets that the released tasks fall into.

    These are clips with sound (1-s and 2-s windows) and images with sound, with and without a mask, at the shortest
    length that leaves 128 positions for text.
    """
    data = config.data
    clips = [(frames, *rest) for frames in frame_counts(config) for rest in ((10, 198, 0), (10, 98, 0), (10, 98, 1))]
    kinds = (*clips, (1, 10, 98, 0), (1, 1, 98, 1))
    out = []
    for t, s, f, m in kinds:
        needed = t * data.visual_queries + s * data.audio_queries + 128
        fitting = [length for length in data.lengths if length >= needed]
        out.append(Bucket(min(fitting, default=max(data.lengths)), t, s, f, m))
    return list(dict.fromkeys(out))


def abstract_params(config: RunConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Return the (trainable, frozen) parameters of a run as shapes with shardings, for lowering."""
    wanted = run_params.wanted_params(config, config.model.build(), mesh)
    return optim.split(wanted, config.trainable, config.frozen)


def abstract_state(config: RunConfig, mesh: Mesh) -> tuple[train_step.TrainState, Any]:
    """Return (train state, frozen parameters) at the start of a run, as shapes with shardings."""
    trainable, frozen = abstract_params(config, mesh)
    return train_step.abstract_state(optim.optimizer(config.optim, config.steps), trainable, mesh), frozen


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile: the jitted function, its argument shapes on the mesh, and the same work on one chip.

    own: returns (function, argument shapes) of one data-parallel chip, for counting FLOPs; its argument `remat` says
    whether to include recomputation.
    """

    jitted: Any
    args: tuple[Any, ...]
    own: Callable[[bool], tuple[Callable[..., Any], tuple[Any, ...]]]
    rows: int
    accumulate: int = 1
    remat: str = ""


def train_program(config: RunConfig, mesh: Mesh, bucket: Bucket) -> Program:
    """Return the train step that crab_jax/train.py runs."""
    state, frozen = abstract_state(config, mesh)
    sizes, accumulate = run_mesh.fitted(config, mesh)
    config = dataclasses.replace(config, model=sizes)
    tx = optim.optimizer(config.optim, config.steps)
    batch = abstract_batch(bucket, config.mixture.batch_size, config.data.image_size, sharding.batch_sharding(mesh))

    def own(remat: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        alone = _micro_batches(config, accumulate)
        if not remat:
            alone = _remat(alone, "none")
        single = sharding.make_mesh(1, 1, 1, mesh.devices.flat[:1])
        rows = config.mixture.batch_size // sharding.row_groups(mesh)
        state, frozen = abstract_state(alone, single)
        step = train_step.compile_step(alone, alone.model.build(), single, state, tx, accumulate)
        alone_batch = abstract_batch(bucket, rows, config.data.image_size, sharding.batch_sharding(single))
        return inspect.unwrap(step), (state, frozen, alone_batch)

    if not any(bucket[1:3]) and not bucket.masks:
        frozen = {"llama": frozen["llama"]}  # the only module that text needs
    jitted = train_step.compile_step(config, config.model.build(), mesh, state, tx, accumulate)
    return Program(jitted, (state, frozen, batch), own, config.mixture.batch_size, accumulate, config.model.llama.remat)


def language_model(config: RunConfig) -> RunConfig:
    """Return the config whose only trained parameters are those of the language model's LoRA."""
    rest = (patterns for name, patterns in PARAMETER_GROUPS.items() if name != "lora")
    frozen = tuple(itertools.chain.from_iterable(rest))
    return dataclasses.replace(config, trainable=PARAMETER_GROUPS["lora"], frozen=frozen)


@dataclasses.dataclass(frozen=True)
class Serving:
    """How `evaluate` and `predict` run a model: the kind of its matrices, and the rows of a batch."""

    weights: str = "float"
    rows: int = ROWS


def serve_program(config: RunConfig, mesh: Mesh, bucket: Bucket, stage: str, serving: Serving) -> Program:
    """Return a program of crab_jax/generate.py as `evaluate` runs it: reading prompts, or decoding greedily.

    As there, clips are encoded already, and a model that is not split over devices has the layout for generation. The
    loop of decode steps is that of a stream: as long as it is told, with a donated state.
    """
    bucket = bucket._replace(masks=0)
    options = GenerateOptions(eos_id=2, pad_id=0, mask_ids=tuple(range(3, 9)), max_new_tokens=NEW_TOKENS)

    def of(mesh: Mesh, rows: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        model, params = serving_params(config, mesh, serving.weights)
        spread = sharding.batch_sharding(mesh)
        batch, cfg = abstract_batch(bucket, rows, config.data.image_size, spread), config.model
        found = bucket.frames * cfg.visual_queries + bucket.windows * cfg.audio_queries
        features = jax.ShapeDtypeStruct((rows, found, cfg.llama.hidden), cfg.dtype, sharding=spread)

        def read(params: Any, batch: Batch, features: Any) -> Any:
            with sharding.constrained(mesh):
                return start(model, params, batch, options, features=features)

        def decode(params: Any, state: Any, until: Any) -> Any:
            with sharding.constrained(mesh):
                return advance(model, params, state, options, until)

        if stage == "prefill":
            return read, (params, batch, features)
        state = _on_rows(jax.eval_shape(read, params, batch, features), mesh, rows)
        return decode, (params, state, jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh)))

    def own(remat: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return of(sharding.make_mesh(1, 1, 1, mesh.devices.flat[:1]), serving.rows // sharding.row_groups(mesh))

    function, args = of(mesh, serving.rows)
    return Program(jax.jit(function, donate_argnums=() if stage == "prefill" else 1), args, own, serving.rows)


def serving_params(config: RunConfig, mesh: Mesh, weights: str) -> tuple[Any, Any]:
    """Return (model, shapes of its parameters with shardings) as `run_params.load_model` has them on a mesh."""
    model, params = config.model.build(), optim.merge(*abstract_params(config, mesh))
    if mesh.shape["tensor"] > 1:
        return model, params
    fused: list[Any] = []

    def fuse(params: Any) -> Any:
        made, laid_out = model.for_generation(params, weights)
        fused.append(made)
        return laid_out

    everywhere, shapes = sharding.replicated(mesh), jax.eval_shape(fuse, params)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)
    return fused[-1], placed


def _on_rows(state: Any, mesh: Mesh, rows: int) -> Any:
    """Return the shapes of a state of generation with its rows over the copies, and heads of caches over `tensor`."""

    def placed(leaf: Any) -> Any:
        axis = next((axis for axis in (0, 1) if leaf.ndim > axis and leaf.shape[axis] == rows), None)
        heads = ("tensor",) if leaf.ndim > 3 + (axis or 0) and axis is not None and mesh.shape["tensor"] > 1 else ()
        spec = () if axis is None else ((None,) * axis + (sharding.row_axes(mesh), *heads))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(placed, state)


def program_of(config: RunConfig, mesh: Mesh, bucket: Bucket, stage: str, serving: Serving = Serving()) -> Program:
    """Return the program of one of STAGES; `serving` is of "prefill" and "decode"."""
    if stage == "llm":
        return train_program(language_model(config), mesh, _text_alone(bucket))
    if stage == "train":
        return train_program(config, mesh, bucket)
    return serve_program(config, mesh, bucket, stage, serving)


def _text_alone(bucket: Bucket) -> Bucket:
    return bucket._replace(frames=0, windows=0, masks=0)


def mesh_for(config: RunConfig, devices: list[Any], stage: str, serving: Serving = Serving()) -> Mesh:
    """Return the mesh of a stage: that of the config, or for prefill and decode that of `evaluate` on one process.

    There, `mesh.tensor` of more than 1 is what `--tensor` says, and the devices are those of the first host.
    """
    if stage in ("train", "llm"):
        return run_mesh.mesh_of(config, devices)
    own = [device for device in devices if device.process_index == devices[0].process_index]
    tensor = config.mesh.tensor if config.mesh.tensor > 1 else 0
    return run_mesh.serving_mesh(config, serving.weights, serving.rows, tensor, own)


# --- reports ----------------------------------------------------------------------------------------------------------


def measure(
    config: RunConfig,
    topology: str,
    devices: list[Any],
    bucket: Bucket,
    stage: str,
    thorough: bool = False,
    serving: Serving = Serving(),
) -> tuple[dict[str, Any], Compiled | None]:
    """Return (report of one compilation, see `main`; compiled program, or None when it does not fit).

    thorough: `devices` were made so, and the compiler's estimate of the time is part of the report.
    """
    chip = chips.chip_of(devices[0])
    assert chip is not None
    mesh = mesh_for(config, devices, stage, serving)
    devices = list(mesh.devices.flat)
    bucket = _text_alone(bucket) if stage == "llm" else bucket
    program = program_of(config, mesh, bucket, stage, serving)
    tensor = mesh.shape["tensor"]
    say(f"{topology} {stage}: counting arithmetic")
    useful, done = (flops.count(function, *args) for function, args in map(program.own, (False, True)))
    report: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices),
        "slices": mesh.shape.get(sharding.SLICES, 1),
        "stage": stage,
        "mesh": dict(mesh.shape),
        "bucket": bucket._asdict(),
        "rows": program.rows,
        "weights": serving.weights if stage in ("prefill", "decode") else "",
        "accumulate": program.accumulate,
        "remat": program.remat,
        "hbm_bytes": chip.hbm_bytes,
        "model_flops_per_chip": useful.flops / tensor,
        "flops_per_chip": done.flops / tensor,
    }
    logical = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(program.args))
    say(f"{topology} {stage}: lowering")
    started = time.monotonic()
    traced = program.jitted.trace(*program.args)
    card = devices[0].platform == "gpu"
    lowered = traced.lower(lowering_platforms=("cuda",)) if card else traced.lower()
    report["lower_s"] = time.monotonic() - started
    say(f"{topology} {stage}: compiling (a minute or more)")
    started, busy = time.monotonic(), time.process_time()

    def compile_times() -> dict[str, float]:
        return {"compile_s": time.monotonic() - started, "compile_cpu_s": time.process_time() - busy}

    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        need = _out_of_memory(str(error))
        if need is None:
            raise
        return report | compile_times() | {
            "fits": False,
            "argument_bytes": logical,
            "temporary_bytes": max(0, need - logical),
            "peak_bytes": need,
            "collectives": {},
            "networks": {"ici": {}, "dcn": {}},
            "largest": _largest(str(error)),
            "headroom": 1 - need / chip.hbm_bytes,
        }, None
    report |= compile_times()
    memory = compiled.memory_analysis()
    # XLA's own peak may lie below this sum; the sum is the safe estimate.
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    program_ops = hlo.ops(compiled.as_text())
    each = min(len(devices), chips.NODE) if card else len(devices) // report["slices"]
    networks = hlo.by_network(program_ops, each)
    linked = links.seconds(program_ops, mesh, chip, each)
    work = flops.Work(done.flops / tensor, done.bytes / tensor)
    times = flops.roofline(chip, work, sum(linked.values()), networks["dcn"] if each < len(devices) else None)
    llama = config.model.llama
    if thorough or card:
        spent = cost.spent(program_ops, chip, flops.kernels(traced.jaxpr.jaxpr))
        if stage == "decode":  # a token is what a second turn of the loop adds
            spent = cost.less(cost.spent(hlo.ops(compiled.as_text(), turns=2), chip), spent)
        report |= estimate(config, spent, chip, program.rows * tokens_of(bucket, stage) / len(devices))
        if card:
            report |= {"kernels": cost.kernels_run(program_ops), "traffic": cost.traffic_by_part(spent)}
    return report | {
        "fits": peak <= chip.hbm_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "xla_peak_bytes": memory.peak_memory_in_bytes,
        "peak_bytes": peak,
        "headroom": 1 - peak / chip.hbm_bytes,
        "collectives": hlo.collectives(program_ops),
        "networks": networks,
        "roofline_s": times,
        "interconnect_s": linked,
        "findings": findings(config, mesh, program_ops),
        "mfu_bound": useful.flops / tensor / chip.flops / times["step"],
        "padding": {
            "arguments": max(0.0, 1 - logical / max(1, memory.argument_size_in_bytes)),
            "vocabulary": 1 - llama.vocab_size / llama.padded_vocab,
        },
    }, compiled


def tokens_of(bucket: Bucket, stage: str) -> int:
    """Return how many tokens of a row a program reads."""
    return 1 if stage == "decode" else bucket.length


def estimate(config: RunConfig, spent: list[cost.Spent], chip: chips.Chip, tokens: float) -> dict[str, Any]:
    """Return the compiler's estimate of a program that reads `tokens` tokens a chip: seconds by part and by pass.

    "mfu_4n" is the share of the peak that 4 FLOP (forwards alone 2) for each token and parameter of the language model,
    LoRA apart, would take of these seconds: that of a frozen model through which gradients flow.
    """
    shapes = nn.unbox(run_params.abstract_params(config.model.build()))["llama"]
    number = sum(leaf.size for path, leaf in traverse_util.flatten_dict(shapes).items() if "lora_" not in path[-1])
    parts, turns = cost.by_part(spent), cost.by_pass(spent)
    total = sum(parts.values())
    passes = 4 if turns["backward"] else 2
    return {
        "estimate_s": total,
        "estimate": parts,
        "passes": turns,
        "mfu_4n": passes * number * tokens / chip.flops / total if total else 0.0,
    }


def findings(config: RunConfig, mesh: Mesh, program: list[hlo.Op]) -> list[str]:
    """Return the faults of a compiled sharded step.

    Faults are gathering logits, gathering a whole stack of frozen matrices, and keeping a frozen matrix in float32.
    Fused conversions are not copies; matrices of less than SMALL elements do not matter.
    """
    _, frozen = abstract_params(config, mesh)
    vocab = config.model.llama.padded_vocab
    matrices: dict[str, Any] = {}  # by JAX's names of the step's arguments
    for path, leaf in jax.tree_util.tree_flatten_with_path(frozen)[0]:
        if str(path[-1].key).endswith(("kernel", "embedding")) and leaf.size >= SMALL:
            matrices["frozen" + jax.tree_util.keystr(path)] = leaf
    out = set()
    for op in program:
        if op.opcode in ("parameter", "tuple", "get-tuple-element", "bitcast", "while"):
            continue
        leaf, gathers = matrices.get(op.source), op.opcode.startswith("all-gather")
        for array in op.results:
            if gathers and array.dtype == "f32" and vocab in array.shape:
                out.add(f"gathers logits {array.shape}")
            if leaf is None:
                continue
            size = math.prod(array.shape)
            if gathers and "['layers']" in op.source and leaf.shape[0] > 1 and size == leaf.size:
                out.add(f"gathers all layers of {op.source} {array.shape}")
            if array.dtype == "f32" and not op.fused and size >= SMALL:
                out.add(f"keeps {op.source} {array.shape} in float32 ({op.opcode})")
    return sorted(out)


def _out_of_memory(message: str) -> int | None:
    """Return the bytes that a program would need, from the compiler's out-of-memory error; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message and "hbm" not in message.lower():
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    amount = re.search(r"Used ([\d.]+)([KMGT]) of", message) or re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
    return int(float(amount[1]) * units[amount[2]]) if amount else 0


def _largest(message: str) -> list[str]:
    """Return the largest allocations that an out-of-memory error lists: size, shape and operation."""
    allocations = re.findall(r"Size: ([\d.]+[KMG])\s+(?:Operator: (.*)\s+)?Shape: (\S+)", message)
    return [
        " ".join((size, shape, *re.findall(r'op_name="([^"]*)"', operator))) for size, operator, shape in allocations
    ]


def say(what: str) -> None:
    """Print a line of progress on stderr; stdout holds only the report."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def gib(size: float) -> str:
    """Format bytes as GiB."""
    return f"{size / chips.GIB:.2f} GiB"


def text(report: dict[str, Any]) -> str:
    """Format a report as text."""
    mesh = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
    bucket = ", ".join(f"{name} {size}" for name, size in report["bucket"].items())
    several = report["slices"] > 1
    where = f"{report['slices']} slices of {report['topology']}" if several else report["topology"]
    rows = [
        f"{where}: {report['chips']} chips, {report['stage']}, mesh {mesh}",
        f"batch {report['rows']} rows in {report['accumulate']} micro-batches, remat {report['remat']}; {bucket}",
        f"compiled in {report['compile_s']:.0f} s (lowered in {report['lower_s']:.0f} s)",
        f"arguments    {gib(report['argument_bytes'])}",
        f"temporaries  {gib(report['temporary_bytes'])}",
        f"peak         {gib(report['peak_bytes'])} of {gib(report['hbm_bytes'])}, headroom {report['headroom']:.0%}",
    ]
    if "roofline_s" not in report:
        return "\n".join([*rows, "does not fit; the largest allocations:", *report["largest"]])
    apart = report["networks"] if several else {"": report["collectives"]}
    rows += [
        f"{f'{network} {kind}'.strip():<21}{moves['count']:>7}, together {gib(moves['bytes'])}"
        for network, kinds in apart.items()
        for kind, moves in kinds.items()
    ]
    times = report["roofline_s"]
    return "\n".join(
        [
            *rows,
            f"model FLOPs  {report['model_flops_per_chip']:.3e} per chip, {report['flops_per_chip']:.3e} with "
            "recomputation",
            "at least     "
            + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in times.items())
            + f"; model FLOP utilisation at most {report['mfu_bound']:.0%}",
            f"padding      {report['padding']['arguments']:.1%} of the arguments, "
            f"{report['padding']['vocabulary']:.1%} of the vocabulary",
            *estimate_lines(report),
            *(f"WARNING      {finding}" for finding in report["findings"]),
        ]
    )


def estimate_lines(report: dict[str, Any]) -> list[str]:
    """Format the compiler's estimate of a report, if it has one."""
    total = report.get("estimate_s")
    if not total:
        return []
    passes = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in report["passes"].items())
    source = f"of {report['kernels']:,} kernels" if "kernels" in report else "by the compiler"
    traffic = report.get("traffic", {})
    return [
        f"estimate     {total:.4g} s {source}, {report['mfu_4n']:.0%} MFU at 4 N; {passes}",
        *(
            f"  {part:<19}{seconds:.6f} s {seconds / total:>6.1%}"
            + (f", {gib(traffic[part])} of memory traffic" if part in traffic else "")
            for part, seconds in sorted(report["estimate"].items(), key=lambda item: -item[1])
        ),
    ]


class Trial(NamedTuple):
    """What a sweep may compile, with the least seconds that it takes: by arithmetic, memory traffic or gathers."""

    seconds: float
    accumulate: int
    tensor: int
    fsdp: int
    remat: str


def sweep(config: RunConfig, topology: str, devices: list[Any], bucket: Bucket) -> list[dict[str, Any]]:
    """Return the reports of the train step over mesh shapes, micro-batches and remat policies, fastest roofline first.

    What could be the fastest is tried first; once all that is left takes as long as the best step so far by its
    arithmetic, its memory traffic or its gathers, nothing more is compiled. More micro-batches of a step that fits are
    not tried, because they gather more often.
    """
    say(f"{topology}: counting arithmetic")
    found = trials(config, devices, bucket)
    fitting: list[dict[str, Any]] = []
    done: set[tuple[int, int, str]] = set()
    started = time.monotonic()
    for number, trial in enumerate(found):
        if fitting and trial.seconds >= min(report["roofline_s"]["step"] for report in fitting):
            print(
                f"{len(found) - number} of {len(found)} are not compiled: they take {trial.seconds:.3f} s or more by "
                "their arithmetic, memory traffic or gathers",
                flush=True,
            )
            break
        if trial[2:] in done:
            continue
        report, _ = measure(_with(config, devices, trial), topology, devices, bucket, "train")
        if report["fits"] and report["headroom"] >= HEADROOM:
            fitting.append(report)
            done.add(trial[2:])
        passed = time.monotonic() - started
        print(
            f"{number + 1}/{len(found)}  fsdp {trial.fsdp}  tensor {trial.tensor}  remat {trial.remat}  "
            f"micro-batches {trial.accumulate}  {'fits' if report['fits'] else 'does not fit'}  "
            f"eta at most {passed / (number + 1) * (len(found) - number - 1) / 60:.1f} min",
            flush=True,
        )
    return sorted(fitting, key=lambda r: (r["roofline_s"]["step"], sum(r["roofline_s"].values())))


def trials(config: RunConfig, devices: list[Any], bucket: Bucket) -> list[Trial]:
    """Return every mesh, remat policy and number of micro-batches that a sweep considers, fastest first."""
    chip = chips.chip_of(devices[0])
    assert chip is not None
    llama, batch = config.model.llama, config.mixture.batch_size
    least = run_mesh.mesh_of(config, devices).shape["fsdp"]
    slices = sharding.slices_of(devices, config.mesh.slices)
    each = len(slices[0])
    shapes = nn.unbox(run_params.abstract_params(config.model.build()))["llama"]
    gathered = 2 * run_params.count(shapes) * jnp.dtype(config.frozen_dtype).itemsize  # forwards and backwards
    out = []
    for tensor, remat in itertools.product((1, 2, 4), run_mesh.POLICIES):
        rows = batch * tensor // len(devices)
        if llama.kv_heads % tensor or each % tensor or batch * tensor % len(devices):
            continue
        work = flops.Work()
        for fsdp in sorted({least, 2 * least, 4 * least, each // tensor}):
            if each % (fsdp * tensor):
                continue
            for accumulate in (n for n in (1, 2, 4, 8) if rows % n == 0):
                trial = Trial(0.0, accumulate, tensor, fsdp, remat)
                kept = run_mesh.kept_bytes(llama, bucket.length, remat)
                if kept * rows // accumulate > chip.hbm_bytes * tensor:
                    continue
                if not work.flops:
                    alone = _with(config, devices, trial)
                    function, args = train_program(alone, run_mesh.mesh_of(alone, devices), bucket).own(True)
                    work = flops.Work(*(amount / tensor for amount in flops.count(function, *args)))
                lanes = torus.split_lanes(slices[0], fsdp, tensor)
                link = lanes * chip.link_bandwidth if lanes else chip.ici_bandwidth
                moving = accumulate * gathered / tensor * (fsdp - 1) / fsdp / link
                out.append(trial._replace(seconds=flops.roofline(chip, work, moving)["step"]))
    return sorted(out)


def _with(config: RunConfig, devices: list[Any], trial: Trial) -> RunConfig:
    """Return the config with the mesh, the remat policy and the micro-batches of a trial."""
    fsdp, tensor = trial.fsdp, trial.tensor
    mesh = MeshConfig(len(devices) // (fsdp * tensor), fsdp, tensor, config.mesh.slices)
    return _micro_batches(_remat(dataclasses.replace(config, mesh=mesh), trial.remat), trial.accumulate)


def _remat(config: RunConfig, policy: str) -> RunConfig:
    return dataclasses.replace(config, model=run_mesh.with_remat(config.model, policy))


def _micro_batches(config: RunConfig, accumulate: int) -> RunConfig:
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=accumulate))


def table(reports: list[dict[str, Any]]) -> str:
    """Format reports as a Markdown table, one row each."""
    head = (
        "| topology | stage | mesh d x f x t | rows/chip x micro | remat | args GiB | temp GiB | peak / HBM GiB "
        "| headroom | collectives GiB | roofline s | compile s | of one core |\n|" + "---|" * 13
    )
    return "\n".join([head, *map(table_row, reports)])


def table_row(report: dict[str, Any]) -> str:
    """Format one row of `table`."""
    mesh = report["mesh"]
    each = report["rows"] / (report.get("slices", 1) * mesh["data"] * mesh["fsdp"] * report["accumulate"])
    moved = sum(kind["bytes"] for kind in report["collectives"].values()) / chips.GIB
    seconds = f"{report['roofline_s']['step']:.3f}" if "roofline_s" in report else "-"
    sizes = [report[name] / chips.GIB for name in ("argument_bytes", "temporary_bytes", "peak_bytes", "hbm_bytes")]
    return (
        f"| {report['topology']} | {report['stage']} | {mesh['data']} x {mesh['fsdp']} x {mesh['tensor']} "
        f"| {each:g} x {report['accumulate']} | {report['remat']} | {sizes[0]:.2f} | {sizes[1]:.2f} "
        f"| {sizes[2]:.2f} / {sizes[3]:.2f} | {report['headroom']:.0%} | {moved:.1f} | {seconds} "
        f"| {report['compile_s']:.0f} | {report['compile_cpu_s']:.0f} |"
    )


# --- the verb ---------------------------------------------------------------------------------------------------------


def command_line() -> CommandLine:
    """Return the parser of all flags except --config.key=value."""
    parser = CommandLine(__doc__, "python -m crab_jax.compile")
    parser.add_argument("--config", type=PATH, required=True, metavar="FILE", help="configs/<stage>.py")
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5e:16x16, v5p:2x2x4, h200:8, ...")
    parser.add_argument("--slices", type=Whole(1, 1024), metavar="N", help="so many slices of this topology")
    parser.add_argument("--stage", choices=STAGES, default="train")
    parser.add_argument(
        "--bucket",
        action="append",
        type=_bucket,
        default=[],
        metavar="L,T,S,F,M",
        help="text length, frames, audio windows, fbank frames, masks; may be repeated",
    )
    parser.add_argument("--weights", choices=KINDS, default="float", help="of prefill and decode, as in evaluate")
    parser.add_argument("--rows", type=Whole(1, 2**16), default=ROWS, help="a batch of prefill and decode (default 16)")
    parser.add_argument("--mix", action="store_true", help="all buckets that the released tasks fall into")
    parser.add_argument("--budget", action="store_true", help="exit 3 unless it fits with 15 %% headroom")
    parser.add_argument("--sweep", action="store_true", help="try meshes, micro-batches and remat; print the best")
    parser.add_argument("--thorough", action="store_true", help="optimise as for a run; takes ten times longer")
    parser.add_argument("--json", type=bounds.path, metavar="FILE", help="write the report of the largest bucket")
    parser.add_argument("--hlo", type=bounds.path, metavar="FILE", help="write the compiled program's text")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


# Bounds of L, T, S, F and M of a bucket.
BUCKET = (Whole(8, 2**20), Whole(1, 1024), Whole(1, 1024), Whole(16, 2**16), Whole(0, 1))


def _bucket(value: str) -> Bucket:
    sizes = value.split(",")
    if len(sizes) != len(Bucket._fields):
        raise argparse.ArgumentTypeError(f"{value!r} is not {','.join(Bucket._fields)}")
    return Bucket(*(bound(size) for bound, size in zip(BUCKET, sizes, strict=True)))


def main() -> None:
    """Run `python -m crab_jax.compile`.

    The JSON has REPORT_KEYS: bytes and FLOPs per chip, collectives {kind: {count, bytes}} per chip and step, with
    --slices apart as {"ici": {kind: ...}, "dcn": {kind: ...}}, and the seconds of the roofline (not of a step that does
    not fit). Of several buckets it describes the one with the highest peak.
    """
    args, rest = command_line().parse_known_args()
    config, _ = parse_flags([sys.argv[0], f"--config={args.config}", *rest], None, workdir=False)
    for file, flag in ((args.json, "--json"), (args.hlo, "--hlo")):
        if file:
            out_file(file, flag)
    devices = topology_devices(args.topology, args.thorough, args.slices or 1)
    serving = Serving(args.weights, args.rows)
    if args.sweep:
        reports = sweep(config, args.topology, devices, largest_bucket(config))
        print(table(reports) if reports else "nothing fits", flush=True)
    else:
        buckets = [*args.bucket, *(bucket_mix(config) if args.mix else [])] or [largest_bucket(config)]
        reports = []
        for bucket in buckets:
            report, compiled = measure(config, args.topology, devices, bucket, args.stage, args.thorough, serving)
            reports.append(report)
            print(text(report) + "\n", flush=True)
            if args.hlo and compiled is not None:
                write_whole(args.hlo, compiled.as_text())
    chosen = min if args.sweep else max
    worst = chosen(reports, key=lambda r: r["roofline_s"]["step"] if args.sweep else r["peak_bytes"], default=None)
    if args.json and worst is not None:
        shown = worst | ({"collectives": worst["networks"]} if args.slices else {})
        write_whole(args.json, json.dumps({key: shown[key] for key in REPORT_KEYS if key in shown}, indent=1) + "\n")
    if args.budget:
        chip = args.topology.partition(":")[0]
        if worst is None:
            print(f"{chip}: nothing that the sweep tried fits with {HEADROOM:.0%} headroom")
            sys.exit(3)
        enough = worst["fits"] and worst["headroom"] >= HEADROOM
        print(
            f"{chip}: need {gib(worst['peak_bytes'])} and {HEADROOM:.0%} headroom, have {gib(worst['hbm_bytes'])}: "
            f"{'fits' if enough else 'does not fit'}"
        )
        sys.exit(0 if enough else 3)


if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
