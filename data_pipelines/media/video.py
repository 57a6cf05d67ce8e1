"""Decoding of video frames: the chosen ones, or all of them to check a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

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
_REMEMBERED = 64  # number of files whose frame times are kept, because the sound of a clip is read after its pictures
_remembered: dict[tuple[str, int, int], FrameTimes] = {}


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Return the number of left quarter turns that make a frame upright: phones store rotated films."""
    return round(frame.rotation / 90) % 4


def video_size(path: str | Path) -> tuple[int, int]:
    """Return the (width, height) of a video file as a player shows it."""
    with opened(path, "video") as container:
        stream = film_stream(container, path)
        frame = next(container.decode(stream), None)
        sideways = frame is not None and _quarter_turns(frame) % 2
        return (stream.height, stream.width) if sideways else (stream.width, stream.height)


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[list[av.Packet[Any]], int]:
    """Return the coded frames in file order, and the number of them that are shown (an edit list may hide some)."""
    packets = [packet for packet in demuxed(container, stream) if packet.size]
    return packets, sum(not packet.is_discard for packet in packets)


def _declared(container: av.container.InputContainer, stream: av.VideoStream, packets: int, hidden: int) -> int:
    """Return the number of frames shown according to the index, 0 if unknown.

    The index counts frames hidden by an edit list (`hidden`), in an MP4 also frames that the list omits, and in an AVI
    frames that repeat the previous one and have no packet.
    """
    declared = stream.frames
    if container.format.name.startswith("mov") and len(stream.index_entries):
        declared = min(declared, len(stream.index_entries))
    elif container.format.name == "avi":
        declared = min(declared, packets)
    return max(0, declared - hidden)


def _needed(packets: Sequence[av.Packet[Any]], numbers: Sequence[int]) -> tuple[set[int], dict[int, int]] | None:
    """Return the packets to decode for the shown frames `numbers`, and {time: number} of these frames; None if unknown.

    Packets form groups that start with a key frame and refer to no other group; of each group the packets up to the
    last wanted frame are needed, including hidden ones, which may be referred to. None is returned when the times do
    not determine this.
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
        # A group starts where all earlier packets are shown earlier.
        if packets[place].is_keyframe and latest < times[place]:
            starts.append(place)
        latest = max(latest, times[place])
    groups = [range(start, end) for start, end in itertools.pairwise([*starts, len(packets)])]
    merged: list[range] = []
    for group in groups:
        if merged and min(times[place] for place in group) < times[group.start]:
            merged[-1] = range(
                merged[-1].start, group.stop
            )  # some frames are shown before the key frame, so the group refers back
        else:
            merged.append(group)
    decoded: set[int] = set()
    for group in merged:
        if places := [place for place in group if times[place] in wanted]:
            decoded.update(range(group.start, places[-1] + 1))
    return decoded, wanted


def _only_decoding_times(packets: Sequence[av.Packet[Any]]) -> bool:
    """Return whether frames may be shown in another order than stored while the file has decoding times only."""
    stream = packets[0].stream
    return stream.container.format.name == "avi" and bool(stream.codec_context.has_b_frames)


def _changes_decoder(packet: av.Packet[Any]) -> bool:
    """Return whether a packet brings new decoder parameters, which all packets after it need."""
    return packet.is_keyframe and packet.has_sidedata("new_extradata")


def _small(frame: av.VideoFrame, size: int, scaler: VideoReformatter) -> np.ndarray:
    """Return uint8[size, size, 3]: a frame, upright. Frames of a video share a `scaler`, which is slow to set up."""
    if frame.is_corrupt:
        raise EOFError("a frame that is taken is damaged")
    # Bilinear as in decord's VideoReader(width=, height=); in this thread, like the decoding.
    small = scaler.reformat(frame, size, size, "rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
    return np.rot90(small, _quarter_turns(frame))


def _decode_needed(
    stream: av.VideoStream, packets: Sequence[av.Packet[Any]], decoded: set[int], wanted: Mapping[int, int], size: int
) -> dict[int, np.ndarray]:
    """Return {number: resized frame} of the `wanted` times, by decoding only the packets `decoded`."""
    picked: dict[int, np.ndarray] = {}
    context, running, scaler = stream.codec_context, False, VideoReformatter()

    def take(frames: Sequence[av.VideoFrame]) -> None:
        picked.update((wanted[f.pts], _small(f, size, scaler)) for f in frames if f.pts is not None and f.pts in wanted)

    begins = False  # whether the next frame is the first of a group inside the film
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
                return {}  # the group refers back: the file marks too many frames as key frames
            begins = False
        take(frames)
        if len(picked) == len(wanted):
            break
    return picked


def _decode_all(path: str | Path, wanted: set[int], size: int) -> tuple[dict[int, np.ndarray], FrameTimes]:
    """Decode everything; return the wanted frames, resized, by their numbers, and the times of all frames."""
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
    """Return uint8[n, size, size, 3]: the RGB frames shown at i / count of a video, ignoring the aspect ratio.

    n is `count`, or the number of frames if a video of constant rate has fewer. With the clock "counted" they are the
    frames i * total // n; see `clock.chosen`. Source: dataset/video_processor.py (decord, which resizes while
    decoding); docs/datasets.md gives the tolerance. Raises InputError for a missing, damaged or truncated file, and for
    one without a video stream or frames.
    """
    return _read(path, lambda times: clocks.chosen(times, count, clock), size)


def read_moment(path: str | Path, part: int, parts: int, size: int) -> np.ndarray:
    """Return uint8[size, size, 3]: the RGB frame shown at `part` / `parts` of a video.

    Raises InputError as `read_video` does.
    """
    frames = _read(path, lambda times: [clocks.number_at(times, part, parts)] if times.ticks else [], size)
    frame: np.ndarray = frames[0]
    return frame


def moment_picture(path: str | Path, part: int, parts: int) -> Image.Image:
    """Return the frame of `read_moment` at the video's own size."""
    size = video_size(path)
    return Image.fromarray(read_moment(path, part, parts, max(size))).resize(size, Image.Resampling.LANCZOS)


