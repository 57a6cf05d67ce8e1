"""Say what a host must decode for a stage on a topology, and how many worker processes that takes.

    python -m data_pipelines plan --config=configs/finetune.py --root DATA --topology=v5e:16x16 --step-seconds 0.43
    python -m data_pipelines plan --config=configs/finetune.py --root DATA --topology=v5e:16x16 --compiled out.json

Samples per second of a host follow from data.batch_size, the number of hosts and the time of a step: measured, or the
least that the compiler's arithmetic and memory allow (--compiled, the --json of crab_jax.compile). Those of a core are
measured here, in CPU time up to the batch, on a small sample of the data root: as it is, and prepared. Give any config
key with --config.key=value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crab_jax.config import RunConfig, parse_flags
from crab_jax.io import bounds, packaged, paths
from crab_jax.io.bounds import ANY_PLACE, ANYWHERE, PATH, Name, Real, Whole
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import out_file, write_whole
from crab_jax.io.progress import on_stderr
from crab_jax.io.structured import read_json
from crab_jax.parallel import chips
from crab_jax.runs import run_data
from data_pipelines import mixture, prepare, shards
from data_pipelines.batching import DataConfig
from data_pipelines.examples import Example, spread
from data_pipelines.shards import Decoding
from data_pipelines.tokens import Tokenizer

CHIPS_A_HOST = 4  # of slices of several hosts, for every generation in `chips`
ROUNDS, BATCH = 3, 8
COMPILED = {"topology": bounds.Text(1, 100), "roofline_s": {"step": Real(1e-9, 1e9)}}


@dataclasses.dataclass(frozen=True)
class Need:
    """What the hosts of a run must deliver together. feeding: hosts that load rows of their own."""

    batch_size: int
    feeding: int
    step_seconds: float

    @property
    def host_rate(self) -> float:
        """Return samples per second of one host."""
        return self.batch_size / self.feeding / self.step_seconds

    def workers(self, core_rate: float) -> int:
        """Return how many processes of `core_rate` samples per second a host needs."""
        return math.ceil(self.host_rate / core_rate)


def need_of(batch_size: int, count: int, hosts: int, tensor: int, step_seconds: float) -> Need:
    """Return the need of a batch on `count` chips of `hosts` hosts.

    The chips of one `tensor` group share rows, so where a group spans hosts, each of them loads the same.
    """
    return Need(batch_size, max(1, min(hosts, count // tensor)), step_seconds)


def core_rate(examples: Sequence[Example], root: Path, tokenizer: Tokenizer, config: DataConfig) -> float:
    """Return samples per second of one core, up to the batch: CPU time, the median of some rounds after a first one."""
    seconds = []
    for _ in range(ROUNDS + 1):
        began, rows = time.process_time(), 0
        for _, batch in mixture.eval_batches(examples, root, tokenizer, config, BATCH, threads=1, prompt_only=False):
            rows += int((batch.index >= 0).sum())
        seconds.append((time.process_time() - began) / max(1, rows))
    if not rows:
        raise InputError(str(root), "--root", "holds no example that can be read", "see data_pipelines validate")
    return 1 / max(1e-9, statistics.median(seconds[1:]))


def prepared_rate(examples: Sequence[Example], root: Path, tokenizer: Tokenizer, config: DataConfig) -> float:
    """Return `core_rate` of the same Examples of a raw root, prepared in a temporary folder."""
    decoding = Decoding(config.image_size, config.video_frames, config.pad_short_audio, config.clock)
    with tempfile.TemporaryDirectory() as folder:
        prepare.prepare_sample(prepare.Settings(str(root), decoding, ("train",), 10**9), paths.at(folder), examples)
        return core_rate(examples, paths.at(folder), tokenizer, config)


def plan(config: RunConfig, root: Path, split: str, samples: int, need: Need) -> dict[str, Any]:
    """Return the report: the need, and for raw and prepared data the rate of a core and the workers of a host."""
    listed = run_data.read_examples(
        root, split, datasets=config.mixture.datasets, variant=config.mixture.variant, missing="skip", malformed="skip"
    )
    examples = spread([example for example in listed if config.mixture.weights.get(example.task, 1) > 0], samples)
    if not examples:
        raise InputError(str(root), "--root", f"holds no example of {split!r} that is drawn", "see data.weights")
    tokenizer = Tokenizer.load(config.tokenizer or packaged.TOKENIZER)
    data = dataclasses.replace(config.data, on_error="skip", cache_dir="")
    rates: dict[str, float] = {}
    if shards.opened(root):
        rates["prepared"] = core_rate(examples, root, tokenizer, data)
    else:
        on_stderr(f"reading {len(examples)} examples of {root}, then preparing them")
        rates["raw"] = core_rate(examples, root, tokenizer, data)
        rates["prepared"] = prepared_rate(examples, root, tokenizer, data)
    return {
        "batch_size": need.batch_size,
        "hosts": need.feeding,
        "step_seconds": need.step_seconds,
        "host_samples_per_s": need.host_rate,
        "examples": len(examples),
        **{name: {"core_samples_per_s": rate, "workers_per_host": need.workers(rate)} for name, rate in rates.items()},
    }


def text(report: dict[str, Any], topology: str, measured: bool) -> str:
    """Format a report as text."""
    step = f"{report['step_seconds']:.3g} s"
    lines = [
        f"{topology}: a batch of {report['batch_size']} in {step if measured else f'at least {step}'} on "
        f"{report['hosts']} hosts, so each delivers {'' if measured else 'up to '}{report['host_samples_per_s']:.1f} "
        "samples/s",
        f"{'':<10}{'samples/s a core':>18}{'workers a host':>16}",
    ]
    lines += [
        f"{name:<10}{report[name]['core_samples_per_s']:>18.1f}{report[name]['workers_per_host']:>16}"
        for name in ("raw", "prepared")
        if name in report
    ]
    lines.append(f"(CPU time on this machine, {report['examples']} examples; data.workers counts those of one process)")
    return "\n".join(lines)


def command_line() -> CommandLine:
    """Return the parser of all flags except --config.key=value."""
    parser = CommandLine(__doc__, "python -m data_pipelines plan")
    parser.add_argument("--config", type=PATH, required=True, metavar="FILE", help="configs/<stage>.py")
    parser.add_argument("--root", type=ANYWHERE, required=True, help="data root, raw or prepared")
    parser.add_argument("--topology", default="", metavar="NAME", help="v5e:16x16, v5p:2x2x4, v6e:4x4, ...")
    parser.add_argument(
        "--hosts",
        type=Whole(0, 10**6),
        default=0,
        help=f"default: one for {CHIPS_A_HOST} chips of the topology; without a topology 1",
    )
    parser.add_argument("--step-seconds", type=Real(1e-6, 1e6), default=None, help="time of a step")
    parser.add_argument("--compiled", type=ANY_PLACE, default="", help="in its place, the --json of crab_jax.compile")
    parser.add_argument("--split", type=Name(), default="train")
    parser.add_argument("--samples", type=Whole(1, 10**4), default=4, help="examples of each task to read")
    parser.add_argument("--json", type=bounds.path, metavar="FILE", help="write the report")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def run(argv: Sequence[str]) -> None:
    """Print the plan that a command line asks for."""
    arguments, rest = command_line().parse_known_args(argv)
    config, _ = parse_flags(["plan", f"--config={arguments.config}", *rest], None, workdir=False)
    if arguments.json:
        out_file(arguments.json, "--json")
    if not paths.at(arguments.root).is_dir():
        raise InputError(arguments.root, "--root", "is no folder", "give the folder that holds the datasets")
    if bool(arguments.compiled) == (arguments.step_seconds is not None):
        raise InputError("command line", "--step-seconds", "or --compiled is needed", "give one of them")
    topology, seconds = arguments.topology, arguments.step_seconds
    if arguments.compiled:
        compiled = read_json(arguments.compiled, COMPILED, "--compiled", "give the --json of crab_jax.compile")
        topology, seconds = topology or compiled["topology"], compiled["roofline_s"]["step"]
    count = chips.chips_of(topology)[1] if topology else max(1, arguments.hosts)
    hosts = arguments.hosts or max(1, count // CHIPS_A_HOST if topology else 1)
    need = need_of(config.mixture.batch_size, count, hosts, config.mesh.tensor or 1, seconds)
    report = plan(config, paths.at(arguments.root), arguments.split, arguments.samples, need)
    print(text(report, topology or f"{hosts} hosts", arguments.step_seconds is not None))
    if arguments.json:
        write_whole(arguments.json, json.dumps({"topology": topology, **report}, indent=1) + "\n")


def main(argv: Sequence[str]) -> None:
    """Run `python -m data_pipelines plan`."""
    run_verb(lambda: run(argv), "--debug" in argv)
