"""The predict verb: what it asks, what it refuses and mends, and the files it leaves."""

import dataclasses
import json
import os
import re
import types
from fractions import Fraction

import av
import clips
import flax.linen as nn
import jax
import numpy as np
import pytest
import soundfile
from PIL import Image

from configs import tiny
from crab_jax import predict as verb
from crab_jax.checkpoints.models import save_packed
from crab_jax.config import resolve
from crab_jax.inference import read_answer
from crab_jax.io.errors import InputError
from crab_jax.reports import clip_page
from crab_jax.runs import run_params
from crab_jax.tasks import TASKS
from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines import fbank
from data_pipelines import media as data_media
from data_pipelines.given import Given
from data_pipelines.media import read_audio
from data_pipelines.tokens import Tokenizer

RATE = 16000
SIZE = (48, 32)  # width, height


def write_video(path, seconds=2, sound=None):
    """A clip of 5 frames per second whose brightness rises, with `sound` (float[N]) as its track."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=5, options={"crf": "10"})
        video.width, video.height, video.pix_fmt = *SIZE, "yuv420p"
        track = container.add_stream("aac", rate=RATE, layout="mono") if sound is not None else None
        for index in range(5 * seconds):
            picture = np.full((SIZE[1], SIZE[0], 3), 40 + 160 * index // (5 * seconds), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if track:
            samples = np.ascontiguousarray(sound, np.float32)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
            container.mux(track.encode(frame))
            container.mux(track.encode())
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Videos: clip.mp4 of 2 s with its own track, mute.mp4 without one, blink.mp4 of 1 s, broken.mp4. Sounds: tone.wav
    and silent.wav of 2 s, short.wav of 1 s, moment.wav of 0.3 s, long.wav of 4 s, late.wav of 10 s with a tone in its
    eighth. picture.png."""
    folder = tmp_path_factory.mktemp("media")
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)
    write_video(folder / "clip.mp4", sound=tone)
    write_video(folder / "mute.mp4")
    soundfile.write(folder / "tone.wav", tone, RATE)
    soundfile.write(folder / "silent.wav", np.zeros(2 * RATE), RATE)
    for name, length in (("short", RATE), ("moment", 3 * RATE // 10)):
        soundfile.write(folder / f"{name}.wav", tone[:length], RATE)
    soundfile.write(folder / "long.wav", np.tile(tone, 2), RATE)
    soundfile.write(folder / "late.wav", np.pad(tone[:RATE], (7 * RATE, 2 * RATE)), RATE)
    write_video(folder / "blink.mp4", seconds=1, sound=tone[:RATE])
    (folder / "broken.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:900])
    Image.new("RGB", SIZE, (90, 120, 150)).save(folder / "picture.png")
    return folder


def ask(media, out, **record):
    """The request of one record; names of media files become paths."""
    record = {key: str(media / value) if key.endswith("_path") else value for key, value in record.items()}
    out.mkdir(exist_ok=True)
    return verb.request(record, "command line", "000", Given(out))


def refused(capsys, *argv):
    """The one line that a wrong command prints; it exits with 2 before any model is loaded."""
    with pytest.raises(SystemExit) as stop:
        verb.main([*map(str, argv)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1 and not printed.out
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "asr", "--video", "clip.mp4"], "unknown task 'asr'"),
        (["--video", "clip.mp4"], "[task]: is missing"),
        (["--task", "ave"], "exactly one is needed"),
        (["--task", "ave", "--video", "none.mp4"], "none.mp4"),
        (["--task", "ave", "--video", "broken.mp4"], "broken.mp4"),
        (["--task", "s4", "--image", "broken.mp4", "--audio", "tone.wav"], "broken.mp4"),
        (["--task", "avqa", "--video", "clip.mp4"], "[question]: is missing"),
        (["--task", "avqa", "--video", "clip.mp4", "--question", " "], "[question]: is missing"),
        (["--task", "ref-avs", "--video", "clip.mp4"], "[expression]: is missing"),
        (["--task", "s4", "--image", "picture.png"], "a picture has no sound"),
        (["--task", "ave", "--image", "picture.png", "--audio", "tone.wav"], "cannot be asked about a picture"),
        (["--task", "s4", "--video", "clip.mp4", "--second", "12"], "[second]: is 12"),
        (["--task", "s4", "--video", "clip.mp4", "--prompt-variant", "best"], "unknown value 'best'"),
        (["--task", "ave", "--video", "clip.mp4", "--second", "soon"], "see --help"),
        (["--task", "ave", "--video", "clip.mp4", "--mask", "picture.png"], "ave has no mask"),
        (["--samples", "none.json"], "no such file"),
        (["--task", "s4", "--image", "picture.png", "--audio", "tone.wav", "--second", "5"], "the clip has 5 parts"),
        (["--samples", "clip.mp4", "--task", "ave"], "cannot be combined"),
        (["--all-tasks", "--video", "clip.mp4", "--task", "ave"], "[--task]: cannot be combined with --all-tasks"),
        (["--all-tasks", "--video", "clip.mp4", "--mask", "picture.png"], "[--mask]: cannot be combined"),
        (["--all-tasks", "--image", "picture.png"], "a picture has no sound"),
    ],
)
def test_a_wrong_command_says_what_to_fix(media, tmp_path, capsys, arguments, said):
    files = {path.name: str(path) for path in media.iterdir()}
    arguments = [files.get(argument, argument) for argument in arguments]
    assert said in refused(capsys, "--checkpoint", "unused", "--out", tmp_path, *arguments)


def test_a_missing_checkpoint_is_named(media, tmp_path, capsys):
    said = refused(
        capsys,
        "--checkpoint",
        tmp_path / "nowhere",
        "--out",
        tmp_path / "out",
        "--task",
        "ave",
        "--video",
        media / "clip.mp4",
    )
    assert "nowhere" in said


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        verb.main(["--help"])
    assert stop.value.code == 0 and "python -m crab_jax.predict --checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[", "{}", "[]", '["ave"]', '[{"task": 3}]', '[{"task": "ave", "vidio": "x"}]'])
