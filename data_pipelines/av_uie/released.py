"""Reader of the labels that AV-UIE published: `<name>_converted_label.zip` with one text file per clip or question.

    zip          file inside                          text
    ave          converted_label/<VideoID>.txt        ends in `<event> X </event>, ... <range> s,e </range>.`
    avvp         converted_label/<VideoID>.txt        `<visual>X,(s e),(s e)</visual>` and `<audio>X,(s e)</audio>`
    music_avqa   converted_label/<question_id>.txt    ends in `<answer> x </answer>.`
    arig, AVS    not documented                       the released code never reads them

A folder with the same layout (an unpacked zip) is read too. Texts may have no tag of a kind, or several; verify.py, not
the reader, checks whether a text agrees with its label.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from crab_jax.io import paths
from crab_jax.io.errors import InputError
from crab_jax.io.structured import read_bytes, refuse_special
from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import MASK
from data_pipelines.av_uie import labels
from data_pipelines.av_uie.verify import RELEASED
from data_pipelines.examples import Example

ZIPS = {"ave": ("ave",), "avvp": ("avvp",), "music_avqa": ("avqa",), "arig": ("arig",), "AVS": ("s4", "ms3", "avss")}
SUFFIX = "_converted_label"
_DOCUMENTED = ("ave", "avvp", "music_avqa")
_LARGEST = 100_000  # bytes of one text; released texts have a few hundred
_IN_ZIP64 = 0xFFFF  # number of files that means "see the ZIP64 record"
_LARGEST_ZIP, _UNPACKED, _MEMBERS = (
    2**27,
    2**30,
    10**6,
)  # limits: bytes of a zip, bytes of all its texts, number of texts
_SHOWN = 5  # number of problems listed in an error


class Labels(NamedTuple):
    """The texts of one zip by file stem, and the problems of files that are left out."""

    name: str
    texts: dict[str, str]
    problems: list[str]


class Attached(NamedTuple):
    """Examples with released targets, ids of those without one, and stems of labels that belong to no Example."""

    examples: list[Example]
    without: list[str]
    unused: list[str]


def read(path: str | Path, name: str = "", strict: bool = True) -> Labels:
    """Return the texts of a released zip, or of an unpacked one; `name` (default: the file's own) is a key of ZIPS.

    Raises InputError listing the files and problems, for a zip that is damaged or is not one of the five, and for a
    file in it that is misplaced, too large, encrypted, given twice, empty or not UTF-8. With strict=False such files
    are left out and listed in `problems`.
    """
    path = paths.at(path)
    name = name or path.name.removesuffix(".zip").removesuffix(SUFFIX)
    if name not in ZIPS:
        raise InputError(
            str(path),
            "",
            f"{name!r} is none of the released labels",
            f"use <name>{SUFFIX}.zip, or say NAME=PATH, with a name of {', '.join(ZIPS)}",
        )
    texts: dict[str, str] = {}
    problems = []
    for entry, content in _files(path):
        problem = _misplaced(name, entry) or (content if isinstance(content, str) else None)
        stem = PurePosixPath(entry).stem
        text = ""
        if not problem and isinstance(content, bytes):
            try:
                text = content.decode("utf-8-sig").replace("\r\n", "\n").strip()
            except UnicodeDecodeError as error:
                problem = f"is not UTF-8 at byte {error.start}"
            else:
                problem = (
                    "is empty"
                    if not text
                    else "holds zeros"
                    if "\0" in text
                    else "is there twice"
                    if stem in texts
                    else None
                )
        if problem:
            problems.append(f"{entry} {problem}")
        else:
            texts[stem] = text
    if problems and strict:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            str(path),
            "",
            "; ".join(problems[:_SHOWN]) + more,
            "download it again, or leave these files out with --skip-bad",
        )
    if not texts:
        raise InputError(str(path), "", "holds no labels", "download it again")
    return Labels(name, texts, problems)


def _misplaced(name: str, entry: str) -> str | None:
    place = PurePosixPath(entry)
    if place.is_absolute() or ".." in place.parts or "\\" in entry:
        return "has a path that leaves the archive"
    if place.suffix != ".txt":
        return "is no .txt file"
    if name in _DOCUMENTED and place.parent.name != "converted_label":
        return "is not in converted_label/"
    return None


def _files(path: Path) -> Iterator[tuple[str, bytes | str]]:
    """Yield (name, content or problem) of every file of a zip or folder, without files of macOS."""
    if path.is_dir():
        above = path.parent if path.name == "converted_label" else path
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            entry = file.relative_to(above).as_posix()
            if not _of_macos(entry):
                if not paths.real(file).startswith(f"{paths.real(path)}/"):
                    yield entry, "is a link out of the folder"
                else:
                    yield entry, read_bytes(file) if file.stat().st_size <= _LARGEST else "is too large for a label"
        return
    if not path.exists():
        raise InputError(str(path), "", "no such file", "give the released zip, or its unpacked folder")
    refuse_special(path, "", _LARGEST_ZIP, "give the released zip, or its unpacked folder")
    copy = paths.local(path)
    try:
        with zipfile.ZipFile(copy) as archive:
            infos = archive.infolist()
            if len(infos) > _MEMBERS or sum(info.file_size for info in infos) > _UNPACKED:
                raise InputError(
                    str(path),
                    "",
                    f"holds {len(infos):,} files, or more than {_UNPACKED:,} bytes in all",
                    "download it again",
                )
            if (stated := _stated(copy)) not in (len(infos), _IN_ZIP64):  # Python reads only the files in the index
                raise InputError(
                    str(path), "", f"lists {len(infos):,} of {stated:,} files; it is damaged", "download it again"
                )
            for info in infos:
                if info.is_dir() or _of_macos(info.filename):
                    continue
                if info.flag_bits & 1 or info.file_size > _LARGEST:
                    yield info.filename, "is encrypted" if info.flag_bits & 1 else "is too large for a label"
                else:
                    yield info.filename, archive.read(info)
    except InputError:
        raise
    except (zipfile.BadZipFile, RuntimeError, zlib.error, OSError, EOFError, NotImplementedError, ValueError) as error:
        raise InputError(str(path), "", f"cannot be read as a zip ({error})", "download it again") from None


def _stated(path: Path) -> int:
    """Return the number of files stated in the end record of a zip."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 22 - 0xFFFF))  # the longest possible comment
        end = file.read()
    return int.from_bytes(end[(at := end.rfind(b"PK\5\6")) + 10 : at + 12], "little")


def _of_macos(entry: str) -> bool:
    return entry.startswith("__MACOSX/") or PurePosixPath(entry).name in (".DS_Store", "Thumbs.db")


# Possible file stems of an Example's label, the likeliest first. AVE and LLP files are named by the video; the names of
# arig and AVS are unknown, so every id that their release has for a frame is tried.


def _video_keys(example: Example) -> list[str]:
    return [
        PurePosixPath(example.video).stem if example.video else "",
        str(example.meta.get("filename", "")),
        example.id,
    ]


def _question_keys(example: Example) -> list[str]:
    """Return question_id, or the end of an id such as `avqa-train-4639`."""
    return [str(example.meta.get("question_id", "")), example.id.rpartition("-")[2], example.id]


def _frame_keys(example: Example) -> list[str]:
    clip = PurePosixPath(str(example.meta.get("video", ""))).name
    return [f"{clip}_{example.second}", clip, example.id]


KEYS: dict[str, Callable[[Example], list[str]]] = {
    "ave": _video_keys,
    "avvp": _video_keys,
    "music_avqa": _question_keys,
    "arig": _frame_keys,
    "AVS": _frame_keys,
}


def target(example: Example, text: str) -> str:
    """Return a released text as a training target.

    AVVP's `<audio>` and `<visual>` become `<audio_event>` and `<visual_event>`, as the released training code does:
    `<audio>` is a placeholder token. A grounding or segmentation text without a readable answer (or without mask
    tokens) is reasoning, and the answer of the label is appended.
    """
    task = TASKS[example.task]
    if "audio_event" in (task.tags or ()):
        return re.sub(r"<(/?)(audio|visual)>", r"<\1\2_event>", text)
    if (
        task.about_picture
        and not labels.weak(example)
        and (task.parse(text) is None or (task.mask_kind != "none" and MASK not in text))
    ):
        return labels.with_reasoning(example, text, RELEASED).target
    return text


def attach(
    examples: Sequence[Example], found: Labels, keys: Mapping[str, Callable[[Example], list[str]]] = KEYS
) -> Attached:
    """Attach released targets to the Examples of the zip's tasks; Examples of other tasks are left out.

    keys: functions from an Example to its possible file stems, by zip. Two rows of AVE about one video share its file;
    the row of the other event disagrees with it, which verify.py reports.
    """
    taken: set[str] = set()
    attached, without = [], []
    for example in examples:
        if example.task not in ZIPS[found.name]:
            continue
        key = next((key for key in keys[found.name](example) if key in found.texts), None)
        if key is None:
            without.append(example.id)
            continue
        taken.add(key)
        attached.append(
            dataclasses.replace(
                example, target=target(example, found.texts[key]), meta={**example.meta, "reasoning": RELEASED}
            )
        )
    return Attached(attached, without, sorted(found.texts.keys() - taken))
