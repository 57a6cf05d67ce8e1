"""Generate audio-visual scenes with labels for all nine tasks, as media files and Examples.

    python -m data_pipelines.sources.scenes --out DIR --train 2000 --val 200 --test 400 --seed 0 --workers 2

writes `<split>/<scene>/...` (see scene_media.write_scene), `<split>.jsonl` and the marker scenes.json. A scene depends
on (seed, split, index) only, so an interrupted root can be continued, and the result is the same for any worker count.
Contents of a scene: scene_graph.py. Pictures and sound: scene_media.py. Questions and expressions: scene_questions.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crab_jax.io import paths
from crab_jax.io.bounds import ANYWHERE, Choice, Whole
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import folder_on_disk, write_whole
from crab_jax.io.locks import locked
from crab_jax.io.progress import Progress
from crab_jax.io.structured import Each, read_json
from crab_jax.tasks import TASKS
from data_pipelines.examples import TASK_NAMES, Example, write_jsonl
from data_pipelines.isolated import end_with_parent
from data_pipelines.sources.scene_graph import KINDS, LEVELS, SECONDS, SPLITS, Scene, Thing, load, sample, scene_table
from data_pipelines.sources.scene_media import occupancy, write_scene
from data_pipelines.sources.scene_questions import expressions, questions

__all__ = [
    "KINDS",
    "NOTHING",
    "PER_SCENE",
    "SPLITS",
    "Scene",
    "examples",
    "load_split",
    "occupancy",
    "scene_table",
    "write",
]

FORMAT = 2  # format version of the scenes on disk; a root of another version is not continued
PER_SCENE = {"avqa": 3, "arig": 1, "s4": 1, "ms3": 1, "avss": 1, "ref-avs": 3}  # Examples per scene; 1 for other tasks
NOTHING = "nothing"  # the object of a segmentation answer when nothing visible sounds
_EXPRESSIONS = 3  # expressions per scene with masks on disk


# Explicit reasoning: short regular sentences about sights and sounds, as in AV-UIE (paper section 3).


def _name(thing: Thing, slot: bool, level: bool) -> str:
    where = [thing.slot] if slot and thing.slot else []
    return " ".join(["the", *([LEVELS[thing.loudness]] if level else []), *where, thing.kind])


def _listing(verb: str, parts: Sequence[str]) -> str:
    return f"I {verb} {', '.join(parts) or 'nothing'}."


def _span(interval: tuple[int, int] | None) -> str:
    """Return a text such as `from 0 to 7`."""
    assert interval is not None
    return f"from {interval[0]} to {interval[1]}"


def _seen(scene: Scene, slot: bool = False) -> str:
    """Return a sentence about all visible things, `I see the left piano from 0 to 7, the right drum from 3 to 10`."""
    return _listing("see", [f"{_name(t, slot, False)} {_span(t.visible)}" for t in scene.visible])


def _heard(scene: Scene, level: bool = False) -> str:
    """Return a sentence about all sounding things, such as `I hear the loud piano from 2 to 9`."""
    return _listing("hear", [f"{_name(t, False, level)} {_span(t.sounding)}" for t in scene.sounding])


def _moment(scene: Scene, second: int) -> str:
    """Return sentences about one second, such as `I hear the piano. I see the left piano, the right drum`."""
    heard = _listing("hear", [_name(t, False, False) for t in scene.sounding if t.heard(second)])
    return f"{heard} {_listing('see', [_name(t, True, False) for t in scene.visible if t.seen(second)])}"


def _caption(scene: Scene) -> str:
    """Return a short text about what is seen, which of it sounds and how loud, and what sounds unseen."""
    seen = " and ".join(f"{_article(t.kind)} on the {t.slot}" for t in scene.visible)
    playing = " and ".join(f"{_name(t, False, True)} is playing" for t in scene.visible if t.sounding)
    hidden = [f"{_name(t, False, True)} plays off screen" for t in scene.sounding if not t.visible]
    return " ".join(
        f"{sentence[0].upper()}{sentence[1:]}."
        for sentence in (f"the video shows {seen}", playing, *hidden)
        if sentence
    )


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


# One function per task: (scene, number of Examples) -> prompt fields, label fields, reasoning, other Example fields and
# meta of each Example.

_Item = tuple[dict[str, Any], dict[str, Any], str, dict[str, Any], dict[str, Any]]


def _ave(scene: Scene, count: int) -> Iterator[_Item]:
    sources = [(t.kind, t.both) for t in scene.things if t.both]
    if len(sources) == 1:
        kind, (start, end) = sources[0]
        label = {"event": kind, "start": start, "end": end}
        yield {}, label, f"{_seen(scene)} {_heard(scene)}", {}, label


def _avvp(scene: Scene, count: int) -> Iterator[_Item]:
    label = {
        "audio": [[t.kind, *t.sounding] for t in scene.sounding if t.sounding],
        "visual": [[t.kind, *t.visible] for t in scene.visible if t.visible],
    }
    seen = _listing("see", [_name(t, False, False) for t in scene.visible])
    heard = _listing("hear", [_name(t, False, False) for t in scene.sounding])
    yield {}, label, f"{seen} {heard}", {}, label


def _avqa(scene: Scene, count: int) -> Iterator[_Item]:
    for question in questions(scene, count):
        modality, kind = question.type
        place = kind in ("Location", "Comparative", "Temporal")
        parts = [_seen(scene, slot=place)] if modality != "Audio" else []
        parts += [_heard(scene, level=kind in ("Comparative", "Location"))] if modality != "Visual" else []
        meta = {"answer": question.answer, "type": list(question.type), "question": question.text}
        yield {"question": question.text}, {"answer": question.answer}, " ".join(parts), {}, meta


def _arig(scene: Scene, count: int) -> Iterator[_Item]:
    for second in _seconds(scene, "arig", count):
        thing = scene.sources(second)[0]
        box = thing.boxes[second]
        assert box is not None  # things overlap only slightly, so a visible one is never covered
        label = {"object": thing.kind, "box": list(box)}
        yield {}, label, _moment(scene, second), _picture(scene, second), label


def _avs(task: str) -> Callable[[Scene, int], Iterator[_Item]]:
    def items(scene: Scene, count: int) -> Iterator[_Item]:
        for second in _seconds(scene, task, count):
            objects = [t.kind for t in scene.sources(second)] or [NOTHING]
            mask = {
                "mask": f"{scene.folder}/labels_semantic/{second}.png",
                "mask_kind": "semantic" if task == "avss" else "binary",
            }
            yield (
                {"second": second},
                {"objects": objects, "second": second},
                _moment(scene, second),
                _picture(scene, second) | mask,
                {"objects": objects, "video": scene.folder},
            )

    return items


def _ref_avs(scene: Scene, count: int) -> Iterator[_Item]:
    for item in expressions(scene, _EXPRESSIONS)[:count]:
        name = f"{item.object}_{item.second}" if item.object else "empty"
        mask = {"mask": f"{scene.folder}/masks/{name}.png", "mask_kind": "binary"}
        reasoning = f"{_seen(scene, slot=' on the ' in item.text)} {_heard(scene, level='est sound' in item.text)}"
        label = {"expression": item.text, "object": item.object, "second": item.second}
        yield (
            {"expression": item.text, "second": item.second},
            label,
            reasoning,
            _picture(scene, item.second) | mask,
            {"expression": item.text, "object": item.object, "split": item.split, "video": scene.folder},
        )


def _avcap(scene: Scene, count: int) -> Iterator[_Item]:
    caption = _caption(scene)
    yield {}, {"caption": caption}, "", {}, {"captions": [caption]}


_ITEMS: dict[str, Callable[[Scene, int], Iterator[_Item]]] = {
    "avqa": _avqa,
    "ave": _ave,
    "avvp": _avvp,
    "arig": _arig,
    "s4": _avs("s4"),
    "ms3": _avs("ms3"),
    "avss": _avs("avss"),
    "ref-avs": _ref_avs,
    "avcap": _avcap,
}


def _picture(scene: Scene, second: int) -> dict[str, Any]:
    return {"second": second, "seg_image": f"{scene.folder}/frames/{second}.jpg", "audio": f"{scene.folder}/audio.wav"}


def _seconds(scene: Scene, task: str, count: int) -> list[int]:
    """Return up to `count` seconds to ask `task` about, the same ones for every call.

    s4: exactly one thing is seen and heard; arig: in addition nothing else is heard, so that the sound determines the
    thing. ms3, avss: any second, one without a source only with a small chance; ms3 only when two things sound in the
    clip.
    """
    rng = scene.rng("seconds")
    order = np.roll(rng.permutation(SECONDS), TASK_NAMES.index(task)).tolist()  # another second for each task
    sources = [len(scene.sources(k)) for k in range(SECONDS)]
    if task in ("s4", "arig"):
        heard = [sum(t.heard(k) for t in scene.things) for k in range(SECONDS)]
        return [k for k in order if sources[k] == 1 and (task == "s4" or heard[k] == 1)][:count]
    if task == "ms3" and len(scene.sounding) < 2:
        return []
    with_empty = rng.random() < 0.15
    return [k for k in order if sources[k] or with_empty][:count]


def load_split(root: str | Path, split: str) -> list[Scene]:
    """Return all scenes of a split, in order. Raises InputError when the root or the split was not written."""
    marker = paths.at(root) / "scenes.json"
    if not marker.is_file():
        raise InputError(str(marker), "", "no such file", "write scenes with `python -m data_pipelines.sources.scenes`")
    counts = read_json(marker, {"counts": Each(Choice(SPLITS), Whole())})["counts"]
    if split not in counts:
        raise InputError(str(marker), "counts", f"no split {split!r}", f"use one of {', '.join(counts)}")
    return [load(paths.at(root) / split / f"{i:06d}" / "scene.json") for i in range(counts[split])]


def examples(
    root: str | Path,
    split: str,
    reasoning: str = "explicit",
    variant: str = "train",
    tasks: Sequence[str] | None = None,
    per_scene: Mapping[str, int] | None = None,
) -> list[Example]:
    """Return the Examples of a written split, grouped by scene; paths are relative to `root`.

    reasoning: "explicit" puts sights and sounds before the answer, "plain" is the answer alone. variant: which prompt
    of the task ("train", "test", "quick"); it decides between the clip and one picture. per_scene: at most this many
    Examples of a task per scene (default PER_SCENE; Ref-AVS has masks for three).
    """
    if reasoning not in ("explicit", "plain"):
        raise InputError("examples", "reasoning", f"unknown value {reasoning!r}", "use explicit or plain")
    counts = PER_SCENE | dict(per_scene or {})
    return [
        example
        for scene in load_split(root, split)
        for task in tasks or TASK_NAMES
        for example in _scene_examples(scene, task, counts.get(task, 1), reasoning == "explicit", variant)
    ]


def _scene_examples(scene: Scene, task: str, count: int, explicit: bool, variant: str) -> Iterator[Example]:
    for number, (prompt, label, thought, fields, meta) in enumerate(_ITEMS[task](scene, count)):
        text = TASKS[task].instruction(variant=variant, **prompt)
        visual: dict[str, Any] = {"windows": "ten" if "<video>" in text or task == "ref-avs" else "one"}
        if "<video>" in text:
            visual["video"] = f"{scene.folder}/clip.mp4"
        if "<image>" in text:
            visual["image"] = fields["seg_image"]
        if task == "arig":
            fields = {k: v for k, v in fields.items() if k != "seg_image"}
        suffix = f"-{number}" if task in PER_SCENE else ""
        yield Example(
            id=f"{scene.split}-{scene.id}-{task}{suffix}",
            task=task,
            instruction=text,
            target=TASKS[task].target(**label, reasoning=thought if explicit else ""),
            **visual,
            **fields,
            meta={**meta, "scene": scene.folder},
        )


def _write_one(job: tuple[str, int, str, int]) -> None:
    out, seed, split, index = job
    scene = sample(seed, split, index)
    folder = paths.at(out) / scene.folder
    if (folder / "scene.json").is_file():
        return
    with folder_on_disk(folder, last="scene.json") as written:
        write_scene(written, scene, [(e.object, e.second) for e in expressions(scene, _EXPRESSIONS) if e.object])


def write(
    out: str | Path,
    counts: Mapping[str, int],
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Write a data root of scenes, or continue a partial one; does nothing when `out` is complete.

    counts: scenes per split of SPLITS. progress: receives a line of text every few seconds. Raises InputError when
    `out` holds scenes of other settings.
    """
    out = paths.at(out)
    unknown = set(counts) - set(SPLITS)
    if unknown or min(counts.values(), default=0) < 0 or seed < 0:
        raise InputError(
            "scenes",
            "counts",
            f"bad counts {dict(counts)} or seed {seed}",
            f"give numbers >= 0 for {', '.join(SPLITS)} and a seed >= 0",
        )
    settings: dict[str, Any] = {"format": FORMAT, "seed": seed, "counts": {s: counts[s] for s in SPLITS if s in counts}}
    marker = out / "scenes.json"
    state = read_json(marker) if marker.is_file() else None
    if state == settings | {"complete": True}:
        return
    if state and state != settings | {"complete": False}:
        raise InputError(
            str(marker),
            "",
            f"holds scenes of other settings ({json.dumps(state)})",
            "choose another folder or delete this one",
        )
    write_whole(marker, json.dumps(settings | {"complete": False}) + "\n")
    jobs = [(str(out), seed, split, i) for split, count in settings["counts"].items() for i in range(count)]
    _run(jobs, workers, progress)
    for split in settings["counts"]:
        write_jsonl(out / f"{split}.jsonl", examples(out, split))
    write_whole(marker, json.dumps(settings | {"complete": True}) + "\n")


