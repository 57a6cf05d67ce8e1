r"""Visual alignment: image and video captions train the visual Q-Former (paper section 4; Video-LLaVA's data).

    python -m crab_jax.train --config=configs/pretrain_visual.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 3 epochs: N = 3 * samples / 256.
"""

from ml_collections import ConfigDict

from crab_jax import defaults


def get_config() -> ConfigDict:
    """Return the config: only the visual Q-Former trains (the released code also trained the output matrix)."""
    config = defaults.released()
    config.data.batch_size = 256
    config.data.datasets = "video_llava"
    config.trainable = ("vl_projector/.*",)
    config.frozen = (*defaults.ENCODERS, "al_projector/.*", *defaults.LLAMA, *defaults.LORA, "seg_module/.*")
    config.data.video_frames = 8
    config.data.lengths = (96, 112, 128, 160, 192, 256, 320, 352, 384, 448, 512, 1024)
    config.loss.text = 1.0
    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.steps = 1000  # N of the launch line
    return config
