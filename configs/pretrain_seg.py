r"""Mask alignment: named objects in pictures train the segmentation branch (paper section 4; LVIS).

    python -m crab_jax.train --config=configs/pretrain_seg.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 3 epochs: N = 3 * samples / 256.
"""

from ml_collections import ConfigDict

from crab_jax import defaults


def get_config() -> ConfigDict:
    """Return the config: only the segmentation branch trains."""
    config = defaults.released()
    config.data.batch_size = 256
    config.data.datasets = "lvis"
    config.data.lengths = (112, 128, 160, 192, 256, 1024)
    config.trainable = defaults.SEGMENTATION
    config.frozen = (*defaults.ENCODERS, *defaults.QFORMERS, *defaults.LLAMA, *defaults.LORA, *defaults.FOURIER)
    config.loss.text = 1.0
    config.loss.bce = 1.0
    config.loss.dice = 0.5
    config.loss.ce = 1.0
    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.steps = 1000  # N of the launch line
    return config
