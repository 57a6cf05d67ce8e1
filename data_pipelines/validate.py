"""Decode every file of every dataset, and report what training would fail on or silently read wrong.

    python -m data_pipelines validate --root R --datasets ave,avqa --json runs/validate.json --workers 8

Exits 0 when the data is sound and 3 otherwise: for a file that the loader refuses (damaged, too short, a mask of
another size than its picture), a malformed row, a clip in two splits, and, unless --allow-missing is given, a missing
file. docs/datasets.md lists the checks. A file is decoded once, whatever uses it, and one that crashes or hangs its
decoder is a problem like any other.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from crab_jax.io import paths
from crab_jax.io.bounds import Whole
from crab_jax.io.errors import InputError, run_verb
from crab_jax.io.files import out_file
from crab_jax.io.progress import Progress, on_stderr
from crab_jax.tasks import use_tasks
from data_pipelines import fbank, media, shards
from data_pipelines.batching import check_sources
from data_pipelines.datasets import DATASETS, PREPARED, is_there, media_of, records, selection
from data_pipelines.examine import Facts, examine, mismatch
from data_pipelines.examples import Example, seg_source
from data_pipelines.isolated import results
from data_pipelines.leaks import leak_problems
from data_pipelines.mistakes import Lists
from data_pipelines.shards import Shards
from data_pipelines.status import (
    CORRUPT,
    LEAK,
    MALFORMED,
    MISSING,
    WARNING,
    Count,
    Problem,
    command_line,
    report,
    status,
)

BAD = 3  # the exit code
SECONDS, BYTES_PER_SECOND = 60.0, 1e6  # time allowed per file: seconds, plus its size by this rate
FETCH_SECONDS = 600.0  # more for a file that is fetched from a bucket first
Task = tuple[str, str, tuple[str, ...]]  # the argument of `examine`


def validate(
    root: str | Path,
    names: Sequence[str] = (),
    workers: int = 0,
    progress: Callable[[str], None] | None = None,
    seconds: float = SECONDS,
) -> tuple[list[Count], list[Problem]]:
    """Return counts and problems as `status` does, by decoding with `workers` processes (0: one per core).

    Memory grows with the names of the files, not with their content; a process decodes one file at a time. For a
    prepared root, the shards' checksums are compared and their records read. Raises InputError as `status`, and for a
    root that has none of the datasets.
    """
    if not any(is_there(root, name) for name, _ in selection(root, names)):
        raise InputError(
            str(root),
            "--root",
            "holds none of the datasets",
            "give the folder that holds the datasets; docs/datasets.md shows the trees",
        )
    if prepared := shards.opened(root):
        wrong = list(_checksums(prepared, progress))
        counts, problems = status(root, names, progress, PreparedLook(prepared))
        return counts, wrong + problems + leak_problems(root, names)
    facts_of: dict[str, Facts] = {}
    known: dict[Facts, Facts] = {}  # equal Facts share one object, as most pictures have the same
    tasks = files(root, names, progress)

    def limit(task: Task) -> float:
        if paths.is_remote(root):
            return seconds + FETCH_SECONDS
        return seconds + (paths.at(task[0]) / task[1]).stat().st_size / BYTES_PER_SECOND

    answers = results(examine, tasks, workers or os.cpu_count() or 1, limit)
    for task, facts in Progress("files", len(tasks), progress).over(answers):
        if isinstance(facts, OSError) and facts.errno:  # of the bucket or of the disk, not of the file
            raise facts
        if isinstance(facts, Exception):
            facts = Facts(tuple((use, f"{CORRUPT}: {facts}") for use in task[2]))
        facts_of[task[1]] = known.setdefault(facts, facts)
    counts, problems = status(root, names, progress, Look(root, facts_of))
    return counts, [problem for problem in problems if names or not _is_unasked(problem)] + leak_problems(root, names)


def _is_unasked(problem: Problem) -> bool:
    """Return whether a problem is a missing annotation file of an optional other release in a dataset's folder.

    Such releases are MUSIC-AVQA as first published, the other half of AVSBench's object release, and splits of the
    users' own data.
    """
    other = problem.dataset in DATASETS and DATASETS[problem.dataset].stage == "other"
    return other and problem.kind == MISSING and not problem.id


def _checksums(prepared: Shards, progress: Callable[[str], None] | None) -> Iterator[Problem]:
    """Yield a problem for every shard whose content has changed."""
    for shard in Progress("checksums", len(prepared.shards), progress).over(prepared.shards):
        if shards.sha256(prepared.root / shard["file"]) != shard["sha256"]:
            yield Problem(PREPARED, "", "", shard["file"], "", f"{CORRUPT}: the checksum differs")


def files(root: str | Path, names: Sequence[str], progress: Callable[[str], None] | None) -> list[Task]:
    """Return every file that an Example needs, once, with all its uses."""
    annotations = Progress("annotations", say=progress)
    uses: dict[str, tuple[str, ...]] = {}
    for name, split in selection(root, names):
        try:
            for example in annotations.over(records(root, name, split)):
                for _, path, use in uses_of(example) if isinstance(example, Example) else ():
                    if use not in (have := uses.get(path, ())):
                        uses[path] = tuple(sorted((*have, use)))
        except InputError:
            continue  # an annotation file that cannot be read; `status` reports it
    return [(str(root), path, uses[path]) for path in uses]


def uses_of(example: Example) -> Iterator[tuple[str, str, str]]:
    """Yield (field, path, use as in `examine`) of every file of an Example; a video's own sound is a separate use."""
    for field, path in media_of(example):
        if field == "mask":
            yield field, path, "semantic" if example.mask_kind == "semantic" else "binary"
        else:
            yield field, path, field if field in ("video", "audio") else "picture"
    if example.video and not example.audio and example.windows != "none":
        yield "audio", example.video, "audio"


