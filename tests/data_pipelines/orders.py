"""The orders of training that orders.json holds, as they were before there was an index of Examples.

python tests/data_pipelines/orders.py     writes orders.json from the code as it is
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs import tiny
from crab_jax.config import RunConfig, resolve
from crab_jax.runs import run_data, run_folder
from data_pipelines.examples import TASK_NAMES, Example, write_jsonl

FILE = Path(__file__).with_name("orders.json")
BATCHES = 40
EVERY = "ave,avvp,avqa,arig,s4,ms3,avss,ref_avs,valor,audiocaps,lvis,video_llava"
# name -> (root, changes to data)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "releases": ("releases", {}),
    "every picture": ("releases", {"frames": "all", "datasets": "avss,ref_avs,lvis"}),
    "pretraining": ("releases", {"datasets": EVERY, "batch_size": 3}),
    "shares": ("releases", {"weights": {"ave": 2.0, "avss": 0.5, "avcap": 0.0}, "caps": {"avqa": 3}}),
    "curriculum": ("releases", {"curriculum": {"avss": 5, "ref-avs": 9}}),
    "limit": ("releases", {"limit": 20}),
    "without leaks": ("releases", {"exclude_leaks": True}),
    "two splits": ("releases", {"split": "train+val"}),
    "a list": ("list", {}),
    "every one of a list": ("list", {"frames": "all", "weights": {"avqa": 3.0}, "batch_size": 5}),
}


def listed() -> list[Example]:
    """Return short and long questions, pictures, and pictures of which an epoch takes one."""
    picture = Example("", "s4", "See <image>", target="a dog", image="0.png", windows="none")
    found = []
    for number in range(90):
        task = ("s4", "avqa", "ref-avs", "avcap")[number % 4]
        meta = {"one_of": f"clip {number // 12}"} if task == "ref-avs" else {}
        words = 3 + 37 * number % 120 if task in ("avqa", "avcap") else 2
        found.append(
            dataclasses.replace(
                picture, id=f"{task}-{number}", task=task, image=f"{number}.png", target="dog " * words, meta=meta
            )
        )
    return found


def config_of(root: Path, changes: dict[str, Any]) -> RunConfig:
    """Return the config of a run on a root."""
    config = tiny.get_config()
    config.seed, config.data.root, config.data.batch_size = 5, str(root), 2
    config.data.lengths, config.data.weights = (256, 384, 512, 1024, 4096), dict.fromkeys(TASK_NAMES, 1.0)
    config.data.update(changes)
    return resolve(config)


def record(config: RunConfig) -> dict[str, Any]:
    """Return the identity of the data, a hash of what is in each bucket, and the first batches as a run draws them."""
    examples = run_data.train_examples(config)
    order = run_data.train_order(config, run_folder.tokenizer_of(config), examples=examples)
    buckets = [(list(map(int, bucket)), list(map(int, group))) for bucket, group in order.groups.items()]
    return {
        "identity": run_data.data_identity(config, examples),
        "buckets": hashlib.blake2b(json.dumps(buckets).encode(), digest_size=16).hexdigest(),
        "batches": [[int(index) for index in order.batches[number]] for number in range(BATCHES)],
    }


def main() -> None:
    """Write orders.json."""
    sys.path.insert(0, str(FILE.parent))
    import releases

    with tempfile.TemporaryDirectory() as folder:
        releases.write(Path(folder) / "releases", Path(folder) / "scenes")
        write_jsonl(Path(folder) / "list" / "train.jsonl", listed())
        records = {name: record(config_of(Path(folder) / root, changes)) for name, (root, changes) in CASES.items()}
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in records.items()) + "\n}\n")


if __name__ == "__main__":
    main()
