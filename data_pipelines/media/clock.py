"""The clock of a clip. Time 0 is when the first frame is shown; frames are chosen and sound is placed by it.

The clock "shown" is the default. "counted" is the released code's choice: frames by their number, the sound from its
first sample, as long as it is (`Compat.clock`). At a constant frame rate both choose the same frames. Pure functions.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from crab_jax.io.errors import InputError

CLOCKS = ("shown", "counted")
# In seconds.
START = 0.05  # a sound that starts so much earlier or later than the pictures is in step: encoders leave such delays
END = 0.25  # and one that ends so much earlier or later, which then is cut at its own shares, as in the reference
JITTER = Fraction(1, 10)  # frames within it, and within one frame interval, of a constant rate have that rate
STRAYS = 4  # the last frames of a clip, before which there may be holes where it was cut
HELD = Fraction(1, 2)  # seconds of such holes at most; a longer one is a frame that is held
GAP = 0.1  # a longer hole in a sound track is silence; times of blocks of sound waver by less
SLOW = 1  # seconds of a frame and more are those of slides
LONGEST = 600  # a frame, or all holes of a track, that last longer have wrong times
SPLICE = 10  # the same where times may start anew in the middle of a file (MPEG streams), as ffmpeg has it
COUNTED = ": frames are taken by their number, and the sound from its first sample"
TOLD = 0.1  # sound that is further off is worth a remark


class FrameTimes(NamedTuple):
    """When the frames of a video are shown.

    ticks: of each frame in the order of showing, from the first, `tick` seconds each. begin: when the first is shown on
    the file's own clock, in seconds; None where it does not tell. seconds: to the end of the last frame, 0 where that
    is unknown and of a single frame, which lasts as long as one likes. varies: whether the frames are off the grid of a
    constant rate. odd: why the times are not those of the file but a constant rate's, "" where they are.
    """

    ticks: tuple[int, ...]
    tick: Fraction
    begin: Fraction | None
    seconds: Fraction
    varies: bool
    odd: str


class Stamp(NamedTuple):
    """What a container says about one coded frame, in ticks: when to show and to decode it, None for unknown, and how
    long it is shown, 0 for unknown."""

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
    """The times of the frames that `stamps`, in the order of the file, are of. `rate`: frames a second as the container
    has it; `splices`: whether times may start anew in the middle of such a file; `until`: the second, on the file's own
    clock, to which the last frame is held where it would end before."""
    shown = [stamp.pts for stamp in stamps]
    if None in shown:
        shown = [stamp.dts for stamp in stamps]  # AVI knows no other; sorted, both are as far apart
    known = [time for time in shown if time is not None]
    odd = _oddity(stamps, known, tick, SPLICE if splices else LONGEST)
    if odd or not tick or not stamps:
        # Without times, a constant rate is the best guess; where that is unknown too, so is the length. In a
        # stream without a container the frames know the rate; libav takes 25 a second for granted.
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
    """Whether the last frame of a film stays as long as its sound, as in players: where frames come when the picture
    changes (slides, screen recordings), and files seldom say how long the last of them is shown."""
    return times.varies or len(times.ticks) > 1 and not times.odd and times.seconds >= SLOW * len(times.ticks)


def _oddity(stamps: Sequence[Stamp], known: Sequence[int], tick: Fraction | None, longest: int) -> str:
    """Why the times of a file cannot be right, "" where they can."""
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
    """The tick at which the last frame ends. At a constant rate it is shown as long as the others, whatever the file
    says (multiplexers round, or write the rate that the encoder was set to), unless it is held."""
    if len(ticks) == 1:
        return Fraction(max(1, duration))
    period = Fraction(ticks[-1], len(ticks) - 1)
    constant = _on_grid(ticks, period, tick)
    if 0 < duration and not (constant and duration < 2 * period) and duration * tick <= LONGEST:
        return Fraction(ticks[-1] + duration)
    return ticks[-1] + period


def _cut_period(ticks: Sequence[int], tick: Fraction) -> Fraction:
    """The frame interval of a clip that was cut without encoding it anew, 0 for any other.

    Its last frames refer to some that were left out: there are holes before them, but the rate is constant.
    """
    body = ticks[:-STRAYS]
    if len(body) < STRAYS:
        return Fraction(0)
    period = Fraction(body[-1], len(body) - 1)
    places = [round(time / period) - len(body) for time in ticks[len(body) :]]
    holes = places[-1] + 1 - STRAYS
    few = 0 < holes <= min(3 * STRAYS, len(ticks) // 10) and holes * period * tick <= HELD
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
    """Whether frames are shown every `period` ticks, to within a period and JITTER."""
    up, down = period.numerator, period.denominator
    limit = int(min(period, JITTER / tick) * down)
    return all(abs(time * down - number * up) <= limit for number, time in enumerate(ticks))


def frame_numbers(total: int, count: int) -> list[int]:
    """The numbers of the frames that are taken of a video of `total`: i * total // n for each of n = min(count, total).

    The reference's `np.arange(0, total, total / n).astype(int)` is the same for every length below 4,000.
    """
    taken = min(count, total)
    return [i * total // taken for i in range(taken)]


def chosen(times: FrameTimes, count: int, clock: str) -> list[int]:
    """The numbers of the frames that are taken of a video: those shown at i / count of it, some of them several times
    where it has long ones; `frame_numbers` at a constant rate, and of the clock "counted"."""
    if clock == "counted" or not times.varies:
        return frame_numbers(len(times.ticks), count)
    return [number_at(times, i, count) for i in range(count)]


def number_at(times: FrameTimes, part: int, parts: int) -> int:
    """The number of the frame that is shown at `part` / `parts` of a video that has one."""
    if not times.varies:
        return part * len(times.ticks) // parts
    return bisect.bisect_right(times.ticks, times.seconds * part / parts / times.tick) - 1


def sound_start(first: Fraction | float | None, length: float, times: FrameTimes) -> tuple[float, str]:
    """(seconds from the first picture to the first sample, what is wrong with the times of the file).

    first: when a sound of `length` seconds (0 for unknown) begins, on the clock of the file that `times` are of too.
    Where anything is wrong, it begins with the pictures.
    """
    if times.begin is None or first is None:
        return 0.0, times.odd or "sound without a time: it is taken to start with the pictures"
    start = float(first - times.begin)
    if not -(length or LONGEST) < start < (float(times.seconds) or LONGEST):
        return 0.0, "sound and pictures at times that do not meet: they are taken to start together"
    return start, ""


class Holes:
    """Finds the holes of a sound track, block by block. `longest`: the most silence that they can be in all, in
    seconds; `splice`: the most of one, where a longer one means that times start anew."""

    def __init__(self, longest: float, splice: float):
        self._left, self._splice = longest, splice
        self._base: float | None = None  # when the first block since the last jump of times is heard, in seconds
        self._since, self._rate = 0, 1  # samples since then, and how many there are in a second

    def before(self, start: Fraction | float | None, samples: int, rate: int) -> int:
        """How many samples of silence belong in front of a block of `samples`, heard at `start` seconds."""
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
    """float32[N]: the sound of a clip, in step with pictures that last so many `seconds` (0: as long as it likes).

    `samples` [M] at `rate` begin `start` seconds after the first picture. Silence is put in front of them, or what
    comes before the pictures is cut off; silence behind them, or what comes after the pictures is cut off. What is off
    by less than START and END is left as it is.
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
    """The length of what `place` gives for so many samples."""
    return _span(samples, start, seconds, rate)[1]


