"""The joint stage at tiny size on the generated scenes, from the warm start.

    python -m crab_jax.train --config=configs/tiny.py --config.data.root=runs/scenes --workdir=runs/x
"""

from configs import common


def get_config():
    """Q-Formers, segmentation branch and LoRA train together on all tasks (paper section 4, instruction tuning)."""
    config = common.base()
    config.model = "tiny"
    config.init_from = "warm_start"
    config.frozen_dtype = "float32"
    config.tokenizer = "data_pipelines/tiny_tokenizer.json"
    config.data.root = "runs/scenes"
    config.data.batch_size = 16
    config.data.lengths = (144, 192, 272)
    # Boxes and class maps are the rarest and learn slowest; nine pixels of ten are background.
    config.data.weights.arig = 3.0
    config.data.weights.avss = 2.0
    config.loss.dice = 2.0
    config.loss.ce = 8.0
    config.optim.lr = 3e-4
    config.steps = 600
    config.log_every = 20
    config.checkpoint_every = 200
    return config
