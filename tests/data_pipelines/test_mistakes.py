"""The mistakes that people make in lists of their own: none passes unseen, by `validate` or before training."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from media_files import write_audio, write_picture, write_video

from configs import tiny
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.runs import run_data, run_folder
from crab_jax.tasks import TASKS
from crab_jax.tasks.placeholders import MASK
from data_pipelines import mistakes
from data_pipelines.datasets import DATASETS, read_examples, records
from data_pipelines.examine import examine
from data_pipelines.status import KINDS, Problem, status
from data_pipelines.validate import BAD, Look, files, main

REPOSITORY = Path(__file__).parents[2]
WORDS = "This is a video:\n<video>\nThis is an audio:\n<audio>\nWhat sounds?"


def good(task: str, **label: Any) -> dict[str, Any]:
    """A sound record of a task, for clip.mp4 of ten seconds or picture.png."""
    labels: dict[str, dict[str, Any]] = {
        "ave": {"event": "Bark", "start": 2, "end": 5},
        "avvp": {"audio": [["Speech", 0, 10], ["Dog", 2, 5]], "visual": [["Dog", 0, 10]]},
        "avqa": {"answer": "two"},
        "arig": {"object": "dog", "box": [20, 30, 120, 200]},
        "s4": {"objects": ["dog"]},
        "ms3": {"objects": ["dog", "man"]},
        "avss": {"objects": ["dog"]},
        "ref-avs": {"object": "dog", "expression": "the loud dog"},
        "avcap": {"captions": ["A dog barks."]},
    }
    meta = {**labels[task], **label}
    said = {"caption": meta["captions"][0]} if task == "avcap" else meta
    moment = {"second": 3} if TASKS[task].mask_kind != "none" else {}
    prompt = {"avqa": {"question": "How many dogs are there?"}, "ref-avs": {"expression": meta.get("expression")}}.get(
        task, {}
    )
    record = {
        "id": f"{task}-1",
        "task": task,
        "instruction": TASKS[task].instruction(**prompt, **moment),
        **moment,
        "target": TASKS[task].target(**said, **moment),
        "meta": {**meta, "video": "clip", **({"split": "seen"} if task == "ref-avs" else {})},
    }
    if task == "arig":
        return {**record, "image": "picture.png", "audio": "clip.wav", "windows": "ten"}
    if moment:
        mask = "classes.png" if task == "avss" else "mask.png"
        return {**record, "video": "clip.mp4", "mask": mask, "mask_kind": TASKS[task].mask_kind}
    return {**record, "video": "clip.mp4"}


def changed(task: str, label: dict[str, Any] | None = None, **fields: Any) -> list[dict[str, Any]]:
    """A sound record with some fields changed; `label` changes meta alone, the target stays."""
    record = good(task)
    return [{**record, **fields, "meta": {**record["meta"], **(label or {})}}]


def many(task: str, label: Callable[[int], dict[str, Any]], count: int = 12) -> list[dict[str, Any]]:
    """Sound records of several clips."""
    return [{**good(task, **label(i)), "id": str(i), "video": f"many/{i}.mp4"} for i in range(count)]


def without(task: str, *names: str) -> list[dict[str, Any]]:
    record = good(task)
    meta = {name: value for name, value in record["meta"].items() if name not in names}
    return [{name: value for name, value in {**record, "meta": meta}.items() if name not in names}]


def text_of(task: str, change: Callable[[str], str | bytes]) -> bytes:
    """The file with one sound record, its text changed."""
    text = change(json.dumps(good(task)))
    return text.encode() if isinstance(text, str) else text


def target(task: str, **label: Any) -> str:
    return good(task, **label)["target"]


class Mistake(NamedTuple):
    """name: as in docs/your_data.md. rows: of train.jsonl, or its bytes. verdict: a kind of `validate`. said: a pattern
    of what is said. decoded: whether it takes decoding, or the benchmarks' names, to see it, which training leaves to
    `validate`."""

    name: str
    rows: list[dict[str, Any]] | bytes
    verdict: str
    said: str
    decoded: bool = False


M, W, PROMPT = "malformed", "warning", good("ave")["instruction"]
MISTAKES = [
    # Times.
    Mistake("seconds counted from 1", many("ave", lambda i: {"start": 1 + i % 3, "end": 8 + i % 3}), W, "starts at 0"),
    Mistake("ends counted in", many("ave", lambda i: {"start": i % 3, "end": 7 + i % 3}), W, "ends at 10"),
    Mistake("an event of one second as 3,3", [good("ave", start=3, end=3)], M, "which is no time"),
    Mistake("start after end", changed("ave", {"start": 8, "end": 3}), M, "is 3.*from `start` to 10"),
    Mistake("end after 10", changed("ave", {"end": 12}), M, "is 12"),
    Mistake("negative start", changed("ave", {"start": -1}), M, "is -1"),
    Mistake(
        "seconds of a clip of 30 s",
        [{**good("ave", start=2, end=9), "video": "long.mp4"}],
        W,
        "counts 10 seconds, but the clip lasts 30.0 s",
        True,
    ),
    Mistake(
        "an event behind the end of the clip",
        [{**good("ave", start=2, end=9), "video": "short.mp4"}],
        M,
        "until 9, but the clip lasts 5.0 s",
        True,
    ),
    Mistake("seconds with decimals", changed("ave", {"start": 2.5}), M, "is 2.5"),
    Mistake("3.0 for 3", changed("ave", {"start": 2.0}), M, "is 2.0"),
    Mistake("mm:ss", changed("ave", {"start": "00:02"}), M, "is '00:02'"),
    Mistake("seconds in quotes", changed("ave", {"end": "5"}), M, "is '5'"),
    Mistake("another range in the target", changed("ave", target=target("ave", end=6)), M, "the label says 2,5"),
    Mistake("two events in one AVE row", changed("ave", target=2 * target("ave")), M, "2 <event> tags"),
    Mistake("overlapping spans of one event", [good("avvp", audio=[["Dog", 0, 5], ["Dog", 3, 8]])], W, "overlap"),
    Mistake("an event as start, end, name", changed("avvp", {"audio": [[0, 10, "Speech"]]}), M, "name, start, end"),
    Mistake(
        "audio and visual exchanged",
        changed("avvp", {"audio": [["Dog", 0, 10]], "visual": [["Speech", 0, 10]]}),
        M,
        "differ from the label|not in the label",
    ),
    # Names and answers.
    Mistake("a name in other case", [good("ave", event="bark")], W, "did you mean 'Bark'", True),
    Mistake(
        "a name that the benchmark does not know", [good("avvp", audio=[["Doorbell", 0, 3]])], W, "none of the 25", True
    ),
    Mistake("an object that AVSS does not know", [good("avss", objects=["doorbell"])], W, "none of the 70", True),
    Mistake("the number of a class for its name", [good("ave", event="2")], M, "a number"),
    Mistake("the number of a class, not as text", changed("ave", {"event": 2}), M, "meta.event.*|is 2"),
    Mistake("None as text", [good("arig", object="None")], M, "stands for no value"),
    Mistake("null for a name", changed("arig", {"object": None}), M, "is None"),
    Mistake("another answer in the target", changed("avqa", target=target("avqa", answer="three")), M, "says 'two'"),
    Mistake("an answer that is a number", changed("avqa", {"answer": 2}), M, "is 2"),
    Mistake("digits for words", [good("avqa", answer="2")], W, "answers in words"),
    Mistake("an answer without its tags", changed("avqa", target="two"), M, "the answer is ''"),
    Mistake("an unknown question type", changed("avqa", {"type": ["Sound", "Colour"]}), M, "modality, kind"),
    Mistake(
        "no question behind the prompt",
        changed("avqa", instruction=TASKS["avqa"].instruction(question="")),
        M,
        "asks no question",
    ),
    Mistake("another question in meta", changed("avqa", {"question": "Is it loud?"}), W, "meta.question is"),
    Mistake(
        "the same question with two answers",
        [good("avqa"), {**good("avqa", answer="three"), "id": "b"}],
        M,
        "answers the same question",
    ),
    Mistake("the same row twice", [good("avqa"), {**good("avqa"), "id": "b"}], W, "asks and answers the same"),
    Mistake("one answer for everything", many("avqa", lambda i: {}), W, "the same in the first 10"),
    Mistake("an answer that says nothing", [good("avqa", answer="?")], W, "stands for no value"),
    Mistake("the letter of a choice", [good("avqa", answer="B")], W, "word for word"),
    Mistake("a sentence for an answer", [good("avqa", answer="There are two dogs in it.")], W, "word for word"),
    Mistake(
        "a template's gap in the question",
        changed("avqa", instruction=TASKS["avqa"].instruction(question="How many <Object> are there?")),
        W,
        "gap of a template",
    ),
    Mistake("nan for a caption", [good("avcap", captions=["nan"])], M, "no caption"),
    Mistake("a file for a caption", [good("avcap", captions=["clip.mp4"])], M, "no caption"),
    Mistake("an object twice", [good("s4", objects=["dog", "dog"])], W, "names one twice"),
    Mistake("HTML in a text", [good("avcap", captions=["A dog &amp; a cat."])], W, "'&amp;'"),
    Mistake("text of another encoding", [good("avcap", captions=["A dog\u00e2\u20ac\u2122s bark."])], W, "left there"),
    Mistake("letters that were lost", [good("avcap", captions=["A dog\ufffds bark."])], W, "left there"),
    Mistake("a line break as two letters", changed("ave", target="It barks.\\n" + target("ave")), W, "left there"),
    Mistake("white space around the target", changed("ave", target=target("ave") + "  "), W, "white space"),
    Mistake("an id without letters", changed("ave", id=" "), M, "one line of text"),
    Mistake("an id of two lines", changed("ave", id="a\nb"), M, "one line of text"),
    Mistake("a box around the whole picture", [good("arig", box=[0, 0, 224, 224])], W, "whole picture"),
    Mistake("the picture in place of its mask", changed("s4", seg_image="mask.png"), M, "the picture itself"),
    Mistake(
        "one picture for a clip",
        [{**good("ave"), "video": None, "frames": ["picture.png"], "audio": "clip.wav"}],
        W,
        "10 seconds",
    ),
    Mistake("a caption that is not in meta", changed("avcap", target="A cat."), M, "none of the captions"),
    Mistake("captions as one text", changed("avcap", {"captions": "A dog barks."}), M, "list of at least one text"),
    # Prompts and targets.
    Mistake("no target", changed("ave", target=""), M, "nothing to learn"),
    Mistake("a target of spaces", changed("ave", target=" \n"), M, "nothing to learn"),
    Mistake("`</s>` behind the target", changed("ave", target=target("ave") + "</s>"), M, "chat wrap"),
    Mistake("the chat wrap around the prompt", changed("ave", instruction=f"[INST] {PROMPT} [/INST]"), M, "chat wrap"),
    Mistake("USER: before the prompt", changed("ave", instruction="USER: " + PROMPT), M, "chat wrap"),
    Mistake("a tag that is not closed", changed("ave", target=target("ave").replace("</event>", "")), M, "tags"),
    Mistake("a tag of another task", changed("ave", target=target("avqa")), M, "no tag of ave"),
    Mistake(
        "an answer in other words than the parser reads",
        changed("s4", target=f"The dog sounds. {MASK}"),
        M,
        "objects are",
    ),
    Mistake("the prompt of another task", changed("ave", instruction=good("avvp")["instruction"]), M, "prompt of avvp"),
    Mistake("a prompt in other words", changed("avqa", instruction=WORDS), W, "no prompt that avqa"),
    Mistake("`<image>` for a video", changed("ave", instruction=PROMPT.replace("video>", "image>")), M, "says <image>"),
    Mistake("no placeholder", changed("ave", instruction="What sounds?"), M, "0 visual placeholders"),
    Mistake("a placeholder twice", changed("ave", instruction="<video>" + PROMPT), M, "visual placeholders"),
    Mistake(
        "a picture where the task needs a clip",
        [{**without("ave", "video")[0], "image": "picture.png"}],
        M,
        "<video>, but the example has 'image'",
    ),
    Mistake("an unknown task", [{**good("ave"), "task": "AVE"}], M, "unknown value 'AVE'"),
    # Boxes.
    Mistake("a box in pixels of a larger picture", changed("arig", {"box": [20, 30, 400, 300]}), M, "224"),
    Mistake("a box as x, y, width, height", changed("arig", {"box": [120, 130, 50, 60]}), M, "x1 <= x2"),
    Mistake("a box in shares of the picture", [good("arig", box=[0.1, 0.2, 0.5, 0.9])], M, "shares of the picture"),
    Mistake("a box that begins outside of the picture", changed("arig", {"box": [-14, 30, 120, 200]}), M, "-14"),
    Mistake("a box as text", changed("arig", {"box": "20,30,120,200"}), M, "x1, y1, x2, y2"),
    Mistake("a box of three numbers", changed("arig", {"box": [20, 30, 120]}), M, "x1, y1, x2, y2"),
    Mistake("another box in the target", changed("arig", target=target("arig", box=[60, 30, 120, 200])), M, "x1 is 60"),
    # Masks.
    Mistake("an inverted mask", changed("s4", mask="inverted.png"), W, "is it inverted", True),
    Mistake("a photograph for a mask", changed("s4", mask="photo.png"), W, "photograph", True),
    Mistake("a mask of another size", changed("s4", mask="small.png"), "corrupt", "but its picture is 48x32", True),
    Mistake("a class above 70 in a mask", changed("avss", mask="many.png"), "corrupt", "class id 90", True),
    Mistake("mask_kind forgotten", without("s4", "mask_kind"), M, "must be 'binary'"),
    Mistake("a binary mask for AVSS", changed("avss", mask_kind="binary"), M, "semantic masks"),
    Mistake("no mask", without("s4", "mask"), M, "is missing"),
    Mistake(
        "a mask without its tokens in the target",
        changed("s4", target=target("s4").replace(MASK, "")),
        M,
        "six mask tokens",
    ),
    Mistake("`<mask_0>` alone", changed("s4", target=target("s4").replace(MASK, "<mask_0>")), M, "six mask tokens"),
    Mistake("mask tokens without a mask", changed("ave", target=target("ave") + MASK), M, "no tag of ave"),
    Mistake("a mask where the task has none", changed("ave", mask="mask.png"), W, "ave has none"),
    Mistake(
        "the mask of another picture",
        [good("s4"), {**good("s4"), "id": "b", "video": "many/1.mp4"}],
        W,
        "belongs to another picture",
    ),
    # Seconds and windows.
    Mistake("`second` in quotes", changed("s4", second="3"), M, "is str '3'"),
    Mistake("`second` counted from 1", changed("s4", second=4), M, "asks about the fourth second"),
    Mistake("`second` after the clip", changed("s4", second=12), M, "is 12|12, which is no"),
    Mistake(
        "another second in the target",
        changed("s4", target=target("s4").replace("fourth", "fifth")),
        M,
        "the fifth second, not the fourth",
    ),
    Mistake("windows of another task", changed("ave", windows="music_avqa"), M, "not asked so"),
    Mistake("one window without `second`", changed("avcap", windows="one"), M, "reads? one of 10"),
    Mistake("ten windows of a clip of a minute", [{**good("avqa"), "video": "minute.mp4"}], W, "lasts 61.0 s", True),
    Mistake(
        "no sound asked for",
        changed("avqa", windows="none", instruction=good("avqa")["instruction"].replace("<audio>", "")),
        W,
        "without sound",
    ),
    # Meta.
    Mistake("no meta", [{**good("ave"), "meta": {}}], W, "is empty"),
    Mistake(
        "other names in meta",
        [{**good("ave"), "meta": {"events": "Bark", "begin": 2, "end": 5}}],
        M,
        r"missing \(there is 'events'\)",
    ),
    Mistake("meta as text", [{**good("ave"), "meta": json.dumps(good("ave")["meta"])}], M, "is str"),
    Mistake("Ref-AVS without meta.split", without("ref-avs", "split"), W, "missing"),
    Mistake("an expression that refers to nothing called seen", changed("ref-avs", {"object": ""}), M, '"null"'),
    Mistake("another expression in the prompt", changed("ref-avs", {"expression": "the cat"}), M, "meta.expression is"),
    # Files.
    Mistake("an id twice", [good("ave"), good("ave")], M, "duplicate id"),
    Mistake("an absolute path", changed("ave", video="/data/clip.mp4"), M, "leaves the data root"),
    Mistake("a path with backslashes", changed("ave", video="media\\clip.mp4"), M, "leaves the data root"),
    Mistake("a path of another machine", changed("ave", video="C:/Users/me/clip.mp4"), M, "leaves the data root"),
    Mistake("a path from the home folder", changed("ave", video="~/clip.mp4"), M, "leaves the data root"),
    Mistake("a path above the folder", changed("ave", video="../clip.mp4"), M, "leaves the data root"),
    Mistake("an address for a path", changed("ave", video="https://example.org/clip.mp4"), M, "leaves the data root"),
    Mistake("a list for a path", changed("ave", video=["clip.mp4"]), M, "is list"),
    Mistake("a file that is not there", changed("ave", video="clip2.mp4"), "missing", "clip2.mp4 is missing", True),
    Mistake("a folder for a video", changed("ave", video="many"), "missing", "is a folder", True),
    Mistake(
        "a video for a folder of frames",
        [{**without("ave", "video")[0], "frames": "clip.mp4"}],
        "missing",
        "is no folder",
    ),
    Mistake("sound of another length", changed("ave", audio="short.wav"), W, "4.00 s of sound for 10.00", True),
    Mistake(
        "the sound of another clip",
        [{**good("ave"), "video": "many/1.mp4"}, {**good("ave", end=6), "id": "b", "audio": "many/1.wav"}],
        W,
        "sound of many/1.mp4",
    ),
    Mistake("an unknown field", changed("ave", vidoe="clip.mp4"), M, "unknown field"),
    Mistake(
        "a record of LLaVA",
        [
            {
                "id": "1",
                "video": "clip.mp4",
                "conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "A dog."}],
            }
        ],
        M,
        "missing field",
    ),
    # The file as a whole.
    Mistake("NaN", text_of("ave", lambda text: text.replace('"start": 2', '"start": NaN')), M, "NaN is no number"),
    Mistake("a comma before the brace", text_of("ave", lambda text: text[:-1] + ",}"), M, "not valid JSON"),
    Mistake("single quotes", text_of("ave", lambda text: str(json.loads(text))), M, "not valid JSON"),
    Mistake("typographic quotes", text_of("ave", lambda text: text.replace('"', "\u201d")), M, "not valid JSON"),
    Mistake(
        "None, True or nan of Python",
        text_of("ave", lambda text: text.replace('"start": 2', '"start": None')),
        M,
        "not valid JSON",
    ),
    Mistake("a JSON list on one line", text_of("ave", lambda text: f"[{text}]"), M, "JSON object"),
    Mistake("a JSON list over several lines", text_of("ave", lambda text: f"[\n{text}\n]"), M, "not valid JSON"),
    Mistake(
        "a record over several lines",
        text_of("ave", lambda text: json.dumps(json.loads(text), indent=1)),
        M,
        "not valid JSON",
    ),
    Mistake("CSV named .jsonl", b"id,task,video\n1,ave,clip.mp4\n", M, "not valid JSON"),
    Mistake("UTF-16", text_of("ave", lambda text: text.encode("utf-16")), M, "not UTF-8"),
    Mistake(
        "Western Windows text",
        text_of("ave", lambda text: text.replace("ave-1", "caf\u00e9").encode("cp1252")),
        M,
        "not UTF-8",
    ),
    Mistake("a key twice", text_of("ave", lambda text: text[:-1] + ', "id": "b"}'), M, "comes twice"),
]


@pytest.fixture(scope="module")
def media_root(tmp_path_factory) -> Path:
    """The clips, sounds, pictures and masks that the records name."""
    root = tmp_path_factory.mktemp("media")
    (root / "many").mkdir()
    write_video(root / "clip.mp4", 100, seconds=10.0)
    for i in range(12):
        (root / f"many/{i}.mp4").symlink_to("../clip.mp4")
    for name, seconds in (("long", 30), ("short", 5), ("minute", 61)):
        write_video(root / f"{name}.mp4", 10 * seconds, seconds=seconds)
    write_audio(root / "clip.wav", 10.0)
    write_audio(root / "many/1.wav", 10.0)
    write_audio(root / "short.wav", 4.0)
    pixels = np.random.default_rng(0).integers(1, 256, (32, 48, 3)).astype(np.uint8)
    mask = np.zeros((32, 48), np.uint8)
    mask[8:20, 10:30] = 255
    for name, content in (
        ("picture", pixels),
        ("photo", pixels),
        ("mask", mask),
        ("inverted", 255 - mask),
        ("small", mask[::2, ::2]),
        ("classes", mask // 255 * 18),
        ("many", mask // 255 * 90),
    ):
        write_picture(root / f"{name}.png", content)
    return root


@pytest.fixture(scope="module")
def facts(media_root) -> dict[str, Any]:
    """What decoding shows of each file, taken once."""
    return {}


def problems(root: Path, facts: dict[str, Any]) -> list[Problem]:
    """What `validate` says of the lists of a root, files decoded in this process and once for all tests."""
    for task in files(root, (), None):
        if task[1:] not in facts:
            facts[task[1:]] = examine(task)
    return status(root, (), None, Look(root, {path: facts[path, uses] for _, path, uses in files(root, (), None)}))[1]


def write(root: Path, media_root: Path, rows: list[dict[str, Any]] | bytes, split: str = "train") -> Path:
    for path in media_root.iterdir():
        if not (root / path.name).exists():
            (root / path.name).hardlink_to(path) if path.is_file() else _linked(path, root / path.name)
    content = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
    (root / f"{split}.jsonl").write_bytes(content)
    return root


def _linked(folder: Path, to: Path) -> None:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).hardlink_to(path.resolve())


def training(root: Path) -> list[str]:
    """What training says before it starts: of the example that it refuses, or of what looks odd."""
    labels = mistakes.TrainingLabels(root, "train")
    try:
        for example in read_examples(root, "train"):
            labels.check(example)
    except InputError as error:
        return [M, str(error)]
    return [W, labels.first_odd] if labels.odd else []


@pytest.mark.parametrize("task", TASKS)
def test_what_is_right_is_said_to_be_right(task, media_root, facts, tmp_path):
    write(tmp_path, media_root, [good(task)])
    assert problems(tmp_path, facts) == [] and training(tmp_path) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_no_mistake_passes_unseen(mistake, media_root, facts, tmp_path):
    write(tmp_path, media_root, mistake.rows)
    found = [p for p in problems(tmp_path, facts) if p.kind == mistake.verdict and re.search(mistake.said, p.problem)]
    assert found, problems(tmp_path, facts)
    if mistake.decoded:
        assert training(tmp_path)[:1] in ([], [W])  # for `validate`, which decodes and knows the benchmarks
        return
    kind, said = training(tmp_path)
    assert kind == (M if mistake.verdict in (M, "missing") else W)
    assert re.search(r"train\.jsonl(:\d+)?", said) and "\n" not in said, said


def test_the_same_clip_in_train_and_test_is_a_leak(media_root, facts, tmp_path):
    write(tmp_path, media_root, [good("ave")])
    write(tmp_path, media_root, [{**good("ave"), "id": "other"}], "test")
    assert [p.kind for p in problems(tmp_path, facts)] == ["leak"]


@pytest.mark.parametrize(("name", "fix"), [("train.jsonl.txt", "rename it"), ("train.csv", "own --csv")])
def test_a_list_under_another_name_is_pointed_out(name, fix, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / name).write_text("[]")
    (found,) = [p for p in status(tmp_path, (), None)[1] if p.dataset == "own" and p.split == "train"]
    assert found.kind == M and name in found.problem
    with pytest.raises(InputError, match=fix):
        read_examples(tmp_path, "train", ["own"])


def test_examples_in_a_json_list_are_not_taken_for_samples_of_the_quick_start(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/train.json").write_text(json.dumps([good("ave")]))
    found = [p for p in status(tmp_path, (), None)[1] if p.dataset == "own" and p.split == "train"]
    assert [p.kind for p in found] == [M]


def test_windows_line_ends_and_a_byte_order_mark_are_no_mistake(media_root, facts, tmp_path):
    write(tmp_path, media_root, b"\xef\xbb\xbf" + json.dumps(good("ave")).encode() + b"\r\n\r\n")
    assert problems(tmp_path, facts) == [] and training(tmp_path) == []


def test_the_line_is_named_and_skipping_leaves_the_row_out(media_root, tmp_path, tokenizer):
    from data_pipelines import mixture
    from data_pipelines.batching import DataConfig

    bad = {**good("ave", start=3, end=3), "id": "Bark"}  # its id is in the other row's text too
    write(tmp_path, media_root, [good("ave"), bad])
    examples, labels = read_examples(tmp_path, "train"), mistakes.TrainingLabels(tmp_path, "train")
    settings = {"image_size": 16, "visual_queries": 1, "audio_queries": 1}
    with pytest.raises(InputError, match=r"train\.jsonl:2 \[meta\]: .* lasts from 3 to 3.*; the end is"):
        mixture.train_order(examples, tokenizer, DataConfig(**settings), 1, check=labels.check)
    order = mixture.train_order(
        examples,
        tokenizer,
        DataConfig(**settings, on_error="skip"),
        1,
        skipped=tmp_path / "skipped",
        check=mistakes.TrainingLabels(tmp_path, "train").check,
    )
    assert [index for group in order.groups.values() for index in group] == [0]
    (skipped,) = map(json.loads, (tmp_path / "skipped").read_text().splitlines())
    assert skipped["index"] == 1 and "train.jsonl:2" in skipped["error"]


def test_a_run_refuses_a_wrong_label_before_it_starts(media_root, tmp_path):
    write(tmp_path, media_root, [good("ave"), {**changed("ave", {"end": 6})[0], "id": "b"}])
    run = tiny.get_config()
    run.data.root, run.data.batch_size = str(tmp_path), 1
    with pytest.raises(InputError, match=r"train\.jsonl:2 \[target\]: the range is 2,5, the label says 2,6; write"):
        run_data.train_order(resolve(run), run_folder.tokenizer_of(resolve(run)))
    run.data.on_error = "skip"
    order = run_data.train_order(resolve(run), run_folder.tokenizer_of(resolve(run)), tmp_path / "skipped")
    assert order.batches[0].tolist() == [0] and len((tmp_path / "skipped").read_text().splitlines()) == 1


def test_a_run_of_other_than_ten_frames_refuses_the_mask_of_a_tenth(media_root, tmp_path):
    write(tmp_path, media_root, [good("s4")])
    run = tiny.get_config()
    run.data.root, run.data.batch_size, run.data.video_frames = str(tmp_path), 1, 5
    with pytest.raises(InputError, match="data.video_frames.*is 5, but example 's4-1' has the mask of a tenth"):
        run_data.train_order(resolve(run), run_folder.tokenizer_of(resolve(run)))


def test_validate_exits_3_over_a_label(media_root, tmp_path):
    write(tmp_path, media_root, changed("ave", {"end": 12}))
    with pytest.raises(SystemExit) as done:
        main(["--root", str(tmp_path), "--workers", "1"])
    assert done.value.code == BAD


def test_releases_are_not_looked_at(releases_root):
    look = mistakes.Lists()
    found = read_examples(releases_root, "train", ["ave"])
    assert found and not [p for example in found for p in look.look("ave", "train", example, 0.0)]


def test_no_release_written_as_a_list_is_called_malformed(releases_root):
    """But for training clips without an answer, which are nothing to learn from."""
    for name, dataset in DATASETS.items():
        for split in dataset.sizes:
            look = mistakes.Mistakes(split == "train")
            found = [one for example in records(releases_root, name, split) for one in look.of(example)]
            assert {one.problem for one in found if one.kind == M} <= {"is empty, so there is nothing to learn"}, name


def test_the_document_lists_every_mistake_with_its_verdict():
    text = (REPOSITORY / "docs/your_data.md").read_text()
    listed = dict(re.findall(r"^\| (.+?) \| (\w+) \| .* \|$", text, re.MULTILINE))
    assert {m.name: m.verdict for m in MISTAKES} == {k: v for k, v in listed.items() if v in KINDS}
    assert len(MISTAKES) >= 50