class Look:
    """Finds the problems of an Example, given the Facts of its files (a `status.Look`); remembers the clips seen."""

    def __init__(self, root: str | Path, facts: Mapping[str, Facts]):
        self.root, self.facts = paths.at(root), facts
        self.dataset = ""
        self.clips: dict[str, str] = {}  # clip -> the last split of the dataset in which it occurred
        self.lists = Lists()

    def __call__(self, dataset: str, split: str, example: Example) -> Iterator[tuple[str, str, str]]:
        """Yield (field, path, text) of every problem of an Example."""
        uses = list(uses_of(example))
        yield from self._files(example)
        for check in (check_sources, self._windows, self._mask):
            try:
                check(example)
            except InputError as error:
                file = next((path for field, path, _ in uses if field == error.field), "")
                yield error.field, file, f"{CORRUPT if file else MALFORMED}: {error.problem}"
        yield from self._lengths(example)
        yield from self._turned(example)
        yield from self._leak(dataset, split, example, uses[0][1] if uses else "")
        yield from self.lists.look(dataset, split, example, self._seconds(example))

    def _seconds(self, example: Example) -> float:
        """Return the length in seconds of an Example's clip: of its pictures, else of its sound, else 0."""
        shown = self._of(example.video).seconds if example.video else 0.0
        return shown or self._heard(example)[0] / media.SAMPLE_RATE

    def _of(self, path: str) -> Facts:
        return self.facts.get(path) or Facts()  # a file that was added after the annotations were read

    def _files(self, example: Example) -> Iterator[tuple[str, str, str]]:
        for field, path, use in uses_of(example):
            for of, problem in self._of(path).problems:
                if of == use:
                    yield field, path, problem

    def _heard(self, example: Example) -> tuple[int, float, float]:
        """Return (samples of an Example's sound, its start in seconds, length of the pictures in seconds).

        The samples are 0 without sound, and for one that cannot be read.
        """
        path = example.audio or example.video
        if not path or example.windows == "none":
            return 0, 0.0, 0.0
        facts, own = self._of(path), media.is_own(path, example.video)
        seconds = self._of(example.video).seconds if example.video else facts.seconds
        return facts.samples, facts.start if own else 0.0, seconds

    def _windows(self, example: Example) -> None:
        if (heard := self._heard(example))[0]:
            samples = media.placed_length(*heard, media.SAMPLE_RATE)
            fbank.check_windows(samples, example.windows, example.second, "", pad_short=False)

    def _mask(self, example: Example) -> None:
        source = seg_source(example)
        size = self._of(source[1]).size if source else None
        if example.mask_kind == "none" or not example.mask:
            return
        if source is None:
            raise InputError(
                "",
                "second",
                f"is {example.second}, which is no frame of the example, so the picture to segment is unknown",
                "",
            )
        if example.mask.startswith(media.INLINE_MASK):
            media.read_mask(self.root / example.mask, None, "binary", size)
        elif size and (own := self._of(example.mask).size):
            media.check_size(own, size, "")

    def _lengths(self, example: Example) -> Iterator[tuple[str, str, str]]:
        """Yield a warning for sound and pictures of different lengths, which both are read.

        Faults of a single file's clock (unused timestamps, sound that starts late) are among the problems of its Facts.
        """
        samples, start, shown = self._heard(example)
        heard = samples / media.SAMPLE_RATE + start
        if samples and shown and mismatch(shown, heard):
            yield (
                "audio" if example.audio else "video",
                example.audio or example.video or "",
                f"{WARNING}: {heard:.2f} s of sound for {shown:.2f} s of video",
            )

    def _turned(self, example: Example) -> Iterator[tuple[str, str, str]]:
        """Yield a warning for a mask without EXIF orientation whose picture has one.

        The mask may have been drawn on the picture as it is stored.
        """
        source = seg_source(example)
        drawn = example.mask and not example.mask.startswith(media.INLINE_MASK) and example.mask_kind != "none"
        picture, mask = self._of(source[1] if source else ""), self._of(str(example.mask))
        if source and drawn and picture.turned and not mask.turned and picture.size == mask.size:
            yield (
                "mask",
                str(example.mask),
                (
                    f"{WARNING}: EXIF turns its picture {source[1]}; the mask is read as "
                    "drawn on the picture as viewers show it"
                ),
            )

    def _leak(self, dataset: str, split: str, example: Example, path: str) -> Iterator[tuple[str, str, str]]:
        """Yield a problem, once per clip, for a clip that an earlier split of the same dataset has.

        It is a warning where the release itself has such clips. The clip is meta's `video`, or the first file.
        """
        if dataset != self.dataset:
            self.dataset, self.clips = dataset, {}
        named = example.meta.get("video")
        clip = f"{example.meta.get('dataset')} {named}" if isinstance(named, str) else path
        first = self.clips.setdefault(clip, split)
        if first != split:
            self.clips[clip] = split
            of = str(example.meta.get("dataset", dataset))
            shared = of in DATASETS and DATASETS[of].shared
            yield "id", path, f"{WARNING if shared else LEAK}: its clip is in {first} too"


