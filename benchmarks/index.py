"""Measure how a training run starts on many Examples: time to the first batch, memory and what a worker receives.

    python benchmarks/index.py --examples 200000 2000000 [--without-index] [--dir DIR] [--json FILE]

Writes a data root with a list of synthetic Examples like those of Video-LLaVA (a picture, a question and an answer of
about 40 words) and its index, and starts the input of a run in processes of its own: once to count the tokens, then as
every later start. Memory is the peak of the process, less that of one that has loaded the same code, a tokenizer and a
root of one Example; anonymous memory leaves out pages of the mapped files, which processes share and the system may
take back.
--copies 10 measures ten times as many rows without the minutes that their index takes; their texts repeat.
--without-index measures a root that has none; it needs only what older versions of the code have too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cloudpickle
import numpy as np

WORDS = "a dog barks while the small red car turns left and people talk near water at night".split()
TASKS = ("avcap", "avqa")
STEPS = 20  # batches that a worker reads before its memory is measured


def write_list(root: Path, count: int) -> None:
    """Write train.jsonl with `count` Examples, and the picture that all of them show."""
    from PIL import Image

    root.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(root / "0.png")
    draw = np.random.default_rng(0)
    with open(root / "train.jsonl", "w") as file:
        for first in range(0, count, 10_000):
            words = draw.integers(len(WORDS), size=(10_000, 70))
            lengths = draw.integers(10, 70, size=10_000)
            for k in range(min(10_000, count - first)):
                text = " ".join(WORDS[word] for word in words[k, : lengths[k]])
                record = {
                    "id": f"clip-{first + k:08d}",
                    "task": TASKS[k % 2],
                    "instruction": f"This is an image:\n<image>\nWhat happens in number {first + k}?",
                    "target": f"{text}.",
                    "image": "0.png",
                    "windows": "none",
                    "meta": {"dataset": "video_llava"},
                }
                file.write(json.dumps(record) + "\n")


def multiply(source: Path, out: Path, times: int) -> None:
    """Make a root whose index holds the rows, and the token counts, of another root's index so many times."""
    import pyarrow as pa

    from data_pipelines import index, shards

    shutil.copytree(source, out, dirs_exist_ok=True)
    file = next((out / "example_index").glob("*.arrow"))
    rows = pa.concat_tables([pa.ipc.open_file(pa.memory_map(str(file))).read_all()] * times).combine_chunks()
    written, info = file.with_suffix(".new"), json.loads(file.with_suffix(".json").read_text())
    with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_file(sink, index.SCHEMA) as writer:
        for first in range(0, rows.num_rows, index.ROWS):
            writer.write_batch(rows.slice(first, index.ROWS).combine_chunks().to_batches()[0])
    written.replace(file)
    stamps = {"train.jsonl": index.stamp(out / "train.jsonl")}
    info |= {"rows": rows.num_rows, "bytes": file.stat().st_size, "sum": shards.file_sum(file)}
    file.with_suffix(".json").write_text(json.dumps(info | {"sources": {"stamps": stamps}}))
    lengths = next((out / "example_index").glob("*.lengths"))
    counts = pa.ipc.open_file(pa.memory_map(str(lengths))).read_all()
    columns = {name: np.tile(counts.column(name).to_numpy(), times) for name in counts.column_names}
    kept = {b"index": info["sum"].encode(), b"sum": index._sum_of(columns)}
    schema = counts.schema.with_metadata(counts.schema.metadata | kept)
    with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(list(columns.values()), schema=schema))
    written.replace(lengths)


def memory() -> dict[str, float]:
    """Return the peak and the anonymous memory of this process in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: int(fields[field].split()[0]) / 1e3 for name, field in (("peak_mb", "VmHWM"), ("anonymous_mb", "RssAnon"))
    }


def start(root: str, workers: bool) -> dict[str, float]:
    """Start the input of a run in this process as `train` does, and return times in seconds, memory and bytes."""
    from crab_jax import defaults
    from crab_jax.config import resolve
    from crab_jax.runs import run_data, run_folder

    config = defaults.tiny()
    config.data.root, config.data.batch_size, config.data.lengths = root, 8, (128, 256, 512)
    run = resolve(config)
    tokenizer, began, used = run_folder.tokenizer_of(run), time.monotonic(), time.process_time()
    examples = run_data.train_examples(run)
    read = time.monotonic()
    run_data.data_identity(run, examples)
    known = time.monotonic()
    order = run_data.train_order(run, tokenizer, examples=examples)
    ordered = time.monotonic()
    dataset = run_data.train_dataset(run, tokenizer, order)
    next(iter(dataset))
    found = {
        "read_s": read - began,
        "identity_s": known - read,
        "order_s": ordered - known,
        "first_batch_s": time.monotonic() - began,
        "first_batch_cpu_s": time.process_time() - used,
        **memory(),
    }
    if workers:
        found |= worker(dataset)
    return found


def worker(dataset: object) -> dict[str, float]:
    """Return the bytes that a worker of a dataset receives, and its memory after STEPS batches."""
    received = cloudpickle.dumps(dataset)  # as Grain does
    code = (
        f"import sys, pickle, json; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import index;"
        "dataset = pickle.load(sys.stdin.buffer); batches = iter(dataset);"
        f"[next(batches) for _ in range({STEPS})]; print(json.dumps(index.memory()))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=received, capture_output=True, check=True)
    found = json.loads(done.stdout.decode().splitlines()[-1])
    return {"pickle_kb": len(received) / 1e3, **{f"worker_{name}": value for name, value in found.items()}}


def measured(root: Path) -> dict[str, float]:
    """Return what `start` returns, from a process of its own."""
    command = [sys.executable, __file__, "--start", str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    return json.loads(done.stdout.decode().splitlines()[-1])


def main() -> None:
    """Print the numbers, one line of JSON for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[200_000, 2_000_000])
    parser.add_argument("--copies", type=int, default=0, help="also measure an index of so many copies of the last one")
    parser.add_argument("--without-index", action="store_true")
    parser.add_argument("--dir", default="", help="folder for the data roots, a temporary one by default")
    parser.add_argument("--json", default="", help="file for the numbers")
    parser.add_argument("--start", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start, workers=True)))
        return
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.dir or temporary)
        write_list(folder / "1", 1)
        empty = measured(folder / "1")
        sizes = list(arguments.examples) + ([arguments.examples[-1] * arguments.copies] if arguments.copies else [])
        for number, count in enumerate(sizes):
            root, copied = folder / str(count), number == len(arguments.examples)
            if copied:
                multiply(folder / str(arguments.examples[-1]), root, arguments.copies)
            if not (root / "train.jsonl").exists():
                write_list(root, count)
            result: dict[str, float] = {"examples": count, "list_mb": (root / "train.jsonl").stat().st_size / 1e6}
            if not arguments.without_index and not copied:
                began = time.monotonic()
                subprocess.run([sys.executable, "-m", "data_pipelines", "index", "--root", str(root)], check=True)
                result["index_s"] = time.monotonic() - began
                result["index_mb"] = sum(f.stat().st_size for f in (root / "example_index").iterdir()) / 1e6
                result["tokens_s"] = measured(root)["first_batch_s"]
            result |= measured(root)
            for name in [name for name in result if name.endswith("_mb") and name in empty]:
                result[f"{name}_over_empty"] = result[name] - empty[name]
            results.append(result)
            print(json.dumps({name: round(value, 3) for name, value in result.items()}), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
