"""A page that shows records of every task as a batch holds them: pictures, sound, masks, text and token layout.

    python -m data_pipelines sample --root R --datasets ave,avss --n 3 --out runs/sample

DIR/index.html shows, for `--n` records of each task of each dataset, the decoded frames, the filter banks of the audio
windows, the mask or box over its picture, the prompt, the target, and the kind of token at each position of the
sequence. It also shows how much of the batches of such data is padding. The file contains its pictures and needs no
network. For a record that cannot be read it shows the error.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crab_jax.io import packaged, paths
from crab_jax.io.bounds import ANYWHERE, Name, Whole
from crab_jax.io.errors import CommandLine, InputError, run_verb
from crab_jax.io.files import out_folder
from crab_jax.io.progress import Progress, on_stderr
from crab_jax.tasks import TASKS, add_flag, use_tasks
from crab_jax.tasks.avs_classes import CLASSES, avss_palette
from crab_jax.visualize.overlay import (
    TRUTH,
    event_tracks,
    figure_png,
    label_of,
    new_figure,
    overlay_boxes,
    overlay_mask,
    side_by_side,
)
from crab_jax.visualize.page import NONE, Html, Section, escape, image, jpeg, table, write
from data_pipelines import bucket_fill, datasets, labels, shards
from data_pipelines.batching import SEG_KINDS, Bucket, DataConfig, bucket_for, load
from data_pipelines.examples import Example
from data_pipelines.mixture import group_by_bucket
from data_pipelines.sources.release import Found
from data_pipelines.tokens import Tokenizer

LONGER = (1280, 1536, 2048, 4096)  # further bucket lengths, to show records that fit no bucket of training
MEASURED = 500  # records of a task and dataset from which the padding is measured
_KINDS = {  # kind of a position of a sequence -> colour, meaning
    "text": ("#c3c9d1", "text of the prompt"),
    "visual": ("#56b4e9", "visual slots"),
    "audio": ("#e69f00", "audio slots"),
    "target": ("#009e73", "target, with loss"),
    "padding": ("#ffffff", "padding"),
}
_MASK, _PREDICTS = "#d55e00", "predicts a mask token"
_STYLE = """
body{max-width:72rem} article{border-top:1px solid #ccc;padding:.7rem 0 1.2rem;break-inside:avoid-page}
h2+article{border:0} h3{font-size:1rem;margin:.2rem 0;overflow-wrap:anywhere} .small{color:#555;font-size:.85rem}
.bad{color:#a33c00;font-weight:600} img,svg{display:block;max-width:100%;margin:.5rem 0}
.said{background:#f5f6f7;padding:.5rem .7rem;margin:.3rem 0;white-space:pre-wrap;font-size:.9rem;overflow-wrap:anywhere}
.said b{display:block;font-size:.8rem;color:#555} .key i,.piece{border-radius:.15rem}
.key span{margin-right:1.1rem;white-space:nowrap}
.key i{display:inline-block;width:1rem;height:.8rem;border:1px solid #888;margin-right:.3rem;vertical-align:-.1rem}
.pieces{font:.78rem/1.75 ui-monospace,monospace;overflow-wrap:anywhere}
.piece{padding:0 .15rem;margin-right:1px;white-space:pre-wrap} summary{cursor:pointer;font-size:.85rem;color:#555}
"""


class Group(NamedTuple):
    """One task of one dataset: the number of its records, and the records that were chosen."""

    task: str
    dataset: str
    records: int
    examples: list[Example]


def rank(example: Example, seed: int) -> bytes:
    """Return a sort key that shuffles records; the order of two records depends only on them and the seed."""
    return hashlib.blake2b(f"{seed} {example.id}".encode("utf-8", "surrogatepass")).digest()


def groups(
    root: str | Path,
    names: Sequence[str],
    split: str,
    variant: str,
    seed: int,
    keep: int,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Group], Counter[str]]:
    """Return up to `keep` shuffled records of every task and dataset, and the number of bad annotations per dataset.

    names: of datasets; without names all that exist are read. In a root with `<split>.jsonl` only that file is read.
    """
    kept: dict[tuple[str, str], list[Example]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    bad: Counter[str] = Counter()
    read = Progress(f"records of {split}", say=progress)
    for name, record in read.over(_records(root, names, split, variant)):
        if isinstance(record, InputError):
            bad[name] += 1
            continue
        key = record.task, str(record.meta.get("dataset", ""))
        counts[key] += 1
        kept.setdefault(key, []).append(record)
        if len(kept[key]) > 2 * keep + 1000:  # limits memory: LVIS has a million records
            kept[key] = sorted(kept[key], key=lambda example: rank(example, seed))[:keep]
    chosen = [
        Group(*key, counts[key], sorted(some, key=lambda example: rank(example, seed))[:keep])
        for key, some in kept.items()
    ]
    return chosen, bad


def _records(root: str | Path, names: Sequence[str], split: str, variant: str) -> Iterator[tuple[str, Found]]:
    """Yield (dataset, record or its error) for all records of the chosen datasets."""
    if (paths.at(root) / f"{split}.jsonl").is_file():
        yield from (("", example) for example in datasets.read_jsonl(root, split))
        return
    for name in datasets.choose(root, names, split) if names else datasets.DATASETS:
        if split in datasets.DATASETS[name].sizes and (names or datasets.is_there(root, name)):
            try:
                yield from ((name, record) for record in datasets.records(root, name, split, variant))
            except InputError as error:  # of an annotation file as a whole
                if names:
                    raise
                yield name, error


# One record.


def article(example: Example, root: str | Path, tokenizer: Tokenizer, config: DataConfig) -> Html:
    """Show one record: the content of its row of a batch."""
    head = Html('<h3>{}</h3><div class="small">{}{}</div>').format(
        example.id, example.meta.get("row", ""), _media(example)
    )
    try:
        bucket = bucket_for(example, tokenizer, config)
        row = load(example, root, tokenizer, dataclasses.replace(config, prompt_only=not example.target))
        shown = (
            _size(bucket, row, config)
            + _pictures(row)
            + _sound(example, row)
            + _answer(example, row)
            + _text(example)
            + _layout(row, bucket, tokenizer, config)
        )
    except InputError as error:
        shown = Html('<p class="bad">{}</p>').format(error) + _text(example)
    label = {key: value for key, value in example.meta.items() if key != "row"}
    return Html("<article>{}{}<details><summary>label</summary><pre>{}</pre></details></article>\n").format(
        head, shown, json.dumps(label, ensure_ascii=False, indent=1)
    )


def _media(example: Example) -> str:
    paths = [path for _, path in datasets.media_of(example)]
    return f" · {', '.join(paths[:3])}" + (f" and {len(paths) - 3} more" if paths[3:] else "")


def _size(bucket: Bucket, row: Mapping[str, np.ndarray], config: DataConfig) -> Html:
    text, frames, sound = (int(row[name].sum()) for name in ("text_mask", "frame_mask", "audio_mask"))
    longest = config.lengths[-len(LONGER) - 1]
    note = (
        Html(' <span class="bad">longer than {}, the longest of data.lengths</span>').format(longest)
        if bucket.length > longest
        else NONE
    )
    summary = (
        f"Bucket: {text} of {bucket.length} positions, {frames} of {bucket.frames} frames, "
        f"{sound} of {bucket.windows} audio windows of {bucket.fbank_frames} filter-bank frames, {bucket.masks} "
        f"masks."
    )
    return Html('<p class="small">{}{}</p>').format(summary, note)


def _pictures(row: Mapping[str, np.ndarray]) -> Html:
    frames = row["frames"][row["frame_mask"]]
    if not len(frames):
        return NONE
    named = [(frame, f"frame {number}") for number, frame in enumerate(frames)]
    strip = side_by_side(named, 110 if len(frames) > 1 else 220)
    return jpeg(strip, f"{len(frames)} frames as the model gets them")


def _sound(example: Example, row: Mapping[str, np.ndarray]) -> Html:
    """Draw the filter banks of the windows, and below them the events, where windows are tenths of the clip."""
    windows = row["fbank"][row["audio_mask"]]
    if not len(windows):
        return NONE
    timed = TASKS[example.task].timed and example.windows == "ten" and labels.sound(example)
    tracks = event_tracks(example.task, example.meta, TRUTH) if timed else []
    rows = 0.3 * len(tracks) + 0.25 if tracks else 0.01
    figure = new_figure(10.5, 1.7 + rows)
    banks, events = figure.subplots(2, 1, sharex=True, height_ratios=[1.7, rows], gridspec_kw={"hspace": 0.05})
    for number, window in enumerate(windows):
        drawn = banks.imshow(
            window.T,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=-1.3,
            vmax=1.3,
            extent=(number + 0.02, number + 0.98, 0, window.shape[1]),
        )
    banks.set_xlim(0, len(windows))
    banks.set_yticks([0, 64, 128])
    banks.set_ylabel("mel bin")
    figure.colorbar(drawn, ax=[banks, events], fraction=0.015, pad=0.01)
    for line, track in enumerate(tracks):
        events.broken_barh(
            [(start, end - start) for start, end in track.spans], (line - 0.35, 0.7), color=np.array(track.colour) / 255
        )
    events.set_yticks(range(len(tracks)), [label_of(track.label) for track in tracks], fontsize=9)
    events.set_ylim(len(tracks) - 0.5, -0.5) if tracks else None
    events.grid(axis="x", color="0.88")
    events.set_axisbelow(True)
    bottom = events if tracks else banks
    if not tracks:
        events.axis("off")
        banks.tick_params(labelbottom=True)
    numbers = range(len(windows) + bool(tracks))
    bottom.set_xticks(np.array(numbers) + (0.0 if tracks else 0.5), numbers)
    bottom.set_xlabel("seconds of a clip of ten (tenths of any other)" if tracks else "audio window")
    return image(figure_png(figure), f"filter banks of {len(windows)} audio windows, {example.windows}")


def _answer(example: Example, row: Mapping[str, np.ndarray]) -> Html:
    """Show the picture beside a copy with its mask drawn over it; or the picture with its box."""
    shown = []
    for picture, mask, kind in zip(row["seg_frame"], row["seg_target"], row["seg_kind"], strict=True):
        binary = kind == SEG_KINDS["binary"]
        over = overlay_mask(picture, mask.astype(bool) if binary else mask, TRUTH)
        names = [f"{CLASSES[number]} {np.mean(mask == number):.1%}" for number in np.unique(mask) if number]
        content = f"{np.mean(mask > 0):.1%} of the picture is in the mask" if binary else ", ".join(names) or "empty"
        pictures = side_by_side([(picture, "picture to segment"), (over, "mask")], 224)
        shown.append(
            jpeg(pictures, "mask")
            + Html('<p class="small">Mask ({}): {}.{}</p>').format(
                example.mask_kind, content, NONE if binary else _classes(np.unique(mask))
            )
        )
    task = TASKS[example.task]
    box = task.box(example.meta) if task.answer == "box" and labels.sound(example) else None
    if box and row["frame_mask"].any():
        over = overlay_boxes(row["frames"][row["frame_mask"]][-1], [(box, TRUTH, "")])
        shown.append(jpeg(side_by_side([(over, f"box {tuple(box)}")], 224), "box"))
    return NONE.join(shown)


def _classes(numbers: np.ndarray) -> Html:
    colours = avss_palette()
    return Html(' <span class="key">{}</span>').format(
        NONE.join(
            Html('<span><i style="background:rgb{}"></i>{}</span>').format(
                tuple(int(v) for v in colours[number]), CLASSES[number]
            )
            for number in numbers
            if number
        )
    )


def _text(example: Example) -> Html:
    target = example.target or "none: the annotations are incomplete, so training leaves this record out"
    return Html('<div class="said"><b>prompt</b>{}</div><div class="said"><b>target</b>{}</div>').format(
        example.instruction, target
    )


# The sequence.


def kinds(row: Mapping[str, np.ndarray], bucket: Bucket, config: DataConfig) -> list[str]:
    """Return the kind of each of the L positions, a key of _KINDS."""
    visual = bucket.frames * config.visual_queries  # the first rows of the features
    slots = np.where(row["slots"] < 0, "text", np.where(row["slots"] < visual, "visual", "audio"))
    real = np.where(row["loss_mask"], "target", slots)
    names: list[str] = np.where(row["text_mask"], real, "padding").tolist()
    return names


def segments(kinds: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (kind, first position, length) of every run of equal kinds."""
    runs, at = [], 0
    for kind, run in groupby(kinds):
        count = len([*run])
        runs.append((kind, at, count))
        at += count
    return runs


def _layout(row: Mapping[str, np.ndarray], bucket: Bucket, tokenizer: Tokenizer, config: DataConfig) -> Html:
    """Show a strip of all positions, a table of its parts, and the tokens."""
    runs = segments(kinds(row, bucket, config))
    masks = row["mask_positions"].ravel().tolist() if row["loss_mask"].any() else []
    queries = {"visual": (config.visual_queries, "frames"), "audio": (config.audio_queries, "windows")}
    lines = []
    for kind, start, count in runs:
        what = _KINDS[kind][1]
        if kind in queries:
            each, of = queries[kind]
            what += f": {count // each} {of} of {each}"
        here = [position for position in masks if start <= position < start + count]
        if here:
            what += f"; {', '.join(map(str, here))} predict the mask tokens"
        swatch = Html('<span class="key"><i style="background:{}"></i></span>').format(_KINDS[kind][0])
        last = start + count - 1
        lines.append((swatch + kind, f"{start}–{last}", count, what))
    return Html(
        "{}<details><summary>positions</summary>{}</details><details><summary>tokens</summary>{}</details>"
    ).format(
        _strip(runs, masks, bucket.length),
        table(("", "positions", "count", "what"), lines),
        _pieces(row, runs, masks, tokenizer),
    )


def _strip(runs: Sequence[tuple[str, int, int]], masks: Sequence[int], length: int) -> Html:
    """Draw the sequence as SVG: parts in proportion, with their first position above and their length inside."""
    width, top, height = 1080, 16, 26
    parts = []
    for kind, start, count in runs:
        x, w = width * start / length, width * count / length
        parts.append(
            f'<rect x="{x:.1f}" y="{top}" width="{w:.1f}" height="{height}" fill="{_KINDS[kind][0]}" '
            f'stroke="#777" stroke-width=".7"><title>{_KINDS[kind][1]}: {start} to {start + count - 1}</title>'
            "</rect>"
        )
        if w > 26:
            parts.append(
                f'<text x="{x + 1:.1f}" y="{top - 4}">{start}</text>'
                f'<text x="{x + w / 2:.1f}" y="{top + 17}" text-anchor="middle">{count}</text>'
            )
    for position in masks:
        x = width * (position + 0.5) / length
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height + 7}" stroke="{_MASK}" '
            f'stroke-width="1.1"><title>{position} predicts a mask token</title></line>'
        )
    return Html(  # needs no escaping: it holds only numbers and constants
        f'<svg viewBox="0 0 {width} {top + height + 9}" width="100%" font-family="system-ui,sans-serif" '
        f'font-size="11" fill="#222" role="img" aria-label="token layout">{"".join(parts)}</svg>'
    )


def _pieces(
    row: Mapping[str, np.ndarray], runs: Sequence[tuple[str, int, int]], masks: Sequence[int], tokenizer: Tokenizer
) -> Html:
    """Show text tokens one by one, runs of slots and padding as blocks; tokens that predict a mask token are framed."""
    ids, out = row["tokens"].tolist(), list[Html]()
    block = Html('<span class="piece" style="background:{};border:1px solid #777">{} {}</span>')
    piece = Html('<span class="piece" title="{}: id {}" style="{}">{}</span>')
    for kind, start, count in runs:
        colour = _KINDS[kind][0]
        if kind in ("visual", "audio", "padding"):
            out.append(block.format(colour, count, kind))
            continue
        for at in range(start, start + count):
            # A token's text depends on the one before it: a leading space is dropped at the start of a text.
            before = tokenizer.decode(ids[at - 1 : at], skip_special_tokens=False) if at else ""
            text = tokenizer.decode(ids[max(0, at - 1) : at + 1], skip_special_tokens=False)[len(before) :]
            style = f"background:{colour}" + (f";outline:2px solid {_MASK}" if at in masks else "")
            out.append(piece.format(at, ids[at], style, Html(escape(text).replace("\n", "&crarr;\n") or "&nbsp;")))
    return Html('<div class="pieces">{}</div>').format(NONE.join(out))


# The page.


def page(
    file: Path,
    chosen: Sequence[Group],
    bad: Mapping[str, int],
    n: int,
    split: str,
    root: str | Path,
    tokenizer: Tokenizer,
    config: DataConfig,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Write the page, and return the number of records that it shows."""
    longer = dataclasses.replace(config, lengths=(*config.lengths, *(x for x in LONGER if x > config.lengths[-1])))
    sections, total = [], sum(len(group.examples[:n]) for group in chosen)
    drawn = Progress("records drawn", total, progress)
    for group in chosen:
        body = NONE
        for example in group.examples[:n]:
            body += article(example, root, tokenizer, longer)
            drawn.add()
        title = f"{group.task}: {group.dataset}" if group.dataset not in ("", group.task) else group.task
        title += f" ({len(group.examples[:n])} of {group.records:,})"
        sections.append(Section(f"{group.task}-{group.dataset}", title, body))
    meaning = Html('<span><i style="background:{}"></i>{}</span>')
    key = NONE.join(meaning.format(*kind) for kind in (*_KINDS.values(), (f"{_MASK};width:.2rem", _PREDICTS)))
    wrong = NONE.join(Html("<li>{}: {} records</li>").format(name or split, f"{n:,}") for name, n in bad.items())
    intro = (
        Html(
            "<p>Split <b>{}</b> of {}, decoded, cut and tokenised as a batch of training has it (tokenizer of {} "
            'tokens).</p><p class="key">{}</p>'
        ).format(split, root, f"{tokenizer.vocab_size:,}", key)
        + Html(
            '<p class="small">Numbers above a strip are positions, those inside it lengths. The loss at a '
            "target position is of the prediction one position earlier. Each window of sound is one input of "
            "the audio encoder.</p>"
        )
        + (
            Html('<p class="bad">Not readable, see <code>status</code>:</p><ul>{}</ul>').format(wrong)
            if wrong
            else NONE
        )
    )
    measured = [example for group in chosen for example in group.examples]
    sections.append(Section("padding", "Padding of the batches", _padding(measured, chosen, tokenizer, longer)))
    write(file, "Data sample", intro, sections, _STYLE)
    return total


def _padding(measured: Sequence[Example], chosen: Sequence[Group], tokenizer: Tokenizer, config: DataConfig) -> Html:
    """Show the table of padding, in which each task of a dataset has the weight of all of its records."""
    try:
        groups = group_by_bucket(measured, tokenizer, dataclasses.replace(config, on_error="skip"))
    except InputError as error:  # no record can be read; their errors are shown above
        return Html('<p class="bad">{}</p>').format(error)
    weight = [group.records / len(group.examples) for group in chosen for _ in group.examples]
    rows = bucket_fill.padding(groups, np.array(weight))
    summary = (
        f"From {sum(map(len, groups.values())):,} of {sum(group.records for group in chosen):,} records, in buckets of "
        f"{', '.join(map(str, config.lengths))} positions."
    )
    return Html("<p>{}</p>{}").format(summary, table(bucket_fill.HEAD, bucket_fill.cells(rows)))


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; raises InputError when it is wrong."""
    parser = CommandLine(__doc__, "python -m data_pipelines sample")
    parser.add_argument("--root", type=ANYWHERE, required=True, help="data root, raw or prepared")
    parser.add_argument(
        "--datasets",
        default="",
        help=f"comma-separated, of {','.join(datasets.DATASETS)} (default: all that exist below --root)",
    )
    parser.add_argument("--split", type=Name(), default="train", help="split to read (default: train)")
    parser.add_argument(
        "--variant", default="train", help=f"variant of the prompts: {', '.join(datasets.VARIANTS)} (default: train)"
    )
    parser.add_argument("--n", type=Whole(1), default=2, help="records of each task of each dataset (default: 2)")
    parser.add_argument("--seed", type=Whole(), default=0, help="seed of the choice of records (default: 0)")
    parser.add_argument(
        "--tokenizer",
        type=ANYWHERE,
        default=packaged.TOKENIZER,
        help="tokenizer.json or a LLaMA directory (default: the "
        "small one of the tiny configs, whose sequences are longer than LLaMA's)",
    )
    parser.add_argument("--out", type=ANYWHERE, required=True, metavar="DIR", help="folder to write index.html to")
    add_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> None:
    """Write the page that the command line asks for."""
    arguments = parse_arguments(argv)
    use_tasks([arguments.task_modules])
    file = out_folder(arguments.out) / "index.html"
    if not paths.at(arguments.root).is_dir():
        raise InputError(arguments.root, "--root", "is no folder", "give the folder that holds the datasets")
    tokenizer = Tokenizer.load(arguments.tokenizer)

    names = [name for name in arguments.datasets.split(",") if name]
    keep = max(arguments.n, MEASURED)
    chosen, bad = groups(arguments.root, names, arguments.split, arguments.variant, arguments.seed, keep, on_stderr)
    if not chosen:
        raise InputError(
            arguments.root,
            "--root",
            f"holds no readable record of {arguments.split!r}",
            "see what `python -m data_pipelines status` says",
        )
    prepared = shards.opened(arguments.root)
    config = DataConfig(**prepared.decoding._asdict()) if prepared else DataConfig()
    shown = page(file, chosen, bad, arguments.n, arguments.split, arguments.root, tokenizer, config, on_stderr)
    print(f"{shown} records in {file}")


def main(argv: Sequence[str]) -> None:
    """Entry point of `python -m data_pipelines sample`."""
    run_verb(lambda: run(argv), "--debug" in argv)
