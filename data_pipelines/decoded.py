"""Decoded media of a data root, from its files (with a cache) or from prepared shards."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy

from crab_jax.io import paths
from crab_jax.io.errors import InputError
from data_pipelines import allocator, datasets, fbank, media, shards
from data_pipelines.examples import Example, seg_source
from data_pipelines.shards import Decoding, Shards

CACHED = 2  # increased whenever decoding changes, so that older cache entries are not used
_log = logging.getLogger(__name__)


@functools.lru_cache
def _no_cache(folder: str, problem: str) -> None:
    _log.warning("data.cache_dir %s is not used: %s", folder, problem)


@functools.lru_cache
def _bases(root: Path) -> tuple[str, ...]:
    """Return the folders in which the files of a data root may lie.

    These are the root and each dataset's folder in it, which may be on another disk; in a root with its own list, only
    the root.
    """
    folders = (
        []
        if any(root.glob("*.jsonl"))
        else [
            root / folder for name in datasets.DATASETS if (root / (folder := datasets.folder_of(root, name))).is_dir()
        ]
    )
    return tuple(dict.fromkeys(paths.real(folder) for folder in (root, *folders)))


def cache_in(folder: Path) -> str:
    """Return the `data.cache_dir` for what is made in a folder; none in a bucket, whose objects are cached whole."""
    return "" if paths.is_remote(folder) else str(folder / "cache")


def inside(root: str | Path, path: str | Path) -> Path:
    """Return the file of a path in a data root; for one in a bucket, its copy on this machine.

    Raises InputError for a link out of the root, and for an object that cannot be fetched. An absolute path, which no
    list may hold, is accepted from the caller.
    """
    full = paths.at(root) / path
    if paths.is_remote(full):
        return _fetched(full)
    if not os.path.isabs(path):
        real = os.path.realpath(full)
        if not any(real.startswith(base.rstrip(os.sep) + os.sep) for base in _bases(Path(root))):
            raise InputError(
                str(full),
                "",
                "is a link out of the data root",
                "put the file there, or link the dataset's whole folder",
            )
    return full


def _fetched(full: Path) -> Path:
    try:
        return paths.local(full)
    except OSError as error:
        raise InputError(str(full), "", f"cannot be read ({error.strerror})", "see docs/training.md, Buckets") from None


class Files:
    """The media files of a data root; `Shards` has the same methods. Paths are relative to the root, or absolute.

    Pictures are kept as long as the object, so that a frame that is also segmented is decoded once. cache_dir: folder
    of decoded media, "" = decode every time. All methods raise InputError.
    """

    def __init__(self, root: str | Path, decoding: Decoding, cache_dir: str = ""):
        allocator.keep_freed()
        self.root, self.decoding, self.cache_dir = paths.at(root), decoding, cache_dir
        self._pictures: dict[str, np.ndarray] = {}

    def _at(self, path: str) -> Path:
        return inside(self.root, path)

    def video(self, path: str) -> np.ndarray:
        """Return uint8[n, S, S, 3]: evenly spaced frames of a video."""
        size, count, clock = self.decoding.image_size, self.decoding.video_frames, self.decoding.clock
        full = self._at(path)
        return self._cached(full, ("video", count, size, clock), lambda: media.read_video(full, count, size, clock))

    def video_size(self, path: str) -> tuple[int, int]:
        """Return the (width, height) of the video itself."""
        return media.video_size(self._at(path))

    def picture(self, path: str, field: str) -> np.ndarray:
        """Return a picture as uint8[S, S, 3]."""
        if path not in self._pictures:
            size, full = self.decoding.image_size, self._at(path)
            self._pictures[path] = self._cached(full, ("image", size), lambda: media.read_image(full, size, field))
        return self._pictures[path]

    def picture_size(self, path: str, field: str) -> tuple[int, int]:
        """Return the (width, height) of the picture itself."""
        return media.image_size(self._at(path), field)

    def samples(self, path: str, video: str | None) -> np.ndarray:
        """Return float32[N] at 16 kHz: the sound of a clip, from its `video` or a separate file."""
        return media.clip_sound(self._at(path), video and self._at(video), self.decoding.clock)

    def sound(self, path: str, windows: str, second: int | None, video: str | None = None) -> np.ndarray:
        """Return float32[windows, frames, 128]: the filter banks of the audio windows of a clip; see `samples`."""
        full, short = self._at(path), self.decoding.pad_short_audio

        def decode() -> np.ndarray:
            return fbank.fbank(fbank.cut_windows(self.samples(path, video), windows, second, str(full), short))

        beside = shards.beside(path, video, self.decoding)
        settings = (
            "fbank",
            windows,
            second if windows in fbank.SINGLE else "",
            short,
            self.decoding.clock,
            *(_stamp(self._at(beside)) if beside else ()),
        )
        return self._cached(full, settings, decode)

    def mask(self, path: str, kind: str, size: int, picture: tuple[int, int] | None = None) -> np.ndarray:
        """Return int32[size, size]: a ground-truth mask; `picture` is the (width, height) that it must have."""
        return media.read_mask(self._at(path), size, kind, picture)

    def _cached(self, path: Path, settings: Sequence[Any], decode: Callable[[], np.ndarray]) -> np.ndarray:
        """Return `decode()`, kept as a file in the cache folder; files appear there complete or not at all.

        A cache that cannot be read or written is not used, with one warning.

        Safetensors rather than .npy: NumPy parses .npy headers with `ast`, which is not safe in threads on Python 3.11
        (it fails now and then with "AST constructor recursion depth mismatch").
        """
        if not self.cache_dir or not path.is_file():
            return decode()
        key = "|".join(map(str, (CACHED, *_stamp(path), *settings)))
        folder = Path(self.cache_dir)
        entry = folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.safetensors"
        try:
            return safetensors.numpy.load_file(entry)["value"]
        except (OSError, safetensors.SafetensorError):
            pass
        value = decode()
        partial = folder / f"{uuid.uuid4().hex}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(safetensors.numpy.save({"value": np.ascontiguousarray(value)}))
            os.replace(partial, entry)
        except OSError as error:
            _no_cache(self.cache_dir, error.strerror or "")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        return value


def _stamp(path: Path) -> tuple[Any, ...]:
    """Return values that change when a file does; () if it does not exist."""
    if not path.is_file():
        return ()
    status = path.stat()
    return path.resolve(), status.st_mtime_ns, status.st_size


class Decodable(Protocol):
    """Media that are given directly instead of a data root."""

    def source(self, decoding: Decoding) -> Files:
        """Return the media as decoded for a batch."""


Root = str | Path | Decodable


class Remembering:
    """The media of a root, whose latest videos and sounds are kept: of several Examples about a clip, decoded once.

    Threads may ask at the same time; all but the first wait. limit: bytes that are kept. What a medium raises is not
    kept. Methods are those of `Files`, and `source`, so that it is a root itself.
    """

    def __init__(self, root: Root, cache_dir: str = "", limit: int = 2**28):
        self.root, self.cache_dir, self.limit = root, cache_dir, limit
        self._kept: dict[tuple[Any, ...], concurrent.futures.Future[np.ndarray]] = {}  # latest last
        self._lock = threading.Lock()

    def source(self, decoding: Decoding) -> Any:
        """Return the media as decoded for a batch; `decoding` is the same at every call."""
        return _Remembered(source(self.root, decoding, self.cache_dir), self.once)

    def once(self, key: tuple[Any, ...], decode: Callable[[], np.ndarray]) -> np.ndarray:
        """Return `decode()`, or its result of an earlier call with this key."""
        with self._lock:
            known = self._kept.pop(key, None)
            future = self._kept[key] = known or concurrent.futures.Future()
        if known is None:
            try:
                future.set_result(decode())
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._kept.pop(key, None)
            self._forget()
        return future.result()

    def _forget(self) -> None:
        with self._lock:
            sizes = {key: f.result().nbytes for key, f in self._kept.items() if f.done() and not f.exception()}
            total = sum(sizes.values())
            for key, size in list(sizes.items())[:-1]:
                if total > self.limit:
                    del self._kept[key]
                    total -= size


class _Remembered:
    """The methods of `Files`, two of which ask `once` first."""

    def __init__(self, source: Files | Shards, once: Callable[[tuple[Any, ...], Callable[[], np.ndarray]], np.ndarray]):
        self._source, self._once = source, once

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def video(self, path: str) -> np.ndarray:
        return self._once(("video", path), lambda: self._source.video(path))

    def sound(self, path: str, windows: str, second: int | None, video: str | None = None) -> np.ndarray:
        key = ("sound", path, windows, second if windows in fbank.SINGLE else None, video)
        return self._once(key, lambda: self._source.sound(path, windows, second, video))


def source(root: Root, decoding: Decoding, cache_dir: str = "") -> Files | Shards:
    """Return the decoded media of a data root, or of media given directly.

    Raises InputError for a prepared root that was made with another `decoding`.
    """
    if not isinstance(root, str | os.PathLike):
        return root.source(decoding)
    prepared = shards.opened(root)
    if prepared is None:
        return Files(root, decoding, cache_dir)
    prepared.check(decoding)
    return prepared


def read_mask(root: str | Path, example: Example, size: int) -> np.ndarray:
    """Return int32[size, size]: the true mask of an Example, which must have one.

    Raises InputError for a damaged mask, and for one of another size than its picture if that exists: scoring needs
    only the masks.
    """
    prepared, kind, mask = shards.opened(root), example.mask_kind, str(example.mask)
    picture = picture_size(root, example)
    if prepared:
        return prepared.mask(mask, kind, size, picture)
    return media.read_mask(inside(root, mask), size, kind, picture)


def picture_size(root: str | Path, example: Example) -> tuple[int, int] | None:
    """Return the (width, height) of the picture that an Example's mask belongs to; None if unknown or missing."""
    field, path = seg_source(example) or ("", "")
    if not field:
        return None
    prepared = shards.opened(root)
    with contextlib.suppress(InputError):  # a damaged picture counts as missing
        if prepared:
            return prepared.video_size(path) if field == "video" else prepared.picture_size(path, field)
        full = inside(root, path)
        return media.video_size(full) if field == "video" else media.image_size(full, field)
    return None


def mask_size(root: str | Path, example: Example) -> tuple[int, int] | None:
    """Return the (width, height) of an Example's true mask; for an empty mask, those of its picture or None."""
    mask = example.mask or media.EMPTY_MASK
    if mask == media.EMPTY_MASK:
        return picture_size(root, example)
    if mask.startswith(media.INLINE_MASK):
        height, width = media.read_mask(mask, None, "binary").shape
        return width, height
    prepared = shards.opened(root)
    return prepared.mask_size(mask, example.mask_kind) if prepared else media.image_size(inside(root, mask), "mask")
