"""What comes with the package, by name: the tokenizer of the tiny world and its trained model, wherever one works."""

from __future__ import annotations

from pathlib import Path

from crab_jax.io import paths

TOKENIZER, WARM_START = "tiny_tokenizer", "warm_start"
FORMER_TOKENIZER = "data_pipelines/tiny_tokenizer.json"  # how older runs name it
_PLACES = {
    TOKENIZER: Path(__file__).parents[2] / "data_pipelines" / "tiny_tokenizer.json",
    WARM_START: Path(__file__).parents[1] / "warm_start",
}


def located(path: str | Path) -> Path:
    """Return the path itself where there is such a file or folder, else what the package has under this name."""
    return paths.at(path) if paths.exists(path) else _PLACES.get(str(path), paths.at(path))
