"""Annotation files as people have them: saved again by other programs, damaged in places, in Crab's own layout."""

import csv
import dataclasses
import io
import json
import logging
import re
from pathlib import Path

import pytest
import releases

from configs import tiny
from crab_jax.config import resolve
from crab_jax.io.errors import InputError
from crab_jax.runs import run_data, run_folder
from crab_jax.tasks import TASKS, avvp
from crab_jax.tasks.avs_classes import CLASSES
from data_pipelines.datasets import DATASETS, list_of, read, read_examples, read_jsonl, records
from data_pipelines.examples import TASK_NAMES, Example, write_jsonl
from data_pipelines.prepare import main as prepare
from data_pipelines.sources.avsbench import S4_CATEGORIES, object_names
from data_pipelines.sources.release import MissingFile, Release, Row, safe_name
from data_pipelines.status import status, table

# (dataset, split, file, columns, delimiter, quoted) of every table
TABLES = [
    ("ave", "train", "trainSet.txt", ("Category", "VideoID", "Quality", "StartTime", "EndTime"), "&"),
    ("avvp", "train", "data/AVVP_train.csv", ("filename", "event_labels"), "\t"),
    ("avvp", "test", "data/AVVP_eval_audio.csv", ("filename", "onset", "offset", "event_labels"), "\t"),
    ("ms3", "test", "metadata.csv", ("uid", "a_obj", "split", "label"), ","),
    ("s4_object", "test", "Single-source/s4_meta_data.csv", ("name", "category", "split"), ","),
    ("ms3_object", "test", "Multi-sources/ms3_meta_data.csv", ("video_id", "split"), ","),
    ("ref_avs", "train", "metadata.csv", ("vid", "uid", "split", "fid", "exp"), ","),
    ("audiocaps", "train", "dataset/train.csv", ("audiocap_id", "youtube_id", "start_time", "caption"), ","),
]
LISTS = [
    ("avqa", "data/json_update/avqa-train.json", "question_id"),
    ("valor", "desc_train.json", "video_id"),
    ("video_llava", "valley_.json", "id"),
]


def path_of(root, name, file):
    return root / DATASETS[name].folder / file


def rows_of(path, columns, delimiter):
    """The table as lists of cells, its header first."""
    lines = path.read_bytes().decode("utf-8-sig").splitlines()
    reader = csv.reader(lines, delimiter=delimiter) if delimiter == "," else (line.split(delimiter) for line in lines)
    rows = [row for row in reader if row]
    return rows if set(columns) <= set(rows[0]) else [list(columns), *rows]


def saved(rows, delimiter, quoting=csv.QUOTE_MINIMAL):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=quoting).writerows(rows)
    return file.getvalue()


def as_float(rows):
    """Whole numbers as pandas writes a column of them that has a gap."""
    return [[f"{cell}.0" if re.fullmatch(r"\d{1,3}", cell) else cell for cell in row] for row in rows]


# What other programs make of a table, all of which says the same.
SAME = {
    "byte order mark": lambda rows, d: "\ufeff" + saved(rows, d),
    "crlf": lambda rows, d: saved(rows, d).replace("\n", "\r\n"),
    "doubled cr": lambda rows, d: saved(rows, d).replace("\n", "\r\r\n"),
    "every field quoted": lambda rows, d: saved(rows, d, csv.QUOTE_ALL),
    "semicolons": lambda rows, d: saved(rows, ";"),
    "tabs": lambda rows, d: saved(rows, "\t"),
    "an index column": lambda rows, d: saved([[str(n or ""), *row] for n, row in enumerate(rows)], d),
    "another order": lambda rows, d: saved([row[::-1] for row in rows], d),
    "extra columns": lambda rows, d: saved([[*row, "note"] for row in rows], d),
    "delimiters at the end": lambda rows, d: saved([rows[0], *([*row, "", ""] for row in rows[1:])], d),
    "spaces around": lambda rows, d: saved([[f" {cell} " for cell in row] for row in rows], d),
    "a header in capitals": lambda rows, d: saved([[c.upper() for c in rows[0]], *rows[1:]], d),
    "floats": lambda rows, d: saved(as_float(rows), d),
}


@pytest.mark.parametrize("change", SAME)
@pytest.mark.parametrize(
    ("name", "split", "file", "columns", "delimiter"), TABLES, ids=[f"{t[0]}-{t[2].rpartition('/')[2]}" for t in TABLES]
)
def test_a_table_that_was_saved_again_says_the_same(copied, name, split, file, columns, delimiter, change):
    root = copied(DATASETS[name].folder)
    before, path = read(root, name, split), path_of(root, name, file)
    releases.text(path, SAME[change](rows_of(path, columns, delimiter), delimiter))
    after = read(root, name, split)

    def said(examples):  # AVE's own file has no header: its lines move by one
        return [dataclasses.replace(e, meta={k: v for k, v in e.meta.items() if k != "row"}) for e in examples]

    assert said(after) == said(before)


