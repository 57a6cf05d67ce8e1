"""Predictions on disk: one JSON object per line, appended as answers are generated, and one PNG per mask.

A line holds id, task, prompt, text, parsed, mask and label; docs/evaluation.md has the schema. Scores are computed from
the files alone, so that resumed or merged predictions, and those of other programs, are scored like new ones. `assign`
matches the lines of other programs, such as the released code, to Examples.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from crab_jax.evaluation.scoring import Answer
from crab_jax.inference import Prediction
from crab_jax.io import paths
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

Row = dict[str, Any]  # one line of a predictions file
FILE = "predictions.jsonl"
LEVELS = 255  # the grey level that stands for probability 1 in the masks that are written here
MARK = "mask_levels"  # key of a PNG's text and of a line, for the grey level that stands for 1
OURS = {8: LEVELS}  # argument `full` of `load_mask` for masks that are written here
DEFAULT_SIZE = 224  # side at which an answer without a mask is scored, in pixels


# Masks.


def mask_picture(mask: np.ndarray) -> Image.Image:
    """Return a mask as a picture: class ids in the AVSBench-semantic palette, or probabilities as 256 grey levels.

    mask: integer class ids [H,W], or probabilities float[H,W]. Rounding keeps probabilities above one half above it,
    and one half and less below it. The PNG has the text MARK, which says that level 255 stands for 1, so that level 1
    is never read as probability 1. Raises InputError for a value that is not a probability.
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
    picture.encoderinfo = {"pnginfo": text}
    return picture


def load_mask(
    mask: Any,
    kind: str,
    folder: Path,
    full: Mapping[int, int] | None = None,
    truth: Callable[[], tuple[int, int] | None] = lambda: None,
    line: str = "",
) -> np.ndarray:
    """Return the square mask of a line: float64[H,W] in [0, 1] (kind "binary"), int32[H,W] class ids ("semantic").

    mask: a path relative to `folder`, or a COCO run-length encoding {"size": [h, w], "counts": text}.
    full: result of `full_levels` for all files of the run; without it the file is taken alone.
    truth: returns the (width, height) of the true mask, or None if it is unknown. A mask that is not square must have
        the shape of the true mask, and is resized to DEFAULT_SIZE.
    line: name of the line in errors.

    Raises InputError for a missing or damaged file, for another shape, and for a picture that cannot be read as a mask.
    """
    if isinstance(mask, Mapping):
        if kind != "binary":
            raise InputError(str(folder), "mask", "is a run-length encoding, but class ids are needed", "give a PNG")
        runs = decode_runs(mask.get("size"), mask.get("counts"), line or str(folder))
        _check_shape(runs.shape[::-1], truth, line or str(folder))
        return _square(runs.astype(np.float64))
    path = find_mask(folder, mask)
    if kind == "semantic":
        width, height = image_size(path, "mask")
        _check_shape((width, height), truth, str(path), line)
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
    _check_shape(levels.shape[::-1], truth, str(path), line)
    return _square(levels.astype(np.float64) / most)


def grey_levels(path: Path) -> tuple[np.ndarray, int]:
    """Return the levels [H,W] of a binary mask of any program and its bits, 0 if level 1 is known to be the highest.

    It is known for files of one bit, of floating point, in colour (where only black is background), and with MARK. For
    grey files of 8 or 16 bits the highest level follows from all files of a run together (`full_levels`). Raises
    InputError for a picture that cannot be read as a mask.
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
        if opened.kind in LOSSY:  # lossy formats add a little colour to grey
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
    """Return the grey levels uint8[H,W] of a mask uint8[H,W,3] in a lossy format; raise InputError for colours."""
    tinge = colours.max(axis=2).astype(int) - colours.min(axis=2)
    if (tinge > 64).mean() > BETWEEN:
        raise refuse(f"is a {kind} with colours, which that does not keep exactly")
    return np.asarray(Image.fromarray(colours).convert("L"))


class Shown(NamedTuple):
    """Grey levels in the files of a run that do not say which level stands for 1.

    highest: the highest level. levels: one level above 0 if there is only one, otherwise some. path: the last file.
    """

    highest: int
    levels: frozenset[int]
    path: Path

    @property
    def full(self) -> int:
        """The lowest of 1, 255 and 65535 that no file exceeds: 1 if all files hold only 0 and 1."""
        return next(most for most in (1, LEVELS, 0xFFFF) if self.highest <= most)


def shown_levels(paths: Iterable[Path]) -> dict[int, Shown]:
    """Return the grey levels of files that do not say which level stands for 1, by depth: {8: ..., 16: ...}."""
    shown: dict[int, Shown] = {}
    for path in paths:
        levels, bits = grey_levels(path)
        if bits:
            before = shown.get(bits, Shown(0, frozenset(), path))
            few = (
                before.levels
                if len(before.levels) > 1
                else before.levels | {int(level) for level in np.unique(levels)[:3] if level}
            )
            shown[bits] = Shown(max(before.highest, int(levels.max(initial=0))), few, path)
    return shown


def full_levels(paths: Iterable[Path]) -> dict[int, int]:
    """Return the grey level that stands for 1 in the files of a run, by their depth: {8: level, 16: level}.

    Raises InputError for files whose only level above 0 would be read as almost nothing.
    """
    return _full(shown_levels(paths))


def _full(shown: Mapping[int, Shown]) -> dict[int, int]:
    for bits, (highest, levels, path) in shown.items():
        full = shown[bits].full
        if len(levels) == 1 and highest <= full // 2:  # such as a class id
            raise InputError(
                str(path),
                "mask",
                f"holds grey level {highest} beside 0, and so do all {bits}-bit masks: "
                f"it would be read as {highest} of {full}, that is as nothing",
                "write 0 and 1, or 0 and 255",
            )
    return {bits: levels_of_depth.full for bits, levels_of_depth in shown.items()}


def find_mask(folder: Path, name: Any) -> Path:
    """Return the file of a mask: at its path, or at the last parts of the path if the folder has moved since.

    Raises InputError for a name that is not text, and for a missing file.
    """
    if not isinstance(name, str):
        raise InputError(str(folder), "mask", f"is {name!r:.60}", "give the path of a PNG, or COCO run lengths")
    parts_ = PurePosixPath(name.replace("\\", "/")).parts
    for path in (folder / name, *(folder.joinpath(*parts_[-k:]) for k in (3, 2, 1))):
        with contextlib.suppress(OSError):  # a name that is too long
            if path.is_file():
                return paths.local(path)
    raise InputError(str(folder / name), "mask", "no such file", "keep the masks beside the predictions")


def mask_name(name: str) -> str:
    """Return the path of the mask of the Example with this id, relative to the predictions that are written here."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    return f"masks/{re.sub(r'[^A-Za-z0-9.-]+', '_', name)[:80]}_{digest}.png"


