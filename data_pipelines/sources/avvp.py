"""LLP (Tian et al. 2020, YapengTian/AVVP-ECCV20), the data of audio-visual video parsing.

    data/AVVP_train.csv  AVVP_val_pd.csv  AVVP_test_pd.csv        filename <tab> event_labels (weak)
    data/AVVP_eval_audio.csv  AVVP_eval_visual.csv                filename <tab> onset <tab> offset <tab> event_labels
    data/LLP_dataset/video/<11-character id>.mp4

Only val and test clips have timed labels. A training clip has weak labels alone, which say neither when nor whether an
event is seen or heard: its Example has no target, and training needs the labels of AV-UIE (or ones written with it).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from crab_jax.errors import InputError
from crab_jax.tasks import avvp
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, Release, Row, each

# The official order and spelling: class index 0..24.
CATEGORIES = (
    "Speech", "Car", "Cheering", "Dog", "Cat", "Frying_(food)", "Basketball_bounce", "Fire_alarm", "Chainsaw", "Cello",
    "Banjo", "Singing", "Chicken_rooster", "Violin_fiddle", "Vacuum_cleaner", "Baby_laughter", "Accordion",
    "Lawn_mower", "Motorcycle", "Helicopter", "Acoustic_guitar", "Telephone_bell_ringing", "Baby_cry_infant_cry",
    "Blender", "Clapping")
FILES = {"train": "AVVP_train.csv", "val": "AVVP_val_pd.csv", "test": "AVVP_test_pd.csv"}
DENSE = {"audio": "AVVP_eval_audio.csv", "visual": "AVVP_eval_visual.csv"}
FOLDERS = ("data/LLP_dataset/video", "LLP_dataset/video", "video")
# Ids hold underscores and hyphens, and five training clips have decimals in their times.
_FILENAME = re.compile(r"([A-Za-z0-9_-]{11})_[0-9]+(?:\.[0-9]+)?_[0-9]+(?:\.[0-9]+)?")


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Examples of task `avvp`; meta: labels (weak), filename, video, and in val and test audio and visual."""
    dense: dict[str, dict[str, avvp.Events]] = {}
    for kind in DENSE if split != "train" else ():
        dense[kind], wrong = _dense(release.table(_annotation(release, DENSE[kind]), (
            "filename", "onset", "offset", "event_labels"), "\t", quoted=False))
        yield from wrong

    def examples(row: Row) -> Iterator[Example]:
        video = row.matching("filename", _FILENAME, "BjCEufrlXm4_20_30")[1]
        filename, labels = row.text("filename"), list(dict.fromkeys(row.text("event_labels").split(",")))
        if unknown := [label for label in labels if label not in CATEGORIES]:
            known = ", ".join(CATEGORIES[:4])
            raise row.error("event_labels", f"unknown value {unknown[0]!r:.60}", f"use some of {known}, ...")
        # By the whole name: the dense files hold clips of neither split, some with damaged ids.
        label = {kind: union(spans.get(filename, [])) for kind, spans in dense.items()}
        yield Example(
            id=filename, task="avvp", instruction=avvp.instruction(variant),
            target=avvp.target(label["audio"], label["visual"]) if label else "",
            video=release.inside(release.pick(f"{video}.mp4", *FOLDERS), row.where, "filename"),
            meta={"labels": labels, **label, "filename": filename, "video": video, "row": row.place})

    rows = release.table(_annotation(release, FILES[split]), ("filename", "event_labels"), "\t", quoted=False)
    yield from each(rows, examples)


def _annotation(release: Release, name: str) -> str:
    return release.annotation(f"data/{name}", name)


def _dense(rows: Iterable[Row | InputError]) -> tuple[dict[str, avvp.Events], list[InputError]]:
    """(filename -> [[name, onset, offset], ...], rows that cannot be read)."""
    spans: dict[str, avvp.Events] = {}
    wrong: list[InputError] = []
    for row in rows:
        if isinstance(row, InputError):
            wrong.append(row)
            continue
        try:
            span = [row.one_of("event_labels", CATEGORIES), row.integer("onset", 0, 60), row.integer("offset", 0, 60)]
            spans.setdefault(row.text("filename"), []).append(span)
        except InputError as error:
            wrong.append(error)
    return spans, wrong


def union(spans: Iterable[Iterable]) -> avvp.Events:
    """The same seconds as few spans: duplicates, overlaps and touching spans of one name merged, empty ones dropped.

    The official scorer sets `[onset:offset]` of a vector of ten seconds, so an inverted span marks nothing.
    """
    by_name: dict[str, list[tuple[int, int]]] = {}
    for name, onset, offset in spans:
        by_name.setdefault(name, []).append((onset, offset))
    return [[name, *span] for name in sorted(by_name, key=CATEGORIES.index)
            for span in avvp.merge_spans(by_name[name])]
