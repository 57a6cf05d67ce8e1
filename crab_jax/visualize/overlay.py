"""Pictures of answers: masks and boxes over a picture at its own resolution, and events on a timeline."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from crab_jax.io.errors import printable
from crab_jax.tasks import TASKS
from crab_jax.tasks.avs_classes import CLASSES, avss_palette
from crab_jax.tasks.task import HEARD_AND_SEEN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Colour = tuple[int, int, int]
# Two Okabe-Ito colours, which colour-blind readers can tell apart.
PREDICTION: Colour = (213, 94, 0)
TRUTH: Colour = (0, 158, 115)
BOX_SPACE = 224  # side of the square of ARIG coordinates
SMALL = 4_000_000  # pixels; larger pictures are compressed quickly
ROWS = 256  # rows painted at once, because blending takes several float64 copies
LONGEST_LABEL = 60  # characters of a name in a picture
PARTS = 10  # AVE and AVVP count time in tenths of the clip, which are seconds in ten-second clips


class Track(NamedTuple):
    """One line of a timeline: the event, the parts [start, end) of the clip that it covers, and a colour."""

    label: str
    spans: tuple[tuple[float, float], ...]
    colour: Colour = PREDICTION


def png(picture: np.ndarray | Image.Image) -> bytes:
    """Return a PNG of uint8[H,W,3], uint8[H,W] or a PIL image; small pictures are compressed best, large ones fast."""
    buffer, image = io.BytesIO(), picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    small = image.width * image.height <= SMALL
    image.save(buffer, "PNG", optimize=small, compress_level=9 if small else 1)
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Return a matplotlib figure of this size in inches that shows names literally (no formulas)."""
    import matplotlib  # imported late: it takes a quarter of a second, and most answers need no figure
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False
    return Figure(figsize=(width, height))


def figure_png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a PNG of a matplotlib figure, cropped to its content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def label_of(value: object) -> str:
    """Return a name as it is written into a picture: one line of at most LONGEST_LABEL characters."""
    text = printable(value)
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask to `size` (width, height).

    float[h,w] probabilities or bool -> bool[H,W], int[h,w] ids -> int32[H,W]. Probabilities are interpolated before the
    threshold of 0.5, so the outline is smooth; class ids take the nearest pixel.
    """
    if np.issubdtype(mask.dtype, np.integer):
        return np.array(Image.fromarray(mask.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    return np.array(Image.fromarray(mask.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)) > 0.5


def mask_png(mask: np.ndarray) -> bytes:
    """Return a PNG of a resized mask: bool[H,W] as 0 and 255, int[H,W] class ids with the AVSBench palette."""
    if mask.dtype == bool:
        return png(mask.astype(np.uint8) * 255)
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette(avss_palette().tobytes())
    return png(picture)


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Return bool[H,W]: the `width` outermost pixels of every non-zero region of bool[H,W] or int[H,W].

    The edge of the picture bounds a region too.
    """
    edge = np.zeros(mask.shape, bool)
    for value in np.unique(mask):
        if value:
            region = np.pad(mask == value, 1)  # L1 distances; their cost does not depend on the width
            steps = ndimage.distance_transform_cdt(region, "taxicab")
            edge |= (region & (steps <= width))[1:-1, 1:-1]
    return edge


