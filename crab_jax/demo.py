"""Make scenes, train from the warm start, evaluate and ask: `python -m crab_jax.demo` (tiny_world/demo.py)."""

import sys

from crab_jax.io.errors import run_verb
from crab_jax.tiny_world.demo import main

if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
