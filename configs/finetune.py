"""The joint stage: all tasks of AV-UIE train the three branches and LoRA together (paper section 4).

    python -m crab_jax.train --config=configs/finetune.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \\
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 512, 5 epochs: N = 5 * samples / 512. The released run had about 93,000 samples an epoch, so N = 910.
Mesh and micro-batches are inferred: `python -m crab_jax.compile --config=configs/finetune.py --topology=v5e:16x16`.
"""

from configs import common


def get_config():
    """Q-Formers, segmentation branch and LoRA."""
    config = common.released()
    config.data.batch_size = 512
    config.steps = 910
    return config
