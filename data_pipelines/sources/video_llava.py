"""Video-LLaVA's pre-training captions (Lin et al. 2023, PKU-YuanGroup/Video-LLaVA), for visual alignment.

    llava_image_.json  valley_.json            (or merged: valley_llavaimage.json), here or in train_json/; if both
                                               forms exist, each record is read once and a note names the source
    llava_image/...  valley/...                paths in the files start with these folders

Prompt and answer: dataset/pretrain_dataset.py. The first question and answer of a conversation are used.
"""

from __future__ import annotations

from collections.abc import Iterator

from crab_jax.tasks.placeholders import IMAGE, VIDEO
from data_pipelines.examples import Example
from data_pipelines.sources.release import Found, MissingFile, Release, Row, each

PARTS, MERGED = ("llava_image_.json", "valley_.json"), "valley_llavaimage.json"
CRAB = "valid_valley_.json"  # the released code's list of readable videos, in place of valley_.json
FILES = (*PARTS, MERGED)
SPEAKERS = (("human", "user"), ("gpt", "assistant"))  # speakers of the question, of the answer
_BLOCKS = {"image": IMAGE, "video": VIDEO}


def read(release: Release, split: str, variant: str) -> Iterator[Found]:
    """Yield Examples of task `avcap` without sound; meta: captions. There is only a train split and one prompt."""

    def examples(row: Row) -> Iterator[Example]:
        kind, path = _visual(row)
        question, answer = (_turn(row, number) for number in (0, 1))
        if not answer:
            raise row.error("conversations[1]", "is empty", "restore the record from the release")
        answer += "" if answer[-1] in ".!?" else "."
        number = row.values.get("id", row.place.rpartition(" ")[2])
        if not isinstance(number, str | int):
            raise row.error("id", f"is {number!r:.60}", "must be text or a whole number")
        yield Example(
            id=f"{kind}-{number}",
            task="avcap",
            windows="none",
            instruction=f"{_BLOCKS[kind]}Please answer the question:\n{question}",
            target=answer,
            image=path if kind == "image" else None,
            video=path if kind == "video" else None,
            meta={"captions": [answer], "row": row.place},
        )

    def _visual(row: Row) -> tuple[str, str]:
        kinds = [kind for kind in _BLOCKS if row.values.get(kind)]
        value = row.values.get(kinds[0]) if kinds else None
        path = value[0] if isinstance(value, list) and len(value) == 1 else value
        if len(kinds) != 1 or not isinstance(path, str):
            raise row.error(
                "image", "the record does not have exactly one image or video", "give one path in 'image' or in 'video'"
            )
        path = path if kinds[0] == "image" or "." in path.rpartition("/")[2] else f"{path}.mp4"  # as Valley's loader
        return kinds[0], release.inside(path, row.where, kinds[0])

    annotations = _files(release)
    if not annotations:
        raise MissingFile(
            str(release.base / FILES[0]),
            "",
            f"no such annotation file (nor {', '.join(FILES[1:])})",
            "copy the release's annotation files; docs/datasets.md shows the tree",
        )
    for name in annotations:
        yield from each(release.records(name), examples)


def _files(release: Release) -> list[str]:
    """Return the annotation files to read, so that no record is read twice; a note names those left out."""
    existing = {
        file: [name for name in (file, f"train_json/{file}") if (release.base / release.use(name)).is_file()]
        for file in (*FILES, CRAB)
    }
    complete = all(existing[file] or file == PARTS[1] and existing[CRAB] for file in PARTS)
    chosen = [MERGED] if existing[MERGED] and not complete else list(PARTS)
    if not existing[PARTS[1]] and chosen != [MERGED]:
        chosen[1] = CRAB
    read_files = [existing[file][0] for file in chosen if existing[file]]
    for name in (name for names in existing.values() for name in names if name not in read_files):
        release.note(
            str(release.base / name),
            "",
            f"is not read, because {' and '.join(read_files)} hold the same records",
            "remove the form that you do not want",
        )
    return read_files


def _turn(row: Row, number: int) -> str:
    """Return the text of one turn of the conversation, without newlines and the placeholder. Raises InputError.

    The placeholder may be first or last.
    """
    turns = row.values.get("conversations")
    turn = turns[number] if isinstance(turns, list) and len(turns) > number else None
    value = turn.get("value") if isinstance(turn, dict) else None
    if isinstance(turn, dict) and turn.get("from", SPEAKERS[number][0]) not in SPEAKERS[number]:
        raise row.error(
            f"conversations[{number}]",
            f"is said by {turn['from']!r:.40}",
            f"a question by {SPEAKERS[0][0]} and an answer by {SPEAKERS[1][0]} must come first",
        )
    if not isinstance(value, str):
        raise row.error(f"conversations[{number}]", "holds no text", "restore the record from the release")
    return " ".join(value.replace("<image>", " ").replace("<video>", " ").split())
