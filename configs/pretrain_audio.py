"""Audio alignment: audio captions train the audio Q-Former (paper section 4; AudioCaps).

    python -m crab_jax.train --config=configs/pretrain_audio.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \\
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 3 epochs: N = 3 * samples / 256.
"""

from configs import common


def get_config():
    """Only the audio Q-Former trains."""
    config = common.released()
    config.data.datasets = "audiocaps"
    config.data.lengths = (384, 416, 448, 512, 1024)
    config.trainable = ("al_projector/.*",)
    config.frozen = (*common.ENCODERS, "vl_projector/.*", *common.LLAMA, *common.LORA, "seg_module/.*")
    return config
