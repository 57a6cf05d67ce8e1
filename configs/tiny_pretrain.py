r"""The alignment stage at tiny size: Q-Formers and mask decoder learn while the language model stays as it is.

    python -m crab_jax.train --config=configs/tiny_pretrain.py --config.init_from=runs/recipe/warmup \
        --config.data.root=runs/recipe/scenes --workdir=runs/recipe/pretrain

The paper's first phase (section 4: visual, audio and segmentation branch pre-training) in one run: captions stand for
Video-LLaVA's and AudioCaps', single objects for LVIS.
"""

from ml_collections import ConfigDict

from crab_jax import defaults


def get_config() -> ConfigDict:
    """Return the config: Q-Formers and segmentation branch train on captions, boxes and masks; LoRA does not."""
    config = defaults.tiny()
    config.init_from = "runs/recipe/warmup"
    config.trainable = (*defaults.QFORMERS, *defaults.SEGMENTATION)
    config.frozen = (*defaults.ENCODERS, *defaults.LLAMA, *defaults.LORA, *defaults.FOURIER)
    config.data.root = "runs/recipe/scenes"
    config.data.batch_size = 16
    for task in ("ave", "avvp", "avqa"):
        config.data.weights[task] = 0.0
    config.data.weights.arig = 3.0
    config.data.weights.avss = 2.0
    config.loss.text = 1.0
    config.loss.bce = 1.0
    config.loss.dice = 2.0
    config.loss.ce = 8.0
    config.optim.lr = 1e-3
    config.optim.schedule = "cosine"
    config.steps = 600
    config.log_every = 20
    config.checkpoint_every = 200
    return config
