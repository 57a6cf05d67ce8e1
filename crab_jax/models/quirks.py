"""Behaviours of the released code that its weights depend on, by name, in two presets.

"paper" is the default for training; "released" matches the published weights.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Compat:
    """One choice for each behaviour in which the paper and the released code differ.

    chain_queries: each layer of the query generator reads the output of the layer before it. In the released code every
        layer reads the learned queries, so only its last layer counts (models/multimodal_encoder.py:1441).
    seg_taps: which two of the tapped CLIP layers the mask decoder reads: 14 and 23 (paper), or 14 and 22 (released).
    dropout_per_head: draw LoRA dropout once per head (released) instead of once for all heads.
    mask_loss_reduction: "mean" over mask samples, or "released": the sum over samples, scaled by the share of the kind.
    clock: how frames and sound of a clip are aligned (data_pipelines/media/clock.py). "shown": frames by the time at
        which they are shown, and sound in step with them. "counted" (released): frames by number, and sound from its
        first sample. The two agree at a constant frame rate when sound starts and ends with the pictures.
    """

    chain_queries: bool
    seg_taps: tuple[int, int]
    dropout_per_head: bool
    mask_loss_reduction: str
    clock: str


PRESETS = {
    "paper": Compat(
        chain_queries=True, seg_taps=(0, 2), dropout_per_head=False, mask_loss_reduction="mean", clock="shown"
    ),
    "released": Compat(
        chain_queries=False, seg_taps=(0, 1), dropout_per_head=True, mask_loss_reduction="released", clock="counted"
    ),
}