def _run(jobs: Sequence[tuple[str, int, str, int]], workers: int, progress: Callable[[str], None] | None) -> None:
    if workers > 1:  # spawned, because forking a process with JAX threads can hang
        pool = multiprocessing.get_context("spawn").Pool(workers, end_with_parent)
        done: Iterator[None] = pool.imap_unordered(_write_one, jobs, chunksize=8)
    else:
        pool, done = None, map(_write_one, jobs)
    try:
        for _ in Progress("scenes", len(jobs), progress).over(done):
            pass
    finally:
        if pool:
            pool.terminate()


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m data_pipelines.sources.scenes`."""
    argv = sys.argv[1:] if argv is None else argv
    run_verb(lambda: _write_from(argv), "--debug" in argv)


def _write_from(argv: Sequence[str]) -> None:
    parser = CommandLine(__doc__, "python -m data_pipelines.sources.scenes")
    parser.add_argument("--out", type=ANYWHERE, required=True, help="data root to write")
    for split, default in zip(SPLITS, (2000, 200, 400), strict=True):
        parser.add_argument(f"--{split}", type=Whole(0, 10**7), default=default, help=f"scenes of the {split} split")
    parser.add_argument("--seed", type=Whole(), default=0)
    parser.add_argument("--workers", type=Whole(0, 1024), default=os.cpu_count() or 1)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    counts = {split: getattr(args, split) for split in SPLITS}
    with locked(args.out):
        write(args.out, counts, args.seed, args.workers, lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    main()
