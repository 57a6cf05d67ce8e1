"""Compat: behaviours of the released code that its weights depend on, under names, in two presets.

`paper` is the default for training here; `released` matches the published weights (spec of each field below).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Compat:
    """chain_queries: the query generator feeds each layer the previous one's output. The released code feeds every
        layer the raw queries, so only its last layer counts (models/multimodal_encoder.py:1441).
    seg_taps: which two of the tapped CLIP layers feed the mask decoder: paper 14 and 23, released 14 and 22.
    dropout_per_head: LoRA dropout drawn once per head (released) instead of once for A's input.
    mask_loss_reduction: "mean" over mask samples, or "released": summed over samples, scaled by the share of the kind.
    clock: "shown": frames of a clip by the time at which they are shown, and its sound in step with them; "counted"
        (released): frames by number, sound from its first sample (data_pipelines/media/clock.py). At a constant frame
        rate, with sound that starts and ends with the pictures, both are the same.
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
