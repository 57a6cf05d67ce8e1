"""All datasets by name, and the Examples of any data root.

A data root holds a list of Examples, `<split>.jsonl`, or it is a raw root: original releases in folders of their names
(`DATASETS[name].folder`), any part of them. Either may be prepared (shards.py). docs/datasets.md shows the trees.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from crab_jax.io import paths
from crab_jax.io.errors import InputError, printable
from data_pipelines import shards
from data_pipelines.examples import Example, choice
from data_pipelines.media import INLINE_MASK
from data_pipelines.sources import arig, audiocaps, ave, avqa, avsbench, avvp, lvis, own, ref_avs, valor, video_llava
from data_pipelines.sources.release import Found, MissingFile, Release

_log = logging.getLogger(__name__)
Reader = Callable[[Release, str, str], Iterator[Found]]  # (release, split, prompt variant)
Used = dict[str, tuple[int, int] | None]  # `Release.used`: relative to the dataset's folder
VARIANTS = ("train", "test", "quick")
SPLITS = ("train", "val", "test")
SHOWN = 3  # number of malformed rows that a warning lists


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset: its reader and its place in a data root.

    folder: in the data root; `folder_of` also knows its name in Crab's tree. sizes: {split: number of Examples of the
    complete release, None where unknown}. stage: "joint" for the tasks of the joint stage, which are read by default;
    "pretrain"; "other" for another release of the same clips, and for the users' own data. shared: the release itself
    has clips in two splits.
    """

    folder: str
    read: Reader
    sizes: Mapping[str, int | None]
    stage: str = "joint"
    shared: bool = False


def _semantic(task: str, **sizes: int | None) -> Dataset:
    return Dataset("avsbench_semantic", functools.partial(avsbench.read, task=task), sizes)


def _object(task: str, **sizes: int | None) -> Dataset:
    return Dataset("avsbench_object", functools.partial(avsbench.read_object, task=task), sizes, "other")


_ANY: dict[str, int | None] = dict.fromkeys(SPLITS)
DATASETS: dict[str, Dataset] = {
    "ave": Dataset("ave", ave.read, {"train": 3339, "val": 402, "test": 402}, shared=True),
    "avvp": Dataset("llp", avvp.read, {"train": 10000, "val": 649, "test": 1200}),
    "avqa": Dataset("music_avqa", avqa.read, {"train": 31927, "val": 4568, "test": 9129}, shared=True),
    "arig": Dataset("avsbench_semantic", arig.read, _ANY),
    "s4": _semantic("s4", train=3452, val=3700, test=3700),
    "ms3": _semantic("ms3", train=1480, val=320, test=320),
    "avss": _semantic("avss", train=47500, val=None, test=None),
    "ref_avs": Dataset(
        "ref_avs",
        ref_avs.read,
        {"train": 141120, "val": 13490, "test": 49720, "test_s": 22880, "test_u": 16560, "test_n": 10280},
    ),
    "valor": Dataset("valor", valor.read, {"train": 25327, "val": 3500, "test": 3491}),
    "video_llava": Dataset("video_llava", video_llava.read, {"train": None}, "pretrain"),
    "audiocaps": Dataset("audiocaps", audiocaps.read, {"train": 49838, "val": 495, "test": 975}, "pretrain"),
    "lvis": Dataset("lvis", lvis.read, {"train": None, "val": None}, "pretrain"),
    "avqa_original": Dataset(
        "music_avqa",
        functools.partial(avqa.read, annotations="json"),
        {"train": 32087, "val": 4595, "test": 9185},
        "other",
        shared=True,
    ),
    "s4_object": _object("s4", train=3452, val=3700, test=3700),
    "ms3_object": _object("ms3", train=1480, val=320, test=320),
    "arig_object": Dataset(
        "avsbench_object",
        functools.partial(arig.read, part="object"),
        {"train": None, "val": None, "test": 3694},
        "other",
    ),
    "own": Dataset("own", own.read, _ANY, "other"),
}
# Folders of Crab's own tree (and of the zip of AVE) that stand for a dataset's folder.
_ELSEWHERE = {
    "ave": ("ave/AVE_Dataset", "AVE_Dataset"),
    "llp": ("avvp",),
    "music_avqa": ("music-avqa",),
    "avsbench_semantic": ("AVS",),
    "ref_avs": ("ref_avs/REFAVS", "ref-avs/REFAVS", "REFAVS"),
    "audiocaps": ("AudioCaps",),
    "lvis": ("LVIS",),
}
PREPARED = "prepared"  # the dataset name of a `<split>.jsonl` in the data root itself
_PREPARED = Dataset("", own.read, _ANY, "other")


