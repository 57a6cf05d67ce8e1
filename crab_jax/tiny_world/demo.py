"""Train, evaluate and predict on freshly generated scenes, and write one report. `make demo` runs this.

    python -m crab_jax.demo --out runs/demo

Starts from the committed warm start (crab_jax/tiny_world/recipe.py), or with --from-scratch from a small recipe.
Every step is a command that a user could type. Finished parts are not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crab_jax.checkpoints.models import save_packed
from crab_jax.evaluation import scoring
from crab_jax.io import packaged, paths
from crab_jax.io.bounds import path
from crab_jax.io.errors import CommandLine
from crab_jax.io.files import write_whole
from crab_jax.io.locks import locked
from crab_jax.runs import run_data, run_folder, run_params
from crab_jax.tiny_world.recipe import command, recipe
from data_pipelines.decoded import cache_in
from data_pipelines.examples import Example
from data_pipelines.media import read_mask

SEED = 1  # of the demo's scenes, which differ from the recipe's
TRAIN_SCENES, TEST_SCENES, STEPS = 400, 150, 200


def save_untrained(run: Path, out: Path) -> None:
    """Write the run's model with random weights as a packed model, the untrained baseline."""
    config = dataclasses.replace(run_folder.load_config(run), init_from="")
    save_packed(
        out,
        run_params.initial_params(config, config.model.build()),
        config.to_dict(),
        tokenizer=run_folder.tokenizer_of(config),
    )


def collect_results(out: Path, scenes: Path, image_size: int) -> None:
    """Write results.json: the scores of the trained model and of every baseline."""
    examples = run_data.read_examples(scenes, "test")

    def mask_of(example: Example) -> Any:
        return read_mask(paths.local(scenes / example.mask), image_size, example.mask_kind) if example.mask else None

    def scores_of(name: str) -> dict[str, Any]:
        scores: dict[str, Any] = json.loads((out / name / "results.json").read_text())["tasks"]
        return scores

    baselines = {name: scores_of(name) for name in ("untrained", "audio_muted", "video_blanked")}
    for kind in ("empty", "constant"):
        print(f"scoring the {kind} baseline", flush=True)
        baselines[kind] = scoring.baseline_results(examples, kind, mask_of)["tasks"]
    results = {"tasks": scores_of("trained"), "baselines": baselines}
    write_whole(out / "results.json", json.dumps(results, indent=1))


def demo(out: Path, from_scratch: bool) -> None:
    """Run all parts in order; their seconds are written to seconds.json."""
    scenes, run = out / "scenes", out / ("train_from_scratch" if from_scratch else "train")
    seconds: dict[str, float] = {}

    def part(name: str, work: Callable[..., Any], *arguments: Any) -> None:
        began = time.monotonic()
        work(*arguments)
        seconds[name] = time.monotonic() - began

    part(
        "scenes",
        command,
        "data_pipelines.sources.scenes",
        "--out",
        scenes,
        "--train",
        TRAIN_SCENES,
        "--val",
        8,
        "--test",
        TEST_SCENES,
        "--seed",
        SEED,
        "--workers",
        2,
    )
    start = paths.at(packaged.WARM_START)
    if from_scratch:
        start = out / "recipe" / "warm_start"
        part("recipe", recipe, out / "recipe", start, 0.1)
    part(
        "train",
        command,
        "crab_jax.train",
        "--config=configs/tiny.py",
        f"--config.init_from={start}",
        f"--config.data.root={scenes}",
        f"--config.data.cache_dir={cache_in(out)}",
        f"--config.steps={STEPS}",
        f"--workdir={run}",
    )
    untrained = out / "untrained_model"
    part("untrained model", save_untrained, run, untrained)
    for name, checkpoint, flags in (
        ("trained", run, ()),
        ("audio_muted", run, ("--mute-audio",)),
        ("video_blanked", run, ("--blank-video",)),
        ("untrained", untrained, ()),
    ):
        part(
            f"evaluate {name}",
            command,
            "crab_jax.evaluate",
            "--checkpoint",
            checkpoint,
            "--data",
            scenes,
            "--batch-size",
            32,
            "--max-new-tokens",
            160,
            *flags,
            "--out",
            out / name,
        )
    part("baselines", collect_results, out, scenes, run_params.load_model(run)[0].cfg.image_size)
    clip = scenes / "test" / "000000" / "clip.mp4"
    part(
        "predict",
        command,
        "crab_jax.predict",
        "--checkpoint",
        run,
        "--task",
        "avqa",
        "--video",
        clip,
        "--question",
        "How many instruments are sounding in the video?",
        "--out",
        out / "predict",
    )
    part(
        "predict a mask",
        command,
        "crab_jax.predict",
        "--checkpoint",
        run,
        "--task",
        "ms3",
        "--video",
        clip,
        "--second",
        4,
        "--out",
        out / "predict_mask",
    )
    part(
        "report",
        command,
        "crab_jax.report",
        "--run",
        run,
        "--results",
        out / "results.json",
        "--data",
        scenes,
        "--out",
        out / "report.html",
    )
    seconds = {name: round(value, 1) for name, value in seconds.items()}
    write_whole(out / "seconds.json", json.dumps(seconds, indent=1))
    print("\n" + "\n".join(f"{name:<24}{value:>8} s" for name, value in seconds.items()))
    print(f"\nreport: {out / 'report.html'}")


def main() -> None:
    """Run `python -m crab_jax.demo`."""
    parser = CommandLine(__doc__)
    parser.add_argument("--out", type=path, default=Path("runs/demo"))
    parser.add_argument(
        "--from-scratch", action="store_true", help="train the warm start too, instead of using the committed one"
    )
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args()
    with locked(args.out):
        demo(args.out, args.from_scratch)
