"""One clock for frames and sound: constant rates are the reference's, everything else is by the time it is shown."""

import dataclasses
import io
import json
import os
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from clips import RATE, beep, grey, seconds_of, steady, write_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from crab_jax.io.errors import InputError
from crab_jax.models.quirks import PRESETS
from data_pipelines import batching, decoded, media, prepare, shards
from data_pipelines.batching import DataConfig
from data_pipelines.examples import Example, read_jsonl, write_jsonl
from data_pipelines.media import clock, video
from data_pipelines.media.clock import Holes, Stamp, frame_times
from data_pipelines.shards import Decoding
from data_pipelines.validate import validate

RATES = [
    Fraction(text)
    for text in (
        "1",
        "5",
        "8",
        "10",
        "12.5",
        "15",
        "24",
        "24000/1001",
        "25",
        "30000/1001",
        "30",
        "50",
        "60000/1001",
        "60",
        "120",
    )
]
SECOND = [float(i) for i in range(6)] + [6 + i / 30 for i in range(120)]  # a frame a second, then thirty
STILL = [0.0] + [8 + i / 30 for i in range(60)]


def stamps(times, duration=0):
    return [Stamp(time, time, duration) for time in times]


# Which frames.


@settings(deadline=None)
@given(
    rate=st.sampled_from(RATES),
    total=st.integers(1, 2000),
    count=st.integers(1, 64),
    tick=st.sampled_from([Fraction(1, 1000), Fraction(1, 90000), Fraction(1, 12800), None]),
    start=st.integers(-(10**6), 10**9),
    duration=st.sampled_from([0, 1, 2]),
)
def test_a_constant_rate_gives_the_numbers_of_the_reference_in_every_time_base(
    rate, total, count, tick, start, duration
):
    """Milliseconds (mkv, webm, flv) round the times; AVI has one tick a frame (None); lengths of frames are often
    missing, rounded, or those of another rate."""
    tick = tick or 1 / rate
    times = [start + round(i / rate / tick) for i in range(total)]
    found = frame_times(stamps(times, round(duration / rate / tick / 2)), tick, rate)
    assert not found.varies and not found.odd and len(found.ticks) == total
    assert clock.chosen(found, count, "shown") == clock.chosen(found, count, "counted")
    assert clock.chosen(found, count, "shown") == [i * total // min(count, total) for i in range(min(count, total))]
    assert total == 1 or abs(found.seconds - total / rate) <= max(tick, 1 / rate / total)


@given(total=st.integers(20, 400), seed=st.integers(0, 2**32 - 1))
def test_small_jitter_and_a_frame_that_is_left_out_change_nothing(total, seed):
    rng = np.random.default_rng(seed)
    times = [3000 * i + int(rng.integers(-300, 300)) for i in range(total)]
    del times[int(rng.integers(total // 3, 2 * total // 3))]
    found = frame_times(stamps(times, 3000), Fraction(1, 90000), Fraction(30))
    assert not found.varies and clock.chosen(found, 10, "shown") == media.frame_numbers(total - 1, 10)


@given(
    gaps=st.lists(st.integers(1, 4000), min_size=2, max_size=60),
    duration=st.integers(1, 3000),
    count=st.integers(1, 20),
    order=st.randoms(use_true_random=False),
)
def test_otherwise_the_frame_is_the_one_shown_at_that_time(gaps, duration, count, order):
    """Against the plain definition, and whatever the order in the file (B frames)."""
    times = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    shuffled = list(times)
    order.shuffle(shuffled)
    found = frame_times([Stamp(time, None, duration) for time in shuffled], Fraction(1, 1000), Fraction(25))
    if found.varies:
        end = times[-1] + duration
        assert found.seconds == Fraction(end, 1000)
        assert clock.chosen(found, count, "shown") == [
            sum(time * count <= i * end for time in times) - 1 for i in range(count)
        ]
    else:
        assert clock.chosen(found, count, "shown") == media.frame_numbers(len(times), count)
        middle = found.seconds * 1000 / len(times)
        assert all(abs(time - i * middle) <= min(middle, 100) for i, time in enumerate(times))


@pytest.mark.parametrize(
    ("given_stamps", "said"),
    [
        ([Stamp(None, None, 0)] * 30, "without a time"),
        ([Stamp(None, 40 * i, 40) if i else Stamp(None, None, 40) for i in range(30)], "without a time"),
        (stamps([40 * (i % 15) + (i > 14) for i in range(30)]), "run backwards"),
        (stamps([0] * 29 + [40]), "at the same time"),
        (stamps([40 * i + 700_000 * (i > 14) for i in range(30)]), "that jump"),
    ],
)
def test_times_that_cannot_be_right_are_not_used(given_stamps, said):
    found = frame_times(given_stamps, Fraction(1, 1000), Fraction(25))
    assert said in found.odd and found.begin is None and not found.varies
    assert found.seconds == Fraction(30, 25)  # of a constant rate
    assert clock.chosen(found, 10, "shown") == media.frame_numbers(30, 10)
    assert frame_times(given_stamps, Fraction(1, 1000), Fraction(90000)).seconds == 0  # no rate either


def test_avi_which_has_no_times_of_showing_is_timed_by_those_of_decoding():
    found = frame_times([Stamp(None, i + (i > 4) * 7, 1) for i in range(12)], Fraction(1, 10), Fraction(10))
    assert found.varies and found.seconds == Fraction(19, 10)


def test_a_jump_of_seconds_is_a_splice_in_an_mpeg_stream_and_a_still_elsewhere():
    jump = stamps([4 * i + 1100 * (i > 14) for i in range(30)], 4)
    assert frame_times(jump, Fraction(1, 100), Fraction(25), splices=True).odd
    assert frame_times(jump, Fraction(1, 100), Fraction(25)).varies


def test_the_last_frame_is_held_as_long_as_the_file_says():
    held = frame_times([*stamps(range(0, 600, 10), 10), Stamp(600, 600, 400)], Fraction(1, 100), Fraction(10))
    assert held.varies and held.seconds == 10
    assert clock.chosen(held, 10, "shown") == [0, 10, 20, 30, 40, 50, 60, 60, 60, 60]


# Where sound goes.


@given(samples=st.integers(1, 3000), start=st.floats(-4, 4), seconds=st.floats(0, 4))
def test_sound_is_placed_to_the_sample(samples, start, seconds):
    wave, rate = np.arange(1, samples + 1, dtype=np.float32), 1000
    placed = clock.place(wave, start, seconds, rate)
    assert len(placed) == clock.placed_length(samples, start, seconds, rate)
    shift = round(start * rate) if abs(start) > clock.START else 0
    for at, value in enumerate(placed):
        assert value == (wave[at - shift] if 0 <= at - shift < samples else 0)
    end, pictures = max(0, samples + shift), round(seconds * rate)
    assert len(placed) == (pictures if pictures and abs(end - pictures) > clock.END * rate else end)


def test_sound_in_step_is_left_as_it_is():
    wave = np.ones(10 * RATE, np.float32)
    assert clock.place(wave, 0.003, 10.2, RATE) is wave


def test_holes_of_a_track_are_silence_within_bounds():
    holes = Holes(longest=10, splice=5)
    found = [
        holes.before(start, 100, 1000)
        for start in (
            0.0,
            0.1,
            0.25,
            0.35,  # wavering
            1.0,
            1.1,  # a hole
            0.2,
            0.3,
            4.4,  # backwards, then a hole
            99.0,
            99.1,
            103.2,
            None,
            107.3,
        )
    ]  # a jump, a hole, and what would be too much in all
    assert found == [0, 0, 0, 0, 600, 0, 0, 0, 4000, 0, 0, 4000, 0, 0]


# Files.


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".webm", ".ts", ".flv"])
def test_a_clip_of_any_container_is_on_one_clock(tmp_path, ending):
    """(times of the frames, sound, offset of it, holes) -> start of the sound, seconds of the frames."""
    every = list(range(10))
    for name, times, sound, offset, holes, start, seconds in (
        ("plain", steady(10), beep(10, 7.1, 7.9), 0.0, (), 0.0, every),
        ("late", steady(10), beep(8.5, 5.6, 6.4), 1.5, (), 1.5, every),
        ("early", steady(10, start=1.0), beep(10.7, 7.8, 8.6), 0.3, (), -0.7, every),
        ("both late", steady(10, start=1.4), beep(10, 7.1, 7.9), 1.4, (), 0.0, every),
        ("hole", steady(10), beep(8, 5.1, 5.9), 0.0, [(4, 2.0)], 0.0, every),
        ("ends early", steady(12), beep(9, 7.1, 7.9), 0.0, (), 0.0, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),
        ("ends late", steady(10), beep(14, 7.1, 7.9), 0.0, (), 0.0, every),
        ("varying", SECOND, beep(10, 7.1, 7.9), 0.0, (), 0.0, every),
        ("still", STILL, beep(10, 7.1, 7.9), 0.0, (), 0.0, [0] * 8 + [8, 9]),
        ("slides", [0.0, 4.0, 7.0], beep(10, 7.1, 7.9), 0.0, (), 0.0, [0] * 4 + [4] * 3 + [7] * 3),
        ("even slides", [1.4, 3.4, 5.4], beep(10, 7.1, 7.9), 1.4, (), 0.0, [0] * 2 + [2] * 2 + [4] * 6),
        ("end held", [*steady(3), 3.4, 4.5], beep(10, 7.1, 7.9), 0.0, (), 0.0, [0, 1, 2, 2, 3] + [4] * 5),
    ):
        path = write_clip(tmp_path / f"{name}{ending}", times, sound, offset, holes)
        found = media.timing(path)
        assert found.sound == pytest.approx(start, abs=0.07), name  # what the encoder puts in front
        assert found.varies == (name in ("varying", "still", "slides", "even slides", "end held")) and not found.odd
        assert found.seconds == pytest.approx(12 if name == "ends early" else 10, abs=0.15)
        assert bool(found.remarks()) == (name in ("late", "early"))
        frames = media.read_video(path, 10, 16)
        np.testing.assert_array_less(np.abs(np.subtract(seconds_of(frames), seconds)), 1, err_msg=name)
        placed = media.clip_sound(path)
        loud = np.flatnonzero(np.abs(placed) > 0.3) / RATE
        assert loud[0] == pytest.approx(7.1, abs=0.03) and loud[-1] == pytest.approx(7.9, abs=0.03), name
        assert len(placed) / RATE == pytest.approx(found.seconds, abs=clock.END)
        assert media.watch(path).seconds == pytest.approx(found.seconds, abs=0.05)
        for part in (3, 7):
            np.testing.assert_array_equal(media.read_moment(path, part, 10, 16), frames[part])


def test_a_last_frame_is_held_within_reason_and_only_where_frames_come_when_the_picture_changes():
    slides, steps = stamps([0, 4000, 7000], 100), stamps(range(0, 6000, 100), 100)
    for times, until, seconds in (
        (slides, 10, 10),
        (slides, 7.2, 7.1),
        (slides, 5, 7.1),
        (slides, 5000, 7.1),
        (stamps([0, 4000, 7000]), 7.2, 7.2),
    ):
        found = frame_times(times, Fraction(1, 1000), Fraction(10), until=Fraction(until))
        assert found.seconds == pytest.approx(seconds)
    assert clock.is_held(frame_times(slides, Fraction(1, 1000), Fraction(10)))
    assert clock.is_held(frame_times(stamps([0, 2000, 4000]), Fraction(1, 1000), Fraction(10)))
    assert not clock.is_held(frame_times(steps, Fraction(1, 1000), Fraction(10)))


def test_a_single_frame_lasts_as_long_as_its_sound(tmp_path):
    path = write_clip(tmp_path / "one.mp4", [0.0], beep(10, 7.1, 7.9))
    assert media.timing(path)[:3] == (1, 0.0, False) and len(media.read_video(path, 10, 16)) == 1
    assert len(media.clip_sound(path)) == pytest.approx(10 * RATE, abs=2048)
    assert seconds_of(media.read_moment(path, 7, 10, 16)[None]) == [0]


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), Fraction(24000, 1001), 50])
@pytest.mark.parametrize("ending", [".mp4", ".webm", ".flv", ".avi"])
def test_files_of_a_constant_rate_give_the_same_frames_by_both_clocks(tmp_path, ending, fps):
    path = write_clip(tmp_path / f"clip{ending}", steady(3, fps), fps=fps, bf=2)
    assert not media.timing(path).varies and media.timing(path).seconds == pytest.approx(3, abs=0.01)
    for count in (1, 7, 10, 64):
        np.testing.assert_array_equal(*(media.read_video(path, count, 16, which) for which in media.CLOCKS))


