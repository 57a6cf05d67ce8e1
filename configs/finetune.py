r"""The joint stage: all tasks of AV-UIE train the three branches and LoRA together (paper section 4).

    python -m crab_jax.train --config=configs/finetune.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 512, 5 epochs: N = 5 * samples / 512. The released run had about 93,000 samples an epoch, so N = 910.
Mesh and micro-batches are inferred: `python -m crab_jax.compile --config=configs/finetune.py --topology=v5e:16x16`.
"""

from ml_collections import ConfigDict

from crab_jax import defaults


def get_config() -> ConfigDict:
    """Return the config: Q-Formers, segmentation branch and LoRA train."""
    config = defaults.released()
    config.trainable = (*defaults.QFORMERS, *defaults.LORA, *defaults.SEGMENTATION)
    config.frozen = (*defaults.ENCODERS, *defaults.LLAMA, *defaults.FOURIER)
    config.sizes.lora.rank = 8
    config.sizes.lora.heads = 3
    config.data.batch_size = 512
    config.loss.text = 1.0
    config.loss.bce = 1.0
    config.loss.dice = 0.5
    config.loss.ce = 1.0
    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.steps = 910
    return config
