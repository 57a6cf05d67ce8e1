"""Every dataset, read from its original layout: labels, media, prompts, and what is said about each defect."""

import csv
import io
import json
import os
import re

import numpy as np
import pytest
import releases
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.tasks.avs_classes import CLASSES
from data_pipelines.batching import DataConfig, bucket_for, load
from data_pipelines.datasets import DATASETS, VARIANTS, media_of, read, records
from data_pipelines.examples import Example, from_json, to_json
from data_pipelines.media import EMPTY_MASK, inline_mask, read_mask
from data_pipelines.sources import avqa, avvp, lvis
from data_pipelines.sources.arig import box_of
from data_pipelines.sources.release import MissingFile, Release, Row

FUZZ = settings(max_examples=40, deadline=None, derandomize=True, database=None)
EVERY_SPLIT = [(name, split) for name, dataset in DATASETS.items() for split in dataset.sizes]


def by_id(root, name, split, variant="train"):
    return {example.id: example for example in read(root, name, split, variant)}


def errors(root, name, split):
    return [found for found in records(root, name, split) if isinstance(found, InputError)]


# What each release says.


def test_ave_rows_are_samples_and_ends_are_exclusive(releases_root):
    train, test = by_id(releases_root, "ave", "train"), by_id(releases_root, "ave", "test")
    assert list(train) == [
        "ave-RUhOCu3LNXM-0",
        "ave-VWi2ENBuTbw-0",
        "ave--67UNKFmRLk-7",
        "ave-0f_iTO5t3hU-27",
        "ave-0f_iTO5t3hU-17",
    ]  # in file order, a video with two events twice
    assert (train["ave--67UNKFmRLk-7"].meta["event"], train["ave--67UNKFmRLk-7"].video) == (
        "Violin, fiddle",
        "ave/AVE/-67UNKFmRLk.mp4",
    )
    assert "<event> Banjo </event>, and the time range is <range> 0,10 </range>" in train["ave-0f_iTO5t3hU-17"].target
    silent = train["ave-VWi2ENBuTbw-0"].meta
    assert (silent["start"], silent["end"]) == (0, 0)
    assert test["ave-0f_iTO5t3hU-9"].video == train["ave-0f_iTO5t3hU-17"].video  # the release shares videos
    assert [e.meta["event"] for e in read(releases_root, "ave", "val")] == ["Frying (food)"]  # this file has a header


def test_llp_matches_dense_rows_by_the_whole_name(releases_root):
    test = by_id(releases_root, "avvp", "test")
    meta = test["avvp-KSRjje7GH44_60_70"].meta
    assert meta["audio"] == [["Speech", 0, 5], ["Blender", 8, 10]]  # spans that touch and repeat are one
    assert meta["visual"] == []
    foreign = test["avvp-1-VMTJRpjbE_150_160"]  # VMTJRpjbE_150_160 in the dense file is another clip
    assert (foreign.meta["audio"], foreign.meta["visual"], foreign.meta["labels"]) == ([], [], ["Clapping"])
    assert foreign.target.count("none") == 2
    inverted = test["avvp-8DF2PxdT5tE_390_400"].meta
    assert (inverted["audio"], inverted["visual"]) == ([["Frying_(food)", 0, 7]], [])
    assert read(releases_root, "avvp", "val")[0].meta["visual"] == [
        ["Chainsaw", 0, 1],
        ["Chainsaw", 3, 6],
        ["Chainsaw", 9, 10],
    ]


def test_llp_training_clips_have_weak_labels_and_no_target(releases_root):
    train = by_id(releases_root, "avvp", "train")
    decimals = train["avvp-AP0061o0Nvk_101.8_111.8"]
    assert decimals.video == "llp/data/LLP_dataset/video/AP0061o0Nvk.mp4"
    assert all(e.target == "" and "audio" not in e.meta for e in train.values())
    assert train["avvp-KWdhwfzfppg_260_270"].meta["labels"] == ["Cello", "Violin_fiddle", "Accordion"]


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(avvp.CATEGORIES), st.integers(0, 10), st.integers(0, 10)), max_size=12))
def test_llp_spans_say_what_the_official_scorer_reads(rows):
    wanted, given_ = np.zeros((2, len(avvp.CATEGORIES), 10), bool)
    for name, onset, offset in rows:
        wanted[avvp.CATEGORIES.index(name), onset:offset] = True
    spans = avvp.union(rows)
    for name, start, end in spans:
        assert start < end and not given_[avvp.CATEGORIES.index(name), max(0, start - 1) : end + 1].any()
        given_[avvp.CATEGORIES.index(name), start:end] = True
    np.testing.assert_array_equal(given_, wanted)