# (dataset, split, file, text in it, what stands there instead, field, part of the message): one row is malformed.
MALFORMED = [
    ("ave", "train", "trainSet.txt", b"good&7&10", b"good&7", "", "4 fields, not 5"),
    ("ave", "train", "trainSet.txt", b"Violin, fiddle", b"Viol\xedn, fiddle", "", "not UTF-8"),
    ("avvp", "train", "data/AVVP_train.csv", b"Speech,Dog", b"nan", "event_labels", "unknown value 'nan'"),
    ("ms3", "train", "metadata.csv", b"jlhuZfcw61w,jl", b"x,nan,0,0,dog,train,v1m\njlhuZfcw61w,jl", "uid", "look like"),
    ("ms3", "train", "metadata.csv", b"jlhuZfcw61w,jl", b"x,,0,0,dog,train,v1m\njlhuZfcw61w,jl", "uid", "look like"),
    ("ms3", "train", "metadata.csv", b"jlhuZfcw61w,jl", b"x,y,0,0,dog,train\njlhuZfcw61w,jl", "", "6 fields, not 7"),
    (
        "s4_object",
        "val",
        "Single-source/s4_meta_data.csv",
        b"XVlnx4ofu2k,",
        b"1.2E+10,1,helicopter,val\nXVlnx4ofu2k,",
        "name",
        "spreadsheet",
    ),
    ("ref_avs", "train", "metadata.csv", b"The object making the longest sound duration.", b"nan", "exp", "is empty"),
    ("ref_avs", "train", "metadata.csv", b"making the longest", b"making the \x93longest\x94", "", "not UTF-8"),
    ("audiocaps", "train", "dataset/train.csv", b"A woman talks nearby as water pours", b"NaN", "caption", "is empty"),
    ("audiocaps", "train", "dataset/train.csv", b"11542,", b"91139,", "audiocap_id", "duplicate id"),
    ("audiocaps", "train", "dataset/train.csv", b"11542,", b"1.1542E+04,", "audiocap_id", "whole number"),
    ("avqa", "train", "data/json_update/avqa-train.json", b'"va00000093"', b"93", "video_id", "leading zeros"),
    ("avqa", "train", "data/json_update/avqa-train.json", b'"va00000093"', b'"93"', "video_id", "leading zeros"),
    ("avqa", "train", "data/json_update/avqa-train.json", b'"three"', b"null", "anser", "is missing"),
    ("avqa", "train", "data/json_update/avqa-train.json", b'"three"', b"NaN", "anser", "not text"),
    ("avqa", "train", "data/json_update/avqa-train.json", b"sounding", b"sound\xefng", "", "not UTF-8"),
    ("valor", "train", "desc_train.json", b'"0_3-a_bcdef_0.000_7.000"', b"null", "video_id", "is missing"),
    (
        "video_llava",
        "train",
        "valley_.json",
        b'"human", "value": "<video>',
        b'"system", "value": "<video>',
        "conversations[0]",
        "said by 'system'",
    ),
    ("own", "train", "train.jsonl", b'"A drum."', b'"A dr\xfcm."', "", "not UTF-8"),
    ("own", "train", "train.jsonl", b'{"captions": ["A drum."]}', b'{"captions": ["A drum."]', "", "not valid JSON"),
    ("own", "train", "train.jsonl", b'{"captions": ["A drum."]}', b'{"one_of": 3}', "meta", "must be text"),
]


@pytest.mark.parametrize(
    ("name", "split", "file", "old", "new", "field", "message"),
    MALFORMED,
    ids=[f"{row[0]}-{n}" for n, row in enumerate(MALFORMED)],
)
def test_a_malformed_row_stops_or_is_skipped_counted_and_listed(
    copied, caplog, name, split, file, old, new, field, message
):
    root = copied(DATASETS[name].folder)
    before, path = read(root, name, split), path_of(root, name, file)
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.unlink()
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as raised:
        read(root, name, split, missing="skip")
    assert re.match(rf"{re.escape(str(path))}:(item )?\d+$", raised.value.where) and raised.value.field == field
    assert raised.value.fix

    left = []
    after = read(root, name, split, malformed="skip", left=left)
    assert [one.error.where for one in left] == [raised.value.where]
    lost = len(before) - len(after)
    assert lost == (10 if name == "ref_avs" else 0 if name in ("ms3", "s4_object") else 1)
    kept = {e.id: dataclasses.replace(e, meta={}) for e in before}  # of AudioCaps a clip may keep another caption
    assert all(dataclasses.replace(e, meta={}) == kept[e.id] for e in after)
    assert "1 malformed rows are left out" in caplog.text and str(raised.value) in caplog.text
    count = next(c for c in status(root, [name])[0] if c.split == split)
    assert (count.malformed, count.have) == (1, len(after))


