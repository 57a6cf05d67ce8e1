"""`python -m data_pipelines own`: a plain table becomes Examples that score like those of the datasets."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from media_files import write_audio, write_picture, write_video
from PIL import Image

from crab_jax.evaluation.scoring import check_label
from crab_jax.tasks import TASKS
from crab_jax.tasks.task import windows_for
from data_pipelines import mistakes
from data_pipelines.batching import DataConfig, bucket_for, load
from data_pipelines.examples import Example, from_json, read_jsonl, to_json
from data_pipelines.labels import disagreements
from data_pipelines.own import verb as own
from data_pipelines.own.files import Media
from data_pipelines.own.table import Row

DOCUMENT = (Path(__file__).parents[2] / "docs/your_data.md").read_text()
LINES = re.findall(r"```jsonl\n(.*?)```", DOCUMENT, re.DOTALL)
(TABLE,) = re.findall(r"```csv\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Everything that the document names: clips of ten seconds, their sound, pictures and masks."""
    root = tmp_path_factory.mktemp("files")
    (root / "clips").mkdir()
    (root / "masks").mkdir()
    for name in ("dog", "band", "street"):
        write_video(root / f"clips/{name}.mp4", 100, (64, 48), 10.0)
        write_audio(root / f"clips/{name}.wav", 10.0)
        write_picture(root / f"clips/{name}.jpg", np.full((480, 640, 3), 90, np.uint8))
    write_video(root / "clips/short.mp4", 50, (64, 48), 5.0)
    write_video(root / "clips/mute.mp4", 100)
    for name in set(re.findall(r"masks/\w+\.png", DOCUMENT)):
        mask = np.zeros((480, 640) if name in ("masks/dog.png", "masks/dog_classes.png") else (48, 64), np.uint8)
        mask[8:20, 10:30] = 18
        write_picture(root / name, mask)
    return root


@pytest.fixture
def root(files, tmp_path) -> Path:
    """A copy of the files that a test may write beside."""
    for path in files.rglob("*.*"):
        (tmp_path / "R" / path.relative_to(files)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "R" / path.relative_to(files)).hardlink_to(path)
    return tmp_path / "R"


def table(root: Path, text: str | bytes, *options: str, name: str = "t.csv") -> tuple[int, list[Example]]:
    """The exit code for a table beside the media, and the Examples of train."""
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as done:
        own.main(
            [
                f"--{'jsonl' if name.endswith('jsonl') else 'csv'}",
                str(root / name),
                "--root",
                str(root),
                "--workers",
                "1",
                *options,
            ]
        )
    lists = root / "train.jsonl"
    return int(done.value.code or 0), read_jsonl(lists) if lists.is_file() else []


# The document.


def test_the_document_begins_with_three_sound_lines_of_each_task(files, tokenizer):
    assert [{json.loads(line)["task"] for line in block.splitlines()} for block in LINES] == [{t} for t in TASKS]
    assert all(len(block.splitlines()) == 3 for block in LINES)
    look = mistakes.Mistakes(train=True)
    config = DataConfig(image_size=16, visual_queries=1, audio_queries=1)
    for block in LINES:
        for number, line in enumerate(block.splitlines()):
            example = from_json(json.loads(line), "the document")
            assert look.of(example) == [] and disagreements(example) == [] and example.target
            check_label(example)
            bucket_for(example, tokenizer, config)
            if not number:
                load(example, files, tokenizer, config)


def test_the_table_of_the_document_makes_the_lines_of_the_document(root, capsys):
    code, made = table(root, TABLE)
    lines = {json.loads(line)["id"]: json.loads(line) for block in LINES for line in block.splitlines()}
    assert code == 0 and {e.task for e in made} == set(TASKS) and len(made) == 10
    assert [to_json(e) for e in made] == [lines[e.id] for e in made]
    said = capsys.readouterr().out
    assert "10 examples" in said and "prepared" in said  # the table of validate


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as done:
        own.main(["--help"])
    assert done.value.code == 0 and "ave,clips/dog.mp4,,,Bark 2-5" in capsys.readouterr().out


