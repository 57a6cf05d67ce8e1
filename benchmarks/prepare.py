"""Measure what one core prepares, and extrapolate the hours, gigabytes and cost of whole datasets.

    python benchmarks/prepare.py --media ../shared/media --json runs/prepare.json

Media per second of a core: CPU time of `prepare.write_shard` (decoding, resizing, filter banks, the shard with its
checksums) for shards of one kind, the median of several rounds. --media holds Crab's example files (ave/*.mp4 and
*.mp3, s4/0.jpg and 0.png). The second table is arithmetic, not a measurement: the rates of these files, for the numbers
of media below, on machines of --cores cores that do a part each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from data_pipelines import prepare, shards
from data_pipelines.shards import Decoding, Medium

ROUNDS, COPIES = 5, 8
PARTS = (1, 8, 64)


class Rate(NamedTuple):
    """per_s: media per second of one core. kilobytes: of a medium in its shard."""

    per_s: float
    kilobytes: float


# Media of whole releases, all splits; the sounds are filter banks of ten windows.
STAGES: dict[str, dict[str, int]] = {
    # AVE, LLP, MUSIC-AVQA, VALOR: 57,500 clips and their sound. AVSBench and Ref-AVS: 15,500 sounds, 127,000 pictures,
    # and as many masks as make 0.45 M media.
    "joint": {"video": 57_500, "sound": 73_000, "picture": 127_000, "mask": 192_500},
    "Video-LLaVA": {"video": 703_000, "picture": 558_000},  # without sound
    "LVIS": {"picture": 119_979},  # masks stay in the annotations
}


def media_of(folder: Path, root: Path) -> dict[str, list[Medium]]:
    """Copy the example files into `root` under several names; return the media by kind."""
    video = next((folder / "ave").glob("*.mp4"))
    sources = {
        "video": (video, "frames", "video"),
        "sound": (video.with_suffix(".mp3"), "sounds", "ten"),
        "picture": (folder / "s4" / "0.jpg", "frames", "picture"),
        "mask": (folder / "s4" / "0.png", "masks", "binary"),
    }
    found: dict[str, list[Medium]] = {}
    for name, (file, kind, detail) in sources.items():
        found[name] = []
        for number in range(COPIES):
            path = f"{name}{number}{file.suffix}"
            shutil.copy(file, root / path)
            found[name].append(Medium(kind, path, detail))
    return found


def rate_of(chosen: list[Medium], root: Path, out: Path) -> Rate:
    """Return the rate of one kind."""
    settings = prepare.Settings(str(root), Decoding(224, 10, False), ("train",), 10**9)
    stamps = tuple(prepare._stamps(root, medium) for medium in chosen)
    shard = prepare.Shard(f"{chosen[0].kind}/x.array_record-00000-of-00001", tuple(chosen), stamps)
    seconds = []
    for _ in range(ROUNDS + 1):  # the first warms up
        began = time.process_time()
        note = prepare.write_shard(settings, out, shard)
        seconds.append(time.process_time() - began)
        assert not note["failed"], note["failed"]
    return Rate(len(chosen) / statistics.median(seconds[1:]), note["bytes"] / len(chosen) / 1e3)


def extrapolated(rates: dict[str, Rate], cores: int, dollars: float) -> str:
    """Return a Markdown table of whole datasets."""
    heads = [f"minutes, {count} part{'s' * (count > 1)}" for count in PARTS]
    lines = [f"| data | media | core hours | {' | '.join(heads)} | GB | USD | MB/s a part writes |", "|---" * 9 + "|"]
    for stage, counts in STAGES.items():
        hours = sum(count / rates[kind].per_s for kind, count in counts.items()) / 3600
        size = sum(count * rates[kind].kilobytes for kind, count in counts.items()) / 1e6
        walls = " | ".join(f"{60 * hours / cores / parts:.2g}" for parts in PARTS)
        lines.append(
            f"| {stage} | {sum(counts.values()):,} | {hours:.1f} | {walls} | {size:.0f} | {hours * dollars:.2f} | "
            f"{size * 1e3 / (hours * 3600 / cores):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=Path, required=True, help="folder of Crab's example files")
    parser.add_argument("--cores", type=int, default=8, help="cores of a machine that does one part")
    parser.add_argument("--dollars", type=float, default=0.05, help="price of a core for an hour")
    parser.add_argument("--json", default="", help="file to write the rates to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, out = Path(folder) / "raw", Path(folder) / "out"
        root.mkdir()
        rates = {name: rate_of(chosen, root, out) for name, chosen in media_of(arguments.media, root).items()}
    print("| one core | media/s | kB in the shard |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate.per_s:.1f} | {rate.kilobytes:.1f} |")
    print(f"\nextrapolated, format {shards.FORMAT}:\n\n{extrapolated(rates, arguments.cores, arguments.dollars)}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({name: rate._asdict() for name, rate in rates.items()}, indent=1))


if __name__ == "__main__":
    main()
