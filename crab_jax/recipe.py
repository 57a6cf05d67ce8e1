"""Make the tiny model from nothing: `python -m crab_jax.recipe` (tiny_world/recipe.py)."""

import sys

from crab_jax.io.errors import run_verb
from crab_jax.tiny_world.recipe import main

if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