def _read(path: str | Path, choose: Callable[[FrameTimes], list[int]], size: int) -> np.ndarray:
    """Return uint8[n, size, size, 3]: the frames whose numbers `choose` returns.

    All coded frames of the file are held in memory (opening it twice costs more), and only those needed are decoded;
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
    while True:  # the container's index is wrong: decode everything and choose again
        picked, actual = _decode_all(path, set(numbers), size)
        _check_frames(len(actual.ticks), declared, path)
        if len(actual.ticks) == len(times.ticks) and all(number in picked for number in numbers):
            _remember(path, times)
            return np.stack([picked[number] for number in numbers])
        times = actual
        numbers = choose(times)


# Times of frames


def times_of(stamps: Iterable[Stamp], stream: av.VideoStream, path: str | Path) -> FrameTimes:
    """Return the times of the shown frames of a stream, in file order."""
    given = [*stamps], stream.time_base, stream.average_rate or stream.guessed_rate, splices(stream.container)
    times = clocks.frame_times(*given)
    times = clocks.frame_times(*given, _end_of_sound(path)) if clocks.is_held(times) else times
    check(path, "video", hours=float(times.seconds) / 3600)
    return times


def _end_of_sound(path: str | Path) -> Fraction | None:
    """Return the time in seconds, on the file's own clock, at which its audio track ends; None without one."""
    with opened(path, "video") as container:
        stream = sound_of(container)
        if stream is None or not stream.time_base:
            return None
        ends = (packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None)
        last = max(ends, default=None)
        return None if last is None else last * stream.time_base


def shown(packets: Iterable[av.Packet[Any]]) -> list[Stamp]:
    """Return the container's times of the packets that are shown."""
    return [stamp(packet) for packet in packets if packet.size and not packet.is_discard]


def stamp(coded: av.Packet[Any] | av.VideoFrame) -> Stamp:
    """Return the container's times of a packet or frame."""
    return Stamp(coded.pts, coded.dts if isinstance(coded, av.Packet) else coded.pts, coded.duration or 0)


def splices(container: av.container.Container) -> bool:
    """Return whether times may restart in the middle of such a file, as in joined MPEG streams."""
    return bool(container.format.flags & _TS_DISCONT)


def video_times(path: str | Path) -> FrameTimes:
    """Return the times of the frames of a video, without decoding them. Raises InputError as `read_video` does."""
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


def begins_whole(first: av.Packet[Any] | None, frames: Iterable[Stamp]) -> bool:
    """Return whether the first coded frame is a key frame, and none of the shown `frames` precedes it.

    In recordings that begin in the middle of a broadcast, decoders drop frames that refer to missing ones, so only
    decoding shows where the video begins.
    """
    return first is None or (
        first.is_keyframe
        and not any(first.pts is not None and frame.pts is not None and frame.pts < first.pts for frame in frames)
    )


def _key(path: str | Path) -> tuple[str, int, int]:
    status = os.stat(path)
    return os.path.abspath(path), status.st_mtime_ns, status.st_size


def remembered_times(path: str | Path) -> FrameTimes | None:
    """Return the times of a file that was read recently, or None."""
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
    """A video, decoded to its end.

    frames: number of frames. damaged: frames of which the decoder guessed parts. seconds: from the first frame to the
    end of the last. size: (width, height) as a player shows it.
    """

    frames: int
    damaged: int
    seconds: float
    size: tuple[int, int]


def watch(path: str | Path) -> Watched:
    """Decode every frame of a video without keeping any. Raises InputError as `read_video` does."""
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