def test_a_wrong_samples_file_is_named(media, tmp_path, capsys, text):
    (tmp_path / "samples.json").write_text(text)
    said = refused(capsys, "--checkpoint", "unused", "--out", tmp_path / "out", "--samples", tmp_path / "samples.json")
    assert "samples.json" in said


def test_samples_are_relative_to_their_file_and_idx_is_the_second(tmp_path):
    (tmp_path / "s.json").write_text('[{"task": "s4", "image_path": "a/0.jpg", "audio_path": "a.wav", "idx": 3}]')
    ((record, where),) = verb.read_samples(tmp_path / "s.json")
    assert record == {
        "task": "s4",
        "image_path": str(tmp_path / "a/0.jpg"),
        "audio_path": str(tmp_path / "a.wav"),
        "second": 3,
    }
    assert where.endswith("s.json[0]")


def test_a_question_about_a_video_uses_its_own_sound(media, tmp_path):
    asked = ask(media, tmp_path, task="avqa", video_path="clip.mp4", question="How many?")
    example = asked.example
    assert example.instruction == TASKS["avqa"].instruction(question="How many?")
    assert example.audio == example.video == str(media / "clip.mp4")
    assert asked.picture is None and asked.warnings == ()


def test_a_question_without_a_task_is_put_as_it_stands_and_any_text_answers_it(media, tmp_path):
    asked = ask(media, tmp_path, video_path="clip.mp4", question="Who shouts, and when?")
    assert asked.task == "question" and asked.example.instruction.endswith("<audio_end>\nWho shouts, and when?")
    answer = read_answer(asked.example, "Nobody does.", None)
    assert answer.parsed == "Nobody does." and not answer.warnings and verb.draw(asked, answer, tmp_path) == {}
    about_picture = ask(media, tmp_path, image_path="picture.png", audio_path="tone.wav", question="What is it?")
    assert "<image>" in about_picture.example.instruction and about_picture.example.windows == "one"


def test_a_picture_is_asked_about_with_the_quick_prompt_and_one_window(media, tmp_path):
    example = ask(media, tmp_path, task="s4", image_path="picture.png", audio_path="tone.wav", second=1).example
    assert example.instruction == TASKS["s4"].instruction(variant="quick")
    assert (example.windows, example.second, example.mask_kind) == ("one_of_five", 1, "binary")


def test_the_frame_of_a_second_is_taken_out_of_a_video_at_its_own_size(media, tmp_path):
    asked = ask(media, tmp_path, task="ms3", video_path="clip.mp4", second=4, windows="ten")
    assert asked.example.seg_image == asked.picture and asked.example.video
    with Image.open(asked.picture) as picture:
        assert picture.size == SIZE
        np.testing.assert_allclose(np.array(picture).mean(), 40 + 160 * 4 / 10, atol=6)


