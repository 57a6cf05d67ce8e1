"""Train the paper's five stages at tiny size: `python -m crab_jax.stages` (tiny_world/stages.py)."""

import sys

from crab_jax.io.errors import run_verb
from crab_jax.tiny_world.stages import main

if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