def test_training_skips_malformed_rows_and_lists_them(copied, tmp_path, caplog):
    root = copied("ave", "valor")
    file = root / "ave/trainSet.txt"
    releases.text(file, file.read_text().replace("good&7&10", "good&7&11").replace("Church bell&RUh", "Bell&RUh"))
    (root / "valor/video_data/0_3-a_bcdef_0.000_7.000.mp4").unlink()
    config = tiny.get_config()
    config.data.root, config.data.batch_size, config.data.lengths = str(root), 1, (2048,)
    config.data.weights = dict.fromkeys(TASK_NAMES, 1.0)
    tokenizer, skipped = run_folder.tokenizer_of(resolve(config)), tmp_path / "run" / "skipped.0.jsonl"
    with pytest.raises(InputError, match=r"trainSet.txt:1 \[Category\]: unknown value 'Bell'"):
        run_data.train_order(resolve(config), tokenizer, skipped)
    config.data.on_error = "skip"
    order = run_data.train_order(resolve(config), tokenizer, skipped)
    assert [e.meta["dataset"] for e in order.examples] == ["ave"] * 3 + ["valor"]
    assert "2 malformed rows are left out" in caplog.text
    listed = [json.loads(line) for line in (tmp_path / "run" / run_data.LEFT_OUT).read_text().splitlines()]
    assert [(one["dataset"], one["field"]) for one in listed] == [
        ("ave", "Category"),
        ("ave", "EndTime"),
        ("valor", "video"),
    ]
    assert all(
        one["where"].endswith(line) for one, line in zip(listed[:2], ("trainSet.txt:1", "trainSet.txt:3"), strict=True)
    )


def test_a_list_of_examples_skips_its_malformed_lines(tmp_path):
    good = [Example(f"{k}", "ave", "<video>", video="a.mp4") for k in range(3)]
    write_jsonl(tmp_path / "train.jsonl", [*good, good[0]])
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write('{"id": "x"}\n{"id": \n')
    with pytest.raises(InputError, match=r"train.jsonl:4 \[id\]: duplicate"):
        read_examples(tmp_path, "train", missing="skip")
    left = []
    assert read_examples(tmp_path, "train", malformed="skip", left=left) == good
    assert [one.error.where.rpartition(":")[2] for one in left] == ["4", "5", "6"]
    (tmp_path / "train.jsonl").write_text('{"id": \n')
    with pytest.raises(InputError, match="train.jsonl:1"):  # nothing is left
        read_examples(tmp_path, "train", malformed="skip")


# Names.


def test_any_safe_file_name_is_an_id():
    for name in (
        "baby_dog_2_1",
        "-_wznbUu3DY",
        "Caf\u00e9 d\u00e9",
        "\u526a\u8f91 1",
        "a..b",
        "x.y_1.5",
        "~x",
        "a:b",
        "100%",
    ):
        assert safe_name(name)
    for name in ("", " ", ".", "..", "a/b", "../x", "a\\b", "a\0b", "a\nb", "a\x7fb", "\x85", "\u2028x", "\ud83d"):
        assert not safe_name(name), ascii(name)


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("ave", "trainSet.txt", "Bark&{}&good&0&10\n"),
        ("avvp", "AVVP_train.csv", "filename\tevent_labels\n{}_0_10\tSpeech\n"),
        (
            "avqa",
            "json_update/avqa-train.json",
            json.dumps([releases.question("%", 1, "Visual/Location", "Where?", [], "left")]),
        ),
        ("ms3", "metadata.csv", "uid,a_obj,split,label\n{},dog,train,v1m\n"),
        ("s4_object", "Single-source/s4_meta_data.csv", "name,start,category,split\n{},0,helicopter,train\n"),
        ("ms3_object", "Multi-sources/ms3_meta_data.csv", "video_id,split\n{},train\n"),
        ("ref_avs", "metadata.csv", "vid,uid,split,fid,exp\n{0},{0}_cat_1,train,0,The cat.\n"),
        ("valor", "desc_train.json", '[{{"video_id": "{}", "desc": "A cat."}}]'),
        ("audiocaps", "train.csv", "audiocap_id,youtube_id,start_time,caption\n1,{},0,A cat.\n"),
    ],
)
def test_every_reader_takes_any_safe_name(tmp_path, name, file, text):
    def found(video):
        content = text.replace("%", video) if name == "avqa" else text.format(video)
        releases.text(tmp_path / file, content)
        return list(DATASETS[name].read(Release(tmp_path), "train", "train"))

    for video in ("baby_dog_2_1", "-lead", "caf\u00e9 \u526a\u8f91", "a.b"):
        one = found(video)[0]
        assert isinstance(one, Example) and video in json.dumps(dataclasses.asdict(one), ensure_ascii=False)
    for video in ("..", "a/b", "../x", "a\x07b", "nan", "1.2E+10"):
        inside = name == "avqa" and video == "a\x07b"  # no JSON at all
        try:
            one = found(video)[0]
            assert isinstance(one, InputError), (video, one)
        except InputError:
            assert inside or name in ("avqa", "valor")


def test_the_row_of_ms3_without_a_youtube_id(copied):
    root = copied("avsbench_object")
    file = root / "avsbench_object/Multi-sources/ms3_meta_data.csv"
    releases.text(file, file.read_text() + "baby_dog_2_1,train\n")
    with pytest.raises(MissingFile, match="audio_wav/train/baby_dog_2_1.wav is missing"):
        read(root, "ms3_object", "train")
    assert len(read(root, "ms3_object", "test")) == 5  # another split does not need it


