"""Every command of the README runs as written, on the committed warm start and a few scenes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# Keeps the training command short; everything else is as a reader would type it.
SHORT = ["--config.steps=2", "--config.data.batch_size=2", "--config.optim.warmup_share=0.5"]


def readme_commands() -> list[list[str]]:
    """The words of every `python -m` command in the README's code blocks, in order."""
    blocks = re.findall(r"```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(".venv/bin/python -m")]


def test_the_readme_opens_with_the_two_commands():
    first = re.search(r"```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert first and first.group(1).split("\n")[:2] == ["make demo", "make test"]


@pytest.mark.slow
def test_the_python_commands_run_in_order(scenes_root, tmp_path):
    scene = scenes_root / "test" / "000000"
    places = {"runs/demo/train": REPOSITORY / "crab_jax/warm_start", "runs/demo/scenes": scenes_root,
              "clip.mp4": scene / "clip.mp4", "picture.jpg": scene / "frames" / "3.jpg",
              "sound.wav": scene / "audio.wav", "runs/": f"{tmp_path}/"}
    commands = readme_commands()
    assert {words[2] for words in commands} >= {"crab_jax.train", "crab_jax.evaluate", "crab_jax.predict"}
    for words in commands:
        line = [sys.executable, *words[1:]]
        for written, real in places.items():
            line = [word if word.startswith(f"{real}") else word.replace(written, str(real)) for word in line]
        line += SHORT if "crab_jax.train" in line else []
        line += ["--limit", "1", "--max-new-tokens", "96"] if "crab_jax.evaluate" in line else []
        done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 0, (line, done.stderr[-2000:])
    assert (tmp_path / "mine" / "predictions.jsonl").exists()
    assert (tmp_path / "x" / "test" / "results.json").exists()
