"""Predictions on disk: one JSON object per line, appended as answers come, and one PNG per mask.

A line holds id, task, prompt, text, parsed, mask and label; docs/evaluation.md has the schema. What is scored is what
is on disk, so a resumed, merged or foreign set of predictions is scored like a fresh one. Lines of other programs, the
released code among them, are matched to Examples by `assign`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from crab_jax.evaluation.scoring import Answer
from crab_jax.inference import Prediction
from crab_jax.io.bounds import Number, Text
from crab_jax.io.errors import InputError
from crab_jax.io.files import append_line, cut_tail, end_of_lines, write_whole
from crab_jax.io.structured import (
    LIST,
    Either,
    Null,
    check,
    json_line,
    read_bytes,
    refuse_utf16,
    strict_json,
    text_of_bytes,
)
from crab_jax.tasks.avs_classes import avss_palette
from crab_jax.visualize import overlay
from data_pipelines.examples import Example
from data_pipelines.media import decode_runs, image_size, read_mask
from data_pipelines.media.masks import BETWEEN, LOSSY
from data_pipelines.media.pictures import DEEP, open_picture

Row = dict[str, Any]  # one line
FILE = "predictions.jsonl"
LEVELS = 255  # grey levels that a binary mask keeps of its probabilities
MARK = "mask_levels"  # text in a PNG, and key of a line: the grey level that stands for 1
OURS = {8: LEVELS}  # `full` of `load_mask` for masks that we wrote
DEFAULT_SIZE = 224  # side at which an answer without a mask is scored, in pixels


# Masks.


def mask_picture(mask: np.ndarray) -> Image.Image:
    """A mask as a picture: class ids in the AVSBench-semantic palette, or probabilities as 256 grey levels.

    Probabilities are rounded to a level so that above one half stays above one half, and one half does not. The PNG
    says that its levels are of 255 (MARK), so that level 1 is never taken for a certain object. Raises InputError for
    what is no probability.
    """
    if np.issubdtype(mask.dtype, np.integer):
        picture = Image.fromarray(mask.astype(np.uint8))
        picture.putpalette(avss_palette().tobytes())
        return picture
    scores = mask.astype(np.float64)
    if not ((scores >= 0) & (scores <= 1)).all():
        raise InputError("mask", "", "holds values that are no probabilities", "give numbers from 0 to 1")
    picture = Image.fromarray(np.ceil(scores * LEVELS - 0.5).clip(0, LEVELS).astype(np.uint8))
    text = PngImagePlugin.PngInfo()
    text.add_text(MARK, str(LEVELS))
    picture.encoderinfo = {"pnginfo": text}  # type: ignore[attr-defined]
    return picture


def load_mask(
    mask: Any,
    kind: str,
    folder: Path,
    full: Mapping[int, int] | None = None,
    truth: Callable[[], tuple[int, int] | None] = lambda: None,
    where: str = "",
) -> np.ndarray:
    """The mask of a line: a path relative to `folder`, or a COCO run-length encoding {"size": [h, w], "counts": text}.

    Returns float64[H,W] in [0, 1] (kind "binary") or int32[H,W] class ids ("semantic"), square: a mask of another shape
    must have that of the true mask, whose (width, height) `truth` gives where it is known, and is resized to
    DEFAULT_SIZE. `where` names the line. `full` is what `full_levels` found in all files of the run; without it the
    file is a run of its own. Raises InputError for a missing or damaged file, for another shape, and for what cannot be
    told to be a mask.
    """
    if isinstance(mask, Mapping):
        if kind != "binary":
            raise InputError(str(folder), "mask", "is a run-length encoding, but class ids are needed", "give a PNG")
        runs = decode_runs(mask.get("size"), mask.get("counts"), where or str(folder))
        _check_shape(runs.shape[::-1], truth, where or str(folder))
        return _square(runs.astype(np.float64))
    path = find_mask(folder, mask)
    if kind == "semantic":
        width, height = image_size(path, "mask")
        _check_shape((width, height), truth, str(path), where)
        ids = read_mask(path, width if width == height else DEFAULT_SIZE, kind, unknown=-1)
        if (ids < 0).any():
            raise InputError(
                str(path),
                "mask",
                f"{(ids < 0).sum():,} pixels have a colour of no class",
                "write class ids, or the exact colours of AVSBench-semantic",
            )
        return ids
    levels, bits = grey_levels(path)
    most = (full_levels([path]) if full is None else full).get(bits, 1)
    if levels.max(initial=0) > most:
        raise InputError(
            str(path),
            "mask",
            f"has grey level {levels.max():g}, above {most}, which stands for 1",
            f"give the right {MARK} in the line, or none",
        )
    _check_shape(levels.shape[::-1], truth, str(path), where)
    return _square(levels.astype(np.float64) / most)


def grey_levels(path: Path) -> tuple[np.ndarray, int]:
    """(levels [H,W], bits) of a binary mask of any program; bits 0: the file itself says that 1 is the highest level.

    So do one bit, floating point, colours (black is background, and nothing else is) and our own MARK; of grey files of
    8 and 16 bits only all of a run together can tell (`full_levels`). Raises InputError.
    """

    def refuse(problem: str) -> InputError:
        return InputError(str(path), "mask", problem, "give a PNG with grey levels, or with 0 and 1")

    with open_picture(path, "mask", whole=True) as opened:
        picture = opened.image
        if picture.has_transparency_data:
            opaque = np.array(picture.convert("RGBA").getchannel("A"))
            if opaque.min(initial=255) < 255:
                shown = np.array(picture.convert("RGB")).any(-1)
                if not np.array_equal(shown, opaque > 0):
                    raise refuse("says one thing by its colours and another by its transparency")
        if picture.mode == "1":
            return np.array(picture).astype(np.uint8), 0
        if picture.mode == "F" or picture.mode in DEEP:
            levels = np.array(picture)
            highest = 1 if picture.mode == "F" else 0xFFFF
            if not ((levels >= 0) & (levels <= highest)).all():
                raise refuse(f"has values outside 0 to {highest}")
            return levels, 0 if picture.mode == "F" else 16
        marked = picture.info.get(MARK) == str(LEVELS)
        if opened.kind in LOSSY:  # which give grey a tinge
            return _grey_of_lossy(np.array(picture.convert("RGB")), opened.kind, refuse), 8
        colours = np.array(picture.convert("RGB" if picture.mode not in ("L", "LA") else "L"))
        if colours.ndim == 3 and (colours != colours[..., :1]).any():
            shown = np.asarray(colours.any(-1))
            if shown.all() or len(np.unique(colours[shown], axis=0)) > 255:
                raise refuse("is a coloured picture without black, or with more colours than a mask has")
            return shown.astype(np.uint8), 0
        grey: np.ndarray = colours if colours.ndim == 2 else colours[..., 0]
        return (grey.astype(np.float64) / LEVELS, 0) if marked else (grey, 8)


def _grey_of_lossy(colours: np.ndarray, kind: str, refuse: Callable[[str], InputError]) -> np.ndarray:
    """uint8[H,W]: the greys of a mask [H,W,3] in a format that does not keep values exactly. Raises InputError where it
    has colours."""
    tinge = colours.max(axis=2).astype(int) - colours.min(axis=2)
    if (tinge > 64).mean() > BETWEEN:
        raise refuse(f"is a {kind} with colours, which that does not keep exactly")
    return np.asarray(Image.fromarray(colours).convert("L"))


class Shown(NamedTuple):
    """What the files of a run hold that do not say which grey level stands for 1: the highest, up to two above 0, and
    the last of the files."""

    highest: int
    levels: frozenset[int]
    path: Path

    @property
    def full(self) -> int:
        """The lowest of 1, 255 and 65535 that no file exceeds: 1 where all of them hold 0 and 1 alone."""
        return next(most for most in (1, LEVELS, 0xFFFF) if self.highest <= most)


def shown_levels(paths: Iterable[Path]) -> dict[int, Shown]:
    """{8: ..., 16: ...}: what the files of each depth show."""
    found: dict[int, Shown] = {}
    for path in paths:
        levels, bits = grey_levels(path)
        if bits:
            before = found.get(bits, Shown(0, frozenset(), path))
            few = (
                before.levels
                if len(before.levels) > 1
                else before.levels | {int(level) for level in np.unique(levels)[:3] if level}
            )
            found[bits] = Shown(max(before.highest, int(levels.max(initial=0))), few, path)
    return found


def full_levels(paths: Iterable[Path]) -> dict[int, int]:
    """{8: level, 16: level}: the grey level that stands for 1 in the files of a run, by their depth; see `Shown`."""
    return _full(shown_levels(paths))


def _full(shown: Mapping[int, Shown]) -> dict[int, int]:
    for bits, (highest, levels, path) in shown.items():
        full = shown[bits].full
        if len(levels) == 1 and highest <= full // 2:  # a class, or a mask of its own kind
            raise InputError(
                str(path),
                "mask",
                f"holds grey level {highest} beside 0, and so do all {bits}-bit masks: "
                f"it would be read as {highest} of {full}, that is as nothing",
                "write 0 and 1, or 0 and 255",
            )
    return {bits: one.full for bits, one in shown.items()}


def find_mask(folder: Path, name: Any) -> Path:
    """The file of a mask: as written, or by the last parts of its path when the folder has moved since."""
    if not isinstance(name, str):
        raise InputError(str(folder), "mask", f"is {name!r:.60}", "give the path of a PNG, or COCO run lengths")
    parts_ = PurePosixPath(name.replace("\\", "/")).parts
    for path in (folder / name, *(folder.joinpath(*parts_[-k:]) for k in (3, 2, 1))):
        with contextlib.suppress(OSError):  # a name that is too long
            if path.is_file():
                return path
    raise InputError(str(folder / name), "mask", "no such file", "keep the masks beside the predictions")


def mask_name(name: str) -> str:
    """Where the mask of the Example of this id lies, relative to the predictions that we write."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return f"masks/{re.sub(r'[^A-Za-z0-9.-]+', '_', name)[:80]}_{digest}.png"


