"""LLP (Tian et al. 2020, YapengTian/AVVP-ECCV20), the dataset of audio-visual video parsing.

    data/AVVP_train.csv  AVVP_val_pd.csv  AVVP_test_pd.csv        filename <tab> event_labels (weak)
    data/AVVP_eval_audio.csv  AVVP_eval_visual.csv                filename <tab> onset <tab> offset <tab> event_labels
    data/LLP_dataset/video/<11-character id>.mp4

Only val and test clips have timed labels. A training clip has only weak labels, which do not state when, or whether, an
event is seen or heard: its Example has no target, and training needs the labels of AV-UIE (or ones written with it).
Instead of the weak files Crab's lists are read, `<split>_samples.json` of {filename, vid, event} and in train the text
of AV-UIE as `label`, and its llp_videos/<vid>.mp4 and audio_data/<vid>.mp3.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from crab_jax.io.errors import InputError
from crab_jax.tasks import avvp
from crab_jax.tasks.avvp import CATEGORIES
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, Release, Row, each, sample_lists

FILES = {"train": "AVVP_train.csv", "val": "AVVP_val_pd.csv", "test": "AVVP_test_pd.csv"}
DENSE = {"audio": "AVVP_eval_audio.csv", "visual": "AVVP_eval_visual.csv"}
FOLDERS = ("data/LLP_dataset/video", "LLP_dataset/video", "video", "llp_videos")
# Ids may contain underscores and hyphens, and five training clips have decimals in their times.
_FILENAME = re.compile(r"(.+)_[0-9]+(?:\.[0-9]+)?_[0-9]+(?:\.[0-9]+)?")

_TAG = re.compile(r"<(/?)(audio|visual)>")  # <audio> is a placeholder token: the released code rewrites them too


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Yield Examples of task `avvp`; meta: labels (weak), filename, video, and in val and test audio and visual."""
    dense: dict[str, dict[str, avvp.Events]] = {}
    lines: dict[str, list[str]] = {}  # clip -> its rows in the dense files
    for kind in DENSE if split != "train" else ():
        dense[kind], wrong = _dense(
            release.table(
                _annotation(release, DENSE[kind]), ("filename", "onset", "offset", "event_labels"), "\t", quoted=False
            ),
            lines,
        )
        yield from wrong
    name, listed = _weak(release, split)
    if split == "test":
        _note_strays(release, lines)

    def examples(row: Row) -> Iterator[Example]:
        match = row.matching("filename", _FILENAME, "BjCEufrlXm4_20_30")
        video = dataclasses.replace(row, values={"filename": match[1]}).name("filename", "BjCEufrlXm4")
        filename, labels = match[0], _labels(row, "event" if listed else "event_labels")
        if unknown := [label for label in labels if label not in CATEGORIES]:
            known = ", ".join(CATEGORIES[:4])
            raise row.error("event_labels", f"unknown value {unknown[0]!r:.60}", f"use some of {known}, ...")
        text = row.values.get("label") if listed and split == "train" else None  # the text of AV-UIE
        # By the whole name: the dense files also have clips of neither split, some with damaged ids.
        label = (
            _parsed_events(row, text)
            if text
            else {kind: union(spans.get(filename, [])) for kind, spans in dense.items()}
        )
        yield Example(
            id=filename,
            task="avvp",
            instruction=avvp.instruction(variant),
            target=_TAG.sub(r"<\1\2_event>", text) if text else _target(label),
            video=release.inside(release.pick(f"{video}.mp4", *FOLDERS), row.where, "filename"),
            audio=release.sound(video),
            meta={"labels": labels, **label, "filename": filename, "video": video, "row": row.place},
        )

    yield from each(_rows(release, name), examples)


def _annotation(release: Release, name: str) -> str:
    return release.annotation(f"data/{name}", name)


def _target(label: Mapping[str, avvp.Events]) -> str:
    return avvp.target(label["audio"], label["visual"]) if label else ""


def _weak(release: Release, split: str) -> tuple[str, bool]:
    """Return (file of a split's clips, whether it is a list of Crab's)."""
    name = release.annotation(f"data/{FILES[split]}", FILES[split], *sample_lists(split, "avvp_data"))
    return name, name.endswith(".json")


def _rows(release: Release, name: str) -> Iterator[Row | InputError]:
    if name.endswith(".json"):
        return release.records(name, "filename")
    return release.table(name, ("filename", "event_labels"), "\t", quoted=False)


def _labels(row: Row, field: str) -> list[str]:
    """Return the weak labels, each once: joined by commas, or a JSON list in a list of Crab's."""
    value = row.values.get(field)
    parts = value if isinstance(value, list) and all(isinstance(v, str) for v in value) else row.text(field).split(",")
    return list(dict.fromkeys(part.strip() for part in parts))


def _parsed_events(row: Row, text: Any) -> dict[str, avvp.Events]:
    """Return the events of a text of AV-UIE. Raises InputError."""
    if not isinstance(text, str) or (events := avvp.parse(text)) is None:
        raise row.error("label", f"is {text!r:.60}, which names no events", "restore the text, or set it to null")
    return {kind: events[kind] for kind in DENSE}


def _note_strays(release: Release, lines: Mapping[str, list[str]]) -> None:
    """Note the dense rows whose clip is in neither split, provided that both splits exist."""
    known: set[str] = set()
    for split in ("val", "test"):
        try:
            rows = _rows(release, _weak(release, split)[0])
            known.update(str(row.values.get("filename")).strip() for row in rows if isinstance(row, Row))
        except InputError:
            return
    for name, places in lines.items():
        if name not in known:
            more = f" and {len(places) - 1} more" if places[1:] else ""
            release.note(
                str(release.base / places[0]),
                "filename",
                f"{name!r:.60} names no clip of val or test; the row{more} counts nowhere",
            )


def _dense(
    rows: Iterable[Row | InputError], lines: dict[str, list[str]]
) -> tuple[dict[str, avvp.Events], list[InputError]]:
    """Return ({filename: [[name, onset, offset], ...]}, errors of rows), and add each clip's lines to `lines`."""
    spans: dict[str, avvp.Events] = {}
    wrong: list[InputError] = []
    for row in rows:
        if isinstance(row, InputError):
            wrong.append(row)
            continue
        try:
            span = [row.one_of("event_labels", CATEGORIES), row.integer("onset", 0, 60), row.integer("offset", 0, 60)]
            filename = row.text("filename").strip()
            spans.setdefault(filename, []).append(span)
            lines.setdefault(filename, []).append(row.place)
        except InputError as error:
            wrong.append(error)
    return spans, wrong


def union(spans: Iterable[Iterable[Any]]) -> avvp.Events:
    """Merge duplicate, overlapping and touching spans of one name, and drop empty ones.

    The official scorer sets `[onset:offset]` of a vector of ten seconds, so an inverted span marks nothing.
    """
    by_name: dict[str, list[tuple[int, int]]] = {}
    for name, onset, offset in spans:
        by_name.setdefault(name, []).append((onset, offset))
    return [[name, *span] for name in sorted(by_name, key=CATEGORIES.index) for span in avvp.merge_spans(by_name[name])]
