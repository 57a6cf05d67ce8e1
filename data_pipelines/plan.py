"""Plan the decoding of a run: how many samples a host must deliver, what a core delivers, how many workers that takes.

    python -m data_pipelines plan --root DATA --prepared PREPARED --batch-size 256 --step-seconds 3.2 --hosts 8

--step-seconds is the time of a step that does not wait for input, as a run's progress line shows it. Some Examples of
each task are loaded as in training, on one core of this machine, and count as often as the task is in the split. A host
whose cores are slower, or busy with other things, needs more workers. --root may be raw or prepared.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from crab_jax.io.bounds import PATH, Name, Real, Whole, Words
from crab_jax.io.errors import CommandLine, printable, run_verb
from crab_jax.io.packaged import TOKENIZER
from crab_jax.tasks import add_flag, use_tasks
from data_pipelines import datasets, shards
from data_pipelines.batching import DataConfig, load
from data_pipelines.examples import Example, spread
from data_pipelines.tokens import Tokenizer

LENGTHS = (2**20,)  # every text fits; its time hardly depends on the padding


class Need(NamedTuple):
    """What a run asks of each host, in samples per second."""

    batch_size: int
    step_seconds: float
    hosts: int

    @property
    def per_host(self) -> float:
        """Return samples per second of one host."""
        return self.batch_size / self.step_seconds / self.hosts


class Speed(NamedTuple):
    """What a core delivers of one root. seconds: of CPU for one sample, by task. counts: samples of the split."""

    root: str
    seconds: dict[str, float]
    counts: dict[str, int]

    @property
    def per_core(self) -> float:
        """Return samples per second of the whole split."""
        total = sum(self.counts[task] for task in self.seconds)
        return total / sum(self.counts[task] * seconds for task, seconds in self.seconds.items())


def workers(need: Need, speed: Speed) -> int:
    """Return the number of worker processes of a host that deliver what it needs."""
    return math.ceil(need.per_host / speed.per_core)


def measure(root: Path, examples: Sequence[Example], config: DataConfig, tokenizer: Tokenizer, count: int) -> Speed:
    """Load up to `count` Examples of each task and return the time that they take. Raises InputError.

    The first of each task is loaded once more before, so that opening files and libraries is not counted.
    """
    seconds: dict[str, float] = {}
    chosen = spread(examples, count)
    for task in dict.fromkeys(example.task for example in chosen):
        of_task = [example for example in chosen if example.task == task]
        load(of_task[0], root, tokenizer, config)
        began = time.process_time()
        for example in of_task:
            load(example, root, tokenizer, config)
        seconds[task] = max(time.process_time() - began, 1e-9) / len(of_task)
    return Speed(str(root), seconds, dict(Counter(example.task for example in examples)))


def report(need: Need, speeds: Sequence[Speed], cores: int) -> list[str]:
    """Return the lines that the verb prints."""
    lines = [
        f"a step of {need.batch_size} samples in {need.step_seconds:g} s on {need.hosts} hosts: "
        f"{need.per_host:.1f} samples/s on each host"
    ]
    for speed in speeds:
        wanted = workers(need, speed)
        kind = "prepared" if shards.opened(speed.root) else "raw"
        over = (
            f", more than the {cores} cores of this machine: use a prepared root or more hosts"
            if wanted > cores
            else ""
        )
        lines.append(
            f"{kind} {speed.root}: {speed.per_core:.1f} samples/s of a core, {wanted} workers a host "
            f"(data.workers={wanted}){over}"
        )
        for task, seconds in speed.seconds.items():
            share = speed.counts[task] / sum(speed.counts.values())
            lines.append(f"  {task}: {1000 * seconds:.1f} ms of CPU a sample, {share:.1%} of the samples")
    return lines


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of the verb."""
    parser = CommandLine(__doc__, "python -m data_pipelines plan")
    parser.add_argument("--root", type=PATH, required=True, help="data root, raw or prepared")
    parser.add_argument("--prepared", type=PATH, help="the same data prepared, to compare")
    parser.add_argument("--split", type=Name(), default="train", help="default %(default)s")
    parser.add_argument(
        "--datasets",
        type=Words(tuple(datasets.DATASETS)),
        default="",
        metavar="A,B",
        help="comma-separated names (default: those of the joint stage that are there)",
    )
    parser.add_argument("--batch-size", type=Whole(1, 2**20), default=256, help="data.batch_size; default %(default)s")
    parser.add_argument("--step-seconds", type=Real(1e-6, 1e6), required=True, help="time of a step without input")
    parser.add_argument(
        "--hosts", type=Whole(1, 2**16), default=1, help="hosts that share a batch; default %(default)s"
    )
    parser.add_argument("--n", type=Whole(1, 10**4), default=16, help="samples of each task; default %(default)s")
    parser.add_argument("--image-size", type=Whole(1, 2**16), default=224, help="image side in pixels, of a raw root")
    parser.add_argument("--video-frames", type=Whole(1, 1024), default=10, help="data.video_frames, of a raw root")
    parser.add_argument("--tokenizer", type=PATH, default=TOKENIZER, help="config key `tokenizer`; default a small one")
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> None:
    """Measure and print the plan."""
    arguments = parse_arguments(argv)
    use_tasks([arguments.task_modules])
    raw = shards.Decoding(arguments.image_size, arguments.video_frames, pad_short_audio=False)
    tokenizer = Tokenizer.load(arguments.tokenizer)
    names = [name for name in arguments.datasets.split(",") if name]
    speeds = []
    for root in filter(None, (arguments.root, arguments.prepared)):
        examples = datasets.read_examples(root, arguments.split, names, missing="skip", malformed="skip")
        prepared = shards.opened(root)
        config = DataConfig(**(prepared.decoding if prepared else raw)._asdict(), lengths=LENGTHS)
        speeds.append(measure(Path(root), examples, config, tokenizer, arguments.n))
    need = Need(arguments.batch_size, arguments.step_seconds, arguments.hosts)
    for line in report(need, speeds, os.cpu_count() or 1):
        print(printable(line))


def main(argv: Sequence[str]) -> None:
    """Run `python -m data_pipelines plan`."""
    run_verb(lambda: run(argv), "--debug" in argv)