# What programs for tables do.

ROW = "task,media,question,answer\navqa,clips/dog.mp4,{},two\n"


@pytest.mark.parametrize(
    "content",
    [
        ROW.format("How many?").encode("utf-8-sig"),
        ROW.format("How many?").encode("utf-16"),
        ROW.format("How many?").replace(",", ";").encode(),
        ROW.format("How many?").replace(",", "\t").encode(),
        b"sep=;\r\n" + ROW.format("How many?").replace(",", ";").encode(),
        ROW.format("How many?").replace("\n", "\r\n").encode() + b",,,\r\n\r\n,,,\r\n",
        ROW.format("How many?").replace("task,media", " Task , MEDIA ").encode(),
        ROW.format("How many?").replace("\n", "\r").encode(),
        ROW.format("How many?").replace(",", "|").encode(),
        ROW.format('"How\nmany?"').encode(),
        ROW.format("How many?").replace("clips/", "clips\\").encode(),
        b"\n" + ROW.format("How many?").encode(),
    ],
)
def test_tables_as_programs_save_them(root, content):
    code, (example,) = table(root, content)
    assert code == 0 and example.meta["question"] == "How many?" and example.video == "clips/dog.mp4"


def test_western_windows_text_is_read_and_said(root, capsys):
    code, (example,) = table(root, ROW.format("O\u00f9 ?").encode("cp1252"))
    assert code == 0 and example.meta["question"] == "O\u00f9 ?" and "cp1252" in capsys.readouterr().err


def test_whole_seconds_may_have_been_stored_as_decimals(root):
    text = (
        "task,media,object,second,mask,events\ns4,clips/dog.mp4,dog,3.0,masks/dog_3.png,\n"
        "ave,clips/dog.mp4,,,,Bark 2.0-5.0\n"
    )
    code, (masked, timed) = table(root, text)
    assert code == 0 and masked.second == 3 and (timed.meta["start"], timed.meta["end"]) == (2, 5)


@pytest.mark.parametrize(
    "said",
    [
        "Bark from 2 to 5",
        "Bark: 2 - 5",
        "Bark - 2-5",
        "Bark = 2 to 5",
        "Bark @ 2s-5s",
        "Bark at 2\u20135",
        "Bark (2-5)",
    ],
)
def test_a_word_or_sign_before_the_seconds_is_no_part_of_the_name(root, said):
    code, (example,) = table(root, f"task,media,events\nave,clips/dog.mp4,{said}\n")
    assert code == 0 and [example.meta[name] for name in ("event", "start", "end")] == ["Bark", 2, 5]


@pytest.mark.parametrize(
    "name", ["Boeing 747", "Race car, auto racing", "Take-off", "Fixed-wing aircraft", "Meow - cat"]
)
def test_names_with_signs_of_their_own_stay_whole(root, name):
    code, (example,) = table(root, f'task,media,events\nave,clips/dog.mp4,"{name} 2-5"\n')
    assert code == 0 and example.meta["event"] == name


def test_plain_json_lines_take_lists(root):
    rows = [
        {"task": "avvp", "media": "clips/dog.mp4", "events": {"audio": [["Dog", 2, 5]], "visual": []}},
        {"task": "arig", "media": ["clips/dog.jpg", "clips/dog.wav"], "object": "dog", "box_224": [10, 20, 30, 40]},
        {"task": "ms3", "video": "clips/dog.mp4", "object": ["dog", "man"], "second": 3, "mask": "masks/dog_3.png"},
        {"task": "avcap", "media": "clips/dog.mp4", "captions": ["A dog.", "It barks."], "id": 7},
    ]
    code, made = table(root, "".join(json.dumps(row) + "\n" for row in rows), name="t.jsonl")
    assert code == 0 and made[0].meta["audio"] == [["Dog", 2, 5]] and made[1].meta["box"] == [10, 20, 30, 40]
    assert made[2].meta["objects"] == ["dog", "man"] and made[3].meta["captions"] == ["A dog.", "It barks."]
    assert made[3].id == "7"


