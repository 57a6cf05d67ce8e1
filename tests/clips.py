"""Clips whose picture says the second (0 to 11, grey 20 + 20 * second) and whose sound is a beep, at any times."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 16000
CODECS = {
    ".mp4": ("libx264", "aac"),
    ".mkv": ("libx264", "aac"),
    ".ts": ("libx264", "aac"),
    ".flv": ("libx264", "aac"),
    ".webm": ("libvpx-vp9", "libopus"),
    ".avi": ("mpeg4", "libmp3lame"),
}


def steady(seconds: float, fps: Fraction | int = 10, start: float = 0.0) -> list[float]:
    """When the frames of a constant rate are shown."""
    return [start + float(i / Fraction(fps)) for i in range(round(seconds * fps))]


def beep(seconds: float, at: float, until: float) -> np.ndarray:
    """float32[N]: faint noise, and a beep from `at` to `until` seconds."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = 0.003 * np.random.default_rng(0).standard_normal(len(time))
    return (noise + 0.6 * np.sin(5529 * time) * ((time >= at) & (time < until))).astype(np.float32)


def write_clip(
    path: Path,
    times: Sequence[float],
    sound: np.ndarray | None = None,
    offset: float = 0.0,
    holes: Sequence[tuple[float, float]] = (),
    fps: Fraction | int = 10,
    bf: int = 0,
) -> Path:
    """A clip in the container and codecs of its ending. times: when frames are shown; sound: float[N] that starts at
    `offset` seconds; holes: (second of the sound, length) of silence that the file leaves out. bf: B frames."""
    codecs = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        tick = 1 / Fraction(fps) if path.suffix == ".avi" else Fraction(1, 90000)  # AVI has a constant rate
        options = {"bf": str(bf)} if codecs[0] == "libx264" else {}
        video = container.add_stream(codecs[0], rate=fps, options=options)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        video.codec_context.time_base = tick
        rate = 48000 if codecs[1] == "libopus" else RATE
        track = container.add_stream(codecs[1], rate=rate, layout="mono") if sound is not None else None
        packets = []
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey(time - times[0]), np.uint8), "rgb24")
            frame.pts, frame.time_base = round(Fraction(time) / tick), tick
            packets += video.encode(frame)
        packets += video.encode(None)
        if track is not None:
            assert sound is not None
            wave = np.repeat(sound, rate // RATE)
            size = track.codec_context.frame_size or 1024
            for i in range(0, len(wave), size):
                block = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(wave[None, i : i + size], np.float32), "fltp", "mono"
                )
                later = offset + sum(length for at, length in holes if i >= at * rate)
                block.sample_rate, block.pts, block.time_base = rate, i + round(later * rate), Fraction(1, rate)
                if codecs[1] == "libopus":
                    block = av.AudioResampler("flt", "mono", rate).resample(block)[0]
                packets += track.encode(block)
            packets += track.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def grey(second: float) -> int:
    """The grey of the picture of a second."""
    return 20 + 20 * int(second + 1e-6)


def seconds_of(frames: np.ndarray) -> list[int]:
    """The seconds that frames uint8[n,h,w,3] say."""
    return np.round((frames.mean((1, 2, 3)) - 19) / 20).astype(int).tolist()
