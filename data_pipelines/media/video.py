"""Frames of a video: which are taken, decoding them, and how the whole file is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from crab_jax.io.errors import InputError
from data_pipelines.media import clock as clocks
from data_pipelines.media.clock import FrameTimes, Stamp
from data_pipelines.media.container import AGAIN, demuxed, film_stream, opened, sound_of
from data_pipelines.media.limits import check

_TS_DISCONT = 0x0200  # AVFMT_TS_DISCONT of libavformat
_REMEMBERED = 64  # files whose times of frames are kept: the sound of a clip is read after its pictures
_remembered: dict[tuple[str, int, int], FrameTimes] = {}


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Quarter turns to the left that put a frame upright: phones film sideways and say so. Players and decord do it."""
    return round(frame.rotation / 90) % 4


def video_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a video file as a player shows it."""
    with opened(path, "video") as container:
        stream = film_stream(container, path)
        frame = next(container.decode(stream), None)
        sideways = frame is not None and _quarter_turns(frame) % 2
        return (stream.height, stream.width) if sideways else (stream.width, stream.height)


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[list[av.Packet], int]:
    """The coded frames in the order of the file, and how many of them are shown: an edit list may hide some."""
    packets = [packet for packet in demuxed(container, stream) if packet.size]
    return packets, sum(not packet.is_discard for packet in packets)


def _declared(container: av.container.InputContainer, stream: av.VideoStream, packets: int, hidden: int) -> int:
    """How many frames the index says are shown, 0 where nothing says.

    It counts what an edit list hides, as `hidden` does, and in an MP4 what a list leaves out altogether; in an AVI,
    frames that repeat the one before and have no packet.
    """
    declared = stream.frames
    if container.format.name.startswith("mov") and len(stream.index_entries):
        declared = min(declared, len(stream.index_entries))
    elif container.format.name == "avi":
        declared = min(declared, packets)
    return max(0, declared - hidden)


def _needed(packets: Sequence[av.Packet], numbers: Sequence[int]) -> tuple[set[int], dict[int, int]] | None:
    """Which packets must be decoded for the shown frames `numbers` (in the order of showing), and time -> number of
    those.

    From every group of frames that starts with a key frame and refers to no other group, those up to the last wanted
    one, hidden ones too: what is shown may refer to them. None when the times do not tell.
    """
    times = [packet.pts for packet in packets if packet.pts is not None]
    if (
        not packets
        or len(set(times)) < len(packets)
        or any(map(_changes_decoder, packets[1:]))
        or _only_decoding_times(packets)
    ):
        return None
    order = sorted(time for time, packet in zip(times, packets, strict=True) if not packet.is_discard)
    wanted = {order[number]: number for number in numbers}
    starts, latest = [0], times[0]
    for place in range(1, len(packets)):
        # A group starts where all before it are shown earlier.
        if packets[place].is_keyframe and latest < times[place]:
            starts.append(place)
        latest = max(latest, times[place])
    groups = [range(start, end) for start, end in itertools.pairwise([*starts, len(packets)])]
    merged: list[range] = []
    for group in groups:
        if merged and min(times[place] for place in group) < times[group.start]:
            merged[-1] = range(merged[-1].start, group.stop)  # shows frames before its key frame: refers back
        else:
            merged.append(group)
    decoded: set[int] = set()
    for group in merged:
        if places := [place for place in group if times[place] in wanted]:
            decoded.update(range(group.start, places[-1] + 1))
    return decoded, wanted


def _only_decoding_times(packets: Sequence[av.Packet]) -> bool:
    """Whether frames may be shown in another order than they are stored in, and the times say the latter only."""
    stream = packets[0].stream
    return stream.container.format.name == "avi" and bool(stream.codec_context.has_b_frames)


def _changes_decoder(packet: av.Packet) -> bool:
    """Whether a packet brings new parameters, which all after it need."""
    return packet.is_keyframe and packet.has_sidedata("new_extradata")


def _small(frame: av.VideoFrame, size: int, scaler: VideoReformatter) -> np.ndarray:
    """uint8[size, size, 3]: a frame, upright. Frames of a video share a `scaler`, which is slow to set up."""
    if frame.is_corrupt:
        raise EOFError("a frame that is taken is damaged")
    # Bilinear, because it is what decord's VideoReader(width=, height=) does; in this thread, as the decoding.
    small = scaler.reformat(frame, size, size, "rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
    return np.rot90(small, _quarter_turns(frame))


def _decode_needed(
    stream: av.VideoStream, packets: Sequence[av.Packet], decoded: set[int], wanted: Mapping[int, int], size: int
) -> dict[int, np.ndarray]:
    """Number -> frame, resized, of those of the `wanted` times that decoding the packets `decoded` gives."""
    picked: dict[int, np.ndarray] = {}
    context, running, scaler = stream.codec_context, False, VideoReformatter()

    def take(frames: Sequence[av.VideoFrame]) -> None:
        picked.update((wanted[f.pts], _small(f, size, scaler)) for f in frames if f.pts is not None and f.pts in wanted)

    begins = False  # a group in the midst of the film: its first frame is to come
    for place, packet in enumerate([*packets, None]):
        if place in decoded:
            begins = begins or (place > 0 and not running)
            frames, running = context.decode(packet), True
        elif running:
            frames, running = context.decode(None), False
            context.flush_buffers()
        else:
            continue
        if begins and frames:
            if not frames[0].key_frame:
                return {}  # it refers back: the file calls too many frames key frames
            begins = False
        take(frames)
        if len(picked) == len(wanted):
            break
    return picked


def _decode_all(path: str | Path, wanted: set[int], size: int) -> tuple[dict[int, np.ndarray], FrameTimes]:
    """The wanted frames, resized, by their place among all that are decoded, and when those are shown."""
    picked, stamps, scaler = {}, list[Stamp](), VideoReformatter()
    with opened(path, "video") as container:
        stream = film_stream(container, path)
        for packet in demuxed(container, stream):
            for frame in stream.decode(packet):
                if len(stamps) in wanted:
                    picked[len(stamps)] = _small(frame, size, scaler)
                stamps.append(stamp(frame))
        return picked, times_of(stamps, stream, path)


def read_video(path: str | Path, count: int, size: int, clock: str = "shown") -> np.ndarray:
    """uint8[n, size, size, 3]: the RGB frames that are shown at i / count of a video, aspect ratio ignored.

    n is `count`, but no more than a video of a constant rate has. With the clock "counted" they are the frames
    i * total // n of all. See `clock.chosen`. Source: dataset/video_processor.py (decord, which resizes while
    decoding); docs/datasets.md has the tolerance. Raises InputError for a missing, damaged or truncated file, one
    without a video stream, and one without frames.
    """
    return _read(path, lambda times: clocks.chosen(times, count, clock), size)


def read_moment(path: str | Path, part: int, parts: int, size: int) -> np.ndarray:
    """uint8[size, size, 3]: the RGB frame that is shown at `part` / `parts` of a video. Raises InputError as
    `read_video` does."""
    return _read(path, lambda times: [clocks.number_at(times, part, parts)] if times.ticks else [], size)[0]


def moment_picture(path: str | Path, part: int, parts: int) -> Image.Image:
    """The frame of `read_moment` at the video's own size."""
    size = video_size(path)
    return Image.fromarray(read_moment(path, part, parts, max(size))).resize(size, Image.Resampling.LANCZOS)


