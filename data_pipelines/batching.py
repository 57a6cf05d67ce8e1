"""Loading of one Example into padded arrays, and collation of several into a Batch of static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import numpy as np

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from data_pipelines import decoded, fbank, media
from data_pipelines.examples import Example, seg_source
from data_pipelines.shards import Decoding, Shards
from data_pipelines.tokens import AUDIO_PLACEHOLDER, VISUAL_PLACEHOLDERS, Tokenizer

SEG_KINDS = {"none": 0, "binary": 1, "semantic": 2}
Source = decoded.Files | Shards
Encoded = tuple[np.ndarray, np.ndarray]  # the result of Tokenizer.encode
Array = Any  # numpy on the host, jax.Array on a device


@flax.struct.dataclass
class Batch:
    """B rows of one bucket; docs/architecture.md describes each field."""

    tokens: Array  # int32[B,L]
    slots: Array  # int32[B,L]
    text_mask: Array  # bool[B,L]
    loss_mask: Array  # bool[B,L]
    mask_positions: Array  # int32[B,M,6]
    frames: Array  # uint8[B,T,H,W,3]
    frame_mask: Array  # bool[B,T]
    fbank: Array  # float32[B,S,F,128]
    audio_mask: Array  # bool[B,S]
    seg_frame: Array  # uint8[B,M,H,W,3]
    seg_target: Array  # int32[B,M,H,W]
    seg_kind: Array  # int32[B,M]
    task: Array  # int32[B]
    index: Array  # int32[B]


class Bucket(NamedTuple):
    """The static sizes of a batch: L, T, S, F and M of docs/architecture.md."""

    length: int
    frames: int
    windows: int
    fbank_frames: int
    masks: int


class Fill(NamedTuple):
    """How much of its bucket an Example fills: positions of L, frames of T, windows of S."""

    positions: int
    frames: int
    windows: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How Examples are loaded into arrays."""

    image_size: int = 224  # pixels of a side
    video_frames: int = 10  # frames taken from a video, and T of a video batch
    visual_queries: int = 32  # positions of the LLM per frame
    audio_queries: int = 32  # positions of the LLM per audio window
    lengths: tuple[int, ...] = (256, 384, 512, 640, 768, 896, 1024)  # L of the buckets, in positions
    prompt_only: bool = False  # leave the target out, for generation
    mute_audio: bool = False  # silence instead of the audio
    blank_video: bool = False  # black frames, and a black picture to segment
    pad_short_audio: bool = False  # accept windows shorter than 175 ms, zero-padded
    clock: str = "shown"  # shown | counted: how frames and sound of a clip are placed, see media/clock.py
    on_error: str = "raise"  # raise | skip: what to do with an Example that cannot be loaded
    cache_dir: str = ""  # folder of decoded media; "" = decode every time
    tasks: tuple[str, ...] = dataclasses.field(default_factory=lambda: tuple(TASKS))  # what Batch.task indexes

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise InputError("config", "on_error", f"unknown value {self.on_error!r}", "use 'raise' or 'skip'")
        media.check_clock(self.clock, "config")
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)):
            raise InputError("config", "lengths", f"is {self.lengths}", "give increasing lengths")

    @property
    def decoding(self) -> Decoding:
        """Return the fields that determine the decoded arrays of a medium, which prepared shards must share."""
        return Decoding(self.image_size, self.video_frames, self.pad_short_audio, self.clock)


def _is_pair(example: Example) -> bool:
    """Return whether the example shows a clip and a separate picture (the Ref-AVS test prompt)."""
    return bool(example.image and (example.video or example.frames))


