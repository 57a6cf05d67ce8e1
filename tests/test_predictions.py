"""Predictions on disk: masks survive to a level, lines survive a kill, lines of other programs find their example."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco

from crab_jax.evaluation import predictions as files
from crab_jax.inference import read_answer
from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from crab_jax.visualize import overlay
from data_pipelines.examples import Example
from data_pipelines.media import decode_runs, read_mask

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


@pytest.mark.parametrize(
    ("ending", "options"), [("webp", {"quality": 60}), ("jpg", {"quality": 60}), ("avif", {"quality": 40})]
)
def test_a_mask_in_colours_of_a_format_that_blurs_is_read_by_its_greys(tmp_path, ending, options):
    """Black and white in RGB come back with a tinge; a red object, which is as good in a PNG, is refused."""
    mask = np.zeros((24, 36), np.uint8)
    mask[4:18, 6:16] = 255
    red = mask[..., None] * np.array([1, 0, 0], np.uint8)
    for colours, ours in ((np.repeat(mask[..., None], 3, 2), True), (red, False)):
        Image.fromarray(colours).save(tmp_path / f"m.{ending}", **options)
        if ours:
            found = files.load_mask(f"m.{ending}", "binary", tmp_path, {8: 255})
            wanted = np.asarray(Image.fromarray(mask / np.float32(255)).resize((224, 224), Image.Resampling.BILINEAR))
            assert ((found > 0.5) != (wanted > 0.5)).mean() < 0.02
        else:
            with pytest.raises(InputError, match="with colours, which that does not keep exactly"):
                files.load_mask(f"m.{ending}", "binary", tmp_path)


def test_masks_of_which_nothing_is_above_one_half_are_told(tmp_path):
    """Percent, or a model that is never sure: which of the two cannot be known."""
    for name, high in (("a", 90), ("b", 60)):
        Image.fromarray(np.array([[10, high], [0, 20]], np.uint8)).save(tmp_path / f"{name}.png")
    rows = {name: {"id": name, "mask": f"{name}.png"} for name in "ab"}
    (said,) = files.MaskLevels(rows, {"a", "b"}, tmp_path).notes
    assert "no grey level above 90 of 255" in said and "mask_levels" in said
    Image.fromarray(np.array([[10, 200], [0, 20]], np.uint8)).save(tmp_path / "b.png")
    assert not files.MaskLevels(rows, {"a", "b"}, tmp_path).notes


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
    for bad, kind, match in (
        ("none.png", "binary", "no such file"),
        ({"size": [2, 2]}, "binary", "run-length"),
        (text, "semantic", "class ids are needed"),
    ):
        with pytest.raises(InputError, match=match):
            files.load_mask(bad, kind, tmp_path)


@pytest.mark.parametrize(
    ("level", "bits", "refused"),
    [
        (1, 8, 0),
        (2, 8, 1),
        (100, 8, 1),
        (128, 8, 0),
        (255, 8, 0),
        (7, 16, 1),
        (255, 16, 0),
        (1000, 16, 1),
        (65535, 16, 0),
    ],
)
def test_masks_of_one_dark_level_are_not_read_as_nothing(tmp_path, level, bits, refused):
    """A class id, or 0 and 100: a hundredth of a probability everywhere is no answer of any program."""
    Image.fromarray((np.eye(4) * level).astype(np.uint8 if bits == 8 else np.uint16)).save(tmp_path / "m.png")
    Image.fromarray(np.zeros((4, 4), np.uint8 if bits == 8 else np.uint16)).save(tmp_path / "empty.png")
    paths = [tmp_path / "m.png", tmp_path / "empty.png"]
    if refused:
        with pytest.raises(InputError, match=f"grey level {level} beside 0.*as nothing"):
            files.full_levels(paths)
    else:
        full = files.full_levels(paths)
        assert (files.load_mask("m.png", "binary", tmp_path, full) > 0.5).sum() == 4


@pytest.mark.parametrize(
    "row",
    [
        {"id": ["a"]},
        {"id": {}},
        {"id": 3},
        {"id": None},
        {"video_path": 3},
        {"image_path": ["a"]},
        {"question_id": [1]},
    ],
)
def test_what_names_an_example_is_text(row):
    with pytest.raises(InputError, match="f:1"):
        files.assign([{**row, "text": "x"}], EXAMPLES, "f")


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
        assert complete == [e.id for e in EXAMPLES[: len(complete)]]
        if cut % 29 == 0:
            write(path, EXAMPLES[len(complete) :])
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


AVQA = [
    Example(
        id=f"q{i}",
        task="avqa",
        instruction=TASKS["avqa"].instruction(question=question),
        video=f"v/{clip}.mp4",
        meta={"answer": "two", "question_id": i},
    )
    for i, (clip, question) in enumerate([("0001", "How many?"), ("0001", "Where?"), ("0002", "How many?")])
]
S4 = [
    Example(
        id=f"s{k}",
        task="s4",
        instruction=TASKS["s4"].instruction(second=k),
        video="x/clip.mp4",
        seg_image=f"v1s/uid_0/frames/{k}.jpg",
        mask="m.png",
        mask_kind="binary",
    )
    for k in range(3)
]
REF = [
    Example(
        id=f"r{k}",
        task="ref-avs",
        instruction="?",
        target=TASKS["ref-avs"].target(f"The {name} one.", name),
        seg_image="media/uid/frames/0.jpg",
        mask="m.png",
        mask_kind="binary",
    )
    for k, name in enumerate(("cat", "dog"))
]


def test_lines_of_the_released_code_find_their_examples():
    """The keys are those that scripts/finetune/inference_hyper_lora.py writes for each task."""
    text = "<s> So the answer is <answer> two </answer>.</s><unk>"
    by_qid = [
        {"instruction": e.instruction, "output": "two", "predict": text, "qid": e.meta["question_id"]} for e in AVQA
    ]
    by_clip = [
        {
            "instruction": e.instruction,
            "output": "two",
            "predict": text,
            "video_path": f"/group/data/video_data/{e.video[2:]}",
        }
        for e in AVQA
    ]
    masks = [
        {
            "image_path": f"/group/AVS/v1s/uid_0/frames/{k}.jpg",
            "gt_path": "a/gt.png",
            "pred_path": "a/pred.png",
            "output": "It is",
            "iou": 0.5,
            "fscore": 0.6,
        }
        for k in range(3)
    ]
    refs = [
        {"image_path": "/REFAVS/media/uid/frames/0.jpg", "pred_path": "p.png", "label": e.target, "output": "o"}
        for e in REF
    ]
    for rows, examples in ((by_qid, AVQA), (by_clip, AVQA), (masks, S4), (refs, REF)):
        assert files.assign(rows, examples, "f") == {e.id: row for e, row in zip(examples, rows, strict=True)}
    assert files.text_of(by_qid[0], "f") == text and files.text_of(masks[0], "f") == "It is"


def test_gold_answers_in_the_wording_of_the_release_find_their_example():
    """Several expressions about one picture are told apart by their labels, which say "is null" and "guitar_man"."""
    said = [("The loud one", ""), ("The loudest one", ""), ("The third one", "guitar and man")]
    examples = [
        Example(
            id=f"n{k}",
            task="ref-avs",
            instruction="?",
            target=TASKS["ref-avs"].target(expression, name),
            seg_image="media/uid/frames/0.jpg",
            mask="m.png",
            mask_kind="binary",
        )
        for k, (expression, name) in enumerate(said)
    ]
    rows = [
        {
            "image_path": "/REFAVS/media/uid/frames/0.jpg",
            "predict": "",
            "label": e.target.replace("does not appear", "is null").replace("guitar and man", "guitar_man") + "</s>",
        }
        for e in examples
    ]
    assert files.assign(rows, examples, "f") == {e.id: row for e, row in zip(examples, rows, strict=True)}


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"id": "z", "text": ""}], "f:1.*no example 'z'"),
        ([{"id": "q0"}, {"id": "q0"}], "f:2.*second answer"),
        ([{"video_path": "a/0001.mp4", "predict": ""}], "fits 2 examples"),
        ([{"qid": 99}], "fits 0 examples"),
        ([{"video_path": "a/9.mp4"}], "fits 0 examples"),
        ([{"predict": "x"}], "fits 3 examples"),
    ],
)
def test_a_line_that_fits_no_example_or_several_is_named(rows, match):
    with pytest.raises(InputError, match=match):
        files.assign(rows, AVQA, "f")


def test_a_line_without_an_answer_is_named():
    for row in ({"id": "q0", "output": "gold only"}, {"id": "q0", "text": None}):
        with pytest.raises(InputError, match="text.*missing"):
            files.answer_of(row, AVQA[0], None, "f:1")
    assert files.answer_of(None, AVQA[0], None, "f:1").text == ""
    assert json.dumps(files.answer_of({"text": "x", "mask": "m.png"}, AVQA[0], None, "f").text)  # masks of text tasks


# Scales of grey levels: what a mask of ours, or of another program, says.


def binary(n, task="s4"):
    return [Example(id=f"e{i}", task=task, instruction="?", mask="m.png", mask_kind="binary") for i in range(n)]


def levels_of(folder, rows):
    """The masks that are scored of these lines, by id, and what is said about them."""
    found = files.MaskLevels(rows, set(rows), folder)
    examples = {example.id: example for example in binary(len(rows))}
    return {
        name: files.answer_of(row | {"text": ""}, examples[name], folder, name, found.of(name, row, name)).mask
        for name, row in rows.items()
    }, found.notes


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), st.sampled_from([1, 0.02, 0.005, 0.003, 0]))
def test_a_mask_that_we_wrote_is_read_as_it_was_written_whatever_its_values(tmp_path, values, scale):
    """The highest level of a nearly empty mask is 1 of 255, not 1."""
    mask = (np.array(values, np.float64) * scale).reshape(2, 2)
    files.mask_picture(mask).save(tmp_path / "m.png")
    (tmp_path / "n.png").write_bytes(overlay.png(files.mask_picture(mask)))
    for name in ("m.png", "n.png"):
        found = files.load_mask(name, "binary", tmp_path)
        assert np.abs(found - mask).max() <= 0.5 / 255 + 1e-6
        np.testing.assert_array_equal(found > 0.5, mask > 0.5)
        np.testing.assert_array_equal(np.array(files.mask_picture(found)), np.array(Image.open(tmp_path / name)))


def test_a_checkpoint_and_its_predictions_file_are_scored_alike_even_without_the_mark(tmp_path):
    """Masks of earlier versions have no mark; their names tell."""
    examples = binary(3)
    nothing = np.full((4, 4), 0.004)
    list(files.append(tmp_path / files.FILE, (read_answer(e, "", nothing) for e in examples)))
    rows = files.read_all(tmp_path)
    for row in rows.values():  # as they were before there was a mark
        bare = Image.open(tmp_path / row["mask"])
        Image.fromarray(np.array(bare)).save(tmp_path / row["mask"])
        assert np.array(bare).max() == 1
    masks, told = levels_of(tmp_path, rows)
    assert not told and all(mask.max() == 1 / 255 for mask in masks.values())
    assert all(files.answer_of(rows[e.id], e, tmp_path, "", files.OURS).mask.max() == 1 / 255 for e in examples)


def write_levels(folder, arrays):
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"m{i}.png")
    return {f"e{i}": {"mask": f"m{i}.png"} for i in range(len(arrays))}


EIGHT, SIXTEEN = (
    (lambda *values: np.array([values[:2], values[2:]], np.uint8)),
    (lambda *values: np.array([values[:2], values[2:]], np.uint16)),
)


@pytest.mark.parametrize(
    ("arrays", "most", "told"),
    [
        ([EIGHT(0, 1, 1, 0), EIGHT(0, 0, 0, 0)], 1, 1),
        ([EIGHT(0, 1, 1, 0), EIGHT(0, 0, 255, 0)], 255, 0),  # one file of 0 and 1 among others is nearly empty
        ([EIGHT(0, 1, 1, 0), EIGHT(0, 128, 2, 0)], 255, 0),
        ([SIXTEEN(0, 1, 1, 0), SIXTEEN(0, 0, 1, 0)], 1, 1),
        ([SIXTEEN(0, 255, 1, 0), SIXTEEN(0, 0, 1, 0)], 255, 1),
        ([SIXTEEN(0, 255, 1, 0), SIXTEEN(0, 0, 65535, 0)], 65535, 0),
        ([SIXTEEN(0, 30000, 40000, 0), EIGHT(0, 1, 0, 0)], None, 1),
    ],
)  # each depth for itself
def test_grey_files_of_others_are_read_by_all_of_a_run(tmp_path, arrays, most, told):
    masks, said = levels_of(tmp_path, write_levels(tmp_path, arrays))
    assert len(said) == told
    for i, array in enumerate(arrays):
        scale = most or (65535 if array.dtype == np.uint16 else 1)
        np.testing.assert_allclose(masks[f"e{i}"], array / scale)


def test_a_line_may_say_which_level_is_one(tmp_path):
    rows = write_levels(tmp_path, [EIGHT(0, 1, 1, 0), EIGHT(0, 1, 0, 0)])
    masks, said = levels_of(tmp_path, {name: row | {"mask_levels": 255} for name, row in rows.items()})
    assert not said and masks["e0"].max() == 1 / 255
    for bad, match in (("255", "mask_levels"), (True, "mask_levels"), (100, "mask_levels")):
        with pytest.raises(InputError, match=match):
            levels_of(tmp_path, {"e0": rows["e0"] | {"mask_levels": bad}})
    Image.fromarray(EIGHT(0, 255, 0, 0)).save(tmp_path / "m0.png")
    with pytest.raises(InputError, match="grey level 255, above 1"):
        levels_of(tmp_path, {"e0": rows["e0"] | {"mask_levels": 1}})


def paletted(ids, *colours):
    picture = Image.fromarray(ids, "P")
    picture.putpalette(np.array(colours, np.uint8).tobytes())
    return picture


HALF = np.array([[0, 1], [1, 1]], np.uint8)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(HALF.astype(bool)),
        paletted(HALF, (0, 0, 0), (128, 0, 0)),
        paletted(HALF, (0, 0, 0), (0, 0, 9)),
        paletted(HALF, (0, 0, 0), (255, 255, 255)),
        Image.fromarray(HALF[..., None] * np.array([0, 0, 255], np.uint8)),
        Image.fromarray((HALF * 255)[..., None].repeat(3, 2)),
        Image.fromarray((HALF * 255)[..., None].repeat(4, 2)),
        Image.merge("LA", [Image.fromarray(HALF * 255)] * 2),
        Image.fromarray(HALF.astype(np.float32)),
        Image.fromarray(HALF),
    ],
    ids=lambda p: f"{p.mode}",
)
def test_masks_of_every_mode_are_read(tmp_path, picture):
    name = "m.tif" if picture.mode == "F" else "m.png"
    picture.save(tmp_path / name)
    np.testing.assert_array_equal(files.load_mask(name, "binary", tmp_path), HALF)


@pytest.mark.parametrize(
    ("picture", "match"),
    [
        (paletted(HALF, (68, 1, 84), (253, 231, 36)), "without black"),
        (Image.fromarray(RNG.integers(0, 255, (40, 40, 3), np.uint8)), "coloured picture"),
        (Image.merge("LA", [Image.fromarray(HALF * 255), Image.fromarray(255 - HALF * 255)]), "transparency"),
        (Image.fromarray(HALF.astype(np.float32) * 255), "outside 0 to 1"),
        (Image.fromarray(HALF.astype(np.float32) * np.float32("nan")), "outside 0 to 1"),
        (Image.fromarray(HALF.astype(np.int32) * 70000), "outside 0 to 65535"),
    ],
    ids=lambda v: getattr(v, "mode", ""),
)
def test_pictures_that_may_mean_anything_are_no_masks(tmp_path, picture, match):
    picture.save(tmp_path / "m.tif")
    with pytest.raises(InputError, match=match):
        files.load_mask("m.tif", "binary", tmp_path)


def test_class_masks_of_others_need_the_colours_of_classes(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="16 pixels have a colour of no class"):
        files.load_mask("m.png", "semantic", tmp_path)


def test_no_probabilities_are_never_written():
    for bad in (np.nan, np.inf, -0.1, 1.1):
        with pytest.raises(InputError, match="no probabilities"):
            files.mask_picture(np.array([[0.5, bad]]))


def test_masks_are_found_where_they_are_said_to_be_and_never_two_by_one_file(tmp_path):
    folder = tmp_path / "run"
    (folder / "masks").mkdir(parents=True)
    for place in (folder / "masks" / "a.png", tmp_path / "outside.png"):
        Image.fromarray(HALF * 255).save(place)
    for name in (
        "masks/a.png",
        str(folder / "masks/a.png"),
        "/gone/masks/a.png",
        "../outside.png",
        "C:\\x\\masks\\a.png",
    ):
        np.testing.assert_array_equal(files.load_mask(name, "binary", folder), HALF)
    for bad in ("masks/b.png", "/gone/b.png", "x" * 5000, "masks", "a\0b", 5, ["masks/a.png"], True):
        with pytest.raises(InputError):
            files.load_mask(bad, "binary", folder)
    rows = {"e0": {"mask": "/x/masks/a.png"}, "e1": {"mask": "/y/masks/a.png"}}
    with pytest.raises(InputError, match="both /x/masks/a.png and /y/masks/a.png lead to it"):
        levels_of(folder, rows)
    assert "belong to several lines" in levels_of(folder, {name: {"mask": "masks/a.png"} for name in rows})[1][0]
    with pytest.raises(InputError, match="no such file"):  # before any is scored
        levels_of(folder, {"e0": {"mask": "masks/a.png"}, "e1": {"mask": "masks/b.png"}})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("\ufeff{}".encode("utf-16"), "UTF-16"),
        ("{}\n".encode("utf-16-be"), "UTF-16"),
        (b'{"id": "a"}\n{"id": "\xff"}\n', "p.jsonl:2.*not UTF-8"),
        (b'{"id": "a", "id": "b"}\n', "comes twice"),
        (b"\0\0\0\0\n", "UTF-16"),
        (b'{"id"\0: 1}\n', "not valid JSON"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, text, match):
    (tmp_path / "p.jsonl").write_bytes(text)
    with pytest.raises(InputError, match=match):
        files.read_rows(tmp_path / "p.jsonl")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    for text in ('{"id": "é"}\n', '{"id": "é"}', '{"id": "é"}\r\n{"id'):
        (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert files.read_rows(tmp_path / "p.jsonl") == [{"id": "é"}]


# Run lengths.


def code_of(mask):
    return coco.encode(np.asfortranarray(mask))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_run_lengths_are_read_as_the_library_wrote_them(height, width, seed, share):
    mask = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    code = code_of(mask)
    for counts in (code["counts"], code["counts"].decode()):
        np.testing.assert_array_equal(decode_runs(code["size"], counts, "x"), mask)
    for size in ([height, width + 1], [height + 1, width], [2 * height, 2 * width]):
        with pytest.raises(InputError, match="run lengths: the runs hold"):
            decode_runs(size, code["counts"], "x")


CODE = code_of(np.eye(8, dtype=np.uint8))["counts"].decode()


@pytest.mark.parametrize(
    "size",
    [
        [-8, 8],
        [-8, -8],
        [0, 64],
        [100000, 100000],
        [8.0, 8],
        [True, 64],
        "88",
        ["8", "8"],
        [8],
        [8, 8, 1],
        None,
        {},
        64,
        [10**30, 1],
        [float("nan"), 8],
    ],
)
@pytest.mark.parametrize("kind", ["binary"])
def test_sizes_are_looked_at_before_the_library_sees_them(size, kind, tmp_path):
    with pytest.raises(InputError, match="run lengths: size"):
        files.load_mask({"size": size, "counts": CODE}, kind, tmp_path)


@pytest.mark.parametrize(
    "counts",
    [
        "",
        "0",
        CODE[:-1],
        CODE + "1",
        CODE + CODE,
        "o" * 99,
        "~",
        " " + CODE,
        CODE + "\n",
        "b'" + CODE + "'",
        [1, 2],
        [64],
        64,
        None,
        {},
        "P" * 9,
        "é",
        "\0",
        b"\xff",
        "O2",
    ],
)
def test_counts_that_do_not_fill_the_size_are_refused(counts, tmp_path):
    with pytest.raises(InputError, match="run lengths: "):
        files.load_mask({"size": [8, 8], "counts": counts}, "binary", tmp_path)
    if isinstance(counts, str):
        with pytest.raises(InputError, match="run lengths"):
            read_mask(f"root/rle:8x8:{counts}", 8, "binary")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-3, 9), min_size=2, max_size=2), st.text(st.characters(min_codepoint=47, max_codepoint=112))
)
def test_any_run_lengths_are_a_whole_mask_or_an_input_error(size, counts):
    try:
        mask = decode_runs(size, counts, "x")
    except InputError:
        return
    assert mask.shape == tuple(size) and set(np.unique(mask)) <= {0, 1}
    again = code_of(mask)["counts"].decode()
    np.testing.assert_array_equal(decode_runs(size, again, "x"), mask)
