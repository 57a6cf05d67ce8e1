"""Decoding: video, picture, sound and mask files to arrays. Every failure is an InputError that names the file."""

from data_pipelines.media.clock import CLOCKS, Timing, check_clock, frame_numbers, placed_length
from data_pipelines.media.container import opened, pictures_of, sound_of
from data_pipelines.media.content import not_supported
from data_pipelines.media.masks import EMPTY_MASK, INLINE_MASK, check_size, decode_runs, inline_mask, read_mask
from data_pipelines.media.outline import outline
from data_pipelines.media.pictures import image_size, is_turned, open_picture, read_image, read_picture, rgb
from data_pipelines.media.pictures import outline as picture_outline
from data_pipelines.media.sound import SAMPLE_RATE, SILENT, Heard, cancels, clip_sound, hear, is_own, read_audio, timing
from data_pipelines.media.video import Watched, moment_picture, read_moment, read_video, video_size, watch

__all__ = [
    "CLOCKS",
    "EMPTY_MASK",
    "INLINE_MASK",
    "SAMPLE_RATE",
    "SILENT",
    "Heard",
    "Timing",
    "Watched",
    "cancels",
    "check_clock",
    "check_size",
    "clip_sound",
    "decode_runs",
    "frame_numbers",
    "hear",
    "image_size",
    "inline_mask",
    "is_own",
    "is_turned",
    "moment_picture",
    "not_supported",
    "open_picture",
    "opened",
    "outline",
    "picture_outline",
    "pictures_of",
    "placed_length",
    "read_audio",
    "read_image",
    "read_mask",
    "read_moment",
    "read_picture",
    "read_video",
    "rgb",
    "sound_of",
    "timing",
    "video_size",
    "watch",
]
