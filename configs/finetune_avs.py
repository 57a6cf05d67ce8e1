r"""The mask stage after the joint one: all frames of the segmentation tasks (released finetune_hyper_lora_avs.py).

    python -m crab_jax.train --config=configs/finetune_avs.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 30 epochs over every labelled frame: N = 30 * samples / 256. The released weights are of two runs:
S4, MS3 and Ref-AVS together (N = 17,130) and AVSS alone (N = 5,580; set the others' `data.weights` to 0).
"""

from ml_collections import ConfigDict

from crab_jax import defaults

MASK_TASKS = ("s4", "ms3", "avss", "ref-avs")


def get_config() -> ConfigDict:
    """Return the config: segmentation branch, token embeddings and output matrix train."""
    config = defaults.released()
    config.data.batch_size = 256
    config.data.frames = "all"
    embeddings = ("llama/embed_tokens/.*", "llama/lm_head/.*")
    config.trainable = (*defaults.SEGMENTATION, *embeddings)
    config.frozen = (
        *defaults.ENCODERS,
        *defaults.QFORMERS,
        *defaults.LORA,
        *defaults.FOURIER,
        "llama/layers/(?!.*/lora_).*",
        "llama/norm/.*",
    )
    for task in config.data.weights:
        config.data.weights[task] = float(task in MASK_TASKS)
    config.loss.text = 1.0
    config.loss.bce = 1.0
    config.loss.dice = 0.5
    config.loss.ce = 1.0
    config.optim.lr = 1e-4
    config.optim.schedule = "cosine"
    config.steps = 1000  # N of the launch line
    return config