def test_arig_on_a_video_asks_about_its_frame(media, tmp_path):
    example = ask(media, tmp_path, task="arig", video_path="clip.mp4").example
    assert example.video is None and example.image.endswith("000_picture.png") and "<image>" in example.instruction


def sound_of(asked):
    return read_audio(asked.example.audio)


def test_a_video_without_sound_is_taken_as_silent(media, tmp_path):
    asked = ask(media, tmp_path, task="ave", video_path="mute.mp4")
    assert asked.warnings == ("the video has no sound track; it is taken as silent",)
    assert len(sound_of(asked)) == 2 * RATE and not sound_of(asked).any()


def test_sound_of_another_length_is_put_in_step_with_the_video(media, tmp_path):
    short = ask(media, tmp_path, task="ave", video_path="clip.mp4", audio_path="short.wav")
    assert short.warnings == ("the audio lasts 1.0 s, but the video 2.0 s: the rest is filled with silence",)
    sound, (own, _) = sound_of(short), soundfile.read(media / "short.wav", dtype="float32")
    np.testing.assert_array_equal(sound[:RATE], own)
    assert len(sound) == 2 * RATE and not sound[RATE:].any()
    long = ask(media, tmp_path, task="ave", video_path="clip.mp4", audio_path="long.wav")
    assert long.warnings == ("the audio lasts 4.0 s, but the video 2.0 s: what is longer is cut off",)
    assert len(sound_of(long)) == 2 * RATE


@pytest.mark.parametrize(
    ("clip", "second", "said"),
    [
        ("late15", 3, "the sound starts 1.4 s after the pictures; silence is put in front"),
        ("late3", 7, "the sound starts 2.9 s after the pictures; silence is put in front"),
        ("early", 5, "the sound starts 2.0 s before the pictures; its beginning is cut off"),
        ("varying", 7, None),
        ("still", 8, None),
        ("long", 7, "the audio lasts 14.0 s, but the video 10.0 s: "),
        ("short", 4, "the audio lasts 6.0 s, but the video 10.0 s: the rest is filled with silence"),
    ],
)
def test_the_loudest_second_is_that_of_the_picture_whatever_the_times_of_frames_and_sound(tmp_path, clip, second, said):
    """What is asked, heard and shown is of the same second of the clip."""
    times, sound, offset = {
        "late15": (clips.steady(10), clips.beep(8.5, 1.6, 2.4), 1.5),
        "late3": (clips.steady(10), clips.beep(7, 4.1, 4.9), 3.0),
        "early": (clips.steady(10, start=2.0), clips.beep(12, 7.1, 7.9), 0.0),
        "varying": ([*map(float, range(6)), *(6 + i / 60 for i in range(240))], clips.beep(10, 7.1, 7.9), 0.0),
        "still": ([0.0, *(8 + i / 30 for i in range(60))], clips.beep(10, 8.1, 8.9), 0.0),
        "long": (clips.steady(10), clips.beep(14, 7.1, 7.9), 0.0),
        "short": (clips.steady(10), clips.beep(6, 4.1, 4.9), 0.0),
    }[clip]
    path = clips.write_clip(tmp_path / "clip.mp4", times, sound, offset)
    asked = ask(tmp_path, tmp_path / "out", task="s4", video_path=path.name)
    assert asked.example.second == second
    words = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    assert f"the {words[second]} second" in asked.example.instruction
    assert [said in warning for warning in asked.warnings] == ([True] if said else [])
    with Image.open(asked.picture) as picture:
        assert clips.seconds_of(np.array(picture)[None]) == [second]
    heard = fbank.cut_windows(data_media.clip_sound(asked.example.audio, asked.example.video), "ten")
    assert np.square(heard).sum(1).argmax() == second
    for wanted in (0, 9):
        asked = ask(tmp_path, tmp_path / "out", task="s4", video_path=path.name, second=wanted)
        with Image.open(asked.picture) as picture:
            assert clips.seconds_of(np.array(picture)[None]) == [wanted]


def test_a_still_with_sound_is_shown_at_every_second(tmp_path):
    path = clips.write_clip(tmp_path / "one.mp4", [0.0], clips.beep(10, 7.1, 7.9))
    asked = ask(tmp_path, tmp_path / "out", task="s4", video_path=path.name)
    assert asked.example.second == 7 and not asked.warnings and os.path.isfile(asked.picture)


