"""`python -m data_pipelines validate`: everything decoded, and every malformed input of the corpus named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import malformed
import numpy as np
import pytest
import releases
from malformed import ANNOTATIONS, SIZE
from media_files import tone, write_audio
from PIL import Image
from test_status import cut

from crab_jax.io.errors import InputError
from crab_jax.questions import request
from data_pipelines import media, prepare
from data_pipelines import validate as verb
from data_pipelines.batching import DataConfig, load
from data_pipelines.datasets import records
from data_pipelines.examine import examine
from data_pipelines.examples import Example
from data_pipelines.given import Given
from data_pipelines.status import CORRUPT, MALFORMED, status
from data_pipelines.validate import files, main, validate


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(root, the cases of own/test.jsonl)."""
    root = tmp_path_factory.mktemp("corpus")
    return root, malformed.write(root)


@pytest.fixture(scope="module")
def problems(corpus):
    return validate(corpus[0], workers=1)[1]


# The corpus of malformed inputs.


def test_every_malformed_input_is_named_and_nothing_else(corpus, problems):
    cases = corpus[1]
    assert sum(bool(case.problem) for case in cases) + len(ANNOTATIONS) >= 100
    wrong = []
    for number, case in enumerate(cases, 1):
        found = [
            p
            for p in problems
            if p.dataset == "own"
            and p.split == "test"
            and p.id == (f"own/test.jsonl:{number}" if case.id == "twice" else p.id)
            and p.id in (case.id, f"own/test.jsonl:{number}")
        ]
        said = len(found) == 1 and re.search(case.problem, found[0].problem) and found[0].field == case.field
        if not (said if case.problem else not found):
            wrong.append((case, found))
    assert not wrong
    assert not [p for p in problems if p.dataset == "own" and p.split == "train"]  # a byte order mark, CRLF


def test_every_malformed_annotation_file_is_named(problems):
    for file, dataset, split, _, text in ANNOTATIONS:
        found = [p.problem for p in problems if (p.dataset, p.split) == (dataset, split)]
        assert any(re.search(text, problem) for problem in found), (file, found)


class Verdict(NamedTuple):
    """What is said of an Example by each, "" when it is taken; predict None where it cannot be asked the like."""

    loader: str
    validate: str
    predict: str | None
    warning: str


@pytest.fixture(scope="module")
def verdicts(corpus, problems, tokenizer, tmp_path_factory):
    """{id: Verdict} of the Examples of the corpus."""
    return verdicts_of(corpus[0], problems, tokenizer, tmp_path_factory.mktemp("asked"))


def verdicts_of(root, problems, tokenizer, out):
    """{id: Verdict} of the Examples of own/test.jsonl, of which `validate` found these problems."""
    config = DataConfig(image_size=16, visual_queries=1, audio_queries=1, lengths=(192,))
    found = {}
    for example in records(root, "own", "test"):
        if isinstance(example, Example):
            said = [p.problem for p in problems if (p.dataset, p.split, p.id) == ("own", "test", example.id)]
            bad = [text for text in said if text.startswith((CORRUPT, MALFORMED))]
            try:
                load(example, root, tokenizer, config)
                refused = ""
            except InputError as error:
                refused = error.problem
            found[example.id] = Verdict(refused, "".join(bad), asks(example, root, out), "".join(said[len(bad) :]))
    return found


def disagreements(verdicts):
    """The verdicts that are not one: taken by some and refused by others, or refused with other words."""
    return {
        name: said[:3]
        for name, said in verdicts.items()
        if len(
            {text.removeprefix(f"{CORRUPT}: ").removeprefix(f"{MALFORMED}: ") for text in said[:3] if text is not None}
        )
        > 1
    }


def test_loader_validate_status_and_predict_agree_on_every_file(corpus, verdicts):
    """Each file of the corpus alone: the loader refuses it, `validate` calls it bad, and `predict` refuses it before a
    model is loaded, or none of the three; `status`, which decodes nothing, calls bad only what `validate` does."""
    assert not disagreements(verdicts)
    bad = {name for name, said in verdicts.items() if said.loader}
    assert len(bad) > 100 and len(verdicts) - len(bad) > 100
    outline = {problem.id for problem in status(corpus[0], ["own"])[1] if problem.kind == CORRUPT}
    assert outline <= bad and len(outline) > 50


# What is mended for one question, but not for training: predict says so in a warning.
MENDED = {"a-tenth.wav", "mute.mp4"}
OF_ROWS = {"no-picture", "no placeholder", "no sound", "no second"}  # whose media are sound


