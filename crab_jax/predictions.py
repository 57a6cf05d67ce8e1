"""Predictions on disk: one JSON object per line, appended as answers come, and one PNG per mask.

A line holds id, task, prompt, text, parsed, mask and label; docs/evaluation.md has the schema. What is scored is what
is on disk, so a resumed, merged or foreign set of predictions is scored like a fresh one. Lines of other programs, the
released code among them, are matched to Examples by `assign`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from crab_jax import overlay
from crab_jax.errors import InputError
from crab_jax.files import write_whole
from crab_jax.inference import Prediction
from crab_jax.scoring import Answer
from data_pipelines.examples import Example
from data_pipelines.media import avss_palette, read_mask

Row = dict[str, Any]  # one line
FILE = "predictions.jsonl"
LEVELS = 255  # grey levels that a binary mask keeps of its probabilities
DEFAULT_SIZE = 224  # side at which an answer without a mask is scored, in pixels


# Masks.

def mask_picture(mask: np.ndarray) -> Image.Image:
    """A mask as a picture: class ids in the AVSBench-semantic palette, or probabilities as 256 grey levels.

    Probabilities are rounded to a level so that above one half stays above one half, and one half does not.
    """
    if np.issubdtype(mask.dtype, np.integer):
        picture = Image.fromarray(mask.astype(np.uint8))
        picture.putpalette(avss_palette().tobytes())
        return picture
    return Image.fromarray(np.ceil(mask.astype(np.float64) * LEVELS - 0.5).clip(0, LEVELS).astype(np.uint8))


def load_mask(mask: Any, kind: str, folder: Path) -> np.ndarray:
    """The mask of a line: a path relative to `folder`, or a COCO run-length encoding {"size": [h, w], "counts": text}.

    Returns float64[H,W] in [0, 1] (kind "binary") or int32[H,W] class ids ("semantic"), square: a mask of another shape
    is resized to DEFAULT_SIZE. Grey values are read as levels of 255, or as 0 and 1 when there is no higher one.
    Raises InputError for a missing or damaged file.
    """
    if isinstance(mask, Mapping):
        try:
            counts = mask["counts"].encode() if isinstance(mask["counts"], str) else mask["counts"]
            scores = coco.decode({"size": mask["size"], "counts": counts}).astype(np.float64)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(str(folder), "mask", f"is no COCO run-length encoding ({error})",
                             "give size and counts as pycocotools.mask.encode does, or a PNG") from None
        if kind != "binary":
            raise InputError(str(folder), "mask", "is a run-length encoding, but class ids are needed", "give a PNG")
        return _square(scores)
    path = _find(folder, mask)
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if kind == "semantic":
                return read_mask(path, width if width == height else DEFAULT_SIZE, kind)
            grey = np.array(picture.convert("L"), np.float64)
    except OSError as error:
        raise InputError(str(path), "mask", f"cannot be read ({error})", "give the PNG again") from None
    return _square(grey / LEVELS if grey.max(initial=0) > 1 else grey)


def _find(folder: Path, name: str) -> Path:
    """The file of a mask: as written, or by the last parts of its path when the folder has moved since."""
    tries = [folder / name, *(folder.joinpath(*PurePosixPath(name).parts[-k:]) for k in (3, 2, 1))]
    found = next((path for path in tries if path.is_file()), None)
    if found is None:
        raise InputError(str(folder / name), "mask", "no such file", "keep the masks beside the predictions")
    return found


def _square(scores: np.ndarray) -> np.ndarray:
    if scores.shape[0] == scores.shape[1]:
        return scores
    resized = Image.fromarray(scores.astype(np.float32)).resize((DEFAULT_SIZE,) * 2, Image.Resampling.BILINEAR)
    return np.array(resized, np.float64)


# Lines.

def read_rows(path: Path) -> list[Row]:
    """The lines of a file. A last line that breaks off, which a killed program leaves, does not count.

    Raises InputError for a missing file or a line that is no JSON object.
    """
    if not path.is_file():
        raise InputError(str(path), "predictions", "no such file", "give a JSONL file of predictions")
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                continue
            raise InputError(f"{path}:{number}", "", f"not valid JSON ({error})", "one object per line") from None
        if row is not None and not isinstance(row, dict):
            raise InputError(f"{path}:{number}", "", "is not a JSON object", "one object per line")
        rows += [row] if row else []
    return rows


def repair(path: Path) -> None:
    """End the last line, or cut it off when it is not whole, so that more lines can be appended."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        start = file.read().rfind(b"\n") + 1
        file.seek(start)
        try:
            json.loads(file.read())
            file.write(b"\n")
        except ValueError:
            file.truncate(start)


def parts(folder: Path) -> list[Path]:
    """The prediction files of an evaluation: that of one process, or of each of several (predictions.2.jsonl)."""
    return sorted(path for path in folder.glob("predictions*.jsonl"))


def read_all(folder: Path) -> dict[str, Row]:
    """Every complete line of an evaluation by id; each sample once, whichever process wrote it."""
    return {row["id"]: row for path in reversed(parts(folder)) for row in read_rows(path)}


def append(path: Path, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
    """Write each prediction as it passes: its mask first, then its line, so that a line's mask is always there."""
    repair(path)
    (path.parent / "masks").mkdir(exist_ok=True)
    with open(path, "ab") as file:
        for prediction in predictions:
            example, mask = prediction.example, None
            if prediction.mask is not None:
                digest = hashlib.blake2b(example.id.encode(), digest_size=4).hexdigest()
                mask = f"masks/{re.sub(r'[^A-Za-z0-9.-]+', '_', example.id)[:80]}_{digest}.png"
                write_whole(path.parent / mask, overlay.png(mask_picture(prediction.mask)))
            row = {"id": example.id, "task": example.task, "prompt": example.instruction, "text": prediction.text,
                   "parsed": prediction.parsed, "mask": mask, "label": example.meta}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
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
    return " ".join(text.split()).lower()


def assign(rows: Sequence[Row], examples: Sequence[Example], where: str,
           ignored: Collection[str] = ()) -> dict[str, Row]:
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
        if row.get("id") in ignored:
            continue
        if "id" in row:
            if row["id"] not in by_id:
                raise InputError(line, "id", f"no example {row['id']!r} among the ones to score",
                                 "score against the split and the tasks that were predicted")
            chosen = [by_id[row["id"]]]
        else:
            chosen = _narrow(row, examples, by_media, by_question)
        if len(chosen) != 1:
            raise InputError(line, "id", f"is missing, and what the line holds fits {len(chosen)} examples",
                             "add the id of the example")
        if chosen[0].id in found:
            raise InputError(line, "id", f"a second answer to example {chosen[0].id!r}", "keep one of them")
        found[chosen[0].id] = row
    return found


def _narrow(row: Row, examples: Sequence[Example], by_media: Mapping[tuple[str, ...], list[Example]],
            by_question: Mapping[str, list[Example]]) -> list[Example]:
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


def answer_of(row: Row | None, example: Example, folder: Path, where: str) -> Answer:
    """The answer in a line; nothing at all without one."""
    if row is None:
        return Answer(example.id, "")
    mask = row.get("mask", row.get("pred_path"))
    kind = example.mask_kind
    return Answer(example.id, text_of(row, where), load_mask(mask, kind, folder) if mask and kind != "none" else None)