def test_silence_and_clips_shorter_than_their_windows_are_pointed_out(media, tmp_path):
    silent = ask(media, tmp_path, task="ave", video_path="clip.mp4", audio_path="silent.wav")
    assert silent.warnings == ("the audio is silent: the answer can rest on the pictures only",)
    assert silent.example.audio == str(media / "silent.wav")
    blink = ask(media, tmp_path, task="ave", video_path="blink.mp4", audio_path="short.wav")
    assert blink.warnings == ("the clip lasts 1.0 s; its windows of sound are filled with silence",)


def test_a_moment_of_sound_is_the_sound_of_its_picture(media, tmp_path):
    asked = ask(media, tmp_path, task="s4", image_path="picture.png", audio_path="moment.wav", second=2)
    assert asked.warnings == ("the audio lasts 0.3 s; it is used as the sound of the picture",)
    assert asked.example.windows == "one_of_five" and len(sound_of(asked)) == 5 * RATE
    assert np.flatnonzero(sound_of(asked))[[0, -1]] == pytest.approx([2 * RATE, 2.3 * RATE], abs=40)


def test_the_loudest_second_is_asked_about_unless_another_one_is_given(media, tmp_path):
    late = ask(media, tmp_path, task="arig", image_path="picture.png", audio_path="late.wav").example
    assert (late.windows, late.second) == ("one", 7)
    assert (
        ask(media, tmp_path, task="arig", image_path="picture.png", audio_path="late.wav", second=0).example.second == 0
    )


def test_masks_and_boxes_are_drawn_at_the_size_of_the_picture(media, tmp_path):
    asked = ask(media, tmp_path, task="s4", image_path="picture.png", audio_path="tone.wav")
    half = np.zeros((8, 8), np.float32)
    half[:, 4:] = 1
    names = verb.draw(asked, read_answer(asked.example, "", half), tmp_path)
    mask = np.array(Image.open(tmp_path / names["mask"]))
    assert mask.shape == SIZE[::-1] and (mask[:, 24:] == 255).all() and (mask[:, :24] == 0).all()
    overlay = np.array(Image.open(tmp_path / names["overlay"]))
    assert (overlay[:, :24] == (90, 120, 150)).all() and (overlay[:, 24:] != (90, 120, 150)).any(-1).all()

    both = dataclasses.replace(read_answer(asked.example, "", half), further_masks=(half[:, ::-1],))
    names = verb.draw(asked, both, tmp_path)
    assert list(names) == ["mask", "mask_2", "overlay"]
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / names["mask_2"])), 255 - mask)
    assert (np.array(Image.open(tmp_path / names["overlay"])) != (90, 120, 150)).any(-1).all()

    asked = ask(media, tmp_path, task="arig", image_path="picture.png", audio_path="tone.wav")
    names = verb.draw(asked, read_answer(asked.example, "(112,0) and (224,224)", None), tmp_path)
    drawn = np.array(Image.open(tmp_path / names["overlay"]))
    assert list(names) == ["overlay"] and drawn.shape == (*SIZE[::-1], 3) and (drawn[31, 24:] == (213, 94, 0)).all()


def test_class_maps_have_the_names_of_their_colours_beside_them(media, tmp_path):
    asked = ask(media, tmp_path, task="avss", image_path="picture.png", audio_path="tone.wav")
    names = verb.draw(asked, read_answer(asked.example, "", np.full((8, 8), 23, np.int32)), tmp_path)
    overlay = Image.open(tmp_path / names["overlay"])
    assert overlay.width > SIZE[0] + 40 and Image.open(tmp_path / names["mask"]).size == SIZE
    beside = np.array(overlay)[:, SIZE[0] :].reshape(-1, 3).tolist()
    assert avss_palette()[23].tolist() in beside and avss_palette()[1].tolist() not in beside