def check_sources(example: Example) -> list[str]:
    """Return the placeholders of the visual sources. Raises InputError if placeholders and media disagree."""
    where = f"example {example.id}"
    present = [name for name in VISUAL_PLACEHOLDERS if name in example.instruction]
    sources = bool(example.video or example.frames) + bool(example.image)
    if sources != len(present) or any(example.instruction.count(name) > 1 for name in present):
        problem = f"has {len(present)} visual placeholders and {sources} visual sources"
        raise InputError(where, "instruction", problem, "put <video> or <image> once where the pictures go")
    if (example.windows != "none") != (example.instruction.count(AUDIO_PLACEHOLDER) == 1):
        count = example.instruction.count(AUDIO_PLACEHOLDER)
        problem = f"has {count} <audio> placeholders and windows {example.windows!r}"
        raise InputError(where, "instruction", problem, "put <audio> once, or set windows to 'none'")
    if example.windows != "none" and not (example.audio or example.video):
        problem = f"is missing, and windows are {example.windows!r}"
        raise InputError(where, "audio", problem, "give an audio file or set windows to 'none'")
    return present


def _rows(example: Example, bucket: Bucket, frames: int, config: DataConfig) -> dict[str, np.ndarray]:
    """Return {placeholder: its feature rows}; a bucket has T * Qv visual rows, then S * Qa audio rows."""
    audio = fbank.WINDOW_COUNT[example.windows] * config.audio_queries
    rows = {AUDIO_PLACEHOLDER: bucket.frames * config.visual_queries + np.arange(audio)}
    placeholders = check_sources(example)
    visual = np.arange(frames * config.visual_queries)
    if _is_pair(example):  # the picture is the last frame
        return {"<video>": visual[: -config.visual_queries], "<image>": visual[-config.visual_queries :], **rows}
    return rows | dict.fromkeys(placeholders, visual)


def _most_frames(example: Example, config: DataConfig) -> int:
    """Return an upper bound of the number of frames of the visual sources, without opening them."""
    clip = config.video_frames if example.video else min(len(example.frames), config.video_frames)
    return clip + bool(example.image)


def _encode(example: Example, tokenizer: Tokenizer, config: DataConfig) -> Encoded:
    return tokenizer.encode(example.instruction, None if config.prompt_only else example.target)


def bucket_for(example: Example, tokenizer: Tokenizer, config: DataConfig, encoded: Encoded | None = None) -> Bucket:
    """Return the smallest bucket that holds an Example; a pure function that opens no media file.

    To keep the number of buckets small, a video or a list of frames always takes `video_frames` frames (one more with a
    separate picture), audio takes 10 windows (1 for windows `one`), and an absent modality one masked frame or window.
    encoded: the example's token ids, if known. Raises InputError naming the example when no length fits, or when its
    placeholders and its media disagree.
    """
    return place(example, tokenizer, config, encoded)[0]


def place(
    example: Example, tokenizer: Tokenizer, config: DataConfig, encoded: Encoded | None = None
) -> tuple[Bucket, Fill]:
    """Return the bucket of an Example (see `bucket_for`), and how far the longest video it can have fills it."""
    bucket = Bucket(
        length=config.lengths[-1],
        frames=config.video_frames + _is_pair(example) if example.video or example.frames else 1,
        windows=1 if example.windows in (*fbank.SINGLE, "none") else 10,
        fbank_frames=fbank.WINDOW_FRAMES[example.windows],
        masks=int(example.mask_kind != "none"),
    )
    frames = _most_frames(example, config)
    rows = _rows(example, bucket, frames, config)
    ids, _ = encoded or _encode(example, tokenizer, config)
    needed = tokenizer.length(ids, rows)
    fitting = [length for length in config.lengths if length >= needed]
    if not fitting:
        problem = f"needs {needed} positions, but the longest bucket has {config.lengths[-1]}"
        fix = "shorten the text or add a length to 'lengths'"
        raise InputError(f"example {example.id}", "instruction", problem, fix)
    return bucket._replace(length=fitting[0]), Fill(needed, frames, fbank.WINDOW_COUNT[example.windows])


