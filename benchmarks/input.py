"""Measure how fast, and with what memory, samples are read from files, from prepared shards, and by the reference.

    python benchmarks/input.py --media ../shared/media --reference-python VENV/bin/python --json runs/input.json
    python benchmarks/input.py --soak 10000

Samples per second of one core (CPU time, all threads counted), stage by stage, on the same files in one run: rounds of
the three take turns, and the median counts. `bare` only decodes every frame and every sample of sound; the ratio of
raw's decoding to it leaves out what bare does not do (resizing, filter banks, text, the batch). The reference
(input_reference.py) runs in --reference-python, which needs decord, librosa, torchaudio and transformers; without it
that column is left out. --media holds Crab's example files (ave/*.mp4 and *.mp3, s4/0.jpg and audio.wav); scenes are
generated in any case.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

from data_pipelines import batching, fbank, media, mixture, prepare, shards
from data_pipelines.batching import DataConfig
from data_pipelines.examples import Example, write_jsonl
from data_pipelines.sources import scenes
from data_pipelines.tokens import Tokenizer

ROUNDS, BATCH = 5, 8
PROMPT = (
    "This is a video:\n<video_start><video><video_end>\nThis is an audio:\n<audio_start><audio><audio_end>\n"
    "Please describe the events and time range that occurred in the video."
)
TARGET = "The event is <event> Male speech, man speaking </event>, and the time range is <range> 0,8 </range>."
# (owner, function, stage): a function's own time, without that of the functions below it that are listed too.
STAGES = [
    (media, "read_video", "decode"),
    (media, "read_image", "decode"),
    (media, "read_audio", "decode"),
    (media, "_small", "resize"),
    (media, "_square", "resize"),
    (fbank, "cut_windows", "fbank"),
    (fbank, "fbank", "fbank"),
    (batching, "_encode", "tokenise"),
    (batching, "bucket_for", "tokenise"),
    (batching, "text_arrays", "tokenise"),
    (batching, "collate", "batch"),
    (batching, "_pad", "batch"),
    *((shards.Shards, name, "read") for name in ("video", "picture", "sound")),
]


def examples_of(root: Path, folder: Path | None) -> dict[str, list[Example]]:
    """Return the Examples to read, by name; the files are copied or generated into `root`."""
    scenes.write(root, {"train": BATCH}, seed=1)
    clips = sorted(path.relative_to(root).as_posix() for path in root.glob("train/*/clip.mp4"))
    clip = Example(id="", task="ave", instruction=PROMPT, target=TARGET)
    found = {
        "scene clips": [
            dataclasses.replace(clip, id=path, video=path, audio=path.replace("clip.mp4", "audio.wav"))
            for path in clips
        ]
    }
    if folder:
        video = next((folder / "ave").glob("*.mp4"))
        for number in range(BATCH):  # several names, so that nothing is cached
            for suffix in (".mp4", ".mp3"):
                shutil.copy(video.with_suffix(suffix), root / f"ave{number}{suffix}")
            for k in range(5):
                shutil.copy(folder / "s4/0.jpg", root / f"s4_{number}_{k}.jpg")
            shutil.copy(folder / "s4/audio.wav", root / f"s4_{number}.wav")
        found["AVE clips"] = [
            dataclasses.replace(clip, id=f"ave{n}", video=f"ave{n}.mp4", audio=f"ave{n}.mp3") for n in range(BATCH)
        ]
        found["S4 pictures"] = [
            dataclasses.replace(
                clip,
                id=f"s4_{n}",
                frames=tuple(f"s4_{n}_{k}.jpg" for k in range(5)),
                audio=f"s4_{n}.wav",
                windows="five",
            )
            for n in range(BATCH)
        ]
    return found


def bare(examples: list[Example], root: Path) -> None:
    """Decode the files, and no more."""
    for example in examples:
        for path, kind in ((example.video, "video"), (example.audio or example.video, "audio")):
            if path and path.endswith(".mp4"):
                with av.open(str(root / path)) as container:
                    stream = getattr(container.streams, kind)[0]
                    stream.codec_context.thread_count = 1
                    for _ in container.decode(stream):
                        pass
            elif path and kind == "audio":
                soundfile.read(root / path, dtype="float32")
        for path in example.frames:
            with Image.open(root / path) as picture:
                picture.load()


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Collect the own CPU seconds of every stage while the context lasts."""
    seconds: dict[str, float] = defaultdict(float)
    below = [0.0]

    def timed(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            below.append(0.0)
            try:
                return call(*arguments, **named)
            finally:
                whole = time.process_time() - began
                seconds[stage] += whole - below.pop()
                below[-1] += whole

        return run

    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in STAGES]
    for owner, name, stage in STAGES:
        setattr(owner, name, timed(stage, getattr(owner, name)))
    try:
        yield seconds
    finally:
        for owner, name, call in saved:
            setattr(owner, name, call)


