"""The joint stage at tiny size on the generated scenes, from the warm start.

python -m crab_jax.train --config=configs/tiny.py --config.data.root=runs/scenes --workdir=runs/x
"""

from ml_collections import ConfigDict

from crab_jax import defaults
from crab_jax.io import packaged


def get_config() -> ConfigDict:
    """Return the config: Q-Formers, segmentation branch and LoRA train on all tasks (paper section 4)."""
    config = defaults.tiny()
    config.init_from = packaged.WARM_START
    config.trainable = (*defaults.QFORMERS, *defaults.LORA, *defaults.SEGMENTATION)
    config.frozen = (*defaults.ENCODERS, *defaults.LLAMA, *defaults.FOURIER)
    config.sizes.lora.rank = 8
    config.sizes.lora.heads = 3
    config.data.root = "runs/scenes"
    config.data.batch_size = 16
    # Boxes and class maps are rarest and are learned most slowly; nine of ten pixels are background.
    config.data.weights.arig = 3.0
    config.data.weights.avss = 2.0
    config.loss.text = 1.0
    config.loss.bce = 1.0
    config.loss.dice = 2.0
    config.loss.ce = 8.0
    config.optim.lr = 3e-4
    config.optim.schedule = "cosine"
    config.steps = 600
    config.log_every = 20
    config.checkpoint_every = 200
    return config