# a_obj.

A_OBJ = {
    "dog": ["dog"],
    "dog_man": ["dog", "man"],
    "dog_": ["dog"],
    "_dog__man_": ["dog", "man"],
    " dog ": ["dog"],
    "dog, man": ["dog", "man"],
    "['dog', 'emergency-car']": ["dog", "emergency-car"],
    '"dog"': ["dog"],
    "dog;man|car": ["dog", "man", "car"],
    "Dog and Man": ["dog", "man"],
    "dog&cat+pig": ["dog", "cat", "pig"],
    "emergency_car_dog": ["emergency-car", "dog"],
    "hair dryer": ["hair-dryer"],
    "missile/rocket": ["missile-rocket"],
    "playing_violin": ["playing violin"],
    "horse_clip-clop": ["horse clip-clop"],
    "race_car_dog": ["race car", "dog"],
    "": [],
    "nan": [],
    "45": [],
    "3.0": [],
    "dog_unicorn": [],
    "unicorn": [],
    "_": [],
    "None": [],
    "[]": [],
    "doghouse": [],
    "dog 2": [],
}


@pytest.mark.parametrize("text", A_OBJ, ids=ascii)
def test_the_forms_of_a_obj(text):
    assert object_names(text) == A_OBJ[text]


def test_a_obj_as_released_names_what_it_named():
    for name in CLASSES:
        assert object_names(name) == [name] and object_names(f"{name}_dog") == [name, "dog"]
    for name in S4_CATEGORIES:
        assert object_names(name) == [name.replace("_", " ")]
    assert object_names(None) == object_names(7) == object_names(float("nan")) == []
    assert object_names(["dog", "man"]) == ["dog", "man"]


def test_an_a_obj_that_names_nothing_costs_no_more_than_its_clip(copied, caplog):
    root = copied("avsbench_semantic")
    before = {name: read(root, name, "train") for name in ("s4", "arig", "ms3", "avss")}
    test = read(root, "s4", "test")
    file = root / "avsbench_semantic/metadata.csv"
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines):
        if ",v1s" in line:  # the clips of S4 and ARIG
            cells = line.split(",")
            lines[number] = ",".join([*cells[:4], "nan", *cells[5:]])
    releases.text(file, "\n".join(lines) + "\n")
    assert read(root, "ms3", "train") == before["ms3"] and read(root, "avss", "train") == before["avss"]
    s4 = read(root, "s4", "test")  # scored on its masks as before
    assert [(e.mask, e.frames, e.target, e.meta["objects"]) for e in s4] == [(e.mask, e.frames, "", []) for e in test]
    assert {e.target for e in read(root, "arig", "test")} == {""}
    train = read_examples(root, "train", ["s4", "arig", "ms3", "avss"])
    assert {e.meta["dataset"] for e in train} == {"ms3", "avss"}
    assert "{'s4': 1, 'arig': 1}" in caplog.text and "names no known object" in caplog.text
    counts = {(c.dataset, c.split): c for c in status(root)[0]}
    assert "[a_obj]: is 'nan'" in counts["s4", "train"].notes[0] and not counts["ms3", "train"].notes


# Notes.


def test_dense_rows_of_llp_that_name_no_clip_are_counted(releases_root, copied):
    counts = status(releases_root, ["avvp"])[0]
    notes = {c.split: c.notes for c in counts}
    assert not notes["val"] and not notes["train"] and len(notes["test"]) == 2
    assert "AVVP_eval_audio.csv:7" in notes["test"][0] and "'VMTJRpjbE_150_160'" in notes["test"][0]
    assert re.search(r"avvp +test .* 2 notes", table(counts))
    root = copied("llp")
    (root / "llp/data/AVVP_val_pd.csv").unlink()  # then nobody can tell
    assert not any(c.notes for c in status(root, ["avvp"])[0])


def test_both_forms_of_video_llava_are_read_once(copied, caplog):
    root = copied("video_llava")
    folder, before = root / "video_llava", read(root, "video_llava", "train")
    parts = [json.loads((folder / name).read_text("utf-8-sig")) for name in ("llava_image_.json", "valley_.json")]
    releases.text(folder / "valley_llavaimage.json", json.dumps(parts[0] + parts[1]))
    assert read(root, "video_llava", "train") == before
    (note,) = status(root, ["video_llava"])[0][0].notes
    assert "valley_llavaimage.json" in note and "llava_image_.json and valley_.json hold the same records" in note
    assert "valley_llavaimage.json" in caplog.text
    (folder / "valley_.json").unlink()
    assert [e.target for e in read(root, "video_llava", "train")] == [e.target for e in before]  # of the merged one
    assert "llava_image_.json" in status(root, ["video_llava"])[0][0].notes[0]
    (folder / "valley_llavaimage.json").unlink()
    releases.text(folder / "train_json/llava_image_.json", json.dumps(parts[0]))
    assert len(read(root, "video_llava", "train")) == len(parts[0])


