"""The mask stage after the joint one: all frames of the segmentation tasks (released finetune_hyper_lora_avs.py).

    python -m crab_jax.train --config=configs/finetune_avs.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \\
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 30 epochs: N = 30 * samples / 256.
"""

from configs import common

MASK_TASKS = ("s4", "ms3", "avss", "ref-avs")


def get_config():
    """Segmentation branch, token embeddings and output matrix; LoRA and Q-Formers stay."""
    config = common.base()
    embeddings = ("llama/embed_tokens/.*", "llama/lm_head/.*")
    config.trainable = (*common.SEGMENTATION, *embeddings)
    config.frozen = (*common.ENCODERS, *common.QFORMERS, *common.LORA, *common.FOURIER, "llama/layers/(?!.*/lora_).*",
                     "llama/norm/.*")
    for task in config.data.weights:
        config.data.weights[task] = float(task in MASK_TASKS)
    return config
