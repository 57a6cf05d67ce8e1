"""Measure how much of the batches of AV-UIE is padding, for a stage's `data.lengths` and a tokenizer.

    python benchmarks/padding.py --tokenizer LLAMA_DIR [--config configs/finetune.py] [--scale 0.05]

No release is needed: labels are drawn from the official lists of names, questions and times in the proportions of the
annotations, prompts and targets (with template reasoning) are those of training, and each task has `--scale` times as
many samples as an epoch of the paper. `python -m crab_jax.train` prints the same table for a real data root at its
start, and `python -m data_pipelines sample` shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from crab_jax.config import resolve
from crab_jax.tasks import TASKS
from crab_jax.tasks.avs_classes import CLASSES
from data_pipelines import bucket_fill
from data_pipelines.av_uie import questions, templates
from data_pipelines.examples import Example
from data_pipelines.media import inline_mask
from data_pipelines.mixture import train_order
from data_pipelines.sources import ave, avqa, avsbench, avvp
from data_pipelines.tokens import Tokenizer

# Samples of an epoch of the joint stage: one picture of each clip of AVSS and of each expression of Ref-AVS.
SAMPLES = {
    "avqa": 31927,
    "ave": 3339,
    "avvp": 10000,
    "arig": 3452,
    "s4": 3452,
    "ms3": 1480,
    "avss": 4750,
    "ref-avs": 14112,
    "avcap": 25327,
}
_SLOTS = {
    "Object": questions.INSTRUMENTS,
    "LR": ("left", "right", "middle"),
    "LRer": ("leftest", "rightest"),
    "LL": ("loudest", "lowest"),
    "FL": ("first", "last"),
    "TH": ("first", "second", "third", "fourth", "fifth"),
    "BA": ("before", "after"),
}
_EXPRESSIONS = (
    "The object making the longest sound duration.",
    "The object having white and gray fur.",
    "The object making a sound with a faster rhythm",
    "The cat on the left of the piano.",
    "The object which starts sounding before the man, but is quieter",
    "The red car.",
)
_WORDS = (
    "with the rumble on a moving bus crowd spoke in one room yellow bird leaped over fence sound of his mouth "
    "ringing woman talks nearby as water pours wind is blowing insects are singing and rustling occurs"
).split()


class Labels:
    """Labels drawn at random, the same for the same seed."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def one(self, values):
        return values[self.rng.integers(len(values))]

    def span(self) -> list[int]:
        start, end = sorted(self.rng.choice(11, 2, replace=False).tolist())
        return [start, end]

    def box(self) -> list[int]:
        x, y = np.sort(self.rng.integers(0, 224, (2, 2)), 1).tolist()
        return [x[0], y[0], x[1], y[1]]

    def meta(self, task: str) -> dict:
        """Return the label of one sample (crab_jax/tasks/<task>.py)."""
        rng = self.rng
        match task:
            case "ave":  # 2,750 of 4,143 events last for the whole clip
                start, end = [0, 10] if rng.random() < 2750 / 4143 else self.span()
                return {"event": self.one(ave.CATEGORIES), "start": start, "end": end}
            case "avvp":  # training clips have 1, 2 or 3 labels in 4,032, 5,879 and 89 cases
                names = rng.choice(avvp.CATEGORIES, rng.choice(3, p=(0.4032, 0.5879, 0.0089)) + 1, replace=False)
                return {
                    kind: [[str(name), *self.span()] for name in names for _ in range(rng.integers(0, 3))]
                    for kind in ("audio", "visual")
                }
            case "avqa":
                return {"answer": self.one(avqa.ANSWERS), "type": ["Audio-Visual", "Location"]}
            case "arig":
                return {"object": self.one(avsbench.S4_CATEGORIES).replace("_", " "), "box": self.box()}
            case "avcap":
                words = rng.choice(_WORDS, max(5, int(rng.normal(20, 8))))
                return {"captions": [f"{' '.join(words).capitalize()}."]}
            case "ref-avs":
                return {"expression": self.one(_EXPRESSIONS), "object": self.one(CLASSES[1:]), "split": "seen"}
        objects = rng.choice(CLASSES[1:], {"s4": 1, "ms3": rng.integers(1, 4), "avss": rng.integers(1, 3)}[task], False)
        return {"objects": objects.tolist(), "video": "v"}

    def example(self, task: str, number: int) -> Example:
        """Return one sample with its prompt and its target; it names media files that are never opened."""
        meta, second = self.meta(task), int(self.rng.integers(10)) if task in ("avss", "ref-avs") else 0
        fields = {}
        if task == "avqa":
            template = self.one(questions.QUESTIONS).template
            fields["question"] = re.sub(r"<(\w+)>", lambda slot: self.one(_SLOTS[slot[1]]), template)
        elif TASKS[task].mask_kind != "none":
            fields |= {"second": second} | ({"expression": meta["expression"]} if task == "ref-avs" else {})
        example = Example(
            id=f"{task}-{number}",
            task=task,
            instruction=TASKS[task].instruction(**fields),
            meta=meta,
            second=second,
            windows="music_avqa" if task == "avqa" else "ten",
            audio="a.wav",
        )
        if TASKS[task].mask_kind != "none":  # read as a binary one, which can be written in place
            x1, y1, x2, y2 = self.box()
            mask = np.zeros((224, 224), np.uint8, order="F")
            mask[y1 : y2 + 1, x1 : x2 + 1] = 1
            example = dataclasses.replace(example, mask=inline_mask(coco.encode(mask)), mask_kind="binary")
        example = templates.write(example, ".")
        pictures = {"arig": 1, "s4": 5, "ms3": 5, "avss": 10, "ref-avs": 10}.get(task, 0)
        if pictures == 1:
            return dataclasses.replace(example, image="0.jpg", windows="five")
        if pictures:
            return dataclasses.replace(
                example, frames=tuple(f"{k}.jpg" for k in range(pictures)), windows="five" if pictures == 5 else "ten"
            )
        return dataclasses.replace(example, video="v.mp4", audio=None)


def examples(scale: float, seed: int = 0) -> list[Example]:
    """Return samples of all tasks, `scale` times an epoch of the joint stage."""
    labels = Labels(seed)
    return [labels.example(task, number) for task, count in SAMPLES.items() for number in range(round(count * scale))]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json or a LLaMA directory")
    parser.add_argument("--config", default="configs/finetune.py")
    parser.add_argument("--scale", type=float, default=0.05)
    arguments = parser.parse_args()
    spec = importlib.util.spec_from_file_location("stage", arguments.config)
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    config = resolve(stage.get_config())
    found = [example for example in examples(arguments.scale) if config.mixture.weights[example.task] > 0]
    tokenizer, sizes = Tokenizer.load(arguments.tokenizer), config.data
    print(f"{arguments.config}: {len(found)} samples, data.lengths {sizes.lengths}")
    print(bucket_fill.table(train_order(found, tokenizer, sizes, 1).padding))


if __name__ == "__main__":
    main()
