"""The generated world: files that read back, labels that agree with the pixels, questions that need both senses."""

import dataclasses
import re
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from crab_jax.io.errors import InputError
from crab_jax.tasks import TASKS
from data_pipelines.examples import TASK_NAMES, from_json, read_jsonl, to_json
from data_pipelines.sources import scenes
from data_pipelines.sources.scene_graph import BOX_SPACE, CLASS_IDS, KINDS, LEVELS, SECONDS, SIZE, sample
from data_pipelines.sources.scene_media import FPS, PALETTE, SAMPLE_RATE, synthesise, timbre
from data_pipelines.sources.scene_questions import expressions, questions

COUNTS = {"train": 6, "val": 2, "test": 6}
ANSWERS = {*KINDS, "yes", "no", "zero", "one", "two", "three", "left", "middle", "right", "simultaneously"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scenes")
    scenes.write(path, COUNTS, seed=3)
    return path


@pytest.fixture(scope="module")
def written(root) -> list[scenes.Scene]:
    return [scene for split in COUNTS for scene in scenes.load_split(root, split)]


@pytest.fixture(scope="module")
def world() -> list[scenes.Scene]:
    return [sample(0, "test", i) for i in range(500)]


def gray(root: Path, path: str) -> np.ndarray:
    return np.asarray(Image.open(root / path))


# --- the graph


def test_scene_depends_on_seed_split_and_index_only():
    assert sample(1, "train", 7) == sample(1, "train", 7)
    others = [sample(1, "train", 7), sample(2, "train", 7), sample(1, "val", 7), sample(1, "train", 8)]
    assert len({scene.things for scene in others}) == 4


def test_splits_share_no_scene():
    graphs = [sample(0, split, i).things for split in scenes.SPLITS for i in range(300)]
    assert len(set(graphs)) == len(graphs)


def test_world_separates_sight_from_hearing(world):
    things = [thing for scene in world for thing in scene.things]
    assert all(1 <= len(s.things) <= 3 and len({t.kind for t in s.things}) == len(s.things) for s in world)
    assert all(s.visible and len({t.slot for t in s.visible}) == len(s.visible) for s in world)
    assert np.mean([t.visible is not None and t.sounding is None for t in things]) > 0.2
    assert np.mean([t.visible is None for t in things]) > 0.1
    differ = [t.visible != t.sounding for t in things if t.both]
    assert np.mean(differ) > 0.5
    sizes = [t.size for t in things if t.visible]
    assert min(sizes) >= 0.25 and max(sizes) <= 0.45


def test_things_that_sound_together_differ_clearly_in_level(world):
    for scene in world:
        levels = [t.loudness for t in scene.sounding]
        assert len(set(levels)) == len(levels) and set(levels) <= set(LEVELS)


def test_the_place_of_a_thing_does_not_tell_whether_it_sounds(world):
    by_slot, by_kind = defaultdict(list), defaultdict(list)
    for thing in (t for scene in world for t in scene.visible):
        by_slot[thing.slot].append(thing.sounding is not None)
        by_kind[thing.kind].append(thing.sounding is not None)
    for rates in (by_slot, by_kind):
        assert np.ptp([np.mean(r) for r in rates.values()]) < 0.2


# --- files


def test_the_same_settings_write_the_same_bytes_in_any_process(root, tmp_path):
    scenes.write(tmp_path, COUNTS, seed=3, workers=2)
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert [p for p in files if (root / p).read_bytes() != (tmp_path / p).read_bytes()] == []


def test_a_finished_root_is_left_alone_and_a_partial_one_is_continued(root, tmp_path):
    marker = root / "scenes.json"
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    scenes.write(root, COUNTS, seed=3)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    lines = []
    scenes.write(tmp_path, {"val": 2}, seed=3, progress=lines.append)
    assert re.fullmatch(r"scenes 2/2  [\d.]+/s  eta 0 s", lines[-1])
    (tmp_path / "val/000001/scene.json").unlink()
    (tmp_path / "scenes.json").write_text((tmp_path / "scenes.json").read_text().replace("true", "false"))
    kept = (tmp_path / "val/000000/clip.mp4").stat().st_mtime_ns
    scenes.write(tmp_path, {"val": 2}, seed=3)
    assert (tmp_path / "val/000000/clip.mp4").stat().st_mtime_ns == kept
    assert (tmp_path / "val/000001/scene.json").read_bytes() == (root / "val/000001/scene.json").read_bytes()
    assert '"complete": true' in marker.read_text()


@pytest.mark.parametrize(
    ("counts", "seed", "field"), [({"train": 6}, 3, ""), (COUNTS, 4, ""), ({"dev": 1}, 3, "counts")]
)
def test_a_root_of_other_settings_is_refused(root, counts, seed, field):
    with pytest.raises(InputError) as error:
        scenes.write(root, counts, seed=seed)
    assert error.value.field == field


def test_missing_or_broken_files_are_named(root, tmp_path):
    with pytest.raises(InputError, match=r"scenes\.json"):
        scenes.examples(tmp_path, "train")
    with pytest.raises(InputError, match="no split 'dev'"):
        scenes.examples(root, "dev")
    scenes.write(tmp_path, {"val": 1})
    (tmp_path / "val/000000/scene.json").write_text("{")
    with pytest.raises(InputError, match=r"val/000000/scene\.json: not a scene"):
        scenes.examples(tmp_path, "val")


def test_media_are_readable_and_agree(root, written):
    scene = next(s for s in written if len(s.sounding) > 1)
    folder = root / scene.folder
    with av.open(str(folder / "clip.mp4")) as clip:
        assert clip.streams.video[0].codec_context.pix_fmt == "yuv420p"
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    with av.open(str(folder / "clip.mp4")) as clip:
        track = np.concatenate([frame.to_ndarray()[0] for frame in clip.decode(audio=0)])
    wav, rate = soundfile.read(folder / "audio.wav", dtype="float32")
    assert len(frames) == SECONDS * FPS and rate == SAMPLE_RATE and len(wav) == SECONDS * SAMPLE_RATE
    np.testing.assert_allclose(wav, synthesise(scene), atol=1e-4)
    assert np.corrcoef(track[: len(wav)], wav)[0, 1] > 0.97  # the mp4 track starts with the picture
    for k in range(SECONDS):
        picture = np.asarray(Image.open(folder / f"frames/{k}.jpg"), float)
        assert picture.shape == (SIZE, SIZE, 3) and picture.std() > 1
        assert np.abs(frames[k * FPS + FPS // 2] - picture).mean() < 8  # the middle of the second, as the masks
        first = frames[k * len(frames) // SECONDS]  # the frame that ten-frame sampling takes
        assert np.mean(np.abs(first - picture).max(-1) > 60) < 0.06


def test_masks_agree_with_the_graph_and_the_palette(root, written):
    for scene in written:
        table, covered = scenes.scene_table(scene), scenes.occupancy(root, scene)
        assert covered.shape == (SECONDS, SIZE, SIZE)
        for k in range(SECONDS):
            label = Image.open(root / scene.folder / f"labels_semantic/{k}.png")
            ids = np.asarray(label)
            assert label.mode == "P" and label.getpalette()[: len(PALETTE)] == PALETTE
            assert set(np.unique(ids)) - {0} == {CLASS_IDS[t.kind] for t in scene.sources(k)}
            for column, kind in enumerate(KINDS):
                mask = covered[k] == column + 1
                assert mask.any() == table["visible"][k, column]
                if table["visible"][k, column] and table["sounding"][k, column]:
                    np.testing.assert_array_equal(ids == CLASS_IDS[kind], mask)
                x1, y1, x2, y2 = (table["box"][k, column] * SIZE / BOX_SPACE).round().astype(int)
                assert mask[y1:y2, x1:x2].sum() == mask.sum()
                if mask.any():
                    assert mask[y1:y2, x1:x2].any(0)[[0, -1]].all() and mask[y1:y2, x1:x2].any(1)[[0, -1]].all()


def test_palette_has_the_published_colours():
    colours = np.reshape(PALETTE, (71, 3)).tolist()
    assert colours[47] == [192, 128, 192] and colours[19] == [128, 192, 0] and colours[68] == [32, 0, 128]
    assert len(set(map(tuple, colours))) == 71


def test_table_says_what_is_heard_and_how_loud(written):
    scene = next(s for s in written if s.sounding)
    table = scenes.scene_table(scene)
    thing = scene.sounding[0]
    column = KINDS.index(thing.kind)
    assert table["sounding"][:, column].tolist() == [thing.heard(k) for k in range(SECONDS)]
    assert table["loudness"][thing.sounding[0], column] == np.float32(thing.loudness)
    assert (table["loudness"] > 0).tolist() == table["sounding"].tolist()


# --- sound


def spectrum(sound: np.ndarray) -> np.ndarray:
    """Log power of 24 bands for each second."""
    power = np.abs(np.fft.rfft(sound.reshape(-1, SAMPLE_RATE) * np.hanning(SAMPLE_RATE), axis=1)) ** 2
    edges = np.geomspace(60, 8000, 41).astype(int)
    return np.log(np.stack([power[:, a:b].mean(1) for a, b in zip(edges[:-1], edges[1:], strict=True)], 1) + 1e-2)


def test_one_second_names_the_instrument():
    rng = np.random.default_rng(0)
    train, test = (
        {kind: np.concatenate([spectrum(timbre(kind, rng.random(), 3, rng)) for _ in range(12)]) for kind in KINDS}
        for _ in range(2)
    )
    points = np.concatenate(list(train.values()))
    names = np.repeat(np.arange(len(KINDS)), len(points) // len(KINDS))
    for label, kind in enumerate(KINDS):
        nearest = np.argmin(((test[kind][:, None] - points[None]) ** 2).sum(-1), axis=1)
        assert np.mean(names[nearest] == label) > 0.9, kind


def test_silence_is_faint_and_level_follows_loudness(world):
    scene = next(s for s in world if len(s.sounding) == 1 and s.sounding[0].sounding != (0, SECONDS))
    rms = np.sqrt((synthesise(scene).reshape(SECONDS, -1) ** 2).mean(1))
    heard = np.array([scene.sounding[0].heard(k) for k in range(SECONDS)])
    assert rms[~heard].max() < 0.002 and rms[heard].min() > 0.05 * scene.sounding[0].loudness


# --- questions


def test_questions_cover_nine_types_with_listed_answers(world):
    asked = [q for scene in world for q in questions(scene, 4)]
    assert len({q.type for q in asked}) == 9 and min(Counter(q.type for q in asked).values()) > 0.04 * len(asked)
    assert {q.answer for q in asked} == ANSWERS
    assert all(2 <= len(questions(scene, 4)) <= 4 for scene in world)


def test_neither_a_constant_nor_the_question_alone_answers(world):
    asked = [q for scene in world for q in questions(scene, 3)]
    assert Counter(q.answer for q in asked).most_common(1)[0][1] < 0.3 * len(asked)
    words = re.compile("|".join((*KINDS, "left", "middle", "right")))
    by_template = defaultdict(Counter)
    for q in asked:
        by_template[words.sub("", q.text)][q.answer] += 1
    assert sum(c.most_common(1)[0][1] for c in by_template.values()) < 0.58 * len(asked)


def test_some_answers_by_hand():
    scene = sample(0, "test", 0)
    piano, drum, flute = (dataclasses.replace(scene.things[0], kind=k) for k in ("piano", "drum", "flute"))
    piano = dataclasses.replace(piano, slot="left", x=0.2, visible=(0, 10), sounding=(3, 9), loudness=1.0)
    drum = dataclasses.replace(drum, slot="right", x=0.8, visible=(2, 8), sounding=(5, 8), loudness=0.45)
    flute = dataclasses.replace(flute, slot=None, visible=None, sounding=(0, 2), loudness=0.2)
    answers, named = defaultdict(set), defaultdict(set)
    for index in range(400):  # one set of things under many random numbers
        scene = dataclasses.replace(scene, index=index, things=(drum, piano, flute))
        for q in questions(scene, 9):
            answers[q.text].add(q.answer)
        for e in expressions(scene, 3):
            named[e.text].add(e.object)
    expected = {
        "How many musical instruments were heard throughout the video?": "three",
        "How many types of musical instruments appeared in the entire video?": "two",
        "Is there a voiceover?": "yes",
        "Where is the loudest instrument?": "left",
        "What is the first instrument that comes in?": "flute",
        "Where is the last sounding instrument?": "right",
        "Is the piano playing longer than the drum?": "yes",
        "Is the drum louder than the piano?": "no",
        "What is the instrument on the left of drum?": "piano",
        "Which instrument makes sounds after the piano?": "drum",
        "Which is the musical instrument that sounds at the same time as the drum?": "piano",
        "What is the left instrument of the last sounding instrument?": "piano",
        "Is the instrument on the right louder than the instrument on the left?": "no",
        "How many instruments in the video did not sound from beginning to end?": "zero",
        "Is the piano in the video always playing?": "no",
    }
    assert {text: answers[text] for text in expected} == {text: {answer} for text, answer in expected.items()}
    assert not any("lowest" in text for text in answers)  # the lowest one is not in the picture
    assert named["the object making the loudest sound"] == {"piano"}
    assert named["the object that starts sounding first"] == {""}
    assert named["the object that starts sounding last"] == {"drum"}
    assert named["the object on the left of the drum"] == {"piano"} and named["the silent object"] == {""}
    assert all(len(values) == 1 for values in (*answers.values(), *named.values()))


def test_expressions_hold_one_kind_out_and_name_things_in_the_picture(world):
    for scene in [*world, *(sample(0, "train", i) for i in range(200))]:
        for e in expressions(scene, 3):
            thing = next((t for t in scene.things if t.kind == e.object), None)
            assert (thing is None) == (e.split == "null") and (thing is None or thing.seen(e.second))
            held_out = e.object == "piano"
            assert held_out == (e.split == "unseen") and not (held_out and scene.split == "train")
    assert {e.split for scene in world for e in expressions(scene, 3)} == {"seen", "unseen", "null"}


# --- Examples


def test_every_example_is_valid_and_its_files_exist(root):
    for split in COUNTS:
        rows = read_jsonl(root / f"{split}.jsonl")
        assert rows == scenes.examples(root, split)
        for row in rows:
            assert from_json(to_json(row), row.id) == row and row.id.startswith(f"{split}-")
            paths = [p for p in (row.video, row.image, row.audio, row.seg_image, row.mask) if p]
            assert all((root / p).is_file() for p in (*paths, f"{row.meta['scene']}/scene.json"))
            assert len(row.target.split()) <= 70
            assert (row.audio is None) == (row.task in ("ave", "avvp", "avqa", "avcap"))
    assert {row.task for split in COUNTS for row in scenes.examples(root, split)} == set(TASK_NAMES)


@pytest.mark.parametrize("reasoning", ["explicit", "plain"])
def test_targets_read_back_through_the_task_parsers(root, reasoning):
    for row in scenes.examples(root, "train", reasoning=reasoning):
        parsed, meta = TASKS[row.task].parse(row.target), row.meta
        expected = {
            "ave": lambda m: {"event": m["event"], "ranges": [[m["start"], m["end"]]]},
            "avvp": lambda m: {"audio": m["audio"], "visual": m["visual"]},
            "avqa": lambda m: m["answer"],
            "arig": lambda m: tuple(m["box"]),
            "ref-avs": lambda m: {"objects": [m["object"]] if m["object"] else []},
            "avcap": lambda m: m["captions"][0],
        }.get(row.task, lambda m: {"objects": m["objects"]})
        assert parsed == expected(meta), row.target


def test_the_right_answers_score_full_marks(root):
    rows = [row for split in COUNTS for row in scenes.examples(root, split)]
    for name in ("avqa", "ave", "avvp", "arig"):
        task = TASKS[name]
        stats = [task.stats(task.parse(row.target), None, row.meta, None) for row in rows if row.task == name]
        assert task.reduce(stats)[task.headline] == pytest.approx(1), name


def test_a_second_without_a_source_is_answered_with_nothing(root):
    rows = [r for split in COUNTS for r in scenes.examples(root, split, tasks=["avss"], per_scene={"avss": 10})]
    silent = [row for row in rows if not gray(root, row.mask).any()]
    assert silent and all(row.meta["objects"] == [scenes.NOTHING] and "is nothing." in row.target for row in silent)


@pytest.mark.parametrize(
    ("task", "variant", "clip"), [("s4", "train", True), ("s4", "quick", False), ("avss", "test", False)]
)
def test_the_prompt_decides_between_the_clip_and_one_picture(root, task, variant, clip):
    row = scenes.examples(root, "train", variant=variant, tasks=[task])[0]
    assert ("<video>" in row.instruction) == clip == (row.video is not None) == (row.windows == "ten")
    assert clip or row.image == row.seg_image


def test_plain_targets_are_the_end_of_explicit_ones(root):
    explicit, plain = (scenes.examples(root, "train", reasoning=r) for r in ("explicit", "plain"))
    assert all(
        a.target.endswith(b.target) and (a.target != b.target or a.task == "avcap")
        for a, b in zip(explicit, plain, strict=True)
    )


def test_reasoning_says_what_the_scene_holds(root, written):
    scene = next(s for s in written if s.split == "train" and sum(bool(t.both) for t in s.things) == 1)
    row = next(r for r in scenes.examples(root, "train", tasks=["ave"]) if r.meta["scene"] == scene.folder)
    for thing in scene.visible:
        assert f"the {thing.kind} from {thing.visible[0]} to {thing.visible[1]}" in row.target.split("I hear")[0]
    for thing in scene.sounding:
        assert f"the {thing.kind} from {thing.sounding[0]} to {thing.sounding[1]}" in row.target.split("I hear")[1]


def test_masks_of_examples_hold_what_they_name(root):
    rows = [r for split in COUNTS for r in scenes.examples(root, split, tasks=["s4", "ms3", "avss", "ref-avs"])]
    for row in rows:
        mask = gray(root, row.mask)
        if row.task == "ref-avs":
            assert set(np.unique(mask)) <= {0, 255} and mask.any() == bool(row.meta["object"])
        else:
            assert set(np.unique(mask)) - {0} == {CLASS_IDS[k] for k in row.meta["objects"] if k in KINDS}
        assert row.task != "s4" or len(row.meta["objects"]) == 1
        assert row.seg_image.endswith(f"frames/{row.second}.jpg")


def test_the_caller_chooses_tasks_and_how_many(root):
    rows = scenes.examples(root, "test", tasks=["avss", "avqa"], per_scene={"avss": 4, "avqa": 1})
    counts = Counter((r.task, r.meta["scene"]) for r in rows)
    assert {task for task, _ in counts} == {"avss", "avqa"}
    assert max(n for (task, _), n in counts.items() if task == "avss") == 4
    assert max(n for (task, _), n in counts.items() if task == "avqa") == 1
    few = scenes.examples(root, "test", tasks=["avss"], per_scene={"avss": 2})
    assert [r.second for r in few] == [r.second for r in rows if r.task == "avss" and int(r.id[-1]) < 2]
