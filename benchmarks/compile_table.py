"""Compile every stage for every TPU topology and print a Markdown table of the costs.

    python benchmarks/compile_table.py [--stages finetune,pretrain_seg] [--topologies v5e:16x16] [--out runs/compile]

One JSON per program is kept in --out; existing programs are not compiled again.
"""

from __future__ import annotations

import argparse
import importlib
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


def report(stage: str, topology: str, out: Path) -> dict:
    """Return the report of one program, compiled or read back."""
    file = out / f"{stage}-{topology}.json".replace(":", "_")
    if not file.exists():
        name, _, kind = stage.partition(":")
        config = resolve(importlib.import_module(f"configs.{name}").get_config())
        devices = verb.topology_devices(topology)
        found, _ = verb.measure(config, topology, devices, verb.largest_bucket(config), kind or "train")
        file.write_text(json.dumps(found | {"stage": stage}, indent=1) + "\n")
    return json.loads(file.read_text())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--out", type=Path, default=Path("runs/compile"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    programs = [(stage, topology) for stage in args.stages.split(",") for topology in args.topologies.split(",")]
    reports, started = [], time.monotonic()
    for number, program in enumerate(programs, 1):
        reports.append(report(*program, args.out))
        eta = (time.monotonic() - started) / number * (len(programs) - number) / 60
        verb.say(f"{number}/{len(programs)}  eta {eta:.0f} min  {verb.table_row(reports[-1])}")
    print(verb.table(reports))


if __name__ == "__main__":
    main()
