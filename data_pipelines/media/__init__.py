"""Decoding: video, picture, sound and mask files to arrays. Every failure is an InputError that names the file."""

from data_pipelines.media.container import mp4_damage
from data_pipelines.media.masks import (
    EMPTY_MASK,
    INLINE_MASK,
    SEMANTIC_CLASSES,
    avss_palette,
    check_size,
    decode_runs,
    inline_mask,
    read_mask,
)
from data_pipelines.media.pictures import alpha, image_size, read_image
from data_pipelines.media.sound import SAMPLE_RATE, read_audio, riff_damage, stated_seconds
from data_pipelines.media.video import Watched, frame_numbers, read_video, video_size, watch

__all__ = [
    "EMPTY_MASK", "INLINE_MASK", "SAMPLE_RATE", "SEMANTIC_CLASSES", "Watched", "alpha", "avss_palette", "check_size",
    "decode_runs", "frame_numbers", "image_size", "inline_mask", "mp4_damage", "read_audio", "read_image", "read_mask",
    "read_video", "riff_damage", "stated_seconds", "video_size", "watch",
]