def asks(example, root, out):
    """What `predict` says of the media of an Example before it loads a model, "" when it takes them, None where it
    cannot be asked the like."""
    if example.id in MENDED | OF_ROWS or example.mask and not example.mask.startswith("own/"):
        return None
    record = {
        key: str(root / path)
        for key, path in (
            ("video_path", example.video),
            ("image_path", example.image),
            ("audio_path", example.audio),
            ("mask_path", example.mask),
        )
        if path
    }
    if not (example.video or example.image):
        record["image_path"] = str(root / "own/media/picture.png")
    if "image_path" in record and not example.audio:
        record["audio_path"] = str(root / "own/media/mono.wav")
    task = example.task if example.mask else "avcap" if example.video else "arig"
    try:
        request({"task": task, **record}, "test", "x", Given(out))
    except InputError as error:
        return error.problem
    return ""


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A raw root of the media of the reported cases, and of copies of each that are cut, empty, filled with zeros or
    followed by others: films with a use of pictures, of sound and of both, sounds, and pictures also as masks."""
    if not (CASES / "README.md").is_file():
        pytest.skip("the reported cases are not here")
    root, made = tmp_path_factory.mktemp("reported"), tmp_path_factory.mktemp("made")
    shutil.copytree(CASES / "w0-shared", made / "w0-shared")
    for case in ("w3-sound-starts-later", "w4-variable-frame-rate", "w16-validate-and-loader-disagree"):
        (made / case).mkdir()
        words = [str(made / case)] if case.startswith("w16") else []
        subprocess.run([sys.executable, CASES / case / "make.py", *words], cwd=made / case, check=True)
    found = [path for folder in (CASES, made) for path in sorted(folder.rglob("*")) if path.suffix in FORMS]
    corpus = malformed.Corpus(root)
    for number, path in enumerate(found):
        content = path.read_bytes()
        for how, changed in (
            ("whole", content),
            ("cut", content[: len(content) * 2 // 3]),
            ("empty", b""),
            ("head", content[:40]),
            ("zeros", content[: len(content) // 2] + bytes(len(content) // 2)),
            ("page", b"<!doctype html>" + content[:500]),
            ("junk behind", content + b"junk" * 9),
        ):
            for form, row in FORMS[path.suffix].items():
                corpus.file(f"{number}-{how}-{form}-{path.name}", changed, field=form, row=row)
    Image.fromarray(malformed.noise(1)[0]).save(corpus.media / "picture.png")
    write_audio(corpus.media / "mono.wav", 2.0)
    releases.text(corpus.folder / "test.jsonl", "".join(case.line + "\n" for case in corpus.cases))
    return root, len(found)


CASES = Path(os.environ.get("CRAB_CASES_DIR", Path(__file__).resolve().parents[2].parent / "shared/cases"))
_FILM = {"video": malformed.LOOK, "audio": malformed.HEAR}
_PICTURE = {"image": malformed.SEE, "mask": malformed.SEGMENT}
FORMS = {
    ".mp4": _FILM,
    ".mkv": _FILM,
    ".wav": {"audio": malformed.HEAR},
    ".mp3": {"audio": malformed.HEAR},
    **dict.fromkeys((".png", ".jpg", ".heic", ".webp"), _PICTURE),
}


def test_validate_and_the_loader_never_disagree_about_the_reported_cases(reported, tokenizer, tmp_path):
    root, count = reported
    verdicts = verdicts_of(root, validate(root, workers=1)[1], tokenizer, tmp_path)
    assert not disagreements(verdicts)
    bad = sum(bool(said.loader) for said in verdicts.values())
    assert count >= 15 and bad > 5 * count and len(verdicts) - bad > count
    assert sum(said.predict is None for said in verdicts.values()) < len(verdicts) / 4


DOC = Path(__file__).parents[2] / "docs/inputs.md"


def test_the_table_in_the_docs_is_what_was_found(verdicts):
    """docs/inputs.md: input kinds x (loader, validate, predict). CRAB_WRITE_DOCS=1 writes it anew."""
    text = DOC.read_text()
    named = re.findall(r"^\| ([^|]+) \| `([^`|]+)` \|", text, re.MULTILINE)
    assert len(named) > 80
    written = text
    for kind, name in named:
        said = verdicts[name]
        assert said.predict is not None, f"{name} belongs to what predict mends"
        words = ["refused" if of else "read" for of in said[:3]]
        note = (said.loader or said.warning.partition(": ")[2]).partition(";")[0]
        note = re.sub(r", \d+ bytes short", "", note)  # depends on the encoder
        row = f"| {kind} | `{name}` | {' | '.join(words)} | {note.replace(chr(124), '/')} |"
        written = re.sub(
            rf"^\| {re.escape(kind)} \| `{re.escape(name)}` \|.*$", lambda _, row=row: row, written, flags=re.MULTILINE
        )
    if os.environ.get("CRAB_WRITE_DOCS"):
        DOC.write_text(written)
    assert written == text


# What only looks odd is read right.


def at(corpus, name):
    return corpus[0] / "own/media" / name


def test_frames_of_a_varying_rate_are_those_shown_at_quarters_of_the_clip_unless_they_are_to_be_counted(corpus):
    shown, counted = (media.read_video(at(corpus, "varying-rate.mp4"), 4, 16, clock) for clock in media.CLOCKS)
    np.testing.assert_allclose(shown.mean((1, 2, 3)), [0, 48, 56, 80], atol=3)  # at 0, 1.3, 2.6, 3.8 s
    np.testing.assert_allclose(counted.mean((1, 2, 3)), [0, 24, 48, 72], atol=3)  # 0, 3, 6, 9 of 12, as decord does
    assert abs(media.watch(at(corpus, "varying-rate.mp4")).seconds - 5) < 0.2


@pytest.mark.parametrize(("degrees", "bright"), [(90, np.s_[:, 8:]), (180, np.s_[8:, :]), (270, np.s_[:, :8])])
def test_rotated_videos_come_out_upright(corpus, degrees, bright):
    """White above, turned to the right by so many degrees when shown."""
    path = at(corpus, f"rotated-{degrees}.mp4")
    frame = media.read_video(path, 1, 16)[0].astype(int)
    wanted = np.zeros((16, 16, 3), int)
    wanted[bright] = 255
    assert np.abs(frame - wanted).mean() < 10
    size = SIZE if degrees == 180 else SIZE[::-1]
    assert media.video_size(path) == media.watch(path).size == size


def test_a_picture_taken_sideways_comes_out_upright(corpus):
    picture = media.read_image(at(corpus, "exif.jpg"), 16).astype(int)
    assert picture[:, 9:].min() > 245 and picture[:, :7].max() < 10  # what was above is to the right
    assert media.image_size(at(corpus, "exif.jpg")) == SIZE[::-1]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4097, 2)])
def test_odd_sizes(corpus, size):
    path = at(corpus, f"{size[0]}x{size[1]}.mp4")
    frames = media.read_video(path, 3, 16)
    assert frames.shape == (3, 16, 16, 3) and media.video_size(path) == size
    original = np.stack(malformed.noise(3, size))
    if size == (1, 1):  # the colours, within what JPEG keeps
        np.testing.assert_allclose(frames.mean((1, 2)), original[:, 0, 0], atol=12)
    assert media.read_image(at(corpus, "one.png"), 4).tolist() == [[[9, 9, 9]] * 4] * 4


@pytest.mark.parametrize(
    ("name", "scale", "seconds"),
    [
        ("mono.wav", 1, 2),
        ("stereo.wav", 0.5, 2),
        ("surround.wav", 1, 2),
        ("8-khz.wav", 1, 2),
        ("96-khz.wav", 1, 2),
        ("PCM_24.wav", 1, 2),
        ("PCM_32.wav", 1, 2),
        ("PCM_U8.wav", 1, 2),
        ("FLOAT.wav", 1, 2),
        ("DOUBLE.wav", 1, 2),
        ("riff-unknown.wav", 1, 2),
        ("trailing.wav", 1, 2),
        ("whole.flac", 1, 2),
        ("cover.mp3", 1, 2),
    ],
)
def test_every_kind_of_sound_is_the_same_tone(corpus, name, scale, seconds):
    sound = media.read_audio(at(corpus, name))
    assert abs(len(sound) - seconds * 16000) < 8
    middle = slice(4000, 28000)  # resampling rings at the ends
    np.testing.assert_allclose(sound[middle], scale * tone(2.0)[middle], atol=0.05 if name == "cover.mp3" else 0.01)


def test_depths_and_modes_of_pictures(corpus):
    def read(name):
        return media.read_image(at(corpus, name), 48).astype(int)

    pixels = malformed.noise(1)[0]
    plain = read("picture.png")
    np.testing.assert_array_equal(read("alpha.png"), plain)  # as the reference reads it
    ramp = media.read_image(at(corpus, "16-bit.png"), 48)[:, 0, 0]
    assert (np.diff(ramp.astype(int)) >= 0).all() and ramp[0] < 10 and ramp[-1] > 225  # scaled, not cut off
    grey = np.array(malformed.Image.fromarray(pixels[..., 0]).convert("RGB").resize((48, 48), 3))
    np.testing.assert_array_equal(read("interlaced.png"), grey)
    assert np.abs(read("palette.png") - plain).mean() < 40
    np.testing.assert_allclose(read("cmyk.jpg").mean((0, 1)), (200, 40, 40), atol=6)


def test_masks_say_the_same_in_every_form(corpus):
    wanted = np.zeros((32, 48), int)
    wanted[:16] = 9
    for name in ("ids.png", "colours.png", "ids-with-palette.png", "ids-with-greys.png"):
        np.testing.assert_array_equal(media.read_mask(at(corpus, name), None, "semantic"), wanted)
    for name in ("binary.png", "binary-16-bit.png"):
        np.testing.assert_array_equal(media.read_mask(at(corpus, name), None, "binary"), wanted > 0)


def test_unicode_and_marks_are_kept(corpus):
    (example,) = records(corpus[0], "own", "train")
    assert (example.id, example.image) == ("\u526a", "own/media/\u526a.png")
    ids = {e.id: e for e in records(corpus[0], "own", "test") if isinstance(e, Example)}
    assert ids["\u526a\u8f91 \U0001f3bb"].video.endswith("\u526a\u8f91 \u00e9 1.mp4")
    assert ids["whole character"].target == "\U0001f3bb"


# Whole and partial copies.


def test_a_complete_copy_is_good(copied, capsys):
    """What the releases themselves have (shared clips, a stray colour) are warnings."""
    root = copied("ave", "music_avqa", "valor", "own")
    code, report = run(root, "--workers", "1")
    assert code == 0 and {p["problem"].split(":")[0] for p in report["problems"]} == {"warning"}
    shared = {(p["dataset"], p["split"], p["id"]) for p in report["problems"]}
    assert ("ave", "test", "ave-0f_iTO5t3hU-9") in shared and {d for d, *_ in shared} == {
        "ave",
        "avqa",
        "avqa_original",
    }
    assert report["kinds"] == {"missing": 0, "corrupt": 0, "malformed": 0, "leak": 0, "warning": len(shared)}
    assert [c["have"] for c in report["counts"]] == [c.have for c in status(root)[0]]


def run(root, *options):
    """(exit code, report) of the command."""
    out = root / "report.json"
    with pytest.raises(SystemExit) as done:
        main(["--root", str(root), "--json", str(out), *options])
    return done.value.code, json.loads(out.read_text())


def test_a_partial_copy_is_bad_unless_that_is_allowed(copied, capsys):
    root = copied("ave")
    (root / "ave/AVE/RUhOCu3LNXM.mp4").unlink()
    code, report = run(root, "--workers", "1")
    assert code == 3 and report["kinds"]["missing"] == 1
    missing = next(p for p in report["problems"] if p["problem"].startswith("missing"))
    assert set(missing) == {"dataset", "split", "id", "path", "field", "problem"}
    assert "RUhOCu3LNXM.mp4" in missing["problem"] and (missing["dataset"], missing["field"]) == ("ave", "video")
    assert run(root, "--workers", "1", "--allow-missing")[0] == 0
    cut(root / "ave/AVE/0f_iTO5t3hU.mp4", 0.5)
    capsys.readouterr()
    code, report = run(root, "--workers", "1", "--allow-missing")
    assert code == 3
    ids = {p["id"] for p in report["problems"] if p["problem"].startswith("corrupt")}
    assert ids == {"ave-0f_iTO5t3hU-27", "ave-0f_iTO5t3hU-17", "ave-0f_iTO5t3hU-9"}  # all that the file belongs to
    text = capsys.readouterr().out
    assert text.index("corrupt: ends inside") < text.index("warning: ")  # the worst first


def test_nobody_must_have_another_release_of_the_same_clips(copied):
    root = copied("music_avqa", "own")
    for split in ("train", "val", "test"):
        (root / f"music_avqa/data/json/avqa-{split}.json").unlink()
    (root / "own/val.jsonl").unlink()
    assert run(root, "--workers", "1")[0] == 0
    code, report = run(root, "--datasets", "avqa_original", "--workers", "1")
    assert code == 3 and report["kinds"]["missing"] == 3


def test_every_file_is_decoded_once(releases_root):
    tasks = files(releases_root, (), None)
    assert len({path for _, path, _ in tasks}) == len(tasks)
    uses = {path: uses for _, path, uses in tasks}
    assert uses["ave/AVE/0f_iTO5t3hU.mp4"] == ("audio", "video")  # of three rows
    assert uses["valor/video_data/eeeeeeeeeee_0.000_10.000.mp4"] == ("audio", "video")
    assert uses["avsbench_semantic/v1s/HxMoMMrA6Eo_0_5000/labels_semantic/0.png"] == ("binary",)
    assert uses["avsbench_semantic/v2/ccccccccccc_3000_13000/labels_rgb/0.png"] == ("semantic",)


def test_prepared_roots_and_clips_in_two_splits(tmp_path, capsys):
    (tmp_path / "media").mkdir()
    for name in ("a", "b", "c"):
        write_audio(tmp_path / f"media/{name}.wav", 2.0)
    sound = {**malformed.HEAR, "task": "avcap"}
    for split, names in (("train", "ab"), ("test", "bc")):
        rows = [{"id": name, **sound, "audio": f"media/{name}.wav"} for name in names]
        releases.text(tmp_path / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    code, report = run(tmp_path, "--workers", "1")
    assert code == 3 and [(c["dataset"], c["split"], c["have"]) for c in report["counts"]] == [
        ("prepared", "train", 2),
        ("prepared", "test", 2),
    ]
    (problem,) = report["problems"]
    assert (problem["id"], problem["path"], problem["problem"]) == (
        "b",
        "media/b.wav",
        "leak: its clip is in train too",
    )


def test_shards_are_checked_like_files(copied, tmp_path, capsys):
    root, out = copied("ave"), tmp_path / "shards"
    cut(root / "ave/AVE/RUhOCu3LNXM.mp4", 0.5)
    (root / "ave/AVE/-67UNKFmRLk.mp4").unlink()
    prepare.run(
        [
            "--root",
            str(root),
            "--out",
            str(out),
            "--datasets",
            "ave",
            "--image-size",
            "16",
            "--video-frames",
            "4",
            "--workers",
            "0",
        ]
    )
    assert {(c.split, c.missing) for c in status(out)[0]} == {("train", 1), ("val", 0), ("test", 0)}
    code, report = run(out)
    found = {(p["id"], p["field"], p["problem"].split(":")[0]) for p in report["problems"]}
    assert code == 3 and {f for f in found if f[2] == "corrupt"} == {
        ("ave-RUhOCu3LNXM-0", field, "corrupt") for field in ("video", "audio")
    }
    assert report["kinds"] == {"missing": 1, "corrupt": 2, "malformed": 0, "leak": 0, "warning": 1}
    shard = next(out.glob("sounds/*val*-of-*1"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    wrong = [p for p in run(out)[1]["problems"] if "checksum" in p["problem"]]
    assert [p["path"] for p in wrong] == [str(shard.relative_to(out))]


def test_a_file_that_ends_its_decoder_is_a_problem_of_that_file(copied, monkeypatch):
    root = copied("ave")

    def failing(function, tasks, workers, seconds):
        for task in tasks:
            yield (
                task,
                ChildProcessError("ended the process that decoded it (SIGSEGV)")
                if ("RUhOCu3LNXM" in task[1])
                else examine(task),
            )

    monkeypatch.setattr(verb, "results", failing)
    bad = [p for p in validate(root, ["ave"])[1] if p.kind != "warning"]
    assert {(p.id, p.field, p.problem) for p in bad} == {
        ("ave-RUhOCu3LNXM-0", field, "corrupt: ended the process that decoded it (SIGSEGV)")
        for field in ("video", "audio")
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--root", "/no/such/folder"], "--root.*is no folder"),
        (["--root", "docs"], "--root.*holds none"),
        (["--root", ".", "--workers", "-1"], "--workers"),
        (["--root", ".", "--datasets", "avee"], "avee.*unknown dataset"),
        (["--root", ".", "--datasets", "lvis", "--json", "/dev/null/x.json"], "--json.*folder of the system"),
    ],
)
def test_bad_command_lines_end_in_one_line(argv, message, one_line_error):
    one_line_error(main, argv, message)