class MaskLevels:
    """Which grey level stands for 1 in the masks of each line of a predictions file, decided once for all of them.

    Our own masks are marked, and those that we wrote before there was a mark have names of ours; a line may say it as
    MARK; the others are told by all of them together.
    """

    def __init__(self, rows: Mapping[str, Row], binary: Collection[str], folder: Path):
        """`rows` by the id of their Example, `binary` the ids whose masks are binary. Raises InputError for a missing
        mask, and for two paths that lead to one file."""
        written: dict[Path, str] = {}
        shared: set[Path] = set()
        others: dict[Path, None] = {}
        for name, row in rows.items():
            mask = mask_of(row)
            if name not in binary or mask is None or isinstance(mask, Mapping):
                continue
            path = find_mask(folder, mask)
            if path in written:
                shared.add(path)
            if written.setdefault(path, mask) != mask:
                raise InputError(
                    str(path),
                    "mask",
                    f"both {written[path]} and {mask} lead to it",
                    "keep the folders of the masks as they were written",
                )
            if MARK not in row and mask != mask_name(name):
                others[path] = None
        shown = shown_levels(others)
        self.full, wrong = _full(shown), f'(if that is wrong, give "{MARK}" in the lines)'
        self.told = [
            f"the {bits}-bit masks hold no grey level above {most}: it is read as 1 {wrong}"
            for bits, most in self.full.items()
            if most < 2**bits - 1
        ]
        self.told += [
            f"warning: the {bits}-bit masks hold no grey level above {one.highest} of {one.full}: nothing in "
            f"them is above one half, so all are read as empty {wrong}"
            for bits, one in shown.items()
            if 0 < one.highest <= one.full // 2
        ]
        self.told += [f"{len(shared)} masks belong to several lines, such as {min(shared)}"] if shared else []

    def of(self, name: str, row: Row, where: str) -> Mapping[int, int]:
        """`full` of `load_mask` for one line."""
        stated = row.get(MARK)
        if stated is None:
            return OURS if mask_of(row) == mask_name(name) else self.full
        if isinstance(stated, bool) or stated not in (1, LEVELS, 0xFFFF):
            raise InputError(where, MARK, f"is {stated!r:.40}", "give 1, 255 or 65535")
        return {8: stated, 16: stated}