def _span(samples: int, start: float, seconds: float, rate: int) -> tuple[int, int]:
    """(by how many samples a sound is moved to the right, how long it then is)."""
    shift = round(start * rate) if abs(start) > START else 0
    own, pictures = max(0, samples + shift), round(seconds * rate)
    return shift, pictures if pictures and abs(own - pictures) > END * rate else own


class Timing(NamedTuple):
    """The clock of a video file. frames: how many are shown. seconds: from the first picture to the end of the last; 0
    where that is unknown, and of a single frame. varies: whether the frame rate does. sound: seconds from the first
    picture to the first sample, less than 0 for an earlier one; None without a sound track. odd: what is wrong with the
    times of the file and what is done instead, "" where nothing is."""

    frames: int
    seconds: float
    varies: bool
    sound: float | None
    odd: str

    def remarks(self) -> tuple[str, ...]:
        """What a person should know of it, a text each; none where all is as usual."""
        said = (f"the file has {self.odd}" if self.odd else "", start_remark(self.sound or 0.0))
        return tuple(filter(None, said))


def start_remark(start: float) -> str:
    """What is done about a sound that starts so many seconds after the pictures, "" for nothing to speak of."""
    if abs(start) <= TOLD:
        return ""
    if start > 0:
        return f"the sound starts {start:.1f} s after the pictures; silence is put in front"
    return f"the sound starts {-start:.1f} s before the pictures; its beginning is cut off"


def check_clock(clock: str, where: str) -> None:
    """Raise InputError for an unknown clock."""
    if clock not in CLOCKS:
        raise InputError(where, "clock", f"unknown value {clock!r}", f"use one of {', '.join(CLOCKS)}")