def _read(path: str | Path, choose: Callable[[FrameTimes], list[int]], size: int) -> np.ndarray:
    """uint8[n, size, size, 3]: the frames whose numbers `choose` gives.

    All coded frames of the file are held (opening it twice costs more), and only what those frames need is decoded;
    `watch` finds damage anywhere.
    """
    with opened(path, "video") as container:
        stream = film_stream(container, path)
        packets, total = _packets(container, stream)
        declared = _declared(container, stream, len(packets), len(packets) - total)
        stamps = shown(packets)
        times = times_of(stamps, stream, path)
        numbers = choose(times)
        whole = total >= 0.9 * declared and begins_whole(next(iter(packets), None), stamps)
        if whole and (needed := _needed(packets, numbers)):
            picked = _decode_needed(stream, packets, *needed, size)
            if numbers and len(picked) == len(set(numbers)):
                _remember(path, times)
                return np.stack([picked[number] for number in numbers])
    while True:  # what the container says is off: decode everything, and choose again from what there is
        picked, found = _decode_all(path, set(numbers), size)
        _check_frames(len(found.ticks), declared, path)
        if len(found.ticks) == len(times.ticks) and all(number in picked for number in numbers):
            _remember(path, times)
            return np.stack([picked[number] for number in numbers])
        times = found
        numbers = choose(times)


# When frames are shown.