def test_music_avqa_fills_slots_from_left_to_right(releases_root):
    train, test = by_id(releases_root, "avqa", "train"), by_id(releases_root, "avqa", "test")
    assert train["avqa-35"].meta["question"] == "How many sounding violin in the video?"  # a full-width mark, escaped
    assert train["avqa-36"].meta["question"] == "Are there cello and congas sound?"  # the template ends in a space
    assert train["avqa-37"].target == "So the answer is <answer> more than ten </answer>."
    saxophone = test["avqa-4639"]
    assert saxophone.meta["question"] == "What is the left instrument of the first sounding instrument?"
    assert saxophone.meta["type"] == ["Audio-Visual", "Location"] and saxophone.windows == "music_avqa"
    assert test["avqa-43702"].video == "music_avqa/videos/esa00000500.mp4"
    assert test["avqa-47300"].video == train["avqa-12"].video  # splits are of questions, and share videos


def test_music_avqa_has_two_sets_of_annotations(releases_root):
    assert [e.meta["answer"] for e in read(releases_root, "avqa", "test")][2:] == ["left"]
    first = by_id(releases_root, "avqa_original", "test")
    assert (first["avqa_original-47300"].meta["answer"], first["avqa_original-47300.2"].meta["answer"]) == (
        "left",
        "right",
    )


@FUZZ
@given(st.data())
def test_music_avqa_questions_are_those_of_the_official_loader(data):
    words = data.draw(st.lists(st.sampled_from(["Is", "the", "<Object>", "<LR>", "more", "<FL>"]), min_size=1))
    content = " ".join(words) + data.draw(st.sampled_from(["?", "\uff1f", "? "]))
    slots = sum("<" in word for word in words)
    value = st.sampled_from([*avqa.ANSWERS, "left", "loudest"]).filter(lambda v: " " not in v)
    values = data.draw(st.lists(value, min_size=slots, max_size=slots))
    official = content.rstrip().split(" ")
    official[-1] = official[-1][:-1]
    left = iter(values)
    official = [next(left) if "<" in word else word for word in official]
    row = Row(None, "", {"question_content": content, "templ_values": json.dumps(values)})
    assert avqa.fill(row).split(" ") == [*official[:-1], f"{official[-1]}?"]


@pytest.mark.parametrize(
    ("name", "split", "count", "windows", "frames"),
    [
        ("s4", "train", 1, "five", 5),
        ("s4", "test", 5, "five", 5),
        ("ms3", "train", 5, "five", 5),
        ("avss", "train", 10, "ten", 10),
        ("s4_object", "train", 1, "five", 5),
        ("s4_object", "val", 5, "five", 5),
        ("ms3_object", "test", 5, "five", 5),
    ],
)
def test_avsbench_asks_about_each_picture_with_a_mask(releases_root, name, split, count, windows, frames):
    examples = read(releases_root, name, split)
    assert [e.second for e in examples] == list(range(count))
    assert {(e.windows, len(e.frames)) for e in examples} == {(windows, frames)}
    quick = read(releases_root, name, split, "quick")
    assert [e.image for e in quick] == [e.frames[e.second] for e in examples]
    assert {e.windows for e in quick} == {"one" if frames == 10 else "one_of_five"}
    for example in examples:
        assert TASKS[example.task].mask_kind == example.mask_kind
        number = re.search(r"(\d+)\.png$", example.mask)[1]  # object masks count from one
        assert int(number) == example.second + ("object" in name)


def test_avsbench_names_follow_the_two_layouts(releases_root):
    ms3 = read(releases_root, "ms3_object", "test")[0]
    assert ms3.frames[0].endswith("visual_frames/3vheOi4y540_1/3vheOi4y540_1.mp4_1.png")
    assert ms3.audio.endswith("audio_wav/test/3vheOi4y540_1.wav") and ms3.target == "" and not ms3.meta["objects"]
    s4 = read(releases_root, "s4_object", "train")[0]
    assert s4.mask.endswith("gt_masks/train/helicopter/-_wznbUu3DY/-_wznbUu3DY_1.png")
    assert s4.meta["objects"] == ["helicopter"] and "sound in the video is helicopter." in s4.target
    assert {e.mask.split("/")[3] for e in read(releases_root, "avss", "val")} == {"labels_rgb"}
    assert {e.mask.split("/")[3] for e in read(releases_root, "ms3", "val")} == {"labels_semantic"}