def _check_shape(size: tuple[int, ...], truth: Callable[[], tuple[int, int] | None], file: str, line: str = "") -> None:
    """Raise InputError for a mask of (width, height) `size` that is neither square, as the model sees every picture,
    nor of the shape of its true mask: stretched to a square it would be another picture."""
    width, height = size
    wanted = truth() if width != height else None
    if wanted is not None and not _same_shape((width, height), wanted):
        problem = f"is {width}x{height}, but the true mask is {wanted[0]}x{wanted[1]}"
        exchanged = ": width and height are exchanged" if size == wanted[::-1] else ""
        raise InputError(
            file,
            "mask",
            f"{problem}{exchanged}{f' ({line})' if line else ''}",
            "write masks at the size of the picture (run lengths: [height, width]), or square",
        )


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other, but for its scale and a pixel of rounding."""
    (width, height), (wide, high) = one, other
    return abs(width * high / wide - height) < 1 or abs(height * wide / high - width) < 1


def _square(scores: np.ndarray) -> np.ndarray:
    if scores.shape[0] == scores.shape[1]:
        return scores
    resized = Image.fromarray(scores.astype(np.float32)).resize((DEFAULT_SIZE,) * 2, Image.Resampling.BILINEAR)
    return np.array(resized, np.float64)


# Lines.

_ONE = Null(Either((Text(), Number())))
# What tells which example a line of whatever program answers; what it answers is looked at when it is scored.
LINE = {"id?": Text(1), "question_id?": _ONE, "qid?": _ONE, "image_path?": Null(Text()), "video_path?": Null(Text())}


def read_rows(path: Path, own: bool = False) -> list[Row]:
    """The lines of a file. A last line that breaks off, which a killed program leaves, does not count; in a file of our
    `own` nothing does that follows the last whole line.

    Raises InputError for a missing file, one that is no UTF-8, or a line that is no JSON object.
    """
    if not path.is_file():
        raise InputError(str(path), "predictions", "no such file", "give a JSONL file of predictions")
    data = read_bytes(path, "predictions", LIST)
    data = data[: end_of_lines(data)] if own else data
    refuse_utf16(data, str(path))
    whole = data.rfind(b"\n") + 1
    lines = text_of_bytes(data[:whole], str(path)).split("\n")
    with contextlib.suppress(ValueError):
        last = data[whole:].decode("utf-8-sig" if not whole else "utf-8")
        lines += [last] if strict_json(last) is not None else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = json_line(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}", "", "is not a JSON object", "one object per line")
        check(row, LINE, f"{path}:{number}")
        rows += [row] if row else []
    return rows


def parts(folder: Path) -> list[Path]:
    """The prediction files of an evaluation: that of one process, or of each of several (predictions.2.jsonl)."""
    return sorted(path for path in folder.glob("predictions*.jsonl"))


def read_all(folder: Path) -> dict[str, Row]:
    """Every complete line of an evaluation by id; each sample once, whichever process wrote it."""
    rows = (row for path in reversed(parts(folder)) for row in read_rows(path, own=True))
    return {row["id"]: row for row in rows if isinstance(row.get("id"), str)}


def append(path: Path, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Write each prediction as it passes: its mask first, then its line, so that a line's mask is always there."""
    cut_tail(path)
    (path.parent / "masks").mkdir(exist_ok=True)
    for prediction in predictions:
        example, mask = prediction.example, None
        if prediction.mask is not None:
            mask = mask_name(example.id)
            write_whole(path.parent / mask, overlay.png(mask_picture(prediction.mask)), lasting=False)
        append_line(
            path,
            {
                "id": example.id,
                "task": example.task,
                "prompt": example.instruction,
                "text": prediction.text,
                "parsed": prediction.parsed,
                "mask": mask,
                "label": example.meta,
            },
        )
        yield prediction