def read(examples: list[Example], root: Path, tokenizer: Tokenizer, config: DataConfig) -> dict[str, float]:
    """Return the CPU seconds of one batch of `examples`, by stage; "total" is the sum."""
    with clocks() as seconds:
        began = time.process_time()
        batching.collate((batching.load(example, root, tokenizer, config) for example in examples), len(examples))
        return {**seconds, "total": time.process_time() - began}


class Reference:
    """input_reference.py as a process that serves one round at a time."""

    def __init__(self, python: str):
        script = Path(__file__).with_name("input_reference.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]} cannot run input_reference.py; install its four libraries there")
        return json.loads(line)

    def seconds(self, examples: list[Example], root: Path, config: DataConfig) -> float:
        samples = [
            {
                "audio": str(root / (e.audio or e.video or "")),
                "windows": e.windows,
                **({"video": str(root / e.video)} if e.video else {"frames": [str(root / p) for p in e.frames]}),
            }
            for e in examples
        ]
        assert self.process.stdin
        self.process.stdin.write(
            json.dumps({"samples": samples, "size": config.image_size, "frames": config.video_frames}) + "\n"
        )
        self.process.stdin.flush()
        return self._answer()["seconds"]


def compare(
    examples: list[Example],
    raw: Path,
    prepared: Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    reference: Reference | None,
) -> dict[str, Any]:
    """Return milliseconds of CPU per sample: bare, raw and prepared (by stage), the reference's; and the ratios."""
    rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(ROUNDS + 1):  # the first warms up
        began = time.process_time()
        bare(examples, raw)
        rounds["bare"].append({"total": time.process_time() - began})
        rounds["raw"].append(read(examples, raw, tokenizer, config))
        if reference:
            rounds["reference"].append({"total": reference.seconds(examples, raw, config)})
        for _ in range(5):
            rounds["prepared"].append(read(examples, prepared, tokenizer, config))
    result: dict[str, Any] = {}
    for name, found in rounds.items():
        kept = found[1:]
        result[name] = {
            stage: 1000 * statistics.median(one.get(stage, 0.0) for one in kept) / len(examples) for stage in kept[0]
        }
    total = {name: stages["total"] for name, stages in result.items()}
    result["ratios"] = {
        "raw / bare": total["raw"] / total["bare"],
        "raw's decoding / bare": result["raw"]["decode"] / total["bare"],
    }
    if reference:
        result["ratios"] |= {
            "reference / raw": total["reference"] / total["raw"],
            "reference / prepared": total["reference"] / total["prepared"],
        }
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format the comparison as Markdown."""
    stages = ("decode", "read", "resize", "fbank", "tokenise", "batch", "total")
    lines = ["| ms of CPU a sample | " + " | ".join(stages) + " | samples/s per core |", "|---|" + "---|" * 8]
    for name, found in results.items():
        for way in ("bare", "reference", "raw", "prepared"):
            if way in found:
                cells = [f"{found[way][s]:.2f}" if s in found[way] else "" for s in stages]
                lines.append(f"| {name}, {way} | " + " | ".join(cells) + f" | {1000 / found[way]['total']:.1f} |")
    lines += [
        "",
        *(
            f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found["ratios"].items())
            for name, found in results.items()
        ),
    ]
    return "\n".join(lines)


def resident(pid: int | str = "self", field: str = "VmRSS") -> float:
    """Return the resident memory of a process in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field))


