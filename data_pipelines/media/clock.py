"""The clock of a clip: which frames are chosen, and where its sound is placed.

Time 0 is when the first frame is shown. The clock "shown" is the default. "counted" follows the released code: frames
by their number, the sound from its first sample and in its own length (`Compat.clock`). At a constant frame rate both
choose the same frames. All functions are pure.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from crab_jax.io.errors import InputError

CLOCKS = ("shown", "counted")
# All times are in seconds.
START = 0.05  # tolerated offset between the starts of sound and pictures: encoders leave such delays
END = 0.25  # tolerated offset between their ends; the sound is then divided by its own length, as in the reference
JITTER = Fraction(1, 10)  # frames within this (and one frame interval) of a constant rate count as constant
STRAYS = 4  # number of last frames of a cut clip before which frames may be missing
HELD = Fraction(1, 2)  # longest total of such gaps; a longer one means that a frame is held
GAP = 0.1  # longer gaps in a sound track are silence; the times of audio blocks vary by less
SLOW = 1  # frames of at least this duration are slides
LONGEST = 600  # a longer frame, or total of gaps in a track, means that the times are wrong
SPLICE = 10  # the same limit where times may restart in the middle of a file (MPEG streams), as in ffmpeg
COUNTED = ": frames are taken by their number, and the sound from its first sample"
REMARKABLE = 0.1  # larger offsets of the sound are reported


class FrameTimes(NamedTuple):
    """The times at which the frames of a video are shown.

    ticks: of each frame in the order of display, from the first, in units of `tick` seconds. begin: time of the first
    frame on the file's own clock, in seconds; None if unknown. seconds: to the end of the last frame; 0 if unknown, and
    for a single frame, which has no definite duration. varies: whether the frames are off the grid of a constant rate.
    odd: why a constant rate is used instead of the file's times, "" if they are used.
    """

    ticks: tuple[int, ...]
    tick: Fraction
    begin: Fraction | None
    seconds: Fraction
    varies: bool
    odd: str


class Stamp(NamedTuple):
    """A container's times of one coded frame, in ticks.

    pts, dts: time of display and of decoding, None if unknown. duration: 0 if unknown.
    """

    pts: int | None
    dts: int | None
    duration: int


def frame_times(
    stamps: Sequence[Stamp],
    tick: Fraction | None,
    rate: Fraction | None,
    splices: bool = False,
    until: Fraction | None = None,
) -> FrameTimes:
    """Return the times of the frames of `stamps`, which are in file order.

    rate: frames per second according to the container. splices: whether times may restart in the middle of such a file.
    until: time, on the file's own clock in seconds, until which the last frame is held if it would end earlier.
    """
    shown = [stamp.pts for stamp in stamps]
    if None in shown:
        shown = [stamp.dts for stamp in stamps]  # AVI has only these; sorted, both have the same differences
    known = [time for time in shown if time is not None]
    odd = _oddity(stamps, known, tick, SPLICE if splices else LONGEST)
    if odd or not tick or not stamps:
        # Without times, a constant rate is the best guess; if that is unknown too, so is the length. In a stream
        # without a container, durations of the frames give the rate, where libav would assume 25 per second.
        lengths = {stamp.duration for stamp in stamps}
        if tick and not known and len(lengths) == 1 and max(lengths) > 0:
            rate = 1 / (max(lengths) * tick)
        believable = rate if rate and 1 <= rate <= 240 else None
        period = 1 / believable if believable else Fraction(0)
        return FrameTimes(
            tuple(range(len(stamps))),
            period,
            None,
            len(stamps) * period if len(stamps) > 1 else Fraction(0),
            False,
            odd,
        )
    order = sorted(range(len(known)), key=known.__getitem__)
    first = known[order[0]]
    ticks = tuple(known[place] - first for place in order)
    if period := _cut_period(ticks, tick):
        return FrameTimes(ticks, tick, first * tick, len(ticks) * period * tick, False, "")
    duration = stamps[order[-1]].duration
    end = _end(ticks, duration, tick)
    if until is not None and len(ticks) > 1:
        held = (until - first * tick) / tick - ticks[-1]
        if 0 < held <= LONGEST / tick and (not duration or held > duration + Fraction(END) / tick):
            end = ticks[-1] + held
    return FrameTimes(
        ticks,
        tick,
        first * tick,
        end * tick if len(ticks) > 1 else Fraction(0),
        not _on_grid(ticks, end / len(ticks), tick),
        "",
    )


def is_held(times: FrameTimes) -> bool:
    """Return whether the last frame of a film stays until the end of its sound, as in players.

    This is so when frames come only when the picture changes (slides, screen recordings); files seldom state the
    duration of their last frame.
    """
    return times.varies or len(times.ticks) > 1 and not times.odd and times.seconds >= SLOW * len(times.ticks)


def _oddity(stamps: Sequence[Stamp], known: Sequence[int], tick: Fraction | None, longest: int) -> str:
    """Return why the times of a file cannot be right, or ""."""
    if not stamps:
        return ""
    if not tick or len(known) < len(stamps):
        return f"frames without a time{COUNTED}"
    decoded = [stamp.dts for stamp in stamps if stamp.dts is not None]
    if any(b < a for a, b in zip(decoded, decoded[1:], strict=False)):
        return f"times that run backwards{COUNTED}"
    order = sorted(known)
    if len(set(order)) < 0.9 * len(order):
        return f"many frames at the same time{COUNTED}"
    most = longest / tick
    if order[-1] - order[0] > most and any(b - a > most for a, b in zip(order, order[1:], strict=False)):
        return f"times that jump{COUNTED}"
    return ""


def _end(ticks: Sequence[int], duration: int, tick: Fraction) -> Fraction:
    """Return the tick at which the last frame ends.

    At a constant rate it is shown as long as the others, whatever the file says (multiplexers round, or write the
    nominal rate of the encoder), unless it is held.
    """
    if len(ticks) == 1:
        return Fraction(max(1, duration))
    period = Fraction(ticks[-1], len(ticks) - 1)
    constant = _on_grid(ticks, period, tick)
    if duration > 0 and not (constant and duration < 2 * period) and duration * tick <= LONGEST:
        return Fraction(ticks[-1] + duration)
    return ticks[-1] + period


def _cut_period(ticks: Sequence[int], tick: Fraction) -> Fraction:
    """Return the frame interval of a clip that was cut without re-encoding, 0 for any other.

    Its last frames refer to some that were left out: frames are missing before them, but the rate is constant.
    """
    body = ticks[:-STRAYS]
    if len(body) < STRAYS:
        return Fraction(0)
    period = Fraction(body[-1], len(body) - 1)
    places = [round(time / period) - len(body) for time in ticks[len(body) :]]
    missing = places[-1] + 1 - STRAYS
    few = 0 < missing <= min(3 * STRAYS, len(ticks) // 10) and missing * period * tick <= HELD
    cut = (
        few
        and _on_grid(body, period, tick)
        and all(
            abs(time - (place + len(body)) * period) * tick <= JITTER / 10
            for time, place in zip(ticks[len(body) :], places, strict=True)
        )
    )
    return period if cut else Fraction(0)


def _on_grid(ticks: Sequence[int], period: Fraction, tick: Fraction) -> bool:
    """Return whether frames are shown every `period` ticks, to within a period and JITTER."""
    up, down = period.numerator, period.denominator
    limit = int(min(period, JITTER / tick) * down)
    return all(abs(time * down - number * up) <= limit for number, time in enumerate(ticks))


def frame_numbers(total: int, count: int) -> list[int]:
    """Return the numbers of the frames taken from a video of `total`: i * total // n for each of n = min(count, total).

    The reference's `np.arange(0, total, total / n).astype(int)` is the same for every length below 4,000.
    """
    taken = min(count, total)
    return [i * total // taken for i in range(taken)]


def chosen(times: FrameTimes, count: int, clock: str) -> list[int]:
    """Return the numbers of the frames taken from a video: those shown at i / count of it.

    Long frames may be taken several times. At a constant rate, and with the clock "counted", these are `frame_numbers`.
    """
    if clock == "counted" or not times.varies:
        return frame_numbers(len(times.ticks), count)
    return [number_at(times, i, count) for i in range(count)]


def number_at(times: FrameTimes, part: int, parts: int) -> int:
    """Return the number of the frame shown at `part` / `parts` of a video that has at least one."""
    if not times.varies:
        return part * len(times.ticks) // parts
    return bisect.bisect_right(times.ticks, times.seconds * part / parts / times.tick) - 1


def sound_start(first: Fraction | float | None, length: float, times: FrameTimes) -> tuple[float, str]:
    """Return (seconds from the first picture to the first sample, what is wrong with the times of the file or "").

    first: time at which a sound of `length` seconds (0 for unknown) begins, on the clock of the file that `times`
    belong to. If anything is wrong, the sound begins with the pictures.
    """
    if times.begin is None or first is None:
        return 0.0, times.odd or "sound without a time: it is taken to start with the pictures"
    start = float(first - times.begin)
    if not -(length or LONGEST) < start < (float(times.seconds) or LONGEST):
        return 0.0, "sound and pictures at times that do not meet: they are taken to start together"
    return start, ""


class Holes:
    """Finds gaps in a sound track, block by block.

    longest: the most silence that all gaps may have, in seconds. splice: the longest gap; a longer one means that the
    times restart.
    """

    def __init__(self, longest: float, splice: float):
        self._left, self._splice = longest, splice
        self._base: float | None = None  # time of the first block since the last jump, in seconds
        self._since, self._rate = 0, 1  # samples since then, and the sample rate

    def before(self, start: Fraction | float | None, samples: int, rate: int) -> int:
        """Return the number of samples of silence in front of a block of `samples` that is heard at `start` seconds."""
        silence = 0
        if start is not None:
            gap = 0.0 if self._base is None else float(start) - self._base - self._since / self._rate
            if GAP < gap <= min(self._left, self._splice):
                silence = round(gap * rate)
                self._left -= gap
            if self._base is None or abs(gap) > GAP or rate != self._rate:
                self._base, self._since, self._rate = float(start), 0, rate
        self._since += samples
        return silence


def place(samples: np.ndarray, start: float, seconds: float, rate: int) -> np.ndarray:
    """Return float32[N]: the sound of a clip aligned with pictures of this many `seconds` (0: any length).

    `samples` [M] at `rate` begin `start` seconds after the first picture. Silence is added in front, or the sound
    before the pictures is cut off; likewise at the end. Offsets below START and END are left unchanged.
    """
    shift, length = _span(len(samples), start, seconds, rate)
    if not shift and length == len(samples):
        return samples
    samples = samples[max(0, -shift) :]
    front = np.zeros(min(max(0, shift), length), samples.dtype)
    samples = samples[: length - len(front)]
    behind = np.zeros(length - len(front) - len(samples), samples.dtype)
    return np.concatenate([front, samples, behind])


def placed_length(samples: int, start: float, seconds: float, rate: int) -> int:
    """Return the length of the result of `place` for this number of samples."""
    return _span(samples, start, seconds, rate)[1]


def _span(samples: int, start: float, seconds: float, rate: int) -> tuple[int, int]:
    """Return (number of samples by which a sound is shifted, its length afterwards)."""
    shift = round(start * rate) if abs(start) > START else 0
    own, pictures = max(0, samples + shift), round(seconds * rate)
    return shift, pictures if pictures and abs(own - pictures) > END * rate else own


class Timing(NamedTuple):
    """The clock of a video file.

    frames: number of frames shown. seconds: from the first picture to the end of the last; 0 if unknown, and for a
    single frame. varies: whether the frame rate does. sound: seconds from the first picture to the first sample,
    negative for an earlier one; None without a sound track. odd: what is wrong with the times of the file and what is
    done instead, or "".
    """

    frames: int
    seconds: float
    varies: bool
    sound: float | None
    odd: str

    def remarks(self) -> tuple[str, ...]:
        """Return remarks for the user, one text each; none if the clock is ordinary."""
        remarks = (f"the file has {self.odd}" if self.odd else "", start_remark(self.sound or 0.0))
        return tuple(filter(None, remarks))


def start_remark(start: float) -> str:
    """Return what is done about a sound that starts this many seconds after the pictures; "" if negligible."""
    if abs(start) <= REMARKABLE:
        return ""
    if start > 0:
        return f"the sound starts {start:.1f} s after the pictures; silence is put in front"
    return f"the sound starts {-start:.1f} s before the pictures; its beginning is cut off"


def check_clock(clock: str, where: str) -> None:
    """Raise InputError for an unknown clock."""
    if clock not in CLOCKS:
        raise InputError(where, "clock", f"unknown value {clock!r}", f"use one of {', '.join(CLOCKS)}")
