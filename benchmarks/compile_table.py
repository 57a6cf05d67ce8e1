"""Compile every stage for every TPU topology and print a Markdown table of the costs.

    python benchmarks/compile_table.py [--stages finetune,pretrain_seg] [--topologies v5e:16x16] [--out runs/compile]
    python benchmarks/compile_table.py --stages finetune --topologies v5e:16x16 --slices 1,2,4 --batch 1024
    python benchmarks/compile_table.py --stages finetune:llm --topologies v5e:16x16,v6e:4x4,h200:8 --thorough

One JSON per program is kept in --out; existing programs are not compiled again. With --slices, the table says what
moves within slices and between them; with --thorough, how long a step takes by the compiler's estimate.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import time
from pathlib import Path

from crab_jax import compile as verb
from crab_jax.config import resolve

STAGES = (
    "finetune",
    "pretrain_visual",
    "pretrain_audio",
    "pretrain_seg",
    "finetune_avs",
    "finetune:prefill",
    "finetune:decode",
)
TOPOLOGIES = ("v5e:16x16", "v6e:4x4", "v5p:2x2x4", "v4:4x4x4")


def report(stage: str, topology: str, slices: int, batch: int, out: Path, thorough: bool = False) -> dict:
    """Return the report of one program, compiled or read back; `batch` 0 is that of the stage."""
    several = f"-{slices}-slices-batch-{batch}" if slices > 1 or batch else ""
    file = out / f"{stage}-{topology}{several}{'-thorough' if thorough else ''}.json".replace(":", "_")
    if not file.exists():
        name, _, kind = stage.partition(":")
        config = importlib.import_module(f"configs.{name}").get_config()
        config.data.batch_size = batch or config.data.batch_size
        config = resolve(config)
        devices = verb.topology_devices(topology, thorough, slices)
        found, _ = verb.measure(config, topology, devices, verb.largest_bucket(config), kind or "train", thorough)
        file.write_text(json.dumps(found | {"stage": stage}, indent=1) + "\n")
    return json.loads(file.read_text())


def slices_row(report: dict) -> str:
    """Format one row of the table of slices: what a chip receives in a step, and the least seconds for it."""
    mesh, seconds = report["mesh"], report["roofline_s"]
    moved = {name: sum(kind["bytes"] for kind in kinds.values()) for name, kinds in report["networks"].items()}
    rows = report["rows"] // (report["slices"] * mesh["data"] * mesh["fsdp"] * report["accumulate"])
    return (
        f"| {report['slices']} x {report['topology']} | {report['chips']} | {mesh['data']} x {mesh['fsdp']} x "
        f"{mesh['tensor']} | {rows} x {report['accumulate']} | {report['peak_bytes'] / 2**30:.2f} "
        f"| {moved['ici'] / 2**20:,.0f} | {moved['dcn'] / 2**20:.2f} | {seconds['compute']:.3f} "
        f"| {seconds['interconnect']:.3f} | {seconds.get('dcn', 0):.4f} | {report['compile_cpu_s']:.0f} |"
    )


SLICES_HEAD = (
    "| slices | chips | data x fsdp x tensor of a slice | rows/chip x micro | peak GiB | ICI MiB | DCN MiB | compute s "
    "| ICI s | DCN s | compile s of one core |\n" + "|---|" + "---|" * 10
)


def estimate_row(report: dict) -> str:
    """Format one row of the table of estimates."""
    mesh, moved = report["mesh"], report["collectives"]
    rows = report["rows"] // (report["slices"] * mesh["data"] * mesh["fsdp"] * report["accumulate"])
    gathered = moved.get("all-gather", {"bytes": 0})["bytes"] / 2**30
    return (
        f"| {report['topology']} | {report['stage']} | {mesh['data']} x {mesh['fsdp']} x {mesh['tensor']} "
        f"| {rows} x {report['accumulate']} | {report['remat']} | {report.get('estimate_s', 0):.3f} "
        f"| {report.get('mfu_4n', 0):.0%} | {report['peak_bytes'] / 2**30:.2f} / {report['hbm_bytes'] / 2**30:.2f} "
        f"| {gathered:.1f} | {report.get('roofline_s', {}).get('interconnect', 0):.3f} "
        f"| {moved.get('collective-permute', {'count': 0})['count']:,} | {report['compile_cpu_s']:.0f} |"
    )


ESTIMATE_HEAD = (
    "| topology | stage | mesh d x f x t | rows/chip x micro | remat | estimate s | MFU at 4 N | peak / HBM GiB "
    "| gathers GiB | links s | permutes | compile s of one core |\n" + "|---|" + "---|" * 11
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--slices", default="", metavar="1,2,4")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--thorough", action="store_true", help="optimise as for a run, and estimate")
    parser.add_argument("--out", type=Path, default=Path("runs/compile"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    numbers = [int(n) for n in args.slices.split(",") if n]
    head, row = (SLICES_HEAD, slices_row) if args.slices else ("", verb.table_row)
    head, row = (ESTIMATE_HEAD, estimate_row) if args.thorough else (head, row)
    programs = list(itertools.product(args.stages.split(","), args.topologies.split(","), numbers or [1]))
    reports, started = [], time.monotonic()
    for number, program in enumerate(programs, 1):
        reports.append(report(*program, args.batch, args.out, args.thorough))
        eta = (time.monotonic() - started) / number * (len(programs) - number) / 60
        verb.say(f"{number}/{len(programs)}  eta {eta:.0f} min  {row(reports[-1])}")
    print("\n".join([head, *map(row, reports)]) if head else verb.table(reports))


if __name__ == "__main__":
    main()
