"""The alignment stage at tiny size: Q-Formers and mask decoder learn while the language model stays as it is.

    python -m crab_jax.train --config=configs/tiny_pretrain.py --config.init_from=runs/recipe/warmup \\
        --config.data.root=runs/recipe/scenes --workdir=runs/recipe/pretrain

The paper's first phase (section 4: visual, audio and segmentation branch pre-training) in one run: captions stand for
Video-LLaVA's and AudioCaps', single objects for LVIS.
"""

from configs import common, tiny


def get_config():
    """Q-Formers and segmentation branch on captions, boxes and masks; LoRA not yet."""
    config = tiny.get_config()
    config.init_from = "runs/recipe/warmup"
    config.data.root = "runs/recipe/scenes"
    config.trainable = (*common.QFORMERS, *common.SEGMENTATION)
    config.frozen = (*common.ENCODERS, *common.LLAMA, *common.LORA, *common.FOURIER)
    for task in ("ave", "avvp", "avqa"):
        config.data.weights[task] = 0.0
    config.optim.lr = 1e-3
    config.steps = 600
    return config
