"""Run the whole tiny recipe from nothing: scenes, warm-up, alignment, joint stage, packed warm start, evaluation.

    python -m crab_jax.recipe --out runs/recipe --pack crab_jax/warm_start

Every step is a command that a user could type, with its own progress lines. A finished stage is not repeated, an
interrupted one resumes.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from crab_jax.checkpoints.models import MANIFEST, save_packed
from crab_jax.io.bounds import Real, path
from crab_jax.io.errors import CommandLine
from crab_jax.io.files import out_folder, write_whole
from crab_jax.io.locks import locked
from crab_jax.runs import run_params
from data_pipelines.decoded import cache_in

SEED = 0  # of the recipe's scenes, which differ from the demo's


def command(*words: object) -> float:
    """Run `python -m ...` as a user would and return its seconds; exit with its code when it fails."""
    line = [sys.executable, "-m", *map(str, words)]
    print(f"\n$ python {shlex.join(line[1:])}", flush=True)
    began = time.monotonic()
    done = subprocess.run(line)
    if done.returncode:
        sys.exit(done.returncode)
    return time.monotonic() - began


def pack(run: Path, out: Path) -> None:
    """Write a run's newest parameters as one float16 file, with its config, tokenizer and training log."""
    _, params, config, tokenizer = run_params.load_model(run)
    save_packed(out, params, config.to_dict(), np.float16, tokenizer)
    write_whole(out / "metrics.jsonl", (run / "metrics.jsonl").read_bytes())


def recipe(out: Path, packed: Path, scale: float, start: Path | None = None) -> None:
    """Run every stage below `out`; `scale` multiplies scenes and steps (1 is the full recipe).

    start: a packed model from whose language model the warm-up continues.
    """

    def scaled(n: int) -> int:
        return max(4, int(n * scale))

    seconds = {}
    scenes, warmup, pretrain, joint = (out / name for name in ("scenes", "warmup", "pretrain", "joint"))
    seconds["scenes"] = command(
        "data_pipelines.sources.scenes",
        "--out",
        scenes,
        "--train",
        scaled(3000),
        "--val",
        8,
        "--test",
        scaled(120),
        "--seed",
        SEED,
        "--workers",
        2,
    )
    if not (warmup / MANIFEST).exists():  # a warm-up of an older version is assembled again from its parts
        seconds["warmup"] = command(
            "crab_jax.warmup",
            "--data",
            scenes,
            "--out",
            warmup,
            "--scale",
            scale,
            *(("--start", start) if start else ()),
        )
    shared = (f"--config.data.root={scenes}", f"--config.data.cache_dir={cache_in(out)}")
    seconds["pretrain"] = command(
        "crab_jax.train",
        "--config=configs/tiny_pretrain.py",
        *shared,
        f"--config.init_from={warmup}",
        f"--config.steps={scaled(600)}",
        f"--workdir={pretrain}",
    )
    seconds["joint"] = command(
        "crab_jax.train",
        "--config=configs/tiny.py",
        *shared,
        f"--config.init_from={pretrain}",
        f"--config.steps={scaled(1200)}",
        "--config.optim.lr=1e-3",
        f"--workdir={joint}",
    )
    pack(joint, packed)
    seconds["evaluate"] = command(
        "crab_jax.evaluate",
        "--checkpoint",
        packed,
        "--data",
        scenes,
        "--batch-size",
        32,
        "--max-new-tokens",
        160,
        "--out",
        out / "eval",
    )
    write_whole(packed / "results.json", (out / "eval" / "results.json").read_bytes())
    facts = {
        "scale": scale,
        "start": str(start or ""),
        "scene_seed": SEED,
        "seconds": {k: round(v) for k, v in seconds.items()},
    }
    write_whole(packed / "recipe.json", json.dumps(facts, indent=1))


def main() -> None:
    """Run `python -m crab_jax.recipe`."""
    parser = CommandLine(__doc__)
    parser.add_argument("--out", type=path, default=Path("runs/recipe"))
    parser.add_argument("--pack", type=path, default=Path("runs/recipe/warm_start"), help="folder of the packed result")
    parser.add_argument("--scale", type=Real(1e-4, 1e3), default=1.0, help="share of the full recipe, for a quick look")
    parser.add_argument("--start", type=path, help="a packed model from whose language model the warm-up continues")
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args()
    out_folder(args.pack, "--pack")
    with locked(args.out):
        recipe(args.out, args.pack, args.scale, args.start)