@pytest.mark.parametrize("name", ["s4", "ms3", "avss"])
def test_semantic_pixels_are_class_ids_and_name_the_objects(releases_root, name):
    """label2idx.json counts from one: a reader that indexes it with the pixel would name the neighbouring class."""
    shown = set()
    for example in read(releases_root, name, "test"):
        ids = np.unique(read_mask(releases_root / example.mask, 128, "semantic"))
        shown |= {CLASSES[number] for number in ids} - {"background"}
        speck = name != "s4" and example.second == 0
        assert ("boy" in {CLASSES[number] for number in ids}) == speck
    assert shown - {"boy"} == set(read(releases_root, name, "test")[0].meta["objects"])


def test_another_numbering_of_the_classes_is_refused(copied):
    root = copied("avsbench_semantic")
    shifted = {name: number for number, name in enumerate(CLASSES)}  # zero-based
    releases.text(root / "avsbench_semantic/label2idx.json", json.dumps(shifted))
    with pytest.raises(InputError, match="label2idx.json.*background.*numbering"):
        read(root, "s4", "test")


def test_arig_boxes_are_the_first_and_last_pixels_of_the_mask(releases_root):
    for name, masked in (("arig", "s4"), ("arig_object", "s4_object")):
        masks = {(e.meta["video"], e.second): e.mask for e in read(releases_root, masked, "test")}
        examples = read(releases_root, name, "test")
        for example in examples:
            mask = read_mask(releases_root / masks[example.meta["video"], example.second], 224, "binary")
            x1, y1, x2, y2 = example.meta["box"]
            inside = np.zeros_like(mask)
            inside[y1 : y2 + 1, x1 : x2 + 1] = 1
            assert not (mask * (1 - inside)).any()
            assert mask[y1].any() and mask[y2].any() and mask[:, x1].any() and mask[:, x2].any()
            assert f"({x1},{y1})" in example.target and f"({x2},{y2})" in example.target
    assert [e.second for e in examples] == [0, 1, 3, 4]  # nothing sounds in the third picture
    assert box_of(np.zeros((4, 4))) is None


def test_an_arig_box_is_refused_where_its_mask_has_another_shape_than_the_picture(copied):
    root = copied("avsbench_semantic")
    clip = next(e for e in records(root, "arig", "test") if isinstance(e, Example))
    picture = root / clip.image
    mask = picture.parent.parent / f"labels_semantic/{picture.stem}.png"
    wide = np.zeros((6, 10), np.uint8)
    wide[1:3, 2:9] = 5
    picture.unlink()
    mask.unlink()  # links to files of other tests
    Image.new("RGB", (6, 10)).save(picture)
    Image.fromarray(wide).save(mask)
    wrong = [str(found) for found in records(root, "arig", "test") if isinstance(found, InputError)]
    assert len(wrong) == 1 and "is 10x6, but its picture is 6x10" in wrong[0]


def test_ref_avs_rows(releases_root):
    train = by_id(releases_root, "ref_avs", "train")
    assert len(train) == 2 * 10  # the row with an error message instead of an expression is left out
    car = train["ref_avs-2-3"]
    assert car.meta["object"] == "emergency-car" and car.second == 3
    assert car.mask == "ref_avs/gt_mask/-8mcyL3kWNQ_8000_18000/fid_11/00003.png"
    nothing = train["ref_avs-3-0"]
    assert nothing.meta["split"] == "null" and "does not appear" in nothing.target
    assert nothing.audio == "ref_avs/media/null_c-45AfEdAU050_99000_109000/audio.wav"  # not the folder of `vid`
    assert nothing.mask.startswith("ref_avs/gt_mask/null_c-45AfEdAU050")
    unmasked = read(releases_root, "ref_avs", "test_n")
    assert {e.mask for e in unmasked} == {EMPTY_MASK}
    assert not read_mask(releases_root / EMPTY_MASK, 8, "binary", (128, 96)).any()
    seen = by_id(releases_root, "ref_avs", "test_s")
    assert seen["ref_avs-6-0"].meta["uid"] == seen["ref_avs-7-0"].meta["uid"]  # a uid is no key
    assert seen["ref_avs-6-0"].meta["expression"] == "the saw, on the left"
    assert "the saw, on the left at the first second" in seen["ref_avs-6-0"].instruction
    test = read(releases_root, "ref_avs", "test")
    assert [e.meta["split"] for e in test[::10]] == ["seen", "seen", "unseen", "null"]  # and none of TODO