def dataset_of(name: str) -> Dataset:
    """Return the dataset of a name, including PREPARED."""
    return _PREPARED if name == PREPARED else DATASETS[name]


def folder_of(root: str | Path, name: str) -> str:
    """Return the folder of a dataset in a data root: `Dataset.folder`, or the folder of Crab's tree if that is missing.

    The folder of Crab's tree is also used if `Dataset.folder` contains nothing else.
    """
    base, folder = paths.at(root), dataset_of(name).folder
    for other in _ELSEWHERE.get(folder, ()):
        inside = other.startswith(f"{folder}/")
        if (base / other).is_dir() and (
            not (base / folder).exists()
            or inside
            and [path.name for path in (base / folder).iterdir() if path.is_dir()] == [other.rpartition("/")[2]]
        ):
            return other
    return folder


def list_of(root: str | Path, split: str) -> str | None:
    """Return the file of a data root that lists the Examples of a split, or None; it excludes all datasets.

    The list is `<split>.jsonl`, or, for test in a folder without datasets, `samples.json` (own.py).
    """
    base = paths.at(root)
    if (base / f"{split}.jsonl").is_file():
        return f"{split}.jsonl"
    alone = split == "test" and (base / own.SAMPLES).is_file() and not (base / shards.MANIFEST).exists()
    return own.SAMPLES if alone and not any(is_there(root, name) for name in DATASETS) else None


