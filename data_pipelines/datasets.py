"""Every dataset by name, and the Examples of a data root, whatever it holds.

A data root holds a list of Examples, `<split>.jsonl`, or it is a raw root: original releases in folders of their names
(`DATASETS[name].folder`), any part of them. Either may be prepared (shards.py). docs/datasets.md shows the trees.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from crab_jax.errors import InputError
from data_pipelines import shards
from data_pipelines.examples import Example, choice
from data_pipelines.media import INLINE_MASK
from data_pipelines.sources import arig, audiocaps, ave, avqa, avsbench, avvp, lvis, own, ref_avs, valor, video_llava
from data_pipelines.sources.release import Found, MissingFile, Release

_log = logging.getLogger(__name__)
Reader = Callable[[Release, str, str], Iterator[Found]]  # (release, split, prompt variant)
VARIANTS = ("train", "test", "quick")
SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset: how it is read and where.

    folder: of the data root. sizes: split -> Examples of the complete release, None where that is not known.
    stage: "joint" for the tasks of the joint stage, which are read when no dataset is asked for; "pretrain"; "other"
    for another release of the same clips, and for the users' own data. shared: the release itself has clips in two
    splits.
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
    "ref_avs": Dataset("ref_avs", ref_avs.read, {
        "train": 141120, "val": 13490, "test": 49720, "test_s": 22880, "test_u": 16560, "test_n": 10280}),
    "valor": Dataset("valor", valor.read, {"train": 25327, "val": 3500, "test": 3491}),
    "video_llava": Dataset("video_llava", video_llava.read, {"train": None}, "pretrain"),
    "audiocaps": Dataset("audiocaps", audiocaps.read, {"train": 49838, "val": 495, "test": 975}, "pretrain"),
    "lvis": Dataset("lvis", lvis.read, {"train": None, "val": None}, "pretrain"),
    "avqa_original": Dataset("music_avqa", functools.partial(avqa.read, annotations="json"),
                             {"train": 32087, "val": 4595, "test": 9185}, "other", shared=True),
    "s4_object": _object("s4", train=3452, val=3700, test=3700),
    "ms3_object": _object("ms3", train=1480, val=320, test=320),
    "arig_object": Dataset("avsbench_object", functools.partial(arig.read, part="object"),
                           {"train": None, "val": None, "test": 3694}, "other"),
    "own": Dataset("own", own.read, _ANY, "other"),
}
PREPARED = "prepared"  # the name of what `<split>.jsonl` in the data root itself holds
_PREPARED = Dataset("", own.read, _ANY, "other")


def dataset_of(name: str) -> Dataset:
    """The dataset of a name, PREPARED too."""
    return _PREPARED if name == PREPARED else DATASETS[name]


def selection(root: str | Path, names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(name, split) of all that a data root may hold, or of the datasets `names`: the `<split>.jsonl` that are there,
    which then is all that is read, or each split of each dataset. Raises InputError."""
    if not Path(root).is_dir():
        raise InputError(str(root), "--root", "is no folder", "give the folder that holds the datasets")
    if lists := [split for split in SPLITS if (Path(root) / f"{split}.jsonl").is_file()]:
        return [(PREPARED, split) for split in lists]
    parts, prepared = ("test_s", "test_u", "test_n"), shards.opened(root)  # parts of test
    return [(name, split) for name in (choose(root, names) if names else DATASETS)
            for split in DATASETS[name].sizes if split not in parts and (not prepared or prepared.has(name, split))]


def is_there(root: str | Path, name: str) -> bool:
    """Whether a data root holds anything of a dataset."""
    prepared = shards.opened(root)
    return prepared.has(name) if prepared and name != PREPARED else (Path(root) / dataset_of(name).folder).is_dir()


def choose(root: str | Path, names: Sequence[str] = (), split: str | None = None) -> list[str]:
    """The datasets `names`, or without any those of the joint stage whose folder is in `root` and which have `split`.

    Raises InputError for an unknown name, and when nothing is left.
    """
    if unknown := [name for name in names if name not in DATASETS]:
        raise InputError("datasets", unknown[0], "unknown dataset", f"use some of {','.join(DATASETS)}")
    found = [name for name in names or DATASETS if split is None or split in DATASETS[name].sizes]
    if not names:
        found = [name for name in found
                 if DATASETS[name].stage == "joint" and is_there(root, name)]
    if not found:
        folders = ", ".join(dict.fromkeys(d.folder for d in DATASETS.values() if d.stage == "joint"))
        problem = f"no dataset has a split {split!r}" if names else f"holds no dataset with a split {split!r}"
        fix = f"put releases into folders named {folders}; docs/datasets.md shows the trees"
        raise InputError(str(root), "datasets", problem, fix)
    return found


def media_of(example: Example) -> Iterator[tuple[str, str]]:
    """(field, path) of every media file of an Example."""
    for field in ("video", "image", "audio", "seg_image", "mask"):
        if (path := getattr(example, field)) and not path.startswith(INLINE_MASK):
            yield field, path
    yield from (("frames", path) for path in example.frames)