def merge(folder: Path, order: Sequence[str]) -> None:
    """Make one file of all parts, its lines in the `order` of ids (those of other ids last)."""
    rows, place = read_all(folder), {name: number for number, name in enumerate(order)}
    names = sorted(rows, key=lambda name: (place.get(name, len(place)), name))
    old = parts(folder)
    write_whole(folder / FILE, "".join(json.dumps(rows[n], ensure_ascii=False) + "\n" for n in names).encode())
    for path in old:
        if path.name != FILE:
            path.unlink()


# Lines of other programs.


def text_of(row: Row, where: str) -> str:
    """The answer in a line: text, or what the released code calls predict, pred, or (with a pred_path) output."""
    names = ("text", "predict", "pred", *(["output"] if "pred_path" in row else []))
    found = next((row[name] for name in names if isinstance(row.get(name), str)), None)
    if found is None:
        raise InputError(where, "text", "is missing", "give the answer as text (or predict)")
    return found


def _media_keys(paths: Iterable[str | None]) -> set[tuple[str, ...]]:
    """What paths of one file have in common under every root: a picture's last three parts, a clip's name."""
    keys = set()
    for path in filter(None, paths):
        parts_ = PurePosixPath(path.replace("\\", "/")).parts
        picture = parts_[-1].rpartition(".")[2].lower() in ("jpg", "jpeg", "png")
        keys.add(parts_[-3:] if picture else (parts_[-1].rpartition(".")[0],))
    return keys