def selection(root: str | Path, names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return the (name, split) pairs that a data root may hold, or those of the datasets `names`.

    These are the existing `<split>.jsonl`, which exclude all datasets, or each split of each dataset. Raises
    InputError.
    """
    if not paths.at(root).is_dir():
        raise InputError(str(root), "--root", "is no folder", "give the folder that holds the datasets")
    if lists := [split for split in SPLITS if list_of(root, split)]:
        return [(PREPARED, split) for split in lists]
    parts, prepared = ("test_s", "test_u", "test_n"), shards.opened(root)  # subsets of test
    return [
        (name, split)
        for name in (choose(root, names) if names else DATASETS)
        for split in DATASETS[name].sizes
        if split not in parts and (not prepared or prepared.has(name, split))
    ]


def is_there(root: str | Path, name: str) -> bool:
    """Return whether a data root holds anything of a dataset."""
    prepared = shards.opened(root)
    return prepared.has(name) if prepared and name != PREPARED else (paths.at(root) / folder_of(root, name)).is_dir()


def choose(root: str | Path, names: Sequence[str] = (), split: str | None = None) -> list[str]:
    """Return the datasets `names`, or by default those of the joint stage with a folder in `root` that have `split`.

    Raises InputError for an unknown name, and when nothing is left.
    """
    if unknown := [name for name in names if name not in DATASETS]:
        raise InputError("datasets", unknown[0], "unknown dataset", f"use some of {','.join(DATASETS)}")
    chosen = [name for name in names or DATASETS if split is None or split in DATASETS[name].sizes]
    if not names:
        chosen = [name for name in chosen if DATASETS[name].stage == "joint" and is_there(root, name)]
    if not chosen:
        folders = ", ".join(dict.fromkeys(d.folder for d in DATASETS.values() if d.stage == "joint"))
        problem = f"no dataset has a split {split!r}" if names else f"holds no dataset with a split {split!r}"
        fix = f"put releases into folders named {folders}; docs/datasets.md shows the trees"
        raise InputError(str(root), "datasets", problem, fix)
    return chosen


def media_of(example: Example) -> Iterator[tuple[str, str]]:
    """Yield (field, path) of every media file of an Example."""
    for field in ("video", "image", "audio", "seg_image", "mask"):
        if (path := getattr(example, field)) and not path.startswith(INLINE_MASK):
            yield field, path
    yield from (("frames", path) for path in example.frames)


def annotated(
    root: str | Path, name: str, split: str, variant: str = "", used: Used | None = None
) -> tuple[Release, Iterator[Found]]:
    """Return (release, Examples and errors of a split's annotations), without checks of media or ids.

    The notes of the release fill while it is read. variant "": any that exists. used: see `records`. Raises InputError,
    as does reading.
    """
    prepared = shards.opened(root)
    release = Release(root, folder_of(root, name), used)
    if prepared and name != PREPARED:
        return release, prepared.records(name, split, variant or prepared.manifest["variants"][0])
    return release, dataset_of(name).read(release, split, variant or VARIANTS[0])


def records(
    root: str | Path,
    name: str,
    split: str,
    variant: str = "train",
    notes: list[InputError] | None = None,
    used: Used | None = None,
) -> Iterator[Found]:
    """Yield the content of a split's annotations: Examples whose media files exist, and errors for the others.

    Ids start with the dataset's name and are unique in the split. meta gets `dataset`, and `row` names the line of the
    annotation file. notes: collects remarks on the annotations of a raw root. used: collects the files and folders of a
    raw root on which the Examples depend. Raises InputError when the annotations as a whole cannot be read.
    """
    dataset = dataset_of(name)
    if variant not in VARIANTS:
        raise InputError("datasets", "variant", f"unknown value {variant!r}", f"use one of {', '.join(VARIANTS)}")
    if split not in dataset.sizes:
        fix = f"use one of {', '.join(dataset.sizes)}"
        raise InputError(f"dataset {name}", "split", f"has no split {split!r}", fix)
    prepared = shards.opened(root)
    release, every = annotated(root, name, split, variant, used)
    if prepared and name != PREPARED:
        yield from every
        return
    release.notes = release.notes if notes is None else notes
    seen, count = set(), 0
    for found in every:
        count += 1
        if isinstance(found, InputError):
            yield found
            continue
        where = str(release.base / found.meta["row"])
        try:
            if found.id in seen:
                raise InputError(where, "id", f"duplicate id {found.id!r}", "keep one of the rows")
            seen.add(found.id)
            for field, path in media_of(found) if not prepared else ():
                release.check(path, where, field)
        except InputError as error:
            yield error
            continue
        if name == PREPARED:
            yield found
            continue
        named = found.id if name == "own" else f"{name}-{found.id}"
        mark = {"one_of": f"{name}-{found.meta['one_of']}"} if "one_of" in found.meta else {}
        yield dataclasses.replace(found, id=named, meta={**found.meta, "dataset": name, **mark})
    for place in dict.fromkeys(release.unended) if count < (dataset.sizes[split] or 0) else ():
        release.note(
            str(release.base / place),
            "",
            "the last line has no line end, and the release has more rows: if "
            "the copy was cut off there, this row is incomplete",
        )


class LeftOut(NamedTuple):
    """A row that is not read, and the reason."""

    dataset: str
    split: str
    error: InputError


def read(
    root: str | Path,
    name: str,
    split: str,
    variant: str = "train",
    missing: str = "raise",
    malformed: str = "raise",
    left: list[LeftOut] | None = None,
) -> list[Example]:
    """Return the Examples of one split of one dataset, in the order of its annotations.

    missing: "raise" stops at the first missing file; "skip" leaves out Examples with missing files, and logs how many.
    malformed: the same for any other fault of a row. left: collects everything left out. Raises InputError for
    annotations that cannot be read as a whole, and when nothing is left.
    """
    for field, value in (("missing", missing), ("malformed", malformed)):
        if value not in ("raise", "skip"):
            raise InputError("datasets", field, f"unknown value {value!r}", "use raise or skip")
    examples: list[Example] = []
    notes: list[InputError] = []
    errors = allowed(_kept(records(root, name, split, variant, notes), examples), missing, malformed)
    report_left_out(name, split, len(examples), errors, notes, left)
    return examples


def _kept(every: Iterable[Found], examples: list[Example]) -> Iterator[InputError]:
    """Append the Examples of `every` to `examples`, and yield the errors."""
    for found in every:
        if isinstance(found, Example):
            examples.append(found)
        else:
            yield found


def allowed(errors: Iterable[InputError], missing: str, malformed: str) -> list[InputError]:
    """Return the errors of rows that are left out. Raises the first that may not be (see `read`)."""
    kept = []
    for error in errors:
        if (missing if isinstance(error, MissingFile) else malformed) != "skip":
            raise error
        kept.append(error)
    return kept


def report_left_out(
    name: str,
    split: str,
    count: int,
    errors: Sequence[InputError],
    notes: Sequence[InputError],
    left: list[LeftOut] | None,
) -> None:
    """Log what `read` leaves out of a split beside `count` Examples. Raises the first error when there are none."""
    absent = [error for error in errors if isinstance(error, MissingFile) and name != PREPARED]
    wrong = [error for error in errors if not isinstance(error, MissingFile) or name == PREPARED]
    if notes:
        _log.warning(
            "%s %s: %d notes on the annotations, which `status` lists; the first: %s %s",
            name,
            split,
            len(notes),
            printable(notes[0].where),
            printable(notes[0].problem),
        )
    if absent:
        _log.warning(
            "%s %s: %d of %d examples are left out because files are missing, the first: %s",
            name,
            split,
            len(absent),
            len(errors) + count,
            absent[0],
        )
    _say_malformed(name if name != PREPARED else split, split if name != PREPARED else "list", wrong)
    if left is not None:
        left += [LeftOut(name, split, error) for error in (*absent, *wrong)]
    if not count and errors:
        raise (absent or wrong)[0]


def _say_malformed(name: str, split: str, wrong: Sequence[InputError]) -> None:
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if wrong[SHOWN:] else ""
        _log.warning(
            "%s %s: %d malformed rows are left out: %s%s",
            name,
            split,
            len(wrong),
            "; ".join(map(str, wrong[:SHOWN])),
            more,
        )


def read_examples(
    root: str | Path,
    split: str,
    datasets: Sequence[str] = (),
    variant: str = "train",
    frames: str | None = None,
    missing: str = "raise",
    seed: int = 0,
    epoch: int | None = 0,
    malformed: str = "raise",
    left: list[LeftOut] | None = None,
) -> list[Example]:
    """Return the Examples of one split of a data root: those of `<split>.jsonl`, or of the datasets of a raw root.

    split: several joined by `+` (train+val) give the Examples of each, one after the other. datasets: names from
    DATASETS; none = those of the joint stage that exist. variant: of the prompts. Both concern raw roots only. frames:
    "all" frames of a clip of AVSS and Ref-AVS (Examples with the same `one_of` in their meta), or "one" per epoch, the
    same for every process, drawn from (seed, epoch, clip). With epoch None all are returned with their mark `one_of`,
    and the training mixture draws one of each mark in every epoch. The default is "one" for train and "all" for the
    others; a `<split>.jsonl` is then returned unchanged. missing: "raise", or "skip" to leave out what a partial copy
    lacks, with a warning. malformed: the same for rows that cannot be read. left: collects everything left out for
    either reason.

    Examples without a target (weak labels, see avvp.py) are left out of train, with a warning. Raises InputError.
    """
    if frames not in (None, "one", "all"):
        raise InputError("datasets", "frames", f"unknown value {frames!r}", "use one or all")
    if "+" in split:
        splits = list(dict.fromkeys(split.split("+")))
        frames = frames or ("one" if "train" in splits else "all")
        return joined(
            splits,
            [
                read_examples(root, part, datasets, variant, frames, missing, seed, epoch, malformed, left)
                for part in splits
            ],
        )
    if list_of(root, split):
        listed = read_jsonl(root, split, malformed, left)
        warn_of_list(root, split, datasets, variant, {example.meta.get("dataset") for example in listed})
        return listed if frames is None else _of_epoch(listed, frames, seed, epoch)
    frames = frames or ("one" if split == "train" else "all")
    if not any(is_there(root, name) for name in DATASETS):
        raise InputError(
            str(paths.at(root) / f"{split}.jsonl"),
            "",
            "no such file, and the folder holds no dataset either",
            "check --data and the split name",
        )
    examples: list[Example] = []
    for name in choose(root, datasets, split):
        try:
            examples += read(root, name, split, variant, missing, malformed, left)
        except MissingFile as error:
            if datasets or missing == "raise":
                raise
            warn_absent(name, split, error)
    if split == "train" and (without := Counter(e.meta["dataset"] for e in examples if not e.target)):
        warn_without_answer(without)
        examples = [example for example in examples if example.target]
    if not examples:
        raise nothing_left(root, split)
    return _of_epoch(examples, frames, seed, epoch)


def warn_of_list(root: str | Path, split: str, names: Sequence[str], variant: str, held: Set[str | None]) -> None:
    """Warn of options without effect on the list of a split, whose Examples are of the datasets `held`."""
    options = ("datasets", ",".join(names)), ("variant", variant if variant != "train" else "")
    for name, value in options if held - set(names) else ():
        if value:
            _log.warning(
                "%s is a list of Examples, which is read whole and as it stands: %s=%s has no effect",
                paths.at(root) / f"{split}.jsonl",
                name,
                value,
            )


def warn_without_answer(counts: Mapping[str, int]) -> None:
    """Warn of Examples of train that have no target, by dataset."""
    _log.warning("left out of train, because their annotations give no answer to learn: %s", dict(counts))


def nothing_left(root: str | Path, split: str) -> InputError:
    """Return the error of a split of which no Example is left."""
    return InputError(str(root), "datasets", f"no example of {split!r} is left", "see the warnings above")


def warn_absent(name: str, split: str, error: MissingFile) -> None:
    """Warn of a dataset that is not read because its annotations are not there."""
    _log.warning("%s %s is left out: %s", name, split, error)


def joined(splits: Sequence[str], parts: Sequence[list[Example]]) -> list[Example]:
    """Return the Examples of several splits as one list. Raises InputError for duplicate ids.

    An id that an earlier split has gets the split as prefix, and so does every mark `one_of`, which may denote another
    clip in each split.
    """
    by_id: dict[str, Example] = {}
    for split, part in zip(splits, parts, strict=True):
        for example in part:
            mark = {"one_of": f"{split} {example.meta['one_of']}"} if "one_of" in example.meta else {}
            named = f"{split}/{example.id}" if example.id in by_id else example.id
            if named in by_id:
                raise InputError(split, "id", f"duplicate id {named!r}", "ids must be unique in the joined splits")
            by_id[named] = dataclasses.replace(example, id=named, meta={**example.meta, **mark})
    return list(by_id.values())


def _of_epoch(examples: list[Example], frames: str, seed: int, epoch: int | None) -> list[Example]:
    """Return all Examples without their marks, or the marked ones of which an epoch takes one (see `read_examples`)."""
    if frames == "all":
        return [_without_mark(example) for example in examples]
    return examples if epoch is None else one_frame_each(examples, seed, epoch)


def read_jsonl(
    root: str | Path, split: str, malformed: str = "raise", left: list[LeftOut] | None = None
) -> list[Example]:
    """Return the Examples of the list of a split (`list_of`), without looking for their media files.

    malformed: "raise", or "skip" to leave out lines that cannot be read, with a warning; `left` collects them.
    """
    examples: list[Example] = []
    errors = allowed(_kept(listed(root, split), examples), malformed, malformed)
    report_left_out(PREPARED, split, len(examples), errors, (), left)
    return examples


def listed(root: str | Path, split: str, used: Used | None = None) -> Iterator[Found]:
    """Yield the Examples of the list of a split, and errors for its other lines; `used` as in `records`."""
    if prepared := shards.opened(root):
        prepared.check_file(f"{split}.jsonl")
    release, seen = Release(root, used=used), set()
    for found in own.read(release, split, "train"):
        if isinstance(found, Example) and found.id in seen:
            found = InputError(
                str(release.base / found.meta["row"]),
                "id",
                f"duplicate id {found.id!r}",
                "ids must be unique in a file",
            )
        if isinstance(found, Example):
            seen.add(found.id)
            found = dataclasses.replace(found, meta={k: v for k, v in found.meta.items() if k != "row"})
        yield found


def one_frame_each(examples: Iterable[Example], seed: int, epoch: int) -> list[Example]:
    """Return one Example of each mark `one_of`, and all unmarked ones."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.meta.get("one_of", f"id {example.id}"), []).append(example)
    return [_without_mark(group[choice(mark, len(group), seed, epoch)]) for mark, group in groups.items()]


def _without_mark(example: Example) -> Example:
    if "one_of" not in example.meta:
        return example
    return dataclasses.replace(example, meta={k: v for k, v in example.meta.items() if k != "one_of"})