def sideways(path, size=(240, 160)):
    """A photo taken sideways: stored as `size`, shown turned to the right, white on its right as shown."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[: size[1] // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


def test_everything_about_a_turned_photo_is_upright(media, tmp_path):
    sideways(tmp_path / "photo.jpg")
    sound = str(media / "tone.wav")
    truth = np.zeros((240, 160), np.uint8)
    truth[:, 80:] = 255
    Image.fromarray(truth).save(tmp_path / "truth.png")
    asked = ask(tmp_path, tmp_path / "out", task="s4", image_path="photo.jpg", audio_path=sound, mask_path="truth.png")
    out = tmp_path / "out"
    shown = np.array(Image.open(out / "000_picture.png"))
    assert shown.shape == (240, 160, 3) and shown[:, 90:].min() > 240 and shown[:, :70].max() < 15
    assert asked.picture == str(out / "000_picture.png") and asked.example.image == str(tmp_path / "photo.jpg")
    half = np.zeros((8, 8), np.float32)
    half[:4] = 1
    names = verb.draw(asked, read_answer(asked.example, "", half), out)
    mask, drawn = (np.array(Image.open(out / names[kind])) for kind in ("mask", "overlay"))
    assert mask.shape == (240, 160) and mask[:115].min() == 255 and not mask[125:].any()
    assert drawn.shape == (240, 160, 3)
    np.testing.assert_array_equal(drawn[130:235, 90:150], shown[130:235, 90:150])  # of the mask's outline only the edge
    asked = ask(tmp_path, out, task="arig", image_path="photo.jpg", audio_path=sound)
    names = verb.draw(asked, read_answer(asked.example, "(0,112) and (112,224)", None), out)
    boxed = np.array(Image.open(out / names["overlay"]))
    assert boxed.shape == (240, 160, 3) and (boxed[239, 5:75] == (213, 94, 0)).all()
    with pytest.raises(InputError, match="is 240x160, but its picture is 160x240; .*upright where EXIF turns it"):
        Image.fromarray(np.ascontiguousarray(truth.T)).save(tmp_path / "stored.png")
        ask(tmp_path, out, task="s4", image_path="photo.jpg", audio_path=sound, mask_path="stored.png")


def test_greys_of_16_bits_are_drawn_as_the_model_sees_them(media, tmp_path):
    Image.fromarray(np.full(SIZE[::-1], 100 * 256, np.uint16)).save(tmp_path / "deep.png")
    asked = ask(tmp_path, tmp_path / "out", task="s4", image_path="deep.png", audio_path=str(media / "tone.wav"))
    names = verb.draw(asked, read_answer(asked.example, "", np.zeros((8, 8), np.float32)), tmp_path / "out")
    for name in ("000_picture.png", names["overlay"]):
        assert np.unique(np.array(Image.open(tmp_path / "out" / name))).tolist() == [100]


def test_the_picture_that_was_asked_about_is_always_written(media, tmp_path):
    for name, record in {
        "question": {"image_path": "picture.png", "audio_path": "tone.wav", "question": "What?"},
        "ms3": {"task": "ms3", "video_path": "clip.mp4", "second": 1},
    }.items():
        asked = ask(media, tmp_path / name, **record)
        assert asked.picture == str(tmp_path / name / "000_picture.png")
        assert Image.open(asked.picture).size == SIZE and Image.open(asked.picture).mode == "RGB"
    assert ask(media, tmp_path / "ave", task="ave", video_path="clip.mp4").picture is None


def test_damage_is_named_before_a_model_is_loaded(media, tmp_path):
    content = (media / "picture.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    Image.new("L", (9, 9)).save(tmp_path / "small.png")
    sound = str(media / "tone.wav")
    for record, said in (
        ({"image_path": "cut.png"}, "ends before"),
        ({"image_path": str(media / "picture.png"), "mask_path": "small.png"}, "is 9x9, but its"),
        ({"image_path": str(media / "picture.png"), "mask_path": "cut.png"}, "ends before"),
    ):
        with pytest.raises(InputError, match=said):
            ask(tmp_path, tmp_path / "out", task="s4", audio_path=sound, **record)


def test_a_name_that_is_no_text_is_drawn_and_shown(media, tmp_path):
    name = os.fsdecode(b"caf\xe9 12:30 100%.png")
    (tmp_path / name).write_bytes((media / "picture.png").read_bytes())
    asked = ask(tmp_path, tmp_path / "out", task="s4", image_path=name, audio_path=str(media / "tone.wav"))
    answer = read_answer(asked.example, "", np.zeros((8, 8), np.float32))
    page = tmp_path / "page.html"
    clip_page.write(page, [str(tmp_path / name)], [clip_page.Answered(answer, None, ())], None)
    text = page.read_text()
    assert "caf\\udce9 12:30 100%.png" in text and "data:image/jpeg;base64" in text


ANSWERS = {
    "avqa": {"answer": "two"},
    "ave": {"event": "Church bell", "start": 2, "end": 5},
    "avvp": {"audio": [["Dog", 0, 3]], "visual": []},
    "arig": {"object": "dog", "box": [9, 9, 99, 99]},
    "ref-avs": {"expression": "it", "object": "tuba"},
    "avcap": {"caption": "A bell rings over a dog."},
    **{name: {"objects": ["dog"]} for name in ("s4", "ms3", "avss")},
}


def scripted(examples):
    """The answers of ANSWERS, the last picture task without its mask."""
    for example in examples:
        mask = {"binary": np.ones((8, 8), np.float32), "semantic": np.ones((8, 8), np.int32)}.get(example.mask_kind)
        text = TASKS[example.task].target(**ANSWERS[example.task])
        yield read_answer(example, text, None if example.task == "ref-avs" else mask)


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--video", "mute.mp4"], ["avqa", "avqa", "ave", "avvp", "arig", "s4", "ms3", "avss", "ref-avs", "avcap"]),
        (["--image", "picture.png", "--audio", "tone.wav"], ["arig", "s4", "ms3", "avss", "ref-avs"]),
    ],
)
def test_all_tasks_make_one_page(media, tmp_path, monkeypatch, capsys, flags, asked):
    crab = types.SimpleNamespace(predict=lambda examples, root, **options: scripted(examples[::-1]))
    monkeypatch.setattr(verb, "load", lambda *arguments, **options: crab)
    flags = [str(media / flag) if "." in flag else flag for flag in flags]
    verb.predict(verb.parse_arguments(["--checkpoint", "x", "--out", str(tmp_path), "--all-tasks", *flags]))
    lines = {line["id"]: line for line in map(json.loads, (tmp_path / "predictions.jsonl").read_text().splitlines())}
    assert [lines[name]["task"] for name in sorted(lines)] == asked
    page = (tmp_path / "page.html").read_text()
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|<script|<link|url\(", text)
    assert "the pixels of the sounding object: dog" in text and "No picture: fewer than six mask tokens" in text
    is_video = "--video" in flags
    assert (
        "What happens when" in text,
        "A bell rings over a dog." in text,
        "<video controls" in text,
        "taken as silent" in text,
    ) == (is_video,) * 4
    assert text.count("<figure>") == (6 if is_video else 5) and str(tmp_path / "page.html") in capsys.readouterr().out


def test_an_answer_without_mask_tokens_has_a_warning_and_no_mask(media, tmp_path):
    asked = ask(media, tmp_path, task="s4", image_path="picture.png", audio_path="tone.wav")
    prediction = read_answer(asked.example, "It is a dog.", None)
    assert any("no mask" in warning for warning in prediction.warnings)
    assert verb.draw(asked, prediction, tmp_path) == {}


def save_small_model(folder):
    """A packed tiny model with one layer per module and random weights."""
    config = tiny.get_config()
    config.update(
        {
            "init_from": "",
            "sizes": {"llama": {"layers": 1}, "beats": {"layers": 1}, "visual": {"layers": 1}, "audio": {"layers": 1}},
        }
    )
    rng = np.random.default_rng(0)
    config = resolve(config)
    shapes = nn.unbox(run_params.abstract_params(config.model.build()))
    save_packed(
        folder, jax.tree.map(lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(np.float32), shapes), config.to_dict()
    )
    Tokenizer.load(config.tokenizer).save(folder)


@pytest.mark.exhaustive  # test_readme.py runs the verb with the committed model
def test_a_model_answers_a_clip(media, tmp_path, capsys):
    save_small_model(tmp_path / "model")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        verb.main(
            [
                "--checkpoint",
                str(tmp_path / "model"),
                "--task",
                "ave",
                "--video",
                str(media / "clip.mp4"),
                "--out",
                str(out),
                "--max-new-tokens",
                "4",
                "--stream",
                "--weights",
                "int8",
            ]
        )
    printed = capsys.readouterr().out
    (line,) = map(json.loads, (out / "predictions.jsonl").read_text().splitlines())
    assert stop.value.code == 0 and f"000_ave: {line['text']}" in printed
    assert printed.startswith(line["text"]), "the text as it came"
    assert line["parsed"] is None and "cannot be read" in " ".join(line["warnings"])
    assert line["mask"] is None and Image.open(out / line["overlay"]).width > 500
