"""Visual alignment: image and video captions train the visual Q-Former (paper section 4; Video-LLaVA's data).

    python -m crab_jax.train --config=configs/pretrain_visual.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \\
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 3 epochs: N = 3 * samples / 256.
"""

from configs import common


def get_config():
    """Only the visual Q-Former trains; the released code also trained the output matrix by mistake."""
    config = common.released()
    config.data.datasets = "video_llava"
    config.trainable = ("vl_projector/.*",)
    config.frozen = (*common.ENCODERS, "al_projector/.*", *common.LLAMA, *common.LORA, "seg_module/.*")
    config.data.video_frames = 8
    config.data.lengths = (96, 112, 128, 160, 192, 256, 320, 352, 384, 448, 512, 1024)
    return config