def test_captions(releases_root):
    assert read(releases_root, "valor", "train")[1].video == "valor/video_data/0_3-a_bcdef_0.000_7.000.mp4"
    llava = by_id(releases_root, "video_llava", "train")
    first, last = llava["video_llava-image-0"], llava["video_llava-image-1"]
    assert first.instruction.endswith("\nPlease answer the question:\nRender a clear and concise summary of the photo.")
    assert (first.target, last.target) == ("select luxury furniture.", "a drum on a table .")
    assert "\nWrite a terse but informative summary of the picture." in last.instruction
    assert llava["video_llava-video-0"].target == "Someone plays the piano!"
    assert llava["video_llava-video-1"].video == "video_llava/valley/000001/8.mp4"


def test_audiocaps_has_one_example_per_clip(releases_root):
    train = read(releases_root, "audiocaps", "train")
    assert train[1].target == "The wind is blowing, insects are singing, and rustling occurs"
    assert train[2].target == "Woman giving a spe\u00e9ch"
    (val,) = read(releases_root, "audiocaps", "val")
    assert val.meta["captions"] == [f"Caption {i}" for i in range(5)]
    assert val.audio == "audiocaps/data/97154.wav"  # the only one of its five ids that is there


def test_lvis_masks_are_unions_of_polygons(releases_root):
    (example,) = read(releases_root, "lvis", "train")  # the smaller object is below a thousand pixels
    assert example.image == "lvis/val2017/000000155379.jpg"  # as its coco_url says
    assert "bat_(animal), nocturnal mouselike mammal in the image." in example.instruction
    mask = read_mask(releases_root / example.mask, 128, "binary", (128, 128))
    assert mask[11:59, 12:59].all() and mask[102, 110] and not mask[118, 102] and not mask[61:99].any()
    assert abs(int(mask.sum()) - (49.5 * 50 + 200)) < 50  # the outlines' own pixels belong to it
    with pytest.raises(InputError, match="128x128.*64x64"):
        read_mask(releases_root / example.mask, 128, "binary", (64, 64))


