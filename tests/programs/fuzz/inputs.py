"""What is fuzzed: sound files of every kind, made by the tests' own helpers, and the commands that read each."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from PIL import Image

from crab_jax.tasks.avs_classes import avss_palette
from data_pipelines.datasets import DATASETS
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.sources import scenes
from tests import clips
from tests.programs.fuzz import mutate
from tests.programs.fuzz.cage import REPO, Cage

sys.path.append(str(REPO / "tests/data_pipelines"))
import releases  # noqa: E402  (a helper beside the tests of that room)

GOLDEN = REPO / "tests/golden/weights"
TOKENIZER = REPO / "data_pipelines/tiny_tokenizer.json"
OK, VALIDATED = (0, 2), (0, 2, 3)
SHORT = ("--max-new-tokens", "7")
TINY = (
    "--config=configs/tiny.py",
    "--config.init_from=warm_start",
    "--config.steps=1",
    "--config.data.batch_size=2",
    "--config.data.workers=0",
)


class Command(NamedTuple):
    """A command of a case: {in} stands for its input folder, {out} for where it writes, {world} for what is sound.
    codes: exit codes that it may have."""

    module: str
    arguments: tuple[str, ...]
    codes: tuple[int, ...] = OK


class Kind(NamedTuple):
    """A kind of input. take: folders or files of the world, linked into the case; file: which of them is changed (one
    of several, where it is a pattern); commands: what reads it; family: how it is changed; same: the hash of
    tests/programs/fuzz/digest.py that must be what it was, or be refused, and of which file."""

    name: str
    take: str
    file: str
    commands: tuple[Command, ...]
    family: Sequence[mutate.Mutation]
    same: tuple[str, str] | None = None


def _verb(module: str, *arguments: str, codes: tuple[int, ...] = OK) -> Command:
    return Command(module, arguments, codes)


def _pipelines(verb: str, *arguments: str) -> Command:
    return Command("data_pipelines", (verb, *arguments), VALIDATED if verb in ("validate", "own") else OK)


def _predict(*arguments: str, checkpoint: str = "{world}/packed") -> Command:
    return _verb("crab_jax.predict", "--checkpoint", checkpoint, "--out", "{out}/o", *SHORT, *arguments)


# The world: what is sound.


def _media(folder: Path) -> None:
    """A short file of every kind of medium, and the tiny root of one example that it is in."""
    folder.mkdir()
    second = clips.beep(2.0, 0.5, 1.0)
    for ending in clips.CODECS:
        if ending != ".flv":
            clips.write_clip(folder / f"clip{ending}", clips.steady(2.0), second, bf=2 if ending == ".mp4" else 0)
    for ending, subtype in (("wav", "PCM_16"), ("flac", "PCM_16"), ("mp3", "MPEG_LAYER_III"), ("ogg", "VORBIS")):
        soundfile.write(folder / f"sound.{ending}", second, clips.RATE, subtype=subtype)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    picture = Image.fromarray(pixels)
    for ending in ("png", "jpg", "gif", "tiff", "webp", "bmp"):
        picture.save(folder / f"picture.{ending}")
    picture.save(folder / "progressive.jpg", progressive=True)
    ids = np.zeros((96, 128), np.uint8)
    ids[20:60, 30:90] = 9
    Image.fromarray((ids > 0).astype(np.uint8) * 255).save(folder / "binary.png")
    palette = Image.fromarray(ids, "P")
    palette.putpalette(avss_palette().tobytes())
    palette.save(folder / "palette.png")
    Image.fromarray(avss_palette()[ids]).save(folder / "colours.png")


_LOOK = {"task": "avcap", "target": "It.", "windows": "none"}
_SEGMENT = {
    "task": "s4",
    "instruction": "<image>What is it?",
    "windows": "none",
    "mask_kind": "binary",
    "target": "".join(f"<mask_{i}>" for i in range(6)),
    "meta": {"objects": ["dog"], "video": "v"},
}


def _example(use: str, name: str) -> Example:
    """An Example that uses a medium."""
    if use == "film":
        return Example(id="a", instruction="<video><audio>What is it?", video=name, **{**_LOOK, "windows": "ten"})
    if use == "sound":
        return Example(id="a", instruction="<audio>What is it?", audio=name, **{**_LOOK, "windows": "ten"})
    if use == "picture":
        return Example(id="a", instruction="<image>What is it?", image=name, **_LOOK)
    kind = {} if use == "binary" else {"task": "avss", "mask_kind": "semantic"}
    return Example(id="a", image="picture.png", mask=name, **{**_SEGMENT, **kind})


MEDIA = {  # file -> how it is used
    **{f"clip.{ending}": "film" for ending in ("mp4", "mkv", "webm", "ts", "avi")},
    **{f"sound.{ending}": "sound" for ending in ("wav", "flac", "mp3", "ogg")},
    **{f"picture.{ending}": "picture" for ending in ("png", "jpg", "gif", "tiff", "webp", "bmp")},
    "progressive.jpg": "picture",
    "binary.png": "binary",
    "palette.png": "semantic",
    "colours.png": "semantic",
}


def _media_roots(world: Path) -> None:
    """A raw root `own` per medium, which train and test list."""
    for name, use in MEDIA.items():
        own = world / "roots" / name / "own"
        own.mkdir(parents=True)
        for file in {name, "picture.png"} if use in ("binary", "semantic") else {name}:
            shutil.copyfile(world / "media" / file, own / file)
        for split in ("train", "test"):
            write_jsonl(own / f"{split}.jsonl", [_example(use, name)])


def _table(folder: Path) -> None:
    """A table of a user, as CSV and JSONL, with its media beside it."""
    folder.mkdir()
    clips.write_clip(folder / "a.mp4", clips.steady(2.0), clips.beep(2.0, 0.5, 1.0))
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    rows = [
        {
            "id": "1",
            "task": "avqa",
            "video": "a.mp4",
            "question": "How many?",
            "answer": "two",
            "type": "Audio-Visual/Counting",
        },
        {"id": "2", "task": "ave", "video": "a.mp4", "event": "Dog bark", "start": "0", "end": "1"},
        {"id": "3", "task": "avcap", "video": "a.mp4", "captions": "A dog barks."},
        {"id": "4", "task": "s4", "video": "a.mp4", "second": "0", "mask": "mask.png", "objects": "dog"},
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    (folder / "t.csv").write_text(text.getvalue())
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _labels(world: Path) -> None:
    """A zip of released labels, for the AVE of the releases."""
    folder = world / "labels"
    folder.mkdir()
    text = (
        "A bell. So the audible and visible event in the video is <event> Church bell </event>, and the time range "
        "is <range> 0,10 </range>."
    )
    with zipfile.ZipFile(folder / "ave_converted_label.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("RUhOCu3LNXM", "VWi2ENBuTbw"):
            archive.writestr(f"converted_label/{name}.txt", text)


def _requests(folder: Path) -> None:
    """Samples for predict, beside media."""
    folder.mkdir()
    for name in ("clip.mp4", "sound.wav", "picture.png"):
        shutil.copyfile(folder.parent / "media" / name, folder / name)
    (folder / "samples.json").write_text(
        json.dumps(
            [
                {"task": "ave", "video_path": "clip.mp4"},
                {"task": "avqa", "image_path": "picture.png", "audio_path": "sound.wav", "question": "What is it?"},
                {"task": "s4", "image_path": "picture.png", "audio_path": "sound.wav", "second": 0},
            ]
        )
    )


def _run(world: Path) -> None:
    """A packed model with digests, and the checkpoint of a run, of the committed warm start."""
    import dataclasses

    import jax.numpy as jnp

    from crab_jax import optim
    from crab_jax.checkpoints import models, run_steps
    from crab_jax.runs import run_folder, run_params
    from crab_jax.training import train_step

    model, params, config, tokenizer = run_params.load_model("warm_start")
    models.save_packed(world / "packed", params, config.to_dict(), tokenizer=tokenizer)
    trainable, frozen = optim.split(params, config.trainable, config.frozen)
    folder = world / "run"
    folder.mkdir()
    saved = run_steps.RunCheckpoints(folder / "checkpoints")
    saved.save_frozen(frozen, {"lora_heads": model.cfg.lora.heads})
    state = train_step.TrainState(jnp.int32(1), trainable, optim.optimizer(config.optim, 2).init(trainable))
    saved.save(1, dataclasses.asdict(state))
    saved.wait()
    run_folder.save_description(folder, config, tokenizer)
    saved.note_description()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 2.5 / n}) + "\n" for n in (1, 2, 3)))


def _evaluations(world: Path, cage: Cage, model: bool) -> None:
    """Two evaluations of the scenes: by the model, or answers that are given."""
    rows = [json.loads(line) for line in (world / "scenes/test.jsonl").read_text().splitlines()]
    answers = "".join(json.dumps({"id": row["id"], "text": row["target"]}) + "\n" for row in rows)
    (world / "answers").mkdir()
    (world / "answers/answers.jsonl").write_text(answers)
    (world / "evaluations").mkdir()
    for name in ("a", "b"):
        given = ["--predictions", str(world / "answers/answers.jsonl")]
        if model and name == "b":
            given = ["--checkpoint", str(world / "packed"), *SHORT]
        done = cage.run(
            "crab_jax.evaluate",
            [*given, "--data", str(world / "scenes"), "--out", str(world / f"evaluations/{name}")],
            300,
        )
        assert done.code == 0, done.err


def build(world: Path, cage: Cage, model: bool = True) -> None:
    """Make all that is sound. `model`: with what needs one."""
    world.mkdir(parents=True)
    scenes.write(world / "scenes", {"train": 2, "val": 1, "test": 1}, seed=7)
    releases.write(world / "data", world / "of_releases")
    shutil.rmtree(world / "of_releases")
    _media(world / "media")
    _media_roots(world)
    _table(world / "table")
    _labels(world)
    _requests(world / "requests")
    _run(world)
    _evaluations(world, cage, model)
    (world / "import").mkdir()
    for name in ("clip", "llama", "beats", "crab", "bert"):
        shutil.copytree(GOLDEN / name, world / "import" / name)
    (world / "tokenizer").mkdir()
    shutil.copyfile(TOKENIZER, world / "tokenizer/tokenizer.json")
    (world / "llama").mkdir()
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(GOLDEN / "llama" / file, world / "llama" / file)
    (world / "config").mkdir()
    shutil.copyfile(REPO / "configs/tiny.py", world / "config/tiny.py")
    done = cage.run(
        "data_pipelines",
        [
            "prepare",
            "--root",
            str(world / "scenes"),
            "--out",
            str(world / "prepared"),
            "--image-size",
            "16",
            "--video-frames",
            "2",
            "--workers",
            "0",
        ],
        300,
    )
    assert done.code == 0, done.err


# The kinds.

_PREDICT_AS = {
    "film": ("--video", "{file}", "--question", "What?"),
    "sound": ("--audio", "{file}", "--image", "{world}/media/picture.png", "--question", "What?"),
    "picture": ("--image", "{file}", "--audio", "{world}/media/sound.wav", "--task", "s4"),
    "binary": (
        "--image",
        "{in}/own/picture.png",
        "--audio",
        "{world}/media/sound.wav",
        "--task",
        "s4",
        "--mask",
        "{file}",
    ),
    "semantic": (
        "--image",
        "{in}/own/picture.png",
        "--audio",
        "{world}/media/sound.wav",
        "--task",
        "avss",
        "--mask",
        "{file}",
    ),
}


def _of_media() -> list[Kind]:
    kinds = []
    for name, use in MEDIA.items():
        commands = (
            _predict(*_PREDICT_AS[use]),
            _verb("tests.programs.fuzz.digest", use, "{file}"),
            _pipelines("status", "--root", "{in}", "--json", "{out}/s.json"),
            _pipelines("validate", "--root", "{in}", "--json", "{out}/v.json", "--workers", "1"),
            _pipelines(
                "prepare",
                "--root",
                "{in}",
                "--datasets",
                "own",
                "--out",
                "{out}/p",
                "--workers",
                "0",
                "--image-size",
                "16",
            ),
            _pipelines("sample", "--root", "{in}", "--datasets", "own", "--out", "{out}/s"),
            _verb(
                "crab_jax.evaluate",
                "--checkpoint",
                "{world}/packed",
                "--data",
                "{in}",
                "--datasets",
                "own",
                *SHORT,
                "--out",
                "{out}/e",
            ),
        )
        family = mutate.PNG if name.endswith("png") else mutate.MEDIA
        kinds.append(Kind(name, f"roots/{name}", f"own/{name}", commands, family))
    return kinds


_ROOT = ("--root", "{in}")
_LISTS = (
    _pipelines("status", *_ROOT),
    _pipelines("validate", *_ROOT, "--workers", "1", "--json", "{out}/v.json"),
    _pipelines("prepare", *_ROOT, "--out", "{out}/p", "--workers", "0", "--image-size", "16"),
    _pipelines("sample", *_ROOT, "--out", "{out}/s", "--split", "test"),
)
_EVALUATE = ("--data", "{world}/scenes", "--out", "{out}/e")


def _of_lists() -> list[Kind]:
    """Records, tables, answers, evaluations."""
    compared = (
        _verb("crab_jax.compare", "{in}/a", "{in}/b", "--data", "{world}/scenes", "--out", "{out}/d.json"),
        _verb("crab_jax.compare", "{in}/b", "{in}/a"),
    )
    report = _verb(
        "crab_jax.report",
        "--run",
        "{world}/run",
        "--results",
        "{in}/a/results.json",
        "--data",
        "{world}/scenes",
        "--out",
        "{out}/r.html",
        "--samples",
        "1",
        "--routing-samples",
        "1",
        *SHORT,
    )
    return [
        Kind(
            "test.jsonl",
            "scenes",
            "test.jsonl",
            (
                *_LISTS,
                _verb(
                    "crab_jax.evaluate",
                    "--predictions",
                    "{world}/answers/answers.jsonl",
                    "--data",
                    "{in}",
                    "--out",
                    "{out}/e",
                ),
                _verb("data_pipelines.av_uie", "verify", "--examples", "{file}", "--out", "{out}/v"),
                _verb("data_pipelines.av_uie", "card", "--examples", "{file}", "--out", "{out}/c"),
                _verb("data_pipelines.av_uie", "write", "--examples", "{file}", "--out", "{out}/w.jsonl"),
                _verb("data_pipelines.tokens", "--corpus", "{file}", "--out", "{out}/t.json"),
                _verb("crab_jax.compare", "{world}/evaluations/a", "{world}/evaluations/b", "--data", "{in}"),
            ),
            mutate.JSON,
        ),
        Kind(
            "train.jsonl",
            "scenes",
            "train.jsonl",
            (*_LISTS[:3], _verb("crab_jax.train", *TINY, "--config.data.root={in}", "--workdir={out}/w")),
            mutate.JSON,
        ),
        Kind(
            "table as CSV",
            "table",
            "t.csv",
            (_pipelines("own", "--csv", "{file}", "--root", "{out}/r", "--copy", "--workers", "1"),),
            mutate.TEXT,
        ),
        Kind(
            "table as JSONL",
            "table",
            "t.jsonl",
            (_pipelines("own", "--jsonl", "{file}", "--root", "{out}/r", "--copy", "--workers", "1"),),
            mutate.JSON,
        ),
        Kind(
            "answers",
            "answers",
            "answers.jsonl",
            (_verb("crab_jax.evaluate", "--predictions", "{file}", *_EVALUATE),),
            mutate.JSON,
        ),
        *(
            Kind(file, "evaluations", f"a/{file}", compared, mutate.JSON)
            for file in ("predictions.jsonl", "evaluation.json")
        ),
        Kind("results.json", "evaluations", "a/results.json", (report,), mutate.JSON),
        Kind(
            "metrics.jsonl",
            "run",
            "metrics.jsonl",
            (
                _verb(
                    "crab_jax.report",
                    "--run",
                    "{in}",
                    "--results",
                    "{world}/evaluations/a/results.json",
                    "--data",
                    "{world}/scenes",
                    "--out",
                    "{out}/r.html",
                    "--samples",
                    "1",
                    "--routing-samples",
                    "1",
                    *SHORT,
                ),
            ),
            mutate.JSON,
        ),
        Kind("samples of predict", "requests", "samples.json", (_predict("--samples", "{file}"),), mutate.JSON),
        Kind(
            "zip of labels",
            "labels",
            "ave_converted_label.zip",
            (
                _verb(
                    "data_pipelines.av_uie",
                    "read",
                    "--root",
                    "{world}/data",
                    "--datasets",
                    "ave",
                    "--labels",
                    "{file}",
                    "--out",
                    "{out}/l.jsonl",
                ),
            ),
            mutate.ARCHIVE,
        ),
    ]


def _of_models() -> list[Kind]:
    """Weights, checkpoints, tokenizers, configs, what another program wrote."""
    scenes_of = ("--data", "{world}/scenes", "--tasks", "avqa", "--limit", "1", *SHORT, "--out", "{out}/e")
    asked = ("--image", "{world}/media/picture.png", "--audio", "{world}/media/sound.wav", "--question", "What?")
    imports = _verb(
        "crab_jax.convert",
        "import",
        "--clip",
        "{in}/clip",
        "--llama",
        "{in}/llama",
        "--beats",
        "{in}/beats/BEATs_tiny.pt",
        "--crab",
        "{in}/crab/finetune_weights.bin",
        "{in}/crab/avs_finetune_weights.bin",
        "--tokenizer",
        "{world}/tokenizer",
        "--bert",
        "{in}/bert/config.json",
        "--taps",
        "0,1,2",
        "--low-res",
        "16",
        "--dtype",
        "float32",
        "--out",
        "{out}/i",
    )
    models = (
        _predict(*asked, checkpoint="{in}"),
        _verb("crab_jax.evaluate", "--checkpoint", "{in}", *scenes_of),
        _verb("crab_jax.convert", "export", "{in}", "--format", "crab", "--out", "{out}/x"),
    )
    imported = {
        "clip/model.safetensors": mutate.WEIGHTS,
        "llama/model-00002-of-00002.safetensors": mutate.WEIGHTS,
        "llama/model.safetensors.index.json": mutate.JSON,
        "llama/config.json": mutate.JSON,
        "clip/config.json": mutate.JSON,
        "bert/config.json": mutate.JSON,
        "beats/BEATs_tiny.pt": mutate.ARCHIVE,
        "crab/finetune_weights.bin": mutate.ARCHIVE,
    }
    return [
        *(
            Kind(f"packed {file}", "packed", file, models, family)
            for file, family in (
                ("config.json", mutate.JSON),
                ("params.safetensors", mutate.WEIGHTS),
                ("tokenizer.json", mutate.JSON),
                ("manifest.json", mutate.JSON),
            )
        ),
        Kind("checkpoint", "run", "checkpoints/**/*", models, mutate.BLIND),
        Kind("manifest of a checkpoint", "run", "checkpoints/manifest.json", models, mutate.JSON),
        Kind("config.json of a run", "run", "config.json", models, mutate.JSON),
        *(Kind(f"import {file}", "import", file, (imports,), family) for file, family in imported.items()),
        Kind(
            "tokenizer.model",
            "llama",
            "tokenizer.model",
            (_pipelines("sample", "--root", "{world}/scenes", "--n", "1", "--tokenizer", "{in}", "--out", "{out}/s"),),
            mutate.BLIND,
        ),
        Kind(
            "tokenizer.json",
            "tokenizer",
            "tokenizer.json",
            (
                _pipelines("sample", "--root", "{world}/scenes", "--n", "1", "--tokenizer", "{in}", "--out", "{out}/s"),
                _verb(
                    "data_pipelines.av_uie",
                    "card",
                    "--examples",
                    "{world}/scenes/test.jsonl",
                    "--tokenizer",
                    "{in}",
                    "--out",
                    "{out}/c",
                ),
            ),
            mutate.JSON,
        ),
        Kind(
            "config file",
            "config",
            "tiny.py",
            (
                _verb(
                    "crab_jax.train",
                    "--config={file}",
                    "--config.init_from=warm_start",
                    "--config.steps=1",
                    "--config.data.batch_size=2",
                    "--config.data.root={world}/nothing",
                    "--workdir={out}/w",
                ),
            ),
            mutate.TEXT,
        ),
        Kind(
            "prepared root",
            "prepared",
            "**/*",
            (
                _pipelines("status", *_ROOT),
                _pipelines("validate", *_ROOT),
                _pipelines("sample", *_ROOT, "--out", "{out}/s"),
                _verb("crab_jax.train", *TINY, "--config.data.root={in}", "--workdir={out}/w"),
                _verb("tests.programs.fuzz.digest", "prepared", "{in}"),
            ),
            mutate.BLIND,
        ),
    ]


def _of_releases(world: Path) -> list[Kind]:
    """The annotation files of each dataset."""
    kinds = []
    for file in sorted(path for path in (world / "data").rglob("*") if path.suffix in (".txt", ".csv", ".json")):
        folder, _, inner = str(file.relative_to(world / "data")).partition("/")
        names = ",".join(name for name, dataset in DATASETS.items() if dataset.folder.split("/")[0] == folder)
        if not names or not inner:
            continue
        at = ("--root", "{in}", "--datasets", names)
        commands = (
            _pipelines("status", *at),
            _pipelines("validate", *at, "--workers", "1", "--json", "{out}/v.json"),
            _pipelines("sample", *at, "--out", "{out}/s", "--n", "1"),
            _pipelines(
                "prepare", *at, "--out", "{out}/p", "--workers", "0", "--image-size", "16", "--video-frames", "2"
            ),
            _verb("data_pipelines.av_uie", "write", *at, "--out", "{out}/w.jsonl"),
        )
        kinds.append(
            Kind(
                f"annotations of {folder}",
                f"data/{folder}",
                inner,
                commands,
                mutate.JSON if file.suffix == ".json" else mutate.TEXT,
            )
        )
    return kinds


def kinds_of(world: Path) -> list[Kind]:
    """All kinds of files."""
    return [*_of_media(), *_of_lists(), *_of_models(), *_of_releases(world)]


def _same(name: str, take: str, file: str, use: str, family: Sequence[mutate.Mutation], at: str = "{file}") -> Kind:
    return Kind(name, take, file, (_verb("tests.programs.fuzz.digest", use, at),), family, (use, at))


def exact_kinds() -> list[Kind]:
    """Changes after which a file is refused, or read as it was: cuts of what says how long it is, flipped bits of what
    has checksums."""
    whole = [name for name in MEDIA if not name.endswith((".ts", ".mp3"))]  # these say nothing of their length
    return [
        *(_same(f"cut {name}", f"roots/{name}", f"own/{name}", MEDIA[name], mutate.CUTS) for name in whole),
        *(
            _same(f"flipped {name}", f"roots/{name}", f"own/{name}", use, mutate.FLIPS)
            for name, use in (
                ("picture.png", "picture"),
                ("binary.png", "binary"),
                ("palette.png", "semantic"),
                ("colours.png", "semantic"),
                ("sound.flac", "sound"),
            )
        ),
        _same("flipped prepared root", "prepared", "**/*", "prepared", mutate.FLIPS, "{in}"),
        _same("flipped packed model", "packed", "**/*", "params", mutate.FLIPS, "{in}"),
        _same("flipped checkpoint", "run", "checkpoints/**/*", "params", mutate.FLIPS, "{in}"),
        _same("flipped zip of labels", "labels", "ave_converted_label.zip", "labels", mutate.FLIPS),
        _same("flipped torch file", "import", "beats/BEATs_tiny.pt", "torch", mutate.FLIPS),
    ]


def link(source: Path, target: Path) -> None:
    """A copy of a folder whose files are links to the same ones."""
    shutil.copytree(source, target, copy_function=os.link)


def pages(folder: Path) -> str:
    """What of a hostile text stands on a page as it came, "" for nothing."""
    for page in folder.rglob("*.html"):
        text = page.read_text("utf-8", "replace")
        if mutate.MARK in text or "<script>alert" in text:
            return f"{page.name} holds a hostile text as it came"
    return ""
