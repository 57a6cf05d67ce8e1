"""Measure the peak resident memory of importing a sharded LLaMA directory of about 2 GB, and of exporting it again.

    python benchmarks/import_memory.py [--gigabytes 2] [--shards safetensors|bin] [--dir DIR]

Writes synthetic released files (LLaMA of width 2048 in float16, shards of 0.5 GB, small encoders), imports them in a
separate process, and prints its memory next to that of a process that only loads the program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from crab_jax.checkpoints.stored import StoredParams
from crab_jax.convert import torch_writer
from crab_jax.convert.exporting import write_crab, write_hugging_face
from crab_jax.io import stored_tensors
from crab_jax.models.crab import CrabConfig
from crab_jax.models.presets import tiny
from crab_jax.runs import run_params
from data_pipelines.tokens import Tokenizer

WIDTH, MLP = 2048, 5504


def config(gigabytes: float, vocab_size: int) -> CrabConfig:
    """Return the tiny model around a LLaMA of the wanted size."""
    layers = round(gigabytes * 1e9 / 2 / (4 * WIDTH**2 + 3 * WIDTH * MLP))
    small = tiny()
    llama = dataclasses.replace(
        small.llama, vocab_size=vocab_size, hidden=WIDTH, mlp_dim=MLP, layers=layers, heads=16, kv_heads=16
    )
    return dataclasses.replace(
        small,
        llama=llama,
        seg=dataclasses.replace(small.seg, llm_dim=WIDTH),
        visual=dataclasses.replace(small.visual, out_dim=WIDTH),
        audio=dataclasses.replace(small.audio, out_dim=WIDTH),
    )


def write(folder: Path, gigabytes: float) -> list[str]:
    """Write released files of that size below `folder` and return the arguments of their import."""
    tokenizer = Tokenizer.load("data_pipelines/tiny_tokenizer.json")
    cfg = config(gigabytes, tokenizer.vocab_size)
    shapes = nn.unbox(run_params.abstract_params(cfg.build()))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.float16), shapes)
    params = StoredParams(
        shapes, lambda wanted: jax.tree.map(lambda leaf: np.broadcast_to(np.float16(0.5), leaf.shape), wanted)
    )
    write_hugging_face(cfg, params, folder, shard_bytes=5 * 10**8)
    write_crab(cfg, params, folder)
    tokenizer.save(folder / "llama")
    bert = folder / "bert.json"
    bert.write_text(json.dumps({"num_attention_heads": cfg.visual.heads}))
    return [
        "--clip",
        str(folder / "clip"),
        "--llama",
        str(folder / "llama"),
        "--beats",
        str(folder / "beats/BEATs.pt"),
        "--crab",
        str(folder / "finetune_weights.bin"),
        str(folder / "avs_finetune_weights.bin"),
        "--bert",
        str(bert),
        "--taps",
        ",".join(map(str, cfg.clip.taps)),
        "--out",
        str(folder / "imported"),
    ]


def as_bin(folder: Path) -> None:
    """Convert the shards of a directory to .bin files, one after another."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    renamed = {shard: f"pytorch_{Path(shard).stem}.bin" for shard in set(weight_map.values())}
    for shard, name in renamed.items():
        tensors = stored_tensors.read_safetensors(folder / shard)
        torch_writer.save(
            folder / name,
            {
                key: torch_writer.Tensor(
                    tensors[key].shape, tensors[key].dtype, lambda key=key, tensors=tensors: tensors[key]
                )
                for key in tensors
            },
        )
        (folder / shard).unlink()
    index.unlink()
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {key: renamed[shard] for key, shard in weight_map.items()}})
    )


def measure(*arguments: str) -> tuple[float, float]:
    """Return (peak resident GB, seconds) of `python -m crab_jax.convert` with these arguments."""
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "crab_jax.convert", *arguments], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(process.returncode)
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - began


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--dir", help="where to write the synthetic files (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        options = write(Path(folder), arguments.gigabytes)
        if arguments.shards == "bin":
            as_bin(Path(folder) / "llama")
        source = sum(path.stat().st_size for path in (Path(folder) / "llama").glob("*-of-*"))
        idle, _ = measure("import", "--help")
        verbs = {
            "import": options,
            "export": [str(Path(folder) / "imported"), "--format", "hf", "--out", str(Path(folder) / "exported")],
        }
        needed = {verb: measure(verb, *options) for verb, options in verbs.items()}
    print(
        json.dumps(
            {"llama_gb": round(source / 1e9, 3), "program_alone_gb": round(idle, 3)}
            | {
                verb: {"peak_rss_gb": round(peak, 3), "seconds": round(seconds, 1)}
                for verb, (peak, seconds) in needed.items()
            }
        )
    )


if __name__ == "__main__":
    main()
