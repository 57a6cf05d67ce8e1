"""The parts of one preparation, each done by a process of its own: which shards are whose, and whether all agree.

    parts/plan.jsonl        the plan that all parts follow, as the first of them wrote it (`prepare.Plan`)
    parts/<i>-of-<n>.json   written when part i of n starts: the plan and the settings that it follows, the versions of
                            its libraries, and its source root

The folder is in the prepared root until `merge` has joined the parts. Parts need not talk: the plan is a pure function
of settings, annotations and media files, and part i takes every n-th shard of it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from crab_jax.io.bounds import Anything, Text, Whole
from crab_jax.io.errors import InputError
from crab_jax.io.files import write_whole
from crab_jax.io.structured import Each, read_json

T = TypeVar("T")
FOLDER = "parts"
MOST = 100_000  # parts of one preparation
# Pairs of variables that number the processes of one job, from 0: those of jax.distributed, of srun.
_JOBS = (("JAX_PROCESS_ID", "JAX_NUM_PROCESSES"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
NOTE = {
    "part": Whole(0, MOST),
    "of": Whole(1, MOST),
    "plan": Text(1, 200),
    "root": Text(1),
    "settings": Each(Text(1, 100), Anything()),
    "versions": Each(Text(1, 100), Text()),
}
_OPTIONS = "and the options of the others"


class Part(NamedTuple):
    """Part `number`, from 0, of `of`."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that this part does: every `of`-th."""
        return items[self.number :: self.of]


def read_part(text: str, environ: Mapping[str, str]) -> Part:
    """Parse `I/N` with I from 0 to N - 1, or `auto`: the number of this process in its job. For argparse.

    Raises argparse.ArgumentTypeError.
    """
    if text == "auto":
        pair = next((pair for pair in _JOBS if all(environ.get(name) for name in pair)), None)
        if pair is None:
            names = " or ".join(" and ".join(pair) for pair in _JOBS)
            raise argparse.ArgumentTypeError(f"'auto' needs {names} in the environment; give I/N")
        text = "/".join(environ[name] for name in pair)
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and len(text) < 16 and int(index) < int(count) <= MOST):
        raise argparse.ArgumentTypeError(
            f"{text!r:.80} is not I/N with I from 0 to N - 1, as in 0/8 to 7/8 (for a SLURM array: --array=0-7)"
        )
    return Part(int(index), int(count))


def note_file(out: Path, part: Part) -> Path:
    """Return the note of a part."""
    return out / FOLDER / f"{part.number}-of-{part.of}.json"


def write_note(
    out: Path, part: Part, plan: str, root: str, settings: Mapping[str, Any], versions: Mapping[str, str]
) -> None:
    """Write the note of a part that starts. plan: the digest of the plan that it follows."""
    note = {"part": part.number, "of": part.of, "plan": plan, "root": root, "settings": settings}
    write_whole(note_file(out, part), json.dumps({**note, "versions": versions}, indent=1))


def agreed(out: Path, plan: str, settings: Mapping[str, Any]) -> tuple[int, str]:
    """Return (number of parts, source root of the first), if every part was started with this plan and these settings.

    Raises InputError naming the part that is missing or differs, and how to run it.
    """
    found = [read_json(path, NOTE) for path in (out / FOLDER).glob("*-of-*.json")]
    if not found:
        raise InputError(str(out), "--merge", "holds no parts", "run prepare with --part 0/N to N-1/N before")
    # The numbers of parts may have been changed on the way: one that is complete counts, else the one of most notes.
    seen = Counter(note["of"] for note in found)
    count = max(seen, key=lambda of: (seen[of] == of, seen[of], of))
    notes = {note["part"]: note for note in found if note["of"] == count}
    first = notes[min(notes)]
    for index in range(count):
        part = Part(index, count)
        again = f"run prepare with --part {part} {_OPTIONS}"
        if index not in notes:
            raise InputError(str(out), f"part {part}", "was not run", again)
        note = notes[index]
        for field in sorted(settings.keys() | note["settings"].keys()):
            if note["settings"].get(field) != settings.get(field):
                problem = (
                    f"was prepared with {note['settings'].get(field)!r:.60}, the plan has {settings.get(field)!r:.60}"
                )
                raise InputError(str(out), f"part {part}, {field}", problem, again)
        if note["plan"] != plan:
            problem = "follows another plan: its annotations, or the sizes or times of its media files, are others"
            raise InputError(str(out), f"part {part}", problem, again)
        for name, version in note["versions"].items():
            if version != (other := first["versions"].get(name)):
                problem = f"was decoded with {name} {version:.40}, part {first['part']}/{count} with {other!s:.40}"
                raise InputError(
                    str(out), f"part {part}", problem, "delete its shards, and run it again with the same versions"
                )
    return count, str(first["root"])


def complete(out: Path, files: Sequence[str], whole: Mapping[str, bool], count: int) -> None:
    """Raise InputError naming the first part with a shard that is missing or damaged.

    files: of all shards, in the order of the plan. whole: {file: whether it is what its note says} of those that exist.
    """
    for index in range(count):
        part = Part(index, count)
        own = part.share(files)
        wrong = [file for file in own if not whole.get(file)]
        if wrong:
            damaged = [file for file in wrong if file in whole]
            problem = (
                f"{damaged[0]} is not what it wrote: damaged, or changed afterwards"
                if damaged
                else f"is not finished: {len(wrong)} of its {len(own)} shards are missing"
            )
            raise InputError(str(out), f"part {part}", problem, f"run prepare with --part {part} {_OPTIONS}")