@FUZZ
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_masks_inside_of_an_example_survive_its_json(height, width, data):
    numbers = st.floats(-5, 45, allow_nan=False)
    polygons = data.draw(
        st.lists(st.lists(numbers, min_size=6, max_size=12).filter(lambda p: len(p) % 2 == 0), min_size=1, max_size=3)
    )
    code = lvis.rasterise(Row(None, "", {"segmentation": polygons}), height, width)
    example = Example("x", "s4", "", mask=inline_mask(code), mask_kind="binary")
    restored = from_json(json.loads(json.dumps(to_json(example))), "line 1")
    side = np.lcm(height, width)
    if side < 1500:  # then each pixel of the mask becomes a block
        shown = read_mask(f"root/{restored.mask}", side, "binary", (width, height))
        np.testing.assert_array_equal(shown[:: side // height, :: side // width], lvis.coco.decode(code))


@pytest.mark.parametrize("code", ["rle:", "rle:0x5:0", "rle:5x5", "rle:5x5:oooooooo", "rle:5x5:~", "rle:99999999x1:0"])
def test_text_that_is_no_mask_is_refused(code):
    with pytest.raises(InputError, match="COCO run lengths"):
        read_mask(f"root/{code}", 8, "binary")


def test_own_data_reads_folders_of_frames_in_the_order_of_their_numbers(releases_root):
    video, frames = read(releases_root, "own", "test")
    assert (video.id, video.video) == ("\u526a\u8f91 1", "own/media/test.mp4")
    assert [path.rpartition("/")[2] for path in frames.frames] == [f"frame{k}.jpg" for k in range(1, 11)]


# What all of them have in common.


@pytest.mark.parametrize(("name", "split"), EVERY_SPLIT)
def test_every_example_is_a_valid_record_with_its_media(releases_root, name, split):
    examples = read(releases_root, name, split)
    assert len({example.id for example in examples}) == len(examples) > 0
    for example in examples:
        assert from_json(to_json(example), example.id) == example
        assert example.meta["dataset"] == name
        file, _, line = example.meta["row"].partition(":")
        assert (releases_root / DATASETS[name].folder / file).is_file() and line
        assert list(media_of(example)) and all((releases_root / path).is_file() for _, path in media_of(example))


@pytest.mark.parametrize("name", DATASETS)
def test_examples_become_arrays(releases_root, tokenizer, name):
    config = DataConfig(image_size=32, video_frames=10, visual_queries=2, audio_queries=2, lengths=(512, 1024, 2048))
    for variant in VARIANTS:
        example = read(releases_root, name, "train", variant)[-1]
        if DATASETS[name].stage == "joint":
            fields = {key: example.meta[key] for key in ("question", "expression") if key in example.meta}
            fields |= {"second": example.second} if example.mask_kind != "none" else {}
            assert example.instruction == TASKS[example.task].instruction(variant=variant, **fields)
        row = load(example, releases_root, tokenizer, DataConfig(**{**vars(config), "prompt_only": not example.target}))
        assert row["frame_mask"].any() == bool(example.video or example.frames or example.image)
        assert row["audio_mask"].any() == (example.windows != "none")
        if example.mask_kind != "none" and example.mask != EMPTY_MASK:
            wanted = read_mask(releases_root / example.mask, 32, example.mask_kind)
            np.testing.assert_array_equal(row["seg_target"][0], wanted)
        assert bucket_for(example, tokenizer, config).masks == (example.mask_kind != "none")


def annotation_files(root, name, split):
    """The annotation files whose rows a split has."""
    rows = [e.meta["row"].split(":")[0] for e in read(root, name, split)]
    return [root / DATASETS[name].folder / file for file in dict.fromkeys(rows)]


@pytest.mark.parametrize(("name", "split"), [(n, s) for n, s in EVERY_SPLIT if s in ("train", "test")])
def test_byte_order_marks_line_ends_and_empty_last_lines_change_nothing(copied, name, split):
    root = copied(DATASETS[name].folder)
    before = read(root, name, split)
    for file in annotation_files(root, name, split):
        lines = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n")
        releases.text(file, f"{lines}\n\n \n", newline="\r\n", bom=True)
    assert read(root, name, split) == before


@pytest.mark.parametrize(("name", "split"), [(n, s) for n, s in EVERY_SPLIT if s in ("train", "test")])
def test_each_missing_file_is_named_and_can_only_be_skipped_on_request(copied, name, split):
    root = copied(DATASETS[name].folder)
    examples = read(root, name, split)
    field, path = list(media_of(examples[-1]))[-1]
    (root / path).unlink()
    needing = [example for example in examples if path in dict(map(reversed, media_of(example)))]
    found = errors(root, name, split)
    if field == "frames" and name == "own":  # the folder's list is shorter by one
        assert not found
        return
    if name == "audiocaps" and split == "test":
        path = "audiocaps/data/103.wav"  # none of the clip's ids is there: the first one stands for them
    if not (name.startswith("arig")):
        assert len(found) == len(needing)
    assert all(isinstance(error, MissingFile) and path in error.problem for error in found)
    row = examples[-1].meta["row"]
    assert all(re.search(r":(\d+|item \d+)$", error.where) for error in found)
    assert str(root / DATASETS[name].folder / row) in {error.where for error in found}
    with pytest.raises(MissingFile, match="missing=skip"):
        read(root, name, split)
    rest = [example for example in examples if example not in needing]
    if rest:
        assert read(root, name, split, missing="skip") == rest


# (dataset, split, annotation file, text in it, what stands there instead, field, part of the message)
MALFORMED = [
    ("ave", "train", "trainSet.txt", "&good&0&10\nChurch", "&good&0\nChurch", "", "4 fields, not 5"),
    ("ave", "train", "trainSet.txt", "Violin, fiddle", "Violin", "Category", "unknown value 'Violin'"),
    ("ave", "train", "trainSet.txt", "-67UNKFmRLk", "../../secret", "VideoID", "must look like"),
    ("ave", "train", "trainSet.txt", "-67UNKFmRLk", "-67UNK\u0007RLk", "VideoID", "must look like"),
    ("ave", "train", "trainSet.txt", "good&7&10", "good&7&11", "EndTime", "from 0 to 10"),
    ("ave", "train", "trainSet.txt", "good&7&10", "good&7&7", "EndTime", "lasts from 7 to 7"),
    ("ave", "train", "trainSet.txt", "good&7&10", "good&seven&10", "StartTime", "whole number"),
    ("ave", "train", "trainSet.txt", "Banjo&0f", "Mandolin&0f", "id", "duplicate id"),
    ("ave", "train", "trainSet.txt", "\nViolin", "\n\nViolin", "", "1 fields, not 5"),
    ("avvp", "train", "data/AVVP_train.csv", "_101.8_111.8", "", "filename", "must look like"),
    ("avvp", "train", "data/AVVP_train.csv", "\tCar", "\tcar", "event_labels", "unknown value 'car'"),
    ("avvp", "train", "data/AVVP_train.csv", "\tCar", " Car", "", "1 fields, not 2"),
    ("avvp", "train", "data/AVVP_train.csv", "AP0061o0Nvk_101.8_111.8", "BjCEufrlXm4_20_30", "id", "duplicate id"),
    ("avvp", "test", "data/AVVP_eval_audio.csv", "\t8\t10\tBlender", "\t8\tten\tBlender", "offset", "whole number"),
    ("avvp", "test", "data/AVVP_eval_audio.csv", "\t8\t10\tBlender", "\t8\t10\tMixer", "event_labels", "unknown value"),
    ("avvp", "test", "data/AVVP_eval_visual.csv", "\t1\t9\tDog", "\t1\t9", "", "3 fields, not 4"),
    ("avqa", "train", "data/json_update/avqa-train.json", '"three"', '"eleven"', "anser", "unknown value 'eleven'"),
    ("avqa", "train", "data/json_update/avqa-train.json", '"three"', "3", "anser", "not text"),
    ("avqa", "train", "data/json_update/avqa-train.json", '"anser": "three"', '"answer": "three"', "anser", "missing"),
    (
        "avqa",
        "train",
        "data/json_update/avqa-train.json",
        '"00000100",\n    "question_id": 35',
        '"/etc/passwd",\n    "question_id": 35',
        "video_id",
        "must look like",
    ),
    ("avqa", "train", "data/json_update/avqa-train.json", r"[\"violin\"]", "[]", "templ_values", "fill the slots"),
    ("avqa", "train", "data/json_update/avqa-train.json", r"[\"violin\"]", "[violin]", "templ_values", "JSON list"),
    (
        "avqa",
        "train",
        "data/json_update/avqa-train.json",
        r"[\"Audio-Visual\", \"Counting\"]",
        r"[\"Audio-Visual\", \"Count\"]",
        "type",
        "unknown value",
    ),
    ("avqa", "train", "data/json_update/avqa-train.json", '"question_id": 36', '"question_id": 35', "id", "duplicate"),
    (
        "avqa",
        "train",
        "data/json_update/avqa-train.json",
        '"question_id": 36',
        '"question_id": 3.6',
        "question_id",
        "whole number",
    ),
    ("s4", "test", "metadata.csv", "HxMoMMrA6Eo_0_5000", "HxMoMMrA6Eo/../x", "uid", "must look like"),
    ("s4", "test", "metadata.csv", ",test,v1s", ",test,v3s", "label", "unknown value 'v3s'"),
    ("s4", "test", "metadata.csv", ",test,v1s", ",tset,v1s", "split", "unknown value 'tset'"),
    ("ms3", "test", "metadata.csv", ",train,v1s", ",train", "", "6 fields, not 7"),
    ("s4_object", "val", "Single-source/s4_meta_data.csv", "race_car", "race car", "category", "unknown value"),
    ("s4_object", "val", "Single-source/s4_meta_data.csv", "XVlnx4ofu2k", "..", "name", "must look like"),
    ("ms3_object", "val", "Multi-sources/ms3_meta_data.csv", "xv7eM6-UmkY_36", "1.2E+10", "video_id", "spreadsheet"),
    ("ms3_object", "val", "Multi-sources/ms3_meta_data.csv", "_36,val", "_36,valid", "split", "unknown value 'valid'"),
    ("ref_avs", "train", "metadata.csv", "emergency-car_1", "emergency car_1", "uid", "must look like"),
    ("ref_avs", "train", "metadata.csv", ",train,11,", ",train,x,", "fid", "whole number"),
    ("ref_avs", "train", "metadata.csv", ",train,11,", ",trian,11,", "split", "unknown value 'trian'"),
    ("ref_avs", "train", "metadata.csv", "The object making the longest sound duration.", " ", "exp", "is empty"),
    ("ref_avs", "test_s", "metadata.csv", '"the saw, on the left "', '"the saw, on the left', "", "quotation"),
    ("valor", "train", "desc_train.json", "A short one", "  ", "desc", "is empty"),
    ("valor", "train", "desc_train.json", "0_3-a_bcdef_0.000_7.000", "0_3/a_bcdef_0_7", "video_id", "must look like"),
    ("valor", "train", "desc_train.json", "0_3-a_bcdef_0.000_7.000", "x-2Abohj8VY_30.000_40.000", "id", "duplicate"),
    (
        "video_llava",
        "train",
        "llava_image_.json",
        "llava_image/00453/004539376.jpg",
        "../004539376.jpg",
        "image",
        "leaves the data root",
    ),
    ("video_llava", "train", "valley_.json", "valley/000001/7.mp4", "/valley/000001/7.mp4", "video", "leaves"),
    ("video_llava", "train", "valley_.json", '"video": "valley/000001/7.mp4"', '"video": 7', "image", "exactly one"),
    ("video_llava", "train", "valley_.json", '"Nothing"', '""', "conversations[1]", "is empty"),
    ("video_llava", "train", "valley_.json", '{"from": "gpt", "value": "Nothing"}', "null", "conversations[1]", "text"),
    ("audiocaps", "train", "dataset/train.csv", "11542,", "x,", "audiocap_id", "whole number"),
    ("audiocaps", "train", "dataset/train.csv", ",80,", ",80.5,", "start_time", "whole number"),
    ("audiocaps", "train", "dataset/train.csv", "A woman talks nearby as water pours", "", "caption", "is empty"),
    ("audiocaps", "train", "dataset/train.csv", "Woman giving", "Woman, giving", "", "5 fields, not 4"),
    (
        "lvis",
        "train",
        "lvis_v1_train.json",
        "[100, 100, 120, 100, 120, 120]",
        "[100, 100, 120]",
        "segmentation",
        "three points",
    ),
    (
        "lvis",
        "train",
        "lvis_v1_train.json",
        "[100, 100, 120, 100, 120, 120]",
        "[100, 100, NaN, 100, 120, 120]",
        "segmentation",
        "three points",
    ),
    (
        "lvis",
        "train",
        "lvis_v1_train.json",
        '"category_id": 36, "area": 2900.5',
        '"category_id": 37, "area": 2900.5',
        "category_id",
        "unknown category_id 37",
    ),
    ("lvis", "train", "lvis_v1_train.json", "org/val2017/", "org/../", "coco_url", "leaves the data root"),
    ("own", "test", "test.jsonl", '"video": "media/test.mp4"', '"video": "../test.mp4"', "video", "leaves"),
    ("own", "test", "test.jsonl", '"video": "media/test.mp4"', '"video": "/etc/passwd"', "video", "leaves"),
    ("own", "test", "test.jsonl", '"audio": "media/test.wav"', '"audio": "media\\\\test.wav"', "audio", "leaves"),
    ("own", "test", "test.jsonl", '"frames": "media/test_frames"', '"frames": ["a/../../x.jpg"]', "frames", "leaves"),
    ("own", "test", "test.jsonl", '"frames": "media/test_frames"', '"frames": "../own"', "frames", "leaves"),
    ("own", "test", "test.jsonl", '"id": "two"', '"id": "\u526a\u8f91 1"', "id", "duplicate id"),
    ("own", "test", "test.jsonl", '"id": "two"', '"id": "two', "", "not valid JSON"),
    ("own", "test", "test.jsonl", '"task": "avcap", "instruction"', '"task": "song", "instruction"', "task", "unknown"),
]


@pytest.mark.parametrize(
    ("name", "split", "file", "old", "new", "field", "message"),
    MALFORMED,
    ids=[f"{row[0]}-{row[5] or 'row'}-{number}" for number, row in enumerate(MALFORMED)],
)
def test_a_malformed_row_is_one_error_that_names_its_place(copied, name, split, file, old, new, field, message):
    root = copied(DATASETS[name].folder)
    path = root / DATASETS[name].folder / file
    content = path.read_bytes().decode()
    assert old in content
    releases.text(path, content.replace(old, new, 1), newline="\n")
    found = errors(root, name, split)
    assert len(found) == 1 and not isinstance(found[0], MissingFile)
    assert found[0].where.startswith(str(path)) and found[0].field == field and message in str(found[0])
    assert found[0].fix and "\n" not in str(found[0])
    line = re.search(r":(?:annotations:)?(?:item |image_id )?(\d+)$", found[0].where)
    assert line, found[0].where
    with pytest.raises(InputError) as raised:
        read(root, name, split, missing="skip")  # only missing files can be skipped
    assert str(raised.value) == str(found[0])


@pytest.mark.parametrize(
    ("name", "split", "content", "message"),
    [
        ("ave", "train", b"\xff\xfe\x00", "not UTF-8"),
        ("avqa", "test", b"[{", "not valid JSON"),
        ("avqa", "test", b"{}", "not a list"),
        ("avqa", "test", b"[" * 100_000, "JSON"),
        ("valor", "val", b'[{"video_id": ' + b"9" * 5000 + b"}]", "JSON"),
        ("lvis", "val", b"[]", "images"),
        ("audiocaps", "val", b"", "is empty"),
        ("audiocaps", "val", b"id\n", "audiocap_id"),
        ("s4", "val", b"uid,label,split\n", "a_obj"),
        ("video_llava", "train", b"null", "not a list"),
    ],
)
def test_an_annotation_file_that_cannot_be_read_stops_the_split(copied, name, split, content, message):
    root = copied(DATASETS[name].folder)
    file = annotation_files(root, name, split)[0]
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        list(records(root, name, split))
    assert raised.value.where.startswith(str(file))
    file.unlink()
    if name != "video_llava":  # it has another file
        with pytest.raises(MissingFile, match="no such annotation file"):
            list(records(root, name, split))


def test_links_may_not_leave_a_dataset_but_the_dataset_may_be_one(copied, tmp_path):
    root = copied("ave", "avsbench_semantic")
    outside = tmp_path / "outside.mp4"
    video = root / "ave/AVE/RUhOCu3LNXM.mp4"
    os.rename(video, outside)
    video.symlink_to(outside)
    found = errors(root, "ave", "train")
    assert [(e.field, "link out of the data root" in e.problem) for e in found] == [("video", True)]
    with pytest.raises(InputError, match="link the dataset's whole folder"):
        read(root, "ave", "train", missing="skip")  # it is there, but not to be trusted

    video.unlink()
    video.symlink_to("-67UNKFmRLk.mp4")  # inside
    assert not errors(root, "ave", "train")
    video.unlink()
    video.symlink_to("nowhere.mp4")
    assert isinstance(errors(root, "ave", "train")[0], MissingFile)

    part = root / "avsbench_semantic/v1s"
    os.rename(part, tmp_path / "v1s")
    part.symlink_to(tmp_path / "v1s")  # a folder that leads out
    assert all("link out" in e.problem for e in errors(root, "s4", "test")) and errors(root, "s4", "test")

    other = tmp_path / "linked"
    other.mkdir()
    (other / "avsbench_semantic").symlink_to(root / "avsbench_semantic")
    assert read(other, "ms3", "test") == read(root, "ms3", "test")


# Any text at all: an Example or an InputError, never another exception.

CELL = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=("Cs",)), max_size=12)