class MaskLevels:
    """The grey level that stands for 1 in the mask of each line of a predictions file, decided once for the whole file.

    Masks that are written here have MARK, or, in older folders, a name by `mask_name`. A line can give the level under
    the key MARK. For the other masks the level follows from all of them together. `notes` are the messages about it for
    the user.
    """

    def __init__(self, rows: Mapping[str, Row], binary: Collection[str], folder: Path):
        """Read the masks of `rows`, {id of the Example: line}, whose ids are in `binary`.

        Raises InputError for a missing mask, and for two different paths that lead to one file.
        """
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
        self.notes = [
            f"the {bits}-bit masks hold no grey level above {most}: it is read as 1 {wrong}"
            for bits, most in self.full.items()
            if most < 2**bits - 1
        ]
        self.notes += [
            f"warning: the {bits}-bit masks hold no grey level above {depth.highest} of {depth.full}: nothing in "
            f"them is above one half, so all are read as empty {wrong}"
            for bits, depth in shown.items()
            if 0 < depth.highest <= depth.full // 2
        ]
        self.notes += [f"{len(shared)} masks belong to several lines, such as {min(shared)}"] if shared else []

    def of(self, name: str, row: Row, line: str) -> Mapping[int, int]:
        """Return the argument `full` of `load_mask` for one line; raise InputError for a MARK that is not a level."""
        stated = row.get(MARK)
        if stated is None:
            return OURS if mask_of(row) == mask_name(name) else self.full
        if isinstance(stated, bool) or stated not in (1, LEVELS, 0xFFFF):
            raise InputError(line, MARK, f"is {stated!r:.40}", "give 1, 255 or 65535")
        return {8: stated, 16: stated}


def _check_shape(size: tuple[int, ...], truth: Callable[[], tuple[int, int] | None], file: str, line: str = "") -> None:
    """Raise InputError for a mask of (width, height) `size` that is neither square nor of the shape of its true mask.

    The model sees every picture as a square; a mask of another shape would not match it after resizing.
    """
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
    """Return whether two sizes have the same shape, up to scale and a pixel of rounding."""
    (width, height), (wide, high) = one, other
    return abs(width * high / wide - height) < 1 or abs(height * wide / high - width) < 1


def _square(scores: np.ndarray) -> np.ndarray:
    if scores.shape[0] == scores.shape[1]:
        return scores
    resized = Image.fromarray(scores.astype(np.float32)).resize((DEFAULT_SIZE,) * 2, Image.Resampling.BILINEAR)
    return np.array(resized, np.float64)


# Lines.

_ONE = Null(Either((Text(), Number())))
# Schema of the fields that identify the example of a line; its answer is checked when it is scored.
LINE = {"id?": Text(1), "question_id?": _ONE, "qid?": _ONE, "image_path?": Null(Text()), "video_path?": Null(Text())}


def read_rows(path: Path, own: bool = False) -> list[Row]:
    """Return the lines of a predictions file.

    An incomplete last line, which a killed program leaves, is ignored. With `own`, for a file that is written here, so
    is everything after the last newline. Raises InputError for a missing file, one that is not UTF-8, and a line that
    is not a JSON object.
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
    """Return the prediction files in a folder: predictions.jsonl, and predictions.<i>.jsonl of several processes."""
    return sorted(path for path in folder.glob("predictions*.jsonl"))


def read_all(folder: Path) -> dict[str, Row]:
    """Return every complete line of an evaluation by id, each id once whichever process wrote it."""
    rows = (row for path in reversed(parts(folder)) for row in read_rows(path, own=True))
    return {row["id"]: row for row in rows if isinstance(row.get("id"), str)}


def append(path: Path, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Write each prediction and yield it; its mask is written before its line, so that every line has its mask."""
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
    paths.settle()


