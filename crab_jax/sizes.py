"""Parameters per module, trained and frozen, of any stage, without allocating any.

python -m crab_jax.sizes --config=configs/finetune.py
python -m crab_jax.sizes --config=configs/finetune.py --config.sizes.lora.heads=5
"""

from __future__ import annotations

import sys

import flax.linen as nn

from crab_jax.config import parse_flags
from crab_jax.io.errors import run_verb
from crab_jax.optim import split
from crab_jax.runs import run_params


def main() -> None:
    """Entry point of `python -m crab_jax.sizes`."""
    config, _ = parse_flags(sys.argv, __doc__, workdir=False)
    shapes = nn.unbox(run_params.abstract_params(config.model.build()))
    print(run_params.parameter_table(*split(shapes, config.trainable, config.frozen)))


if __name__ == "__main__":
    run_verb(main, "--debug" in sys.argv)
