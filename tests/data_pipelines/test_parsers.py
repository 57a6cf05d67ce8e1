"""Properties of every parser of annotations: any bytes are rows or InputErrors, and sound rows come back as written."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from crab_jax.io.errors import InputError
from crab_jax.io.structured import json_line, strict_json
from crab_jax.tasks import ave as ave_task
from crab_jax.tasks.avs_classes import CLASSES
from data_pipelines.datasets import DATASETS, records
from data_pipelines.examples import MASK_KINDS, TASK_NAMES, WINDOWS, Example, to_json
from data_pipelines.sources import ave, avqa, avsbench, avvp, own
from data_pipelines.sources.release import Release

COUNTS = pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.exhaustive)])
# The annotation files of each dataset's train (in LLP test, which has dense labels too).
FILES = {
    "ave": ["trainSet.txt"],
    "avvp": ["AVVP_test_pd.csv", "AVVP_eval_audio.csv", "AVVP_eval_visual.csv"],
    "avqa": ["json_update/avqa-train.json"],
    "avqa_original": ["json/avqa-train.json"],
    "s4": ["metadata.csv", "label2idx.json"],
    "ms3": ["metadata.csv"],
    "avss": ["metadata.csv"],
    "arig": ["metadata.csv"],
    "s4_object": ["Single-source/s4_meta_data.csv"],
    "ms3_object": ["Multi-sources/ms3_meta_data.csv"],
    "arig_object": ["Single-source/s4_meta_data.csv"],
    "ref_avs": ["metadata.csv"],
    "valor": ["desc_train.json"],
    "video_llava": ["llava_image_.json", "valley_.json"],
    "audiocaps": ["dataset/train.csv"],
    "lvis": ["lvis_v1_train.json"],
    "own": ["train.jsonl"],
}
HEADERS = {
    "avvp": "filename\tonset\toffset\tevent_labels",
    "s4": "uid,a_obj,split,label",
    "ref_avs": "vid,uid,split,fid,exp",
    "s4_object": "name,start,category,split",
    "ms3_object": "video_id,split",
    "audiocaps": "audiocap_id,youtube_id,start_time,caption",
}
LETTERS = "ABYZabyz019_-"
CLIP = st.text(LETTERS, min_size=11, max_size=11)
WORDS = st.text(st.characters(exclude_characters="\0\r\n<>", exclude_categories=("Cs",)), max_size=20)
SPACED = WORDS.filter(lambda text: not re.fullmatch(r"(nan|NaN|<NA>|None|NULL|#?N/A)?", text.strip()))  # says something
STYLE = st.tuples(st.sampled_from(["\n", "\r\n"]), st.booleans())  # line ends, byte order mark


def hold(count, strategy, check):
    """`check(value)` for `count` values of a strategy, the same ones in every run."""
    settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )(given(strategy)(check))()


def put(root: Path, name: str, text: str | bytes, style: tuple[str, bool] = ("\n", False)) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(text, str):
        text = (b"\xef\xbb\xbf" if style[1] else b"") + text.replace("\n", style[0]).encode()
    path.write_bytes(text)


def lines_of(rows, separator=",") -> str:
    """The rows as a table, quoted where that is needed."""
    file = io.StringIO()
    csv.writer(file, delimiter=separator, lineterminator="\n").writerows(rows)
    return file.getvalue()


def read(name: str, root: Path, split: str = "train") -> list[Example]:
    """The Examples of a dataset whose folder is `root`, none of whose media are there."""
    found = list(DATASETS[name].read(Release(root), split, "train"))
    assert all(isinstance(example, Example) for example in found), found
    return found


def split_of(name: str) -> str:
    return "test" if name == "avvp" else "train"


# Anything at all.


@COUNTS
@pytest.mark.parametrize("name", DATASETS)
def test_any_bytes_are_examples_or_input_errors(tmp_path, name, count):
    header = HEADERS.get(name, "").encode()
    cells = st.lists(st.lists(WORDS, min_size=1, max_size=6), max_size=4).map(
        lambda rows: header + b"\n" + lines_of(rows, "\t" if name == "avvp" else ",").encode()
    )
    content = st.one_of(
        st.binary(max_size=80), st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")), cells
    )

    def check(contents):
        for file, data in zip(FILES[name], contents, strict=True):
            put(tmp_path, f"{DATASETS[name].folder}/{file}", data)
        try:
            assert all(isinstance(found, Example | InputError) for found in records(tmp_path, name, split_of(name)))
        except InputError as error:
            assert str(tmp_path) in error.where

    hold(count, st.tuples(*[content] * len(FILES[name])), check)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=9,
)


@COUNTS
def test_json_comes_back_and_nothing_of_it_is_lost(count):
    def check(drawn):
        value, ascii_only = drawn
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert strict_json(text) == json_line(text, "x:1") == value
        with pytest.raises(ValueError, match="comes twice"):
            strict_json(f'{{"a": {text}, "b": 1, "a": {text}}}')

    hold(count, st.tuples(JSON, st.booleans()), check)


@COUNTS
def test_any_text_is_json_that_can_be_written_again_or_an_input_error(count):
    def check(text):
        try:
            value = json_line(text, "x:1")
        except InputError as error:
            assert error.where == "x:1"
            return
        assert json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value

    pieces = st.lists(
        st.sampled_from(['"', "\\ud83d", "\\ude00", "\\", "a", "[", "]", "{", "}", ":", ",", "1", "NaN"]), max_size=12
    ).map("".join)
    hold(4 * count, st.text(max_size=20) | pieces | pieces.map(lambda t: f'"{t}"'), check)


# Sound rows.


@COUNTS
def test_ave(tmp_path, count):
    row = st.tuples(st.sampled_from(ave.CATEGORIES), CLIP, st.integers(0, 9), st.integers(1, ave_task.SECONDS)).filter(
        lambda r: r[2] < r[3]
    )

    def check(value):
        rows, header, style = value
        text = "".join(f"{event}&{clip}&good&{start}&{end}\n" for event, clip, start, end in rows)
        put(tmp_path, "trainSet.txt", ("&".join(ave.COLUMNS) + "\n" if header else "") + text, style)
        found = read("ave", tmp_path)
        assert [tuple(e.meta[k] for k in ("event", "video", "start", "end")) for e in found] == rows
        assert [e.target for e in found] == [ave_task.target(event, start, end) for event, _, start, end in rows]
        assert [e.video for e in found] == [f"AVE/{clip}.mp4" for _, clip, _, _ in rows]

    hold(count, st.tuples(st.lists(row, min_size=1, max_size=4), st.booleans(), STYLE), check)


@COUNTS
def test_llp(tmp_path, count):
    times = st.tuples(st.integers(0, 999), st.sampled_from(["", ".8"])).map(lambda t: f"{t[0]}{t[1]}")
    name = st.tuples(CLIP, times, times).map("_".join)
    label = st.sampled_from(avvp.CATEGORIES)
    clips = st.dictionaries(name, st.lists(label, min_size=1, max_size=3, unique=True), min_size=1, max_size=3)

    def vectors(rows, clip):
        seen = np.zeros((len(avvp.CATEGORIES), 10), bool)
        for of, onset, offset, event in rows:
            if of == clip:
                seen[avvp.CATEGORIES.index(event), onset:offset] = True
        return seen

    def check(data):
        weak, style = data.draw(st.tuples(clips, STYLE))
        dense = {
            kind: data.draw(
                st.lists(
                    st.tuples(
                        st.sampled_from([*weak, "a_clip_of_no_split"]), st.integers(0, 10), st.integers(0, 10), label
                    ),
                    max_size=6,
                )
            )
            for kind in avvp.DENSE
        }
        put(
            tmp_path,
            "AVVP_test_pd.csv",
            lines_of(
                [("filename", "event_labels"), *((clip, ",".join(labels)) for clip, labels in weak.items())], "\t"
            ),
            style,
        )
        for kind, rows in dense.items():
            table = [("filename", "onset", "offset", "event_labels"), *rows]
            put(tmp_path, avvp.DENSE[kind], lines_of(table, "\t"), style)
        found = read("avvp", tmp_path, "test")
        assert {e.id: e.meta["labels"] for e in found} == weak
        for e in found:
            assert e.video.endswith(f"/{e.id[:11]}.mp4")
            for kind, rows in dense.items():
                spans = [(e.id, start, end, event) for event, start, end in e.meta[kind]]
                np.testing.assert_array_equal(vectors(spans, e.id), vectors(rows, e.id))

    hold(count, st.data(), check)


@COUNTS
def test_music_avqa(tmp_path, count):
    words = st.lists(st.text("abc,'", min_size=1, max_size=5), min_size=1, max_size=5)

    def check(data):
        rows, wanted = [], []
        for number in data.draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=3, unique=True)):
            text = data.draw(words)
            slots = data.draw(st.lists(st.text("xyz _", min_size=1, max_size=6), max_size=3))
            template = " ".join([*text, *["<Object>"] * len(slots)]) + data.draw(st.sampled_from(["?", "\uff1f", "? "]))
            video = data.draw(st.sampled_from(["00000093", "va00000012", "esa00000500"]))
            answer = data.draw(st.sampled_from(avqa.ANSWERS))
            rows.append(
                {
                    "video_id": video,
                    "question_id": number,
                    "type": '["Audio-Visual", "Counting"]',
                    "question_content": template,
                    "templ_values": json.dumps(slots),
                    "question_deleted": 0,
                    "anser": answer,
                }
            )
            wanted.append((str(number), f"videos/{video}.mp4", answer, (" ".join([*text, *slots]) + "?").strip()))
        put(
            tmp_path,
            "json_update/avqa-train.json",
            json.dumps(rows, indent=data.draw(st.sampled_from([None, 4]))),
            data.draw(STYLE),
        )
        assert [(e.id, e.video, e.meta["answer"], e.meta["question"]) for e in read("avqa", tmp_path)] == wanted

    hold(count, st.data(), check)


@COUNTS
def test_avsbench_semantic(tmp_path, count):
    objects = st.lists(st.sampled_from(CLASSES), min_size=1, max_size=3).map("_".join) | st.sampled_from(
        avsbench.S4_CATEGORIES
    )
    row = st.tuples(
        CLIP,
        st.sampled_from(["", "_3", "_0_5000"]),
        objects,
        st.sampled_from(avsbench.SPLITS),
        st.sampled_from(["v1s", "v1m", "v2"]),
        WORDS,
    )

    def check(value):
        rows, order, style = value
        columns = ("uid", "a_obj", "split", "label", "note")
        table = [(f"{clip}{end}", *rest) for clip, end, *rest in rows]
        put(tmp_path, "metadata.csv", lines_of([[row[i] for i in order] for row in (columns, *table)]), style)
        for name, part, frames in (("ms3", "v1m", 5), ("avss", "v2", 10)):
            mine = [row for row in table if row[2:4] == ("train", part)]
            found = read(name, tmp_path)
            assert [e.meta["video"] for e in found[::frames]] == [uid for uid, *_ in mine]
            assert ["_".join(e.meta["objects"]).replace(" ", "_") for e in found[::frames]] == [r[1] for r in mine]
            assert all(e.audio == f"{part}/{e.meta['video']}/audio.wav" and len(e.frames) == frames for e in found)

    hold(count, st.tuples(st.lists(row, min_size=1, max_size=5), st.permutations(range(5)), STYLE), check)


@COUNTS
def test_avsbench_object(tmp_path, count):
    row = st.tuples(CLIP, st.integers(0, 6), st.sampled_from(avsbench.S4_CATEGORIES), st.sampled_from(avsbench.SPLITS))

    def check(value):
        rows, style = value
        table = [("name", "start", "category", "split"), *rows]
        put(tmp_path, "Single-source/s4_meta_data.csv", lines_of(table), style)
        put(
            tmp_path,
            "Multi-sources/ms3_meta_data.csv",
            lines_of([("video_id", "split"), *((clip, split) for clip, _, _, split in rows)]),
            style,
        )
        for split in avsbench.SPLITS:
            mine = [row for row in rows if row[3] == split]
            s4, ms3 = read("s4_object", tmp_path, split), read("ms3_object", tmp_path, split)
            step = 1 if split == "train" else 5
            assert [e.meta["video"] for e in s4[::step]] == [e.meta["video"] for e in ms3[::5]] == [r[0] for r in mine]
            assert [e.audio for e in s4[::step]] == [
                f"Single-source/s4_data/audio_wav/{split}/{category}/{clip}.wav" for clip, _, category, _ in mine
            ]

    hold(count, st.tuples(st.lists(row, min_size=1, max_size=4), STYLE), check)


@COUNTS
def test_ref_avs(tmp_path, count):
    row = st.tuples(
        st.sampled_from(["", "null_c-", "null_m-"]),
        CLIP,
        st.sampled_from(["cat", "hair-dryer"]),
        st.integers(1, 6),
        st.sampled_from(["train", "val", "test_s", "test_u", "test_n", "TODO"]),
        st.integers(0, 32),
        SPACED,
    )

    def check(value):
        rows, style = value
        table, wanted = [], []
        for prefix, clip, thing, number, split, fid, text in rows:
            video = f"{clip}_1000_11000"
            thing = "null" if prefix else thing
            table.append((video, f"{prefix}{video}_{thing}_{number}", split, fid, text))
            if split == "train":
                wanted.append((" ".join(text.split()), "" if prefix else thing, f"media/{prefix}{video}/audio.wav"))
        put(tmp_path, "metadata.csv", lines_of([("vid", "uid", "split", "fid", "exp"), *table]), style)
        found = read("ref_avs", tmp_path)
        assert [(e.meta["expression"], e.meta["object"], e.audio) for e in found[::10]] == wanted
        assert [e.second for e in found] == list(range(10)) * len(wanted)

    hold(count, st.tuples(st.lists(row, min_size=1, max_size=4), STYLE), check)


@COUNTS
def test_valor(tmp_path, count):
    row = st.tuples(CLIP, st.integers(0, 500), SPACED)

    def check(value):
        rows, ascii_only, style = value
        items = [{"video_id": f"{clip}_{start}.000_{start + 10}.000", "desc": text} for clip, start, text in rows]
        put(tmp_path, "desc_train.json", json.dumps(items, ensure_ascii=ascii_only), style)
        found = read("valor", tmp_path)
        assert [(e.id, e.meta["captions"]) for e in found] == [(i["video_id"], [i["desc"].strip()]) for i in items]

    hold(count, st.tuples(st.lists(row, max_size=4), st.booleans(), STYLE), check)


@COUNTS
def test_video_llava(tmp_path, count):
    row = st.tuples(
        st.sampled_from(["image", "video"]),
        st.integers() | st.text("abc1", min_size=1, max_size=5),
        WORDS,
        SPACED,
        st.booleans(),
    )

    def check(rows):
        items, wanted = [], []
        for kind, number, question, answer, first in rows:
            asked = f"<{kind}>\n{question}" if first else f"{question}\n<{kind}>"
            items.append(
                {
                    "id": number,
                    kind: f"valley/{len(items)}/x.mp4",
                    "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}],
                }
            )
            text = " ".join(answer.split())
            wanted.append((f"{kind}-{number}", " ".join(question.split()), text + ("" if text[-1] in ".!?" else ".")))
        put(tmp_path, "valley_.json", json.dumps(items))
        found = read("video_llava", tmp_path)
        assert [(e.id, e.instruction.partition("question:\n")[2], e.target) for e in found] == wanted
        assert [e.image or e.video for e in found] == [f"valley/{n}/x.mp4" for n in range(len(items))]

    hold(count, st.lists(row, max_size=4), check)


@COUNTS
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_audiocaps(tmp_path, kind, count):
    clips = st.dictionaries(
        st.tuples(CLIP, st.integers(0, 500)), st.lists(SPACED, min_size=1, max_size=5), min_size=1, max_size=3
    )

    def check(value):
        captions, style = value
        header = ("audiocap_id", "youtube_id", "start_time", "caption")
        rows = [
            (100 * n + k, clip, start, text)
            for n, ((clip, start), texts) in enumerate(captions.items())
            for k, text in enumerate(texts)
        ]
        if kind == "csv":
            put(tmp_path, "train.csv", lines_of([header, *rows]), style)
        else:
            put(tmp_path, "train.json", json.dumps([dict(zip(header, row, strict=True)) for row in rows]), style)
        found = read("audiocaps", tmp_path)
        assert [e.id for e in found] == [f"{clip}_{start}" for clip, start in captions]
        assert [e.meta["captions"] for e in found] == [[text.strip() for text in texts] for texts in captions.values()]
        assert [e.audio for e in found] == [f"data/{100 * n}.wav" for n in range(len(captions))]

    hold(count, st.tuples(clips, STYLE), check)


@COUNTS
def test_lvis(tmp_path, count):
    corner = st.integers(0, 30).map(float)
    box = st.tuples(corner, corner, st.integers(8, 30).map(float), st.integers(8, 30).map(float))

    def check(value):
        boxes, name, area, folder = value
        outlines = [[x, y, x + w, y, x + w, y + h, x, y + h] for x, y, w, h in boxes]
        content = {
            "images": [{"id": 7, "width": 64, "height": 48, "coco_url": f"http://x.org/{folder}/000000000007.jpg"}],
            "categories": [{"id": 3, "name": name, "def": "a thing"}],
            "annotations": [{"id": 9, "image_id": 7, "category_id": 3, "area": area, "segmentation": outlines}],
        }
        put(tmp_path, "lvis_v1_train.json", json.dumps(content))
        found = read("lvis", tmp_path)
        assert len(found) == (area >= 1000)
        for e in found:
            assert (e.id, e.image, e.meta["objects"]) == ("9", f"{folder}/000000000007.jpg", [name])
            size, _, counts = e.mask.removeprefix("rle:").partition(":")
            mask = coco.decode({"size": [int(n) for n in size.split("x")], "counts": counts.encode()})
            inside = np.zeros((48, 64), bool)
            for x, y, w, h in boxes:
                inside[int(y) + 1 : int(y + h), int(x) + 1 : int(x + w)] = True
            assert mask.shape == (48, 64) and mask[inside].all()

    hold(
        count,
        st.tuples(
            st.lists(box, min_size=1, max_size=3),
            WORDS,
            st.sampled_from([999.5, 1000, 5e4]),
            st.sampled_from(["train2017", "val2017"]),
        ),
        check,
    )


@COUNTS
def test_own(tmp_path, count):
    path = (
        st.lists(
            st.text("ab \u526a.-", min_size=1, max_size=6).filter(lambda p: p not in (".", "..")),
            min_size=1,
            max_size=3,
        )
        .map("/".join)
        .filter(lambda p: not p.startswith("~"))
    )
    maybe = st.none() | path

    def check(data):
        examples = []
        for number in data.draw(st.lists(WORDS, min_size=1, max_size=3, unique=True)):
            video = data.draw(maybe)
            examples.append(
                Example(
                    id=number,
                    task=data.draw(st.sampled_from(TASK_NAMES)),
                    instruction=data.draw(WORDS),
                    target=data.draw(WORDS),
                    video=video,
                    image=data.draw(maybe),
                    audio=data.draw(maybe),
                    frames=() if video else tuple(data.draw(st.lists(path, max_size=3))),
                    windows=data.draw(st.sampled_from(WINDOWS)),
                    second=data.draw(st.none() | st.integers()),
                    seg_image=data.draw(maybe),
                    mask=data.draw(maybe | st.just("rle:empty")),
                    mask_kind=data.draw(st.sampled_from(MASK_KINDS)),
                    meta=data.draw(st.dictionaries(WORDS, JSON, max_size=2)),
                )
            )
        ascii_only = data.draw(st.booleans())
        put(
            tmp_path,
            "train.jsonl",
            "".join(json.dumps(to_json(e), ensure_ascii=ascii_only) + "\n" for e in examples),
            data.draw(STYLE),
        )
        found = list(own.read(Release(tmp_path), "train", "train"))
        for example, back in zip(examples, found, strict=True):
            assert to_json(back) == {**to_json(example), "meta": {**example.meta, "row": back.meta["row"]}}

    hold(count, st.data(), check)