def merge(folder: Path, order: Sequence[str]) -> None:
    """Merge all prediction files of a folder into one, with lines in the `order` of ids and other ids last."""
    rows, place = read_all(folder), {name: number for number, name in enumerate(order)}
    names = sorted(rows, key=lambda name: (place.get(name, len(place)), name))
    old = parts(folder)
    write_whole(folder / FILE, "".join(json.dumps(rows[n], ensure_ascii=False) + "\n" for n in names).encode())
    for path in old:
        if path.name != FILE:
            path.unlink()


# Lines of other programs.


def text_of(row: Row, line: str) -> str:
    """Return the answer in a line; the released code calls it predict, pred or, beside a pred_path, output.

    Raises InputError naming `line` if there is none.
    """
    names = ("text", "predict", "pred", *(["output"] if "pred_path" in row else []))
    text: str | None = next((row[name] for name in names if isinstance(row.get(name), str)), None)
    if text is None:
        raise InputError(line, "text", "is missing", "give the answer as text (or predict)")
    return text


def _media_keys(paths: Iterable[str | None]) -> set[tuple[str, ...]]:
    """Return keys of media that are the same under every root: a picture's last three parts, a clip's stem."""
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


def _wording(text: str) -> str:
    """Return text in a form common to our wording and that of the released code ("guitar_man", "is null")."""
    words = re.split(r"[\s_]+", text.lower().replace("does not appear", "is null"))
    return " ".join(word for word in words if word not in ("", "and"))


def assign(
    rows: Sequence[Row], examples: Sequence[Example], file: str, ignored: Collection[str] = ()
) -> dict[str, Row]:
    """Return the lines by the id of the Example that each answers, without those of `ignored` ids.

    A line without an id is matched by its question_id (or qid), its media (video_path or image_path), its instruction
    and its gold answer (label, or output beside predict), as far as it has them. `file` names the file in errors.
    Raises InputError for a line that matches no example or several, and for two lines of one example.
    """
    by_id = {example.id: example for example in examples}
    by_media: dict[tuple[str, ...], list[Example]] = defaultdict(list)
    by_question: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        for key in _keys(example):
            by_media[key].append(example)
        if "question_id" in example.meta:
            by_question[str(example.meta["question_id"])].append(example)
    assigned: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        line = f"{file}:{number}"
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
        if chosen[0].id in assigned:
            raise InputError(line, "id", f"a second answer to example {chosen[0].id!r}", "keep one of them")
        assigned[chosen[0].id] = row
    return assigned


def _narrow(
    row: Row,
    examples: Sequence[Example],
    by_media: Mapping[tuple[str, ...], list[Example]],
    by_question: Mapping[str, list[Example]],
) -> list[Example]:
    """Return the examples that a line without an id may be about."""
    chosen = list(examples)
    question = row.get("question_id", row.get("qid"))
    keys = _media_keys([row.get("image_path") or row.get("video_path")])
    if question is not None and by_question:
        chosen = by_question.get(str(question), [])
    elif keys:
        chosen = by_media.get(next(iter(keys)), [])
    gold = row.get("label") if isinstance(row.get("label"), str) else row.get("output") if "predict" in row else None
    for wanted, text_in in ((row.get("instruction"), attrgetter("instruction")), (gold, attrgetter("target"))):
        if isinstance(wanted, str) and len(chosen) > 1:
            same = [e for e in chosen if _wording(wanted).removesuffix("</s>").strip() == _wording(text_in(e))]
            chosen = same or chosen
    return chosen


def mask_of(row: Row) -> Any:
    """Return the mask entry of a line, None if it has none; the released code calls it pred_path."""
    mask = row.get("mask", row.get("pred_path"))
    return None if mask == "" else mask


def masks_digest(rows: Iterable[Row], folder: Path) -> str:
    """Return a hash of the mask files of `rows`, without those that are missing."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        mask = mask_of(row)
        if isinstance(mask, str):
            with contextlib.suppress(InputError):
                digest.update(hashlib.blake2b(find_mask(folder, mask).read_bytes()).digest())
    return digest.hexdigest()


def answer_of(
    row: Row | None,
    example: Example,
    folder: Path,
    line: str,
    full: Mapping[int, int] | None = None,
    truth: Callable[[], tuple[int, int] | None] = lambda: None,
) -> Answer:
    """Return the answer of `row` to an Example, an empty one if `row` is None.

    `line` names the line in errors; see `load_mask` for `full` and `truth`, and for the errors of its mask.
    """
    if row is None:
        return Answer(example.id, "")
    mask, kind = mask_of(row), example.mask_kind
    drawn = load_mask(mask, kind, folder, full, truth, line) if mask is not None and kind != "none" else None
    return Answer(example.id, text_of(row, line), drawn)
