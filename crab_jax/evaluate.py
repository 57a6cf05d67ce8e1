"""Answer a split with a trained model and score it.

    python -m crab_jax.evaluate --checkpoint runs/x --tasks ave,s4 --split test --out runs/x/test

Writes results.json, results.md, predictions.jsonl and masks/*.png into --out. Decoding is greedy, so two runs agree.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crab_jax import compile_cache, runs, scoring
from crab_jax.errors import CommandLine, InputError, run_verb
from crab_jax.inference import Prediction, predict_examples
from crab_jax.tasks import TASKS
from data_pipelines.examples import Example
from data_pipelines.media import avss_palette, read_mask


def select(examples: Sequence[Example], tasks: Sequence[str] = (), limit: int | None = None) -> list[Example]:
    """The first `limit` examples of each of `tasks` (all when empty), in order. Raises InputError when none is left."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InputError("--tasks", "", f"unknown task {unknown[0]!r}", f"use some of {','.join(TASKS)}")
    taken: Counter[str] = Counter()
    chosen = []
    for example in examples:
        if (not tasks or example.task in tasks) and (limit is None or taken[example.task] < limit):
            taken[example.task] += 1
            chosen.append(example)
    if not chosen:
        raise InputError("--tasks", "", f"no example of {', '.join(tasks) or 'any task'} in this split",
                         "choose other tasks or another split")
    return chosen


def check_labels(examples: Iterable[Example]) -> None:
    """Raise InputError for an example that cannot be scored, before hours of decoding rather than after."""
    for example in examples:
        scoring.check_label(example)
        kind = TASKS[example.task].mask_kind
        if example.mask_kind != kind or (kind != "none" and not example.mask):
            problem = f"{example.task} needs a mask of kind {kind!r}, this one has {example.mask_kind!r} {example.mask}"
            raise InputError(f"example {example.id!r}", "mask", problem, "give the mask file and its kind")


def label_mask(example: Example, root: Path, size: int) -> np.ndarray | None:
    """int32[size,size]: the ground truth of an example at the model's picture size, None without one."""
    return read_mask(root / example.mask, size, example.mask_kind) if example.mask else None


def save_mask(path: Path, mask: np.ndarray) -> None:
    """PNG of a mask: class ids in the AVSBench-semantic palette, or probability above one half as white."""
    if np.issubdtype(mask.dtype, np.integer):
        picture = Image.fromarray(mask.astype(np.uint8))
        picture.putpalette(avss_palette().tobytes())
    else:
        picture = Image.fromarray(np.where(mask > 0.5, 255, 0).astype(np.uint8))
    picture.save(path)


def record(prediction: Prediction, mask: str | None) -> dict[str, Any]:
    """One line of predictions.jsonl; `mask` is a path relative to that file."""
    example = prediction.example
    return {"id": example.id, "task": example.task, "prompt": example.instruction, "text": prediction.text,
            "parsed": prediction.parsed, "mask": mask, "label": example.meta}


def evaluate(arguments: argparse.Namespace) -> None:
    """Run the whole evaluation that the command line describes."""
    model, params, config, tokenizer = runs.load_model(arguments.checkpoint)
    if not (arguments.data or config.data.root):
        raise InputError("--data", "", "is not given, and the checkpoint was trained without one", "give --data=DIR")
    root = Path(arguments.data or config.data.root)
    tasks = [task for task in arguments.tasks.split(",") if task]
    examples = select(runs.read_examples(root, arguments.split), tasks, arguments.limit)
    check_labels(examples)
    out = Path(arguments.out)
    try:
        (out / "masks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(str(out), "--out", f"cannot be written ({error.strerror})", "give another folder") from error

    # A bad file stops the run: leaving examples out would change what the scores mean.
    predictions = predict_examples(
        model, params, config, tokenizer, examples, root, arguments.batch_size, arguments.max_new_tokens,
        on_error="raise", mute_audio=arguments.mute_audio, blank_video=arguments.blank_video)
    judged, began, shown = [], time.monotonic(), 0.0
    with open(out / "predictions.jsonl", "w", encoding="utf-8") as file:
        for number, prediction in enumerate(predictions, 1):
            example, mask = prediction.example, None
            if prediction.mask is not None:
                mask = f"masks/{number:06d}_{re.sub(r'[^A-Za-z0-9.-]+', '_', example.id)[:80]}.png"
                save_mask(out / mask, prediction.mask)
            file.write(json.dumps(record(prediction, mask), ensure_ascii=False) + "\n")
            answer = scoring.Answer(example.id, prediction.text, prediction.mask)
            judged.append(scoring.judge(example, answer, label_mask(example, root, model.cfg.clip.image_size)))
            now = time.monotonic()
            if now - shown > 5 or number == len(examples):
                rate, shown = number / (now - began), now
                print(f"{number}/{len(examples)}  {rate:.2f} examples/s  eta {(len(examples) - number) / rate:.0f} s",
                      flush=True)

    results = scoring.summarise(judged)
    table = scoring.markdown(results)
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    (out / "results.md").write_text(table)
    print(table)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(__doc__, "python -m crab_jax.evaluate")
    parser.add_argument("--checkpoint", required=True, help="workdir of a training run, or a packed model")
    parser.add_argument("--out", required=True, help="folder for results, predictions and masks")
    parser.add_argument("--data", default="", help="data root (default: the one of training)")
    parser.add_argument("--split", default="test", help="reads <data>/<split>.jsonl")
    parser.add_argument("--tasks", default="", metavar="A,B", help=f"some of {','.join(TASKS)} (default: all)")
    parser.add_argument("--limit", type=_positive, help="at most this many examples of each task")
    parser.add_argument("--batch-size", type=_positive, default=16)
    parser.add_argument("--max-new-tokens", type=_positive, default=256)
    parser.add_argument("--mute-audio", action="store_true", help="replace every sound by silence")
    parser.add_argument("--blank-video", action="store_true",
                        help="replace every picture by black, the one to segment included")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m crab_jax.evaluate`."""
    argv = sys.argv[1:] if argv is None else argv
    compile_cache.enable()
    run_verb(lambda: evaluate(parse_arguments(argv)), "--debug" in argv)


if __name__ == "__main__":
    main()