def _load_frames(example: Example, source: Source, config: DataConfig, room: int) -> tuple[np.ndarray, int]:
    """Return uint8[room, H, W, 3] and the number of real frames: those of the clip, the picture, then black ones."""
    shown: Sequence[np.ndarray]
    if example.video:
        video = source.video(example.video)
        if len(video) == room:
            return video, room
        shown = list(video)
    else:
        numbers = media.frame_numbers(len(example.frames), config.video_frames)
        shown = [source.picture(example.frames[number], "frames") for number in numbers]
    if example.image:
        shown = [*shown, source.picture(example.image, "image")]
    frames = np.empty((room, config.image_size, config.image_size, 3), np.uint8)
    for frame, picture in zip(frames[: len(shown)], shown, strict=True):
        frame[...] = picture
    frames[len(shown) :] = 0
    return frames, len(shown)


def _load_fbank(example: Example, source: Source) -> np.ndarray:
    """Return float32[S, F, 128]: the filter banks of the audio windows."""
    if example.windows == "none":
        return np.zeros((0, fbank.WINDOW_FRAMES["none"], fbank.MEL_BINS), np.float32)
    return source.sound(str(example.audio or example.video), example.windows, example.second, example.video)


def _seg_picture(example: Example, source: Source, frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the picture to segment, uint8[H, W, 3], and the (width, height) of its file. Raises InputError."""
    field, path = seg_source(example) or ("", "")
    if field == "video" and example.second is not None and example.second < len(frames):
        return frames[example.second], source.video_size(path)
    if field in ("", "video"):
        problem = f"is {example.second}, which is no frame of the example, so the picture to segment is unknown"
        fix = "give the number of a frame, or the picture in 'seg_image'"
        raise InputError(f"example {example.id}", "second", problem, fix)
    return source.picture(path, field), source.picture_size(path, field)


def _load_segmentation(
    example: Example, source: Source, frames: np.ndarray, config: DataConfig
) -> dict[str, np.ndarray]:
    """Return seg_frame, seg_target and seg_kind of one Example; the leading axis M is 1 with a mask_kind, else 0."""
    size = config.image_size
    if example.mask_kind == "none":
        picture, target, kind = np.zeros((0, size, size, 3), np.uint8), np.zeros((0, size, size), np.int32), []
    else:
        picture, picture_size = _seg_picture(example, source, frames)
        if example.mask:
            target = source.mask(example.mask, example.mask_kind, size, picture_size)
        elif config.prompt_only:
            target = np.zeros((size, size), np.int32)
        else:
            fix = "give the mask file, or set mask_kind to 'none'"
            raise InputError(f"example {example.id}", "mask", "is missing", fix)
        picture, target, kind = picture[None], target[None], [SEG_KINDS[example.mask_kind]]
    return {
        "seg_frame": np.zeros_like(picture) if config.blank_video else picture,
        "seg_target": target,
        "seg_kind": np.array(kind, np.int32),
    }


def _pad(values: np.ndarray, length: int, fill: Any = 0) -> np.ndarray:
    """Return `values` with the first axis padded at the end to `length`; unchanged if it has that length."""
    if len(values) == length:
        return values
    padded = np.full((length, *values.shape[1:]), fill, values.dtype)
    padded[: len(values)] = values
    return padded


def text_arrays(
    example: Example,
    tokenizer: Tokenizer,
    config: DataConfig,
    bucket: Bucket,
    frames: int | None = None,
    encoded: Encoded | None = None,
) -> dict[str, np.ndarray]:
    """Return tokens, slots, text_mask, loss_mask [L] and mask_positions [M,6] of an Example, padded to its bucket.

    frames: number of frames of its visual source; None for the largest possible number. encoded: the example's token
    ids, if known. No media file is opened. Raises InputError.
    """
    frames = _most_frames(example, config) if frames is None else frames
    rows = _rows(example, bucket, frames, config)
    expanded = tokenizer.expand(*(encoded or _encode(example, tokenizer, config)), rows)
    if bucket.masks and not config.prompt_only and expanded.mask_positions.min() < 0:
        problem = f"has mask_kind {example.mask_kind!r} but not all of <mask_0> to <mask_5>"
        raise InputError(f"example {example.id}", "target", problem, "write the six mask tokens into the target")
    positions = np.maximum(expanded.mask_positions, 0)  # a prompt has none; 0 is a valid filler
    return {
        "tokens": _pad(expanded.tokens, bucket.length, tokenizer.pad_id),
        "slots": _pad(expanded.slots, bucket.length, -1),
        "text_mask": np.arange(bucket.length) < len(expanded.tokens),
        "loss_mask": _pad(expanded.loss_mask, bucket.length),
        "mask_positions": np.broadcast_to(positions, (bucket.masks, len(positions))),
    }


def load(
    example: Example, root: decoded.Root, tokenizer: Tokenizer, config: DataConfig, index: int = 0
) -> dict[str, np.ndarray]:
    """Return one Example decoded, tokenised and padded to its bucket: the fields of Batch without the leading axis.

    index: position of the example in its list. Raises InputError for any fault of the example.
    """
    source = decoded.source(root, config.decoding, config.cache_dir)
    encoded = _encode(example, tokenizer, config)
    bucket = bucket_for(example, tokenizer, config, encoded)
    frames, shown = _load_frames(example, source, config, bucket.frames)
    sound = _load_fbank(example, source)
    return {
        **text_arrays(example, tokenizer, config, bucket, shown, encoded),
        "frames": np.zeros_like(frames) if config.blank_video else frames,
        "frame_mask": np.arange(bucket.frames) < shown,
        "fbank": _pad(np.full_like(sound, fbank.SILENCE) if config.mute_audio else sound, bucket.windows),
        "audio_mask": np.arange(bucket.windows) < len(sound),
        **_load_segmentation(example, source, frames[:shown], config),
        "task": np.array(config.tasks.index(example.task), np.int32),
        "index": np.array(index, np.int32),
    }


def collate(rows: Iterable[Mapping[str, np.ndarray]], count: int) -> Batch:
    """Return a Batch of `count` loaded Examples of one bucket, with a new leading axis.

    Each row is copied when it arrives, so a generator of rows holds one row in memory at a time.
    """
    fields: dict[str, np.ndarray] = {}
    for place, row in enumerate(rows):
        for name, value in row.items():
            if not place:
                fields[name] = np.empty((count, *value.shape), value.dtype)
            if fields[name][place].shape != value.shape:
                raise ValueError(f"{name} of row {place} is of another bucket")
            fields[name][place] = value
    return Batch(**fields)


def empty_batch(bucket: Bucket, rows: int, image_size: int) -> Batch:
    """Return a batch of filler rows (index -1) without text, pictures or sound, for initialisation and shapes."""
    length, frames, windows, fbank_frames, masks = bucket
    size = (image_size, image_size)
    return Batch(
        tokens=np.zeros((rows, length), np.int32),
        slots=np.full((rows, length), -1, np.int32),
        text_mask=np.zeros((rows, length), bool),
        loss_mask=np.zeros((rows, length), bool),
        mask_positions=np.zeros((rows, masks, 6), np.int32),
        frames=np.zeros((rows, frames, *size, 3), np.uint8),
        frame_mask=np.zeros((rows, frames), bool),
        fbank=np.zeros((rows, windows, fbank_frames, fbank.MEL_BINS), np.float32),
        audio_mask=np.zeros((rows, windows), bool),
        seg_frame=np.zeros((rows, masks, *size, 3), np.uint8),
        seg_target=np.zeros((rows, masks, *size), np.int32),
        seg_kind=np.zeros((rows, masks), np.int32),
        task=np.zeros(rows, np.int32),
        index=np.full(rows, -1, np.int32),
    )


def bucket_of(batch: Batch) -> Bucket:
    """Return the bucket of a batch, from its shapes."""
    windows, fbank_frames = batch.fbank.shape[1:3]
    return Bucket(batch.tokens.shape[1], batch.frames.shape[1], windows, fbank_frames, batch.seg_kind.shape[1])
