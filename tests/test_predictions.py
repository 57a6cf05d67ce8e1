"""Predictions on disk: masks survive to a level, lines survive a kill, lines of other programs find their example."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from crab_jax import predictions as files
from crab_jax.errors import InputError
from crab_jax.inference import read_answer
from crab_jax.tasks import TASKS
from data_pipelines.examples import Example

RNG = np.random.default_rng(2)


def test_probabilities_keep_their_level_and_their_side_of_one_half(tmp_path):
    mask = RNG.random((9, 9)).astype(np.float32)
    mask[0, :5] = 0, 1, 0.5, np.nextafter(np.float32(0.5), 1), np.nextafter(np.float32(0.5), 0)
    files.mask_picture(mask).save(tmp_path / "m.png")
    found = files.load_mask("m.png", "binary", tmp_path)
    assert np.abs(found - mask).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_array_equal(found > 0.5, mask > 0.5)
    again = files.mask_picture(found)
    np.testing.assert_array_equal(np.array(again), np.array(Image.open(tmp_path / "m.png")))


def test_class_ids_and_masks_of_others_are_read(tmp_path):
    ids = RNG.integers(0, 71, (6, 6)).astype(np.int32)
    files.mask_picture(ids).save(tmp_path / "ids.png")
    np.testing.assert_array_equal(files.load_mask("ids.png", "semantic", tmp_path), ids)
    half = (RNG.random((6, 6)) < 0.5).astype(np.uint8)
    Image.fromarray(half).save(tmp_path / "01.png")
    Image.fromarray(half * 255).convert("P").save(tmp_path / "pred.png")  # as the released code writes it
    rle = coco.encode(np.asfortranarray(half))
    text = {"size": rle["size"], "counts": rle["counts"].decode()}
    for mask in ("01.png", "pred.png", text, "/elsewhere/mask_img_dir/pred.png"):
        np.testing.assert_array_equal(files.load_mask(mask, "binary", tmp_path), half)
    Image.fromarray(np.full((4, 8), 255, np.uint8)).save(tmp_path / "wide.png")
    assert files.load_mask("wide.png", "binary", tmp_path).shape == (224, 224)
    for bad, kind, match in (("none.png", "binary", "no such file"), ({"size": [2, 2]}, "binary", "run-length"),
                             (text, "semantic", "class ids are needed")):
        with pytest.raises(InputError, match=match):
            files.load_mask(bad, kind, tmp_path)


EXAMPLES = [Example(id=f"e{i}", task="avcap", instruction="?", meta={"captions": ["é"]}) for i in range(4)]


def write(path, examples):
    return list(files.append(path, (read_answer(e, f"é {e.id}", None) for e in examples)))


def test_a_file_cut_anywhere_keeps_its_whole_lines_and_can_be_continued(tmp_path):
    path = tmp_path / files.FILE
    write(path, EXAMPLES)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = [row["id"] for row in files.read_rows(path)]
        assert complete == [e.id for e in EXAMPLES[:len(complete)]]
        if cut % 29 == 0:
            write(path, EXAMPLES[len(complete):])
            assert path.read_bytes() == whole


def test_parts_are_merged_in_order_each_sample_once(tmp_path):
    write(tmp_path / "predictions.1.jsonl", EXAMPLES[1::2])
    write(tmp_path / "predictions.0.jsonl", EXAMPLES[0::2])
    write(tmp_path / files.FILE, EXAMPLES[2:3])
    files.merge(tmp_path, ["e3", "e1", "e0"])
    assert [row["id"] for row in files.read_rows(tmp_path / files.FILE)] == ["e3", "e1", "e0", "e2"]
    assert [path.name for path in files.parts(tmp_path)] == [files.FILE]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    for text, match in (('{"id": "a"}\n{"id": \n{"id": "b"}\n', "p.jsonl:2.*not valid JSON"), ("[1]\n", "JSON object")):
        path.write_text(text)
        with pytest.raises(InputError, match=match):
            files.read_rows(path)
    with pytest.raises(InputError, match="no such file"):
        files.read_rows(tmp_path / "none.jsonl")


AVQA = [Example(id=f"q{i}", task="avqa", instruction=TASKS["avqa"].instruction(question=question),
                video=f"v/{clip}.mp4", meta={"answer": "two", "question_id": i})
        for i, (clip, question) in enumerate([("0001", "How many?"), ("0001", "Where?"), ("0002", "How many?")])]
S4 = [Example(id=f"s{k}", task="s4", instruction=TASKS["s4"].instruction(second=k), video="x/clip.mp4",
              seg_image=f"v1s/uid_0/frames/{k}.jpg", mask="m.png", mask_kind="binary") for k in range(3)]
REF = [Example(id=f"r{k}", task="ref-avs", instruction="?", target=TASKS["ref-avs"].target(f"The {name} one.", name),
               seg_image="media/uid/frames/0.jpg", mask="m.png", mask_kind="binary")
       for k, name in enumerate(("cat", "dog"))]


def test_lines_of_the_released_code_find_their_examples():
    """The keys are those that scripts/finetune/inference_hyper_lora.py writes for each task."""
    text = "<s> So the answer is <answer> two </answer>.</s><unk>"
    by_qid = [{"instruction": e.instruction, "output": "two", "predict": text, "qid": e.meta["question_id"]}
              for e in AVQA]
    by_clip = [{"instruction": e.instruction, "output": "two", "predict": text,
                "video_path": f"/group/data/video_data/{e.video[2:]}"} for e in AVQA]
    masks = [{"image_path": f"/group/AVS/v1s/uid_0/frames/{k}.jpg", "gt_path": "a/gt.png", "pred_path": "a/pred.png",
              "output": "It is", "iou": 0.5, "fscore": 0.6} for k in range(3)]
    refs = [{"image_path": "/REFAVS/media/uid/frames/0.jpg", "pred_path": "p.png", "label": e.target, "output": "o"}
            for e in REF]
    for rows, examples in ((by_qid, AVQA), (by_clip, AVQA), (masks, S4), (refs, REF)):
        assert files.assign(rows, examples, "f") == {e.id: row for e, row in zip(examples, rows, strict=True)}
    assert files.text_of(by_qid[0], "f") == text and files.text_of(masks[0], "f") == "It is"


@pytest.mark.parametrize(("rows", "match"), [
    ([{"id": "z", "text": ""}], "f:1.*no example 'z'"), ([{"id": "q0"}, {"id": "q0"}], "f:2.*second answer"),
    ([{"video_path": "a/0001.mp4", "predict": ""}], "fits 2 examples"), ([{"qid": 99}], "fits 0 examples"),
    ([{"video_path": "a/9.mp4"}], "fits 0 examples"), ([{"predict": "x"}], "fits 3 examples")])
def test_a_line_that_fits_no_example_or_several_is_named(rows, match):
    with pytest.raises(InputError, match=match):
        files.assign(rows, AVQA, "f")


def test_a_line_without_an_answer_is_named():
    for row in ({"id": "q0", "output": "gold only"}, {"id": "q0", "text": None}):
        with pytest.raises(InputError, match="text.*missing"):
            files.answer_of(row, AVQA[0], None, "f:1")
    assert files.answer_of(None, AVQA[0], None, "f:1").text == ""
    assert json.dumps(files.answer_of({"text": "x", "mask": "m.png"}, AVQA[0], None, "f").text)  # masks of text tasks