def children() -> list[int]:
    """Return the ids of this process's children that hold more than an interpreter."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [pid for pid in map(int, path.read_text().split()) if resident(pid) > 100]


def order_of(examples: list[Example], tokenizer: Tokenizer, config: DataConfig) -> mixture.TrainOrder:
    return mixture.train_order(examples, tokenizer, config, BATCH)


def worker_memory(examples: list[Example], root: Path, tokenizer: Tokenizer, config: DataConfig) -> dict[str, float]:
    """Return the peak MB of one worker process after 30 batches, and the size of a batch."""
    stream = iter(mixture.train_dataset(order_of(examples, tokenizer, config), root, tokenizer, config, workers=1))
    batch = next(stream)
    for _ in range(29):
        next(stream)
    peak = max(resident(pid, "VmHWM") for pid in children())
    return {"worker_mb": peak, "batch_mb": sum(np.asarray(value).nbytes for value in vars(batch).values()) / 1e6}


def soak(count: int, examples: list[Example], root: Path, tokenizer: Tokenizer, config: DataConfig) -> dict[str, Any]:
    """Read `count` records; return resident MB after each tenth of them, and the growth after the first fifth."""
    stream = iter(mixture.train_dataset(order_of(examples, tokenizer, config), root, tokenizer, config))
    seen, marks, began = 0, [], time.monotonic()
    while seen < count:
        next(stream)
        seen += BATCH
        if seen * 10 // count > len(marks):
            marks.append(round(resident(), 1))
            print(f"{seen} records, {seen / (time.monotonic() - began):.0f}/s, {marks[-1]} MB", file=sys.stderr)
    slope = np.polyfit(np.linspace(0.1, 1, len(marks))[1:], marks[1:], 1)[0]
    return {"records": seen, "resident_mb": marks, "growth_mb_per_10000": float(slope * 10000 / count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, help="folder of Crab's example files")
    parser.add_argument("--reference-python", default="", help="interpreter that has decord and the others")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="read N records and watch the memory instead")
    parser.add_argument("--json", default="", help="file to write the figures to")
    arguments = parser.parse_args()
    config, tokenizer = DataConfig(), Tokenizer.load("data_pipelines/tiny_tokenizer.json")
    with tempfile.TemporaryDirectory() as folder:
        raw, prepared = Path(folder) / "raw", Path(folder) / "prepared"
        found = examples_of(raw, arguments.media)
        write_jsonl(raw / "train.jsonl", [example for group in found.values() for example in group])
        prepare.run(["--root", str(raw), "--out", str(prepared), "--splits", "train", "--workers", "0"])
        report: dict[str, Any] = {}
        if arguments.soak:
            for name, root in (("prepared", prepared), ("raw", raw)):
                report[name] = soak(arguments.soak, found["scene clips"], root, tokenizer, config)
                print(f"{name}: {report[name]}")
        else:
            reference = Reference(arguments.reference_python) if arguments.reference_python else None
            report["reference_versions"] = reference.versions if reference else {}
            report["input"] = {
                name: compare(group, raw, prepared, tokenizer, config, reference) for name, group in found.items()
            }
            print(table(report["input"]))
            report["memory"] = {
                name: worker_memory(found["scene clips"], root, tokenizer, config)
                for name, root in (("raw", raw), ("prepared", prepared))
            }
            for name, values in report["memory"].items():
                print(
                    f"worker, {name}: peak {values['worker_mb']:.0f} MB, {BATCH} samples are "
                    f"{values['batch_mb']:.1f} MB"
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