class PreparedLook(Look):
    """Finds the problems of an Example of a prepared root, by reading each record as training does.

    Faults that decoding found (size of masks, length of sound) are errors in the records.
    """

    def __init__(self, prepared: Shards):
        super().__init__(prepared.root, {})
        self.prepared = prepared
        self.problem_of = functools.lru_cache(1 << 16)(self._problem_of)

    def _files(self, example: Example) -> Iterator[tuple[str, str, str]]:
        fields = {path: field for field, path in media_of(example)}
        for medium in shards.media_of(example, self.prepared.decoding):
            if problem := self.problem_of(medium):
                yield "audio" if medium.kind == "sounds" else fields[medium.path], medium.path, f"{CORRUPT}: {problem}"

    def _problem_of(self, medium: shards.Medium) -> str:
        kind, path, detail, beside = medium
        try:
            if kind == "sounds":
                self.prepared.sound(path, detail, None, beside)
            elif kind == "masks":
                self.prepared.mask(path, detail, self.prepared.decoding.image_size)
            elif detail == "video":
                self.prepared.video(path)
            else:
                self.prepared.picture(path, "")
        except InputError as error:
            return error.problem
        return ""


def run(argv: Sequence[str]) -> bool:
    """Print the table, write the report if requested, and return whether anything is bad."""
    parser = command_line(__doc__, "python -m data_pipelines validate")
    parser.add_argument(
        "--workers", type=Whole(0, 1024), default=0, help="processes that decode (default: one per core)"
    )
    parser.add_argument("--allow-missing", action="store_true", help="missing files are listed, but are not bad")
    arguments = parser.parse_args(argv)
    use_tasks([arguments.task_modules])
    if arguments.json:  # checked before the work, not after it
        out_file(arguments.json, "--json")
    counts, problems = validate(arguments.root, arguments.datasets, arguments.workers, on_stderr)
    report(counts, problems, arguments.json)
    fine = {WARNING, MISSING} if arguments.allow_missing else {WARNING}
    return any(problem.kind not in fine for problem in problems)


def main(argv: Sequence[str]) -> None:
    """Run `python -m data_pipelines validate`."""
    run_verb(lambda: sys.exit(BAD) if run(argv) else None, "--debug" in argv)
