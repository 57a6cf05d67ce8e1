"""The mask stage after the joint one: all frames of the segmentation tasks (released finetune_hyper_lora_avs.py).

    python -m crab_jax.train --config=configs/finetune_avs.py --config.init_from=CKPT --config.tokenizer=LLAMA_DIR \\
        --config.data.root=ROOT --config.steps=N --workdir=DIR

Global batch 256, 30 epochs over every labelled frame: N = 30 * samples / 256. The released weights are of two runs:
S4, MS3 and Ref-AVS together (N = 17,130) and AVSS alone (N = 5,580; set the others' `data.weights` to 0).
"""

from configs import common

MASK_TASKS = ("s4", "ms3", "avss", "ref-avs")


def get_config():
    """Segmentation branch, token embeddings and output matrix; LoRA and Q-Formers stay."""
    config = common.released()
    config.data.frames = "all"
    embeddings = ("llama/embed_tokens/.*", "llama/lm_head/.*")
    config.trainable = (*common.SEGMENTATION, *embeddings)
    config.frozen = (*common.ENCODERS, *common.QFORMERS, *common.LORA, *common.FOURIER, "llama/layers/(?!.*/lora_).*",
                     "llama/norm/.*")
    for task in config.data.weights:
        config.data.weights[task] = float(task in MASK_TASKS)
    return config
