"""One Example to arrays of its bucket, and rows to a Batch."""

import dataclasses
import shutil

import numpy as np
import pytest
from media_files import write_picture, write_video

from crab_jax.io.errors import InputError
from data_pipelines import batching, fbank, media
from data_pipelines.batching import Bucket, bucket_for, collate, load, text_arrays
from data_pipelines.examples import TASK_NAMES, Example
from data_pipelines.tokens import MASK_TOKENS

VIDEO, IMAGE, AUDIO = "See <video>", "See <image>", "hear <audio>"
MASK = "It is <mask_start>" + "".join(MASK_TOKENS) + "<mask_end>"
CLIP = Example(id="clip", task="ave", instruction=f"{VIDEO} {AUDIO}", target="two dogs", video="clip.mp4")
PICTURE = Example(
    id="picture", task="s4", instruction=f"{IMAGE} {AUDIO}", target=MASK, image="1.png", audio="clip.wav",
    windows="one", second=1, mask="mask.png", mask_kind="binary",
)  # fmt: skip


def change(example, **fields):
    return dataclasses.replace(example, **fields)


@pytest.mark.parametrize(
    ("example", "bucket"),
    [
        (CLIP, Bucket(128, 4, 10, 98, 0)),
        (change(CLIP, windows="music_avqa"), Bucket(128, 4, 10, 198, 0)),
        (change(CLIP, windows="five", video=None, frames=("0.png",), audio="clip.wav"), Bucket(128, 4, 10, 98, 0)),
        (PICTURE, Bucket(128, 1, 1, 98, 1)),
        (change(CLIP, instruction="Hi.", video=None, windows="none"), Bucket(128, 1, 1, 98, 0)),
        (change(CLIP, target="dog " * 80), Bucket(192, 4, 10, 98, 0)),
    ],
)
def test_bucket_is_the_smallest_that_fits(example, bucket, tokenizer, config):
    assert bucket_for(example, tokenizer, config) == bucket


def test_arrays_of_a_clip(root, tokenizer, config):
    row = load(CLIP, root, tokenizer, config, index=5)
    text = row["tokens"][row["text_mask"]]
    assert (text == tokenizer.id("<video>")).sum() == 4 * 3 and (text == tokenizer.id("<audio>")).sum() == 10 * 2
    np.testing.assert_array_equal(row["slots"][row["slots"] >= 0], np.arange(4 * 3 + 10 * 2))
    assert tokenizer.decode(row["tokens"][row["loss_mask"]]) == "two dogs"
    assert row["tokens"][row["loss_mask"]][-1] == tokenizer.eos_id
    np.testing.assert_array_equal(row["frames"], media.read_video(root / "clip.mp4", 4, 16))
    windows = fbank.cut_windows(media.read_audio(root / "clip.mp4"), "ten")
    np.testing.assert_array_equal(row["fbank"], fbank.fbank(windows))
    assert row["frame_mask"].all() and row["audio_mask"].all()
    assert (row["task"], row["index"]) == (TASK_NAMES.index("ave"), 5)


@pytest.mark.parametrize(
    "clip", [{"video": "clip.mp4"}, {"video": None, "frames": ("0.png", "1.png"), "audio": "clip.wav"}]
)
def test_a_picture_beside_a_clip_is_one_more_frame_with_rows_of_its_own(clip, root, tokenizer, config):
    pair = change(CLIP, instruction=f"{VIDEO} {AUDIO} {IMAGE}", image="1.png", **clip)
    row, alone = load(pair, root, tokenizer, config), load(change(CLIP, **clip), root, tokenizer, config)
    frames = int(alone["frame_mask"].sum())
    assert bucket_for(pair, tokenizer, config).frames == 5 and row["frame_mask"].sum() == frames + 1
    np.testing.assert_array_equal(row["frames"][:frames], alone["frames"][:frames])
    np.testing.assert_array_equal(row["frames"][frames], media.read_image(root / "1.png", 16, "image"))
    of_picture = row["slots"][row["tokens"] == tokenizer.id("<image>")]
    of_clip = row["slots"][row["tokens"] == tokenizer.id("<video>")]
    np.testing.assert_array_equal(of_clip, np.arange(3 * frames))
    np.testing.assert_array_equal(of_picture, 3 * frames + np.arange(3))
    assert (row["slots"][row["tokens"] == tokenizer.id("<audio>")] == 5 * 3 + np.arange(20)).all()


def test_absent_frames_and_windows_are_masked_and_keep_the_audio_rows_in_place(root, tokenizer, config):
    example = change(CLIP, video=None, frames=("0.png", "1.png", "2.png"), audio="clip.wav", windows="five")
    row = load(example, root, tokenizer, config)
    assert row["frame_mask"].tolist() == [True] * 3 + [False] and not row["frames"][3].any()
    assert row["audio_mask"].tolist() == [True] * 5 + [False] * 5 and not row["fbank"][5:].any()
    first_audio = 4 * 3  # frames of the bucket times queries
    np.testing.assert_array_equal(
        row["slots"][row["slots"] >= 0], [*range(3 * 3), *range(first_audio, first_audio + 5 * 2)]
    )


