"""Opening of films and sounds with libav by their content, and selection of their streams."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from crab_jax.io.errors import InputError
from data_pipelines.media.boxes import encrypted
from data_pipelines.media.content import head, not_supported
from data_pipelines.media.kinds import kind_of
from data_pipelines.media.limits import check, check_sound
from data_pipelines.media.outline import outline

AGAIN = "copy or download the file again"
# The formats that are read. None of them opens another file or device, or takes a name as a pattern or an address, as
# playlists, `concat`, `image2` and `lavfi` do.
_FORMATS = """3g2 3gp aa aac ac3 aiff alaw amr amrnb amrwb ape apng asf asf_o ast au av1 avi avs2 avs3 caf dts dtshd dv
eac3 f4v flac flv gif gxf h261 h263 h264 hevc ircam ivf kux live_flv loas m4v matroska matroska,webm mjpeg mlp mmf
mov mov,mp4,m4a,3gp,3g2,mj2 mp3 mp4 mpc mpc8 mpeg mpegts mpegvideo mxf nistsphere nsv nut obu ogg oma pva pvf qcp rm
roq rpl shn sln smk sox swf tak truehd tta ty vc1 vc1test voc vvc w64 wav webm wsd wtv wv xwma yuv4mpegpipe""".split()
_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": ",".join(_FORMATS)}
MOST_PACKETS = 20_000_000  # per file; headers may state any length
_SIZED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "avi")  # formats whose packets state their lengths
_STILLS = ("apng", "bmp", "gif", "jpeg2000", "jpegls", "mjpeg", "png", "tiff", "webp")  # codecs of cover pictures


def require(path: str | Path, field: str) -> str:
    """Return the path of a file as text. Raises InputError if there is no such file."""
    if not os.path.isfile(path):  # False also for names that no file can have
        raise InputError(str(path), field, "no such file", "check the data root and the path in the annotation")
    return str(path)


def whole(path: str | Path, field: str) -> str:
    """Return the path of a film or sound that may be decoded. Raises InputError for other and truncated files."""
    path = require(path, field)
    try:
        if other := not_supported(path):
            raise InputError(path, field, *other)
        if damaged := outline(path):
            raise InputError(path, field, f"{damaged}; the file is damaged or incomplete", AGAIN)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise InputError(path, field, problem, "check its permissions and its disk") from None
    return path


@contextlib.contextmanager
def opened(path: str | Path, field: str) -> Iterator[av.container.InputContainer]:
    """Yield an open media container; libav errors while it is in use become InputErrors.

    A name is never interpreted as an address, a pattern or a protocol, and no other file is read.
    """
    path = whole(path, field)
    try:
        # metadata_errors: titles may be in any encoding.
        with av.open(f"file:{os.path.abspath(path)}", options=_OPTIONS, metadata_errors="replace") as container:
            if not container.streams:
                raise EOFError("nothing is in it")
            yield container
    except InputError:
        raise
    except (av.FFmpegError, OSError, EOFError, ValueError, MemoryError) as error:
        if encrypted(path):
            raise InputError(path, field, "is encrypted (DRM)", "give a copy without protection") from None
        if (kind := kind_of(head(path))) and (kind.picture or kind.fix.startswith("export")):
            raise InputError(path, field, f"is {kind.name}, no film or sound", "give a film or a sound") from None
        what = str(error) if type(error) is EOFError and error.args else error.__class__.__name__
        problem = f"cannot be decoded ({what}); the file is damaged or incomplete"
        raise InputError(path, field, problem, AGAIN) from None


def pictures_of(container: av.container.InputContainer) -> av.VideoStream | None:
    """Return the video stream that players show: the default or largest one, no cover or thumbnails; or None."""
    aside = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    films = [stream for stream in container.streams.video if not stream.disposition & aside]
    return min(films, key=lambda film: (film.frames == 1, *_rank(film), -_pixels(film)), default=None)


def sound_of(container: av.container.InputContainer) -> av.AudioStream | None:
    """Return the audio track that players play: the default one, else the first, no commentary; None without one."""
    return min(container.streams.audio, key=_rank, default=None)


def _rank(stream: Any) -> tuple[bool, bool, bool, bool]:
    """Return a sort key of streams by players' preference.

    Decodable streams come first, then films before streams in the codecs of cover pictures, then streams meant for all,
    then the file's default.
    """
    codec = stream.codec_context
    aside = (
        Disposition.comment
        | Disposition.descriptions
        | Disposition.hearing_impaired
        | Disposition.visual_impaired
        | Disposition.dependent
        | Disposition.metadata
        | Disposition.non_diegetic
    )
    return (
        codec is None,
        codec is not None and codec.name in _STILLS,
        bool(stream.disposition & aside),
        not stream.disposition & Disposition.default,
    )


def _pixels(stream: av.VideoStream) -> int:
    return stream.codec_context.width * stream.codec_context.height if stream.codec_context else 0


def film_stream(container: av.container.InputContainer, path: str | Path) -> av.VideoStream:
    """Return `pictures_of` a file, ready to decode. Raises InputError if there is no film."""
    stream = pictures_of(container)
    if stream is None:
        what = "has no video stream" + (", only a cover picture" if container.streams.video else "")
        raise InputError(str(path), "video", what, "give a video file, or leave the field out")
    check(path, "video", film_megapixels=_pixels(stream) / 1e6, hours=_seconds(container, stream) / 3600)
    decode_alone(stream)
    return stream


def sound_stream(container: av.container.InputContainer, path: str | Path) -> av.AudioStream:
    """Return `sound_of` a file, ready to decode. Raises InputError if there is no sound."""
    stream = sound_of(container)
    if stream is None:
        fix = "give an audio file in the 'audio' field, or set windows to 'none'"
        raise InputError(str(path), "audio", "has no audio track", fix)
    if stream.codec_context is not None:
        check_sound(path, _seconds(container, stream), stream.codec_context.sample_rate or 0, stream.channels)
    decode_alone(stream)
    return stream


def _seconds(container: av.container.InputContainer, stream: Any) -> float:
    """Return the length of a stream according to its header, 0 if unknown."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def decode_alone(stream: Any) -> None:
    """Set a stream to decode in this thread: the data loader already runs one decoder per core."""
    if stream.codec_context is None:
        raise ValueError("unknown codec")
    stream.codec_context.thread_count = 1


def demuxed(container: av.container.InputContainer, *streams: Any) -> Iterator[av.Packet[Any]]:
    """Yield the packets of streams, without repeated frames, and the empty packets at the end that flush a decoder.

    Raises EOFError where the last packet is truncated, in formats whose packets state their lengths, and for too many
    packets.
    """
    last = None
    for number, packet in enumerate(container.demux(*streams)):
        if number > MOST_PACKETS:
            raise EOFError(f"more than {MOST_PACKETS:,} packets")
        if packet.size:
            last = packet
        elif packet.dts is not None:
            continue
        yield packet
    if last is not None and last.is_corrupt and container.format.name in _SIZED:
        raise EOFError("its last packet is cut off")