def retimed(source, target, moved):
    """A copy of a clip; `moved`: (kind of the stream, seconds) -> seconds added to the times of a packet."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if packet.dts is not None:
                by = round(moved(packet.stream.type, float(packet.pts * packet.time_base)) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + by, packet.dts + by, streams[packet.stream.index]
                new.mux(packet)
    return target


@pytest.mark.parametrize(
    ("ending", "moved", "said"),
    [
        (".mkv", lambda kind, at: 5000.0 * (kind == "audio"), "do not meet"),
        (".mkv", lambda kind, at: 3000.0 * (kind == "video"), "do not meet"),
        (".mkv", lambda kind, at: 72000.0 * (at > 5), "times that jump"),
        (".ts", lambda kind, at: 20.0 * (at > 6), "times that jump"),
        (".mkv", lambda kind, at: 100 * at * (kind == "audio"), ""),  # holes of 6 s between all blocks
        (".ts", lambda kind, at: 2**33 / 90000 - 6, ""),  # the counter of MPEG starts anew in the middle
    ],
)
def test_times_of_nonsense_neither_silence_a_clip_nor_fill_the_memory(tmp_path, ending, moved, said, monkeypatch):
    monkeypatch.setenv("CRAB_JAX_MEDIA_LIMITS", "hours=1000 gigasamples=100")
    source = write_clip(tmp_path / f"source{ending}", steady(10), beep(10, 7.1, 7.9))
    path = retimed(source, tmp_path / f"odd{ending}", moved)
    found, heard = media.timing(path), media.hear(path)
    assert said in found.odd and bool(said) == bool(found.odd) == any(said in text for text in found.remarks())
    assert len(heard.samples) < 700 * RATE and heard.placed().any()
    assert len(heard.placed()) == pytest.approx(10 * RATE, abs=RATE / 4)
    assert seconds_of(media.read_video(path, 10, 16)) == list(range(10))


def test_mpeg_streams_behind_each_other_are_counted(tmp_path):
    one = write_clip(tmp_path / "one.ts", steady(10), beep(10, 7.1, 7.9)).read_bytes()
    (tmp_path / "two.ts").write_bytes(2 * one)
    assert "run backwards" in media.timing(tmp_path / "two.ts").odd
    assert seconds_of(media.read_video(tmp_path / "two.ts", 10, 16)) == [0, 2, 4, 6, 8] * 2
    assert len(media.clip_sound(tmp_path / "two.ts")) == pytest.approx(20 * RATE, abs=RATE / 4)


def test_a_recording_that_begins_in_the_middle_of_a_broadcast_begins_with_what_can_be_shown(tmp_path):
    """A film of a key frame every two seconds, without its first 1.3 s: none of the first frames can be decoded."""
    source, path = io.BytesIO(), tmp_path / "tail.ts"
    with av.open(source, "w", format="mpegts") as container:
        film = container.add_stream("mpeg2video", rate=25, width=64, height=48, options={"g": "50", "bf": "2"})
        sound = container.add_stream("mp2", rate=48000, layout="mono")
        waves = np.repeat(beep(10, 7.1, 7.9), 3)
        for number in range(250):
            level = np.full((48, 64, 3), grey(number / 25), np.uint8)
            container.mux(film.encode(av.VideoFrame.from_ndarray(level, "rgb24")))
            part = av.AudioFrame.from_ndarray(
                (waves[None, number * 1920 :][:, :1920] * 32767).astype(np.int16), "s16", "mono"
            )
            part.rate = 48000
            container.mux(sound.encode(part))
        container.mux([*film.encode(), *sound.encode()])
    content = source.getvalue()
    path.write_bytes(content[len(content) // 188 * 13 // 100 * 188 :])
    asked = {
        "frames": lambda: media.read_video(path, 8, 16),
        "moment": lambda: media.read_moment(path, 5, 8, 16),
        "times": lambda: media.timing(path),
        "sound": lambda: media.hear(path),
    }
    found = []
    for first in asked:  # whatever is asked first, and remembered
        video._remembered.clear()
        asked[first]()
        times, heard = media.timing(path), media.hear(path)
        found.append((times, heard.start, heard.seconds, media.read_moment(path, 5, 8, 16).mean().round()))
    assert len(set(found)) == 1 and found[0][0].frames == media.watch(path).frames < 201
    assert seconds_of(media.read_video(path, 8, 16)) == list(range(2, 10)) and found[0][0].sound < -0.4
    loud = np.flatnonzero(np.abs(media.clip_sound(path)) > 0.1) / RATE
    assert loud[0] == pytest.approx(5.06, abs=0.05) and loud[-1] == pytest.approx(5.86, abs=0.05)


def test_a_stream_without_a_container_has_the_rate_that_its_frames_say(tmp_path):
    """H.264 of an action camera: no times, and libav takes 25 frames a second for granted."""
    with av.open(str(tmp_path / "a.h264"), "w") as container:
        film = container.add_stream("libx264", rate=10, width=64, height=48)
        for number in range(50):
            container.mux(
                film.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey(number / 10), np.uint8), "rgb24"))
            )
        container.mux(film.encode())
    soundfile.write(tmp_path / "a.wav", beep(5, 3.1, 3.9), RATE, subtype="FLOAT")
    assert media.timing(tmp_path / "a.h264").seconds == media.watch(tmp_path / "a.h264").seconds == 5
    assert seconds_of(media.read_video(tmp_path / "a.h264", 5, 16)) == list(range(5))
    assert len(media.clip_sound(tmp_path / "a.wav", tmp_path / "a.h264")) == 5 * RATE


# What reads them.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """late.mp4, whose sound starts at 1.5 s; varying.mkv; beside.mp4 with short.wav beside it; a list of all."""
    folder = tmp_path_factory.mktemp("root")
    write_clip(folder / "late.mp4", steady(10), beep(8.5, 1.6, 2.4), 1.5)
    write_clip(folder / "varying.mkv", SECOND, beep(10, 7.1, 7.9))
    write_clip(folder / "beside.mp4", steady(10), beep(10, 2, 3))
    soundfile.write(folder / "short.wav", beep(8, 7.1, 7.9), RATE, subtype="FLOAT")
    plain = Example(
        id="late",
        task="avcap",
        instruction="<video><audio>What?",
        target="It.",
        windows="ten",
        video="late.mp4",
        meta={"captions": ["It."]},
    )
    write_jsonl(
        folder / "test.jsonl",
        [
            plain,
            dataclasses.replace(plain, id="varying", video="varying.mkv"),
            dataclasses.replace(plain, id="beside", video="beside.mp4", audio="short.wav"),
        ],
    )
    return folder


def prepared(root, out, *options):
    prepare.run(
        [
            "--root",
            str(root),
            "--out",
            str(out),
            "--image-size",
            "16",
            "--video-frames",
            "10",
            "--splits",
            "test",
            "--workers",
            "0",
            *options,
        ]
    )
    return out


def config_of(which, **changes):
    return DataConfig(image_size=16, visual_queries=1, audio_queries=1, lengths=(256,), clock=which, **changes)


@pytest.mark.parametrize("which", media.CLOCKS)
def test_prepared_clips_are_those_of_the_files_by_either_clock(root, tmp_path, tokenizer, which):
    out, config = prepared(root, tmp_path / "out", "--clock", which), config_of(which)
    loud = []
    for example in read_jsonl(root / "test.jsonl"):
        raw, ours = (batching.load(example, folder, tokenizer, config) for folder in (root, out))
        for name in raw:
            np.testing.assert_array_equal(raw[name], ours[name], err_msg=f"{example.id} {name}")
        loud.append(int(raw["fbank"].mean((1, 2)).argmax()))
    assert loud == ([3, 7, 7] if which == "shown" else [2, 7, 9])  # the tenth that has the beep
    other = media.CLOCKS[which == "shown"]
    with pytest.raises(InputError, match=rf"\[clock\]: was prepared with {which}, but {other} is asked for.*--clock"):
        decoded.source(out, config_of(other).decoding)


def test_a_changed_video_makes_the_sound_beside_it_anew(root, tmp_path, tokenizer, capsys):
    copy = tmp_path / "root"
    shutil.copytree(root, copy)
    prepared(copy, tmp_path / "out")
    write_clip(copy / "beside.mp4", steady(12), beep(10, 2, 3))
    prepared(copy, tmp_path / "out")
    example = read_jsonl(copy / "test.jsonl")[2]
    raw, ours = (batching.load(example, folder, tokenizer, config_of("shown")) for folder in (copy, tmp_path / "out"))
    np.testing.assert_array_equal(raw["fbank"], ours["fbank"])
    assert shards.opened(tmp_path / "out").seconds("short.wav", "ten", "beside.mp4") == 12


def older(out):
    """The prepared root as an older version wrote it."""
    manifest = json.loads((out / "prepared.json").read_text())
    del manifest["decoding"]["clock"]
    manifest.pop("sum", None), manifest.pop("sums", None)
    (out / "prepared.json").write_text(json.dumps(manifest | {"format": 2}))
    os.utime(out / "prepared.json", (5, 5))  # an open root is not looked at again
    plan = json.loads((out / "plan.json").read_text())
    del plan["clock"]
    (out / "plan.json").write_text(json.dumps(plan))


def test_a_root_of_the_format_before_is_read_with_one_warning_and_prepared_anew(root, tmp_path, tokenizer, capsys):
    out = prepared(root, tmp_path / "out", "--clock", "counted")
    older(out)
    example = read_jsonl(root / "test.jsonl")[2]
    counted = batching.load(example, root, tokenizer, config_of("counted"))
    capsys.readouterr()
    for which, lines in (("counted", 0), ("shown", 1), ("shown", 0)):
        np.testing.assert_array_equal(
            batching.load(example, out, tokenizer, config_of(which))["fbank"], counted["fbank"]
        )
        said = capsys.readouterr().err
        assert said.count("\n") == lines and ("prepare it again" in said) == bool(lines)
    prepared(root, out)  # the same options
    np.testing.assert_array_equal(
        *(batching.load(example, folder, tokenizer, config_of("shown"))["fbank"] for folder in (root, out))
    )


def test_what_is_kept_of_decoding_is_kept_by_clock(root, tmp_path, tokenizer):
    for example in read_jsonl(root / "test.jsonl"):
        for which in (*media.CLOCKS, *media.CLOCKS):
            cached = batching.load(example, root, tokenizer, config_of(which, cache_dir=str(tmp_path)))
            plain = batching.load(example, root, tokenizer, config_of(which))
            for name in ("frames", "fbank"):
                np.testing.assert_array_equal(cached[name], plain[name])


def test_the_clock_is_that_of_the_preset():
    assert {name: preset.clock for name, preset in PRESETS.items()} == {"paper": "shown", "released": "counted"}
    with pytest.raises(InputError, match=r"\[clock\]: unknown value 'wall'"):
        config_of("wall")
    assert Decoding(1, 2, False).clock == "shown"


def test_validate_says_what_is_put_in_step(root):
    found = [(p.id, p.problem) for p in validate(root, workers=1)[1]]
    assert ("late", "warning: the sound starts 1.4 s after the pictures; silence is put in front") in found
    assert {name for name, _ in found} == {"late", "beside"}