def test_a_last_row_that_may_be_cut_off_is_said(copied, caplog):
    root = copied("ave", "llp")
    file = root / "llp/data/AVVP_train.csv"
    releases.text(file, file.read_text().replace("AP0061o0Nvk_101.8_111.8\tCar\n", "AP0061o0Nvk_101.8_111.8\tCar"))
    assert read(root, "avvp", "train")[2].meta["labels"] == ["Car"]  # or more than that
    (note,) = next(c for c in status(root, ["avvp"])[0] if c.split == "train").notes
    assert note.startswith("llp/data/AVVP_train.csv:4") and "no line end" in note and "no line end" in caplog.text
    releases.text(root / "ave/testSet.txt", "Bark&RUhOCu3LNXM&good&0&10\nBark&MH3m4AwEcRY&good&0&1")
    with pytest.raises(InputError, match=r"testSet.txt:2 \[EndTime\].*was it 10"):
        read(root, "ave", "test")
    releases.text(root / "ave/testSet.txt", "Bark&RUhOCu3LNXM&good&0&10\nBark&MH3m4AwEcRY&good&0&1\n")
    assert read(root, "ave", "test")[1].meta["end"] == 1


def test_two_categories_of_one_number_are_refused(copied):
    root = copied("lvis")
    file = root / "lvis/lvis_v1_train.json"
    content = json.loads(file.read_text())
    content["categories"].append({**content["categories"][0], "name": "bow_(weapon)"})
    releases.text(file, json.dumps(content))
    with pytest.raises(InputError, match=r"\[categories\]: the id 36 comes twice"):
        read(root, "lvis", "train")


# JSON in other shapes.


@pytest.mark.parametrize(("name", "file", "key"), LISTS)
def test_json_in_other_shapes_says_the_same(copied, name, file, key):
    root = copied(DATASETS[name].folder)
    path = path_of(root, name, file)
    items = json.loads(path.read_bytes().decode("utf-8-sig"))
    before = [dataclasses.replace(e, meta={}) for e in read(root, name, "train")]
    shapes = [
        "\n".join(map(json.dumps, items)),
        "\r\n".join(map(json.dumps, items)) + "\r\n",
        json.dumps({"data": items}),
        json.dumps({"version": 1, "annotations": items}),
    ]
    if name != "video_llava":
        shapes.append(json.dumps({str(item[key]): {k: v for k, v in item.items() if k != key} for item in items}))
    for shape in shapes:
        releases.text(path, shape)
        assert [dataclasses.replace(e, meta={}) for e in read(root, name, "train")] == before
    releases.text(path, "\n".join(map(json.dumps, items)) + '\n{"broken": ')
    with pytest.raises(InputError, match=rf"{path.name}:{len(items) + 1}: not valid JSON"):
        read(root, name, "train")
    for shape, message in (
        ('{"a": 1}', "holds dict, not a list"),
        (json.dumps(items)[:-20], "not valid JSON"),
        (json.dumps({"a": items, "b": items}), "holds dict"),
    ):
        releases.text(path, shape)
        with pytest.raises(InputError, match=message):
            list(records(root, name, "train"))


def test_a_lost_quotation_mark_costs_one_row_and_a_broken_line_none(copied):
    root = copied("audiocaps")
    file = root / "audiocaps/dataset/train.csv"
    before = read(root, "audiocaps", "train")
    content = file.read_bytes().decode()
    releases.text(file, content.replace("is blowing, insects", "is blowing,\ninsects"))
    assert read(root, "audiocaps", "train")[1].target == before[1].target
    assert [e.meta["row"] for e in read(root, "audiocaps", "train")] == [
        "dataset/train.csv:2",
        "dataset/train.csv:3",
        "dataset/train.csv:5",
    ]
    releases.text(file, content.replace('occurs"', "occurs"))
    with pytest.raises(InputError, match=r"train.csv:3: has an unfinished quotation"):
        read(root, "audiocaps", "train")
    assert [e.id for e in read(root, "audiocaps", "train", malformed="skip")] == [before[0].id, before[2].id]


@pytest.mark.parametrize(
    ("lines", "rows"),
    [
        (['1,"open', "", 'more, and"', "3,y"], [("1", "open  more, and"), ("3", "y")]),
        (['1,"open', 'more, and"x', "3,y"], [2, 3, ("3", "y")]),  # the rest of a row is no row
        (['1,"lost, x', "2,x", '3,"q, r"'], [2, ("2", "x"), ("3", "q, r")]),
        (['1,"open', '2,"x"', "3,y"], [2, ("2", "x"), ("3", "y")]),
        (['1,"He said \\"hi\\", then"', "2,x"], [2, ("2", "x")]),  # quotation marks are doubled in a csv, not escaped
        (['1,5" pipe', "2,x"], [("1", '5" pipe'), ("2", "x")]),
        (['"1,2"', "2,x"], [2, ("2", "x")]),
    ],
)
def test_quotations(tmp_path, lines, rows):
    releases.text(tmp_path / "t.csv", "\n".join(["a,b", *lines]) + "\n")
    found = [
        tuple(row.values.values()) if isinstance(row, Row) else int(row.where.rpartition(":")[2])
        for row in Release(tmp_path).table("t.csv", ("a", "b"))
    ]
    assert found == rows


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("uid,a_obj,split\nx,dog,train\n", "label", "no such column"),
        ("x,dog,train,v1s\n", "uid", "no such column"),
        ("uid,a_obj,split,label,Split\nx,dog,train,v1s,test\n", "split", "comes twice"),
        ("uid,a_obj,subset,label\n", "split", "no such column"),
    ],
)
def test_a_header_that_does_not_name_the_columns_stops(tmp_path, text, field, message):
    releases.text(tmp_path / "avsbench_semantic/metadata.csv", text)
    with pytest.raises(InputError, match=message) as raised:
        list(records(tmp_path, "s4", "train"))
    assert raised.value.field == field and raised.value.where.endswith("metadata.csv:1")


