"""LVIS v1 (Gupta et al. 2019, lvis-dataset/lvis-api): outlines of named objects, for mask alignment.

    lvis_v1_train.json  lvis_v1_val.json      here or in annotations/
    train2017/<12 digits>.jpg  val2017/...    the last two parts of an image's coco_url (val is in both folders)

Prompt and answer: dataset/pretrain_dataset.py, which keeps objects of at least 1000 pixels. Instead of the annotations
Crab's list is read, `<split>_samples.json` of {id, image_id, name, def, area}, and its masks in binary_mask/<id>.png.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco

from crab_jax.io.errors import InputError
from crab_jax.tasks.placeholders import IMAGE, MASK
from data_pipelines.examples import Example
from data_pipelines.media import inline_mask
from data_pipelines.sources.release import Found, Release, Row, each

SMALLEST = 1000  # pixels


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Yield Examples of task `s4` (as in the released code) without sound, one per object.

    meta: objects, video (image id). Masks are run-length codes inside the Example; there is one prompt.
    """
    name = release.annotation(f"lvis_v1_{split}.json", f"annotations/lvis_v1_{split}.json", f"{split}_samples.json")
    if name == f"{split}_samples.json":
        yield from each(release.records(name), lambda row: _listed(release, row))
        return
    content = release.json(name)
    parts: dict[str, list[Any]] = {}
    for key in ("images", "categories", "annotations"):
        items = content.get(key) if isinstance(content, dict) else None
        if not isinstance(items, list):
            raise InputError(str(release.base / name), key, "is no list", "use the annotation file as released")
        parts[key] = items
    images, categories = (_by_id(parts[key], str(release.base / name), key) for key in ("images", "categories"))

    def examples(row: Row) -> Iterator[Example]:
        if _small(row):
            return
        image = _lookup(row, "image_id", images)
        category = _lookup(row, "category_id", categories)
        picture = "/".join(image.text("coco_url").split("/")[-2:])
        size = image.integer("height", 1, 10**5), image.integer("width", 1, 10**5)
        yield _example(
            row, category, release.inside(picture, image.where, "coco_url"), inline_mask(rasterise(row, *size))
        )

    def _lookup(row: Row, field: str, table: Mapping[int, Any]) -> Row:
        number = row.integer(field, 0, 10**12)
        if number not in table:
            raise row.error(field, f"unknown {field} {number}", "use the annotation file as released")
        return Row(release.base, f"{name}:{field} {number}", table[number])

    yield from each(release.records(f"{name}:annotations", items=parts["annotations"]), examples)


def _small(row: Row) -> bool:
    if not isinstance(area := row.values.get("area"), int | float) or not np.isfinite(area):
        raise row.error("area", f"is {area!r:.40}", "must be a number")
    return area < SMALLEST


def _example(row: Row, category: Row, image: str, mask: str) -> Example:
    name = category.text("name")
    prompt = (
        f"{IMAGE}Please segment out the object that corresponding to the {name}, {category.text('def')} in the image."
    )
    return Example(
        id=str(row.integer("id", 0, 10**12)),
        task="s4",
        instruction=prompt,
        target=f"It is {MASK}",
        image=image,
        windows="none",
        mask_kind="binary",
        mask=mask,
        meta={"objects": [name], "video": str(row.values["image_id"]), "row": row.place},
    )


def _listed(release: Release, row: Row) -> Iterator[Example]:
    """Yield the Example of one entry of Crab's list."""
    if _small(row):
        return
    image = f"train2017/{row.integer('image_id', 0, 10**12):012d}.jpg"
    mask = f"binary_mask/{row.integer('id', 0, 10**12)}.png"
    yield _example(row, row, release.inside(image, row.where, "image_id"), release.inside(mask, row.where, "id"))


def _by_id(items: list[Any], where: str, field: str) -> dict[int, Mapping[str, Any]]:
    """Return {id: item}. Raises InputError for an id of two different items."""
    by_id: dict[int, Mapping[str, Any]] = {}
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("id"), int) and by_id.setdefault(item["id"], item) != item:
            raise InputError(where, field, f"the id {item['id']} comes twice", "use the annotation file as released")
    return by_id


def rasterise(row: Row, height: int, width: int) -> dict[str, Any]:
    """Return the COCO run-length code of the union of a row's polygons, [[x, y, x, y, ...], ...] in pixels.

    Raises InputError.
    """
    polygons = row.values.get("segmentation")
    if (
        not isinstance(polygons, list)
        or not polygons
        or not all(
            isinstance(p, list)
            and len(p) >= 6
            and len(p) % 2 == 0
            and all(isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in p)
            for p in polygons
        )
    ):
        raise row.error(
            "segmentation", "is no list of polygons of at least three points", "use the annotation file as released"
        )
    runs: dict[str, Any] = coco.merge(coco.frPyObjects([[float(v) for v in p] for p in polygons], height, width))
    return runs