def test_splits_and_pictures_of_a_clip(root):
    frames = root / "frames"
    frames.mkdir()
    for second in range(5):
        write_picture(frames / f"{second}.png", np.full((48, 64, 3), 9, np.uint8))
    text = (
        "task,frames,audio,media,split,object,second,mask,answer\n"
        "s4,frames,clips/dog.wav,,train,dog,3,masks/dog_3.png,\navcap,,,clips/band.mp4,Validation,,,,A band.\n"
    )
    code, (masked,) = table(root, text)
    assert code == 0 and masked.windows == "five" and masked.frames == tuple(f"frames/{k}.png" for k in range(5))
    assert [e.task for e in read_jsonl(root / "val.jsonl")] == ["avcap"]


def test_the_picture_of_a_second_of_a_short_clip_is_taken_from_it(root):
    """Ten frames are taken of any clip, so the one of second 3 of five is none that `second` can name."""
    text = "task,media,object,second,mask\ns4,clips/short.mp4,dog,3,masks/dog_3.png\n"
    code, (example,) = table(root, text)
    assert code == 0 and (example.windows, example.second, example.video) == ("five", 3, "clips/short.mp4")
    picture = np.asarray(Image.open(root / example.seg_image))
    assert picture.shape == (48, 64, 3) and abs(picture.mean() - 8 * 30 % 256) < 4  # the frame shown at 3.0 s


def test_a_box_in_pixels_is_scaled_to_the_picture_that_the_model_sees(root):
    text = 'task,image,audio,object,box\narig,clips/dog.jpg,clips/dog.wav,dog,"(320, 120) - (640, 480)"\n'
    code, (example,) = table(root, text.replace(") - (", ", ").replace("(320", "320").replace("480)", "480"))
    assert code == 0 and example.meta["box"] == [112, 56, 224, 224]
    assert TASKS["arig"].parse(example.target) == (112, 56, 224, 224)


@pytest.mark.parametrize(
    ("seconds", "task", "one", "windows"),
    [
        (10, "avqa", False, "ten"),
        (60, "avqa", False, "music_avqa"),
        (5, "s4", False, "five"),
        (5, "ms3", True, "one_of_five"),
        (10, "avss", True, "one"),
        (5, "avss", False, "ten"),
        (5, "avss", True, "one"),
        (5, "arig", False, "five"),
        (10, "arig", False, "ten"),
        (5, "arig", True, "one_of_five"),
        (10, "arig", True, "one"),
        (10, "ref-avs", True, "ten"),
        (10, "avvp", False, "ten"),
        (60, "avcap", False, "ten"),
        (60, "avqa", True, "music_avqa"),
    ],
)
def test_windows_are_those_of_the_datasets(seconds, task, one, windows):
    assert windows_for(TASKS[task], seconds, one) == windows in TASKS[task].windows


# What is refused, in one line that names the row, before anything is written.