def records(root: str | Path, name: str, split: str, variant: str = "train") -> Iterator[Found]:
    """Everything that the annotations of a split hold: Examples whose media files are there, and what is wrong instead.

    Ids start with the dataset's name and are unique in the split. meta gets `dataset`, and `row` names the line of the
    annotation file. Raises InputError when the annotations as a whole cannot be read.
    """
    dataset = dataset_of(name)
    if variant not in VARIANTS:
        raise InputError("datasets", "variant", f"unknown value {variant!r}", f"use one of {', '.join(VARIANTS)}")
    if split not in dataset.sizes:
        fix = f"use one of {', '.join(dataset.sizes)}"
        raise InputError(f"dataset {name}", "split", f"has no split {split!r}", fix)
    prepared = shards.opened(root)
    if prepared and name != PREPARED:
        yield from prepared.records(name, split, variant)
        return
    release, seen = Release(root, dataset.folder), set()
    for found in dataset.read(release, split, variant):
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


def read(root: str | Path, name: str, split: str, variant: str = "train", missing: str = "raise") -> list[Example]:
    """The Examples of one split of one dataset, in the order of its annotations.

    missing: "raise" stops at the first file that is not there; "skip" leaves out what needs one, and logs how many.
    Raises InputError for anything else that is wrong with a row, and when nothing is left.
    """
    if missing not in ("raise", "skip"):
        raise InputError("datasets", "missing", f"unknown value {missing!r}", "use raise or skip")
    examples: list[Example] = []
    absent: list[MissingFile] = []
    for found in records(root, name, split, variant):
        if isinstance(found, Example):
            examples.append(found)
        elif isinstance(found, MissingFile) and missing == "skip":
            absent.append(found)
        else:
            raise found
    if absent:
        _log.warning("%s %s: %d of %d examples are left out because files are missing, the first: %s",
                     name, split, len(absent), len(absent) + len(examples), absent[0])
    if not examples and absent:
        raise absent[0]
    return examples


def read_examples(root: str | Path, split: str, datasets: Sequence[str] = (), variant: str = "train",
                  frames: str | None = None, missing: str = "raise", seed: int = 0,
                  epoch: int | None = 0) -> list[Example]:
    """The Examples of one split of a data root: those of `<split>.jsonl` as they are, or of the datasets of a raw root.

    The options are about a raw root.
    datasets: names from DATASETS; none = those of the joint stage that are there. variant: which prompt of a task.
    frames: "all" pictures of a clip of AVSS and Ref-AVS are asked about, or "one" in an epoch (the default for train):
        the same for every process, drawn from (seed, epoch, clip). With epoch None they are all returned, marked by
        meta's `one_of`, and the training mixture draws one of each mark anew in every epoch.
    missing: "raise", or "skip" to leave out what a partial copy lacks, with a warning.

    Examples without a target (weak labels, see avvp.py) are left out of train, with a warning. Raises InputError.
    """
    frames = frames or ("one" if split == "train" else "all")
    if frames not in ("one", "all"):
        raise InputError("datasets", "frames", f"unknown value {frames!r}", "use one or all")
    if (Path(root) / f"{split}.jsonl").is_file():
        return read_jsonl(root, split)
    if not any(is_there(root, name) for name in DATASETS):
        raise InputError(str(Path(root) / f"{split}.jsonl"), "", "no such file, and the folder holds no dataset either",
                         "check --data and the split name")
    examples: list[Example] = []
    for name in choose(root, datasets, split):
        try:
            examples += read(root, name, split, variant, missing)
        except MissingFile as error:
            if datasets or missing == "raise":
                raise
            _log.warning("%s %s is left out: %s", name, split, error)
    if split == "train" and (without := Counter(e.meta["dataset"] for e in examples if not e.target)):
        _log.warning("left out of train, because their annotations give no answer to learn: %s", dict(without))
        examples = [example for example in examples if example.target]
    if not examples:
        raise InputError(str(root), "datasets", f"no example of {split!r} is left", "see the warnings above")
    if frames == "all":
        return [_without_mark(example) for example in examples]
    return examples if epoch is None else one_frame_each(examples, seed, epoch)


def read_jsonl(root: str | Path, split: str) -> list[Example]:
    """The Examples of `<split>.jsonl`. Their media are looked for when they are loaded, not here."""
    release, examples, seen = Release(root), [], set()
    for found in own.read(release, split, "train"):
        if isinstance(found, InputError):
            raise found
        if found.id in seen:
            raise InputError(str(release.base / found.meta["row"]), "id", f"duplicate id {found.id!r}",
                             "ids must be unique in a file")
        seen.add(found.id)
        examples.append(dataclasses.replace(found, meta={k: v for k, v in found.meta.items() if k != "row"}))
    return examples


def one_frame_each(examples: Iterable[Example], seed: int, epoch: int) -> list[Example]:
    """One Example of each mark `one_of`; unmarked ones stay."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.meta.get("one_of", f"id {example.id}"), []).append(example)
    return [_without_mark(group[choice(mark, len(group), seed, epoch)]) for mark, group in groups.items()]


def _without_mark(example: Example) -> Example:
    if "one_of" not in example.meta:
        return example
    return dataclasses.replace(example, meta={k: v for k, v in example.meta.items() if k != "one_of"})