def test_text_arrays_agree_with_load_and_open_no_file(root, tokenizer, config):
    bucket = bucket_for(CLIP, tokenizer, config)
    without_media = text_arrays(change(CLIP, video="missing.mp4"), tokenizer, config, bucket)
    row = load(CLIP, root, tokenizer, config)
    for name, value in without_media.items():
        np.testing.assert_array_equal(value, row[name])


@pytest.mark.parametrize(("kind", "file", "label"), [("binary", "mask.png", 1), ("semantic", "labels.png", 9)])
def test_segmentation_arrays(root, tokenizer, config, kind, file, label):
    row = load(change(PICTURE, mask=file, mask_kind=kind), root, tokenizer, config)
    assert row["seg_kind"].tolist() == [{"binary": 1, "semantic": 2}[kind]]
    np.testing.assert_array_equal(np.unique(row["seg_target"]), [0, label])
    np.testing.assert_array_equal(row["seg_frame"][0], row["frames"][0])
    assert row["tokens"][row["mask_positions"][0] + 1].tolist() == list(tokenizer.mask_ids)


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        ({"image": "1.png", "seg_image": "3.png"}, 150),
        ({"image": None, "instruction": f"{VIDEO} {AUDIO}", "frames": tuple(f"{i}.png" for i in range(5))}, 100),
        ({"image": None, "instruction": f"{VIDEO} {AUDIO}", "video": "clip.mp4"}, 8 * 10),
    ],
)
def test_picture_to_segment(root, tokenizer, config, fields, level):
    row = load(change(PICTURE, windows="ten", second=2, **fields), root, tokenizer, config)
    np.testing.assert_allclose(row["seg_frame"].mean(), level, atol=3)


def test_prompts_have_no_target_but_keep_the_label_mask(root, tokenizer, config):
    config = change(config, prompt_only=True)
    row = load(PICTURE, root, tokenizer, config)
    assert not row["loss_mask"].any() and row["seg_target"].any() and not row["mask_positions"].any()
    unlabelled = load(change(PICTURE, mask=None), root, tokenizer, config)
    assert not unlabelled["seg_target"].any() and unlabelled["seg_kind"].tolist() == [1]


def test_muted_audio_and_blank_video_change_nothing_else(root, tokenizer, config):
    example = change(PICTURE, windows="ten")
    plain = load(example, root, tokenizer, config)
    blind = load(example, root, tokenizer, change(config, mute_audio=True, blank_video=True))
    assert not blind["frames"].any() and not blind["seg_frame"].any() and (blind["fbank"] == fbank.SILENCE).all()
    for name in plain.keys() - {"frames", "seg_frame", "fbank"}:
        np.testing.assert_array_equal(blind[name], plain[name])