A = "task,media,question,answer,events,object,expression,second,box,mask,type\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("task,media\n", "holds no row"),
        ("media,answer\nclips/dog.mp4,x\n", "no such column"),
        ("task,media,anwser\navcap,clips/dog.mp4,x\n", r"\[anwser\].*did you mean 'answer'"),
        ("task,task\nave,ave\n", "comes twice"),
        (A + "AVX,clips/dog.mp4\n", "unknown task 'AVX'"),
        (A + "avqa,clips/dog.mp4,Why, because, it barks,,,,,,,,\n", r"t.csv:2 \[events\]: is 'it barks'"),
        ("task,media,question,answer\navqa,clips/dog.mp4,Why, because,it barks\n", "has 5 cells, but the header 4"),
        (A + 'avqa,clips/dog.mp4,"Why,two\n', "double quote"),
        (A + "avqa,clips/dog.mp4,,two\n", r"t.csv:2 \[question\]: is empty"),
        (A + "avqa,clips/dog.mp4,How?,\n", r"\[answer\]: is empty"),
        (A + "avqa,clips/dog.mp4,How?,two,,,,,,,Sound\n", r"\[type\].*Audio-Visual/Counting"),
        (A + "avqa,clips/dog.mp4,How?,two,Bark 2-5\n", r"\[events\].*avqa has no events"),
        (A + "avqa,clips/dog.jpg;clips/dog.wav,How?,two\n", "about a video"),
        (A + "avqa,clips/mute.mp4,How?,two\n", "has no sound"),
        (A + "avqa,clips/no.mp4,How?,two\n", "no such file"),
        (A + "avqa,clips,How?,two\n", "is a folder"),
        (A + "avqa,https://x.org/a.mp4,How?,two\n", "download"),
        (A + "avqa,,How?,two\n", r"\[media\]: is empty"),
        (A + "avqa,clips/dog.mp4;clips/band.mp4,How?,two\n", "twice"),
        (A + 'arig,clips/dog.jpg,,,,dog,,,"1,2,30,40"\n', "pictures have no sound"),
        (A + "ave,clips/dog.mp4,,,\n", r"\[events\]: is empty"),
        (A + "ave,clips/dog.mp4,,,Bark\n", "cannot be read: 'Bark'"),
        (A + "ave,clips/dog.mp4,,,Bark 0:02-0:05\n", "cannot be read|0:"),
        (A + "ave,clips/dog.mp4,,,Bark 2.5-5\n", "2.5"),
        (A + "ave,clips/dog.mp4,,,Bark -2-5\n", "cannot be read: 'Bark -2-5'"),
        (A + "ave,clips/dog.mp4,,,nan\n", r"\[events\]: is 'nan', which programs write for nothing"),
        (A + "avqa,clips/dog.mp4,#N/A,two\n", r"\[question\]: is '#N/A'"),
        (A + "avqa,clips/dog.mp4,How?,NA\n", r"\[answer\]: is 'NA'.*leave the cell empty"),
        (A + "ave,clips/dog.mp4,,,Bark 5-2\n", "Bark"),
        (A + "ave,clips/dog.mp4,,,Bark 3-3\n", "the end exclusive"),
        (A + "ave,clips/dog.mp4,,,Bark 12-20\n", "0 to 10"),
        (A + "ave,clips/dog.mp4,,,Bark 1-2; Car 3-4\n", "2 events"),
        (A + 'ave,clips/dog.mp4,,,"Bark 2-5, Car 3-4"\n', "without a `;` between"),
        (A + 'avvp,clips/dog.mp4,,,"audio: Dog 2-5, visual: Dog 0-10"\n', "what is heard and what is seen"),
        (A + "ave,clips/dog.mp4,,,2-5 Bark\n", "cannot be read"),
        (A + "ave,clips/dog.mp4,,,Bark 2-5-7\n", "cannot be read"),
        (A + "avvp,clips/dog.mp4,,,Dog 2-5\n", "heard or seen"),
        (A + "avvp,clips/dog.mp4,,,audio: Dog 2-5\n", "what is seen"),
        (A + "avvp,clips/dog.mp4,,,audio: ; visual: Dog 2-5\n", "is empty"),
        (A + "arig,clips/dog.jpg;clips/dog.wav,,,,dog\n", r"\[box\]: is empty, and so is box_224"),
        (A + 'arig,clips/dog.jpg;clips/dog.wav,,,,dog,,,"10,20,900,40"\n', "leaves the picture of 640 x 480"),
        (A + 'arig,clips/dog.jpg;clips/dog.wav,,,,dog,,,"100,200,50,40"\n', "not its width and height"),
        (A + 'arig,clips/dog.jpg;clips/dog.wav,,,,dog,,,"0.1,0.2,0.5,0.9"\n', "shares of the picture"),
        (A + 'arig,clips/dog.jpg;clips/dog.wav,,,,dog,,,"10,20,30"\n', "upper left"),
        (A + "s4,clips/dog.mp4,,,,dog,,,,masks/dog_3.png\n", r"\[second\]: is empty"),
        (A + "s4,clips/dog.mp4,,,,dog,,0:03,,masks/dog_3.png\n", "counted from 0"),
        (A + "s4,clips/dog.mp4,,,,dog,,10,,masks/dog_3.png\n", "count from 0 to 9"),
        (A + "s4,clips/dog.mp4,,,,dog,,3\n", r"\[mask\]: is empty"),
        (A + "s4,clips/dog.mp4,,,,dog,,3,,masks/no.png\n", r"\[mask\]: no such file"),
        (A + "avss,clips/short.mp4,,,,dog,,3,,masks/dog_3.png\n", r"\[image\].*give the picture"),
        (A + "ref-avs,clips/dog.mp4,,,,,the dog,3,,masks/dog_3.png\n", "`nothing` where nothing fits"),
        (A + "ref-avs,clips/dog.mp4,,,,dog,,3,,masks/dog_3.png\n", r"\[expression\]: is empty"),
        (A.replace("type", "split") + "avqa,clips/dog.mp4,How?,two,,,,,,,trian\n", "unknown split 'trian'"),
        (
            A.replace("type", "id") + "avqa,clips/dog.mp4,How?,two,,,,,,,a\navqa,clips/band.mp4,How?,two,,,,,,,a\n",
            "t.csv:3.*that of line 2",
        ),
        (b"PK\x03\x04 a workbook", "save it as CSV"),
        (b"task\0,media", "no text of a known encoding"),
        (A + "ave,clips/dog.mp4,,,Bark\nave,clips/no.mp4,,,Bark 2-5\n", r"t.csv:2 .*\(1 more rows are wrong\)"),
    ],
)
def test_a_wrong_table_is_one_line_and_writes_nothing(root, text, message, one_line_error):
    (root / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = sorted(root.rglob("*"))
    one_line_error(own.main, ["--csv", str(root / "t.csv"), "--root", str(root)], message)
    assert sorted(root.rglob("*")) == before


def test_lists_are_not_overwritten_and_releases_not_hidden(root, one_line_error, capsys):
    arguments = ["--csv", str(root / "t.csv"), "--root", str(root)]
    assert table(root, ROW.format("How?"))[0] == 0
    capsys.readouterr()
    one_line_error(own.main, arguments, "train.jsonl: is there already; give --overwrite")
    code, (example,) = table(root, ROW.format("Why?"), "--overwrite")
    assert code == 0 and example.meta["question"] == "Why?"
    capsys.readouterr()
    (root / "ave").mkdir()
    one_line_error(own.main, arguments, "holds ave/.*--root .*own")


def test_media_elsewhere_are_copied_when_asked_for(root, tmp_path, one_line_error):
    other = tmp_path / "other"
    (root / "t.csv").write_text(ROW.format("How?").replace("clips/", f"{root}/clips/"))
    one_line_error(own.main, ["--csv", str(root / "t.csv"), "--root", str(other)], "lies outside of --root.*--copy")
    assert not other.exists()
    (root / "t.csv").write_text(ROW.format("How?"))
    for again in ((), ("--overwrite",)):
        with pytest.raises(SystemExit) as done:
            own.main(["--csv", str(root / "t.csv"), "--root", str(other), "--copy", "--workers", "1", *again])
        assert not done.value.code
    (example,) = read_jsonl(other / "train.jsonl")
    assert example.video == "media/clips/dog.mp4"
    assert (other / example.video).read_bytes() == (root / "clips/dog.mp4").read_bytes()
    assert sorted(p.name for p in other.rglob("*") if p.is_file()) == ["dog.mp4", "train.jsonl"]


def test_what_validate_finds_is_the_exit_code(root, capsys):
    (root / "masks/dog_3.png").unlink()
    write_picture(root / "masks/dog_3.png", np.zeros((20, 20), np.uint8))
    code, made = table(root, A + "s4,clips/dog.mp4,,,,dog,,3,,masks/dog_3.png\n")
    assert code == 3 and len(made) == 1 and "is 20x20, but its picture is 64x48" in capsys.readouterr().out


def test_a_large_table_is_quick(root):
    row = next(csv.reader(io.StringIO("avqa,clips/dog.mp4,How many?,two")))
    rows = [Row("t", i, dict(zip(("task", "media", "question", "answer"), row, strict=True))) for i in range(2000)]
    assert len(own.build(rows, Media(root, root), "train")["train"]) == 2000