def _keys(example: Example) -> set[tuple[str, ...]]:
    frame = example.frames[example.second or 0] if example.frames else None
    picture = example.seg_image or example.image or frame
    return _media_keys([picture] if picture else [example.video])


def _line(text: str) -> str:
    """What a line says, whether in our wording or in that of the release ("guitar_man", "is null")."""
    words = re.split(r"[\s_]+", text.lower().replace("does not appear", "is null"))
    return " ".join(word for word in words if word not in ("", "and"))


def assign(
    rows: Sequence[Row], examples: Sequence[Example], where: str, ignored: Collection[str] = ()
) -> dict[str, Row]:
    """Lines by the id of the Example that each answers; lines of `ignored` ids are left out.

    A line with an id names it. Otherwise it is the one example with its question_id (or qid), its media (video_path or
    image_path), its instruction and its gold answer (label, or output beside predict), as far as the line has them.
    Raises InputError for a line that fits no example or several, and for two lines of one example.
    """
    by_id = {example.id: example for example in examples}
    by_media: dict[tuple[str, ...], list[Example]] = defaultdict(list)
    by_question: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        for key in _keys(example):
            by_media[key].append(example)
        if "question_id" in example.meta:
            by_question[str(example.meta["question_id"])].append(example)
    found: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        line = f"{where}:{number}"
        for name in ("id", "image_path", "video_path"):
            if not isinstance(row.get(name), str | int | None) or (name != "id" and isinstance(row.get(name), int)):
                raise InputError(line, name, f"is {row[name]!r:.60}", "must be text")
        if row.get("id") in ignored:
            continue
        if "id" in row:
            if row["id"] not in by_id:
                raise InputError(
                    line,
                    "id",
                    f"no example {row['id']!r} among the ones to score",
                    "score against the split and the tasks that were predicted",
                )
            chosen = [by_id[row["id"]]]
        else:
            chosen = _narrow(row, examples, by_media, by_question)
        if len(chosen) != 1:
            raise InputError(
                line,
                "id",
                f"is missing, and what the line holds fits {len(chosen)} examples",
                "add the id of the example",
            )
        if chosen[0].id in found:
            raise InputError(line, "id", f"a second answer to example {chosen[0].id!r}", "keep one of them")
        found[chosen[0].id] = row
    return found


def _narrow(
    row: Row,
    examples: Sequence[Example],
    by_media: Mapping[tuple[str, ...], list[Example]],
    by_question: Mapping[str, list[Example]],
) -> list[Example]:
    """The examples that a line without an id may be about."""
    chosen = list(examples)
    question = row.get("question_id", row.get("qid"))
    keys = _media_keys([row.get("image_path") or row.get("video_path")])
    if question is not None and by_question:
        chosen = by_question.get(str(question), [])
    elif keys:
        chosen = by_media.get(next(iter(keys)), [])
    gold = row.get("label") if isinstance(row.get("label"), str) else row.get("output") if "predict" in row else None
    for wanted, of in ((row.get("instruction"), lambda e: e.instruction), (gold, lambda e: e.target)):
        if isinstance(wanted, str) and len(chosen) > 1:
            same = [e for e in chosen if _line(wanted).removesuffix("</s>").strip() == _line(of(e))]
            chosen = same or chosen
    return chosen


def mask_of(row: Row) -> Any:
    """What a line says of its mask, None for nothing; the released code calls it pred_path."""
    mask = row.get("mask", row.get("pred_path"))
    return None if mask == "" else mask


def masks_digest(rows: Iterable[Row], folder: Path) -> str:
    """A hash of the mask files of lines, as far as they are there."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        mask = mask_of(row)
        if isinstance(mask, str):
            with contextlib.suppress(InputError):
                found.update(hashlib.blake2b(find_mask(folder, mask).read_bytes()).digest())
    return found.hexdigest()


def answer_of(
    row: Row | None,
    example: Example,
    folder: Path,
    where: str,
    full: Mapping[int, int] | None = None,
    truth: Callable[[], tuple[int, int] | None] = lambda: None,
) -> Answer:
    """The answer in a line; nothing at all without one. `full`, `truth`: as of `load_mask`."""
    if row is None:
        return Answer(example.id, "")
    mask, kind = mask_of(row), example.mask_kind
    drawn = load_mask(mask, kind, folder, full, truth, where) if mask is not None and kind != "none" else None
    return Answer(example.id, text_of(row, where), drawn)
