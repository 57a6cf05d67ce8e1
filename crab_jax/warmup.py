"""Pre-train the tiny model: `python -m crab_jax.warmup` (tiny_world/pretrain.py)."""

import sys

from crab_jax.io.errors import run_verb
from crab_jax.tiny_world.pretrain import main

if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
