"""Run the paper's five stages at tiny size on generated scenes, each from the one before.

    python -m crab_jax.stages --out runs/stages

As on a pod (docs/training.md) the first stage starts from pre-trained encoders and a language model, here those of the
committed warm start; everything that Crab adds is drawn at random. Every stage is the command that a user would type
with the stage's own config and --config.model=tiny. A finished stage is not repeated, an interrupted one resumes.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import NamedTuple

from crab_jax import defaults
from crab_jax.checkpoints.models import save_packed
from crab_jax.evaluation.results import METRICS
from crab_jax.io import packaged, paths
from crab_jax.io.bounds import Real, path
from crab_jax.io.errors import CommandLine, InputError
from crab_jax.io.locks import locked
from crab_jax.io.structured import read_lines
from crab_jax.optim import split
from crab_jax.runs import run_params
from crab_jax.tasks import TASKS
from crab_jax.tiny_world.recipe import command
from data_pipelines.decoded import cache_in

# The parameters that Crab adds to the encoders and the language model.
ADDED = (*defaults.QFORMERS, *defaults.LORA, *defaults.SEGMENTATION, *defaults.FOURIER)
SEED = 2  # of the scenes, which differ from those of the recipe and the demo
CAPTIONS = ("avcap",)


class Stage(NamedTuple):
    """One stage: configs/<name>.py on the scenes' questions of `tasks` (those of the config when empty)."""

    name: str
    tasks: tuple[str, ...]
    steps: int


STAGES = (
    Stage("pretrain_visual", CAPTIONS, 100),
    Stage("pretrain_audio", CAPTIONS, 100),
    Stage("pretrain_seg", ("s4",), 200),
    Stage("finetune", (), 400),
    Stage("finetune_avs", (), 200),
)


def save_base(start: Path, out: Path) -> None:
    """Write the encoders and the language model of a packed model, without the parameters that Crab adds."""
    _, params, config, tokenizer = run_params.load_model(start)
    _, base = split(params, ADDED, (*defaults.ENCODERS, *defaults.LLAMA))
    save_packed(out, base, config.to_dict(), tokenizer=tokenizer)


def flags_of(stage: Stage, scenes: Path, base: Path, scale: float) -> tuple[str, ...]:
    """Return the overrides that run a stage of the paper with the tiny model on the scenes."""
    steps = max(8, int(stage.steps * scale))
    weights = [f"--config.data.weights.{task}=0" for task in TASKS if stage.tasks and task not in stage.tasks]
    return (
        "--config.model=tiny",
        "--config.frozen_dtype=float32",
        f"--config.tokenizer={base}",
        f"--config.data.root={scenes}",
        f"--config.data.cache_dir={cache_in(scenes.parent)}",
        "--config.data.batch_size=16",
        "--config.data.lengths=(144,192,272)",
        "--config.data.video_frames=10",
        "--config.optim.lr=1e-3",
        f"--config.steps={steps}",
        f"--config.log_every={max(1, steps // 8)}",
        *weights,
    )


def loss_fall(run: Path) -> tuple[float, float]:
    """Return the mean training loss over the first and over the last quarter of a run's records.

    Raises InputError if it has not fallen.
    """
    values = [line["loss"] for line in read_lines(run / "metrics.jsonl", METRICS, constants=True) if "loss" in line]
    quarter = max(1, len(values) // 4)
    first, last = mean(values[:quarter]), mean(values[-quarter:])
    if not last < first:
        raise InputError(
            str(run / "metrics.jsonl"),
            "loss",
            f"went from {first:.4f} to {last:.4f}",
            "train longer (--scale), or look for what this stage does not train",
        )
    return first, last


def stages(out: Path, start: Path, scale: float) -> dict[str, tuple[float, float]]:
    """Run every stage below `out` and return {stage: (loss at its beginning, loss at its end)}."""
    scenes, base = out / "scenes", out / "base"
    command(
        "data_pipelines.sources.scenes",
        "--out",
        scenes,
        "--train",
        max(24, int(400 * scale)),
        "--val",
        2,
        "--test",
        2,
        "--seed",
        SEED,
        "--workers",
        2,
    )
    save_base(start, base)
    before, falls = base, {}
    for stage in STAGES:
        run = out / stage.name
        fresh = [] if before != base else [f"--config.fresh={ADDED!r}"]
        command(
            "crab_jax.train",
            f"--config=configs/{stage.name}.py",
            f"--config.init_from={before}",
            *fresh,
            *flags_of(stage, scenes, base, scale),
            f"--workdir={run}",
        )
        falls[stage.name] = loss_fall(run)
        before = run
    print("\n" + "\n".join(f"{name:<18}loss {first:.4f} -> {last:.4f}" for name, (first, last) in falls.items()))
    return falls


def main() -> None:
    """Run `python -m crab_jax.stages`."""
    parser = CommandLine(__doc__, "python -m crab_jax.stages")
    parser.add_argument("--out", type=path, default=Path("runs/stages"))
    parser.add_argument(
        "--start",
        type=path,
        default=paths.at(packaged.WARM_START),
        help="packed model that gives the encoders and the language model",
    )
    parser.add_argument(
        "--scale", type=Real(1e-4, 1e3), default=1.0, help="share of the scenes and steps, for a quick look"
    )
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args()
    with locked(args.out):
        stages(args.out, args.start, args.scale)
