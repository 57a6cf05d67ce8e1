r"""Audio alignment: audio captions train the audio Q-Former (paper section 4; AudioCaps).

    python -m crab_jax.train --config=configs/pretrain_audio.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 3 epochs: N = 3 * samples / 256.
"""

from ml_collections import ConfigDict

from crab_jax import defaults


def get_config() -> ConfigDict:
    """Return the config: only the audio Q-Former trains."""
    config = defaults.released()
    config.data.batch_size = 256
    config.data.datasets = "audiocaps"
    config.data.lengths = (384, 416, 448, 512, 1024)
    config.trainable = ("al_projector/.*",)
    config.frozen = (*defaults.ENCODERS, "vl_projector/.*", *defaults.LLAMA, *defaults.LORA, "seg_module/.*")
    config.loss.text = 1.0
    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.steps = 1000  # N of the launch line
    return config
