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


def blocks(language: str = "") -> list[str]:
    """The README's code blocks of a language."""
    found = re.findall(r"```(\w*)\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    return [code for name, code in found if name == language]


def readme_commands() -> list[list[str]]:
    """The words of every `python -m` command in the README's code blocks, in order."""
    lines = "\n".join(blocks()).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(".venv/bin/python -m")]


def test_the_readme_opens_with_the_two_commands():
    assert blocks()[0].split("\n")[:2] == ["make demo", "make test"]


@pytest.mark.slow
def test_the_python_code_runs_in_any_folder(scenes_root, tmp_path):
    """With a package `configs` of somebody else's beside it."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise ImportError('of another project')")
    (tmp_path / "clip.mp4").symlink_to(scenes_root / "test" / "000000" / "clip.mp4")
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(REPOSITORY)!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= 2


@pytest.mark.slow
def test_the_python_commands_run_in_order(scenes_root, tmp_path):
    scene = scenes_root / "test" / "000000"
    places = {
        "runs/demo/train": REPOSITORY / "crab_jax/warm_start",
        "runs/demo/scenes": scenes_root,
        "clip.mp4": scene / "clip.mp4",
        "picture.jpg": scene / "frames" / "3.jpg",
        "sound.wav": scene / "audio.wav",
        "runs/": f"{tmp_path}/",
    }
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