def _line_width(picture: np.ndarray) -> int:
    side: int = max(picture.shape[:2])
    return max(1, side // 240)


def overlay_mask(picture: np.ndarray, mask: np.ndarray, colour: Colour = PREDICTION, alpha: float = 0.45) -> np.ndarray:
    """Return uint8[H,W,3] with a mask of the same size blended over it and its outline drawn solid.

    bool masks take `colour`; class ids take their AVSBench colours.
    """
    edge, drawn = outline(mask, _line_width(picture)), picture.copy()
    for top in range(0, len(picture), ROWS):
        rows = slice(top, top + ROWS)
        ids, under = mask[rows], picture[rows]
        paint = np.where(ids[..., None], np.array(colour), 0) if mask.dtype == bool else avss_palette()[ids]
        blended = np.where((ids != 0)[..., None], (1 - alpha) * under + alpha * paint, under)
        drawn[rows] = np.where(edge[rows][..., None], paint, np.rint(blended))
    return drawn


def overlay_outline(picture: np.ndarray, mask: np.ndarray, colour: Colour = TRUTH) -> np.ndarray:
    """Return uint8[H,W,3] with the outline of a mask of the same size drawn over it."""
    drawn = picture.copy()
    drawn[outline(mask, _line_width(picture))] = colour
    return drawn


def scale_box(box: Sequence[float], size: tuple[int, int], space: int = BOX_SPACE) -> tuple[int, int, int, int]:
    """Scale a box (x1, y1, x2, y2) of the `space` x `space` square to pixels of a picture of `size` (width, height).

    Corners may come in any order and are clipped to the picture; the result is (left, top, right, bottom) as edges
    between pixels, so the whole square gives (0, 0, width, height).
    """
    (x1, x2), (y1, y2) = sorted((box[0], box[2])), sorted((box[1], box[3]))

    def scaled(value: float, limit: int) -> int:
        return min(max(round(value * limit / space), 0), limit)

    return scaled(x1, size[0]), scaled(y1, size[1]), scaled(x2, size[0]), scaled(y2, size[1])


def overlay_boxes(picture: np.ndarray, boxes: Iterable[tuple[Sequence[float], Colour, str]]) -> np.ndarray:
    """Return uint8[H,W,3] with the outlines of `(box in BOX_SPACE, colour, label)` drawn inside their edges."""
    image = Image.fromarray(picture)
    draw, size = ImageDraw.Draw(image), image.size
    width = max(1, max(size) // 160)
    font = ImageFont.load_default(max(10, max(size) // 32))
    labels: list[tuple[int, int, int, int]] = []
    for box, colour, label in boxes:
        left, top, right, bottom = scale_box(box, size)
        if right <= left or bottom <= top:
            continue
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=min(width, right - left, bottom - top))
        if label := label_of(label):
            _, _, wide, high = map(round, draw.textbbox((0, 0), label, font=font))
            labels.append(_label_place((left, top, right, bottom), (wide + 4, high + 4), size, labels))
            draw.rectangle(labels[-1], fill=colour)
            draw.text((labels[-1][0] + 2, labels[-1][1] + 2), label, font=font, fill=(255, 255, 255))
    return np.array(image)


def _label_place(
    box: tuple[int, int, int, int],
    label: tuple[int, int],
    size: tuple[int, int],
    taken: Sequence[tuple[int, int, int, int]],
) -> tuple[int, int, int, int]:
    """Return the place of a label of size `label`: above its box, else below or inside it, not over `taken` places."""
    (left, top, _, bottom), (wide, high) = box, label
    x = max(0, min(left, size[0] - wide))
    inside = [y for y in (top - high, bottom, top, bottom - high) if 0 <= y <= size[1] - high]
    places = [(x, y, x + wide, y + high) for y in inside or [0]]
    free = [a for a in places if not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken)]
    return (free or places)[0]


def legend(picture: np.ndarray, names: Mapping[str, Colour]) -> np.ndarray:
    """Return uint8[H,W+w,3]: a picture with a legend of its colours on its right, one line per name.

    A legend that is higher than the picture makes it higher.
    """
    high = max(16, picture.shape[0] // 16)
    font = ImageFont.load_default(round(0.75 * high))
    wide = round(max((font.getlength(name) for name in names), default=0)) + 3 * high
    total = Image.new("RGB", (picture.shape[1] + wide, max(picture.shape[0], (len(names) + 1) * high)), "white")
    total.paste(Image.fromarray(picture), (0, 0))
    draw, x = ImageDraw.Draw(total), picture.shape[1] + high // 2
    for row, (name, colour) in enumerate(names.items()):
        y = high // 2 + row * high
        draw.rectangle((x, y + high // 6, x + 2 * high // 3, y + 5 * high // 6), fill=colour)
        draw.text((x + high, y + high // 2), name, font=font, fill=(40, 40, 40), anchor="lm")
    return np.array(total)


def class_colours(*masks: np.ndarray) -> dict[str, Colour]:
    """Return {name: colour} of the classes in int[H,W] masks, without the background, in the order of their ids."""
    ids = sorted({int(i) for mask in masks for i in np.unique(mask)} - {0})
    palette = avss_palette().tolist()
    return {CLASSES[i]: (palette[i][0], palette[i][1], palette[i][2]) for i in ids}


def event_tracks(task: str, label: Any, colour: Colour = PREDICTION, both: bool = False) -> list[Track]:
    """Return the tracks of an answer of events: the result of the task's parser, or the label in an Example's `meta`.

    both: whether a track also says of an event that it is heard and seen.
    """
    if label is None:
        return []
    spans: dict[str, list[Sequence[float]]] = {}
    for name, start, end, sense in TASKS[task].events(label):
        told = sense and (both or sense != HEARD_AND_SEEN)
        spans.setdefault(f"{name} ({sense})" if told else name, []).append((start, end))
    return [Track(name, _clip_spans(ranges), colour) for name, ranges in spans.items()]


def _clip_spans(ranges: Iterable[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    clipped = ((max(0, r[0]), min(PARTS, r[1])) for r in ranges)
    return tuple((start, end) for start, end in clipped if start < end)


def timeline(waveform: np.ndarray, frames: np.ndarray, tracks: Sequence[Track], seconds: float) -> bytes:
    """Return a PNG of a clip of `seconds`: its frames uint8[T,h,w,3], its sound float[N], and one bar per track.

    All share one axis of ten parts: seconds for a ten-second clip, else tenths of the clip.
    """
    rows = max(1, len(tracks))
    strip = 0.9 * 10 / max(1, len(frames)) if len(frames) else 0.0
    figure = new_figure(9, strip + 1.0 + 0.36 * rows + 0.6)
    heights = [max(strip, 0.01), 1.0, 0.36 * rows + 0.2]
    pictures, sound, events = figure.subplots(3, 1, sharex=True, height_ratios=heights, gridspec_kw={"hspace": 0.06})
    for index, frame in enumerate(frames):
        width = PARTS / len(frames)
        pictures.imshow(frame, extent=(index * width, (index + 1) * width, 0, 1), aspect="auto")
    pictures.axis("off")
    pictures.set_ylim(0, 1)
    _draw_waveform(sound, waveform)
    for row, track in enumerate(tracks):
        bars = [(start, end - start) for start, end in track.spans]
        events.broken_barh(bars, (row - 0.36, 0.72), color=np.array(track.colour) / 255)
        if not bars:
            events.text(0.05, row, "no time inside the clip", va="center", fontsize=9, color="0.4")
    if not tracks:
        events.text(PARTS / 2, 0, "no event could be read", ha="center", va="center", color="0.4")
    events.set_yticks(range(len(tracks)), [label_of(track.label) for track in tracks])
    events.set_ylim(rows - 0.5, -0.5)
    events.set_xlim(0, PARTS)
    events.set_xticks(range(PARTS + 1))
    events.grid(axis="x", color="0.88")
    events.set_axisbelow(True)
    ten_seconds = abs(seconds - PARTS) < 0.5
    events.set_xlabel("time (s)" if ten_seconds else f"time (tenths of the clip of {seconds:.1f} s)")
    for axes in (sound, events):
        axes.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)


def _draw_waveform(axes: Any, waveform: np.ndarray) -> None:
    """Draw the envelope of a waveform over the ten parts, scaled to its loudest sample."""
    bins = np.array_split(waveform, min(1000, max(1, len(waveform))))
    peaks = np.array([(piece.min(), piece.max()) for piece in bins if len(piece)] or [(0.0, 0.0)])
    loudest = max(np.abs(peaks).max(), 1e-6)
    time = np.linspace(0, PARTS, len(peaks))
    axes.fill_between(time, peaks[:, 0] / loudest, peaks[:, 1] / loudest, color="0.45", linewidth=0.4)
    axes.set_ylim(-1.05, 1.05)
    axes.set_yticks([])
    axes.set_ylabel("sound")
    axes.tick_params(labelbottom=False, bottom=False)


def side_by_side(pictures: Sequence[tuple[np.ndarray, str]], height: int = 240) -> np.ndarray:
    """Return one row of pictures uint8[H,W,3] of any size, scaled to `height`, each with its title above."""
    font = ImageFont.load_default(max(11, height // 16))
    bar, gap = height // 10, height // 40
    scaled = [Image.fromarray(p).resize((round(p.shape[1] * height / p.shape[0]), height)) for p, _ in pictures]
    total = Image.new("RGB", (sum(s.width + gap for s in scaled) - gap, height + bar), "white")
    draw, x = ImageDraw.Draw(total), 0
    for picture, (_, title) in zip(scaled, pictures, strict=True):
        draw.text((x + 2, bar // 2), title, font=font, fill=(40, 40, 40), anchor="lm")
        total.paste(picture, (x, bar))
        x += picture.width + gap
    return np.array(total)
