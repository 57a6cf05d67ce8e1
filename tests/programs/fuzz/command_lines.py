"""Command lines: options with the worst of values, of every command, and of every key of a config."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from configs import tiny
from crab_jax.config import leaves
from tests.programs.fuzz.cage import Cage
from tests.programs.fuzz.inputs import Command
from tests.programs.fuzz.mutate import worst_values

# What each command is given beside the options that are tried. No model or data is where they say: a line that is
# accepted ends soon.
COMMANDS: dict[str, tuple[str, ...]] = {
    "crab_jax.predict": ("--checkpoint", "{world}/none", "--out", "{out}/o", "--video", "{world}/media/clip.mp4"),
    "crab_jax.evaluate": ("--checkpoint", "{world}/none", "--out", "{out}/o", "--data", "{world}/none"),
    "crab_jax.compare": ("{world}/none", "{world}/none"),
    "crab_jax.report": (
        "--run",
        "{world}/none",
        "--results",
        "{world}/none",
        "--data",
        "{world}/none",
        "--out",
        "{out}/r.html",
    ),
    "crab_jax.inspect": ("router", "--checkpoint", "{world}/none", "--out", "{out}/o"),
    "crab_jax.convert import": (
        "--clip",
        "{world}/none",
        "--llama",
        "{world}/none",
        "--beats",
        "{world}/none",
        "--out",
        "{out}/i",
    ),
    "crab_jax.convert export": ("{world}/none", "--format", "hf", "--out", "{out}/i"),
    "crab_jax.convert verify": ("{world}/none", "--outputs", "{world}/none"),
    "crab_jax.compile": ("--config", "{world}/none", "--topology", "v5e:2x2"),
    "crab_jax.warmup": ("--data", "{world}/none", "--out", "{out}/o"),
    "crab_jax.sizes": ("--config={world}/none",),
    "crab_jax.recipe": ("--out", "{world}/media/clip.mp4/x"),
    "crab_jax.stages": ("--start", "{world}/none", "--out", "{world}/media/clip.mp4/x"),
    "crab_jax.demo": ("--out", "{world}/media/clip.mp4/x"),
    "data_pipelines status": ("--root", "{world}/none"),
    "data_pipelines validate": ("--root", "{world}/none"),
    "data_pipelines prepare": ("--root", "{world}/none", "--out", "{out}/p"),
    "data_pipelines sample": ("--root", "{world}/none", "--out", "{out}/p"),
    "data_pipelines own": ("--csv", "{world}/none", "--root", "{out}/p"),
    "data_pipelines.tokens": ("--corpus", "{world}/none", "--out", "{out}/t.json"),
    "data_pipelines.sources.scenes": ("--out", "{world}/media/clip.mp4/x"),
    **{
        f"data_pipelines.av_uie {verb}": ("--root", "{world}/none", "--out", "{out}/x.jsonl")
        for verb in ("write", "annotate")
    },
    "data_pipelines.av_uie read": ("--root", "{world}/none", "--labels", "{world}/none", "--out", "{out}/x.jsonl"),
    "data_pipelines.av_uie verify": ("--examples", "{world}/none", "--out", "{out}/x"),
    "data_pipelines.av_uie card": ("--examples", "{world}/none", "--out", "{out}/x"),
}
TRAIN = ("--config=configs/tiny.py", "--config.data.root={world}/none", "--workdir={out}/w")
_ELSEWHERE = ("--out", "--pack", "--json", "--hlo", "--root", "--journal")  # where a line would write, or read much


def options_of(command: str, cage: Cage) -> list[str]:
    """The options that the --help of a command names."""
    module, *verb = command.split()
    said = cage.run(module, [*verb, "--help"])
    assert said.code == 0, (command, said.err)
    return [
        name
        for name in dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w-]*", said.out))
        if name not in (*_ELSEWHERE, "--help", "--from-scratch", "--debug")
    ]


def command_line(command: str, options: Sequence[str], chance: random.Random) -> Command:
    """A line of a command with a few options of any value, cut, doubled or unknown ones among them."""
    module, *verb = command.split()
    line = [*verb, *COMMANDS[command]]
    for _ in range(chance.randint(1, 3)):
        option = chance.choice([*options, "--unknown", "--", "-", "--=", "-h1"])
        value = chance.choice(worst_values())
        how = chance.randrange(6)
        line += [
            [option, value],
            [f"{option}={value}"],
            [option],
            [option, value, value],
            [value],
            [option[:-1], value],
        ][how]
    codes = (0, 2, 3) if verb in (["validate"], ["own"]) else (0, 2)
    return Command(module, tuple(part.replace("\0", "") for part in line), codes)


def override_line(chance: random.Random) -> Command:
    """A line of train with a few keys of its config of any value."""
    keys = [key for key, _ in leaves(tiny.get_config()) if key not in ("data.root",)]
    line = list(TRAIN)
    for _ in range(chance.randint(1, 2)):
        key = chance.choice([*keys, *keys, *keys, "unknown", "data", "sizes.llama", "data.weights.x", ""])
        value = chance.choice((*worst_values(), "(1,2)", "[]", "{}", "()", "true", "1", "0.5", "(", "'", "[1,[2]]"))
        line.append(f"--config.{key}={value}")
    return Command("crab_jax.train", tuple(part.replace("\0", "") for part in line))