def test_cache_gives_the_same_arrays_without_decoding(root, tokenizer, config, tmp_path, monkeypatch):
    cached = change(config, cache_dir=str(tmp_path / "cache"))
    examples = [CLIP, change(PICTURE, second=0), change(PICTURE, second=7)]
    plain = [load(e, root, tokenizer, config) for e in examples]
    written = [load(e, root, tokenizer, cached) for e in examples]
    for name in ("read_video", "read_audio", "read_image"):
        monkeypatch.setattr(media, name, None)
    read = [load(e, root, tokenizer, cached) for e in examples]
    for a, b, c in zip(plain, written, read, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            np.testing.assert_array_equal(a[name], c[name])
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_damaged_cache_file_is_replaced(root, tokenizer, config, tmp_path):
    cached = change(config, cache_dir=str(tmp_path))
    before = load(CLIP, root, tokenizer, cached)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(load(CLIP, root, tokenizer, cached)["fbank"], before["fbank"])


def test_collate_stacks_rows_of_a_bucket(root, tokenizer, config):
    rows = [load(change(CLIP, target=t), root, tokenizer, config, i) for i, t in enumerate(("a", "two dogs"))]
    batch = collate(iter(rows), 2)
    with pytest.raises(ValueError, match="frames of row 1 is of another bucket"):
        collate([rows[0], {**rows[1], "frames": rows[1]["frames"][:1]}], 2)
    bucket = bucket_for(CLIP, tokenizer, config)
    assert batching.bucket_of(batch) == bucket
    empty = batching.empty_batch(bucket, 2, config.image_size)
    for field in dataclasses.fields(batch):
        value, blank = getattr(batch, field.name), getattr(empty, field.name)
        assert (value.shape, value.dtype) == (blank.shape, blank.dtype), field.name


@pytest.mark.parametrize(
    ("example", "field", "problem"),
    [
        (change(CLIP, target="dog " * 400), "instruction", "needs .* longest bucket has 320"),
        (change(CLIP, instruction=AUDIO), "instruction", "0 visual placeholders and 1 visual source"),
        (change(CLIP, video=None, audio="clip.wav"), "instruction", "1 visual placeholders and 0 visual source"),
        (change(CLIP, instruction=f"{VIDEO} {VIDEO} {AUDIO}"), "instruction", "visual placeholder"),
        (change(CLIP, instruction=VIDEO), "instruction", "0 <audio> placeholders and windows 'ten'"),
        (change(CLIP, windows="none"), "instruction", "1 <audio> placeholders and windows 'none'"),
        (change(PICTURE, audio=None), "audio", "is missing"),
        (change(PICTURE, target="no mask"), "target", "not all of <mask_0>"),
        (change(PICTURE, mask=None), "mask", "is missing"),
        (change(CLIP, target=MASK, mask="mask.png", mask_kind="binary"), "second", "no frame of the example"),
    ],
)
def test_bad_examples_are_named(example, field, problem, root, tokenizer, config):
    with pytest.raises(InputError, match=rf"example {example.id} \[{field}\]: .*{problem}.*; "):
        load(example, root, tokenizer, config)


def test_a_mask_of_another_size_than_its_picture_is_an_error(root, tokenizer, config, tmp_path):
    path = write_picture(tmp_path / "small.png", np.zeros((16, 24), np.uint8))
    with pytest.raises(InputError, match="small.png .*is 24x16, but its picture is 48x32"):
        load(change(PICTURE, mask=str(path)), root, tokenizer, config)


@pytest.mark.parametrize(("field", "value"), [("on_error", "ignore"), ("lengths", (64, 32)), ("lengths", ())])
def test_bad_settings(config, field, value):
    with pytest.raises(InputError, match=field):
        change(config, **{field: value})


def test_defaults_are_the_released_settings():
    assert dataclasses.asdict(batching.DataConfig()) == {
        "image_size": 224,
        "video_frames": 10,
        "visual_queries": 32,
        "audio_queries": 32,
        "lengths": (256, 384, 512, 640, 768, 896, 1024),
        "prompt_only": False,
        "mute_audio": False,
        "blank_video": False,
        "pad_short_audio": False,
        "clock": "shown",
        "on_error": "raise",
        "cache_dir": "",
        "tasks": tuple(TASK_NAMES),
    }


def test_the_text_ends_with_the_answer_and_padding_follows(root, tokenizer, config):
    row = load(CLIP, root, tokenizer, config)
    length = batching.place(CLIP, tokenizer, config)[1].positions
    assert row["text_mask"].tolist() == [True] * length + [False] * (128 - length)
    assert row["tokens"][length - 1] == tokenizer.eos_id
    assert (row["tokens"][length:] == tokenizer.pad_id).all() and (row["slots"][length:] == -1).all()


def test_what_needs_no_padding_is_not_copied():
    values = np.arange(3)
    assert batching._pad(values, 3) is values
    assert batching._pad(values, 4, -1).tolist() == [0, 1, 2, -1]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"video": None, "audio": "clip.wav"}, "frames"),
        ({"video": None, "audio": "clip.wav", "instruction": f"{IMAGE} {AUDIO}"}, "image"),
    ],
)
def test_a_damaged_picture_is_reported_by_its_field(root, tokenizer, config, fields, field, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    fields[field] = ("0.png", str(damaged)) if field == "frames" else str(damaged)
    with pytest.raises(InputError) as caught:
        load(change(CLIP, **fields), root, tokenizer, config)
    assert caught.value.field == field


@pytest.mark.parametrize(("video", "second"), [("clip.mp4", 7), ("clip.mp4", 4), ("short.mp4", 2), ("short.mp4", 3)])
def test_a_second_without_a_frame_is_no_picture_to_segment(root, tokenizer, config, tmp_path, video, second):
    """Neither one after the four frames that are read, nor one of the black frames that fill up a shorter clip."""
    for name in ("clip.mp4", "clip.wav", "mask.png"):
        shutil.copy(root / name, tmp_path)
    write_video(tmp_path / "short.mp4", 2, (16, 16), 2.0)
    fields = {"video": video, "windows": "ten", "second": second, "mask": "mask.png"}
    beyond = change(PICTURE, image=None, instruction=f"{VIDEO} {AUDIO}", **fields)
    with pytest.raises(InputError, match=rf"\[second\]: is {second}, which is no frame of the example"):
        load(beyond, tmp_path, tokenizer, dataclasses.replace(config, pad_short_audio=True))


def test_an_empty_batch_has_the_shapes_of_its_bucket_and_nothing_in_it():
    bucket = Bucket(7, 3, 2, 98, 1)
    batch = batching.empty_batch(bucket, 2, 8)
    assert batching.bucket_of(batch) == bucket and batch.frames.shape == (2, 3, 8, 8, 3)
    for field in dataclasses.fields(batch):
        assert (getattr(batch, field.name) == (-1 if field.name in ("slots", "index") else 0)).all(), field.name