def test_utf_16_is_called_that(tmp_path):
    (tmp_path / "valor").mkdir()
    (tmp_path / "valor/desc_train.json").write_bytes("[]".encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8 text but UTF-16.*save the file as UTF-8"):
        list(records(tmp_path, "valor", "train"))


def test_splits_in_capitals_are_read_and_other_words_are_not(tmp_path):
    releases.text(tmp_path / "Multi-sources/ms3_meta_data.csv", "video_id,split\na,Train\nb,TEST\nc,validation\n")
    found = list(DATASETS["ms3_object"].read(Release(tmp_path), "train", "train"))
    assert [e.meta["video"] for e in found if isinstance(e, Example)] == ["a"] * 5
    (error,) = (e for e in found if isinstance(e, InputError))
    assert error.where.endswith(":4") and "'validation'" in error.problem


def test_numbers_are_whole_or_refused():
    def of(value):
        return Row(Path(), "x", {"n": value}).integer("n", 0, 100)

    assert [of(v) for v in (8, "8", "8.0", 8.0, " 8 ", "08")] == [8] * 6
    for value in (
        "8.5",
        8.5,
        float("nan"),
        float("inf"),
        "nan",
        "",
        "1e1",
        "1E+01",
        True,
        None,
        "101",
        -1,
        "\u0668",
        [8],
    ):
        with pytest.raises(InputError, match="whole number from 0 to 100"):
            of(value)


# One picture of a clip, or all.


def marked(clips=4, pictures=10):
    return [
        Example(
            f"{clip}-{k}",
            "ref-avs",
            "<image>",
            target="a cat",
            image=f"{k}.png",
            windows="none",
            meta={"one_of": f"clip {clip}"},
        )
        for clip in range(clips)
        for k in range(pictures)
    ]


def order_of(root, frames, **changes):
    config = tiny.get_config()
    config.data.root, config.data.batch_size, config.data.frames = str(root), 2, frames
    config.data.weights = dict.fromkeys(TASK_NAMES, 1.0)
    config.data.update(changes)
    return run_data.train_order(resolve(config), run_folder.tokenizer_of(resolve(config)))


def test_all_pictures_of_a_list_count_when_they_are_asked_for(tmp_path):
    """400 pictures of Ref-AVS are 400 in the mask stage."""
    write_jsonl(tmp_path / "train.jsonl", marked(40))
    order = order_of(tmp_path, "all")
    epoch = [int(i) for number in range(200) for i in order.batches[number]]
    assert sorted(epoch) == list(range(400)) and not any("one_of" in e.meta for e in order.examples)
    order = order_of(tmp_path, "one")
    epoch = [order.examples[int(i)].id.partition("-")[0] for number in range(20) for i in order.batches[number]]
    assert sorted(epoch, key=int) == [str(clip) for clip in range(40)]
    assert len(read_examples(tmp_path, "train", frames="one")) == 40
    assert read_examples(tmp_path, "train") == read_jsonl(tmp_path, "train")  # as it is written, unless asked


def test_a_prepared_list_counts_the_same(root, tmp_path):
    listed = tmp_path / "listed"
    listed.mkdir()
    for k in range(5):
        releases.copy(root / f"{k}.png", listed / f"{k}.png")
    write_jsonl(listed / "train.jsonl", marked(4, 5))
    with pytest.raises(SystemExit, match="0"):
        prepare(["--root", str(listed), "--out", str(tmp_path / "out"), "--image-size", "16", "--workers", "1"])
    for frames, count in (("all", 20), ("one", 4)):
        orders = [order_of(place, frames) for place in (listed, tmp_path / "out")]
        assert list(orders[0].examples) == list(orders[1].examples)
        epochs = [[int(i) for number in range(count // 2) for i in order.batches[number]] for order in orders]
        assert epochs[0] == epochs[1] and len(set(epochs[0])) == count


def test_marks_that_are_no_text_are_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [dataclasses.replace(marked()[0], meta={"one_of": 0})])
    with pytest.raises(InputError, match=r"train.jsonl:1 \[meta\]: one_of is 0"):
        read_examples(tmp_path, "train")


# Splits together.


def test_train_and_val_of_audiocaps_together(releases_root):
    both = read_examples(releases_root, "train+val", ["audiocaps"])
    assert both == [*read(releases_root, "audiocaps", "train"), *read(releases_root, "audiocaps", "val")]
    order = order_of(releases_root, "one", split="train+val", datasets="audiocaps", lengths=(2048,))
    assert len(order.examples) == 4
    with pytest.raises(InputError, match="no dataset has a split 'exam'"):
        read_examples(releases_root, "train+exam", ["audiocaps"])


def test_joined_lists_keep_their_ids_and_marks_apart(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", marked(2))
    write_jsonl(tmp_path / "val.jsonl", marked(1))
    found = read_examples(tmp_path, "train+val", frames="one", epoch=None)
    assert len({e.id for e in found}) == 30 and found[20].id == "val/0-0"
    assert {e.meta["one_of"] for e in found} == {"train clip 0", "train clip 1", "val clip 0"}
    assert len(read_examples(tmp_path, "train+val", frames="one")) == 3


# Crab's own layout.


def test_sample_lists_of_crab_say_what_the_releases_say(releases_root, copied):
    root = copied("ave", "music_avqa", "valor", "avsbench_semantic", "llp", "lvis", "audiocaps")
    before = {
        (name, split): read(root, name, split)
        for name, split in (
            ("ave", "train"),
            ("ave", "test"),
            ("avqa", "train"),
            ("valor", "train"),
            ("s4", "train"),
            ("ms3", "test"),
            ("avss", "val"),
            ("arig", "train"),
            ("avvp", "test"),
            ("audiocaps", "train"),
        )
    }

    def put(folder, file, items, instead):
        releases.text(root / folder / file, json.dumps(items))
        (root / folder / instead).unlink()

    for split, file in (("train", "valid_train"), ("test", "test")):
        put(
            "ave",
            f"{file}_samples.json",
            [
                {
                    "event": e.meta["event"],
                    "vid": e.meta["video"],
                    "start_time": str(e.meta["start"]),
                    "end_time": e.meta["end"],
                }
                for e in before["ave", split]
            ],
            f"{split}Set.txt",
        )
    put(
        "music_avqa",
        "data/music_avqa_data/valid_train_samples.json",
        [
            {
                "video_id": e.meta["video"],
                "question_id": e.meta["question_id"],
                "type": e.meta["type"],
                "question": e.meta["question"],
                "answer": e.meta["answer"],
                "video_path": "/cluster/x.mp4",
            }
            for e in before["avqa", "train"]
        ],
        "data/json_update/avqa-train.json",
    )
    put("valor", "train_samples.json", json.loads((root / "valor/desc_train.json").read_text()), "desc_train.json")
    with open(root / "avsbench_semantic/metadata.csv") as file:
        clips = list(csv.DictReader(file))
    for name, part in (("s4", "v1s"), ("ms3", "v1m"), ("avss", "v2")):
        releases.text(
            root / f"avsbench_semantic/{name}_samples.json",
            json.dumps([clip for clip in clips if clip["label"] == part]),
        )
    (root / "avsbench_semantic/metadata.csv").unlink()
    boxes = [
        {
            "split": "train",
            "frame_path": f"/cluster/AVS/{e.image.partition('/')[2]}",
            "a_obj": e.meta["object"],
            "top_left": e.meta["box"][:2],
            "bottom_right": e.meta["box"][2:],
        }
        for e in before["arig", "train"]
    ]
    nothing = {**boxes[0], "top_left": [1000, 1000], "bottom_right": [0, 0]}
    releases.text(root / "avsbench_semantic/v1s_grounding_samples.json", json.dumps([*boxes, nothing]))
    put(
        "llp",
        "test_samples.json",
        [
            {"filename": e.meta["filename"], "vid": e.meta["video"], "event": ",".join(e.meta["labels"])}
            for e in before["avvp", "test"]
        ],
        "data/AVVP_test_pd.csv",
    )
    put(
        "audiocaps",
        "train.json",
        [
            {"audiocap_id": e.audio.rpartition("/")[2][:-4], "start_time": 0, "caption": e.target}
            for e in before["audiocaps", "train"]
        ],
        "dataset/train.csv",
    )

    for (name, split), examples in before.items():
        again = read(root, name, split)
        assert [(e.target, e.instruction, e.windows, e.second, *sorted(media(e))) for e in again] == [
            (e.target, e.instruction, e.windows, e.second, *sorted(media(e))) for e in examples
        ], name
        if name != "audiocaps":
            assert [e.id for e in again] == [e.id for e in examples]


def media(example):
    return [path for path in (example.video, example.image, example.audio, example.mask, *example.frames) if path]


def test_the_texts_of_av_uie_in_crabs_list_of_llp_are_targets(copied):
    root = copied("llp")
    text = "A dog. <visual>Dog,(0 10)</visual> and <audio>Speech,(0 4),(6 9)</audio>"
    items = [
        {"filename": "BjCEufrlXm4_20_30", "vid": "BjCEufrlXm4", "event": "Speech,Dog", "label": text},
        {"filename": "KWdhwfzfppg_260_270", "vid": "KWdhwfzfppg", "event": ["Cello"], "label": None},
    ]
    releases.text(root / "llp/train_samples.json", json.dumps(items))
    (root / "llp/data/AVVP_train.csv").unlink()
    first, second = read(root, "avvp", "train")
    assert first.target == text.replace("visual>", "visual_event>").replace("audio>", "audio_event>")
    assert first.meta["audio"] == [["Speech", 0, 4], ["Speech", 6, 9]] and avvp.parse(first.target)
    assert second.target == "" and second.meta["labels"] == ["Cello"]


def test_the_separate_sound_of_crab_is_heard_where_it_lies(copied):
    root = copied("ave", "llp", "music_avqa", "valor")
    for name, split in (("ave", "train"), ("avvp", "train"), ("avqa", "train"), ("valor", "train")):
        first, *rest = read(root, name, split)
        assert first.audio is None
        sound = root / DATASETS[name].folder / f"audio_data/{first.video.rpartition('/')[2][:-4]}.mp3"
        releases.text(sound, "a sound")
        again, *others = read(root, name, split)
        assert again == dataclasses.replace(first, audio=str(sound.relative_to(root)))
        assert [e for e in others if e.video != first.video] == [e for e in rest if e.video != first.video]


@pytest.mark.parametrize(
    ("name", "ours", "crabs"),
    [
        ("ave", "ave", "ave/AVE_Dataset"),
        ("ave", "ave", "AVE_Dataset"),
        ("avqa", "music_avqa", "music-avqa"),
        ("s4", "avsbench_semantic", "AVS"),
        ("ref_avs", "ref_avs", "ref-avs/REFAVS"),
        ("avvp", "llp", "avvp"),
    ],
)
def test_the_folders_of_crabs_tree_are_known(copied, name, ours, crabs):
    root = copied(ours)
    count = len(read(root, name, "train"))
    (root / ours).rename(root / "moved")
    (root / crabs).parent.mkdir(exist_ok=True)
    (root / "moved").rename(root / crabs)
    examples = read(root, name, "train")
    assert len(examples) == count and all(path.startswith(crabs) for path in media(examples[0]))
    assert next(c for c in status(root, [name])[0] if c.split == "train").have == count


def test_a_list_of_the_quick_start_is_read(releases_root, tmp_path):
    clip = releases_root / "own/media/test.mp4"
    for folder in ("", "own/"):
        releases.copy(clip, tmp_path / folder / "ave/a.mp4")
        items = [
            {"task": "ave", "video_path": "ave/a.mp4", "audio_path": "ave/a.mp4"},
            {"task": "avqa", "video_path": "ave/a.mp4", "audio_path": "ave/a.mp4", "question": "How many?"},
            {"task": "arig", "image_path": "arig/1.jpg", "audio_path": "arig/a.wav"},
            {"task": "s4", "image_path": "s4/0.jpg", "audio_path": "s4/a.wav", "idx": 3, "mask_path": "s4/0.png"},
            {"task": "avss", "image_path": "s4/0.jpg", "audio_path": "s4/a.wav", "mask_path": "s4/0.png"},
            {"task": "ref-avs", "image_path": "s4/7.jpg", "audio_path": "s4/a.wav", "exp": "The Cat"},
        ]
        releases.text(tmp_path / folder / "samples.json", json.dumps(items))
    for found in (list(DATASETS["own"].read(Release(tmp_path, "own"), "test", "train")),):
        assert [e.task for e in found] == [item["task"] for item in items]
        assert [e.second for e in found] == [None, None, 1, 3, 0, 7]
        assert [e.windows for e in found] == ["ten", "music_avqa", "one_of_five", "one_of_five", "one", "ten"]
        assert [e.mask_kind for e in found] == ["none", "none", "none", "binary", "semantic", "none"]
        assert found[1].instruction == TASKS["avqa"].instruction("quick", question="How many?")
        assert found[5].instruction == TASKS["ref-avs"].instruction("quick", "The Cat", 7)
    (tmp_path / "own").rename(tmp_path / "elsewhere")  # then the folder itself is a list
    (tmp_path / "ave").rename(tmp_path / "clips")
    assert list_of(tmp_path, "test") == "samples.json"
    releases.text(
        tmp_path / "samples.json",
        json.dumps([{"task": "ave", "video_path": "clips/a.mp4", "audio_path": "clips/a.mp4"}]),
    )
    assert [e.video for e in read_examples(tmp_path, "test")] == ["clips/a.mp4"]
    releases.text(tmp_path / "samples.json", json.dumps([{"task": "ave", "video_path": "/cluster/a.mp4"}]))
    with pytest.raises(InputError, match=r"samples.json:item 0 \[video_path\].*leaves the data root"):
        read_examples(tmp_path, "test")


def test_nothing_is_said_where_nothing_is_odd(releases_root, caplog):
    with caplog.at_level(logging.WARNING):
        for name in DATASETS:
            read(releases_root, name, "train")
    assert not caplog.records
