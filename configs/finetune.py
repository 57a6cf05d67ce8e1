"""The joint stage: all tasks of AV-UIE train the three branches and LoRA together (paper section 4).

    python -m crab_jax.train --config=configs/finetune.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \\
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 512, 5 epochs: N = 5 * samples / 512.
"""

from configs import common


def get_config():
    """Q-Formers, segmentation branch and LoRA."""
    config = common.base()
    config.data.batch_size = 512
    return config
