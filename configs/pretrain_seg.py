"""Mask alignment: named objects in pictures train the segmentation branch (paper section 4; LVIS).

    python -m crab_jax.train --config=configs/pretrain_seg.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \\
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 3 epochs: N = 3 * samples / 256.
"""

from configs import common


def get_config():
    """Only the segmentation branch trains."""
    config = common.released()
    config.data.datasets = "lvis"
    config.data.lengths = (112, 128, 160, 192, 256, 1024)
    config.trainable = common.SEGMENTATION
    config.frozen = (*common.ENCODERS, *common.QFORMERS, *common.LLAMA, *common.LORA, *common.FOURIER)
    return config