@FUZZ
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_tables_give_back_what_was_written(tmp_path_factory, rows, newline, bom):
    folder = tmp_path_factory.mktemp("table")
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([("a", "b", "c"), *rows])
    releases.text(folder / "t.csv", file.getvalue(), newline, bom)
    found = list(Release(folder).table("t.csv", ("a", "c")))
    assert [tuple(row.values.values()) for row in found] == rows
    assert [row.place for row in found] == [f"t.csv:{number}" for number in range(2, len(rows) + 2)]


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes_are_rows_or_input_errors(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "t").write_bytes(content)
    for read_file in (
        lambda: list(Release(folder).table("t", ("a", "b"), "&", quoted=False, header=None)),
        lambda: list(Release(folder).table("t", ("a",))),
        lambda: list(Release(folder).records("t")),
    ):
        try:
            assert all(isinstance(found, Row | InputError) for found in read_file())
        except InputError as error:
            assert error.where.startswith(str(folder / "t"))


@pytest.mark.parametrize("name", [name for name in DATASETS if not name.startswith("arig")])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_damaged_annotations_are_examples_or_input_errors(releases_root, tmp_path_factory, name, data):
    """One stretch of the real annotations replaced by any other text."""
    split = "train"
    folder = DATASETS[name].folder
    root = tmp_path_factory.mktemp("damaged")
    whole = len(read(releases_root, name, split))
    for file in annotation_files(releases_root, name, split):
        content = file.read_bytes().decode()
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        put = data.draw(st.text(st.characters(exclude_categories=("Cs",)), max_size=8))
        releases.text(root / folder / file.relative_to(releases_root / folder), content[:start] + put + content[end:])
    try:
        found = list(records(root, name, split))  # without the media: a sound row is a MissingFile
    except InputError as error:
        assert str(root) in error.where
        return
    assert len(found) <= 2 * whole + 20 and all(isinstance(one, Example | InputError) for one in found)
    assert all(str(root) in one.where for one in found if isinstance(one, InputError))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("name", ["avqa", "valor", "video_llava", "lvis", "own"])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_json_in_a_field_is_an_example_or_an_input_error(releases_root, tmp_path_factory, name, data):
    file = annotation_files(releases_root, name, "train")[0]
    content = file.read_bytes().decode("utf-8-sig")
    lines = content.strip().splitlines() if name == "own" else [content]
    whole = json.loads(lines[0])
    record = (
        data.draw(st.sampled_from(whole["images"] + whole["annotations"] + whole["categories"]))
        if name == "lvis"
        else whole[0]
        if isinstance(whole, list)
        else whole
    )
    record[data.draw(st.sampled_from(sorted(record)))] = data.draw(JSON)
    root = tmp_path_factory.mktemp("json")
    releases.text(root / file.relative_to(releases_root), "\n".join([json.dumps(whole), *lines[1:]]))
    try:
        found = list(records(root, name, "train"))
    except InputError:
        return
    assert all(isinstance(one, Example | InputError) for one in found)