def times_of(stamps: Iterable[Stamp], stream: av.VideoStream, path: str | Path) -> FrameTimes:
    """The times of the shown frames of the stream of a file, in the order of the file."""
    given = [*stamps], stream.time_base, stream.average_rate or stream.guessed_rate, splices(stream.container)
    times = clocks.frame_times(*given)
    times = clocks.frame_times(*given, _end_of_sound(path)) if clocks.is_held(times) else times
    check(path, "video", hours=float(times.seconds) / 3600)
    return times


def _end_of_sound(path: str | Path) -> Fraction | None:
    """The second, on the file's own clock, at which its audio track ends; None for none."""
    with opened(path, "video") as container:
        stream = sound_of(container)
        if stream is None or not stream.time_base:
            return None
        ends = (packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None)
        last = max(ends, default=None)
        return None if last is None else last * stream.time_base


def shown(packets: Iterable[av.Packet]) -> list[Stamp]:
    """What the container says of the frames of packets that are not hidden."""
    return [stamp(packet) for packet in packets if packet.size and not packet.is_discard]


def stamp(coded: av.Packet | av.VideoFrame) -> Stamp:
    """What the container says of a frame."""
    return Stamp(coded.pts, coded.dts if isinstance(coded, av.Packet) else coded.pts, coded.duration or 0)


def splices(container: av.container.Container) -> bool:
    """Whether times may start anew in the middle of such a file, as in MPEG streams that were put behind each other."""
    return bool(container.format.flags & _TS_DISCONT)


def video_times(path: str | Path) -> FrameTimes:
    """When the frames of a video are shown, without decoding them. Raises InputError as `read_video` does."""
    if (known := remembered_times(path)) is None:
        with opened(path, "video") as container:
            stream = film_stream(container, path)
            first, stamps = None, list[Stamp]()
            for packet in container.demux(stream):
                first = first or (packet if packet.size else None)
                stamps += shown([packet])
            known = times_of(stamps, stream, path) if begins_whole(first, stamps) else None
        if known is None:
            _, known = _decode_all(path, set(), 1)
        _remember(path, known)
    return known


def begins_whole(first: av.Packet | None, frames: Iterable[Stamp]) -> bool:
    """Whether the first coded frame stands for itself, and none of the shown `frames` comes before it. Of what was
    recorded or cut in the middle of a broadcast decoders leave out what refers to frames that are not there: only they
    know when it begins."""
    return first is None or (
        first.is_keyframe
        and not any(first.pts is not None and frame.pts is not None and frame.pts < first.pts for frame in frames)
    )


def _key(path: str | Path) -> tuple[str, int, int]:
    found = os.stat(path)
    return os.path.abspath(path), found.st_mtime_ns, found.st_size


def remembered_times(path: str | Path) -> FrameTimes | None:
    """The times of a file that was read lately."""
    return _remembered.get(_key(path)) if os.path.isfile(path) else None


def _remember(path: str | Path, times: FrameTimes) -> None:
    if len(_remembered) >= _REMEMBERED:
        _remembered.clear()
    _remembered[_key(path)] = times


def _check_frames(decoded: int, declared: int, path: str | Path) -> None:
    if decoded < 0.9 * declared:
        problem = f"only {decoded} of {declared} frames can be decoded; the file is truncated"
        raise InputError(str(path), "video", problem, AGAIN)
    if decoded == 0:
        raise InputError(str(path), "video", "has no frames", "give a video with at least one frame")


class Watched(NamedTuple):
    """A video, seen to its end. frames: how many, damaged: those that the decoder guessed parts of; seconds from the
    first to the end of the last; (width, height) as a player shows it."""

    frames: int
    damaged: int
    seconds: float
    size: tuple[int, int]


def watch(path: str | Path) -> Watched:
    """Decode every frame of a video and keep none. Raises InputError as `read_video` does."""
    damaged = packets = hidden = 0
    stamps, size = list[Stamp](), (0, 0)
    with opened(path, "video") as container:
        stream = film_stream(container, path)
        for packet in demuxed(container, stream):
            packets, hidden = packets + bool(packet.size), hidden + packet.is_discard
            for frame in stream.decode(packet):
                if not stamps:
                    size = (frame.height, frame.width) if _quarter_turns(frame) % 2 else (frame.width, frame.height)
                damaged += frame.is_corrupt
                stamps.append(stamp(frame))
        declared, times = _declared(container, stream, packets, hidden), times_of(stamps, stream, path)
    _check_frames(len(stamps), declared, path)
    return Watched(len(stamps), damaged, float(times.seconds), size)
